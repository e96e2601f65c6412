//! KVM_EXIT_MMIO for an address that is memory: KVM found the page missing when it emulated an
//! instruction. The access is made here, and KVM completes the instruction.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use pageferry_memory::{GuestAddress, HostAddress, Mapping, Region};
use pageferry_paging::Resolved;

use crate::{Place, VcpuPager, sys, vcpu::Thread};

/// An access of an emulated instruction: one to eight bytes, which KVM splits at pages. KVM keeps
/// the data in the vCPU's shared page until the next KVM_RUN.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Access {
    guest: GuestAddress,
    write: bool,
    given_up: bool,
}

/// How an access went.
pub(crate) enum Done {
    /// It is made.
    Made,
    /// Not yet.
    Interrupted,
    /// There can never be memory at this address.
    Poisoned(HostAddress),
}

impl Access {
    pub(crate) fn new(guest: GuestAddress, write: bool) -> Self {
        Self { guest, write, given_up: false }
    }

    /// From now on it is made without memory: ones are read, and nothing is written.
    pub(crate) fn give_up(&mut self) {
        self.given_up = true;
    }

    pub(crate) fn make(
        &self,
        pager: &VcpuPager,
        vcpu: &mut VcpuFd,
        thread: &mut Thread<'_>,
    ) -> Done {
        let mut data = sys::mmio(vcpu.get_kvm_run());
        if self.given_up {
            if !self.write {
                data.fill(0xff);
            }
            return Done::Made;
        }
        let mut at = self.guest;
        while !data.is_empty() {
            // A slot that has been taken away since the exit is like no memory at all.
            let Some(place) = pager.slots.find(at) else {
                if !self.write {
                    data.fill(0xff);
                }
                return Done::Made;
            };
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
