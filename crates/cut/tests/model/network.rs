//! What is on the control network: an unordered collection of messages, each of which may be delivered at any time.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use diorama_cut::message::Message;

/// Who sends and receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    Initiator,
    Host(usize),
}

/// One message under way. Its fingerprint stands for it where states are compared: a collision hides a state with
/// a probability that is that of the checker's own fingerprints.
#[derive(Debug, Clone)]
pub struct Envelope {
    fingerprint: u64,
    pub from: Node,
    pub to: Node,
    pub message: Arc<Message>,
}

impl PartialEq for Envelope {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

impl Eq for Envelope {}

impl Hash for Envelope {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.fingerprint);
    }
}

/// Invariant: sorted by fingerprint, so that equal collections are equal whatever the order of sending.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Network {
    under_way: Vec<Envelope>,
}

impl Network {
    /// Adds a message; with `once`, only if there is none like it.
    pub fn send(&mut self, from: Node, to: Node, message: Message, once: bool) {
        let mut hasher = DefaultHasher::new();
        (from, to, &message).hash(&mut hasher);
        let fingerprint = hasher.finish();
        let at = self.under_way.partition_point(|other| other.fingerprint < fingerprint);
        if once && self.under_way.get(at).is_some_and(|other| other.fingerprint == fingerprint) {
            return;
        }
        self.under_way.insert(at, Envelope { fingerprint, from, to, message: Arc::new(message) });
    }

    pub fn remove(&mut self, at: usize) -> Envelope {
        self.under_way.remove(at)
    }

    pub fn get(&self, at: usize) -> Envelope {
        self.under_way[at].clone()
    }

    pub fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Where each different message is.
    pub fn distinct(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.under_way.len()).filter(|&at| at == 0 || self.under_way[at] != self.under_way[at - 1])
    }
}
