//! Regions on every backing, and layouts of them.
#![cfg(not(loom))]

use std::sync::Arc;

use pageferry_memory::{
    Backing, GranuleIndex, GranuleRange, GuestAddress, HostAddress, HostRange, HugePagePool,
    ImageOffset, Layout, LayoutError, Mapping, MappingError, PageSize, Region, RegionConfig,
    RegionError, RegionId, State, Thp,
};

const MIB: u64 = 1 << 20;

fn range(first: u64, count: u64) -> GranuleRange {
    GranuleRange::new(GranuleIndex::new(first), count)
}

fn has_huge_pages(size: PageSize, count: u64) -> bool {
    let available = HugePagePool::read(size).map_or(0, |pool| pool.available());
    if available < count {
        println!("skipped: needs {count} free huge pages of {size}");
    }
    available >= count
}

fn config(guest_base: u64, len: u64) -> RegionConfig {
    RegionConfig {
        guest_base: GuestAddress::new(guest_base),
        ..RegionConfig::new(len, Backing::Anonymous)
    }
}

/// Both views of a region show the same bytes, and all places agree.
fn check_views(backing: Backing, len: u64, granule: Option<PageSize>) {
    let region = Region::new(&RegionConfig {
        guest_base: GuestAddress::new(0x1_0000_0000),
        granule,
        image_offset: ImageOffset::new(0x5000),
        ..RegionConfig::new(len, backing)
    })
    .unwrap();
    let granule = region.granule();
    assert_eq!(region.backing(), backing);
    assert_eq!(region.granules() * granule.bytes(), len);
    assert_eq!(region.page_map().count(State::Absent), region.granules());

    let last = range(region.granules() - 1, 1);
    let host = region.host_range(last);
    assert_eq!(host.end(), region.guest_view().range().end());
    assert_eq!(host.len(), granule.bytes());
    let offset = len - granule.bytes();
    assert_eq!(region.image_range(last), (ImageOffset::new(0x5000 + offset), granule.bytes()));
    assert_eq!(region.guest_address(last.first()).get(), 0x1_0000_0000 + offset);
    assert_eq!(region.granule_at(HostAddress::new(host.end().get() - 1)), Some(last.first()));
    assert_eq!(region.granule_at(host.end()), None);

    let mut read = [0; 5];
    match region.fill_view() {
        Some(fill) => {
            assert_eq!(region.fill_range(last).unwrap().end(), fill.range().end());
            assert!(!fill.range().overlaps(region.guest_view().range()));
            fill.write_at(offset + 3, b"bytes").unwrap();
        }
        None => {
            assert_eq!(region.fill_range(last), None);
            region.guest_view().write_at(offset + 3, b"bytes").unwrap();
        }
    }
    region.guest_view().read_at(offset + 3, &mut read).unwrap();
    assert_eq!(&read, b"bytes");
}

#[test]
fn anonymous_memory_has_one_view() {
    check_views(Backing::Anonymous, 3 * MIB, None);
    check_views(Backing::Anonymous, 4 * MIB, PageSize::try_new(64 << 10));
}

#[test]
fn a_memfd_has_two_views() {
    check_views(Backing::Memfd, 3 * MIB, None);
    check_views(Backing::Memfd, 4 * MIB, Some(PageSize::SIZE_2M));
}

#[test]
fn hugetlb_has_two_views_and_reserves_once() {
    for size in [PageSize::SIZE_2M, PageSize::SIZE_1G] {
        // Two pages, and not four for two views.
        if has_huge_pages(size, 2) {
            check_views(Backing::Hugetlb(size), 2 * size.bytes(), None);
            check_views(Backing::Hugetlb(size), 2 * size.bytes(), Some(PageSize::SIZE_4K));
        }
    }
}

#[test]
fn too_few_huge_pages_are_an_error_at_once() {
    let size = PageSize::SIZE_2M;
    let Ok(pool) = HugePagePool::read(size) else {
        println!("skipped: needs a kernel with huge pages of {size}");
        return;
    };
    let len = (pool.total + 1_000_000) * size.bytes();
    let error = Region::new(&RegionConfig::new(len, Backing::Hugetlb(size))).unwrap_err();
    assert!(
        matches!(
            &error,
            RegionError::Mapping { source: MappingError::NotEnoughHugePages { .. }, .. }
        ),
        "{error}"
    );
}

