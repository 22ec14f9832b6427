//! QEMU's arguments for one machine.
//!
//! Owns the virtual hardware's layout: which devices there are, their order, their PCI addresses and the names of
//! their block nodes. A restored machine must have the layout it was captured with, so everything here depends on
//! [`MachineConfig`] alone, and every address is fixed. Pure: nothing is opened or looked up.
//!
//! What a device's state costs to save is paid in the pause of every snapshot. So there is no SATA controller, no SMBus,
//! and virtio devices have the interface of virtio 0.9.5 alone: the state of the modern one has an entry for each of 1,024
//! possible queues, whether they exist or not, and took 0.47 ms for each device.
//!
//! | PCI slot | device |
//! | --- | --- |
//! | 1 | virtio-rng |
//! | 2 | virtio-serial, for the guest agent |
//! | 3 to 10 | disks, in order |
//! | 11 to 26 | NICs, in order |

use crate::capability::Accelerator;
use crate::socket_path::{self, SocketPathTooLong};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The id of the main memory's backend, and with it the name of its block in the migration stream.
pub const RAM_BLOCK: &str = "ram0";

/// The machine type that is used where none is asked for: the oldest supported QEMU has it, and all newer ones.
pub const DEFAULT_MACHINE_TYPE: &str = "pc-q35-7.2";

/// The most disks of one machine.
pub const MAX_DISKS: usize = 8;

/// The most NICs of one machine.
pub const MAX_NICS: usize = 16;

/// The smallest MTU that IPv4 allows, in bytes.
pub const MIN_MTU: u16 = 68;

const RNG_SLOT: usize = 0x01;
const SERIAL_SLOT: usize = 0x02;
const FIRST_DISK_SLOT: usize = 0x03;
const FIRST_NIC_SLOT: usize = FIRST_DISK_SLOT + MAX_DISKS;

/// Everything that QEMU needs to know of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineConfig {
    /// The machine's name, shown in process lists.
    pub name: String,
    /// A versioned machine type, such as [`DEFAULT_MACHINE_TYPE`].
    pub machine_type: String,
    /// The CPU model, such as `qemu64` or `max`.
    pub cpu_model: String,
    /// How guest code runs.
    pub accelerator: Accelerator,
    /// Virtual CPUs, at least 1; see [`crate::capability::minimum_vcpus`].
    pub vcpus: u32,
    /// Main memory.
    pub memory_bytes: u64,
    /// What the machine boots.
    pub boot: BootSource,
    /// NICs, in the guest's order.
    pub nics: Vec<NicConfig>,
    /// Disks, in the guest's order; with [`BootSource::Disk`] the first is booted.
    pub disks: Vec<DiskConfig>,
    /// Where main memory comes from.
    pub ram: RamSource,
    /// The sockets through which the machine is controlled.
    pub sockets: Sockets,
    /// Whether the machine waits for a migration stream and stays stopped until `cont`.
    ///
    /// QMP `migrate-incoming` starts the load; its `fd:NAME` URI names a descriptor that was handed over by `getfd` on
    /// the same monitor. `-incoming fd:N` would save that round trip, but gains no measurable time, cannot announce its
    /// end (events are off until QMP turns them on), and QEMU 7.2 was seen to crash under commands that came meanwhile.
    pub incoming: bool,
    /// Whether QEMU drops the system calls that it does not need.
    pub sandbox: bool,
    /// Upper bound of TCG's translation buffer, in MiB. It is private memory of each fork.
    pub tb_size_mib: u32,
    /// The generation id: another for each fork, so that guests reseed their random numbers. The device is part of the
    /// layout: a machine captured with one is restored with one.
    pub vmgenid: Option<[u8; 16]>,
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootSource {
    /// A Linux kernel, loaded by QEMU.
    Kernel {
        /// The kernel image.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The kernel command line.
        cmdline: String,
    },
    /// The firmware boots the first disk.
    Disk,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// The guest's address on the segment.
    pub mac: [u8; 6],
    /// The MTU that the guest is told, in bytes.
    pub mtu: u16,
    /// The unix socket on which QEMU listens for the switch.
    pub socket: PathBuf,
}

