//! The byte by which other threads make KVM_RUN return at once.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use kvm_ioctls::VcpuFd;

/// `immediate_exit` in the page that a vCPU shares with KVM. Source: the kernel's
/// `Documentation/virt/kvm/api.rst`, section 5.
///
/// It must be dropped before the vCPU it belongs to: see [`of`](Self::of).
#[derive(Debug)]
pub(crate) struct ImmediateExit(*const AtomicU8);

// SAFETY: an atomic byte, for every thread to use.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// That of this vCPU. It is part of the same structure as the vCPU, and so is not used any more
    /// when the page is unmapped.
    pub(crate) fn of(vcpu: &mut VcpuFd) -> Self {
        Self((&raw mut vcpu.get_kvm_run().immediate_exit).cast())
    }

    /// Whether KVM_RUN is to return at once. Returns what it was to do before.
    pub(crate) fn set(&self, wanted: bool) -> bool {
        // SAFETY: the byte lies in the vCPU's shared page, which is mapped as long as the vCPU lives,
        // with which this is kept. KVM only reads it; `VcpuFd` touches it only in a method that is
        // not used here.
        unsafe { &*self.0 }.swap(wanted.into(), SeqCst) != 0
    }
}
