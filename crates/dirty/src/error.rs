//! What can go wrong while writes are tracked.

use std::{error::Error, io};

use pageferry_memory::PageSize;
use pageferry_paging::ProtectError;
use pageferry_uffd::{ClearRefsError, Features, HostRange, OpenError, PagemapError, UffdError};

use crate::Method;

/// Why tracking failed. After any of these nothing is lost: what a failing harvest had collected is
/// in the set it was given, and what it may have forgotten is in there as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// A range to arm is empty, or no whole number of its pages.
    #[error("{range} is not a whole, positive number of pages of {page}")]
    Unaligned {
        /// The range.
        range: HostRange,
        /// Its page size.
        page: PageSize,
    },
    /// Two ranges have addresses in common.
    #[error("{range} overlaps {other}")]
    Overlaps {
        /// The range to be added.
        range: HostRange,
        /// The one that is there.
        other: HostRange,
    },
    /// A range to arm is not all inside one of the mappings the tracker was made for.
    #[error("cannot track {range}: it is not inside the memory that this tracker was made for")]
    NotOwned {
        /// The range.
        range: HostRange,
    },
    /// A set of dirty pages has no place for an armed range.
    #[error("harvesting {range}: the set to be filled does not have all of it")]
    NotInSet {
        /// The range.
        range: HostRange,
    },
    /// The method cannot track this.
    #[error("{method} cannot track {range}: {reason}")]
    Unsupported {
        /// The method.
        method: Method,
        /// The range.
        range: HostRange,
        /// Why.
        reason: &'static str,
    },
    /// This kernel or host does not have what the method needs.
    #[error("{method} needs {what}")]
    Missing {
        /// The method.
        method: Method,
        /// What is missing.
        what: &'static str,
    },
    /// No userfaultfd that does what the method needs.
    #[error("{method}: {source}")]
    Open {
        /// The method.
        method: Method,
        /// Why not.
        source: OpenError,
    },
    /// A userfaultfd was handed over that cannot be used.
    #[error("{method}: the userfaultfd of process {pid} {what} ({features})")]
    Descriptor {
        /// The method.
        method: Method,
        /// The process it is said to serve.
        pid: u32,
        /// What is wrong with it.
        what: &'static str,
        /// The features in question.
        features: Features,
    },
    /// A range could not be registered for write protection.
    #[error("cannot track {range}: {source}")]
    Register {
        /// The range.
        range: HostRange,
        /// What the kernel said.
        source: UffdError,
    },
    /// A range could not be write-protected.
    #[error("cannot write-protect {range}: {source}")]
    Protect {
        /// The range.
        range: HostRange,
        /// What the kernel said.
        source: UffdError,
    },
    /// A pager could not write-protect a range.
    #[error("cannot track {range}: {source}")]
    Pager {
        /// The range.
        range: HostRange,
        /// What the pager said.
        source: ProtectError,
    },
    /// The address space changed so that a range to arm was not there any more.
    #[error("cannot track {range}: not all of it is mapped any more")]
    Vanished {
        /// The range.
        range: HostRange,
    },
    /// A range could not be released. It is protected until it is unmapped, or the last descriptor
    /// of the userfaultfd closes.
    #[error("cannot stop tracking {range}: {source}")]
    Release {
        /// The range.
        range: HostRange,
        /// What the kernel said.
        source: UffdError,
    },
    /// The page map could not be opened or read.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The soft-dirty bits could not be cleared.
    #[error(transparent)]
    ClearRefs(#[from] ClearRefsError),
    /// A file of `/proc` could not be read, or says what it never should.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The process has ended, or has executed another program, which ends its memory.
    #[error("process {pid} is gone")]
    ProcessGone {
        /// Its id.
        pid: u32,
    },
    /// Soft-dirty bits are read and cleared in two steps, and a write between them would be lost:
    /// this thread could have made one.
    #[error(
        "soft-dirty bits of process {pid} can be harvested only while it is stopped, and thread \
         {thread} runs"
    )]
    Running {
        /// The process.
        pid: u32,
        /// The thread.
        thread: u32,
    },
    /// The process could not be stopped.
    #[error("cannot stop process {pid}: {source}")]
    Freeze {
        /// The process.
        pid: u32,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Clearing the soft-dirty bits clears them for everybody, and somebody else uses them.
    #[error("the soft-dirty bits of process {pid} are used by another tracker")]
    AlreadyTracked {
        /// The process.
        pid: u32,
    },
    /// The thread that answers write faults could not be started.
    #[error("cannot start the thread that answers write faults: {source}")]
    Reader {
        /// Why.
        source: io::Error,
    },
    /// A tracker of another crate failed.
    #[error("{method}: {source}")]
    Other {
        /// The method.
        method: Method,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
    },
}
