//! KVM_EXIT_X86_WRMSR for a register that names an area which KVM writes by itself: the area is
//! brought, the register set, and the instruction completed.

use kvm_ioctls::{MsrExitReason, VcpuFd, WriteMsrExit};

use crate::{
    VcpuPager,
    areas::{Missed, Register},
    pending::Done,
    sys,
    vcpu::Thread,
};

/// A WRMSR of the guest's that has left KVM_RUN and is not complete.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Write {
    register: &'static Register,
    value: u64,
}

impl Write {
    /// What an exit is about, if the filter made it, and it is such a register's.
    pub(crate) fn of(exit: &WriteMsrExit<'_>) -> Option<Self> {
        if exit.reason != MsrExitReason::Filter {
            return None;
        }
        let register = Register::of(exit.index)?;
        Some(Self { register, value: exit.data })
    }

    pub(crate) fn make(
        &self,
        pager: &VcpuPager,
        vcpu: &mut VcpuFd,
        thread: &mut Thread<'_>,
    ) -> Done {
        let Self { register, value } = *self;
        match register.bring(value, &pager.slots, &mut |host| pager.resolve(host, thread)) {
            Ok(()) => {}
            Err(Missed::Poisoned { host, .. }) => return Done::Poisoned(host),
            Err(Missed::Interrupted { .. }) => return Done::Interrupted,
        }
        // What KVM refuses is an exception in the guest (general protection), as if there were no
        // filter.
        let set = sys::set_msr(vcpu, register.msr, value);
        sys::complete_wrmsr(vcpu.get_kvm_run(), set);
        Done::Made
    }
}

/// The register is not set, and the guest gets the exception.
pub(crate) fn refuse(vcpu: &mut VcpuFd) -> Done {
    sys::complete_wrmsr(vcpu.get_kvm_run(), false);
    Done::Made
}
