//! Which pages of some ranges are dirty.

use std::fmt;

use pageferry_memory::{DirtyBitmap, GranuleIndex, GranuleRange, PageSize};
use pageferry_uffd::{HostAddress, HostRange};

use crate::{DirtyError, Tracked};

/// The dirty pages of some ranges of memory: one bit a page.
///
/// Marks may be set by any number of threads while others harvest into the same set and take marks
/// out of it: a mark is never lost, it is part of what is taken or still there afterwards. So what a
/// virtual machine monitor or its devices write can be marked here beside what a tracker finds.
#[derive(Default)]
pub struct DirtySet {
    /// In ascending order, without overlaps.
    entries: Vec<Entry>,
}

struct Entry {
    tracked: Tracked,
    bitmap: DirtyBitmap,
}

impl Entry {
    /// The pages that have any byte of `part`, which is not empty and inside.
    fn granules(&self, part: HostRange) -> GranuleRange {
        let Tracked { range, page } = self.tracked;
        let first = (part.start().get() - range.start().get()) >> page.shift();
        let last = (part.end().get() - 1 - range.start().get()) >> page.shift();
        GranuleRange::new(GranuleIndex::new(first), last - first + 1)
    }

    fn addresses(&self, granules: GranuleRange) -> HostRange {
        let Tracked { range, page } = self.tracked;
        range.skip(granules.first().get() << page.shift()).take(granules.count() << page.shift())
    }
}

impl DirtySet {
    /// A set for these ranges, most often those of [`Tracker::ranges`](crate::Tracker::ranges),
    /// with no page marked.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Unaligned`], [`DirtyError::Overlaps`].
    pub fn new(ranges: &[Tracked]) -> Result<Self, DirtyError> {
        let mut set = Self::default();
        for &tracked in ranges {
            set.add(tracked)?;
        }
        Ok(set)
    }

    /// Adds a range, with no page marked.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Unaligned`], [`DirtyError::Overlaps`].
    pub fn add(&mut self, tracked: Tracked) -> Result<(), DirtyError> {
        tracked.check()?;
        let place = self.first_ending_after(tracked.range.start());
        if let Some(entry) = self.entries.get(place)
            && entry.tracked.range.overlaps(tracked.range)
        {
            let other = entry.tracked.range;
            return Err(DirtyError::Overlaps { range: tracked.range, other });
        }
        let bitmap = DirtyBitmap::new(tracked.pages());
        self.entries.insert(place, Entry { tracked, bitmap });
        Ok(())
    }

    /// Its ranges, in ascending order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = Tracked> {
        self.entries.iter().map(|entry| entry.tracked)
    }

    /// Whether there is a bit for every byte of `range`.
    pub fn covers(&self, range: HostRange) -> bool {
        let mut covered = range.start();
        for entry in &self.entries[self.first_ending_after(range.start())..] {
            if covered >= range.end() {
                break;
            }
            if entry.tracked.range.start() > covered {
                return false;
            }
            covered = entry.tracked.range.end();
        }
        covered >= range.end()
    }

    /// Marks every page of which any byte is in `range`; answers how many that are. What is outside
    /// of all ranges is passed over.
    pub fn mark(&self, range: HostRange) -> u64 {
        let mut marker = self.marker();
        marker.mark(range);
        marker.finish()
    }

    /// What marks many pages in less time than one after the other.
    pub fn marker(&self) -> Marker<'_> {
        Marker { set: self, entry: None, word: 0, bits: 0, pages: 0 }
    }

    /// Whether the page at `address` is marked; never outside of all ranges.
    pub fn test(&self, address: HostAddress) -> bool {
        self.entries.get(self.first_ending_after(address)).is_some_and(|entry| {
            let Tracked { range, page } = entry.tracked;
            address
                .offset_from(range.start())
                .is_some_and(|offset| entry.bitmap.test(GranuleIndex::new(offset >> page.shift())))
        })
    }

    /// Removes all marks; answers which pages had one, in ascending order, neighbours of the same
    /// range as one.
    pub fn take(&self) -> Vec<HostRange> {
        let mut runs = Vec::new();
        self.take_into(&mut runs);
        runs
    }

    /// [`take`](Self::take) that appends to a vector; answers how many bytes the pages have.
    pub fn take_into(&self, runs: &mut Vec<HostRange>) -> u64 {
        let (mut granules, mut bytes) = (Vec::new(), 0);
        for entry in &self.entries {
            granules.clear();
            bytes += entry.bitmap.take_into(&mut granules) << entry.tracked.page.shift();
            runs.extend(granules.iter().map(|&granules| entry.addresses(granules)));
        }
        bytes
    }

    /// Marks every page that is marked in `other`, whose ranges must all be here with the same page
    /// size.
    ///
    /// # Errors
    ///
    /// [`DirtyError::NotInSet`]; nothing is marked then.
    pub fn merge(&self, other: &Self) -> Result<(), DirtyError> {
        let mine = |tracked: Tracked| {
            let place = self.first_ending_after(tracked.range.start());
            self.entries.get(place).filter(|entry| entry.tracked == tracked)
        };
        if let Some(entry) = other.entries.iter().find(|entry| mine(entry.tracked).is_none()) {
            return Err(DirtyError::NotInSet { range: entry.tracked.range });
        }
        for entry in &other.entries {
            mine(entry.tracked).expect("looked for just before").bitmap.merge(&entry.bitmap);
        }
        Ok(())
    }

    /// How many pages are marked.
    pub fn count(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bitmap.count()).sum()
    }

    /// How many bytes the marked pages have.
    pub fn bytes(&self) -> u64 {
        let bytes = |entry: &Entry| entry.bitmap.count() << entry.tracked.page.shift();
        self.entries.iter().map(bytes).sum()
    }

    /// The range that this address is in.
    pub fn range_at(&self, address: HostAddress) -> Option<Tracked> {
        let tracked = self.entries.get(self.first_ending_after(address))?.tracked;
        tracked.range.contains(address).then_some(tracked)
    }

    fn first_ending_after(&self, address: HostAddress) -> usize {
        self.entries.partition_point(|entry| entry.tracked.range.end() <= address)
    }
}

