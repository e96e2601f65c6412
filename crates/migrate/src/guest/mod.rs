//! Whole guests, moved while they run.
//!
//! [`SourceMigration`] has the guest and gives it away; [`DestinationMigration`] takes it. What a
//! virtual machine monitor has to bring is [`SourceGuest`] and [`DestinationGuest`]. Which message
//! is legal when, and who may run the guest, the sans-IO core decides (`core::guest`); here is what
//! does it: connections, threads, pages.

mod bucket;
mod compress;
mod converge;
mod delta;
mod destination;
mod known;
mod memory;
mod options;
mod source;
mod status;
mod traits;
mod units;
mod via;

pub use compress::Compression;
pub use converge::OnNoConvergence;
pub use destination::{DestinationMigration, DestinationStatus};
pub use options::{MigrateOptions, Mode, Observer, ReceiveOptions};
pub use source::{Outcome, SourceMigration};
pub use status::{DestinationCounts, Event, RoundReport, SourceCounts, SourceStatus, Stage};
pub use traits::{DestinationGuest, DeviceState, DirtySink, GuestError, SourceGuest};
pub use via::Via;
