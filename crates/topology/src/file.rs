//! The file's shape, for what writes files rather than reads them: the JSON Schema, and an environment as a file.
//!
//! Reading does not go through these types (see [`crate::document`]); tests hold the two to the same fields.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Serialize, Serializer};

use crate::address::{InterfaceAddress, MacAddress};
use crate::environment::{Accelerator, Boot, Disk, Environment, Machine, Network, Nic};
use crate::limits::{CPUS, MAX_DISKS, MAX_LABELS, MAX_MACHINES, MAX_NETWORKS, MAX_NICS, MTU};
use crate::names::{LABEL_VALUE_PATTERN, LabelName, LabelValue, NAME_PATTERN};
use crate::size::size_text;

/// The JSON Schema of the environment file, with descriptions and examples. An editor that reads it completes and
/// checks; [`parse`](crate::parse) checks more.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(EnvironmentFile).to_value()
}

/// Why an environment cannot be written as a file.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// YAML is text, and this path is not.
    #[error("the path {} is not UTF-8", path.display())]
    PathNotUtf8 {
        /// The path.
        path: PathBuf,
    },
    /// The YAML writer refused.
    #[error("cannot write the environment as YAML")]
    Yaml(#[from] serde_saphyr::SerializeError),
}

impl Environment {
    /// The environment as a file that [`parse`](crate::parse) reads back to an equal one, everything spelled out.
    pub fn to_yaml(&self) -> Result<String, WriteError> {
        let machines =
            self.machines.iter().map(|machine| Ok((machine.name.as_str(), machine_file(machine)?)));
        let file = EnvironmentFile {
            name: Some(&self.name),
            machines: InOrder(machines.collect::<Result<_, WriteError>>()?),
            networks: InOrder(
                self.networks.iter().map(|network| (network.name.as_str(), network_file(network))).collect(),
            ),
        };
        Ok(serde_saphyr::to_string(&file)?)
    }
}

/// A Diorama environment: machines and the networks between them.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    title = "Diorama environment file",
    extend("examples" = [{
        "name": "pair",
        "machines": {
            "server": {"image": "micro", "nics": [{"network": "lan", "address": "10.0.0.1/24"}]},
            "client": {"image": "micro", "memory": "256MiB", "nics": ["lan"], "disks": [{"name": "data", "size": "1GiB"}]}
        },
        "networks": {"lan": {}}
    }])
)]
struct EnvironmentFile<'a> {
    /// The environment's name. Without it, the folder's name serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", regex(pattern = NAME_PATTERN), example = &"pair")]
    name: Option<&'a str>,
    /// The machines, by name.
    #[schemars(
        with = "BTreeMap<String, MachineFile<'a>>",
        extend("propertyNames" = {"pattern": NAME_PATTERN}, "minProperties" = 1, "maxProperties" = MAX_MACHINES)
    )]
    machines: InOrder<'a, MachineFile<'a>>,
    /// The networks, by name. Machines on one network hear one another; nothing else does.
    #[schemars(
        with = "Option<BTreeMap<String, Option<NetworkFile>>>",
        extend("propertyNames" = {"pattern": NAME_PATTERN}, "maxProperties" = MAX_NETWORKS)
    )]
    networks: InOrder<'a, NetworkFile>,
}

