//! The demand-paging engine of Pageferry: a guest touches a granule that is not there, and this
//! crate brings it.
//!
//! ```text
//!  guest touches ── queue ─┐
//!  an absent       signal ─┼─► PageMap.claim ─► source.request(span, urgency) ─► sink.page(span, bytes) ─► install ─► publish ─► wake
//!  granule                 │        │ already requested: wait           ▲
//!                          │        │ already present: re-enter         └── pushed pages (background sweep, prefetch)
//! ```
//!
//! Start reading at [`Pager`]; the fault path is `fault.rs`, all of it on one screen.

#![deny(unsafe_code)]

mod answers;
mod background;
mod builder;
mod children;
mod choose;
mod closed;
mod core;
mod delivery;
mod events;
mod fault;
mod gate;
mod histogram;
mod install;
mod pager;
mod pending;
mod poison;
mod prefetch;
mod settle;
mod sink;
mod slot;
mod source;
mod staging;
mod stats;
mod tracking;
mod two_views;
mod views;

pub use builder::{Builder, Chosen, Events, StartError};
pub use choose::{Hints, choose_delivery};
pub use delivery::{Delivery, Resolved};
pub use histogram::Latency;
pub use install::InstallMethod;
pub use pager::{Pager, Status};
pub use prefetch::Prefetch;
pub use source::{Completion, Fill, PageSink, PageSource, SinkError, SourceError, Span, Urgency};
pub use stats::{Counts, Statistics};
pub use tracking::{ProtectError, WriteObserver, WriteTracking};