/// One disk: a chain of images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// The disk's name, the prefix of its block nodes and its serial number in the guest: 1 to 20 of `a-z A-Z 0-9 _ -`.
    pub name: String,
    /// The images, the base first, the one that is written last. Must not be empty.
    pub chain: Vec<DiskLayer>,
}

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLayer {
    /// The image file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
}

/// The format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl DiskFormat {
    /// QEMU's name for the format.
    pub fn name(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        }
    }
}

/// Where main memory comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RamSource {
    /// Fresh, private memory.
    Anonymous,
    /// A RAM file, mapped privately: writes stay in the process, the file is never changed. QEMU wants write access
    /// to it all the same.
    ///
    /// The file must be on tmpfs (or be a memfd, reached through `/proc/PID/fd`) if the machine is to be captured live.
    File {
        /// The file, exactly as long as the machine's memory.
        path: PathBuf,
    },
}

/// Where QEMU listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listener {
    /// QEMU binds this path itself, some time after its start.
    Path(PathBuf),
    /// QEMU takes over this listening unix socket, which [`crate::process::spawn`] must pass under the same number.
    /// Connections wait in its backlog from the moment it is bound, so nobody has to poll for QEMU to be ready, and a
    /// QEMU that dies during its start shows as a closed connection.
    Fd(RawFd),
}

/// The sockets through which a machine is controlled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sockets {
    /// The control monitor.
    pub qmp: Listener,
    /// A second monitor, which only cuts use, so that a slow command on the first never delays one.
    pub qmp_cut: Listener,
    /// A third monitor, which pivots disks in a cut: it has the command for that before the second one stops the machine.
    pub qmp_pivot: Listener,
    /// The serial console.
    pub serial: Listener,
    /// The file to which everything on the serial console is appended.
    pub serial_log: PathBuf,
    /// The guest agent's channel.
    pub guest_agent: Listener,
}

/// A configuration that cannot be put into arguments.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A socket path is too long for the kernel.
    #[error(transparent)]
    SocketPath(#[from] SocketPathTooLong),
    /// The layout has no slots for so many NICs.
    #[error("{count} NICs, at most {MAX_NICS} fit")]
    TooManyNics {
        /// How many were asked for.
        count: usize,
    },
    /// The layout has no slots for so many disks.
    #[error("{count} disks, at most {MAX_DISKS} fit")]
    TooManyDisks {
        /// How many were asked for.
        count: usize,
    },
    /// The firmware has nothing to boot.
    #[error("the machine boots from a disk but has none")]
    NoBootDisk,
    /// A disk without images.
    #[error("disk {name:?} has no image")]
    EmptyChain {
        /// The disk.
        name: String,
    },
    /// A disk's name cannot be a block node's name and a serial number.
    #[error("disk name {name:?} must be 1 to 20 of a-z, A-Z, 0-9, _ and -, starting with a letter")]
    BadDiskName {
        /// The name.
        name: String,
    },
    /// Two disks of one name.
    #[error("two disks are named {name:?}")]
    DuplicateDisk {
        /// The name.
        name: String,
    },
    /// An MTU that no IPv4 network may have.
    #[error("MTU {mtu} of NIC {index} is below {MIN_MTU}")]
    BadMtu {
        /// The NIC's index.
        index: usize,
        /// The MTU.
        mtu: u16,
    },
    /// Memory must be whole MiB.
    #[error("memory of {memory_bytes} bytes is not a positive multiple of 1 MiB")]
    BadMemory {
        /// The memory.
        memory_bytes: u64,
    },
    /// A machine without CPUs, or with more than the machine type takes.
    #[error("{vcpus} virtual CPUs, 1 to 255 are possible")]
    BadVcpus {
        /// The number asked for.
        vcpus: u32,
    },
    /// A value that stands in a comma-separated option would change the option's meaning.
    #[error(
        "{what} {value:?} may only hold letters, digits and any of . _ + = - and comma-separated CPU flags"
    )]
    BadIdentifier {
        /// Which value.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// A path goes into JSON, which cannot carry it.
    #[error("path is not UTF-8: {}", path.display())]
    PathNotUtf8 {
        /// The path.
        path: PathBuf,
    },
}

