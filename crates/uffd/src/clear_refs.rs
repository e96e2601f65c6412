//! Resetting what the kernel remembers of a process's pages: `/proc/PID/clear_refs`.
//!
//! Source: `Documentation/filesystems/proc.rst`, `Documentation/admin-guide/mm/soft-dirty.rst`.

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

/// What to reset.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum ClearRefs {
    /// The referenced bits of all pages.
    All,
    /// The referenced bits of anonymous pages.
    Anonymous,
    /// The referenced bits of pages of files.
    Mapped,
    /// The soft-dirty bits of all pages: from now on
    /// [`PagemapEntry::soft_dirty`](crate::PagemapEntry::soft_dirty) means written since. A kernel
    /// built without soft-dirty accepts this and does nothing.
    SoftDirty,
    /// The peak resident set size.
    PeakRss,
}

impl ClearRefs {
    const fn command(self) -> &'static [u8] {
        match self {
            Self::All => b"1",
            Self::Anonymous => b"2",
            Self::Mapped => b"3",
            Self::SoftDirty => b"4",
            Self::PeakRss => b"5",
        }
    }
}

/// `/proc/PID/clear_refs` could not be written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot reset {what:?} of process {pid} through /proc/{pid}/clear_refs: {errno}")]
pub struct ClearRefsError {
    /// What was to be reset.
    pub what: ClearRefs,
    /// The process.
    pub pid: u32,
    /// The kernel's reason.
    pub errno: Errno,
}

/// Resets something of the process with this id, which must be of the same user.
///
/// # Errors
///
/// [`ClearRefsError`].
pub fn clear_refs(pid: u32, what: ClearRefs) -> Result<(), ClearRefsError> {
    let fail = |errno| ClearRefsError { what, pid, errno };
    let path = format!("/proc/{pid}/clear_refs");
    let file =
        rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(fail)?;
    loop {
        match rustix::io::write(&file, what.command()) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(fail(errno)),
        }
    }
}
