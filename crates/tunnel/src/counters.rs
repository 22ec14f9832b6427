//! What one tunnel has seen. All counts are over its life.

/// Packets sent, and packets that came, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelCounters {
    /// Packets made.
    pub sent: u64,
    /// The bytes of their frames.
    pub sent_bytes: u64,
    /// Packets whose frames were given out.
    pub opened: u64,
    /// The bytes of those frames.
    pub opened_bytes: u64,
    /// Packets that are not packets of ours.
    pub malformed: u64,
    /// Packets that are sealed where they should not be, or not where they should.
    pub wrong_protection: u64,
    /// Packets of a key that this tunnel does not have.
    pub unknown_key: u64,
    /// Packets of the key that was forgotten last.
    pub old_key: u64,
    /// Packets of a key that does not open them: made or changed by somebody else.
    pub forged: u64,
    /// Packets that came before.
    pub replayed: u64,
    /// Packets so late that it cannot be told whether they came before.
    pub too_old: u64,
    /// Genuine packets for a network that this tunnel does not carry.
    pub not_a_member: u64,
    /// Packets that were sent, by their numbers, and never came.
    pub lost: u64,
    /// Packets that have not come while later ones have: lost, or late.
    pub missing: u64,
}
