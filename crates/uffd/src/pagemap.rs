//! What the kernel knows of every page of a process: `/proc/PID/pagemap`, entry by entry or by
//! `PAGEMAP_SCAN`.
//!
//! Source: `Documentation/admin-guide/mm/pagemap.rst`.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bitflags::bitflags;
use linux_raw_sys::general as raw;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::{HostAddress, HostRange, abi};

/// What `/proc/PID/pagemap` says of one page.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct PagemapEntry(u64);

impl PagemapEntry {
    /// The entry with these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// All bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    const fn bit(self, bit: u32) -> bool {
        self.0 >> bit & 1 == 1
    }

    /// The page is in memory.
    pub const fn present(self) -> bool {
        self.bit(63)
    }

    /// The page is swapped out, or another such entry (a userfaultfd's poison mark is one).
    pub const fn swapped(self) -> bool {
        self.bit(62)
    }

    /// The page belongs to a file or to shared memory.
    pub const fn file(self) -> bool {
        self.bit(61)
    }

    /// The page is in a guard region (`MADV_GUARD_INSTALL`).
    pub const fn guard(self) -> bool {
        self.bit(58)
    }

    /// The page is write-protected by a userfaultfd.
    pub const fn uffd_wp(self) -> bool {
        self.bit(57)
    }

    /// The page is mapped only here.
    pub const fn exclusive(self) -> bool {
        self.bit(56)
    }

    /// The page was written since [`ClearRefs::SoftDirty`].
    ///
    /// [`ClearRefs::SoftDirty`]: crate::ClearRefs::SoftDirty
    pub const fn soft_dirty(self) -> bool {
        self.bit(55)
    }

    /// The number of the page frame of a page that is in memory. Readers without `CAP_SYS_ADMIN`
    /// get 0.
    pub const fn frame(self) -> Option<u64> {
        if self.present() { Some(self.0 & ((1 << 55) - 1)) } else { None }
    }
}

bitflags! {
    /// What a page can be, for [`Pagemap::scan`] (`PAGE_IS_*`).
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct PageCategories: u64 {
        /// Registered for asynchronous write protection.
        const WPALLOWED = raw::PAGE_IS_WPALLOWED as u64;
        /// Written since it was last write-protected.
        const WRITTEN = raw::PAGE_IS_WRITTEN as u64;
        /// Of a file or shared memory.
        const FILE = raw::PAGE_IS_FILE as u64;
        /// In memory.
        const PRESENT = raw::PAGE_IS_PRESENT as u64;
        /// Swapped out.
        const SWAPPED = raw::PAGE_IS_SWAPPED as u64;
        /// The shared page of zeros.
        const PFNZERO = raw::PAGE_IS_PFNZERO as u64;
        /// Part of a huge page mapped as one.
        const HUGE = raw::PAGE_IS_HUGE as u64;
        /// Written since soft-dirty was cleared.
        const SOFT_DIRTY = raw::PAGE_IS_SOFT_DIRTY as u64;
        /// In a guard region.
        const GUARD = raw::PAGE_IS_GUARD as u64;
    }

    /// What [`Pagemap::scan`] does besides looking (`PM_SCAN_*`).
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct ScanFlags: u64 {
        /// Write-protect every page reported, in the same step.
        const WP_MATCHING = raw::PM_SCAN_WP_MATCHING as u64;
        /// Fail where the range is not registered for asynchronous write protection, instead of
        /// skipping that.
        const CHECK_WPASYNC = raw::PM_SCAN_CHECK_WPASYNC as u64;
    }
}

/// What to look for. A page is reported when, after flipping the bits of `category_inverted`, it
/// has all of `category_mask` and, unless that is empty, one of `category_anyof_mask`.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ScanRequest {
    /// Where; page-aligned.
    pub range: HostRange,
    /// What to do besides looking.
    pub flags: ScanFlags,
    /// Stop after this many pages; 0 for no limit.
    pub max_pages: u64,
    /// Categories to look at inverted.
    pub category_inverted: PageCategories,
    /// Categories a page must have.
    pub category_mask: PageCategories,
    /// Categories of which it must have one.
    pub category_anyof_mask: PageCategories,
    /// Categories to report. Neighbours that differ only in others become one region.
    pub return_mask: PageCategories,
}

