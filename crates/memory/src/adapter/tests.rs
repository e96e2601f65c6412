use std::fs::File;
use std::os::fd::OwnedFd;

use vm_memory::{Bytes, FileOffset, GuestAddress as TheirAddress};

use super::*;
use crate::{
    GranuleIndex, HugePagePool, Layout, MemoryFile, MemoryFileKind, RegionConfig, RegionId, State,
};

const MIB: usize = 1 << 20;

fn regions_of(memory: &Arc<GuestMemoryMmap>) -> Result<Vec<Region>, AdapterError> {
    // SAFETY: the tests hold no references to the memory, and leave it mapped.
    unsafe { regions(memory, None, None) }
}

#[test]
fn regions_on_both_sides_of_a_hole() {
    let ranges = [(TheirAddress(0), 4 * MIB), (TheirAddress(4 << 30), 2 * MIB)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
    let ours = regions_of(&memory).unwrap();
    assert_eq!(ours.iter().map(Region::len).collect::<Vec<_>>(), [4 << 20, 2 << 20]);
    assert_eq!(ours[1].guest_base(), GuestAddress::new(4 << 30));
    assert_eq!(ours[1].image_offset(), ImageOffset::new(4 << 20));
    assert_eq!(ours[1].granules(), 512);
    assert_eq!(ours[0].page_map().count(State::Absent), 1024);

    memory.write_slice(b"pageferry", TheirAddress((4 << 30) + 8190)).unwrap();
    let layout = Layout::new(ours.into_iter().map(Arc::new).collect()).unwrap();
    let found = layout.find_guest(GuestAddress::new((4 << 30) + 8190)).unwrap();
    assert_eq!(found, (RegionId::new(1), GranuleIndex::new(1)));
    // The regions keep the memory alive.
    drop(memory);
    let mut read = [0; 9];
    layout.get(found.0).unwrap().guest_view().read_at(8190, &mut read).unwrap();
    assert_eq!(&read, b"pageferry");
}

fn memory_on(kind: MemoryFileKind, len: usize) -> Arc<GuestMemoryMmap> {
    let file = MemoryFile::create("vm-memory", len as u64, kind).unwrap();
    let fd: OwnedFd = file.fd().try_clone_to_owned().unwrap();
    let file = FileOffset::new(File::from(fd), 0);
    let ranges = [(TheirAddress(0), len, Some(file))];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

#[test]
fn a_memfd_has_base_pages() {
    let memory = memory_on(MemoryFileKind::Normal, MIB);
    let ours = regions_of(&memory).unwrap();
    assert_eq!(ours[0].page_size(), PageSize::base());
    assert_eq!(ours[0].granules(), 256);
}

#[test]
fn huge_pages_are_recognized() {
    let size = PageSize::SIZE_2M;
    if HugePagePool::read(size).map_or(0, |pool| pool.available()) < 2 {
        println!("skipped: needs 2 free huge pages of {size}");
        return;
    }
    let ours = regions_of(&memory_on(MemoryFileKind::Hugetlb(size), 4 * MIB)).unwrap();
    assert_eq!(ours[0].page_size(), size);
    assert_eq!(ours[0].granules(), 2);
}

fn region(base: u64, backing: Backing) -> Arc<Region> {
    let mut config = RegionConfig::new(64 << 10, backing);
    config.guest_base = GuestAddress::new(base);
    Arc::new(Region::new(&config).unwrap())
}

const HIGH: u64 = 4 << 30;
const LEN: u64 = 64 << 10;

#[test]
fn regions_in_any_order_are_one_guest_memory() {
    let regions = [region(HIGH, Backing::Memfd), region(0, Backing::Memfd)];
    let theirs = guest_memory(&regions, View::Guest).unwrap();
    let starts: Vec<u64> = theirs.iter().map(|region| region.start_addr().0).collect();
    assert_eq!(starts, [0, HIGH]);
    let found = theirs.find_region(TheirAddress(HIGH + 5)).unwrap();
    assert!(Arc::ptr_eq(found.region(), &regions[0]));
    assert_eq!((found.view(), found.len()), (View::Guest, LEN));
    assert_eq!(theirs.last_addr(), TheirAddress(HIGH + LEN - 1));

    // Written there, read here; and a layout's regions are as good as a slice's.
    theirs.write_slice(b"pageferry", TheirAddress(HIGH + 8190)).unwrap();
    let mut read = [0; 9];
    regions[0].guest_view().read_at(8190, &mut read).unwrap();
    assert_eq!(&read, b"pageferry");
    let layout = Layout::new(regions.to_vec()).unwrap();
    let of_layout = guest_memory(layout.iter().map(|(_, region)| region), View::Guest).unwrap();
    assert_eq!(of_layout.read_obj::<u8>(TheirAddress(HIGH + 8190)).unwrap(), b'p');
}

#[test]
fn accesses_end_where_a_region_ends() {
    let regions = [region(0, Backing::Anonymous), region(LEN, Backing::Anonymous)];
    let theirs = guest_memory(&regions, View::Guest).unwrap();
    // Neighbours in the guest, anywhere in the host.
    theirs.write_obj(0x0102_0304_0506_0708_u64, TheirAddress(LEN - 4)).unwrap();
    let mut halves = [[0; 4]; 2];
    regions[0].guest_view().read_at(LEN - 4, &mut halves[0]).unwrap();
    regions[1].guest_view().read_at(0, &mut halves[1]).unwrap();
    assert_eq!(halves, [[8, 7, 6, 5], [4, 3, 2, 1]]);

    assert!(theirs.write_obj(0_u64, TheirAddress(2 * LEN - 7)).is_err());
    assert!(theirs.read_obj::<u8>(TheirAddress(2 * LEN)).is_err());
    let low = theirs.find_region(TheirAddress(0)).unwrap();
    for (offset, count, good) in [
        (0, LEN, true),
        (LEN - 1, 1, true),
        (LEN, 0, true),
        (LEN - 1, 2, false),
        (LEN, 1, false),
        (u64::MAX, 2, false),
    ] {
        let slice = low.get_slice(MemoryRegionAddress(offset), count as usize);
        assert_eq!(slice.is_ok(), good, "{offset:#x} {count:#x}");
    }
    assert!(low.get_host_address(MemoryRegionAddress(LEN)).is_err());
    let host = low.get_host_address(MemoryRegionAddress(LEN - 1)).unwrap();
    assert_eq!(host, regions[0].guest_view().as_ptr().wrapping_add(LEN as usize - 1));
}

#[test]
fn views_are_those_asked_for() {
    let with_fill = region(0, Backing::Memfd);
    for (view, mapping) in
        [(View::Guest, with_fill.guest_view()), (View::Fill, with_fill.fill_view().unwrap())]
    {
        let theirs = guest_memory([&with_fill], view).unwrap();
        let host = theirs.get_host_address(TheirAddress(0)).unwrap();
        assert_eq!(host, mapping.as_ptr(), "{view:?}");
    }
    let without = [with_fill, region(HIGH, Backing::Anonymous)];
    let error = guest_memory(&without, View::Fill).unwrap_err();
    assert!(
        matches!(error, AdapterError::NoFillView { guest_base, .. } if guest_base.get() == HIGH),
        "{error}"
    );
}

#[test]
fn no_memory_and_overlapping_memory_are_refused() {
    let none = guest_memory([], View::Guest).unwrap_err();
    assert!(matches!(none, AdapterError::Regions { count: 0, .. }), "{none}");
    let regions = [region(0, Backing::Anonymous), region(LEN / 2, Backing::Anonymous)];
    let overlap = guest_memory(&regions, View::Guest).unwrap_err();
    assert!(matches!(overlap, AdapterError::Regions { count: 2, .. }), "{overlap}");
}

/// Whatever part of it somebody keeps keeps the memory mapped.
#[test]
fn the_memory_outlives_the_regions_handles() {
    let ours = region(0, Backing::Memfd);
    let alive = Arc::downgrade(&ours);
    let theirs = guest_memory([&ours], View::Fill).unwrap();
    drop(ours);
    theirs.write_obj(7_u64, TheirAddress(LEN - 8)).unwrap();
    let copy = theirs.clone();
    let (empty, kept) = {
        let other = region(HIGH, Backing::Memfd);
        let more = copy.insert_region(Arc::new(RegionMemory::new(&other, View::Fill, ()).unwrap()));
        more.unwrap().remove_region(TheirAddress(0), LEN).unwrap()
    };
    drop((theirs, copy, empty));
    let slice = kept.get_slice(MemoryRegionAddress(LEN - 8), 8).unwrap();
    assert_eq!(slice.read_obj::<u64>(0).unwrap(), 7);
    assert!(alive.upgrade().is_some());
    drop(kept);
    assert!(alive.upgrade().is_none(), "nothing keeps it any more");
}

/// Remembers what was marked.
#[derive(Clone, Debug)]
struct Marks(Arc<std::sync::Mutex<Vec<(usize, usize)>>>, usize);

impl vm_memory::bitmap::WithBitmapSlice<'_> for Marks {
    type S = Self;
}

impl vm_memory::bitmap::BitmapSlice for Marks {}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.lock().unwrap().push((self.1 + offset, len));
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let marks = self.0.lock().unwrap();
        marks.iter().any(|(start, len)| (*start..start + len).contains(&(self.1 + offset)))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self(Arc::clone(&self.0), self.1 + offset)
    }
}

#[test]
fn writes_are_marked_at_offsets_of_their_region() {
    let regions = [region(0, Backing::Anonymous), region(HIGH, Backing::Anonymous)];
    let new = |_: &Arc<Region>| Marks(Arc::default(), 0);
    let theirs = guest_memory_with(&regions, View::Guest, new).unwrap();
    theirs.write_slice(&[1; 10], TheirAddress(HIGH + 100)).unwrap();
    theirs.read_obj::<u64>(TheirAddress(HIGH)).unwrap();
    let marks = |at: u64| {
        let region = theirs.find_region(TheirAddress(at)).unwrap();
        region.bitmap().0.lock().unwrap().clone()
    };
    assert_eq!((marks(0), marks(HIGH)), (vec![], vec![(100, 10)]));
    assert!(theirs.find_region(TheirAddress(HIGH)).unwrap().bitmap().dirty_at(109));
}