#[test]
fn transparent_huge_pages_are_off_by_default() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        println!("skipped: needs a kernel with transparent huge pages");
        return;
    }
    let region = Region::new(&RegionConfig::new(4 * MIB, Backing::Anonymous)).unwrap();
    let start = region.guest_view().range().start();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let flags = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&format!("{:x}-", start.get())))
        .find_map(|line| line.strip_prefix("VmFlags:"))
        .unwrap();
    assert!(flags.split_whitespace().any(|flag| flag == "nh"), "{flags}");
    Region::new(&RegionConfig { thp: Thp::Always, ..config(0, 4 * MIB) }).unwrap();
}

#[test]
fn impossible_regions_are_refused() {
    let anonymous = config(0, MIB);
    let external = RegionConfig { backing: Backing::External, ..anonymous.clone() };
    let fill_view = RegionConfig { fill_view: true, ..anonymous.clone() };
    let vcpu_view = RegionConfig { vcpu_view: true, ..anonymous.clone() };
    let granule = RegionConfig { granule: Some(PageSize::SIZE_2M), ..anonymous.clone() };
    let image = RegionConfig { image_offset: ImageOffset::new(u64::MAX - MIB + 1), ..anonymous };
    type IsExpected = fn(&RegionError) -> bool;
    let cases: [(&str, RegionConfig, IsExpected); 9] = [
        ("empty", config(0, 0), |e| matches!(e, RegionError::Length { .. })),
        ("odd length", config(0, 4097), |e| matches!(e, RegionError::Length { .. })),
        ("granule", granule, |e| matches!(e, RegionError::Length { .. })),
        ("odd base", config(17, MIB), |e| matches!(e, RegionError::GuestBase { .. })),
        ("high base", config(!0xfff, MIB), |e| matches!(e, RegionError::GuestBase { .. })),
        ("high image", image, |e| matches!(e, RegionError::ImageOffset { .. })),
        ("fill view", fill_view, |e| matches!(e, RegionError::NoSecondView { view: "fill", .. })),
        ("vCPU view", vcpu_view, |e| matches!(e, RegionError::NoSecondView { view: "vCPU", .. })),
        ("external", external, |e| matches!(e, RegionError::ExternalBacking { .. })),
    ];
    for (name, config, is_expected) in cases {
        let error = Region::new(&config).unwrap_err();
        assert!(is_expected(&error), "{name}: {error}");
    }
}

#[test]
fn host_ranges_are_translated_to_granules() {
    let region =
        Region::new(&RegionConfig { granule: PageSize::try_new(16 << 10), ..config(0, MIB) })
            .unwrap();
    let view = region.guest_view().range();
    let part =
        |offset: u64, len: u64| HostRange::new(HostAddress::new(view.start().get() + offset), len);
    let kib = 1 << 10;
    for (host, touching, inside) in [
        (part(0, MIB), range(0, 64), range(0, 64)),
        (part(0, 1), range(0, 1), range(0, 0)),
        (part(16 * kib, 16 * kib), range(1, 1), range(1, 1)),
        (part(15 * kib, 18 * kib), range(0, 3), range(1, 1)),
        (part(17 * kib, 2 * kib), range(1, 1), range(2, 0)),
        (part(MIB - 1, 4096), range(63, 1), range(64, 0)),
        (part(MIB, 4096), range(0, 0), range(0, 0)),
    ] {
        assert_eq!(region.granules_touching(host), touching, "{host}");
        assert_eq!(region.granules_inside(host), inside, "{host}");
    }
    let beyond = HostRange::new(HostAddress::new(0), view.start().get() + 2 * MIB);
    assert_eq!(region.granules_inside(beyond), region.all_granules());
}

#[test]
fn granules_outside_have_no_place() {
    let region = Region::new(&config(0, MIB)).unwrap();
    for granules in [range(0, 257), range(256, 1), range(u64::MAX - 1, 1)] {
        assert_eq!(region.try_host_range(granules), None);
        assert_eq!(region.try_guest_address(granules.end()), None);
    }
    assert_eq!(region.host_range(range(256, 0)).len(), 0);
    let call = std::panic::AssertUnwindSafe(|| region.host_range(range(0, 257)));
    let panic = std::panic::catch_unwind(call).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("not all in a region of 256"));
}

/// A view of a part of a mapping, which keeps the whole alive.
fn part_of(whole: &Arc<Mapping>, offset: u64, len: u64) -> Arc<Mapping> {
    let (_, rest) = whole.range().split_at(offset);
    // SAFETY: the whole stays mapped while it is shared, and no reference to its bytes exists.
    Arc::new(unsafe { Mapping::from_raw(rest.split_at(len).0, whole.clone()) })
}

