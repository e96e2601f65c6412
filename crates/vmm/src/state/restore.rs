//! Restoring.

use std::io;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{
    PlatformPart, PlatformState, StateError, VcpuPart, VcpuState, cpuid, ioctl, msrs,
    parts::Length,
    save::{platform_part, xsave_bytes},
    time::Times,
};

/// Restores what KVM keeps of a machine, into one that was made alike: as many vCPUs, interrupt
/// controllers and timer in the kernel or not. First the vCPUs, beginning with that of number 0,
/// then what they share: see [the order](crate::state#order-of-restoring). None of them is in the
/// guest meanwhile.
///
/// After an error the machine is to be thrown away: a part of the state has been set.
#[derive(Debug)]
pub struct Restorer {
    supported: CpuId,
    xsave: usize,
    times: Times,
}

impl Restorer {
    /// For this machine.
    ///
    /// # Errors
    /// [`StateError::Host`].
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| StateError::Host {
                what: "the features that it has (KVM_GET_SUPPORTED_CPUID)",
                source: error.into(),
            })?;
        Ok(Self { supported, xsave: xsave_bytes(vm), times: Times::default() })
    }

    /// Restores a vCPU.
    ///
    /// # Errors
    /// What this host does not take, by name.
    pub fn vcpu(&mut self, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), StateError> {
        let fd = ioctl::fd(vcpu);
        if state.part(VcpuPart::Lapic).is_none() && has(vcpu, VcpuPart::Lapic) {
            return Err(StateError::Lacking(VcpuPart::Lapic.name()));
        }
        for (part, bytes) in state.parts() {
            match part {
                VcpuPart::Cpuid => cpuid::restore(vcpu, &self.supported, bytes)?,
                VcpuPart::Tsc => self.times.restore(vcpu, bytes)?,
                VcpuPart::Msrs => msrs::restore(vcpu, bytes)?,
                VcpuPart::Xsave => {
                    let bytes = self.xsave_that_fits(bytes)?;
                    ioctl::set_xsave(fd, self.xsave, bytes).map_err(StateError::refused(part))?;
                }
                part => {
                    if let Some((_, set)) = part.requests() {
                        ioctl::set(fd, set, bytes).map_err(StateError::refused(part))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What is beyond the end of this host's area must be zero.
    fn xsave_that_fits<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], StateError> {
        let Length::Between(least, _) = VcpuPart::Xsave.length() else { unreachable!("it is") };
        let here = self.xsave.max(least);
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if used > here {
            return Err(StateError::XsaveTooLarge { bytes: used, here });
        }
        Ok(&bytes[..bytes.len().min(here)])
    }

    /// Restores what the vCPUs share, after all of them.
    ///
    /// # Errors
    /// What this host does not take, by name.
    pub fn platform(&self, vm: &VmFd, state: &PlatformState) -> Result<(), StateError> {
        for part in PlatformPart::ALL {
            let refused = |source| StateError::Refused { part: part.name(), source };
            let Some(bytes) = state.part(part) else {
                if platform_part(vm, part).map_err(refused)?.is_some() {
                    return Err(StateError::Lacking(part.name()));
                }
                continue;
            };
            let (_, set) = part.requests();
            let mut bytes = bytes.to_vec();
            match part {
                PlatformPart::Clock => settle_clock(&mut bytes),
                part => {
                    if let Some(chip) = part.chip() {
                        bytes[..4].copy_from_slice(&chip.to_le_bytes());
                    }
                }
            }
            ioctl::set(ioctl::fd(vm), set, &bytes).map_err(refused)?;
        }
        Ok(())
    }
}

/// Of what KVM_GET_CLOCK gave only the time is to be set: the flags say what is known of the moment
/// it was read at, and with KVM_CLOCK_REALTIME among them KVM would add the time since.
fn settle_clock(bytes: &mut [u8]) {
    const TIME: usize = 8;
    bytes[TIME..].fill(0);
}

/// Whether this machine's vCPU has a part that not every one has.
fn has(vcpu: &VcpuFd, part: VcpuPart) -> bool {
    let get = part.requests().map(|(get, _)| get);
    let got: Option<io::Result<_>> = get.map(|get| ioctl::get(ioctl::fd(vcpu), get, &[]));
    got.is_some_and(|got| got.is_ok())
}
