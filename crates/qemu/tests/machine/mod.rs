//! One real machine without a guest image, and what tests do with it.

use diorama_qemu::capability::{self, Accelerator, Qemu};
use diorama_qemu::command_line::{
    BootSource, DEFAULT_MACHINE_TYPE, Listener, MachineConfig, NicConfig, RAM_BLOCK, RamSource, Sockets,
    arguments,
};
use diorama_qemu::migration::{RamFile, Splitter, Summary};
use diorama_qemu::nic::{self, NicError};
use diorama_qemu::process::{self, ProcessError, Spawned};
use diorama_qemu::qmp::{Client, QmpError};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

#[path = "../../../../testing/scratch.rs"]
mod scratch;

/// Memory of each machine.
pub const MEMORY_BYTES: u64 = 64 << 20;

/// Where the program in the machine counts, a 32-bit word.
pub const COUNTER_AT: usize = 32 << 20;

/// How long one command may take on a busy computer.
pub const SECOND: Duration = Duration::from_secs(30);

/// A deadline for one event on a busy computer.
pub fn soon() -> Instant {
    Instant::now() + SECOND
}

/// The installed QEMU, asked once.
pub fn qemu() -> &'static Qemu {
    static QEMU: OnceLock<Qemu> = OnceLock::new();
    QEMU.get_or_init(|| capability::detect(None).expect("QEMU is installed"))
}

/// A private folder on tmpfs.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(scratch::folder())
    }

    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// What a capture left.
pub struct Capture {
    pub ram: PathBuf,
    pub residual: Vec<u8>,
    pub summary: Summary,
}