#[test]
fn an_embedders_views_are_checked() {
    let whole = Arc::new(Mapping::anonymous(4 * MIB).unwrap());
    let external = |guest, fill, page_size| {
        let zero = (GuestAddress::new(0), ImageOffset::new(0));
        Region::external(guest, fill, page_size, None, zero.0, zero.1)
    };
    let (base, huge) = (PageSize::SIZE_4K, PageSize::SIZE_2M);

    let region = external(part_of(&whole, 0, MIB), Some(part_of(&whole, MIB, MIB)), base).unwrap();
    assert_eq!(region.backing(), Backing::External);
    assert_eq!(region.granules(), 256);
    assert!(region.file().is_none());
    assert_eq!(region.fill_range(range(1, 1)).unwrap().start().get() & (MIB - 1), 4096);

    let error = external(part_of(&whole, MIB, 2 * MIB), None, huge).unwrap_err();
    assert!(matches!(error, RegionError::ViewAlignment { .. }), "{error}");
    let error = external(part_of(&whole, 0, MIB), None, huge).unwrap_err();
    assert!(matches!(error, RegionError::Length { .. }), "{error}");
    for fill in [part_of(&whole, MIB, 2 * MIB), part_of(&whole, MIB / 2, MIB)] {
        let error = external(part_of(&whole, 0, MIB), Some(fill), base).unwrap_err();
        assert!(matches!(error, RegionError::ViewMismatch { .. }), "{error}");
    }
}

#[test]
fn a_layout_finds_addresses() {
    let gib = 1 << 30;
    // Not in ascending order of guest addresses, and with a hole.
    let bases = [4 * gib, 0, 2 * MIB];
    let regions: Vec<_> =
        bases.iter().map(|base| Arc::new(Region::new(&config(*base, 2 * MIB)).unwrap())).collect();
    let layout = Layout::new(regions.clone()).unwrap();
    assert_eq!(layout.len(), 3);
    assert_eq!(layout.total_bytes(), 6 * MIB);
    assert_eq!(layout.total_granules(), 3 * 512);
    assert_eq!(layout.remaining(), 3 * 512);
    for (address, expected) in [
        (0, Some((1, 0))),
        (2 * MIB - 1, Some((1, 511))),
        (2 * MIB, Some((2, 0))),
        (4 * MIB - 1, Some((2, 511))),
        (4 * MIB, None),
        (4 * gib - 1, None),
        (4 * gib + 4096, Some((0, 1))),
        (u64::MAX, None),
    ] {
        let expected = expected.map(|(id, index)| (RegionId::new(id), GranuleIndex::new(index)));
        assert_eq!(layout.find_guest(GuestAddress::new(address)), expected, "{address:#x}");
    }
    for (id, region) in layout.iter() {
        let view = region.guest_view().range();
        let last = HostAddress::new(view.end().get() - 1);
        assert_eq!(layout.find_host(view.start()), Some((id, GranuleIndex::new(0))));
        assert_eq!(layout.find_host(last), Some((id, GranuleIndex::new(511))));
        assert!(Arc::ptr_eq(region, layout.get(id).unwrap()));
    }
    assert_eq!(layout.find_host(HostAddress::new(0)), None);
    assert_eq!(layout.find_host(HostAddress::new(u64::MAX)), None);
    assert!(layout.get(RegionId::new(3)).is_none());
}

#[test]
fn overlapping_regions_are_no_layout() {
    let region = |base| Arc::new(Region::new(&config(base, 2 * MIB)).unwrap());
    let error = Layout::new(vec![region(MIB), region(8 * MIB), region(0)]).unwrap_err();
    let (first, second) = (RegionId::new(2), RegionId::new(0));
    assert_eq!(error, LayoutError::GuestOverlap { first, second, at: GuestAddress::new(MIB) });

    let whole = Arc::new(Mapping::anonymous(4 * MIB).unwrap());
    let external = |guest, fill: Option<Arc<Mapping>>, base| {
        let (page, zero) = (PageSize::SIZE_4K, ImageOffset::new(0));
        let base = GuestAddress::new(base);
        Arc::new(Region::external(guest, fill, page, None, base, zero).unwrap())
    };
    let low = external(part_of(&whole, 0, MIB), Some(part_of(&whole, 2 * MIB, MIB)), 0);
    // The second guest view overlaps the first fill view.
    let high = external(part_of(&whole, 3 * MIB - 4096, MIB), None, MIB);
    let at = high.guest_view().range().start();
    let error = Layout::new(vec![low.clone(), high]).unwrap_err();
    let (first, second) = (RegionId::new(0), RegionId::new(1));
    assert_eq!(error, LayoutError::HostOverlap { first, second, at });

    let apart = external(part_of(&whole, MIB, MIB), None, MIB);
    Layout::new(vec![low, apart]).unwrap();
    assert!(Layout::new(Vec::new()).unwrap().is_empty());
}
