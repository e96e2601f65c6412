//! Writes that KVM does not see.

use std::{fmt, sync::Arc};

use pageferry_memory::{DirtyBitmap, GranuleIndex, GranuleRange, GuestAddress};

use super::TRACKED_PAGE;
use crate::OnWrite;

/// The pages of a slot that somebody other than a vCPU has written since the last harvest: the VMM,
/// its devices, a pager that makes an emulated access. Cheap to clone; all clones are the same.
///
/// Mark after writing. A harvest that comes between the two does not report the page, and the next
/// one does.
///
/// With the feature `vm-memory` it is a `Bitmap` of that crate's, for a `GuestMemoryMmap` whose
/// regions are the slots.
#[derive(Clone)]
pub struct WriteMarks {
    bitmap: Arc<DirtyBitmap>,
    /// Where this clone's offset 0 is, in bytes.
    base: u64,
}

impl WriteMarks {
    /// For a slot of this many bytes.
    pub fn new(len: u64) -> Self {
        Self { bitmap: Arc::new(DirtyBitmap::new(len.div_ceil(TRACKED_PAGE))), base: 0 }
    }

    /// Marks the pages of `len` bytes from `offset` on. What lies beyond the end is ignored.
    pub fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let start = self.base.saturating_add(offset);
        let first = start / TRACKED_PAGE;
        let end = (start.saturating_add(len - 1) / TRACKED_PAGE + 1).min(self.bitmap.len());
        if first < end {
            self.bitmap.set(GranuleRange::new(GranuleIndex::new(first), end - first));
        }
    }

    /// Whether the page that has this byte is marked.
    pub fn is_marked(&self, offset: u64) -> bool {
        let page = self.base.saturating_add(offset) / TRACKED_PAGE;
        page < self.bitmap.len() && self.bitmap.test(GranuleIndex::new(page))
    }

    /// The same marks, of the bytes from `offset` on.
    #[must_use]
    pub fn skip(&self, offset: u64) -> Self {
        Self { bitmap: Arc::clone(&self.bitmap), base: self.base.saturating_add(offset) }
    }

    /// How many pages there are from this one's offset 0 on.
    pub(super) fn pages(&self) -> u64 {
        self.bitmap.len().saturating_sub(self.base / TRACKED_PAGE)
    }

    /// Removes all marks.
    pub(super) fn clear(&self) {
        self.bitmap.take_into(&mut Vec::new());
    }

    /// Removes all marks, and tells those from offset 0 on that are below `pages`.
    pub(super) fn take(&self, pages: u64, told: &mut dyn FnMut(GranuleRange)) {
        let mut runs = Vec::new();
        self.bitmap.take_into(&mut runs);
        let base = self.base / TRACKED_PAGE;
        for run in runs {
            let first = run.first().get().max(base) - base;
            let end = run.end().get().saturating_sub(base).min(pages);
            if first < end {
                told(GranuleRange::new(GranuleIndex::new(first), end - first));
            }
        }
    }
}

impl fmt::Debug for WriteMarks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteMarks")
            .field("bitmap", &self.bitmap)
            .field("base", &self.base)
            .finish()
    }
}

/// What to give to [`VmPagerOptions::on_write`](crate::VmPagerOptions::on_write), so that the writes
/// which the pager makes for its vCPUs are in these marks: for each slot, where the guest has it.
/// Marks in no particular order; a write in none of the slots is ignored.
pub fn on_write(slots: impl IntoIterator<Item = (GuestAddress, WriteMarks)>) -> OnWrite {
    let slots: Vec<_> = slots.into_iter().collect();
    Arc::new(move |guest, len| {
        for (start, marks) in &slots {
            let bytes = marks.pages() * TRACKED_PAGE;
            let Some(end) = guest.checked_add(len) else { continue };
            // The part of the write that lies in the slot.
            let from = guest.offset_from(*start).unwrap_or(0);
            let to = end.offset_from(*start).unwrap_or(0).min(bytes);
            if from < to {
                marks.mark(from, to - from);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(marks: &WriteMarks, pages: u64) -> Vec<u64> {
        let mut all = Vec::new();
        marks.take(pages, &mut |run| all.extend(run.iter().map(GranuleIndex::get)));
        all
    }

    #[test]
    fn marks_are_pages() {
        let marks = WriteMarks::new(10 * TRACKED_PAGE);
        for (offset, len) in [(0, 1), (4095, 2), (5 * 4096, 4096), (8 * 4096, 1 << 40), (9, 0)] {
            marks.mark(offset, len);
        }
        marks.mark(u64::MAX, u64::MAX);
        assert!(marks.is_marked(4096) && !marks.is_marked(2 * 4096) && !marks.is_marked(1 << 40));
        assert_eq!(taken(&marks, 10), [0, 1, 5, 8, 9]);
        assert_eq!(taken(&marks, 10), Vec::<u64>::new());
        // From page 4 on: 4 is page 0 there.
        let later = marks.skip(4 * TRACKED_PAGE);
        later.mark(TRACKED_PAGE, 1);
        marks.mark(0, 5 * TRACKED_PAGE);
        assert!(marks.is_marked(5 * TRACKED_PAGE));
        assert_eq!((later.pages(), taken(&later, 6)), (6, vec![0, 1]));
    }

    #[test]
    fn the_pagers_writes_go_to_their_slots() {
        let marks = [4, 2].map(|pages| WriteMarks::new(pages * TRACKED_PAGE));
        let at = |page: u64| GuestAddress::new(page * TRACKED_PAGE);
        let told = on_write([(at(16), marks[0].clone()), (at(20), marks[1].clone())]);
        for (guest, len) in [(at(16), 8), (at(20).checked_add(4092).unwrap(), 8), (at(40), 8)] {
            told(guest, len);
        }
        // Across the end of one and the beginning of the other, which are neighbours.
        told(GuestAddress::new(20 * TRACKED_PAGE - 4), 8);
        told(GuestAddress::new(16 * TRACKED_PAGE - 4), 4);
        assert_eq!((taken(&marks[0], 4), taken(&marks[1], 2)), (vec![0, 3], vec![0, 1]));
    }
}