/// A running machine; killed when dropped.
#[derive(Debug)]
pub struct Machine {
    pub process: Spawned,
    pub qmp: Client,
    pub qmp_cut: Client,
    serial: UnixStream,
    /// The other end of its network interface, which nobody reads.
    _nic: UnixStream,
    memory_bytes: u64,
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill(soon()) {
            eprintln!("cannot clean up: {error}");
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Nic(#[from] NicError),
}

impl Machine {
    pub fn start(scratch: &Scratch, name: &str, change: impl FnOnce(&mut MachineConfig)) -> Machine {
        Machine::try_start(scratch, name, change).expect("the machine starts")
    }

    pub fn try_start(
        scratch: &Scratch,
        name: &str,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Result<Machine, StartError> {
        let mut machine = Machine::spawn(scratch, name, change)?;
        machine.qmp.execute("cont", Value::Null, SECOND)?;
        Ok(machine)
    }

    /// Restores a machine and lets it run.
    pub fn restore(
        scratch: &Scratch,
        name: &str,
        capture: &Capture,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Machine {
        let mut machine = Machine::restore_paused(scratch, name, capture, change);
        if let Err(error) = machine.qmp.execute("cont", Value::Null, SECOND) {
            panic!("{}", machine.explain(error));
        }
        machine.qmp.wait_event(&["RESUME"], soon()).expect("runs");
        machine
    }

    pub fn restore_paused(
        scratch: &Scratch,
        name: &str,
        capture: &Capture,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Machine {
        Machine::try_restore(scratch, name, capture, change).expect("the machine is restored")
    }

    /// Restores and leaves the machine stopped.
    pub fn try_restore(
        scratch: &Scratch,
        name: &str,
        capture: &Capture,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Result<Machine, StartError> {
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let residual = capture.residual.clone();
        // QEMU may die first; what it did not read is of no use then.
        let feeder = std::thread::spawn(move || drop(ours.write_all(&residual)));
        let ram = RamSource::File { path: capture.ram.clone() };
        let result = Machine::spawn(scratch, name, |config| {
            change(config);
            config.ram = ram;
            config.incoming = true;
        })
        .and_then(|mut machine| {
            machine.qmp.execute("migrate-set-capabilities", capabilities(&[("events", true)]), SECOND)?;
            machine.qmp.send_fd(theirs.as_fd(), "stream", SECOND)?;
            drop(theirs);
            machine.qmp.execute("migrate-incoming", json!({"uri": "fd:stream"}), SECOND)?;
            loop {
                let event = machine.qmp.wait_event(&["MIGRATION"], soon());
                match event.map_err(|error| machine.explain(error))?.data["status"].as_str() {
                    Some("completed") => return Ok(machine),
                    // QEMU ends by itself after this.
                    Some("failed") => return Err(machine.process.explain_end(soon()).into()),
                    _ => {}
                }
            }
        });
        feeder.join().expect("feeder");
        result
    }

    /// Starts a machine that reads a postcopy stream, and returns the other end of that.
    pub fn begin_postcopy(scratch: &Scratch, name: &str) -> (Machine, UnixStream) {
        let mut machine = Machine::spawn(scratch, name, |config| config.incoming = true).expect("starts");
        let wanted = capabilities(&[("events", true), ("postcopy-ram", true)]);
        machine.qmp.execute("migrate-set-capabilities", wanted, SECOND).expect("capabilities");
        let (ours, theirs) = UnixStream::pair().expect("pair");
        machine.qmp.send_fd(theirs.as_fd(), "stream", SECOND).expect("getfd");
        machine.qmp.execute("migrate-incoming", json!({"uri": "fd:stream"}), SECOND).expect("incoming");
        (machine, ours)
    }

    /// The reason behind a closed connection.
    fn explain(&mut self, error: QmpError) -> StartError {
        match error {
            QmpError::Disconnected { .. } => self.process.explain_end(soon()).into(),
            other => other.into(),
        }
    }

    fn spawn(
        scratch: &Scratch,
        name: &str,
        change: impl FnOnce(&mut MachineConfig),
    ) -> Result<Machine, StartError> {
        let qemu = qemu();
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut listen = |kind: &str| {
            let path = scratch.path(&format!("{name}-{kind}"));
            drop(fs::remove_file(&path));
            let listener = UnixListener::bind(&path).expect("bind");
            let number = listener.as_raw_fd();
            fds.push(listener.into());
            (Listener::Fd(number), path)
        };
        let (qmp, qmp_path) = listen("qmp");
        let (qmp_cut, qmp_cut_path) = listen("cut");
        let (qmp_pivot, _) = listen("pivot");
        let (serial, serial_path) = listen("serial");
        let (guest_agent, _) = listen("agent");
        let nic_socket = scratch.path(&format!("{name}-nic"));
        drop(fs::remove_file(&nic_socket));
        let mut config = MachineConfig {
            name: name.into(),
            machine_type: DEFAULT_MACHINE_TYPE.into(),
            cpu_model: "qemu64".into(),
            accelerator: Accelerator::Tcg,
            vcpus: capability::minimum_vcpus(qemu, Accelerator::Tcg),
            memory_bytes: MEMORY_BYTES,
            boot: BootSource::Kernel { kernel: boot_sector(scratch), initrd: None, cmdline: String::new() },
            nics: vec![NicConfig { mac: [0x52, 0x54, 0, 0, 0, 1], mtu: 1500, socket: nic_socket.clone() }],
            disks: Vec::new(),
            ram: RamSource::Anonymous,
            sockets: Sockets {
                qmp,
                qmp_cut,
                qmp_pivot,
                serial,
                serial_log: scratch.path(&format!("{name}.serial")),
                guest_agent,
            },
            incoming: false,
            sandbox: true,
            tb_size_mib: 32,
            vmgenid: Some([7; 16]),
        };
        change(&mut config);
        let serial = UnixStream::connect(&serial_path).expect("the serial console's backlog");
        let arguments = arguments(&config).expect("a valid configuration");
        let mut process =
            process::spawn(&qemu.binary, &arguments, &scratch.path(&format!("{name}.log")), fds)?;
        let mut connect = |path: &Path| match Client::connect(path, soon()) {
            Err(QmpError::Disconnected { .. }) => Err(StartError::from(process.explain_end(soon()))),
            other => other.map_err(StartError::from),
        };
        let connected = connect(&qmp_path).and_then(|mut qmp| {
            let nic = nic::connect(&[nic_socket], &mut qmp, soon())?.remove(0);
            Ok((qmp, connect(&qmp_cut_path)?, nic))
        });
        match connected {
            Ok((qmp, qmp_cut, nic)) => {
                Ok(Machine { process, qmp, qmp_cut, serial, _nic: nic, memory_bytes: config.memory_bytes })
            }
            Err(error) => {
                process.kill(soon())?;
                Err(error)
            }
        }
    }

    /// Until the boot code has run: it fills memory above 1 MiB with something, says so on the serial port, and loops.
    pub fn wait_for_firmware(&mut self) {
        self.serial.set_read_timeout(Some(SECOND)).expect("timeout");
        let mut byte = [0];
        while byte != *b"!" {
            assert_eq!(self.serial.read(&mut byte).expect("the serial console"), 1, "it was closed");
        }
    }

    /// Starts a capture and returns the stream.
    pub fn begin_capture(&mut self, background: bool) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        self.begin_capture_to(&theirs, background);
        ours
    }

    /// Starts a capture into that socket.
    pub fn begin_capture_to(&mut self, theirs: &UnixStream, background: bool) {
        let wanted =
            capabilities(&[("postcopy-ram", false), ("background-snapshot", background), ("events", true)]);
        self.qmp_cut.execute("migrate-set-capabilities", wanted, SECOND).expect("capabilities");
        self.qmp_cut.send_fd(theirs.as_fd(), "stream", SECOND).expect("getfd");
        self.qmp_cut.take_events();
        self.qmp_cut.execute("stop", Value::Null, SECOND).expect("stop");
        self.qmp_cut.execute("migrate", json!({"uri": "fd:stream"}), SECOND).expect("migrate");
    }

    pub fn capture(&mut self, ram: &Path) -> Capture {
        self.capture_with(ram, true)
    }

    pub fn capture_with(&mut self, ram: &Path, background: bool) -> Capture {
        let mut stream = self.begin_capture(background);
        let file =
            fs::File::options().read(true).write(true).create(true).truncate(true).open(ram).expect("create");
        let mut sink = RamFile::new(file, self.memory_bytes, Vec::new()).expect("sink");
        let mut splitter = Splitter::new(RAM_BLOCK, self.memory_bytes);
        let mut chunk = vec![0; 256 << 10];
        loop {
            let length = stream.read(&mut chunk).expect("the stream");
            if length == 0 {
                break;
            }
            splitter.feed(&chunk[..length], &mut sink).expect("a valid stream");
        }
        let summary = splitter.finish().expect("a whole stream");
        if background {
            self.qmp_cut.wait_event(&["RESUME"], soon()).expect("the machine resumes by itself");
        }
        self.wait_captured();
        let (_, residual) = sink.into_inner();
        Capture { ram: ram.to_owned(), residual, summary }
    }

    /// Until QEMU says that the capture is complete.
    pub fn wait_captured(&mut self) {
        loop {
            let event = self.qmp_cut.wait_event(&["MIGRATION"], soon()).expect("the end");
            match event.data["status"].as_str() {
                Some("completed") => break,
                Some("failed") => panic!("QEMU says that the capture failed"),
                _ => {}
            }
        }
    }

    /// All of memory as the processor sees it.
    pub fn dump_memory(&mut self, to: &Path) -> Vec<u8> {
        let arguments = json!({"val": 0, "size": self.memory_bytes, "filename": to});
        self.qmp.execute("pmemsave", arguments, SECOND).expect("pmemsave");
        fs::read(to).expect("the dump")
    }
}

/// `migrate-set-capabilities` arguments.
pub fn capabilities(wanted: &[(&str, bool)]) -> Value {
    let list: Vec<Value> =
        wanted.iter().map(|(name, state)| json!({"capability": name, "state": state})).collect();
    json!({"capabilities": list})
}

/// The smallest thing that QEMU boots by `-kernel`: a multiboot program.
///
/// It fills 4 MiB at 16 MiB with a counter, writes `!` to the first serial port, then increments a word for ever, so
/// that there are pages with content, pages without, and a page that is written during the capture.
fn boot_sector(scratch: &Scratch) -> PathBuf {
    let code: &[u8] = &[
        0xfa, // cli
        0xbf, 0x00, 0x00, 0x00, 0x01, // mov edi, 16 MiB
        0xb9, 0x00, 0x00, 0x10, 0x00, // mov ecx, 1 Mi words
        0x31, 0xc0, // xor eax, eax
        0x40, // fill: inc eax
        0xab, // stosd
        0xe2, 0xfc, // loop fill
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'!', // mov al, '!'
        0xee, // out dx, al
        0xff, 0x05, 0x00, 0x00, 0x00, 0x02, // count: inc dword [32 MiB]
        0xeb, 0xf8, // jmp count
    ];
    program(scratch, "program", code)
}

/// Where [`walker`]'s pages begin, and how many there are.
pub const WALK_AT: usize = 16 << 20;
pub const WALK_PAGES: usize = 1024;

/// A program that goes from page to page, round and round, and writes a number, one greater each time, to the beginning and to
/// the end of each. After the first round it writes `!` to the first serial port.
pub fn walker(scratch: &Scratch) -> BootSource {
    let round = [
        0xbf, 0x00, 0x00, 0x00, 0x01, // mov edi, 16 MiB
        0xb9, 0x00, 0x04, 0x00, 0x00, // mov ecx, 1024
        0x40, // page: inc eax
        0x89, 0x07, // mov [edi], eax
        0x89, 0x87, 0xfc, 0x0f, 0x00, 0x00, // mov [edi + 4092], eax
        0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add edi, 4096
        0xe2, 0xef, // loop page
    ];
    let start = [
        0xfa, // cli
        0x31, 0xc0, // xor eax, eax
    ];
    let say = [
        0x89, 0xc3, // mov ebx, eax
        0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'!', // mov al, '!'
        0xee, // out dx, al
        0x89, 0xd8, // mov eax, ebx
    ];
    let again = [0xeb, 0xe3]; // jmp to the round's beginning
    assert_eq!(round.len() + again.len(), 0x100 - 0xe3);
    let code = [&start[..], &round, &say, &round, &again].concat();
    BootSource::Kernel { kernel: program(scratch, "walker", &code), initrd: None, cmdline: String::new() }
}

fn program(scratch: &Scratch, name: &str, code: &[u8]) -> PathBuf {
    const LOAD: u32 = 0x10_0000;
    let magic: u32 = 0x1bad_b002;
    let flags: u32 = 1 << 16; // The addresses in this header count: no ELF.
    let length = 32 + u32::try_from(code.len()).expect("short");
    let fields = [
        magic,
        flags,
        0u32.wrapping_sub(magic).wrapping_sub(flags),
        LOAD,          // where this header is
        LOAD,          // where loading begins
        LOAD + length, // where it ends
        LOAD + length, // nothing to clear
        LOAD + 32,     // the entry
    ];
    let mut program: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
    program.extend_from_slice(code);
    program.resize(8192, 0);
    let path = scratch.path(name);
    fs::write(&path, program).expect("write");
    path
}
