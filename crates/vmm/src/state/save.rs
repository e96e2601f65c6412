//! Saving.

use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::{
    PlatformPart, PlatformState, StateError, VcpuPart, VcpuState, cpuid, ioctl, msrs,
    parts::{CR4, EFER},
    time,
};

/// Saves what KVM keeps of a machine while none of its vCPUs is in the guest.
#[derive(Clone, Debug)]
pub struct Saver {
    msrs: Vec<u32>,
    /// What KVM_CAP_XSAVE2 says.
    xsave: usize,
    has_xsave: bool,
}

impl Saver {
    /// For this machine.
    ///
    /// # Errors
    /// [`StateError::Host`].
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        let named = kvm.get_msr_index_list().map_err(|error| StateError::Host {
            what: "the registers that it has (KVM_GET_MSR_INDEX_LIST)",
            source: error.into(),
        })?;
        Ok(Self {
            msrs: msrs::indices(named.as_slice()),
            xsave: xsave_bytes(vm),
            has_xsave: vm.check_extension(Cap::Xsave),
        })
    }

    /// Saves a vCPU. If its last exit was in the middle of an instruction, KVM_RUN has been called
    /// since with `immediate_exit` set, and has returned EINTR.
    ///
    /// # Errors
    /// [`StateError::Save`], [`StateError::Nested`].
    pub fn vcpu(&self, vcpu: &VcpuFd) -> Result<VcpuState, StateError> {
        let mut state = VcpuState::default();
        for part in VcpuPart::ALL {
            if let Some(bytes) = self.part(vcpu, part, &state)? {
                state.parts.insert(part, bytes);
            }
        }
        Ok(state)
    }

    fn part(
        &self,
        vcpu: &VcpuFd,
        part: VcpuPart,
        before: &VcpuState,
    ) -> Result<Option<Vec<u8>>, StateError> {
        let has = |part| before.parts.contains_key(&part);
        let fd = ioctl::fd(vcpu);
        let bytes = match part {
            VcpuPart::Cpuid => cpuid::save(vcpu)?,
            VcpuPart::Tsc => time::save(vcpu)?,
            VcpuPart::Msrs => msrs::save(vcpu, &self.msrs)?,
            VcpuPart::Xsave if !self.has_xsave => return Ok(None),
            VcpuPart::Xsave => ioctl::get_xsave(fd, self.xsave).map_err(StateError::save(part))?,
            VcpuPart::Sregs if has(VcpuPart::Sregs2) => return Ok(None),
            VcpuPart::Fpu if has(VcpuPart::Xsave) => return Ok(None),
            part => {
                let Some((get, _)) = part.requests() else { return Ok(None) };
                match ioctl::get(fd, get, &[]) {
                    Ok(bytes) => bytes,
                    Err(error) if is(&error, part.absent()) => return Ok(None),
                    Err(error) => return Err(StateError::save(part)(error)),
                }
            }
        };
        if matches!(part, VcpuPart::Sregs | VcpuPart::Sregs2) && uses_nested(&bytes) {
            return Err(StateError::Nested { part });
        }
        Ok(Some(bytes))
    }

    /// Saves what the vCPUs share.
    ///
    /// # Errors
    /// [`StateError::Save`].
    pub fn platform(&self, vm: &VmFd) -> Result<PlatformState, StateError> {
        let mut state = PlatformState::default();
        for part in PlatformPart::ALL {
            if let Some(bytes) = platform_part(vm, part).map_err(StateError::save_platform(part))? {
                state.parts.insert(part, bytes);
            }
        }
        Ok(state)
    }
}

/// A part, if the machine has it.
pub(super) fn platform_part(vm: &VmFd, part: PlatformPart) -> std::io::Result<Option<Vec<u8>>> {
    let first = part.chip().map(u32::to_le_bytes);
    let (get, _) = part.requests();
    match ioctl::get(ioctl::fd(vm), get, first.as_ref().map_or(&[], |chip| &chip[..])) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is(&error, part.absent()) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn xsave_bytes(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0)
}

fn is(error: &std::io::Error, errno: i32) -> bool {
    errno != 0 && error.raw_os_error() == Some(errno)
}

/// CR4.VMXE or EFER.SVME.
fn uses_nested(sregs: &[u8]) -> bool {
    let word = |at: usize| u64::from_le_bytes(sregs[at..at + 8].try_into().expect("eight bytes"));
    word(CR4) & 1 << 13 != 0 || word(EFER) & 1 << 12 != 0
}
