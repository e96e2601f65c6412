//! KVM_EXIT_INTERNAL_ERROR because an instruction that KVM had to emulate could not be fetched.
//!
//! KVM makes this exit for code of ring 0. For others it does with KVM_CAP_EXIT_ON_EMULATION_FAILURE
//! only, and otherwise the guest gets an invalid opcode; but what a processor fetches by itself is
//! there when KVM fetches it again.

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use pageferry_memory::GuestAddress;
use pageferry_paging::Resolved;

use crate::{
    Place, VcpuPager,
    stats::Counters,
    sys,
    vcpu::{Next, Thread},
};

/// The longest instruction, in bytes.
const LONGEST: u64 = 15;
const PAGE: u64 = 4096;
/// Invalid opcode.
const UD: u8 = 6;

/// What was done about failed fetches.
#[derive(Debug, Default)]
pub(crate) struct Fetch {
    /// Where the last exit found the vCPU, if that was a failed emulation.
    last: Option<u64>,
}

impl VcpuPager {
    /// Brings the page or the two pages that the instruction is in. If it fails again with them
    /// there, it is not for want of them, and is the embedder's.
    pub(crate) fn fetch(&mut self, vcpu: &mut VcpuFd, thread: &mut Thread<'_>) -> Next {
        if !sys::emulation_failed(vcpu.get_kvm_run()) {
            return Next::Untouched;
        }
        let Ok(registers) = vcpu.get_regs() else { return Next::Untouched };
        let Some(places) = self.instruction(vcpu, &registers) else { return Next::Untouched };
        let mut missing = false;
        for place in places.into_iter().flatten() {
            missing |= !self.is_present(place);
            match self.resolve(place.host, thread) {
                Resolved::Present | Resolved::NotOurs => {}
                Resolved::Poisoned => {
                    clear_invalid_opcode(vcpu);
                    return self.memory_error(place.host, vcpu, true);
                }
                Resolved::Interrupted => {
                    clear_invalid_opcode(vcpu);
                    return self.interrupted();
                }
            }
        }
        let again = self.fetch.last.replace(registers.rip) == Some(registers.rip);
        if again && !missing {
            self.fetch.last = None;
            return Next::Untouched;
        }
        Counters::count(&self.counters.fetches);
        clear_invalid_opcode(vcpu);
        Next::Enter
    }

    /// Where the instruction is that the vCPU stands at; `None` when that is no paged memory.
    fn instruction(&self, vcpu: &VcpuFd, registers: &kvm_regs) -> Option<[Option<Place>; 2]> {
        let system = vcpu.get_sregs().ok()?;
        // In 64-bit code the base of the segment is 0 whatever it says.
        let base = if system.cs.l != 0 { 0 } else { system.cs.base };
        let start = base.wrapping_add(registers.rip);
        let last = start.wrapping_add(LONGEST - 1);
        let find = |linear: u64| {
            // It knows by itself whether the vCPU has paging on.
            let physical = vcpu.translate_gva(linear).ok()?;
            let valid = physical.valid != 0;
            valid.then(|| self.slots.find(GuestAddress::new(physical.physical_address))).flatten()
        };
        let first = find(start);
        let second = (last / PAGE != start / PAGE).then(|| find(last)).flatten();
        (first.is_some() || second.is_some()).then_some([first, second])
    }
}

/// Besides leaving, KVM raises an invalid opcode in the guest, which would be delivered by the next
/// KVM_RUN instead of trying again.
fn clear_invalid_opcode(vcpu: &VcpuFd) {
    let Ok(mut events) = vcpu.get_vcpu_events() else { return };
    if (events.exception.injected | events.exception.pending) == 0 || events.exception.nr != UD {
        return;
    }
    (events.exception.injected, events.exception.pending) = (0, 0);
    // Nothing but what is always there is set: the rest may have changed since it was read.
    events.flags = 0;
    if let Err(error) = vcpu.set_vcpu_events(&events) {
        tracing::warn!("taking back an invalid opcode: {error}");
    }
}
