//! What of a range has pages, without a look at each page that is not there.

use pageferry_memory::PageSize;
use pageferry_uffd::{
    HostAddress, HostRange, PageCategories, PageRegion, Pagemap, PagemapEntry, PagemapError,
    ScanFlags, ScanRequest,
};
use rustix::io::Errno;

/// Entries read, or regions found, at once.
const ROOM: usize = 1 << 13;

/// Buffers for looking, and whether the kernel has `PAGEMAP_SCAN` (since 6.7), which goes past what
/// is empty in large steps.
#[derive(Default)]
pub(crate) struct Populated {
    regions: Vec<PageRegion>,
    entries: Vec<PagemapEntry>,
    cannot_scan: bool,
}

impl Populated {
    /// Adds the stretches of `range` to `found`, with what the page map says of each of their
    /// pages: present, swapped, of a file, protected by a userfaultfd. Answers with the address
    /// that it came to, which is the start of the range where there is no such address.
    pub(crate) fn look(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        found: &mut Vec<(PagemapEntry, HostRange)>,
    ) -> Result<HostAddress, PagemapError> {
        if !self.cannot_scan {
            match self.scan(pagemap, range, found) {
                Err(PagemapError::Scan { errno: Errno::NOTTY, .. }) => self.cannot_scan = true,
                result => return result,
            }
        }
        self.read(pagemap, range, found)
    }

    fn scan(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        found: &mut Vec<(PagemapEntry, HostRange)>,
    ) -> Result<HostAddress, PagemapError> {
        let there = PageCategories::PRESENT | PageCategories::SWAPPED;
        let request = ScanRequest {
            range,
            flags: ScanFlags::empty(),
            max_pages: 0,
            category_inverted: PageCategories::empty(),
            category_mask: PageCategories::empty(),
            category_anyof_mask: there,
            return_mask: there | PageCategories::FILE | PageCategories::WRITTEN,
        };
        self.regions.resize(ROOM, PageRegion::default());
        let result = pagemap.scan(&request, &mut self.regions)?;
        let mut at = range.start();
        let mut add = |entry, until: HostAddress| {
            if at < until {
                found.push((entry, HostRange::new(at, until.get() - at.get())));
                at = until;
            }
        };
        for region in &self.regions[..result.regions] {
            add(PagemapEntry::default(), region.range().start());
            add(entry(region.categories()), region.range().end());
        }
        add(PagemapEntry::default(), result.walk_end);
        Ok(result.walk_end)
    }

    fn read(
        &mut self,
        pagemap: &Pagemap,
        range: HostRange,
        found: &mut Vec<(PagemapEntry, HostRange)>,
    ) -> Result<HostAddress, PagemapError> {
        let page = PageSize::base().bytes();
        self.entries.resize(ROOM, PagemapEntry::default());
        let count = pagemap.read_entries(range, &mut self.entries)?;
        let mut at = range.start();
        for run in self.entries[..count].chunk_by(|a, b| said(*a) == said(*b)) {
            let run_range = HostRange::new(at, run.len() as u64 * page);
            found.push((said(run[0]), run_range));
            at = run_range.end();
        }
        Ok(at)
    }
}

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const UFFD_WP: u64 = 1 << 57;

/// What is looked at of an entry.
fn said(entry: PagemapEntry) -> PagemapEntry {
    PagemapEntry::from_bits(entry.bits() & (PRESENT | SWAPPED | FILE | UFFD_WP))
}

/// The entry that goes with what a scan says of a page that is there.
fn entry(categories: PageCategories) -> PagemapEntry {
    let bit = |category, bit| if categories.contains(category) { bit } else { 0 };
    // A scan calls written what is not protected by a userfaultfd, registered or not.
    let protected = if categories.contains(PageCategories::WRITTEN) { 0 } else { UFFD_WP };
    PagemapEntry::from_bits(
        bit(PageCategories::PRESENT, PRESENT)
            | bit(PageCategories::SWAPPED, SWAPPED)
            | bit(PageCategories::FILE, FILE)
            | protected,
    )
}

#[cfg(test)]
mod tests {
    use pageferry_memory::{Advice, Mapping, MemoryFile, MemoryFileKind};

    use super::*;

    /// Both ways see the same of anonymous and shared memory with holes.
    #[test]
    fn scanned_and_read() {
        let pagemap = match Pagemap::open_self() {
            Ok(pagemap) => pagemap,
            Err(error) => panic!("{error}"),
        };
        let file = MemoryFile::create("populated", 64 * 4096, MemoryFileKind::Normal).unwrap();
        let anonymous = Mapping::anonymous(64 * 4096).unwrap();
        // A kernel without huge pages does not know the advice.
        let _ = anonymous.advise(anonymous.range(), Advice::NoHugePage);
        for memory in [anonymous, Mapping::shared(file.fd(), 0, 64 * 4096, None).unwrap()] {
            for page in [0, 1, 7, 20, 63] {
                memory.write_at(page * 4096, &[1]).unwrap();
            }
            let collect = |cannot_scan| {
                let mut populated = Populated { cannot_scan, ..Populated::default() };
                let mut found = Vec::new();
                let end = populated.look(&pagemap, memory.range(), &mut found).unwrap();
                assert_eq!(end, memory.range().end());
                found
            };
            let read = collect(true);
            assert_eq!(read.iter().filter(|(entry, _)| entry.present()).count(), 4);
            assert_eq!(collect(false), read);
        }
    }
}
