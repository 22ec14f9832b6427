//! Reading `nics`, and the addresses that must differ over all machines.
//!
//! States: a NIC is a draft until every machine is read; then those without a MAC address get one that nobody has.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::address::{AddressError, InterfaceAddress, MacAddress};
use crate::document::{Key, Node, Value};
use crate::environment::{Machine, Nic};
use crate::limits::MAX_NICS;
use crate::names::{MachineName, NetworkName};
use crate::problem::{At, Excerpt, listed, nearest};

use super::Reader;
use super::fields::Fields;

/// The fields of a NIC.
pub(crate) const NIC_FIELDS: &[&str] = &["network", "address", "mac"];

/// A machine's NICs, some still without a MAC address.
#[derive(Default)]
pub(super) struct NicDrafts(Vec<NicDraft>);

struct NicDraft {
    network: NetworkName,
    mac: Option<MacAddress>,
    address: Option<InterfaceAddress>,
}

/// The addresses in use, and where each was first given.
#[derive(Default)]
pub(super) struct Taken {
    macs: HashMap<MacAddress, Place>,
    addresses: HashMap<(NetworkName, IpAddr), Place>,
}

struct Place {
    machine: String,
    line: u32,
}

impl NicDrafts {
    /// Gives the machine its NICs.
    pub fn attach(self, mut machine: Machine, taken: &mut Taken) -> Machine {
        for (index, draft) in self.0.into_iter().enumerate() {
            let mac = draft.mac.unwrap_or_else(|| taken.free_mac(&machine.name, index));
            machine.nics.push(Nic { network: draft.network, mac, address: draft.address });
        }
        machine
    }
}

impl Taken {
    /// The first generated address that nobody has. Ends: there are a thousand times more than NICs.
    fn free_mac(&mut self, machine: &MachineName, nic_index: usize) -> MacAddress {
        let mut attempt = 0;
        loop {
            let mac = MacAddress::generated(machine, nic_index, attempt);
            if let std::collections::hash_map::Entry::Vacant(free) = self.macs.entry(mac) {
                free.insert(Place { machine: machine.to_string(), line: 0 });
                return mac;
            }
            attempt += 1;
        }
    }
}

impl Reader<'_> {
    pub(super) fn nics(
        &mut self,
        node: &Node,
        machine: &Key,
        networks: &[&str],
        taken: &mut Taken,
    ) -> Option<NicDrafts> {
        let Value::List(nodes) = &node.value else {
            self.problems.push(node.unexpected("a list of NICs, such as `[lan]` or `[{network: lan}]`"));
            return None;
        };
        if let Some(extra) = nodes.get(MAX_NICS) {
            let message = format!("{} NICs; a machine has at most {MAX_NICS}", nodes.len());
            self.problems.push(extra.at.problem(message, "one too many"));
        }
        let nics = nodes.iter().take(MAX_NICS).map(|node| self.nic(node, machine, networks, taken));
        // Not collected into an option at once: that would stop at the first NIC with a problem.
        let nics: Vec<Option<NicDraft>> = nics.collect();
        nics.into_iter().collect::<Option<_>>().map(NicDrafts)
    }

    fn nic(&mut self, node: &Node, machine: &Key, networks: &[&str], taken: &mut Taken) -> Option<NicDraft> {
        let Value::Map(entries) = &node.value else {
            let network =
                self.nic_network(node, "a network's name or a NIC such as `{network: lan}`", networks)?;
            return Some(NicDraft { network, mac: None, address: None });
        };
        let fields = Fields::read("a NIC", entries, NIC_FIELDS, &mut self.problems);
        let network = match fields.value("network") {
            Some(node) => self.nic_network(node, "a network's name", networks),
            None => {
                let problem = node.at.problem("the NIC names no network", "no `network`");
                self.problems.push(problem.hint("add `network: lan`"));
                None
            }
        };
        let mac = match fields.value("mac") {
            Some(node) => self.mac(node, machine, taken).map(Some),
            None => Some(None),
        };
        let address = match fields.value("address") {
            Some(node) => self.address(node, machine, network.as_ref(), taken).map(Some),
            None => Some(None),
        };
        Some(NicDraft { network: network?, mac: mac?, address: address? })
    }

    fn nic_network(&mut self, node: &Node, expected: &str, networks: &[&str]) -> Option<NetworkName> {
        let text = self.text(node, expected)?;
        if networks.contains(&text) {
            // A declared name that breaks the rule is reported where it is declared.
            return text.parse().ok();
        }
        let hint = match nearest(text, networks.iter().copied()) {
            _ if networks.is_empty() => "the file declares none: add `networks: {lan: {}}`".to_owned(),
            Some(word) => {
                format!("did you mean `{word}`? The networks are {}", listed(networks.iter().copied()))
            }
            None => format!("the networks are {}", listed(networks.iter().copied())),
        };
        let message = format!("there is no network {}", Excerpt(text));
        self.problems.push(node.at.problem(message, "unknown network").hint(hint));
        None
    }

    fn mac(&mut self, node: &Node, machine: &Key, taken: &mut Taken) -> Option<MacAddress> {
        let text = self.text(node, "a MAC address such as `52:54:00:12:34:56`")?;
        let mac: MacAddress = match text.parse() {
            Ok(mac) => mac,
            Err(error) => {
                let problem = node.at.problem(format!("{error}"), "not a MAC address");
                self.problems.push(problem.hint("six pairs of hexadecimal digits: `52:54:00:12:34:56`"));
                return None;
            }
        };
        if let Some(first) = taken.macs.get(&mac) {
            let message = format!("the MAC address {mac} is given twice");
            self.given_twice(&node.at, message, first);
            return None;
        }
        taken.macs.insert(mac, Place { machine: machine.text.clone(), line: node.at.line });
        Some(mac)
    }

    fn address(
        &mut self,
        node: &Node,
        machine: &Key,
        network: Option<&NetworkName>,
        taken: &mut Taken,
    ) -> Option<InterfaceAddress> {
        let text = self.text(node, "an address such as `10.0.0.1/24`")?;
        let address: InterfaceAddress = match text.parse() {
            Ok(address) => address,
            Err(error) => {
                let hint = match &error {
                    AddressError::NoPrefix { ip: IpAddr::V4(ip) } => format!("for example `{ip}/24`"),
                    AddressError::NoPrefix { ip: IpAddr::V6(ip) } => format!("for example `{ip}/64`"),
                    AddressError::NetworkAddress { .. } | AddressError::BroadcastAddress { .. } => {
                        "take one between the network's first and last".to_owned()
                    }
                    _ => "for example `10.0.0.1/24` or `fd00::1/64`".to_owned(),
                };
                self.problems.push(node.at.problem(error.to_string(), "not a NIC's address").hint(hint));
                return None;
            }
        };
        let on_network = (network?.clone(), address.ip());
        if let Some(first) = taken.addresses.get(&on_network) {
            let message =
                format!("the address {} is given twice on the network `{}`", address.ip(), on_network.0);
            self.given_twice(&node.at, message, first);
            return None;
        }
        taken.addresses.insert(on_network, Place { machine: machine.text.clone(), line: node.at.line });
        Some(address)
    }

    fn given_twice(&mut self, at: &At, message: String, first: &Place) {
        let hint = format!("the first is on line {}, of {}", first.line, Excerpt(&first.machine));
        self.problems.push(at.problem(message, "given again").hint(hint));
    }
}
