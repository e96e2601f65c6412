//! What a virtual machine monitor gives to have its guest moved, on either side.

use std::sync::Arc;

use pageferry_memory::{GranuleRange, Layout, RegionId};
use pageferry_paging::{Builder, Pager};

use crate::core::RegionInfo;

/// Why the embedder could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// This guest or host cannot do it.
    #[error("{what}: {why}")]
    Failed {
        /// What was being done.
        what: &'static str,
        /// What prevented it.
        why: String,
    },
    /// There is not enough memory for the guest.
    #[error("not enough memory for a guest of {bytes} bytes: {why}")]
    Memory {
        /// Bytes of guest memory that were needed.
        bytes: u64,
        /// What there is.
        why: String,
    },
    /// The state of the devices is of a kind or version that is not known here.
    #[error("device state {name:?} version {version}: {why}")]
    State {
        /// The state's name.
        name: String,
        /// Its version.
        version: u32,
        /// What is wrong with it.
        why: String,
    },
}

impl GuestError {
    /// An error without a kind of its own.
    pub fn failed(what: &'static str, why: impl std::fmt::Display) -> Self {
        Self::Failed { what, why: why.to_string() }
    }
}

/// All of a guest that is not its memory: opaque to the migration, which carries it whole and
/// checks its digest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceState {
    /// Who wrote it, and so who can read it: ASCII, 1 to 16 bytes.
    pub name: String,
    /// The version of the bytes, of the embedder's own counting.
    pub version: u32,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Told of dirty pages: a run of 4 KiB units of one region.
pub type DirtySink<'a> = dyn FnMut(RegionId, GranuleRange) + 'a;

/// A running guest that is to be moved away.
///
/// The calls come from the migration's own threads, one at a time, in this order: tracking is
/// started, harvested any number of times and, after [`pause`](Self::pause), once more; then
/// [`save`](Self::save). If the migration fails or is cancelled before the destination was told to
/// run, tracking is stopped and the guest resumed, whatever had been done by then. Otherwise
/// [`release`](Self::release) comes, and nothing after it.
pub trait SourceGuest: Send + Sync {
    /// Every byte of the guest's memory. It stays as it is until the migration has ended.
    fn layout(&self) -> Layout;

    /// Begins to notice writes, of vCPUs, devices and whoever else writes guest memory.
    ///
    /// # Errors
    /// What prevents that. The migration fails, and the guest runs on.
    fn start_tracking(&self) -> Result<(), GuestError>;

    /// Reports every unit of 4 KiB written since the last harvest, and goes on noticing. One that
    /// was not written may be reported; one that was may not be left out.
    ///
    /// # Errors
    /// Whatever makes the report incomplete.
    fn harvest(&self, into: &mut DirtySink<'_>) -> Result<(), GuestError>;

    /// Ends what [`start_tracking`](Self::start_tracking) began.
    ///
    /// # Errors
    /// What prevents that; it is reported and otherwise ignored.
    fn stop_tracking(&self) -> Result<(), GuestError>;

    /// Stops the guest: when this returns no vCPU and no device writes guest memory any more.
    ///
    /// # Errors
    /// What prevents that. The guest is resumed.
    fn pause(&self) -> Result<(), GuestError>;

    /// Lets the guest go on as if nothing had been. Also called after a [`pause`](Self::pause)
    /// that failed.
    ///
    /// # Errors
    /// What prevents that: the guest then stands still, and the migration's error says so.
    fn resume(&self) -> Result<(), GuestError>;

    /// The state of all that is not memory, while the guest is paused.
    ///
    /// # Errors
    /// What prevents that. The guest is resumed.
    fn save(&self) -> Result<DeviceState, GuestError>;

    /// Slows the vCPUs down by so many percent of their time; 0 lets them run freely.
    ///
    /// # Errors
    /// What prevents that; the migration goes on without.
    fn throttle(&self, percent: u8) -> Result<(), GuestError>;

    /// The guest runs elsewhere for good and all of its memory is there: it can be freed.
    fn release(&self);
}

/// A place where a guest can arrive.
pub trait DestinationGuest: Send + Sync {
    /// Makes memory for these regions, in this order, at these guest addresses and of these
    /// lengths, zeroed and untouched; each with a granule of at least the region's. The kind of
    /// memory and the size of its pages are free. Nobody but the migration touches it before
    /// [`run`](Self::run).
    ///
    /// # Errors
    /// [`GuestError::Memory`] if there is not enough of it. The source is told before its guest
    /// is stopped.
    fn prepare(&self, regions: &[RegionInfo]) -> Result<Layout, GuestError>;

    /// The last word on how absent memory is delivered. The builder has the layout that
    /// [`prepare`](Self::prepare) returned, no prefetch of its own, and its other defaults.
    fn deliver(&self, builder: Builder) -> Builder {
        builder
    }

    /// Takes the state of all that is not memory. Memory may still be absent: it must not be
    /// touched here.
    ///
    /// # Errors
    /// [`GuestError::State`] if it cannot be understood. The source's guest goes on.
    fn restore(&self, state: &DeviceState) -> Result<(), GuestError>;

    /// Starts the guest: from now on it is this one that lives. Absent memory comes through
    /// `pager`; there is none where everything is there.
    ///
    /// # Errors
    /// What prevents that. The guest is lost to both sides then, unless the source is told to
    /// take it back; so all that can fail should be done in [`restore`](Self::restore).
    fn run(&self, pager: Option<Arc<Pager>>) -> Result<(), GuestError>;

    /// The guest will not come: whatever was made for it can be freed.
    fn drop_guest(&self);
}
