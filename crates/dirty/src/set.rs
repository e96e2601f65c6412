//! Which pages of some ranges are dirty.

use std::fmt;

use pageferry_memory::{DirtyBitmap, GranuleIndex, GranuleRange};
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
        let mut pages = 0;
        for entry in &self.entries[self.first_ending_after(range.start())..] {
            if entry.tracked.range.start() >= range.end() {
                break;
            }
            if let Some(part) = entry.tracked.range.intersection(range) {
                let granules = entry.granules(part);
                entry.bitmap.set(granules);
                pages += granules.count();
            }
        }
        pages
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
