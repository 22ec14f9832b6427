//! What this computer can do: the installed QEMU, the accelerators, and live capture.
//!
//! Nothing is cached: each call looks again. Callers keep the results.

use nix::errno::Errno;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The oldest QEMU with `-netdev stream`.
pub const MINIMUM_VERSION: (u32, u32, u32) = (7, 2, 0);

const BINARY: &str = "qemu-system-x86_64";

/// The first QEMU that opens `/dev/userfaultfd`.
const DEVICE_SINCE: (u32, u32, u32) = (8, 0, 0);

/// The first QEMU whose TCG does not lose virtio notifications with a single virtual CPU.
const BARRIER_FIX_SINCE: (u32, u32, u32) = (8, 1, 0);

/// An installed QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub binary: PathBuf,
    /// Its version: major, minor, micro.
    pub version: (u32, u32, u32),
    /// The machine types it knows, aliases included.
    pub machine_types: Vec<String>,
    /// The accelerators it was built with, whether or not they work here.
    pub accelerators: Vec<String>,
    /// Whether it was built with the system call filter.
    pub sandbox: bool,
}

/// Why no usable QEMU was found.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// None in the search path.
    #[error("{BINARY} is not installed: it is in no folder of PATH")]
    NotFound,
    /// It cannot be run.
    #[error("cannot run {} {argument}: {source}", binary.display())]
    Run {
        /// The program.
        binary: PathBuf,
        /// The arguments that were tried.
        argument: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not answer as QEMU does.
    #[error("{} {argument} answers in an unknown form: {answer:?}", binary.display())]
    Unrecognised {
        /// The program.
        binary: PathBuf,
        /// The arguments that were tried.
        argument: &'static str,
        /// The answer's beginning.
        answer: String,
    },
    /// It is too old.
    #[error("{} is QEMU {}, at least {} is needed", binary.display(), dotted(*found), dotted(MINIMUM_VERSION))]
    TooOld {
        /// The program.
        binary: PathBuf,
        /// Its version.
        found: (u32, u32, u32),
    },
}

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// On the processor's virtualisation extension.
    Kvm,
    /// Translated by QEMU.
    Tcg,
}

/// Whether KVM can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmState {
    /// The processor has the extension and the device opens.
    Usable,
    /// The processor shows neither vmx nor svm. `device_opens` tells whether `/dev/kvm` opens all the same: on such
    /// hosts KVM creates machines that hang in early boot.
    NoProcessorSupport {
        /// Whether the device opens.
        device_opens: bool,
    },
    /// The device is missing or not accessible.
    NoAccess {
        /// The kernel's error, such as `ENOENT` or `EACCES`.
        errno: i32,
    },
}

/// Whether QEMU, started by this process, can capture a running machine by write protection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackgroundSnapshot {
    /// It can.
    Usable {
        /// What makes it possible.
        by: UserfaultSource,
    },
    /// The kernel does not let this user watch page faults.
    Denied {
        /// The value of `vm.unprivileged_userfaultfd`, if it can be read.
        unprivileged_userfaultfd: Option<bool>,
        /// Whether `/dev/userfaultfd` opens, which QEMU before 8.0 does not use.
        device_opens: bool,
    },
    /// The kernel cannot write-protect memory this way.
    NoWriteProtection,
    /// The kernel has no userfaultfd.
    NoUserfaultfd,
}

/// What gives access to userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserfaultSource {
    /// The system call: by CAP_SYS_PTRACE or vm.unprivileged_userfaultfd.
    SystemCall,
    /// `/dev/userfaultfd`.
    Device,
}

/// Looks for QEMU, in PATH where no `binary` is given, and asks it what it can do.
pub fn detect(binary: Option<&Path>) -> Result<Qemu, DetectError> {
    let binary = match binary {
        Some(binary) => binary.to_owned(),
        None => find_in_path().ok_or(DetectError::NotFound)?,
    };
    let answer = ask(&binary, "--version")?;
    let version = parse_version(&answer).ok_or_else(|| DetectError::Unrecognised {
        binary: binary.clone(),
        argument: "--version",
        answer: answer.chars().take(200).collect(),
    })?;
    if version < MINIMUM_VERSION {
        return Err(DetectError::TooOld { binary, found: version });
    }
    let machine_types = first_words(&ask(&binary, "-machine help")?);
    let accelerators = first_words(&ask(&binary, "-accel help")?);
    let sandbox = ask(&binary, "-help")?.contains("-sandbox on");
    Ok(Qemu { binary, version, machine_types, accelerators, sandbox })
}

/// Whether KVM can be trusted on this computer.
pub fn kvm_usable() -> KvmState {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match opened {
        _ if !has_virtualisation(&processors) => {
            KvmState::NoProcessorSupport { device_opens: opened.is_ok() }
        }
        Ok(_) => KvmState::Usable,
        Err(error) => KvmState::NoAccess { errno: error.raw_os_error().unwrap_or(0) },
    }
}

/// The fewest virtual CPUs with which a machine works reliably.
///
/// QEMU before 8.1 elides memory barriers in translated code when there is one virtual CPU, though device threads run
/// beside it: a guest's network queue then stops for ever. Two avoid it.
pub fn minimum_vcpus(qemu: &Qemu, accelerator: Accelerator) -> u32 {
    if accelerator == Accelerator::Tcg && qemu.version < BARRIER_FIX_SINCE { 2 } else { 1 }
}

