//! KVM_EXIT_MMIO for an address that is memory: KVM found the page missing when it emulated an
//! instruction. The access is made here, and KVM completes the instruction.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use pageferry_memory::{GuestAddress, Mapping, Region};
use pageferry_paging::Resolved;

use crate::{Place, VcpuPager, pending::Done, sys, vcpu::Thread};

/// An access of an emulated instruction: one to eight bytes, which KVM splits at pages. KVM keeps
/// the data in the vCPU's shared page until the next KVM_RUN.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Access {
    guest: GuestAddress,
    write: bool,
}

impl Access {
    pub(crate) fn new(guest: GuestAddress, write: bool) -> Self {
        Self { guest, write }
    }

    /// It is made without memory: ones are read, and nothing is written.
    pub(crate) fn give_up(&self, vcpu: &mut VcpuFd) -> Done {
        self.nowhere(sys::mmio(vcpu.get_kvm_run()))
    }

    fn nowhere(&self, data: &mut [u8]) -> Done {
        if !self.write {
            data.fill(0xff);
        }
        Done::Made
    }

    pub(crate) fn make(
        &self,
        pager: &VcpuPager,
        vcpu: &mut VcpuFd,
        thread: &mut Thread<'_>,
    ) -> Done {
        let mut data = sys::mmio(vcpu.get_kvm_run());
        let mut at = self.guest;
        while !data.is_empty() {
            // A slot that has been taken away since the exit is like no memory at all.
            let Some(place) = pager.slots.find(at) else { return self.nowhere(data) };
            match pager.resolve(place.host, thread) {
                Resolved::Present | Resolved::NotOurs => {}
                Resolved::Poisoned => return Done::Poisoned(place.host),
                Resolved::Interrupted => return Done::Interrupted,
            }
            let (part, rest) = data.split_at_mut(data.len().min(place.len as usize));
            self.copy(pager, place, part);
            let Some(next) = at.checked_add(part.len() as u64) else { break };
            (at, data) = (next, rest);
        }
        if self.write
            && let Some(on_write) = &pager.vm.options.on_write
        {
            let len = at.offset_from(self.guest).unwrap_or(0);
            on_write(self.guest, len);
        }
        Done::Made
    }

    fn copy(&self, pager: &VcpuPager, place: Place, data: &mut [u8]) {
        let Some(region) = pager.vm.pager.layout().get(place.region) else { return };
        let view = view(region);
        let address = view.as_ptr().wrapping_add(place.offset as usize);
        // SAFETY: the slot lies in its region, and the part in the slot, so the bytes lie in the
        // view, which is mapped as long as the region is.
        unsafe {
            if self.write {
                sys::write_racy(address, data);
            } else {
                sys::read_racy(address, data);
            }
        }
    }
}

/// The fill view never faults; without one the page has just been brought to where KVM has it.
fn view(region: &Region) -> &Arc<Mapping> {
    region.fill_view().unwrap_or(region.kvm_view())
}
