//! Reading `networks`.

use crate::document::{Node, Value};
use crate::environment::Network;
use crate::limits::{DEFAULT_MTU, DEFAULT_QUEUE_BYTES, MAX_NETWORKS, MTU, QUEUE_BYTES};
use crate::names::NetworkName;

use super::Reader;
use super::fields::Fields;

/// The fields of a network.
pub(crate) const NETWORK_FIELDS: &[&str] = &["mtu", "queue"];

/// What `networks` says.
#[derive(Default)]
pub(super) struct Networks<'n> {
    /// Those without a problem, in the file's order.
    pub read: Vec<Network>,
    /// What is declared at all, so that a NIC on a network with a problem of its own is not a second problem.
    pub declared: Vec<&'n str>,
}

impl Reader<'_> {
    pub(super) fn networks<'n>(&mut self, fields: &Fields<'n>) -> Networks<'n> {
        let entries = match fields.value("networks").map(|node| (node, &node.value)) {
            Some((_, Value::Map(entries))) => entries,
            None | Some((_, Value::Null)) => return Networks::default(),
            Some((node, _)) => {
                self.problems.push(node.unexpected("a mapping from each network's name to its settings"));
                return Networks::default();
            }
        };
        if let Some((key, _)) = entries.get(MAX_NETWORKS) {
            let message = format!("{} networks; an environment has at most {MAX_NETWORKS}", entries.len());
            self.problems.push(key.at.problem(message, "one too many"));
        }
        let entries = &entries[..entries.len().min(MAX_NETWORKS)];
        let declared = entries.iter().map(|(key, _)| key.text.as_str()).collect();
        let named = self.named("network", entries);
        let read = named.into_iter().filter_map(|(name, _, node)| self.network(name, node)).collect();
        Networks { read, declared }
    }

    fn network(&mut self, name: Option<NetworkName>, node: &Node) -> Option<Network> {
        let entries = match &node.value {
            Value::Map(entries) => entries.as_slice(),
            Value::Null => &[],
            _ => {
                self.problems.push(node.unexpected("a network's settings, such as `{}` or `{mtu: 9000}`"));
                return None;
            }
        };
        let fields = Fields::read("a network", entries, NETWORK_FIELDS, &mut self.problems);
        let mtu = match fields.value("mtu") {
            Some(node) => {
                self.whole_number(node, "an MTU in bytes", &MTU).and_then(|mtu| u16::try_from(mtu).ok())
            }
            None => Some(DEFAULT_MTU),
        };
        let queue_bytes = match fields.value("queue") {
            Some(node) => self.size(node, "a network's queue", &QUEUE_BYTES, 1),
            None => Some(DEFAULT_QUEUE_BYTES),
        };
        Some(Network { name: name?, mtu: mtu?, queue_bytes: queue_bytes? })
    }
}
