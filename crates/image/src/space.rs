//! Ranges of an image's positions.

use std::fmt;

use pageferry_memory::{HostRange, ImageOffset};
use pageferry_uffd::range_type;

range_type! {
    /// A range of positions in an image, `[start, start + len)`, that does not wrap. It may be
    /// empty.
    ///
    /// In the image of a process, a position is the virtual address the memory had there. In that
    /// of a guest, it is what the regions of its layout say
    /// ([`Region::image_range`](pageferry_memory::Region::image_range)).
    pub struct ImageRange { start: ImageOffset, len: u64 } in bytes
}

impl ImageRange {
    /// All positions there are.
    pub const ALL: Self = Self::new(ImageOffset::new(0), u64::MAX);
}

impl fmt::Display for ImageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{} ({} bytes)", self.start, self.end(), self.len)
    }
}

impl From<HostRange> for ImageRange {
    /// Where memory at these addresses of a process lies in an image of that process.
    fn from(range: HostRange) -> Self {
        Self::new(ImageOffset::new(range.start().get()), range.len())
    }
}
