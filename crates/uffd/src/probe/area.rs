//! Small mappings to try things on.

use std::{ffi::c_void, mem::MaybeUninit, os::fd::OwnedFd, ptr};

use rustix::{
    fs::MemfdFlags,
    io::Errno,
    mm::{Advice, MapFlags, MremapFlags, ProtFlags},
};

use super::Shortfall;
use crate::{
    HostAddress, HostRange, Ioctls, Mapped, MoveMode, Outcome, RegisterMode, UffdError, Userfaultfd,
};

/// What a mapping is of.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Backing {
    Anonymous,
    Memfd,
    Hugetlb2M,
}

/// A mapping of a few pages that nobody else knows of.
#[derive(Debug)]
pub(super) struct Area {
    range: HostRange,
    page: u64,
    file: Option<OwnedFd>,
}

// SAFETY: the mapping is made by `map` and ends with the value; the methods that end it early
// consume the value. No reference to its bytes is ever made that outlives a call of a method.
unsafe impl Mapped for Area {
    fn range(&self) -> HostRange {
        self.range
    }
}

impl Area {
    /// Maps `pages` pages of the backing's size.
    pub(super) fn new(backing: Backing, pages: u64) -> Result<Self, Shortfall> {
        let base = rustix::param::page_size() as u64;
        match backing {
            Backing::Anonymous => Ok(Self::map(None, base, pages * base)?),
            Backing::Memfd => {
                let file = rustix::fs::memfd_create("pageferry-probe", MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&file, pages * base)?;
                Ok(Self::map(Some(file), base, pages * base)?)
            }
            Backing::Hugetlb2M => {
                let page = 2 << 20;
                let untested = |errno: Errno| {
                    Shortfall::Untested(format!("no free 2 MiB huge pages are reserved ({errno})"))
                };
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
                let file = rustix::fs::memfd_create("pageferry-probe", flags).map_err(untested)?;
                rustix::fs::ftruncate(&file, pages * page).map_err(untested)?;
                Self::map(Some(file), page, pages * page).map_err(untested)
            }
        }
    }

    /// Another mapping of the same file.
    pub(super) fn alias(&self) -> Result<Self, Shortfall> {
        let Some(file) = &self.file else {
            return super::missing("anonymous memory has no second mapping");
        };
        let file = file.try_clone()?;
        Ok(Self::map(Some(file), self.page, self.range.len())?)
    }

    fn map(file: Option<OwnedFd>, page: u64, len: u64) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel finds room disturbs nobody.
        let start = unsafe {
            match &file {
                None => rustix::mm::mmap_anonymous(
                    ptr::null_mut(),
                    len as usize,
                    protection,
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                ),
                Some(file) => rustix::mm::mmap(
                    ptr::null_mut(),
                    len as usize,
                    protection,
                    MapFlags::SHARED,
                    file,
                    0,
                ),
            }
        }?;
        let range = HostRange::new(HostAddress::from_ptr(start), len);
        let area = Self { range, page, file };
        // A collapse into a huge page would make pages present that a check needs absent.
        match area.advise(Advice::LinuxNoHugepage) {
            // Kernels without transparent huge pages, and hugetlb, do not know the advice.
            Ok(()) | Err(Errno::INVAL) => Ok(area),
            Err(errno) => Err(errno),
        }
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        let start = self.range.start().as_ptr().cast();
        // SAFETY: advice given here changes at most the contents, of which nobody is relying.
        unsafe { rustix::mm::madvise(start, self.range.len() as usize, advice) }
    }

    /// Bytes of one page.
    pub(super) fn page_size(&self) -> u64 {
        self.page
    }

    /// The page of this number.
    pub(super) fn page(&self, index: u64) -> HostRange {
        let page = self.range.skip(index * self.page).take(self.page);
        assert!(!page.is_empty(), "page {index} is outside {}", self.range);
        page
    }

    fn pointer(&self, offset: u64) -> *mut u8 {
        assert!(offset < self.range.len(), "offset {offset} is outside {}", self.range);
        self.range.skip(offset).start().as_ptr()
    }

    /// Reads a byte, as a user-mode access. Not for pages that may be poisoned.
    pub(super) fn read(&self, offset: u64) -> u8 {
        // SAFETY: within the mapping, which lives as long as `self`.
        unsafe { self.pointer(offset).read_volatile() }
    }

    /// Writes a byte, as a user-mode access. Not for pages that may be poisoned.
    pub(super) fn write(&self, offset: u64, value: u8) {
        // SAFETY: within the mapping, which lives as long as `self`; there are no references.
        unsafe { self.pointer(offset).write_volatile(value) }
    }

    /// Has the kernel write the byte 0xee, which makes the access one of kernel mode: what would be
    /// a signal in user mode is an error here.
    pub(super) fn write_by_kernel(&self, offset: u64) -> Result<(), Errno> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        rustix::io::write(&writer, &[0xee])?;
        // SAFETY: within the mapping, which lives as long as `self`, and the only reference; any
        // byte is a valid `MaybeUninit`.
        let target = unsafe {
            std::slice::from_raw_parts_mut(self.pointer(offset).cast::<MaybeUninit<u8>>(), 1)
        };
        rustix::io::read(&reader, target).map(drop)
    }

    /// Discards the contents (`MADV_DONTNEED`).
    pub(super) fn discard(&self) -> Result<(), Errno> {
        self.advise(Advice::LinuxDontNeed)
    }

    /// Moves the mapping to where `target` is, which it replaces.
    pub(super) fn move_onto(self, target: Self) -> Result<Self, Errno> {
        let len = self.range.len().min(target.range.len()) as usize;
        let from: *mut c_void = self.range.start().as_ptr().cast();
        let to: *mut c_void = target.range.start().as_ptr().cast();
        // SAFETY: both mappings are owned here and consumed; what was at `from` is gone, what is
        // at `to` belongs to the value returned.
        unsafe { rustix::mm::mremap_fixed(from, len, len, MremapFlags::MAYMOVE, to) }?;
        std::mem::forget(self);
        Ok(target)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let start = self.range.start().as_ptr().cast();
        // SAFETY: the mapping is owned, and nobody can have a reference into it.
        let result = unsafe { rustix::mm::munmap(start, self.range.len() as usize) };
        debug_assert_eq!(result, Ok(()), "unmapping {}", self.range);
    }
}

/// Registers the whole of an area.
pub(super) fn register(
    uffd: &Userfaultfd,
    area: &Area,
    mode: RegisterMode,
) -> Result<Ioctls, UffdError> {
    // SAFETY: the area is mapped in this process; its contents are nobody's values.
    unsafe { uffd.register_raw(area.range, mode) }
}

/// Moves the pages of `source`, which are given up, to `target`.
pub(super) fn move_pages(
    uffd: &Userfaultfd,
    target: HostRange,
    source: &Area,
) -> Result<Outcome, UffdError> {
    // SAFETY: the area is mapped in this process; its contents are nobody's values.
    unsafe { uffd.move_pages(target.start(), source.range.take(target.len()), MoveMode::default()) }
}