/// A machine. It boots either an `image` or a `kernel`.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(
    rename = "Machine",
    extend(
        "oneOf" = [{"required": ["image"]}, {"required": ["kernel"]}],
        "dependentRequired" = {"initrd": ["kernel"], "cmdline": ["kernel"]}
    )
)]
struct MachineFile<'a> {
    /// What to boot: a built-in image's name, or the path of a qcow2 or raw disk image (anything with a `/` or a `.`).
    /// A disk image is never written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", example = &"micro", example = &"./debian-12.qcow2")]
    image: Option<String>,
    /// The path of a kernel to boot, instead of an `image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", example = &"./vmlinuz")]
    kernel: Option<&'a str>,
    /// The path of the initial RAM disk that goes with the `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", example = &"./initrd.img")]
    initrd: Option<&'a str>,
    /// The `kernel`'s command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", example = &"console=ttyS0 quiet")]
    cmdline: Option<&'a str>,
    /// How many virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u32", range(min = *CPUS.start(), max = *CPUS.end()), extend("default" = 1))]
    cpus: Option<u32>,
    /// How much memory: a number with a unit, or of bytes. A multiple of 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Size", extend("default" = "256MiB"), example = &"1GiB", example = &"512M")]
    memory: Option<Size>,
    /// The CPU model in QEMU's words, with flags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", example = &"qemu64", example = &"Skylake-Client-v1,-avx")]
    cpu: Option<&'a str>,
    /// What executes the machine's instructions. `auto` takes KVM where it is known to work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", extend("enum" = ["auto", "kvm", "tcg"], "default" = "auto"))]
    accelerator: Option<Accelerator>,
    /// The network interfaces, in the guest's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_NICS))]
    nics: Vec<NicFile<'a>>,
    /// The disks besides the one it boots from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_DISKS))]
    disks: Vec<DiskFile<'a>>,
    /// The host that it must run on. Without it, Diorama chooses one, by `labels` and by free memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", regex(pattern = NAME_PATTERN), example = &"node-1")]
    host: Option<&'a str>,
    /// The labels that its host must carry, all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        with = "BTreeMap<String, String>",
        extend(
            "propertyNames" = {"pattern": NAME_PATTERN},
            "additionalProperties" = {"type": "string", "pattern": LABEL_VALUE_PATTERN},
            "maxProperties" = MAX_LABELS,
            "examples" = [{"rack": "a"}]
        )
    )]
    labels: Option<&'a BTreeMap<LabelName, LabelValue>>,
}

/// A network interface: a network's name, or the name with more.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "Nic")]
#[expect(dead_code, reason = "the short form is only ever read, and so only in the schema")]
enum NicFile<'a> {
    /// The network's name.
    Short(#[schemars(regex(pattern = NAME_PATTERN))] String),
    /// The network's name with more.
    Full(FullNicFile<'a>),
}

/// A network interface.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "FullNic")]
struct FullNicFile<'a> {
    /// The network it attaches to.
    #[schemars(regex(pattern = NAME_PATTERN), example = &"lan")]
    network: &'a str,
    /// The address with its prefix length, handed to the guest where its image supports that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", example = &"10.0.0.1/24", example = &"fd00::1/64")]
    address: Option<InterfaceAddress>,
    /// The MAC address. Without it, one that follows from the machine's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        with = "String",
        regex(pattern = "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$"),
        example = &"52:54:00:12:34:56"
    )]
    mac: Option<MacAddress>,
}

/// A disk: empty of a `size`, or an overlay over an `image`, or both.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Disk", extend("anyOf" = [{"required": ["size"]}, {"required": ["image"]}]))]
struct DiskFile<'a> {
    /// The disk's name, which the guest sees as its serial number.
    #[schemars(regex(pattern = NAME_PATTERN), example = &"data")]
    name: &'a str,
    /// The size. Without it, the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Size", example = &"1GiB")]
    size: Option<Size>,
    /// The path of a disk image, which is never written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "String", example = &"./data.qcow2")]
    image: Option<&'a str>,
}

/// A network.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Network")]
struct NetworkFile {
    /// The largest packet that a frame carries, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u16", range(min = *MTU.start(), max = *MTU.end()), extend("default" = 1500))]
    mtu: Option<u16>,
    /// How much may wait for each machine on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Size", extend("default" = "1MiB"))]
    queue: Option<Size>,
}

