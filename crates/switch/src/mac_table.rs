//! Which address was last seen at which of a network's ports, or at which other host. Open addressing, linear probing,
//! keyed by a caller's seed.
//!
//! Owns the entries, their age and the bounds that keep one machine from filling the table for the others. Ports are
//! numbered within their network here, and so are peers, with the same numbers: to the table a peer is a port with a
//! larger bound.
//!
//! Invariants: at most half of the slots are used, so that probing ends; an address has one slot; `per_port[p]` is the
//! number of slots of port p. Slots are only freed by a sweep, which rebuilds the table.
//!
//! A machine that sends with another's address moves that entry to itself, as on any learning switch.

use crate::{Mac, Time};

/// What an entry lives without being seen, as on a bridge by default (IEEE 802.1D): 300 s.
const LIFETIME_NS: u64 = 300_000_000_000;

/// Addresses that every port may learn however full the table is: those of its own NIC and a few more.
const ALWAYS_PER_PORT: u32 = 4;

/// A full table is swept for aged entries at most this often, so that a flood of addresses cannot buy a sweep each.
const SWEEP_INTERVAL_NS: u64 = 1_000_000_000;

const SMALLEST_SLOTS: usize = 16;
const EMPTY: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The address in the low 48 bits, or `EMPTY`.
    key: u64,
    seen: Time,
    port: u32,
}

const FREE: Slot = Slot { key: EMPTY, seen: Time(0), port: 0 };

#[derive(Debug)]
pub(crate) struct MacTable {
    slots: Box<[Slot]>,
    used: usize,
    per_port: Vec<u32>,
    most_per_port: Vec<u32>,
    most: usize,
    keys: [u64; 2],
    next_sweep: Time,
    newest: Time,
}

impl MacTable {
    pub(crate) fn new(most: usize, seed: u64) -> Self {
        Self {
            slots: vec![FREE; SMALLEST_SLOTS].into_boxed_slice(),
            used: 0,
            per_port: Vec::new(),
            most_per_port: Vec::new(),
            most,
            keys: [mix(seed), mix(seed ^ u64::MAX) | 1],
            next_sweep: Time(0),
            newest: Time(0),
        }
    }

    /// The next number is a port that may have so many entries.
    pub(crate) fn add_port(&mut self, most: usize) {
        self.per_port.push(0);
        self.most_per_port.push(u32::try_from(most).unwrap_or(u32::MAX));
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    /// The port where `mac` was last seen, unless that is too long ago.
    #[inline]
    pub(crate) fn lookup(&self, mac: Mac, now: Time) -> Option<u32> {
        let slot = &self.slots[self.probe(key(mac))];
        (slot.key != EMPTY && !is_aged(slot, now)).then_some(slot.port)
    }

    /// `mac` was seen as a source at `port`. False if it was not learned because a bound was reached.
    #[inline]
    pub(crate) fn observe(&mut self, mac: Mac, port: u32, now: Time) -> bool {
        self.newest = self.newest.max(now);
        let key = key(mac);
        let at = self.probe(key);
        let slot = &mut self.slots[at];
        if slot.key == key && slot.port == port {
            slot.seen = now;
            return true;
        }
        self.observe_change(key, port, now)
    }

    /// Everything that has not aged, in no particular order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Mac, u32)> + '_ {
        self.slots
            .iter()
            .filter(|s| s.key != EMPTY && !is_aged(s, self.newest))
            .map(|s| (address(s.key), s.port))
    }

    pub(crate) fn assert_consistent(&self) {
        let mut per_port = vec![0; self.per_port.len()];
        for (at, slot) in self.slots.iter().enumerate().filter(|(_, s)| s.key != EMPTY) {
            per_port[slot.port as usize] += 1;
            assert_eq!(self.probe(slot.key), at, "an address cannot be found, or has two slots");
        }
        assert_eq!(per_port, self.per_port, "per-port counts are stale");
        assert_eq!(per_port.iter().sum::<u32>() as usize, self.used, "the count of entries is stale");
        assert!(self.used * 2 <= self.slots.len(), "{} of {} slots used", self.used, self.slots.len());
    }

    /// A new address, or one that moved.
    #[cold]
    fn observe_change(&mut self, key: u64, port: u32, now: Time) -> bool {
        let mut at = self.probe(key);
        let moved = self.slots[at].key == key;
        if !self.has_room(port, moved) {
            self.sweep(now);
            at = self.probe(key);
            if !self.has_room(port, self.slots[at].key == key) {
                return false;
            }
        }
        if self.slots[at].key == key {
            self.per_port[self.slots[at].port as usize] -= 1;
        } else {
            if (self.used + 1) * 2 > self.slots.len() {
                self.rebuild(self.slots.len() * 2, |_| true);
                at = self.probe(key);
            }
            self.used += 1;
        }
        self.slots[at] = Slot { key, seen: now, port };
        self.per_port[port as usize] += 1;
        true
    }

