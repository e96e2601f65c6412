//! What a server serves.

mod image;
mod memory;

pub use image::ImageStore;
pub use memory::MemoryStore;

use crate::{
    Piece,
    core::{RegionInfo, WireSpan},
};

/// What a granule is at the source.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum PageKind {
    /// Has bytes.
    Data,
    /// Is all zero.
    Zero,
    /// Cannot be read, for good.
    Poisoned,
}

/// Where a store has put the bytes of a span.
#[derive(Copy, Clone, Debug)]
pub enum Placement<'a> {
    /// At the end of the buffer that was handed in.
    Buffer,
    /// Here, where they always are; nothing was copied and nothing was waited for.
    InPlace(Piece<'a>),
}

/// Memory that a [`PageServer`](crate::PageServer) serves. Called from several threads at once.
///
/// Spans and parts handed in lie within the regions stated.
pub trait PageStore: Send + Sync {
    /// The regions, by ascending id. Always the same.
    fn regions(&self) -> &[RegionInfo];

    /// Looks at every granule of `span`: appends one entry each to `kinds`, and either appends
    /// the bytes of the whole span to `buffer` or says where they lie. Bytes of granules that are
    /// not [`PageKind::Data`] do not matter, but take their place.
    ///
    /// The span has at most the session's payload bound in bytes.
    fn load<'a>(
        &'a self,
        span: WireSpan,
        buffer: &mut Vec<u8>,
        kinds: &mut Vec<PageKind>,
    ) -> Placement<'a>;

    /// What a granule too large for one frame is, as far as can be said without reading all of
    /// it: `Data` when in doubt.
    fn probe(&self, region: u16, granule: u64) -> PageKind;

    /// `length` bytes from `offset` on of one granule too large for one frame, as
    /// [`load`](Self::load); `None` if they cannot be read.
    fn load_part<'a>(
        &'a self,
        region: u16,
        granule: u64,
        offset: u64,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Option<Placement<'a>>;
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    // Block by block without a branch inside, so that it becomes vector instructions.
    chunks.iter().all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}