/// The name of the block node that carries layer `layer` of `disk`, 0 being the base.
pub fn format_node(disk: &str, layer: usize) -> String {
    format!("{disk}-{layer}")
}

/// The name of the node below [`format_node`], which reads and writes the image file.
pub fn file_node(disk: &str, layer: usize) -> String {
    format!("{disk}-{layer}-file")
}

/// The `blockdev-add` arguments of one layer. `backing` names the node below; without one the layer stands alone,
/// whatever its header says. A layer that is to become an overlay by `blockdev-snapshot` is added without.
pub fn blockdev(
    disk: &str,
    layer_index: usize,
    layer: &DiskLayer,
    read_only: bool,
    backing: Option<&str>,
) -> Result<Value, ConfigError> {
    let mut node = json!({
        "node-name": format_node(disk, layer_index),
        "driver": layer.format.name(),
        "read-only": read_only,
        "discard": "unmap",
        "file": {
            "node-name": file_node(disk, layer_index),
            "driver": "file",
            "filename": utf8(&layer.path)?,
            "read-only": read_only,
            "discard": "unmap",
        },
    });
    if layer.format == DiskFormat::Qcow2 {
        node["backing"] = backing.map_or(Value::Null, Value::from);
    }
    Ok(node)
}

/// QEMU's arguments for `config`, the program's name not included.
pub fn arguments(config: &MachineConfig) -> Result<Vec<OsString>, ConfigError> {
    check(config)?;
    let mut arguments = Arguments::default();
    process(config, &mut arguments);
    board(config, &mut arguments)?;
    control(config, &mut arguments)?;
    for (index, disk) in config.disks.iter().enumerate() {
        add_disk(index, disk, &mut arguments)?;
    }
    for (index, nic) in config.nics.iter().enumerate() {
        add_nic(index, nic, &mut arguments)?;
    }
    Ok(arguments.0)
}

