//! What the instruction that a vCPU is in the middle of waits for: KVM completes it when it is
//! entered again.

use kvm_ioctls::VcpuFd;
use pageferry_memory::HostAddress;

use crate::{
    MemoryErrors, VcpuPager,
    access::Access,
    registers::{self, Write},
    stats::Counters,
    vcpu::{Next, Thread},
};

#[derive(Copy, Clone, Debug)]
pub(crate) struct Pending {
    what: What,
    /// It is to be completed without memory.
    given_up: bool,
}

#[derive(Copy, Clone, Debug)]
pub(crate) enum What {
    /// An access to memory, of an instruction that KVM emulates.
    Access(Access),
    /// A register that names an area which KVM writes by itself.
    Register(Write),
}

/// How it went.
pub(crate) enum Done {
    /// Nothing is waited for any more.
    Made,
    /// Not yet.
    Interrupted,
    /// There can never be memory at this address.
    Poisoned(HostAddress),
}

impl Pending {
    pub(crate) fn new(what: What) -> Self {
        Self { what, given_up: false }
    }

    fn make(&self, pager: &VcpuPager, vcpu: &mut VcpuFd, thread: &mut Thread<'_>) -> Done {
        match (self.what, self.given_up) {
            (What::Access(access), false) => access.make(pager, vcpu, thread),
            (What::Access(access), true) => access.give_up(vcpu),
            (What::Register(write), false) => write.make(pager, vcpu, thread),
            (What::Register(_), true) => registers::refuse(vcpu),
        }
    }
}

impl VcpuPager {
    /// Does what the instruction waits for, if the memory is there or comes.
    pub(crate) fn finish(&mut self, vcpu: &mut VcpuFd, thread: &mut Thread<'_>) -> Next {
        // It stays until it is made, also when the source panics.
        let Some(mut pending) = self.pending else { return Next::Enter };
        match pending.make(self, vcpu, thread) {
            Done::Made => {
                self.pending = None;
                Next::Enter
            }
            Done::Interrupted => self.interrupted(),
            Done::Poisoned(host) => {
                pending.given_up = true;
                self.pending = Some(pending);
                let next = match pending.what {
                    What::Access(_) => self.memory_error(host, vcpu, false),
                    What::Register(_) => self.no_area(host),
                };
                match next {
                    // The guest has been told: the instruction is completed without its memory.
                    Next::Enter => self.finish(vcpu, thread),
                    next => next,
                }
            }
        }
    }

    /// The guest named an area that can never come. It has not touched it: an exception says that the
    /// register is not set. (A machine check would be lost, too, where KVM emulates an instruction to
    /// get over it.)
    fn no_area(&self, host: HostAddress) -> Next {
        Counters::count(&self.counters.memory_errors);
        let guest = self.slots.guest_address(host);
        if self.vm.options.memory_errors == MemoryErrors::Mce {
            tracing::warn!("an area that KVM is to write cannot come, at {guest:?}");
            return Next::Enter;
        }
        Next::MemoryError { guest, host }
    }
}
