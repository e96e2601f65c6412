//! One mapping of memory: its addresses, its lifetime, and copies in and out of it.

use std::any::Any;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::{fmt, io, ptr};

use linux_raw_sys::general as sys;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::{HostAddress, HostRange, HugePagePool, Mapped, PageSize, racy};

/// Mappings of at least this size begin at an address congruent to their file offset modulo this:
/// otherwise the kernel could neither use nor collapse to huge pages of 2 MiB there, nor move page
/// tables as a whole.
const HUGE_ALIGNMENT: u64 = PageSize::SIZE_2M.bytes();

/// One contiguous mapping of memory, readable and writable, in this process.
///
/// It is unmapped when dropped, unless it belongs to an embedder (see [`from_raw`](Self::from_raw)).
/// Its memory is changed by others at any time, so nobody ever gets a Rust reference to it: bytes
/// are copied in and out.
pub struct Mapping {
    range: HostRange,
    owner: Owner,
}

enum Owner {
    /// Mapped here, so unmapped here.
    Ours,
    /// Mapped by somebody else, for as long as this lives.
    Embedder { _keepalive: Arc<dyn Any + Send + Sync> },
}

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// The length or file offset is no multiple of the page size, or the length is zero.
    #[error(
        "mapping {len:#x} bytes at file offset {offset:#x}: both must be multiples of {page_size}, and the length positive"
    )]
    Unaligned {
        /// The file offset asked for (0 for anonymous memory), in bytes.
        offset: u64,
        /// The length asked for, in bytes.
        len: u64,
        /// The size of the pages.
        page_size: PageSize,
    },
    /// There are not enough huge pages.
    #[error(
        "mapping {len:#x} bytes: {needed} huge pages of {} are needed, {} of {} are available; \
         to reserve more, as root: echo {} > {}",
        .pool.size, .pool.available(), .pool.total,
        .pool.total + .needed.saturating_sub(.pool.available()),
        HugePagePool::control_file(.pool.size)
    )]
    NotEnoughHugePages {
        /// The length asked for, in bytes.
        len: u64,
        /// How many pages that is.
        needed: u64,
        /// The pool the pages are taken from, as it was just after the failure.
        pool: HugePagePool,
    },
    /// The kernel refused.
    #[error("mapping {len:#x} bytes of {what}: {source}")]
    Map {
        /// What was to be mapped.
        what: &'static str,
        /// The length asked for, in bytes.
        len: u64,
        /// What `mmap(2)` answered.
        source: io::Error,
    },
}

/// An access outside of a [`Mapping`].
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[error("{len} bytes at offset {offset:#x} are not all inside the mapping {mapping}")]
pub struct OutOfRange {
    /// Where the access began, in bytes from the beginning of the mapping.
    pub offset: u64,
    /// How many bytes were to be copied.
    pub len: u64,
    /// The addresses the mapping has.
    pub mapping: HostRange,
}

/// What the kernel is told about a range of memory. Source: `madvise(2)`.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
#[non_exhaustive]
pub enum Advice {
    /// Drop the pages from this mapping. Anonymous memory reads as zero afterwards; shared memory
    /// keeps its contents.
    DontNeed,
    /// Free the pages and their backing: shared memory reads as zero afterwards, in every mapping.
    Remove,
    /// Use transparent huge pages.
    HugePage,
    /// Do not use transparent huge pages.
    NoHugePage,
    /// Fault every page in as if by writing, and report what fails.
    PopulateWrite,
    /// Fault every page in as if by reading, and report what fails.
    PopulateRead,
    /// Children made by `fork(2)` do not have the range.
    DontFork,
    /// Core dumps do not contain the range.
    DontDump,
    /// Collapse the pages into transparent huge pages now.
    Collapse,
}

