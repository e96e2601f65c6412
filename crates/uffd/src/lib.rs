//! Safe, typed and complete bindings of the Linux interfaces by which a program serves and tracks
//! page faults: userfaultfd, `/proc/PID/pagemap`, `PAGEMAP_SCAN` and `/proc/PID/clear_refs`.
//!
//! No threads and no policy: a call here is one call of the kernel, what it can come to is an
//! [`Outcome`], and nothing the kernel says is lost.
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
