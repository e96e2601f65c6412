//! Safe, typed and complete bindings of the Linux interfaces by which a program serves and tracks
//! page faults: userfaultfd, `/proc/PID/pagemap`, `PAGEMAP_SCAN` and `/proc/PID/clear_refs`.
//!
//! No threads and no policy: a call here is one call of the kernel, what it can come to is an
//! [`Outcome`], and nothing the kernel says is lost.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use pageferry_uffd::{
//!     CopyMode, Event, EventBuffer, Features, Mapped, Options, Outcome, RegisterMode,
//! };
//!
//! /// Answers one batch of faults in `memory` with pages full of ones.
//! fn serve(memory: Arc<impl Mapped>) -> Result<(), Box<dyn std::error::Error>> {
//!     let uffd = Arc::new(Options::new().optional(Features::THREAD_ID).open()?);
//!     let range = memory.range();
//!     let _registration = uffd.register(memory, range, RegisterMode::MISSING)?;
//!     let mut events = EventBuffer::new(64);
//!     uffd.read_events(&mut events)?;
//!     for event in events.drain() {
//!         if let Event::Fault(fault) = event? {
//!             match uffd.copy(fault.address, &[1; 4096], CopyMode::WAKE)? {
//!                 Outcome::Installed { .. } => {}
//!                 Outcome::AlreadyPresent { .. } => uffd.wake(range)?,
//!                 other => println!("{}: {other:?}", fault.address),
//!             }
//!         }
//!     }
//!     Ok(())
//! }
//! ```
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod abi;
mod addr;
mod clear_refs;
mod error;
#[allow(unsafe_code)]
mod event;
mod features;
#[allow(unsafe_code)]
mod mapped;
#[allow(unsafe_code)]
mod open;
mod outcome;
#[allow(unsafe_code)]
mod pagemap;
pub mod probe;
#[allow(unsafe_code)]
mod registration;
#[allow(unsafe_code)]
mod userfaultfd;

pub use addr::{HostAddress, HostRange};
pub use clear_refs::{ClearRefs, ClearRefsError, clear_refs};
pub use error::{Operation, RegisterError, UffdError};
pub use event::{
    DecodeError, Drain, Event, EventBuffer, Fault, FaultKind, MESSAGE_SIZE, RawEvent,
    decode_message,
};
pub use features::{Features, Ioctls, RegisterMode};
pub use mapped::Mapped;
pub use open::{Attempt, Obstacle, OpenError, OpenWay, Options};
pub use outcome::Outcome;
pub use pagemap::{
    PageCategories, PageRegion, Pagemap, PagemapEntry, PagemapError, ScanFlags, ScanRequest,
    ScanResult,
};
pub use registration::Registration;
pub use rustix::io::Errno;
pub use userfaultfd::{CopyMode, MoveMode, Negotiated, Userfaultfd, Wake};
