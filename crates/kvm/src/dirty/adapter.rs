//! Marks as a bitmap of the `vm-memory` crate's. Nothing outside of this module names its types.

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use super::WriteMarks;

impl WithBitmapSlice<'_> for WriteMarks {
    type S = Self;
}

/// A clone of a region's bitmap, as `GuestMemoryRegion::bitmap` gives it, is what a
/// [`TrackedSlot`](super::TrackedSlot) takes.
impl BitmapSlice for WriteMarks {}

impl Bitmap for WriteMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_marked(offset as u64)
    }

    fn slice_at(&self, offset: usize) -> Self {
        self.skip(offset as u64)
    }
}

impl NewBitmap for WriteMarks {
    fn with_len(len: usize) -> Self {
        Self::new(len as u64)
    }
}

/// For no memory.
impl Default for WriteMarks {
    fn default() -> Self {
        Self::new(0)
    }
}