impl ScanRequest {
    /// Every page of `range` that has all of `categories`, reported with just these.
    pub const fn having(range: HostRange, categories: PageCategories) -> Self {
        Self {
            range,
            flags: ScanFlags::empty(),
            max_pages: 0,
            category_inverted: PageCategories::empty(),
            category_mask: categories,
            category_anyof_mask: PageCategories::empty(),
            return_mask: categories,
        }
    }

    /// Every page of `range` written since it was last write-protected; with `rearm`, each is
    /// write-protected again in the same step, so that no write falls between.
    ///
    /// The masks are exactly [`PageCategories::WRITTEN`]: with others, older kernels report
    /// unpopulated pages wrongly.
    pub const fn written(range: HostRange, rearm: bool) -> Self {
        let flags = if rearm {
            ScanFlags::WP_MATCHING.union(ScanFlags::CHECK_WPASYNC)
        } else {
            ScanFlags::empty()
        };
        Self { flags, ..Self::having(range, PageCategories::WRITTEN) }
    }
}

/// A run of pages of the same categories, found by [`Pagemap::scan`].
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
#[repr(C)]
pub struct PageRegion {
    start: HostAddress,
    end: HostAddress,
    categories: u64,
}

const _: () = {
    assert!(size_of::<PageRegion>() == size_of::<raw::page_region>());
    assert!(align_of::<PageRegion>() == align_of::<raw::page_region>());
    assert!(std::mem::offset_of!(PageRegion, start) == 0);
    assert!(std::mem::offset_of!(PageRegion, end) == 8);
    assert!(std::mem::offset_of!(PageRegion, categories) == 16);
    assert!(size_of::<PagemapEntry>() == 8);
};

impl PageRegion {
    /// The addresses.
    pub const fn range(&self) -> HostRange {
        match HostRange::from_bounds(self.start, self.end) {
            Some(range) => range,
            None => HostRange::new(self.start, 0),
        }
    }

    /// The categories, of those asked to be returned.
    pub const fn categories(&self) -> PageCategories {
        PageCategories::from_bits_retain(self.categories)
    }
}

/// What a scan came to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ScanResult {
    /// How many regions were written.
    pub regions: usize,
    /// Where the next scan has to start; the end of the range when all of it was looked at.
    pub walk_end: HostAddress,
}

/// What went wrong with a page map.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagemapError {
    /// The file could not be opened. For another process that takes the right to trace it.
    #[error("cannot open {path}: {errno}")]
    Open {
        /// Its path.
        path: String,
        /// The kernel's reason.
        errno: Errno,
    },
    /// Entries could not be read.
    #[error("cannot read the page map of {range}: {errno}")]
    Read {
        /// The pages asked about.
        range: HostRange,
        /// The kernel's reason.
        errno: Errno,
    },
    /// The range is not a whole number of pages.
    #[error("{range} is not a whole number of pages of {page_size} bytes")]
    Unaligned {
        /// The range.
        range: HostRange,
        /// The page size.
        page_size: u64,
    },
    /// The scan failed.
    ///
    /// The `regions` at the front of the buffer were filled all the same, and if the request said
    /// [`ScanFlags::WP_MATCHING`] their pages are write-protected again: they must be taken as
    /// written, or those writes are lost.
    #[error(
        "cannot scan the page map of {range}: {errno}{} ({regions} regions filled, stopped at \
         {walk_end})", scan_hint(*errno)
    )]
    Scan {
        /// The pages asked about.
        range: HostRange,
        /// The kernel's reason.
        errno: Errno,
        /// How many regions were written all the same.
        regions: usize,
        /// What the kernel says of how far it came. Not a place to resume: Linux 6.18 names the end
        /// of the range whatever it skipped.
        walk_end: HostAddress,
    },
}

fn scan_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::NOTTY => ", PAGEMAP_SCAN comes with Linux 6.7",
        Errno::PERM => ", not all of it is registered for asynchronous write protection",
        _ => "",
    }
}

/// An open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap {
    fd: OwnedFd,
}

impl Pagemap {
    /// Opens the page map of this process.
    ///
    /// # Errors
    ///
    /// [`PagemapError::Open`].
    pub fn open_self() -> Result<Self, PagemapError> {
        Self::open_path("/proc/self/pagemap".to_owned())
    }

    /// Opens the page map of the process with this id.
    ///
    /// # Errors
    ///
    /// [`PagemapError::Open`].
    pub fn open(pid: u32) -> Result<Self, PagemapError> {
        Self::open_path(format!("/proc/{pid}/pagemap"))
    }