fn check(config: &MachineConfig) -> Result<(), ConfigError> {
    if config.nics.len() > MAX_NICS {
        return Err(ConfigError::TooManyNics { count: config.nics.len() });
    }
    if config.disks.len() > MAX_DISKS {
        return Err(ConfigError::TooManyDisks { count: config.disks.len() });
    }
    if config.boot == BootSource::Disk && config.disks.is_empty() {
        return Err(ConfigError::NoBootDisk);
    }
    if config.memory_bytes == 0 || !config.memory_bytes.is_multiple_of(1 << 20) {
        return Err(ConfigError::BadMemory { memory_bytes: config.memory_bytes });
    }
    if !(1..=255).contains(&config.vcpus) {
        return Err(ConfigError::BadVcpus { vcpus: config.vcpus });
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+=-".contains(&byte);
    for (what, value, commas) in
        [("machine type", &config.machine_type, false), ("CPU model", &config.cpu_model, true)]
    {
        let valid = !value.is_empty() && value.bytes().all(|byte| plain(byte) || commas && byte == b',');
        // A machine type with '=' would be taken for another machine option.
        if !valid || !commas && value.contains('=') {
            return Err(ConfigError::BadIdentifier { what, value: value.clone() });
        }
    }
    for (index, disk) in config.disks.iter().enumerate() {
        check_disk_name(&disk.name)?;
        if disk.chain.is_empty() {
            return Err(ConfigError::EmptyChain { name: disk.name.clone() });
        }
        if config.disks[..index].iter().any(|other| other.name == disk.name) {
            return Err(ConfigError::DuplicateDisk { name: disk.name.clone() });
        }
    }
    for (index, nic) in config.nics.iter().enumerate() {
        socket_path::check(&nic.socket)?;
        if nic.mtu < MIN_MTU {
            return Err(ConfigError::BadMtu { index, mtu: nic.mtu });
        }
    }
    Ok(())
}

fn check_disk_name(name: &str) -> Result<(), ConfigError> {
    // 20 bytes: the length of a virtio disk's serial number. Node names allow 31.
    let valid = (1..=20).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if valid { Ok(()) } else { Err(ConfigError::BadDiskName { name: name.to_owned() }) }
}

/// The process itself: what QEMU must not do by default.
fn process(config: &MachineConfig, to: &mut Arguments) {
    to.pair("-name", &format!("{},debug-threads=on", escape(&config.name)));
    for flag in ["-nodefaults", "-no-user-config", "-no-shutdown"] {
        to.flag(flag);
    }
    to.pair("-display", "none");
    to.pair("-vga", "none");
    to.pair("-msg", "timestamp=on");
    if config.sandbox {
        to.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    }
    // Nothing runs before `cont`: the machine's ports are connected first, so that it can lose no frame.
    to.flag("-S");
    if config.incoming {
        to.pair("-incoming", "defer");
    }
}

/// Processor, memory, clock, firmware.
fn board(config: &MachineConfig, to: &mut Arguments) -> Result<(), ConfigError> {
    to.pair(
        "-machine",
        &format!("{},memory-backend={RAM_BLOCK},usb=off,vmport=off,sata=off,smbus=off", config.machine_type),
    );
    match config.accelerator {
        Accelerator::Tcg => to.pair("-accel", &format!("tcg,thread=multi,tb-size={}", config.tb_size_mib)),
        Accelerator::Kvm => to.pair("-accel", "kvm"),
    }
    to.pair("-cpu", &config.cpu_model);
    to.pair("-smp", &config.vcpus.to_string());
    to.pair("-m", &format!("{}M", config.memory_bytes >> 20));
    let mut backend = json!({"id": RAM_BLOCK, "size": config.memory_bytes});
    match &config.ram {
        RamSource::Anonymous => backend["qom-type"] = "memory-backend-ram".into(),
        RamSource::File { path } => {
            backend["qom-type"] = "memory-backend-file".into();
            backend["mem-path"] = utf8(path)?.into();
            backend["share"] = false.into();
        }
    }
    to.json("-object", &backend);
    // The guest's clock stands still while the machine does: no jump over a pause or a restore.
    to.pair("-rtc", "base=utc,clock=vm");
    if let BootSource::Kernel { kernel, initrd, cmdline } = &config.boot {
        to.path("-kernel", kernel);
        if let Some(initrd) = initrd {
            to.path("-initrd", initrd);
        }
        to.pair("-append", cmdline);
    }
    if let Some(id) = config.vmgenid {
        to.json("-device", &json!({"driver": "vmgenid", "id": "vmgenid0", "guid": uuid(id)}));
    }
    to.json("-object", &json!({"qom-type": "rng-random", "id": "rng0", "filename": "/dev/urandom"}));
    to.json("-device", &virtio("virtio-rng-pci", "rng-device0", RNG_SLOT, json!({"rng": "rng0"})));
    Ok(())
}

/// Monitors, console, guest agent.
fn control(config: &MachineConfig, to: &mut Arguments) -> Result<(), ConfigError> {
    let sockets = &config.sockets;
    let monitors = [("qmp", &sockets.qmp), ("qmp-cut", &sockets.qmp_cut), ("qmp-pivot", &sockets.qmp_pivot)];
    for (id, listener) in monitors {
        to.chardev(id, listener, None)?;
        to.pair("-mon", &format!("chardev={id},mode=control"));
    }
    to.chardev("serial0", &sockets.serial, Some(&sockets.serial_log))?;
    to.pair("-serial", "chardev:serial0");
    to.chardev("agent0", &sockets.guest_agent, None)?;
    to.json("-device", &virtio("virtio-serial-pci", "virtio-serial0", SERIAL_SLOT, json!({"max_ports": 2})));
    let port = json!({
        "driver": "virtserialport", "id": "agent-port0", "bus": "virtio-serial0.0", "nr": 1,
        "chardev": "agent0", "name": "org.qemu.guest_agent.0",
    });
    to.json("-device", &port);
    Ok(())
}

fn add_disk(index: usize, disk: &DiskConfig, to: &mut Arguments) -> Result<(), ConfigError> {
    let top = disk.chain.len() - 1;
    for (layer_index, layer) in disk.chain.iter().enumerate() {
        let below = layer_index.checked_sub(1).map(|below| format_node(&disk.name, below));
        to.json("-blockdev", &blockdev(&disk.name, layer_index, layer, layer_index < top, below.as_deref())?);
    }
    let mut device = virtio(
        "virtio-blk-pci",
        &format!("disk-{}", disk.name),
        FIRST_DISK_SLOT + index,
        json!({"drive": format_node(&disk.name, top), "serial": disk.name}),
    );
    if index == 0 {
        device["bootindex"] = 1.into();
    }
    to.json("-device", &device);
    Ok(())
}

fn add_nic(index: usize, nic: &NicConfig, to: &mut Arguments) -> Result<(), ConfigError> {
    let netdev = json!({
        "type": "stream", "id": format!("net{index}"), "server": true,
        "addr": {"type": "unix", "path": utf8(&nic.socket)?},
    });
    to.json("-netdev", &netdev);
    let [a, b, c, d, e, f] = nic.mac;
    // A frame that QEMU has half written when its socket is full is purged at `stop`, and the stream loses its
    // framing. Bursts that together stay within the socket's buffer keep the flush at `stop` from filling it.
    let burst = (65536 / i32::from(nic.mtu)).clamp(1, 32);
    let properties = json!({
        "netdev": format!("net{index}"),
        "mac": format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
        "host_mtu": nic.mtu, "rx_queue_size": 1024, "x-txburst": burst, "romfile": "",
    });
    to.json("-device", &virtio("virtio-net-pci", &format!("nic{index}"), FIRST_NIC_SLOT + index, properties));
    Ok(())
}

/// A virtio device at a fixed slot, with the older interface (see the module).
fn virtio(driver: &str, id: &str, slot: usize, mut properties: Value) -> Value {
    properties["disable-modern"] = true.into();
    properties["disable-legacy"] = "off".into();
    properties["driver"] = driver.into();
    properties["id"] = id.into();
    properties["bus"] = "pcie.0".into();
    properties["addr"] = format!("{slot:#x}").into();
    properties
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.into());
    }

    fn pair(&mut self, option: &str, value: &str) {
        self.0.extend([option.into(), value.into()]);
    }

    /// An option whose whole value is a path: no escaping.
    fn path(&mut self, option: &str, path: &Path) {
        self.0.extend([option.into(), path.into()]);
    }

    fn json(&mut self, option: &str, value: &Value) {
        self.pair(option, &value.to_string());
    }

    fn chardev(&mut self, id: &str, listener: &Listener, log: Option<&Path>) -> Result<(), ConfigError> {
        let mut value = OsString::from(format!("socket,id={id},"));
        match listener {
            Listener::Path(path) => {
                socket_path::check(path)?;
                value.push("path=");
                value.push(escape_path(path));
            }
            Listener::Fd(fd) => value.push(format!("fd={fd}")),
        }
        value.push(",server=on,wait=off");
        if let Some(log) = log {
            value.push(",logfile=");
            value.push(escape_path(log));
            value.push(",logappend=on");
        }
        self.0.extend(["-chardev".into(), value]);
        Ok(())
    }
}

/// A comma ends a value unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn escape_path(path: &Path) -> OsString {
    let mut escaped = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        escaped.push(byte);
        if byte == b',' {
            escaped.push(byte);
        }
    }
    OsString::from_vec(escaped)
}

fn utf8(path: &Path) -> Result<&str, ConfigError> {
    path.to_str().ok_or_else(|| ConfigError::PathNotUtf8 { path: path.to_owned() })
}

fn uuid(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
#[path = "command_line_tests.rs"]
mod tests;