/// Whether `qemu`, started by this process, can capture a running machine by write protection.
pub fn background_snapshot_usable(qemu: &Qemu) -> BackgroundSnapshot {
    let by_call = userfaultfd_by_call();
    let by_device = userfaultfd_by_device();
    let device_counts = qemu.version >= DEVICE_SINCE;
    let (fd, by) = match (by_call, by_device) {
        // QEMU that knows the device prefers it; either works.
        (Ok(fd), _) => (fd, UserfaultSource::SystemCall),
        (Err(_), Ok(fd)) if device_counts => (fd, UserfaultSource::Device),
        (Err(Errno::ENOSYS), _) => return BackgroundSnapshot::NoUserfaultfd,
        (Err(_), by_device) => {
            let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").ok();
            return BackgroundSnapshot::Denied {
                unprivileged_userfaultfd: sysctl.map(|value| value.trim() == "1"),
                device_opens: by_device.is_ok(),
            };
        }
    };
    if supports_write_protection(&fd) {
        BackgroundSnapshot::Usable { by }
    } else {
        BackgroundSnapshot::NoWriteProtection
    }
}

fn find_in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(BINARY)).find(|binary| binary.is_file())
}

fn ask(binary: &Path, argument: &'static str) -> Result<String, DetectError> {
    let output = Command::new(binary)
        .args(argument.split(' '))
        .stdin(Stdio::null())
        .output()
        .map_err(|source| DetectError::Run { binary: binary.to_owned(), argument, source })?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `QEMU emulator version 7.2.22 (Debian ...)`; development versions lack nothing, some builds lack the micro number.
fn parse_version(answer: &str) -> Option<(u32, u32, u32)> {
    let (_, rest) = answer.split_once("emulator version ")?;
    let number = rest.split(|other: char| other != '.' && !other.is_ascii_digit()).next()?;
    let mut parts = number.split('.').filter(|part| !part.is_empty()).map(str::parse);
    let major = parts.next()?.ok()?;
    let minor = parts.next()?.ok()?;
    Some((major, minor, parts.next().and_then(Result::ok).unwrap_or(0)))
}

/// The first word of each line but the heading.
fn first_words(answer: &str) -> Vec<String> {
    answer.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

fn has_virtualisation(processors: &str) -> bool {
    processors
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn dotted((major, minor, micro): (u32, u32, u32)) -> String {
    format!("{major}.{minor}.{micro}")
}

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const UFFDIO_API: libc::c_ulong = nix::request_code_readwrite!(0xaa, 0x3f, size_of::<UffdioApi>());
const USERFAULTFD_IOC_NEW: libc::c_ulong = nix::request_code_none!(0xaa, 0x00);

/// A new one, with which nothing has been agreed yet.
pub(crate) fn userfaultfd_by_call() -> Result<OwnedFd, Errno> {
    // SAFETY: userfaultfd takes flags only, and touches no memory.
    let fd =
        Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn userfaultfd_by_device() -> Result<OwnedFd, Errno> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    // SAFETY: the request takes flags by value; `device` owns the descriptor.
    let fd = Errno::result(unsafe {
        libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK)
    })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Agrees with the kernel on the version of its interface, and says whether that has write protection.
pub(crate) fn supports_write_protection(userfaultfd: &OwnedFd) -> bool {
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: `api` has the layout the request reads and writes; `userfaultfd` owns the descriptor.
    let answered = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), UFFDIO_API, &mut api) };
    answered == 0 && api.features & UFFD_FEATURE_PAGEFAULT_FLAG_WP != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let cases = [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", Some((7, 2, 22))),
            ("QEMU emulator version 10.0.0", Some((10, 0, 0))),
            ("QEMU emulator version 9.1.50 (v9.1.0-rc1)", Some((9, 1, 50))),
            ("QEMU emulator version 8.2", Some((8, 2, 0))),
            ("QEMU emulator version x", None),
            ("bash: 7.2.1", None),
        ];
        for (answer, expected) in cases {
            assert_eq!(parse_version(answer), expected, "{answer}");
        }
    }

    #[test]
    fn virtualisation_is_a_whole_flag() {
        assert!(has_virtualisation("flags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("processor: 0\nflags : svm"));
        assert!(!has_virtualisation("flags : fpu vmx_x svm2\nbugs : vmx"));
    }

    #[test]
    fn old_tcg_needs_two_processors() {
        let mut qemu = Qemu {
            binary: PathBuf::new(),
            version: (7, 2, 22),
            machine_types: Vec::new(),
            accelerators: Vec::new(),
            sandbox: true,
        };
        assert_eq!(minimum_vcpus(&qemu, Accelerator::Tcg), 2);
        assert_eq!(minimum_vcpus(&qemu, Accelerator::Kvm), 1);
        qemu.version = (8, 1, 0);
        assert_eq!(minimum_vcpus(&qemu, Accelerator::Tcg), 1);
    }

    #[test]
    fn an_old_or_strange_binary_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("folder");
        let script = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("#!/bin/sh\necho '{text}'\n")).expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
            path
        };
        let error = detect(Some(&script("old", "QEMU emulator version 6.2.0"))).expect_err("old");
        assert!(error.to_string().ends_with("is QEMU 6.2.0, at least 7.2.0 is needed"), "{error}");
        let error = detect(Some(&script("strange", "hello"))).expect_err("strange");
        assert!(matches!(error, DetectError::Unrecognised { .. }), "{error}");
        let error = detect(Some(Path::new("/nonexistent/qemu"))).expect_err("missing");
        assert!(matches!(error, DetectError::Run { .. }), "{error}");
    }
}
