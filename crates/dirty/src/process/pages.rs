//! Which pages of a private mapping the process has of its own.

use pageferry_uffd::{HostRange, PageCategories, Pagemap, PagemapError, ScanFlags, ScanRequest};

use super::runs::Runs;
use crate::scan::{Scanner, categories, is_wanted};

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

/// Looks at the pages of a process, and counts the calls of the kernel that takes.
#[derive(Debug)]
pub(super) struct Looker(Scanner);

const PRESENT: PageCategories = PageCategories::PRESENT;
const FILE: PageCategories = PageCategories::FILE;
/// That a page has contents of its own, or had them when the kernel swapped them out.
const THERE: PageCategories = PRESENT.union(PageCategories::SWAPPED);

impl Looker {
    pub(super) fn new() -> Self {
        Self(Scanner::new())
    }

    pub(super) fn calls(&self) -> u64 {
        self.0.calls
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
            let looked = self.0.entries(pagemap, run, |page, entry| {
                if !is_wanted(&own_pages(page), categories(entry)) {
                    return;
                }
                let place = if entry.present() { &mut own.present } else { &mut own.swapped };
                place.push(page);
                if entry.soft_dirty() || entry.present() && !entry.exclusive() {
                    own.written.push(page);
                }
            });
            looked.map_err(|failed| failed.error)?;
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
        let mut found = Runs::default();
        self.0
            .soft_dirty_or_absent(pagemap, range, &mut |run, _| found.push(run))
            .map_err(|failed| failed.error)?;
        Ok(found)
    }

    fn look(
        &mut self,
        pagemap: &Pagemap,
        request: &ScanRequest,
        found: &mut dyn FnMut(HostRange, PageCategories),
    ) -> Result<(), PagemapError> {
        self.0.look(pagemap, request, found).map_err(|failed| failed.error)
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
        lookers[1].0.scans = false;
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