impl Advice {
    fn code(self) -> u32 {
        match self {
            Self::DontNeed => sys::MADV_DONTNEED,
            Self::Remove => sys::MADV_REMOVE,
            Self::HugePage => sys::MADV_HUGEPAGE,
            Self::NoHugePage => sys::MADV_NOHUGEPAGE,
            Self::PopulateWrite => sys::MADV_POPULATE_WRITE,
            Self::PopulateRead => sys::MADV_POPULATE_READ,
            Self::DontFork => sys::MADV_DONTFORK,
            Self::DontDump => sys::MADV_DONTDUMP,
            Self::Collapse => sys::MADV_COLLAPSE,
        }
    }
}

impl Mapping {
    /// Maps `len` bytes of private anonymous memory, a multiple of the base page size.
    ///
    /// No memory is set aside for it (`MAP_NORESERVE`): it arrives page by page, and under the
    /// kernel's default policy a guest larger than what is free at this moment may be mapped.
    ///
    /// # Errors
    ///
    /// See [`MappingError`].
    pub fn anonymous(len: u64) -> Result<Self, MappingError> {
        check_alignment(0, len, PageSize::base())?;
        map_aligned(len, None).map_err(|errno| MappingError::Map {
            what: "anonymous memory",
            len,
            source: errno.into(),
        })
    }

    /// Maps `len` bytes of a file, from `offset` on, shared with its other mappings. The kernel
    /// must know the file as one of huge pages of the size `hugetlb`, if that is given.
    ///
    /// Huge pages are set aside now, once for all mappings of the same part of the file, so that a
    /// shortage is an error here and not a SIGBUS later.
    ///
    /// # Errors
    ///
    /// See [`MappingError`].
    pub fn shared(
        file: impl AsFd,
        offset: u64,
        len: u64,
        hugetlb: Option<PageSize>,
    ) -> Result<Self, MappingError> {
        check_alignment(offset, len, hugetlb.unwrap_or_else(PageSize::base))?;
        let fd = file.as_fd();
        let Some(page_size) = hugetlb else {
            return map_aligned(len, Some((fd, offset))).map_err(|errno| MappingError::Map {
                what: "a memory file",
                len,
                source: errno.into(),
            });
        };
        map_hugetlb(len, fd, offset).map_err(|errno| match HugePagePool::read(page_size) {
            Ok(pool) if errno == Errno::NOMEM => {
                MappingError::NotEnoughHugePages { len, needed: len / page_size.bytes(), pool }
            }
            _ => {
                MappingError::Map { what: "a memory file of huge pages", len, source: errno.into() }
            }
        })
    }

    /// Takes a mapping that belongs to an embedder. It is not unmapped on drop; `keepalive` is
    /// dropped instead.
    ///
    /// # Safety
    ///
    /// As long as `keepalive` lives, `range` stays mapped readable and writable, by the same
    /// mapping, and no Rust reference to any byte of it is used while this value lives: its pages
    /// are written, discarded and installed at any time.
    pub unsafe fn from_raw(range: HostRange, keepalive: Arc<dyn Any + Send + Sync>) -> Self {
        Self { range, owner: Owner::Embedder { _keepalive: keepalive } }
    }

    /// The addresses it covers.
    #[inline]
    pub fn range(&self) -> HostRange {
        self.range
    }

