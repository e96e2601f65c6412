//! Memory of a guest, and the guest's accesses to it.

use std::sync::Arc;

use pageferry_memory::{
    Backing, GuestAddress, ImageOffset, Layout, PageSize, Region, RegionConfig, RegionId,
};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// The only region of a [`layout`].
pub const REGION: RegionId = RegionId::new(0);
/// Huge pages of 2 MiB.
pub const HUGE: Backing = Backing::Hugetlb(PageSize::SIZE_2M);

/// Memory of one region, with granules of its backing's page size.
pub fn layout(backing: Backing, bytes: u64) -> Layout {
    let region = Region::new(&RegionConfig::new(bytes, backing)).unwrap();
    Layout::new(vec![Arc::new(region)]).unwrap()
}

/// What a region of [`layout_of`] is like.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct RegionShape {
    /// How many granules it has.
    pub granules: u64,
    /// Bytes of a granule.
    pub granule: u64,
    /// Where its contents begin in an image, in bytes.
    pub image_offset: u64,
}

/// Anonymous memory of several regions, far apart in the guest.
pub fn layout_of(shapes: impl IntoIterator<Item = RegionShape>) -> Layout {
    let region = |(guest_base, shape): (u64, RegionShape)| {
        let mut config = RegionConfig::new(shape.granules * shape.granule, Backing::Anonymous);
        config.guest_base = GuestAddress::new(guest_base);
        config.granule = Some(PageSize::try_new(shape.granule).expect("a size of granules"));
        config.image_offset = ImageOffset::new(shape.image_offset);
        Arc::new(Region::new(&config).unwrap())
    };
    let bases = (0..).map(|number: u64| number << 40);
    Layout::new(bases.zip(shapes).map(region).collect()).unwrap()
}

/// Where the eight bytes at `offset` of [`REGION`] are in the guest's view, which has them.
#[track_caller]
fn at(layout: &Layout, offset: u64) -> *mut u64 {
    let view = layout.get(REGION).unwrap().guest_view();
    assert!(offset.is_multiple_of(8) && offset + 8 <= view.range().len());
    view.as_ptr().wrapping_add(offset as usize).cast()
}

/// Reads the eight bytes at `offset` of [`REGION`] as a guest would: in user mode, faulting.
#[track_caller]
pub fn peek(layout: &Layout, offset: u64) -> u64 {
    // SAFETY: `at` has checked that it is inside the mapping and aligned; the layout keeps it
    // mapped.
    unsafe { at(layout, offset).read_volatile() }
}

/// Writes the eight bytes at `offset` of [`REGION`] as a guest would: in user mode, faulting.
#[track_caller]
pub fn poke(layout: &Layout, offset: u64, value: u64) {
    // SAFETY: as in `peek`; tests that write concurrently write disjoint words.
    unsafe { at(layout, offset).write_volatile(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_as_wanted() {
        let shapes =
            [(3, 4096, 1 << 20), (2, 16384, 0)].map(|(granules, granule, image_offset)| {
                RegionShape { granules, granule, image_offset }
            });
        let layout = layout_of(shapes);
        let found = layout.iter().map(|(_, region)| RegionShape {
            granules: region.granules(),
            granule: region.granule().bytes(),
            image_offset: region.image_offset().get(),
        });
        assert_eq!(found.collect::<Vec<_>>(), shapes);
    }

    #[test]
    fn what_was_written_is_read() {
        let layout = layout(Backing::Anonymous, 2 * PAGE);
        poke(&layout, 2 * PAGE - 8, 7);
        assert_eq!([0, 2 * PAGE - 8].map(|offset| peek(&layout, offset)), [0, 7]);
    }

    #[test]
    #[should_panic(expected = "offset + 8 <=")]
    fn an_access_outside_is_refused() {
        peek(&layout(Backing::Anonymous, PAGE), PAGE);
    }
}
