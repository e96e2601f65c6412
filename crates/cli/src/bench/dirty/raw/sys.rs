//! UFFDIO_WRITEPROTECT and PAGEMAP_SCAN, as thin as they go.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, RawFd},
};

use linux_raw_sys::{
    general::{page_region, pm_scan_arg, uffdio_range, uffdio_writeprotect},
    ioctl::UFFDIO_WRITEPROTECT,
};

use crate::bench::reference::sys::Range;

pub(super) const WP: u64 = 1 << 0;
pub(super) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(super) const WP_UNPOPULATED: u64 = 1 << 13;
pub(super) const WP_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`.
pub(super) const MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const PROTECT: u64 = 1 << 0;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xc000_6610 | (size_of::<pm_scan_arg>() as u32) << 16;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Protects `range`, or lifts its protection and wakes who waits.
pub(super) fn write_protect(uffd: RawFd, range: Range, protect: bool) -> io::Result<()> {
    let range = uffdio_range { start: range.start, len: range.len };
    let mut argument = uffdio_writeprotect { range, mode: if protect { PROTECT } else { 0 } };
    // SAFETY: UFFDIO_WRITEPROTECT takes a `uffdio_writeprotect`; it changes who may write, not what
    // is mapped.
    match unsafe { libc::ioctl(uffd, UFFDIO_WRITEPROTECT as _, &raw mut argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// PAGEMAP_SCAN of this process.
pub(super) struct Scan {
    pagemap: File,
    regions: Vec<page_region>,
}

impl Scan {
    pub(super) fn new() -> io::Result<Self> {
        let empty = page_region { start: 0, end: 0, categories: 0 };
        Ok(Self { pagemap: File::open("/proc/self/pagemap")?, regions: vec![empty; 4096] })
    }

    /// Calls `run` with each run of written pages, all of which are write-protected again.
    pub(super) fn written(&mut self, range: Range, run: impl FnMut(Range)) -> io::Result<()> {
        self.find(range, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN, run)
    }

    /// Calls `run` with each run of pages that have their soft-dirty bit.
    pub(super) fn soft_dirty(&mut self, range: Range, run: impl FnMut(Range)) -> io::Result<()> {
        self.find(range, 0, PAGE_IS_SOFT_DIRTY, run)
    }

    fn find(
        &mut self,
        range: Range,
        flags: u64,
        category: u64,
        mut run: impl FnMut(Range),
    ) -> io::Result<()> {
        let end = range.start + range.len;
        let mut start = range.start;
        while start < end {
            let mut argument = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags,
                start,
                end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: category,
                category_anyof_mask: 0,
                return_mask: category,
            };
            // SAFETY: PAGEMAP_SCAN takes a `pm_scan_arg`, and writes at most `vec_len` regions to
            // `vec`, which has that many.
            let found = unsafe {
                libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument)
            };
            let Ok(found) = usize::try_from(found) else { return Err(io::Error::last_os_error()) };
            for region in &self.regions[..found] {
                run(Range { start: region.start, len: region.end - region.start });
            }
            start = argument.walk_end;
        }
        Ok(())
    }
}
