//! Looking at the pages of a range, by `PAGEMAP_SCAN` or entry by entry.
//!
//! Source: `Documentation/admin-guide/mm/pagemap.rst`.

use std::sync::{Arc, OnceLock};

use pageferry_memory::{Mapping, PageSize};
use pageferry_uffd::{
    Errno, Features, HostAddress, HostRange, Mapped, Options, PageCategories, PageRegion, Pagemap,
    PagemapEntry, PagemapError, RegisterMode, ScanRequest,
};

/// Room for one call. The kernel goes 2 MiB at a time, at most 512 regions, so more than a few of
/// those spare little; this is 48 KiB.
const REGIONS: usize = 2048;
/// 32 KiB of entries at a time, of 16 MiB of memory.
const ENTRIES: usize = 4096;

/// What had not been looked at when looking failed.
pub(crate) struct Failed {
    /// Of these, pages may have been protected again without having been reported.
    pub(crate) left: HostRange,
    pub(crate) error: PagemapError,
}

/// Room for what the kernel answers, and the number of its calls.
#[derive(Debug)]
pub(crate) struct Scanner {
    regions: Vec<PageRegion>,
    entries: Vec<PagemapEntry>,
    /// Whether the kernel has `PAGEMAP_SCAN`, as far as is known.
    scans: bool,
    pub(crate) calls: u64,
}

impl Scanner {
    pub(crate) fn new() -> Self {
        Self {
            regions: vec![PageRegion::default(); REGIONS],
            entries: vec![],
            scans: true,
            calls: 0,
        }
    }

    /// Reports the pages that are not write-protected by a userfaultfd. With `rearm` the kernel
    /// protects them again in the same step, which takes a range of asynchronous write protection.
    pub(crate) fn unprotected(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        rearm: bool,
        mut found: impl FnMut(HostRange),
    ) -> Result<(), Failed> {
        if self.scans || rearm {
            let requests = |left| ScanRequest::written(left, rearm);
            match self.scan(pagemap, range, requests, &mut found) {
                Err(Failed { error: PagemapError::Scan { errno: Errno::NOTTY, .. }, left })
                    if !rearm && left == range =>
                {
                    self.scans = false;
                }
                result => return result,
            }
        }
        let mut run = Run::default();
        let looked = self.entries(pagemap, range, |page, entry| {
            if !entry.uffd_wp() {
                run.add(page, &mut found);
            }
        });
        run.end(&mut found);
        looked
    }

    /// Reports what is neither in memory, nor swapped out, nor marked as protected.
    pub(crate) fn holes(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        mut found: impl FnMut(HostRange),
    ) -> Result<(), Failed> {
        let populated = PageCategories::PRESENT | PageCategories::SWAPPED;
        let request = |left| ScanRequest {
            category_inverted: populated,
            ..ScanRequest::having(left, populated)
        };
        self.scan(pagemap, range, request, &mut found)
    }

    /// Whether holes have to be looked for, because [`unprotected`](Self::unprotected) does not
    /// report them all.
    ///
    /// A range that was protected as a whole has a mark even on pages that are not there. A page
    /// that was discarded has none, and is reported; but where a whole page table went, which a
    /// transparent huge page takes with it, kernels do not report that, unless they have the change
    /// to `pagemap_scan_pte_hole` that has them do so. The pages of hugetlbfs are no such case in
    /// any.
    pub(crate) fn must_look_for_holes(&self, page: PageSize) -> bool {
        self.scans && (page != PageSize::base() || !holes_are_reported())
    }