/// A size: a number with a unit (`KiB`, `MiB`, `GiB`, `TiB` or `K`, `M`, `G`, `T` of 1024, `KB`, … of 1000), or of bytes.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "bytes are only ever read, and so only in the schema")]
enum Size {
    /// With a unit.
    Text(#[schemars(regex(pattern = r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT]([iI]?[bB])?|[bB])?\s*$"))] String),
    /// In bytes.
    Bytes(u64),
}

/// A mapping that keeps the file's order.
struct InOrder<'a, T>(Vec<(&'a str, T)>);

impl<T: Serialize> Serialize for InOrder<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

fn machine_file(machine: &Machine) -> Result<MachineFile<'_>, WriteError> {
    let (image, kernel, initrd, cmdline) = match &machine.boot {
        Boot::BuiltIn { image } => (Some(image.clone()), None, None, None),
        Boot::DiskImage { path } => (Some(image_path(path)?), None, None, None),
        Boot::Kernel { kernel, initrd, cmdline } => {
            let initrd = initrd.as_deref().map(utf8).transpose()?;
            (None, Some(utf8(kernel)?), initrd, Some(cmdline.as_str()))
        }
    };
    Ok(MachineFile {
        image,
        kernel,
        initrd,
        cmdline,
        cpus: Some(machine.cpus),
        memory: Some(Size::Text(size_text(machine.memory_bytes))),
        cpu: machine.cpu_model.as_deref(),
        accelerator: Some(machine.accelerator),
        nics: machine.nics.iter().map(nic_file).collect(),
        disks: machine.disks.iter().map(disk_file).collect::<Result<_, _>>()?,
        host: machine.host.as_deref(),
        labels: (!machine.labels.is_empty()).then_some(&machine.labels),
    })
}

fn nic_file(nic: &Nic) -> NicFile<'_> {
    NicFile::Full(FullNicFile { network: &nic.network, address: nic.address, mac: Some(nic.mac) })
}

fn disk_file(disk: &Disk) -> Result<DiskFile<'_>, WriteError> {
    Ok(DiskFile {
        name: &disk.name,
        size: disk.size_bytes.map(|bytes| Size::Text(size_text(bytes))),
        image: disk.image.as_deref().map(utf8).transpose()?,
    })
}

fn network_file(network: &Network) -> NetworkFile {
    NetworkFile { mtu: Some(network.mtu), queue: Some(Size::Text(size_text(network.queue_bytes))) }
}

/// A disk image's path, so that it cannot be taken for a built-in image's name.
fn image_path(path: &Path) -> Result<String, WriteError> {
    let text = utf8(path)?;
    Ok(if text.contains(['/', '.']) { text.to_owned() } else { format!("./{text}") })
}

fn utf8(path: &Path) -> Result<&str, WriteError> {
    path.to_str().ok_or_else(|| WriteError::PathNotUtf8 { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::{DISK_FIELDS, FILE_FIELDS, MACHINE_FIELDS, NETWORK_FIELDS, NIC_FIELDS};

    #[test]
    fn the_schema_has_the_fields_that_are_read() {
        let schema = schema();
        for (pointer, read) in [
            ("/properties", FILE_FIELDS),
            ("/$defs/Machine/properties", MACHINE_FIELDS),
            ("/$defs/FullNic/properties", NIC_FIELDS),
            ("/$defs/Disk/properties", DISK_FIELDS),
            ("/$defs/Network/properties", NETWORK_FIELDS),
        ] {
            let properties = schema.pointer(pointer).and_then(|value| value.as_object()).expect(pointer);
            let mut described: Vec<&str> = properties.keys().map(String::as_str).collect();
            let mut read = read.to_vec();
            described.sort_unstable();
            read.sort_unstable();
            assert_eq!(described, read, "{pointer}");
            for (name, property) in properties {
                assert!(property["description"].is_string(), "{pointer}/{name} has no description");
            }
        }
        assert_eq!(schema["required"], serde_json::json!(["machines"]));
        assert_eq!(schema.pointer("/$defs/Machine/required"), None);
        assert_eq!(schema.pointer("/$defs/Machine/additionalProperties"), Some(&serde_json::json!(false)));
    }
}
