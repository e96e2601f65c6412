//! Which pages of a private mapping the process has of its own.

use pageferry_memory::PageSize;
use pageferry_uffd::{
    Errno, HostRange, PageCategories, PageRegion, Pagemap, PagemapEntry, PagemapError, ScanFlags,
    ScanRequest,
};

use super::runs::Runs;

/// As many as the kernel fills in one go, some times over.
const REGIONS: usize = 2048;
/// Entries at a time, where the kernel does not scan.
const ENTRIES: usize = 4096;

/// Pages that are in memory, or swapped out, and not of a file: what a private mapping has that is
/// not zeros or the file's.
#[derive(Default, Debug)]
pub(super) struct Own {
    /// Those in memory.
    pub(super) present: Runs,
    /// Those swapped out; and marks of a userfaultfd, which look the same.
    pub(super) swapped: Runs,
    /// Those of both that were written.
    pub(super) written: Runs,
}

/// Room for what the kernel answers, and the number of its calls.
#[derive(Debug)]
pub(super) struct Looker {
    regions: Vec<PageRegion>,
    entries: Vec<PagemapEntry>,
    scans: bool,
    pub(super) calls: u64,
}

const PRESENT: PageCategories = PageCategories::PRESENT;
const FILE: PageCategories = PageCategories::FILE;
/// That a page has contents of its own, or had them when the kernel swapped them out.
const THERE: PageCategories = PRESENT.union(PageCategories::SWAPPED);

impl Looker {
    pub(super) fn new() -> Self {
        Self {
            regions: vec![PageRegion::default(); REGIONS],
            entries: Vec::new(),
            scans: true,
            calls: 0,
        }
    }

    /// Looks at the pages that are the process's own, and which of them are not protected. With
    /// `rearm` the kernel protects those again, in the same step.
    ///
    /// Pages that are not there, and those of a file, are neither reported nor protected: a page
    /// that comes into being is not protected, and counts as written for that. So memory that is
    /// only reserved takes neither time nor page tables.
    pub(super) fn own(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        rearm: bool,
    ) -> Result<Own, PagemapError> {
        let written = PageCategories::WRITTEN;
        let request = ScanRequest {
            flags: ScanRequest::written(range, rearm).flags,
            return_mask: written | PRESENT,
            ..own_pages(range)
        };
        let mut own = Own::default();
        self.look(pagemap, &request, &mut |range, categories| {
            let place =
                if categories.contains(PRESENT) { &mut own.present } else { &mut own.swapped };
            place.push(range);
            if categories.intersects(written) {
                own.written.push(range);
            }
        })?;
        Ok(own)
    }

    /// Looks at the pages that are the process's own, and which of them are soft-dirty.
    ///
    /// No bit is set on a page of zeros that a read brings, where one was discarded. It is mapped in
    /// many places, or counts as mapped in none, so that what is not mapped here alone is taken as
    /// written.
    pub(super) fn own_by_bits(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
    ) -> Result<Own, PagemapError> {
        let mut runs = Runs::default();
        self.look(pagemap, &own_pages(range), &mut |run, _| runs.push(run))?;
        let mut own = Own::default();
        for run in runs.iter() {
            self.entries(pagemap, run, &mut |page, entry| {
                if !is_wanted(&own_pages(page), categories(entry)) {
                    return;
                }
                let place = if entry.present() { &mut own.present } else { &mut own.swapped };
                place.push(page);
                if entry.soft_dirty() || entry.present() && !entry.exclusive() {
                    own.written.push(page);
                }
            })?;
        }
        Ok(own)
    }

    /// Looks at a shared mapping by soft-dirty bits: what was written, and what is not mapped, of
    /// which no bit is kept.
    pub(super) fn soft_dirty_or_absent(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
    ) -> Result<Runs, PagemapError> {
        let request = ScanRequest {
            range,
            flags: ScanFlags::empty(),
            max_pages: 0,
            category_inverted: PRESENT,
            category_mask: PageCategories::empty(),
            category_anyof_mask: PRESENT | PageCategories::SOFT_DIRTY,
            return_mask: PRESENT,
        };
        let mut found = Runs::default();
        self.look(pagemap, &request, &mut |range, _| found.push(range))?;
        Ok(found)
    }

    fn look(
        &mut self,
        pagemap: &Pagemap,
        request: &ScanRequest,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), PagemapError> {
        if self.scans {
            match self.scan(pagemap, request, found) {
                // Neither can have reported anything.
                Err(PagemapError::Scan { errno: Errno::NOTTY, .. }) if request.flags.is_empty() => {
                    self.scans = false;
                }
                result => return result,
            }
        }
        self.read(pagemap, request, found)
    }