    /// Its first byte. Valid for reads and writes of the whole range while `self` lives; whoever
    /// uses it must expect others to change the memory at the same time.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.range.start().as_ptr()
    }

    /// Copies bytes out of the mapping, from `offset` (in bytes) on.
    ///
    /// This touches the pages: where the memory is paged on demand it faults, and waits as long as
    /// the fault takes. Bytes changed meanwhile may be seen old or new.
    ///
    /// # Errors
    ///
    /// [`OutOfRange`] when not all bytes lie inside; nothing is copied then.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), OutOfRange> {
        let source = self.pointer_to(offset, bytes.len())?;
        // SAFETY: the bytes lie inside the range, which is mapped readable while `self` lives and
        // of which no reference exists, as `Mapping` gives out none and `from_raw` demands it.
        unsafe { racy::copy_from(source, bytes) };
        Ok(())
    }

    /// Copies bytes into the mapping, from `offset` (in bytes) on.
    ///
    /// This touches the pages: see [`read_at`](Self::read_at).
    ///
    /// # Errors
    ///
    /// [`OutOfRange`] when not all bytes lie inside; nothing is copied then.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        let destination = self.pointer_to(offset, bytes.len())?;
        // SAFETY: as in `read_at`; the range is mapped writable, too.
        unsafe { racy::copy_to(destination, bytes) };
        Ok(())
    }

    /// Tells the kernel something about a part of the mapping.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when `range` is not all inside the mapping; otherwise what `madvise(2)`
    /// answers.
    pub fn advise(&self, range: HostRange, advice: Advice) -> io::Result<()> {
        self.check_inside(range, advice)?;
        // SAFETY: the range belongs to this mapping. None of the advices unmaps or replaces it;
        // those that change contents are no concern of the compiler's, as no reference to the
        // memory exists.
        let answer = unsafe {
            libc::madvise(range.start().as_ptr().cast(), range.len() as usize, advice.code() as i32)
        };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The same of many parts, in as few system calls as the kernel allows: `process_madvise(2)` of
    /// one's own memory takes any advice since Linux 6.13, and flushes the TLB once for all parts
    /// since 6.16. Older kernels are told one by one.
    ///
    /// # Errors
    ///
    /// As [`advise`](Self::advise). Parts before the one that fails have been advised.
    pub fn advise_all(&self, ranges: &[HostRange], advice: Advice) -> io::Result<()> {
        ranges.iter().try_for_each(|range| self.check_inside(*range, advice))?;
        let told = self.advise_together(ranges, advice);
        ranges[told..].iter().try_for_each(|range| self.advise(*range, advice))
    }

    fn check_inside(&self, range: HostRange, advice: Advice) -> io::Result<()> {
        if self.range.contains_range(range) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("advising {advice:?} for {range}, which is not all inside {}", self.range),
        ))
    }

    /// Tells the kernel of as many of the first ranges, which are inside the mapping, as it takes
    /// many at once; returns how many.
    fn advise_together(&self, ranges: &[HostRange], advice: Advice) -> usize {
        // UIO_MAXIOV.
        const MOST: usize = 1024;
        if ranges.len() < 2 {
            return 0;
        }
        let me = rustix::process::getpid();
        let Ok(me) = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()) else {
            return 0;
        };
        let mut told = 0;
        for some in ranges.chunks(MOST) {
            let parts: Vec<libc::iovec> = some
                .iter()
                .map(|range| libc::iovec {
                    iov_base: range.start().as_ptr().cast(),
                    iov_len: range.len() as usize,
                })
                .collect();
            // SAFETY: as for `advise`, of each range; the kernel reads `parts`, as many as it says.
            let advised = unsafe {
                libc::syscall(
                    libc::SYS_process_madvise,
                    me.as_raw_fd(),
                    parts.as_ptr(),
                    parts.len(),
                    advice.code() as libc::c_long,
                    0,
                )
            };
            let mut left = u64::try_from(advised).unwrap_or(0);
            for range in some {
                match left.checked_sub(range.len()) {
                    Some(rest) => left = rest,
                    // Not all of this one: it is told again.
                    None => return told,
                }
                told += 1;
            }
        }
        told
    }

    fn pointer_to(&self, offset: u64, len: usize) -> Result<*mut u8, OutOfRange> {
        let outside = OutOfRange { offset, len: len as u64, mapping: self.range };
        let end = offset.checked_add(len as u64).ok_or(outside)?;
        if end > self.range.len() {
            return Err(outside);
        }
        // Not beyond the end, so it cannot overflow.
        Ok(self.as_ptr().wrapping_add(offset as usize))
    }
}

