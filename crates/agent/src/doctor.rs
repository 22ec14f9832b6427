//! What this computer can do, and how to mend what is missing.

use std::path::Path;

use diorama_api::{CheckStatus, DoctorCheck, DoctorReport, Folders};
use diorama_qemu::capability::{
    self, Accelerator, BackgroundSnapshot, KvmState, Qemu, UserfaultSource, minimum_vcpus,
};
use diorama_qemu::process::{Policy, set_thread_policy};
use diorama_store::Location;

use crate::dataplane::PLANE_POLICY;
use crate::hardware;
use crate::images;
use crate::problem::store_error;
use crate::processors;
use crate::ram_cache::{Room, free_bytes, is_in_memory};
use crate::store_location;

/// Looks at this computer, without an agent.
pub fn doctor() -> DoctorReport {
    let mut checks = Vec::new();
    let qemu = match capability::detect(hardware::chosen_binary().as_deref()) {
        Ok(qemu) => {
            checks.push(ok("qemu", format!("{} ({})", hardware::version(&qemu), qemu.binary.display())));
            Some(qemu)
        }
        Err(error) => {
            let error = hardware::detect_error(&error);
            checks.push(check("qemu", CheckStatus::Failed, error.message, error.hint));
            None
        }
    };
    checks.push(kvm());
    if let Some(qemu) = &qemu {
        checks.push(vcpus(qemu));
        checks.push(sandbox(qemu));
        let usable = capability::background_snapshot_usable(qemu);
        let (found, hint) = background_snapshot(&usable);
        let status = if hint.is_none() { CheckStatus::Ok } else { CheckStatus::Warning };
        checks.push(check("live capture", status, found, hint));
    }
    checks.push(priority());
    checks.push(processors());
    match Folders::from_process() {
        Ok(folders) => {
            checks.push(memory(&folders));
            checks.push(store(&folders));
            checks.push(image(&folders));
        }
        Err(error) => checks.push(check("folders", CheckStatus::Failed, error.message, error.hint)),
    }
    let ok = checks.iter().all(|check| check.status != CheckStatus::Failed);
    DoctorReport { ok, checks }
}

/// Whether memory can be captured live: what was found, and what to do if it cannot.
pub(crate) fn background_snapshot(usable: &BackgroundSnapshot) -> (String, Option<String>) {
    let enable = "run `sysctl vm.unprivileged_userfaultfd=1` as root (put it into /etc/sysctl.d to keep it), or run \
                  Diorama as root";
    match usable {
        BackgroundSnapshot::Usable { by: UserfaultSource::SystemCall } => {
            ("userfaultfd can be used".to_owned(), None)
        }
        BackgroundSnapshot::Usable { by: UserfaultSource::Device } => {
            ("userfaultfd can be used through /dev/userfaultfd".to_owned(), None)
        }
        BackgroundSnapshot::Denied { device_opens, .. } => (
            "the kernel lets only privileged users have userfaultfd".to_owned(),
            Some(if *device_opens {
                format!("{enable}, or install QEMU 8 or newer, which uses /dev/userfaultfd")
            } else {
                enable.to_owned()
            }),
        ),
        BackgroundSnapshot::NoWriteProtection => (
            "the kernel's userfaultfd cannot write-protect memory".to_owned(),
            Some("use a Linux 5.7 or newer on x86-64".to_owned()),
        ),
        BackgroundSnapshot::NoUserfaultfd => (
            "the kernel has no userfaultfd".to_owned(),
            Some("use a kernel with CONFIG_USERFAULTFD".to_owned()),
        ),
    }
}

fn kvm() -> DoctorCheck {
    let slow = "machines run without it (TCG), several times slower";
    match capability::kvm_usable() {
        KvmState::Usable => ok("kvm", "usable".to_owned()),
        KvmState::NoProcessorSupport { device_opens: false } => check(
            "kvm",
            CheckStatus::Warning,
            format!("the processor shows no vmx or svm; {slow}"),
            Some("on a virtual machine, turn on nested virtualisation".to_owned()),
        ),
        KvmState::NoProcessorSupport { device_opens: true } => check(
            "kvm",
            CheckStatus::Warning,
            format!("/dev/kvm opens, but the processor shows no vmx or svm, so guests would hang; {slow}"),
            Some(
                "turn on nested virtualisation; `accelerator: kvm` in the environment file forces it"
                    .to_owned(),
            ),
        ),
        KvmState::NoAccess { errno } => check(
            "kvm",
            CheckStatus::Warning,
            format!("/dev/kvm does not open ({}); {slow}", std::io::Error::from_raw_os_error(errno)),
            Some("join the group that owns /dev/kvm, or load the module kvm_intel or kvm_amd".to_owned()),
        ),
    }
}

fn vcpus(qemu: &Qemu) -> DoctorCheck {
    match minimum_vcpus(qemu, Accelerator::Tcg) {
        1 => ok("virtual CPUs", "as the environment file says".to_owned()),
        least => check(
            "virtual CPUs",
            CheckStatus::Warning,
            format!(
                "QEMU {} without KVM loses network interrupts of machines with one virtual CPU; they get {least}",
                hardware::version(qemu)
            ),
            Some("QEMU 8.1 or newer does not need this".to_owned()),
        ),
    }
}

