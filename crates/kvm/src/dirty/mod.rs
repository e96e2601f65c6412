//! What a guest has written since the last look, as KVM itself tracks it.
//!
//! | | [`DirtyLog`] | [`DirtyRing`] |
//! |---|---|---|
//! | what KVM keeps | a bit for each page of a slot | an entry for each first write, in a ring for each vCPU |
//! | a harvest costs | by the memory tracked, and what was written | by what was written |
//! | a vCPU that writes a lot | goes on | leaves KVM_RUN when its ring is full, until it has been emptied |
//! | has to be decided | at any time | before the first vCPU is made, for good |
//!
//! Both are armed, harvested (which arms again what it reports, in the same step) and disarmed. A
//! page is reported once or several times for each time that it is written between two harvests,
//! and sometimes when it was not; a write is never lost: whoever reads a page when it is reported, or
//! later, sees all that was written before, and every later write is reported again.
//!
//! KVM sees the writes of vCPUs, and its own. What the embedder writes, its devices, and
//! [`VcpuPager::run`](crate::VcpuPager::run) for a vCPU, it has to say in [`WriteMarks`], which the
//! harvest merges. Memory that arrives is not thereby written; but the first time that a vCPU touches a
//! page it is reported even if it was only read, since KVM maps it for writing at once.
//!
//! [`KvmTracker`] makes either of them a [`Tracker`](pageferry_dirty::Tracker) as all others are, of host
//! addresses, harvested into a [`DirtySet`](pageferry_dirty::DirtySet). That crate's trackers by write
//! protection work under a guest, too, in memory that memslots show, and see what every thread of the
//! process writes to that mapping.
//!
//! Source: `Documentation/virt/kvm/api.rst`: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG,
//! KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_DIRTY_LOG_RING, KVM_RESET_DIRTY_RINGS.

#[cfg(feature = "vm-memory")]
mod adapter;
mod log;
mod marks;
mod pages;
mod ring;
mod slots;
#[allow(unsafe_code)]
pub(crate) mod sys;
mod tracker;

pub use log::{DirtyLog, LogMode};
pub use marks::{WriteMarks, on_write};
pub use ring::{DirtyRing, RingCollector, RingSize};
pub use slots::TrackedSlot;
pub use tracker::KvmTracker;

/// The pages that KVM tracks: small ones, whatever the memory is made of.
pub const TRACKED_PAGE: u64 = 4096;

/// What a harvest was.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Harvested {
    /// Pages that were reported.
    pub pages: u64,
    /// Calls of the kernel's that it took.
    pub calls: u64,
    /// Whether every page was reported, because KVM did not say which were written: see
    /// [`DirtyRing`].
    pub whole: bool,
}