    fn scan(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        request: impl Fn(HostRange) -> ScanRequest,
        found: &mut dyn FnMut(HostRange),
    ) -> Result<(), Failed> {
        let mut left = range;
        while !left.is_empty() {
            // Small ranges need no more, and every region has to be cleared before each call.
            let pages = usize::try_from(left.len() / PageSize::base().bytes()).unwrap_or(REGIONS);
            let regions = &mut self.regions[..pages.clamp(1, REGIONS)];
            self.calls += 1;
            let result =
                pagemap.scan(&request(left), regions).map_err(|error| Failed { left, error })?;
            for region in &regions[..result.regions] {
                found(region.range());
            }
            match result.walk_end.offset_from(left.start()) {
                Some(walked) if walked > 0 => left = left.skip(walked),
                _ => {
                    let error = PagemapError::Scan {
                        range: left,
                        errno: Errno::IO,
                        regions: 0,
                        walk_end: result.walk_end,
                    };
                    return Err(Failed { left, error });
                }
            }
        }
        Ok(())
    }

    /// Shows the entry of every base page.
    pub(crate) fn entries(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        mut each: impl FnMut(HostRange, PagemapEntry),
    ) -> Result<(), Failed> {
        let page = PageSize::base().bytes();
        self.entries.resize(ENTRIES, PagemapEntry::default());
        let mut left = range;
        while !left.is_empty() {
            self.calls += 1;
            let count = match pagemap.read_entries(left, &mut self.entries) {
                Ok(count @ 1..) => count,
                // The process has no memory any more.
                Ok(0) => {
                    let error = PagemapError::Read { range: left, errno: Errno::SRCH };
                    return Err(Failed { left, error });
                }
                Err(error) => return Err(Failed { left, error }),
            };
            for (index, &entry) in self.entries[..count].iter().enumerate() {
                each(left.skip(index as u64 * page).take(page), entry);
            }
            left = left.skip(count as u64 * page);
        }
        Ok(())
    }
}

/// Pages that follow each other, put together.
#[derive(Default)]
pub(crate) struct Run(HostRange);

impl Run {
    pub(crate) fn add(&mut self, page: HostRange, found: &mut impl FnMut(HostRange)) {
        if self.0.end() == page.start() && !self.0.is_empty() {
            self.0 = HostRange::new(self.0.start(), self.0.len() + page.len());
        } else {
            self.end(found);
            self.0 = page;
        }
    }

    pub(crate) fn end(&mut self, found: &mut impl FnMut(HostRange)) {
        let run = std::mem::take(&mut self.0);
        if !run.is_empty() {
            found(run);
        }
    }
}

/// Whether this kernel reports page tables that are not there as written, found by doing.
fn holes_are_reported() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let answer = try_a_hole();
        tracing::debug!(?answer, "whether PAGEMAP_SCAN reports page tables that are not there");
        answer.unwrap_or(false)
    })
}

fn try_a_hole() -> Option<bool> {
    // As large as what one page table maps, and aligned to it, so that it has none.
    let memory = Arc::new(Mapping::anonymous(PageSize::SIZE_2M.bytes()).ok()?);
    let range = memory.range();
    let uffd = Options::new().required(Features::WP_ASYNC).open().ok()?;
    let _registration =
        Arc::new(uffd).register(Arc::clone(&memory), Mapped::range(&memory), RegisterMode::WP);
    let mut regions = [PageRegion::default(); 2];
    let pagemap = Pagemap::open_self().ok()?;
    let result = pagemap.scan(&ScanRequest::written(range, false), &mut regions).ok()?;
    Some(regions[..result.regions].iter().any(|region| region.range().contains_range(range)))
}

/// The page of this size around an address.
pub(crate) fn page_around(address: HostAddress, page: PageSize) -> HostRange {
    HostRange::new(address.align_down(page.bytes()), page.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_run() {
        let page = |number: u64| HostRange::new(HostAddress::new(number * 4096), 4096);
        let (mut run, mut found) = (Run::default(), Vec::new());
        for number in [0, 1, 2, 5, 7, 8] {
            run.add(page(number), &mut |range| found.push(range));
        }
        run.end(&mut |range| found.push(range));
        run.end(&mut |range| found.push(range));
        let expected = [(0, 3), (5, 1), (7, 2)]
            .map(|(first, pages)| HostRange::new(HostAddress::new(first * 4096), pages * 4096));
        assert_eq!(found, expected);
    }
}