fn sandbox(qemu: &Qemu) -> DoctorCheck {
    if qemu.sandbox {
        ok("sandbox", "QEMU drops the system calls that it does not need".to_owned())
    } else {
        check(
            "sandbox",
            CheckStatus::Warning,
            "this QEMU was built without seccomp: a guest that breaks out of it can do what you can"
                .to_owned(),
            Some("use your distribution's QEMU".to_owned()),
        )
    }
}

/// What an agent that this user starts may do so that guests do not wait while it takes a snapshot.
fn priority() -> DoctorCheck {
    let name = "priority";
    let mut lacking = Vec::new();
    if !may_be_first() {
        lacking.push("no real-time threads: frames, timers and cuts wait for guests that compute");
    }
    if !may_collapse() {
        lacking.push("no huge pages for running machines: snapshots after the first pause them for 50 ms longer, for each GiB");
    }
    if lacking.is_empty() {
        return ok(name, "threads that guests wait for go before others".to_owned());
    }
    let hint = "run the agent as root; for the threads alone, `nice -15` and `rtprio 3` in limits.conf(5) \
        (`LimitNICE=-15`, `LimitRTPRIO=3` in a systemd unit) suffice";
    check(name, CheckStatus::Warning, lacking.join("; "), Some(hint.to_owned()))
}

/// Whether threads of ours may be scheduled as a cut's are.
fn may_be_first() -> bool {
    // A thread of its own, whose priority ends with it.
    let tried = std::thread::spawn(|| {
        let thread = nix::unistd::gettid().as_raw().cast_unsigned();
        [Policy::First, PLANE_POLICY].into_iter().all(|policy| set_thread_policy(thread, policy).is_ok())
    });
    tried.join().unwrap_or(false)
}

/// Whether another process's memory may be put into huge pages (process_madvise(2)).
fn may_collapse() -> bool {
    const CAP_SYS_NICE: u32 = 23;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> CAP_SYS_NICE & 1 == 1)
}

fn processors() -> DoctorCheck {
    let allowed = processors::allowed();
    match processors::quota() {
        None => ok("processors", format!("{allowed}, and no quota that can be seen from here")),
        Some(quota) => check(
            "processors",
            CheckStatus::Warning,
            format!(
                "a control group lets an agent started from here, and its machines, have {}.{:02} of {allowed} processors: once that is \
                 used up, all machines stand still for up to {} ms",
                quota.hundredths / 100,
                quota.hundredths % 100,
                quota.period.as_millis(),
            ),
            Some(
                "give whole processors (a cpuset) instead of the quota, or have machines use much less of it"
                    .to_owned(),
            ),
        ),
    }
}

fn memory(folders: &Folders) -> DoctorCheck {
    let Some(folder) = existing(folders.runtime()) else {
        return check("RAM cache", CheckStatus::Failed, "no folder for it".to_owned(), None);
    };
    let room = Room::beside(folders.runtime(), folder);
    let (used, free) = room.map_or((0, 0), |room| (room.used_bytes >> 20, room.free_bytes >> 20));
    let found = format!("{} ({used} MiB used, {free} MiB free for it)", folders.runtime().display());
    if is_in_memory(folder) {
        ok("RAM cache", found)
    } else {
        check(
            "RAM cache",
            CheckStatus::Warning,
            format!("{found} is not on tmpfs: restored machines cannot be snapshotted live"),
            Some("set DIORAMA_RUNTIME_DIR to a folder on tmpfs".to_owned()),
        )
    }
}

fn store(folders: &Folders) -> DoctorCheck {
    let name = "snapshot store";
    let location = match store_location(folders) {
        Ok(location) => location,
        Err(error) => return check(name, CheckStatus::Failed, error.message, error.hint),
    };
    let Location::Folder(folder) = &location else {
        return match location.reach() {
            Ok(()) => ok(name, format!("{location} can be reached")),
            Err(error) => {
                let error = store_error(error);
                check(name, CheckStatus::Failed, error.message, error.hint)
            }
        };
    };
    let Some(there) = existing(folder) else {
        return check(name, CheckStatus::Failed, "no folder for it".to_owned(), None);
    };
    let free = free_bytes(there).unwrap_or(0) >> 20;
    let found = format!("{location} ({free} MiB free)");
    if free >= 1024 {
        ok(name, found)
    } else {
        let hint = "make room, or set DIORAMA_HOME or DIORAMA_STORE to a folder on a larger disk".to_owned();
        check(name, CheckStatus::Warning, found, Some(hint))
    }
}

fn image(folders: &Folders) -> DoctorCheck {
    match images::find(folders, images::BUILT_IN_IMAGES[0]) {
        Ok(image) => ok("image micro", image.kernel.parent().unwrap_or(Path::new("")).display().to_string()),
        Err(error) => check("image micro", CheckStatus::Warning, error.message, error.hint),
    }
}

fn existing(folder: &Path) -> Option<&Path> {
    folder.ancestors().find(|folder| folder.is_dir())
}

fn ok(name: &str, found: String) -> DoctorCheck {
    check(name, CheckStatus::Ok, found, None)
}

fn check(name: &str, status: CheckStatus, found: String, hint: Option<String>) -> DoctorCheck {
    DoctorCheck { name: name.to_owned(), status, found, hint }
}
