//! Memory as a file without a name, so that it can be mapped more than once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{fmt, io};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::{HugePagePool, PageSize};

/// `MFD_HUGE_*` encodes the binary logarithm of the page size in the bits from here on.
const MFD_HUGE_SHIFT: u32 = linux_raw_sys::general::MFD_HUGE_SHIFT;

/// What pages a [`MemoryFile`] is made of.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum MemoryFileKind {
    /// Base pages (or transparent huge pages, where the kernel is told to use them).
    Normal,
    /// Reserved huge pages of this size.
    Hugetlb(PageSize),
}

impl MemoryFileKind {
    /// The size of its pages.
    pub fn page_size(self) -> PageSize {
        match self {
            Self::Normal => PageSize::base(),
            Self::Hugetlb(size) => size,
        }
    }
}

/// A memfd of fixed length: it can neither shrink nor grow, so that no mapping of it ever loses
/// its pages and raises SIGBUS.
///
/// Source: `memfd_create(2)`, `fcntl(2)` on file seals.
#[derive(Debug)]
pub struct MemoryFile {
    fd: OwnedFd,
    len: u64,
    kind: MemoryFileKind,
}

/// Why a [`MemoryFile`] could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryFileError {
    /// The length is zero, or no multiple of the page size.
    #[error(
        "creating memory file {name:?}: its length {len:#x} is no positive multiple of {page_size}"
    )]
    Length {
        /// The name asked for.
        name: String,
        /// The length asked for, in bytes.
        len: u64,
        /// The size of its pages.
        page_size: PageSize,
    },
    /// The kernel has no huge pages of this size.
    #[error(
        "creating memory file {name:?}: this kernel has no huge pages of {page_size} (it has: {})",
        List(.available)
    )]
    NoSuchHugePages {
        /// The name asked for.
        name: String,
        /// The size of huge page asked for.
        page_size: PageSize,
        /// The sizes the kernel has.
        available: Vec<PageSize>,
    },
    /// A system call failed while the file was made.
    #[error("creating memory file {name:?} of {len:#x} bytes: {call}: {source}")]
    Create {
        /// The name asked for.
        name: String,
        /// The length asked for, in bytes.
        len: u64,
        /// The system call that failed.
        call: &'static str,
        /// What it answered.
        source: io::Error,
    },
}

struct List<'a>(&'a [PageSize]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (i, size) in self.0.iter().enumerate() {
            write!(f, "{}{size}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl MemoryFile {
    /// Makes a file of `len` bytes that read as zero. `name` shows up in `/proc/PID/maps` and
    /// serves no other purpose; at most 249 bytes.
    ///
    /// No memory is allocated: that happens page by page, or by [`allocate`](Self::allocate).
    /// Huge pages are set aside when the file is mapped.
    ///
    /// # Errors
    ///
    /// See [`MemoryFileError`].
    pub fn create(name: &str, len: u64, kind: MemoryFileKind) -> Result<Self, MemoryFileError> {
        let page_size = kind.page_size();
        if len == 0 || !page_size.is_multiple(len) {
            return Err(MemoryFileError::Length { name: name.to_owned(), len, page_size });
        }
        let failed = |call, errno: Errno| MemoryFileError::Create {
            name: name.to_owned(),
            len,
            call,
            source: errno.into(),
        };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if let MemoryFileKind::Hugetlb(size) = kind {
            flags |=
                MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(size.shift() << MFD_HUGE_SHIFT);
        }
        let fd = create_fd(name, flags).map_err(|errno| match kind {
            MemoryFileKind::Hugetlb(size) if HugePagePool::read(size).is_err() => {
                MemoryFileError::NoSuchHugePages {
                    name: name.to_owned(),
                    page_size: size,
                    available: HugePagePool::sizes().unwrap_or_default(),
                }
            }
            _ => failed("memfd_create", errno),
        })?;
        rustix::fs::ftruncate(&fd, len).map_err(|errno| failed("ftruncate", errno))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(|errno| failed("fcntl(F_ADD_SEALS)", errno))?;
        Ok(Self { fd, len, kind })
    }

    /// The descriptor, for mapping the file, or for passing it on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a memory file is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What pages it is made of.
    pub fn kind(&self) -> MemoryFileKind {
        self.kind
    }

    /// Frees the pages of a part of the file, in every mapping of it: it reads as zero afterwards
    /// (or is missing, for a userfaultfd). Offset and length are in bytes; pages only partly
    /// inside are zeroed, not freed.
    ///
    /// # Errors
    ///
    /// What `fallocate(2)` answers for `FALLOC_FL_PUNCH_HOLE`.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.fd, flags, offset, len)?)
    }

    /// Allocates the pages of a part of the file, as zeros where there were none. Offset and
    /// length are in bytes.
    ///
    /// # Errors
    ///
    /// What `fallocate(2)` answers: ENOSPC when there is no memory, EPERM beyond the end.
    pub fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, len)?)
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

/// Asks for a file that can never be executed, which some hosts insist on
/// (`vm.memfd_noexec = 2`), unless the kernel is older than that flag (6.3).
fn create_fd(name: &str, flags: MemfdFlags) -> rustix::io::Result<OwnedFd> {
    match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_sealed() {
        let file = MemoryFile::create("sealed", 8192, MemoryFileKind::Normal).unwrap();
        assert_eq!(rustix::fs::ftruncate(file.fd(), 4096), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(file.fd(), 16384), Err(Errno::PERM));
        assert_eq!(rustix::fs::fstat(file.fd()).unwrap().st_size, 8192);
    }

    #[test]
    fn odd_lengths_are_refused() {
        for (len, kind) in [
            (0, MemoryFileKind::Normal),
            (4095, MemoryFileKind::Normal),
            (4096, MemoryFileKind::Hugetlb(PageSize::SIZE_2M)),
        ] {
            let error = MemoryFile::create("odd", len, kind).unwrap_err();
            assert!(matches!(error, MemoryFileError::Length { .. }), "{error}");
        }
    }

    #[test]
    fn a_huge_page_size_that_no_kernel_has_is_named() {
        let size = PageSize::try_new(1 << 50).unwrap();
        let error = MemoryFile::create("odd", 1 << 50, MemoryFileKind::Hugetlb(size)).unwrap_err();
        assert!(matches!(error, MemoryFileError::NoSuchHugePages { .. }), "{error}");
        assert!(error.to_string().contains("1 PiB"), "{error}");
    }

    #[test]
    fn allocated_pages_go_by_punching_holes() {
        let file = MemoryFile::create("holes", 1 << 20, MemoryFileKind::Normal).unwrap();
        let blocks = || rustix::fs::fstat(file.fd()).unwrap().st_blocks as u64 * 512;
        assert_eq!(blocks(), 0);
        file.allocate(0, 64 << 10).unwrap();
        assert_eq!(blocks(), 64 << 10);
        file.punch_hole(16 << 10, 16 << 10).unwrap();
        assert_eq!(blocks(), 48 << 10);
        assert!(file.allocate(1 << 20, 4096).is_err());
    }
}
