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
/// Room for the first call. All room is cleared before a call that protects, which for the whole of
/// it takes longer than a call that finds little.
const FIRST_REGIONS: usize = 512;
/// 32 KiB of entries at a time, of 16 MiB of memory.
const ENTRIES: usize = 4096;

/// What had not been looked at when looking failed.
pub(crate) struct Failed {
    /// Of these, pages may have been protected again without having been reported.
    pub(crate) left: HostRange,
    pub(crate) error: PagemapError,
}

/// Looks for pages of some kind: room for what the kernel answers, and the number of its calls.
#[derive(Debug)]
pub(crate) struct Scanner {
    regions: Vec<PageRegion>,
    entries: Vec<PagemapEntry>,
    /// Whether the kernel has `PAGEMAP_SCAN`, as far as is known.
    pub(crate) scans: bool,
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
        self.look(pagemap, &ScanRequest::written(range, rearm), &mut |run, _| found(run))
    }

    /// Reports what is neither in memory, nor swapped out, nor marked as protected.
    pub(crate) fn holes(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        mut found: impl FnMut(HostRange),
    ) -> Result<(), Failed> {
        let populated = PageCategories::PRESENT | PageCategories::SWAPPED;
        let request =
            ScanRequest { category_inverted: populated, ..ScanRequest::having(range, populated) };
        self.look(pagemap, &request, &mut |run, _| found(run))
    }

    /// Reports the pages that have their soft-dirty bit, and those that are not in memory, with
    /// whether they have it, are in memory, or are swapped out.
    pub(crate) fn soft_dirty_or_absent(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), Failed> {
        let (present, bit) = (PageCategories::PRESENT, PageCategories::SOFT_DIRTY);
        let request = ScanRequest {
            category_inverted: present,
            category_mask: PageCategories::empty(),
            category_anyof_mask: present | bit,
            ..ScanRequest::having(range, present | PageCategories::SWAPPED | bit)
        };
        self.look(pagemap, &request, found)
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

    /// Reports the pages that are asked for, neighbours of the same kind as one.
    pub(crate) fn look(
        &mut self,
        pagemap: &Pagemap,
        request: &ScanRequest,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), Failed> {
        if self.scans || !request.flags.is_empty() {
            match self.scan(pagemap, request, found) {
                // Nothing can have been reported.
                Err(Failed { error: PagemapError::Scan { errno: Errno::NOTTY, .. }, .. })
                    if request.flags.is_empty() =>
                {
                    self.scans = false;
                }
                result => return result,
            }
        }
        let mut run = Run::default();
        let looked = self.entries(pagemap, request.range, |page, entry| {
            let categories = categories(entry);
            if is_wanted(request, categories) {
                run.add(page, categories & request.return_mask, found);
            }
        });
        run.end(found);
        looked
    }

    fn scan(
        &mut self,
        pagemap: &Pagemap,
        request: &ScanRequest,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), Failed> {
        let (mut left, mut room) = (request.range, FIRST_REGIONS);
        while !left.is_empty() {
            // Small ranges need no more.
            let pages = usize::try_from(left.len() / PageSize::base().bytes()).unwrap_or(room);
            let regions = &mut self.regions[..pages.clamp(1, room)];
            room = (4 * room).min(REGIONS);
            self.calls += 1;
            let result = pagemap
                .scan(&ScanRequest { range: left, ..*request }, regions)
                .map_err(|error| Failed { left, error })?;
            for region in &regions[..result.regions] {
                found(region.range(), region.categories());
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

/// An entry of the page map in terms of a scan.
pub(crate) fn categories(entry: PagemapEntry) -> PageCategories {
    let mut categories = PageCategories::empty();
    categories.set(PageCategories::PRESENT, entry.present());
    categories.set(PageCategories::SWAPPED, entry.swapped());
    categories.set(PageCategories::FILE, entry.file());
    categories.set(PageCategories::WRITTEN, !entry.uffd_wp());
    categories.set(PageCategories::SOFT_DIRTY, entry.soft_dirty());
    categories
}

/// Whether a scan would report a page.
pub(crate) fn is_wanted(request: &ScanRequest, categories: PageCategories) -> bool {
    let flipped = categories ^ request.category_inverted;
    flipped.contains(request.category_mask)
        && (request.category_anyof_mask.is_empty()
            || flipped.intersects(request.category_anyof_mask))
}

/// Pages of the same kind that follow each other, put together.
#[derive(Default)]
struct Run(HostRange, PageCategories);

impl Run {
    fn add(
        &mut self,
        page: HostRange,
        categories: PageCategories,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) {
        if self.0.end() == page.start() && !self.0.is_empty() && self.1 == categories {
            self.0 = HostRange::new(self.0.start(), self.0.len() + page.len());
        } else {
            self.end(found);
            *self = Self(page, categories);
        }
    }

    fn end(&mut self, found: &mut dyn FnMut(HostRange, PageCategories)) {
        let Self(run, categories) = std::mem::take(self);
        if !run.is_empty() {
            found(run, categories);
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
        let pages =
            |first: u64, pages: u64| HostRange::new(HostAddress::new(first * 4096), pages * 4096);
        let (mut run, mut found) = (Run::default(), Vec::new());
        let mut push = |range, kind| found.push((range, kind));
        let (one, other) = (PageCategories::PRESENT, PageCategories::SWAPPED);
        for (page, kind) in [(0, one), (1, one), (2, one), (5, one), (6, other), (8, one), (9, one)]
        {
            run.add(pages(page, 1), kind, &mut push);
        }
        run.end(&mut push);
        run.end(&mut push);
        let expected = [(0, 3, one), (5, 1, one), (6, 1, other), (8, 2, one)];
        assert_eq!(found, expected.map(|(first, count, kind)| (pages(first, count), kind)));
    }
}
