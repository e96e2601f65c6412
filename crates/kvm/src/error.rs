//! What can go wrong.

use pageferry_memory::{GuestAddress, RegionId};
use pageferry_paging::Delivery;

use crate::dirty::LogMode;

/// Why something could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The delivery asked for does not work on this host.
    #[error("delivery {delivery}: {why}")]
    NotHere {
        /// What was asked for.
        delivery: Delivery,
        /// What is missing, and how that was found.
        why: String,
    },
    /// The host reads guest page tables itself, and a failed read is a page fault in the guest.
    #[error(
        "delivery {delivery}: this host has shadow paging ({found}), which reads the guest's page \
         tables without leaving KVM_RUN: keep them resident and say so \
         (guest_page_tables_resident), or deliver by queue"
    )]
    ShadowPaging {
        /// What was asked for.
        delivery: Delivery,
        /// How that was found.
        found: String,
    },
    /// A slot that does not lie in its region.
    #[error(
        "slot {slot} at {guest}: {len:#x} bytes from offset {offset:#x} are not in region {region}"
    )]
    SlotOutsideRegion {
        /// The slot's number.
        slot: u32,
        /// Where the guest was to have it.
        guest: GuestAddress,
        /// Its length in bytes.
        len: u64,
        /// Where it was to begin in the region, in bytes.
        offset: u64,
        /// The region.
        region: RegionId,
    },
    /// A slot at guest addresses that another one has.
    #[error("slot {slot} at {guest} overlaps slot {other}")]
    SlotsOverlap {
        /// The slot that was to be set.
        slot: u32,
        /// Where the guest was to have it.
        guest: GuestAddress,
        /// The slot that is there.
        other: u32,
    },
    /// An area that KVM writes lies in memory that can never come.
    #[error("{area} at {guest} lies in a page that cannot be brought")]
    AreaPoisoned {
        /// Which area.
        area: &'static str,
        /// Where the guest has it.
        guest: GuestAddress,
    },
    /// A guest's writes of registers cannot be made to leave KVM_RUN here.
    #[error(
        "{missing} is missing (Linux 5.10 has it): areas that KVM writes by itself can be brought \
         before the first run only"
    )]
    NoRegisterExits {
        /// The capability.
        missing: &'static str,
    },
    /// Waiting for an area that KVM writes was interrupted.
    #[error("interrupted while bringing {area} at {guest}")]
    Interrupted {
        /// Which area.
        area: &'static str,
        /// Where the guest has it.
        guest: GuestAddress,
    },
    /// A slot is to be tracked twice.
    #[error("slot {slot} is to be tracked twice")]
    SlotTwice {
        /// The slot's number.
        slot: u32,
    },
    /// The marks of writes that KVM does not see are for less than the slot.
    #[error("slot {slot} has {pages} pages, and the marks that go with it are for {marks}")]
    TooFewMarks {
        /// The slot's number.
        slot: u32,
        /// How many pages it has.
        pages: u64,
        /// How many the marks are for.
        marks: u64,
    },
    /// The machine's dirty log has no such mode.
    #[error(
        "dirty log in mode {mode:?}: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 of this machine is {known:#x}"
    )]
    NoLogMode {
        /// What was asked for.
        mode: LogMode,
        /// What KVM says it has.
        known: u32,
    },
    /// Dirty rings of this size cannot be had.
    #[error("dirty rings of {bytes} bytes: {why}")]
    NoDirtyRing {
        /// What was asked for.
        bytes: u32,
        /// What KVM said.
        why: String,
    },
    /// A tracker was harvested that was not armed.
    #[error("harvesting a tracker that is not armed")]
    NotArmed,
    /// KVM did not take entries back that had been collected.
    #[error(
        "KVM_RESET_DIRTY_RINGS leaves {entries} entries that have been collected: does somebody else \
         collect the rings?"
    )]
    NotReset {
        /// How many.
        entries: u64,
    },
    /// KVM refused something about the tracking of a slot.
    #[error("{what} for slot {slot} at {guest}: {source}")]
    DirtyTracking {
        /// The ioctl.
        what: &'static str,
        /// The slot's number.
        slot: u32,
        /// Where the guest has it.
        guest: GuestAddress,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM refused something.
    #[error("{what}: {source}")]
    Ioctl {
        /// The ioctl, or what was being done.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

impl KvmError {
    pub(crate) fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl { what, source }
    }
}

/// Why [`VcpuPager::run`](crate::VcpuPager::run) came back without an exit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// What KVM_RUN said, EINTR included: a signal of the embedder's is about to be delivered, or
    /// `immediate_exit` is set.
    #[error("KVM_RUN: {0}")]
    Kvm(kvm_ioctls::Error),
    /// The vCPU could not be prepared for paging.
    #[error(transparent)]
    Paging(KvmError),
}

impl RunError {
    pub(crate) fn interrupted() -> Self {
        Self::Kvm(kvm_ioctls::Error::new(libc::EINTR))
    }

    /// KVM_RUN's error number, if it is KVM_RUN's error.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Kvm(error) => Some(error.errno()),
            Self::Paging(_) => None,
        }
    }

    /// Whether it is EINTR.
    pub fn is_interrupted(&self) -> bool {
        self.errno() == Some(libc::EINTR)
    }
}
