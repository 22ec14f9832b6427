//! Which QEMU runs machines, and which virtual hardware they get.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use diorama_api::{ApiError, ErrorKind};
use diorama_qemu::capability::{self, Accelerator, DetectError, KvmState, Qemu};
use diorama_qemu::command_line::DEFAULT_MACHINE_TYPE;
use diorama_topology::{Accelerator as WantedAccelerator, Machine};

use crate::record::{AcceleratorRecord, HardwareRecord};

/// A versioned model that every vendor's processors and TCG can play, with what x86-64-v2 asks for.
pub(crate) const DEFAULT_CPU_MODEL: &str = "qemu64-v1,+ssse3,+sse4.1,+sse4.2,+popcnt";
/// TCG's translation buffer, private to each fork: ample for a small guest, and bounded.
pub(crate) const TB_SIZE_MIB: u32 = 32;

/// The installed QEMU, looked for once it is needed.
#[derive(Debug, Default)]
pub(crate) struct Hardware {
    qemu: Mutex<Option<Arc<Qemu>>>,
}

impl Hardware {
    /// The QEMU that runs machines. A failure is not remembered: the user may install it meanwhile.
    pub(crate) fn qemu(&self) -> Result<Arc<Qemu>, ApiError> {
        let mut known = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(qemu) = known.as_ref().filter(|qemu| qemu.binary.is_file()) {
            return Ok(Arc::clone(qemu));
        }
        let qemu =
            Arc::new(capability::detect(chosen_binary().as_deref()).map_err(|error| detect_error(&error))?);
        *known = Some(Arc::clone(&qemu));
        Ok(qemu)
    }

    /// The hardware that a machine of the file gets. Warnings say where it is not what the file asks for.
    pub(crate) fn choose(
        &self,
        machine: &Machine,
        warnings: &mut Vec<String>,
    ) -> Result<HardwareRecord, ApiError> {
        let qemu = self.qemu()?;
        let accelerator = accelerator(machine.accelerator)?;
        let least = capability::minimum_vcpus(&qemu, accelerator);
        let vcpus = machine.cpus.max(least);
        if vcpus != machine.cpus {
            warnings.push(format!(
                "machine {} gets {vcpus} virtual CPUs instead of {}: QEMU {} without KVM loses network interrupts \
                 with fewer (`diorama doctor`)",
                machine.name,
                machine.cpus,
                version(&qemu),
            ));
        }
        if !qemu.machine_types.iter().any(|known| known == DEFAULT_MACHINE_TYPE) {
            return Err(ApiError::new(
                ErrorKind::Unsupported,
                format!("QEMU {} does not know the machine type {DEFAULT_MACHINE_TYPE}", version(&qemu)),
            )
            .hint("install a QEMU between 7.2 and 10"));
        }
        Ok(HardwareRecord {
            machine_type: DEFAULT_MACHINE_TYPE.to_owned(),
            cpu_model: machine.cpu_model.clone().unwrap_or_else(|| DEFAULT_CPU_MODEL.to_owned()),
            accelerator: match accelerator {
                Accelerator::Kvm => AcceleratorRecord::Kvm,
                Accelerator::Tcg => AcceleratorRecord::Tcg,
            },
            vcpus,
            memory_bytes: machine.memory_bytes,
            tb_size_mib: TB_SIZE_MIB,
        })
    }
}

/// `DIORAMA_QEMU` names the program; else it is looked for in PATH.
pub(crate) fn chosen_binary() -> Option<PathBuf> {
    std::env::var_os("DIORAMA_QEMU").filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// A version as people write it.
pub(crate) fn version(qemu: &Qemu) -> String {
    let (major, minor, micro) = qemu.version;
    format!("{major}.{minor}.{micro}")
}

/// Why there is no usable QEMU, and what to do.
pub(crate) fn detect_error(error: &DetectError) -> ApiError {
    let hint = match error {
        DetectError::TooOld { .. } => "install QEMU 7.2 or newer, or name one with DIORAMA_QEMU",
        _ => "install it (Debian and Ubuntu: `apt install qemu-system-x86`), or name it with DIORAMA_QEMU",
    };
    ApiError::new(ErrorKind::Unsupported, error.to_string()).hint(hint)
}

fn accelerator(wanted: WantedAccelerator) -> Result<Accelerator, ApiError> {
    match wanted {
        WantedAccelerator::Tcg => Ok(Accelerator::Tcg),
        WantedAccelerator::Auto if capability::kvm_usable() == KvmState::Usable => Ok(Accelerator::Kvm),
        WantedAccelerator::Auto => Ok(Accelerator::Tcg),
        WantedAccelerator::Kvm => match capability::kvm_usable() {
            // Forced: the user may know better than the processor's flags.
            KvmState::Usable | KvmState::NoProcessorSupport { device_opens: true } => Ok(Accelerator::Kvm),
            _ => Err(ApiError::new(ErrorKind::Unsupported, "KVM cannot be used: /dev/kvm does not open")
                .hint("join the group that owns /dev/kvm, or leave `accelerator` out")),
        },
    }
}
