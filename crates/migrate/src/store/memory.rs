//! This process's own memory as what a server serves: the source of a post-copy.
#![allow(unsafe_code)]

use std::sync::Arc;

use pageferry_memory::{GranuleIndex, Layout, Mapping, Region, RegionId, State};

use super::{PageKind, PageStore, Placement, is_zero};
use crate::{
    Piece,
    core::{RegionInfo, WireSpan},
};

/// The memory of a [`Layout`], sent from where it lies.
///
/// The guest must not run any more: what it would still write may or may not be seen. A granule
/// that the region's page map holds for poisoned is served as poisoned, a discarded one as zero;
/// any other counts as being there.
#[derive(Debug)]
pub struct MemoryStore {
    layout: Arc<Layout>,
    regions: Vec<RegionInfo>,
}

/// Bytes looked at first: few pages begin with that many zeros without being all zero.
const PEEK: usize = 64;

impl MemoryStore {
    /// Serves all of `layout`.
    #[must_use]
    pub fn new(layout: Arc<Layout>) -> Self {
        let regions = layout
            .iter()
            .map(|(id, region)| RegionInfo {
                id: id.get(),
                flags: 0,
                guest_base: region.guest_base().get(),
                length: region.len(),
                granule: region.granule().bytes(),
                page_size: region.page_size().bytes(),
            })
            .collect();
        Self { layout, regions }
    }

    /// The layout served.
    #[must_use]
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn region(&self, id: u16) -> &Region {
        self.layout.get(RegionId::new(id)).expect("the server checks regions")
    }

    /// The view that never faults, if there is one.
    fn view(region: &Region) -> &Mapping {
        region.fill_view().unwrap_or_else(|| region.guest_view())
    }

    fn piece(region: &Region, offset: u64, length: u64) -> Piece<'_> {
        let view = Self::view(region);
        assert!(
            offset.checked_add(length).is_some_and(|end| end <= view.range().len()),
            "the server checks spans"
        );
        // SAFETY: within the mapping, which lives as long as the region it is borrowed from.
        unsafe { Piece::from_raw(view.as_ptr().wrapping_add(offset as usize), length as usize) }
    }

    fn kind(region: &Region, granule: u64) -> PageKind {
        match region.page_map().state(GranuleIndex::new(granule)) {
            State::Poisoned => return PageKind::Poisoned,
            State::Discarded => return PageKind::Zero,
            _ => {}
        }
        let size = region.granule().bytes();
        let view = Self::view(region);
        let mut bytes = [0; 4096];
        let mut at = 0;
        while at < size {
            let n = if at == 0 { PEEK } else { bytes.len().min((size - at) as usize) };
            if view.read_at(granule * size + at, &mut bytes[..n]).is_err() || !is_zero(&bytes[..n])
            {
                return PageKind::Data;
            }
            at += n as u64;
        }
        PageKind::Zero
    }
}

impl PageStore for MemoryStore {
    fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    fn load<'a>(
        &'a self,
        span: WireSpan,
        _buffer: &mut Vec<u8>,
        kinds: &mut Vec<PageKind>,
    ) -> Placement<'a> {
        let region = self.region(span.region);
        let size = region.granule().bytes();
        let count = u64::from(span.count);
        kinds.extend((span.first..span.first + count).map(|granule| Self::kind(region, granule)));
        Placement::InPlace(Self::piece(region, span.first * size, count * size))
    }

    fn probe(&self, region: u16, granule: u64) -> PageKind {
        Self::kind(self.region(region), granule)
    }

    fn load_part<'a>(
        &'a self,
        region: u16,
        granule: u64,
        offset: u64,
        length: usize,
        _buffer: &mut Vec<u8>,
    ) -> Option<Placement<'a>> {
        let region = self.region(region);
        let start = granule * region.granule().bytes() + offset;
        Some(Placement::InPlace(Self::piece(region, start, length as u64)))
    }
}
