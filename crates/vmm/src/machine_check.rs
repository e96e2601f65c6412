//! Machine checks: a vCPU that has banks for them, so that KVM can be given one to deliver.

use std::{io, os::fd::AsRawFd};

use kvm_ioctls::VcpuFd;

use crate::VmError;

/// `_IOW(KVMIO, 0x9c, __u64)`. Source: `include/uapi/linux/kvm.h`.
const KVM_X86_SETUP_MCE: libc::c_ulong = 0x4008_ae9c;

/// IA32_MCG_CAP: ten banks, a control register, and software error recovery, which is what lets a
/// machine check name the address of an access that could not be served (Intel's manual, volume 3,
/// sections 17.3.1.1 and 17.6).
const BANKS: u64 = 10;
const CONTROL: u64 = 1 << 8;
const RECOVERY: u64 = 1 << 24;

/// Gives the vCPU its banks.
pub(crate) fn set_up(vcpu: &VcpuFd) -> Result<(), VmError> {
    let capabilities = BANKS | CONTROL | RECOVERY;
    // SAFETY: the ioctl reads the eight bytes that it is given, and nothing else.
    let answer =
        unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_X86_SETUP_MCE, &raw const capabilities) };
    if answer == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    Err(VmError::Kvm { what: format!("KVM_X86_SETUP_MCE of {capabilities:#x}"), source })
}
