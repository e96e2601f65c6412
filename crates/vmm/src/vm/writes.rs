//! Tracking what is written to the guest's memory.

use std::{
    fmt,
    sync::{Arc, PoisonError, atomic::Ordering::SeqCst},
};

use kvm_ioctls::{VcpuFd, VmFd};
use pageferry_dirty::{Tracked, Tracker, WpAsync};
use pageferry_kvm::{
    OnWrite,
    dirty::{DirtyLog, DirtyRing, KvmTracker, RingSize, TrackedSlot, WriteMarks, on_write},
};
use pageferry_memory::{GuestAddress, Region, RegionId};

use super::{Vm, slot};
use crate::VmError;

/// How writes to a machine's memory are tracked.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum WriteTracking {
    /// By KVM's dirty log: what vCPUs write, and what others say they have written.
    #[default]
    Log,
    /// By KVM's dirty rings: the same, in a machine with [rings](crate::VmConfig::dirty_ring), and
    /// by one tracker in the machine's life.
    Ring,
    /// By write protection that the kernel lifts by itself: what anybody writes to the view that
    /// KVM has, in memory that no pager brings any more.
    Protection,
}

impl WriteTracking {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Log, Self::Ring, Self::Protection];
}

impl fmt::Display for WriteTracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Log => "log",
            Self::Ring => "ring",
            Self::Protection => "protection",
        })
    }
}

/// What is written by others than vCPUs, for trackers that see vCPUs only.
#[derive(Debug)]
pub(crate) struct Marks(Vec<(Arc<Region>, WriteMarks)>);

impl Marks {
    pub(super) fn new(regions: &[Arc<Region>]) -> Self {
        let marks = |region: &Arc<Region>| (Arc::clone(region), WriteMarks::new(region.len()));
        Self(regions.iter().map(marks).collect())
    }

    /// Says that so many bytes have been written.
    pub(crate) fn mark(&self, address: GuestAddress, len: u64) {
        for (region, marks) in &self.0 {
            if let Some(offset) = address.offset_from(region.guest_base())
                && offset < region.len()
            {
                marks.mark(offset, len);
            }
        }
    }

    fn slots(&self) -> Vec<TrackedSlot> {
        let slots = (0..).map(RegionId::new).zip(&self.0).map(|(id, (region, marks))| {
            let view = region.kvm_view().range();
            TrackedSlot::new(slot(id), region.guest_base(), view).marked(marks.clone())
        });
        slots.collect()
    }
}

/// The rings of a machine's vCPUs.
pub(super) fn ring(
    vm: &VmFd,
    size: RingSize,
    marks: &Marks,
    vcpus: &[VcpuFd],
) -> Result<DirtyRing, VmError> {
    // SAFETY: these are the slots as the machine gets them, the vCPUs are all of its own, and
    // nobody else collects. `Vm::tracker` is where it is said who keeps the slots.
    Ok(unsafe { DirtyRing::new(vm, size, marks.slots(), vcpus) }?)
}

impl Vm {
    /// What a tracker of this machine arms: the paged memory, as KVM shows it to the guest.
    pub fn tracked(&self) -> Vec<Tracked> {
        self.regions.iter().map(|region| Tracked::base(region.kvm_view().range())).collect()
    }

    /// A tracker of writes to the paged memory, to be armed for [`tracked`](Self::tracked).
    /// Memslots stay where they are while it is armed: see [`move_slot`](Self::move_slot).
    ///
    /// # Errors
    /// When the machine or the host does not have this way, or not any more, or a memslot has been
    /// moved.
    pub fn tracker(&self, how: WriteTracking) -> Result<Box<dyn Tracker>, VmError> {
        let refuse = |why: &str| Err(VmError::Config { why: format!("tracking by {how}: {why}") });
        if self.moved.load(SeqCst) {
            return refuse("a memslot has been moved");
        }
        match how {
            WriteTracking::Log if self.rings.is_some() => refuse("the machine has dirty rings"),
            WriteTracking::Log => {
                // SAFETY: the machine has these slots, none has been moved, and `move_slot` and
                // `remove_slot` say what holds while a tracker is armed.
                let log = unsafe {
                    DirtyLog::new(&self.fd, self.marks.slots(), DirtyLog::mode_of(&self.fd))
                }?;
                Ok(Box::new(KvmTracker::from(log)))
            }
            WriteTracking::Ring => {
                let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner).take();
                match ring {
                    Some(ring) => Ok(Box::new(KvmTracker::from(ring))),
                    None => refuse("the machine has no dirty rings, or had its tracker"),
                }
            }
            WriteTracking::Protection => {
                let views = self.regions.iter().map(|region| Arc::clone(region.kvm_view()));
                Ok(Box::new(WpAsync::own(views)?))
            }
        }
    }

    /// For [`VmPagerOptions::on_write`](pageferry_kvm::VmPagerOptions::on_write): what a pager
    /// writes on behalf of a vCPU, this machine's trackers are to know.
    pub fn on_write(&self) -> OnWrite {
        on_write(self.marks.0.iter().map(|(region, marks)| (region.guest_base(), marks.clone())))
    }
}