// SAFETY: the range is unmapped only when the value is dropped, or by the embedder after the
// keepalive is; no method moves or replaces the mapping, and `range` never changes.
unsafe impl Mapped for Mapping {
    fn range(&self) -> HostRange {
        self.range
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Owner::Ours = self.owner {
            // SAFETY: made by this module's mmap, with exactly this range, and owned by this
            // value: nobody may use it afterwards.
            unsafe { unmap(self.range) };
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owned = matches!(self.owner, Owner::Ours);
        f.debug_struct("Mapping").field("range", &self.range).field("owned", &owned).finish()
    }
}

fn check_alignment(offset: u64, len: u64, page_size: PageSize) -> Result<(), MappingError> {
    if len == 0 || !page_size.is_multiple(len) || !page_size.is_multiple(offset) {
        return Err(MappingError::Unaligned { offset, len, page_size });
    }
    Ok(())
}

/// Maps at an address congruent to the file offset modulo [`HUGE_ALIGNMENT`] (of anonymous memory:
/// to 0), unless the mapping is smaller.
fn map_aligned(len: u64, file: Option<(BorrowedFd<'_>, u64)>) -> Result<Mapping, Errno> {
    let (alignment, shift) = if len >= HUGE_ALIGNMENT {
        (HUGE_ALIGNMENT, file.map_or(0, |(_, offset)| offset % HUGE_ALIGNMENT))
    } else {
        (PageSize::base().bytes(), 0)
    };
    // Room to move the beginning up to the alignment, and then by the shift.
    let reserved_len = len.checked_add(2 * alignment).ok_or(Errno::NOMEM)?;
    let no_access = ProtFlags::empty();
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: the kernel chooses an unused range.
    let start = unsafe {
        rustix::mm::mmap_anonymous(ptr::null_mut(), to_usize(reserved_len)?, no_access, flags)
    }?;
    let reserved = HostRange::new(HostAddress::from_ptr(start), reserved_len);
    let aligned = reserved.start().get().next_multiple_of(alignment) + shift;
    let (before, rest) = reserved.split_at(aligned - reserved.start().get());
    let (range, after) = rest.split_at(len);

    // SAFETY: `range` is part of what was reserved just above, which nobody else knows of.
    let mapped = unsafe {
        let place = range.start().as_ptr().cast();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        match file {
            None => rustix::mm::mmap_anonymous(
                place,
                to_usize(len)?,
                access,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            ),
            Some((fd, offset)) => rustix::mm::mmap(
                place,
                to_usize(len)?,
                access,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                offset,
            ),
        }
    };
    for unused in [before, after] {
        if !unused.is_empty() {
            // SAFETY: reserved above, outside of `range`, and used by nobody.
            unsafe { unmap(unused) };
        }
    }
    // On failure `range` is left as it is: the kernel may have removed the reservation before it
    // failed, and another thread may already have a mapping of its own there.
    mapped?;
    Ok(Mapping { range, owner: Owner::Ours })
}

/// The kernel itself aligns a mapping of huge pages to their size.
fn map_hugetlb(len: u64, fd: BorrowedFd<'_>, offset: u64) -> Result<Mapping, Errno> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses an unused range.
    let start = unsafe {
        rustix::mm::mmap(ptr::null_mut(), to_usize(len)?, access, MapFlags::SHARED, fd, offset)
    }?;
    Ok(Mapping { range: HostRange::new(HostAddress::from_ptr(start), len), owner: Owner::Ours })
}

fn to_usize(len: u64) -> Result<usize, Errno> {
    usize::try_from(len).map_err(|_| Errno::NOMEM)
}

/// # Safety
///
/// Everything mapped in `range` belongs to the caller, and nobody uses it any more.
unsafe fn unmap(range: HostRange) {
    // SAFETY: the caller's promise.
    let answer = unsafe { rustix::mm::munmap(range.start().as_ptr().cast(), range.len() as usize) };
    // Fails only for ranges that were never mapped, or when splitting a mapping would exceed
    // vm.max_map_count: then the range stays reserved, which harms nobody.
    debug_assert!(matches!(answer, Ok(()) | Err(Errno::NOMEM)), "munmap of {range}: {answer:?}");
}

#[cfg(test)]
mod tests;