    /// The page map behind an open `pagemap` file, which may be that of a thread
    /// (`/proc/PID/task/TID/pagemap`): the first thread may have ended before the others.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    fn open_path(path: String) -> Result<Self, PagemapError> {
        match rustix::fs::open(path.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Self { fd }),
            Err(errno) => Err(PagemapError::Open { path, errno }),
        }
    }

    /// Reads the entries of the base pages of `range`, as many as fit in `entries`; answers with
    /// how many. Fewer than that come back only at the end of the address space.
    ///
    /// # Errors
    ///
    /// [`PagemapError::Unaligned`], [`PagemapError::Read`].
    pub fn read_entries(
        &self,
        range: HostRange,
        entries: &mut [PagemapEntry],
    ) -> Result<usize, PagemapError> {
        let page_size = rustix::param::page_size() as u64;
        if !range.start().is_aligned(page_size) || !range.len().is_multiple_of(page_size) {
            return Err(PagemapError::Unaligned { range, page_size });
        }
        let wanted = usize::try_from(range.len() / page_size).unwrap_or(usize::MAX);
        let count = wanted.min(entries.len());
        let entries = &mut entries[..count];
        let bytes = entry_bytes(entries);
        let offset = range.start().get() / page_size * 8;
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pread(&self.fd, &mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(PagemapError::Read { range, errno }),
            }
        }
        Ok(done / 8)
    }

    /// Looks for pages (`PAGEMAP_SCAN`), filling `regions` from the front. Ends early, with
    /// [`ScanResult::walk_end`] short of the end of the range, when `regions` or `max_pages` is
    /// used up. With no room at all for regions it only does what the flags say.
    ///
    /// # Errors
    ///
    /// [`PagemapError::Scan`]; see there for what becomes of regions found before the failure.
    pub fn scan(
        &self,
        request: &ScanRequest,
        regions: &mut [PageRegion],
    ) -> Result<ScanResult, PagemapError> {
        let rearms = request.flags.contains(ScanFlags::WP_MATCHING);
        if rearms {
            // The kernel does not say how many regions it filled before it failed: what is not
            // empty any more was.
            regions.fill(PageRegion::default());
        }
        let vec =
            if regions.is_empty() { 0 } else { HostAddress::from_ptr(regions.as_mut_ptr()).get() };
        let mut arg = abi::pm_scan_arg {
            size: size_of::<abi::pm_scan_arg>() as u64,
            flags: request.flags.bits(),
            start: request.range.start().get(),
            end: request.range.end().get(),
            walk_end: request.range.start().get(),
            vec,
            vec_len: regions.len() as u64,
            max_pages: request.max_pages,
            category_inverted: request.category_inverted.bits(),
            category_mask: request.category_mask.bits(),
            category_anyof_mask: request.category_anyof_mask.bits(),
            return_mask: request.return_mask.bits(),
        };
        // SAFETY: `vec` is borrowed exclusively for `vec_len` regions, which have the layout of
        // the kernel's and take any bytes.
        let result = unsafe { abi::pagemap_scan(&self.fd, &mut arg) };
        let walk_end = HostAddress::new(arg.walk_end);
        match result {
            Ok(found) => {
                // Having filled its own buffer of 512 regions on the way, the kernel leaves that
                // place here, though it came to the end. That there is room left tells.
                let pages = |regions: &[PageRegion]| -> u64 {
                    regions.iter().map(|region| region.range().len()).sum::<u64>()
                        / rustix::param::page_size() as u64
                };
                let ended = found < regions.len()
                    && (request.max_pages == 0 || pages(&regions[..found]) < request.max_pages);
                let walk_end = if ended { request.range.end() } else { walk_end };
                Ok(ScanResult { regions: found, walk_end })
            }
            Err(errno) => Err(PagemapError::Scan {
                range: request.range,
                errno,
                regions: if rearms {
                    regions.iter().take_while(|region| !region.range().is_empty()).count()
                } else {
                    0
                },
                walk_end,
            }),
        }
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn entry_bytes(entries: &mut [PagemapEntry]) -> &mut [u8] {
    // SAFETY: an entry is a transparent u64: any bytes are a valid one, there is no padding, and
    // the exclusive borrow passes on to the bytes.
    unsafe {
        std::slice::from_raw_parts_mut(entries.as_mut_ptr().cast::<u8>(), size_of_val(entries))
    }
}

impl fmt::Display for PageRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.range())?;
        bitflags::parser::to_writer(&self.categories(), f)
    }
}