/// Marks pages in a [`DirtySet`], a word of neighbours at a time, in whatever order they come.
///
/// What was marked last may not be in the set yet; all of it is when the marker has been dropped, or
/// asked to [`finish`](Self::finish).
pub struct Marker<'a> {
    set: &'a DirtySet,
    /// Where the last page was: most often the next one is there, too.
    entry: Option<&'a Entry>,
    /// The word of its bitmap that is being put together, and what is missing from it there.
    word: u64,
    bits: u64,
    pages: u64,
}

const BITS: u64 = u64::BITS as u64;

impl<'a> Marker<'a> {
    /// As [`DirtySet::mark`].
    #[inline]
    pub fn mark(&mut self, range: HostRange) {
        if range.is_empty() {
            return;
        }
        match self.entry {
            Some(entry) if entry.tracked.range.contains_range(range) => self.add(entry, range),
            _ => self.look_up(range),
        }
    }

    /// Marks pages of `size` bytes of which a bit is set, the lowest bit for the one at `start`.
    /// The size need not be that of the set's pages.
    ///
    /// # Panics
    ///
    /// When such a page is not in the address space.
    #[inline]
    pub fn mark_word(&mut self, start: HostAddress, size: PageSize, bits: u64) {
        let Some(last) = bits.checked_ilog2() else { return };
        if let Some(entry) = self.entry
            && entry.tracked.page == size
            && let Some(offset) = start.offset_from(entry.tracked.range.start())
            && size.is_multiple(offset)
            && (offset >> size.shift()) + u64::from(last) < entry.tracked.pages()
        {
            let first = offset >> size.shift();
            self.pages += u64::from(bits.count_ones());
            if first.is_multiple_of(BITS) {
                self.add_word(entry, first / BITS, bits);
            } else {
                entry.bitmap.set_bits(GranuleIndex::new(first), bits);
            }
            return;
        }
        let mut left = bits;
        while left != 0 {
            let low = left.trailing_zeros();
            let count = (left >> low).trailing_ones();
            let first = start.checked_add(u64::from(low) << size.shift());
            let first = first.expect("pages are in the address space");
            self.mark(HostRange::new(first, u64::from(count) << size.shift()));
            left &= !((u64::MAX >> (u64::BITS - count)) << low);
        }
    }

    /// How many pages were marked. One that was marked twice counts twice.
    pub fn finish(mut self) -> u64 {
        self.flush();
        self.pages
    }

    #[cold]
    fn look_up(&mut self, range: HostRange) {
        let set = self.set;
        for entry in &set.entries[set.first_ending_after(range.start())..] {
            if entry.tracked.range.start() >= range.end() {
                break;
            }
            if let Some(part) = entry.tracked.range.intersection(range) {
                self.add(entry, part);
            }
        }
    }

    #[inline]
    fn add(&mut self, entry: &'a Entry, part: HostRange) {
        let granules = entry.granules(part);
        let (first, count) = (granules.first().get(), granules.count());
        self.pages += count;
        let low = first % BITS;
        if low + count <= BITS {
            self.add_word(entry, first / BITS, (u64::MAX >> (BITS - count)) << low);
        } else {
            self.add_word(entry, first / BITS, 0);
            entry.bitmap.set(granules);
        }
    }

    #[inline]
    fn add_word(&mut self, entry: &'a Entry, word: u64, bits: u64) {
        if self.word != word || !self.entry.is_some_and(|last| std::ptr::eq(last, entry)) {
            self.flush();
            (self.entry, self.word) = (Some(entry), word);
        }
        self.bits |= bits;
    }

    #[inline]
    fn flush(&mut self) {
        let bits = std::mem::take(&mut self.bits);
        if let Some(entry) = self.entry {
            entry.bitmap.set_bits(GranuleIndex::new(self.word * BITS), bits);
        }
    }
}

impl Drop for Marker<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

impl fmt::Debug for Marker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Marker").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl fmt::Debug for DirtySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtySet")
            .field("ranges", &self.entries.len())
            .field("count", &self.count())
            .field("bytes", &self.bytes())
            .finish()
    }
}

#[cfg(test)]
mod tests;
