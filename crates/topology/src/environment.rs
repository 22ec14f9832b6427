//! The resolved environment: what the agent runs and what a manifest stores.
//!
//! Everything is explicit: defaults are filled in, sizes are bytes, paths no longer depend on the file's folder.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::address::{InterfaceAddress, MacAddress};
use crate::names::{DiskName, EnvironmentName, HostName, LabelName, LabelValue, MachineName, NetworkName};

/// The machines and networks that one file describes, as one unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Its name.
    pub name: EnvironmentName,
    /// Its machines, in the file's order. Names are unique.
    pub machines: Vec<Machine>,
    /// Its networks, in the file's order. Names are unique.
    pub networks: Vec<Network>,
}

/// One virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub name: MachineName,
    /// What it boots.
    pub boot: Boot,
    /// How many virtual CPUs it has.
    pub cpus: u32,
    /// Its memory, in bytes: a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// The CPU model in QEMU's words, with flags; `None` leaves the choice to Diorama.
    pub cpu_model: Option<String>,
    /// What executes its instructions.
    pub accelerator: Accelerator,
    /// Its network interfaces, in the file's order.
    pub nics: Vec<Nic>,
    /// Its disks besides the one it boots from, in the file's order. Names are unique.
    pub disks: Vec<Disk>,
    /// The host that it must run on; `None` leaves the choice to Diorama.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostName>,
    /// The labels that its host must carry, all of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<LabelName, LabelValue>,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Boot {
    /// An image that comes with Diorama, by name: `micro`.
    BuiltIn {
        /// The image's name.
        image: String,
    },
    /// A disk image, which is never written: the machine gets an overlay over it, the disk `root`.
    DiskImage {
        /// The image's path.
        path: PathBuf,
    },
    /// A kernel, without a boot disk.
    Kernel {
        /// The kernel's path.
        kernel: PathBuf,
        /// The initial RAM disk's path.
        initrd: Option<PathBuf>,
        /// The kernel's command line; may be empty.
        cmdline: String,
    },
}

/// What executes a machine's instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where it is known to work, else TCG.
    #[default]
    Auto,
    /// KVM, or the machine does not start.
    Kvm,
    /// TCG, QEMU's translator.
    Tcg,
}

/// A network interface of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The network it attaches to, one of the environment's.
    pub network: NetworkName,
    /// Its hardware address, unique in the environment.
    pub mac: MacAddress,
    /// The address handed to the guest where its image supports that.
    pub address: Option<InterfaceAddress>,
}

/// A disk of a machine, besides the one it boots from: empty of a size, or an overlay over an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name.
    pub name: DiskName,
    /// Its size, in bytes. `None` means the image's: at least one of the two is there.
    pub size_bytes: Option<u64>,
    /// The image under it, which is never written.
    pub image: Option<PathBuf>,
}

/// A layer-2 segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: NetworkName,
    /// The largest packet its frames carry, in bytes.
    pub mtu: u16,
    /// How much may wait for each of its ports, in bytes.
    pub queue_bytes: u64,
}

impl Environment {
    /// The machine of this name.
    pub fn machine(&self, name: &str) -> Option<&Machine> {
        self.machines.iter().find(|machine| machine.name.as_str() == name)
    }

    /// The network of this name.
    pub fn network(&self, name: &str) -> Option<&Network> {
        self.networks.iter().find(|network| network.name.as_str() == name)
    }

    /// The part of the environment that some of its machines are: those, in the same order, and all networks.
    pub fn part(&self, machines: impl Fn(&str) -> bool) -> Environment {
        let machines = self.machines.iter().filter(|machine| machines(machine.name.as_str())).cloned();
        Environment { name: self.name.clone(), machines: machines.collect(), networks: self.networks.clone() }
    }

    /// The same environment under another name: what a fork runs. All addresses stay.
    pub fn renamed(&self, name: EnvironmentName) -> Environment {
        Environment { name, ..self.clone() }
    }
}
