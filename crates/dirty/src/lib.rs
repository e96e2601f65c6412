//! Dirty tracking: what was written since the last look, for pre-copy, incremental snapshots and
//! checkpoints.
//!
//! Everything that notices writes is a [`Tracker`]: it is armed with ranges, and harvested into a
//! [`DirtySet`], which notices the next writes in the same step. A write is never lost between
//! harvests; a page may be reported twice.
//!
//! | method | works with | costs |
//! |---|---|---|
//! | [`WpAsync`] | a userfaultfd of the process that is tracked, Linux 6.7 | a fault for the first write to a page, inside the kernel |
//! | [`WpBlocking`] | the same, Linux 6.4 | the first write to a page waits for a thread, which can tell of it at once ([`WriteEvents`]) |
//! | [`SoftDirty`] | any process, by its id, if the kernel has the bits | the process stands still during a harvest ([`Freeze`]) |
//! | [`PagedTracker`] | memory that a pager brings at the same time, which it has registered | as the first two |
//!
//! KVM's dirty log and dirty ring are trackers, too, in another crate. [`choose`] picks a method and
//! says why.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use pageferry_dirty::{DirtySet, Tracked, Tracker, WpAsync};
//! use pageferry_memory::Mapping;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = Arc::new(Mapping::anonymous(64 << 20)?);
//! let ranges = [Tracked::base(memory.range())];
//! let mut tracker = WpAsync::own([Arc::clone(&memory)])?;
//! tracker.arm(&ranges)?;
//! let dirty = DirtySet::new(&ranges)?;
//!
//! memory.write_at(5 << 20, &[1])?;
//! tracker.harvest(&dirty)?;
//! for run in dirty.take() {
//!     println!("{run} was written");
//! }
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]

mod armed;
mod error;
mod events;
mod freeze;
mod page_bits;
mod paged;
mod probe;
mod process;
#[allow(unsafe_code)]
mod protect;
mod reader;
mod scan;
mod set;
mod soft_dirty;
mod target;
mod tracker;
mod wp_async;
mod wp_blocking;

pub use error::DirtyError;
pub use events::{NoNotice, Notice, Overflow, WriteEvent, WriteEvents};
pub use freeze::{AlreadyStopped, Freeze, OnlyThread};
pub use paged::{PagedTracker, PagedWrites};
pub use probe::{Ability, Choice, Condition, NoMethod, Report, SOFT_DIRTY_UP_TO, choose, probe};
pub use process::{AttachOptions, ProcessHarvest, ProcessTrackError, ProcessTracker};
pub use set::{DirtySet, Marker};
pub use soft_dirty::SoftDirty;
pub use target::Target;
pub use tracker::{Harvested, Method, Tracked, Tracker};
pub use wp_async::WpAsync;
pub use wp_blocking::WpBlocking;