    fn scan(
        &mut self,
        pagemap: &Pagemap,
        request: &ScanRequest,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), PagemapError> {
        let mut left = request.range;
        while !left.is_empty() {
            // Small ranges need no more, and every region is cleared before each call.
            let pages = usize::try_from(left.len() / PageSize::base().bytes()).unwrap_or(REGIONS);
            let regions = &mut self.regions[..pages.clamp(1, REGIONS)];
            self.calls += 1;
            let result = pagemap.scan(&ScanRequest { range: left, ..*request }, regions)?;
            for region in &regions[..result.regions] {
                found(region.range(), region.categories());
            }
            match result.walk_end.offset_from(left.start()) {
                Some(walked) if walked > 0 => left = left.skip(walked),
                _ => {
                    return Err(PagemapError::Scan {
                        range: left,
                        errno: Errno::IO,
                        regions: 0,
                        walk_end: result.walk_end,
                    });
                }
            }
        }
        Ok(())
    }

    fn read(
        &mut self,
        pagemap: &Pagemap,
        request: &ScanRequest,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), PagemapError> {
        self.entries(pagemap, request.range, &mut |page, entry| {
            let categories = categories(entry);
            if is_wanted(request, categories) {
                found(page, categories & request.return_mask);
            }
        })
    }

    fn entries(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        each: &mut dyn FnMut(HostRange, PagemapEntry),
    ) -> Result<(), PagemapError> {
        let page = PageSize::base().bytes();
        self.entries.resize(ENTRIES, PagemapEntry::default());
        let mut left = range;
        while !left.is_empty() {
            self.calls += 1;
            let count = pagemap.read_entries(left, &mut self.entries)?;
            if count == 0 {
                // The process has no memory any more.
                return Err(PagemapError::Read { range: left, errno: Errno::SRCH });
            }
            for (index, &entry) in self.entries[..count].iter().enumerate() {
                each(left.skip(index as u64 * page).take(page), entry);
            }
            left = left.skip(count as u64 * page);
        }
        Ok(())
    }
}

/// Asks for the pages that are the process's own.
fn own_pages(range: HostRange) -> ScanRequest {
    ScanRequest {
        range,
        flags: ScanFlags::empty(),
        max_pages: 0,
        category_inverted: FILE,
        category_mask: FILE,
        category_anyof_mask: THERE,
        return_mask: PRESENT,
    }
}

/// An entry of the page map in terms of a scan.
fn categories(entry: PagemapEntry) -> PageCategories {
    let mut categories = PageCategories::empty();
    categories.set(PRESENT, entry.present());
    categories.set(PageCategories::SWAPPED, entry.swapped());
    categories.set(FILE, entry.file());
    categories.set(PageCategories::WRITTEN, !entry.uffd_wp());
    categories.set(PageCategories::SOFT_DIRTY, entry.soft_dirty());
    categories
}

/// Whether a scan would report a page.
fn is_wanted(request: &ScanRequest, categories: PageCategories) -> bool {
    let flipped = categories ^ request.category_inverted;
    flipped.contains(request.category_mask)
        && (request.category_anyof_mask.is_empty()
            || flipped.intersects(request.category_anyof_mask))
}

#[cfg(test)]
mod tests {
    use pageferry_memory::{Advice, Mapping};

    use super::*;

    /// That a kernel which does not scan shows the same.
    #[test]
    fn entries_say_what_a_scan_says() {
        let memory = Mapping::anonymous(16 * 4096).unwrap();
        for page in [1, 2, 3, 7, 15] {
            memory.write_at(page * 4096, &[1]).unwrap();
        }
        let third = memory.range().skip(3 * 4096).take(4096);
        memory.advise(third, Advice::DontNeed).unwrap();
        let pagemap = Pagemap::open_self().unwrap();
        let mut lookers = [Looker::new(), Looker::new()];
        lookers[1].scans = false;
        let found = lookers.map(|mut looker| looker.own(&pagemap, memory.range(), false).unwrap());
        for own in &found {
            let bytes = [&own.present, &own.swapped, &own.written].map(Runs::bytes);
            assert_eq!(bytes, [4 * 4096, 0, 4 * 4096], "{own:?}");
        }
        assert_eq!(found[0].present, found[1].present);
        let expected = [(1, 2), (7, 1), (15, 1)]
            .map(|(first, pages)| memory.range().skip(first * 4096).take(pages * 4096));
        assert!(found[0].present.iter().eq(expected), "{found:?}");
    }
}
