//! What can go wrong while another process is tracked.

use std::io;

use pageferry_process::{Pid, ProcessError};
use pageferry_uffd::PagemapError;

use crate::{DirtyError, Method, NoMethod};

/// Why tracking a process failed. After a harvest that failed nothing is lost: the next one reports
/// everything as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessTrackError {
    /// The process has ended.
    #[error("process {pid} has ended while it was tracked")]
    TargetExited {
        /// Its number.
        pid: Pid,
    },
    /// The process has started another program: the memory that was tracked is no more.
    #[error(
        "process {pid} has started another program (exec): the memory that was tracked is gone"
    )]
    TargetExecuted {
        /// Its number.
        pid: Pid,
    },
    /// The process could not be looked at, stopped, or made to open a userfaultfd.
    #[error(transparent)]
    Process(ProcessError),
    /// Nothing can track it.
    #[error(transparent)]
    NoMethod(#[from] NoMethod),
    /// A method was asked for that is not for processes.
    #[error("process {pid}: {method} does not track processes")]
    NotForProcesses {
        /// The process.
        pid: Pid,
        /// The method.
        method: Method,
    },
    /// The method was asked to harvest while the process runs, and cannot.
    #[error("process {pid}: {method} can be harvested only while the process is stopped")]
    NeedsStop {
        /// The process.
        pid: Pid,
        /// The method.
        method: Method,
    },
    /// The process that is stopped is another one.
    #[error("process {stopped} is stopped, and process {pid} is tracked")]
    OtherStopped {
        /// The process that is tracked.
        pid: Pid,
        /// The one that is stopped.
        stopped: Pid,
    },
    /// A range could not be registered or write-protected, or the method is not to be had.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The page map could not be opened or read.
    #[error("process {pid}: {source}")]
    Pagemap {
        /// The process.
        pid: Pid,
        /// The reason.
        source: PagemapError,
    },
    /// The soft-dirty bits could not be claimed or cleared.
    #[error("process {pid}: cannot {doing}: {source}")]
    SoftDirty {
        /// The process.
        pid: Pid,
        /// What was being done, to which file.
        doing: String,
        /// The reason.
        source: io::Error,
    },
}

impl ProcessTrackError {
    /// Whether the process is no more, or no more the program that it was.
    pub const fn is_gone(&self) -> bool {
        matches!(self, Self::TargetExited { .. } | Self::TargetExecuted { .. })
    }
}

impl From<ProcessError> for ProcessTrackError {
    fn from(error: ProcessError) -> Self {
        match error {
            ProcessError::None { pid } | ProcessError::Ended { pid, .. } => {
                Self::TargetExited { pid }
            }
            ProcessError::Replaced { pid } => Self::TargetExecuted { pid },
            error => Self::Process(error),
        }
    }
}
