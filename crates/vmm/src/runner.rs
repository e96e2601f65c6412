//! What enters the guest: KVM_RUN as it is, a pager around it, or somebody else's loop.

use kvm_ioctls::VcpuFd;
use pageferry_kvm::{Exit, RunError, VcpuPager, VcpuStats};

/// Enters the guest on a vCPU's thread, from the beginning of a run to its end.
///
/// [`VcpuPager`] is one. [`Vm::run_with`](crate::Vm::run_with) takes others, to compare with it or
/// to look on.
pub trait VcpuRunner: Send {
    /// Runs the vCPU until it exits for a reason that the machine is to handle.
    ///
    /// # Errors
    /// As [`VcpuPager::run`]. EINTR leads to another call, unless the vCPU is to stop.
    fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError>;

    /// Whether it was interrupted in the middle of an instruction, which waits for memory.
    fn is_mid_instruction(&self) -> bool {
        false
    }

    /// What it counted, for [`VcpuReport::pager`](crate::VcpuReport::pager).
    fn stats(&self) -> Option<VcpuStats> {
        None
    }
}

impl VcpuRunner for VcpuPager {
    fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        VcpuPager::run(self, vcpu)
    }

    fn is_mid_instruction(&self) -> bool {
        VcpuPager::is_mid_instruction(self)
    }

    fn stats(&self) -> Option<VcpuStats> {
        Some(VcpuPager::stats(self))
    }
}

/// KVM_RUN and nothing else: for memory that is all there, or whose faults are delivered by queue.
#[derive(Copy, Clone, Debug, Default)]
pub struct KvmRun;

impl VcpuRunner for KvmRun {
    fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        vcpu.run().map(Exit::Kvm).map_err(RunError::Kvm)
    }
}
