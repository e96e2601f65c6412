//! Why an operation on a userfaultfd failed.

use std::fmt;

use rustix::io::Errno;

use crate::{HostAddress, HostRange};

/// Which operation was asked for.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Operation {
    /// `UFFDIO_REGISTER`.
    Register,
    /// `UFFDIO_UNREGISTER`.
    Unregister,
    /// `UFFDIO_WAKE`.
    Wake,
    /// `UFFDIO_COPY`.
    Copy,
    /// `UFFDIO_ZEROPAGE`.
    ZeroPage,
    /// `UFFDIO_CONTINUE`.
    Continue,
    /// `UFFDIO_POISON`.
    Poison,
    /// `UFFDIO_MOVE`.
    Move {
        /// Where the pages were to come from.
        from: HostAddress,
    },
    /// `UFFDIO_WRITEPROTECT`, setting the protection.
    WriteProtect,
    /// `UFFDIO_WRITEPROTECT`, lifting the protection.
    WriteUnprotect,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Register => "register",
            Self::Unregister => "unregister",
            Self::Wake => "wake the waiters of",
            Self::Copy => "copy into",
            Self::ZeroPage => "map zero pages into",
            Self::Continue => "map the page cache into",
            Self::Poison => "poison",
            Self::Move { from } => return write!(f, "move pages from {from} into"),
            Self::WriteProtect => "write-protect",
            Self::WriteUnprotect => "lift the write protection of",
        })
    }
}

/// A failure of an operation on a userfaultfd that is not one of the expected [`Outcome`]s.
///
/// [`Outcome`]: crate::Outcome
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// The kernel refused, and nothing of the range was changed by this call.
    #[error("userfaultfd: cannot {what} {range}: {errno}{}", hint(*what, *errno))]
    Ioctl {
        /// What was asked for.
        what: Operation,
        /// The range it was asked for; for copies and moves, the destination.
        range: HostRange,
        /// The kernel's reason.
        errno: Errno,
    },
    /// The range does not lie within the address space; the kernel was not asked.
    #[error("userfaultfd: cannot {what} {len} bytes at {start}: they wrap around the end")]
    Wraps {
        /// What was asked for.
        what: Operation,
        /// First address.
        start: HostAddress,
        /// Length in bytes.
        len: u64,
    },
    /// Reading events failed.
    #[error("userfaultfd: cannot read events: {errno}")]
    Read {
        /// The kernel's reason.
        errno: Errno,
    },
    /// A read ended within a message, which the kernel never does: the descriptor is something
    /// else.
    #[error("userfaultfd: a read returned {bytes} bytes, not a whole number of messages")]
    TornRead {
        /// How many bytes were read.
        bytes: usize,
    },
    /// There is no room for a single event: the buffer was not drained.
    #[error("userfaultfd: no room to read events: {pending} of {capacity} are not drained yet")]
    BufferFull {
        /// Events in the buffer.
        pending: usize,
        /// Events it can hold.
        capacity: usize,
    },
    /// A descriptor handed over as a userfaultfd is something else.
    #[error("file descriptor {fd} was handed over as a userfaultfd but is {found:?}")]
    NotUserfaultfd {
        /// Its number in this process.
        fd: i32,
        /// What `/proc/self/fd` says it is.
        found: String,
    },
    /// It could not be found out what a descriptor handed over as a userfaultfd is.
    #[error("cannot inspect file descriptor {fd} handed over as a userfaultfd: {errno}")]
    Inspect {
        /// Its number in this process.
        fd: i32,
        /// The kernel's reason.
        errno: Errno,
    },
}

impl UffdError {
    /// The kernel's reason, where it was the kernel that refused.
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Ioctl { errno, .. } | Self::Read { errno } | Self::Inspect { errno, .. } => {
                Some(*errno)
            }
            _ => None,
        }
    }

    /// Whether memory ran out (ENOMEM; ENOSPC, which hugetlb and a full tmpfs answer).
    ///
    /// ENOMEM also means that the process has too many mappings (`vm.max_map_count`). From REGISTER
    /// and UNREGISTER with a descriptor of another process it mostly means that this process is
    /// gone, which its pidfd tells: there it does not count as memory that ran out.
    pub fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Ioctl { what: Operation::Register | Operation::Unregister, .. } => {
                self.errno() == Some(Errno::NOSPC)
            }
            _ => matches!(self.errno(), Some(Errno::NOMEM | Errno::NOSPC)),
        }
    }
}

/// What the reason most likely means for this operation.
fn hint(what: Operation, errno: Errno) -> &'static str {
    match (what, errno) {
        (Operation::Register, Errno::BUSY) => {
            " (part of the range is registered with another userfaultfd)"
        }
        (Operation::Register, Errno::INVAL) => {
            " (not page-aligned, not wholly mapped, or mapped from something that does not support \
             this mode; hugetlb ranges must be aligned to their page size)"
        }
        (Operation::Register, Errno::PERM) => {
            " (a shared file mapping must be of a file opened for writing)"
        }
        (Operation::Register | Operation::Unregister, Errno::NOMEM) => {
            " (the process is gone, or no memory, or too many mappings: see vm.max_map_count)"
        }
        (Operation::Unregister | Operation::Wake, Errno::INVAL) => {
            " (not page-aligned, empty, or not mapped)"
        }
        (Operation::Move { .. }, Errno::BUSY) => {
            " (a source page is shared or pinned: move needs pages that only this process maps)"
        }
        (Operation::Move { .. }, Errno::INVAL) => {
            " (source and destination must be page-aligned private anonymous memory of the calling \
             process with the same protection)"
        }
        (_, Errno::NOMEM) => " (no memory, or the memory control group is at its limit)",
        (_, Errno::NOSPC) => " (no free huge page, or the tmpfs is full)",
        (Operation::Copy, Errno::FAULT) => " (the source is not readable)",
        (Operation::Continue, Errno::FAULT) => {
            " (no page in the page cache to map: write it through another mapping first)"
        }
        (_, Errno::INVAL) => {
            " (not page-aligned, empty, not registered for this, or this kernel lacks the operation)"
        }
        _ => "",
    }
}

/// Why memory could not be registered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The range is not part of the mapping that was to answer for it.
    #[error("cannot register {range}: it is not within the mapping {mapping}")]
    OutsideMapping {
        /// The range.
        range: HostRange,
        /// What is mapped.
        mapping: HostRange,
    },
    /// The descriptor serves another process, so a mapping of this one says nothing about it.
    #[error("cannot register {range}: the userfaultfd was received, and may serve another process")]
    Foreign {
        /// The range.
        range: HostRange,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] UffdError),
}