    fn has_room(&self, port: u32, moved: bool) -> bool {
        let count = self.per_port[port as usize];
        count < ALWAYS_PER_PORT
            || (count < self.most_per_port[port as usize] && (moved || self.used < self.most))
    }

    fn sweep(&mut self, now: Time) {
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = Time(now.0.saturating_add(SWEEP_INTERVAL_NS));
        self.rebuild(self.slots.len(), |slot| !is_aged(slot, now));
    }

    fn rebuild(&mut self, slots: usize, keep: impl Fn(&Slot) -> bool) {
        let old = std::mem::replace(&mut self.slots, vec![FREE; slots].into_boxed_slice());
        self.used = 0;
        self.per_port.fill(0);
        for slot in old.into_iter().filter(|slot| slot.key != EMPTY && keep(slot)) {
            let at = self.probe(slot.key);
            self.slots[at] = slot;
            self.used += 1;
            self.per_port[slot.port as usize] += 1;
        }
    }

    /// The slot that holds `key`, or the free one where it belongs.
    #[inline]
    fn probe(&self, key: u64) -> usize {
        let mask = self.slots.len() - 1;
        let product = u128::from(key ^ self.keys[0]) * u128::from(self.keys[1]);
        let mut at = ((product >> 64) as u64 ^ product as u64) as usize & mask;
        loop {
            let found = self.slots[at].key;
            if found == key || found == EMPTY {
                return at;
            }
            at = (at + 1) & mask;
        }
    }
}

#[inline]
fn is_aged(slot: &Slot, now: Time) -> bool {
    now.since_ns(slot.seen) > LIFETIME_NS
}

#[inline]
fn key([a, b, c, d, e, f]: Mac) -> u64 {
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

fn address(key: u64) -> Mac {
    let [_, _, a, b, c, d, e, f] = key.to_be_bytes();
    [a, b, c, d, e, f]
}

/// The finaliser of splitmix64: spreads a seed over all bits.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(n: u64) -> Mac {
        address(0x0200_0000_0000 | n)
    }

    fn table(most: usize, most_per_port: usize, ports: usize) -> MacTable {
        let mut table = MacTable::new(most, 7);
        (0..ports).for_each(|_| table.add_port(most_per_port));
        table
    }

    #[test]
    fn learns_moves_and_ages() {
        let mut table = table(100, 100, 2);
        assert!(table.observe(mac(1), 0, Time(5)));
        assert_eq!(table.lookup(mac(1), Time(5)), Some(0));
        assert!(table.observe(mac(1), 1, Time(6)));
        assert_eq!(table.lookup(mac(1), Time(6 + LIFETIME_NS)), Some(1));
        assert_eq!(table.lookup(mac(1), Time(7 + LIFETIME_NS)), None);
        assert_eq!(table.lookup(mac(2), Time(6)), None);
        assert_eq!(table.entries().collect::<Vec<_>>(), [(mac(1), 1)]);
        table.assert_consistent();
    }

    #[test]
    fn flooding_ports_cannot_keep_another_from_learning() {
        let mut table = table(1000, 400, 4);
        let mut learned = [0; 3];
        for n in 0..10_000 {
            let port = n as u32 % 3;
            learned[port as usize] += u32::from(table.observe(mac(n), port, Time(n)));
        }
        assert_eq!(learned.iter().sum::<u32>(), 1000);
        assert!(learned.iter().all(|&n| n <= 400));
        for n in 20_000..20_004 {
            assert!(table.observe(mac(n), 3, Time(n)), "the quiet port's address {n}");
        }
        assert!(!table.observe(mac(20_004), 3, Time(20_004)));
        table.assert_consistent();
    }

    #[test]
    fn a_full_table_makes_room_from_aged_entries() {
        let mut table = table(50, 50, 1);
        for n in 0..60 {
            table.observe(mac(n), 0, Time(0));
        }
        assert_eq!(table.len(), 50);
        assert!(table.observe(mac(1), 0, Time(LIFETIME_NS)));
        assert!(table.observe(mac(99), 0, Time(LIFETIME_NS + 1)));
        assert_eq!(table.len(), 2);
        table.assert_consistent();
    }

    #[test]
    fn agrees_with_a_plain_map_on_addresses_that_differ_little() {
        let mut table = table(4096, 4096, 3);
        let mut model = std::collections::HashMap::new();
        for n in 0..20_000u64 {
            let far_bits = if n % 2 == 0 { 0 } else { (n % 251) << 32 };
            let address = mac(((n * n) % 4093) | far_bits);
            if table.observe(address, (n % 3) as u32, Time(n)) {
                model.insert(address, (n % 3) as u32);
            }
        }
        assert_eq!(table.len(), model.len());
        for (&address, &port) in &model {
            assert_eq!(table.lookup(address, Time(20_000)), Some(port));
        }
        table.assert_consistent();
    }
}
