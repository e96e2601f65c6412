//! Memslots whose writes are tracked.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use pageferry_memory::{GuestAddress, HostRange};

use super::{TRACKED_PAGE, WriteMarks, sys};
use crate::KvmError;

/// A memslot whose writes are to be tracked, as the machine has it.
#[derive(Clone, Debug)]
pub struct TrackedSlot {
    /// Its number, with that of its address space in the upper 16 bits.
    pub slot: u32,
    /// Where the guest has its first byte.
    pub guest: GuestAddress,
    /// What it shows.
    pub view: HostRange,
    /// Whether it is a KVM_MEM_READONLY slot.
    pub read_only: bool,
    /// Writes that KVM does not see, by their offset in the slot.
    pub marks: Option<WriteMarks>,
}

impl TrackedSlot {
    /// A slot that the guest may write, and whose writes are all KVM's.
    pub fn new(slot: u32, guest: GuestAddress, view: HostRange) -> Self {
        Self { slot, guest, view, read_only: false, marks: None }
    }

    /// The same with marks of what KVM does not see.
    #[must_use]
    pub fn marked(self, marks: WriteMarks) -> Self {
        Self { marks: Some(marks), ..self }
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.view.len() / TRACKED_PAGE
    }

    pub(super) fn error(
        &self,
        what: &'static str,
    ) -> impl FnOnce(kvm_ioctls::Error) -> KvmError + use<> {
        let (slot, guest) = (self.slot, self.guest);
        move |source| KvmError::DirtyTracking { what, slot, guest, source }
    }
}

/// The machine, and those of its slots that are tracked.
#[derive(Debug)]
pub(super) struct Tracked {
    vm: OwnedFd,
    slots: Box<[TrackedSlot]>,
    /// Whether each of them is.
    armed: Box<[bool]>,
}

/// A descriptor of the machine's own, which keeps it alive.
pub(super) fn descriptor(vm: &VmFd) -> Result<OwnedFd, KvmError> {
    sys::borrow(vm).try_clone_to_owned().map_err(|error| KvmError::Ioctl {
        what: "duplicating the machine's descriptor",
        source: error.into(),
    })
}

impl Tracked {
    /// The caller vouches for the slots, as the public functions' callers do.
    pub(super) fn new(vm: &VmFd, slots: Vec<TrackedSlot>) -> Result<Self, KvmError> {
        for (n, one) in slots.iter().enumerate() {
            if slots[..n].iter().any(|other| other.slot == one.slot) {
                return Err(KvmError::SlotTwice { slot: one.slot });
            }
            if let Some(marks) = &one.marks
                && marks.pages() < one.pages()
            {
                return Err(KvmError::TooFewMarks {
                    slot: one.slot,
                    pages: one.pages(),
                    marks: marks.pages(),
                });
            }
        }
        let armed = vec![false; slots.len()].into();
        Ok(Self { vm: descriptor(vm)?, slots: slots.into(), armed })
    }

    pub(super) fn vm(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.vm)
    }

    pub(super) fn slots(&self) -> &[TrackedSlot] {
        &self.slots
    }

    /// Whether any slot is armed.
    pub(super) fn is_armed(&self) -> bool {
        self.armed.contains(&true)
    }

    /// Where in [`slots`](Self::slots) the armed ones are.
    pub(super) fn armed(&self) -> impl Iterator<Item = usize> {
        self.armed.iter().enumerate().filter_map(|(n, armed)| armed.then_some(n))
    }

    /// Those among [`slots`](Self::slots) that are wanted, and not armed yet.
    pub(super) fn missing(&self, wanted: &dyn Fn(&TrackedSlot) -> bool) -> Vec<usize> {
        let slots = self.slots.iter().zip(&self.armed).enumerate();
        slots.filter(|(_, (slot, armed))| !**armed && wanted(slot)).map(|(n, _)| n).collect()
    }

    /// Turns tracking on in all of these, which are not armed, or in none.
    pub(super) fn arm(&mut self, which: &[usize]) -> Result<(), KvmError> {
        for (done, &n) in which.iter().enumerate() {
            if let Some(marks) = &self.slots[n].marks {
                marks.clear();
            }
            if let Err(error) = self.set(n, true) {
                self.disarm_or_warn(&which[..done]);
                return Err(error);
            }
            self.armed[n] = true;
        }
        Ok(())
    }

    /// Arms every page of what is armed, whatever KVM believes. Writes meanwhile are not tracked: all
    /// pages have to be taken for written afterwards. After a failure nothing is armed.
    pub(super) fn arm_anew(&mut self) -> Result<(), KvmError> {
        let all: Vec<usize> = self.armed().collect();
        for &n in &all {
            if let Err(error) = self.set(n, false).and_then(|()| self.set(n, true)) {
                self.disarm_or_warn(&all);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Turns it off in these, when something else is the error to be told of.
    pub(super) fn disarm_or_warn(&mut self, which: &[usize]) {
        for &n in which {
            self.armed[n] = false;
            if let Err(error) = self.set(n, false) {
                tracing::warn!("turning tracking off again: {error}");
            }
        }
    }

    /// Turns it off in all of them, also where one fails, whose error it is then.
    pub(super) fn disarm(&mut self) -> Result<(), KvmError> {
        let armed: Vec<usize> = self.armed().collect();
        self.armed.fill(false);
        armed.iter().map(|n| self.set(*n, false)).fold(Ok(()), Result::and)
    }

    fn set(&self, n: usize, on: bool) -> Result<(), KvmError> {
        let slot = &self.slots[n];
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
                | if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.guest.get(),
            memory_size: slot.view.len(),
            userspace_addr: slot.view.start().get(),
        };
        sys::set_slot(self.vm.as_raw_fd(), &region)
            .map_err(slot.error("KVM_SET_USER_MEMORY_REGION"))
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!("turning tracking off: {error}");
        }
    }
}
