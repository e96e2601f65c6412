use pageferry_memory::{Backing, Region, RegionConfig};

use super::*;

const PAGE: u64 = 4096;

/// Four pages at guest page 16, two at guest page 32.
fn slots() -> (Layout, Slots) {
    let region = |pages: u64, at: u64| {
        let config = RegionConfig {
            guest_base: GuestAddress::new(at * PAGE),
            ..RegionConfig::new(pages * PAGE, Backing::Anonymous)
        };
        Arc::new(Region::new(&config).unwrap())
    };
    let layout = Layout::new(vec![region(4, 16), region(2, 32)]).unwrap();
    let slots = Slots::new(&layout);
    (layout, slots)
}

fn slot(guest: u64, pages: u64, region: u16, offset: u64) -> Slot {
    Slot {
        guest: GuestAddress::new(guest * PAGE),
        len: pages * PAGE,
        region: RegionId::new(region),
        offset: offset * PAGE,
        read_only: false,
    }
}

#[test]
fn the_layout_is_there_from_the_start() {
    let (layout, slots) = slots();
    let host = layout.get(RegionId::new(0)).unwrap().kvm_view().range().start();
    // guest address, and region, granule, bytes left in the granule
    let cases = [
        (16 * PAGE - 1, None),
        (16 * PAGE, Some((0, 0, PAGE))),
        (17 * PAGE + 5, Some((0, 1, PAGE - 5))),
        (20 * PAGE - 1, Some((0, 3, 1))),
        (20 * PAGE, None),
        (33 * PAGE, Some((1, 1, PAGE))),
        (u64::MAX, None),
    ];
    for (guest, expected) in cases {
        let found = slots.find(GuestAddress::new(guest));
        let summary = found.map(|place| (place.region.get(), place.granule.get(), place.len));
        assert_eq!(summary, expected, "{guest:#x}");
        if let Some(place) = found {
            assert_eq!(slots.guest_address(place.host), Some(GuestAddress::new(guest)));
        }
    }
    let place = slots.find(GuestAddress::new(17 * PAGE + 5)).unwrap();
    assert_eq!(place.host, host.checked_add(PAGE + 5).unwrap());
    assert_eq!(slots.guest_address(host.checked_sub(1).unwrap()), None);
}

#[test]
fn slots_move_and_go() {
    let (_layout, slots) = slots();
    let mut snapshot = slots.snapshot();
    slots.set(0, slot(64, 2, 0, 2)).unwrap();
    assert!(snapshot.find(GuestAddress::new(16 * PAGE)).is_some(), "it is of before");
    snapshot.renew(&slots);
    assert_eq!(snapshot.find(GuestAddress::new(16 * PAGE)), None);
    let place = snapshot.find(GuestAddress::new(65 * PAGE + 1)).unwrap();
    assert_eq!((place.granule.get(), place.offset), (3, 3 * PAGE + 1));
    assert!(slots.remove(0));
    assert!(!slots.remove(0));
    assert_eq!(slots.find(GuestAddress::new(65 * PAGE)), None);
}

#[test]
fn what_cannot_be_is_refused() {
    let (_layout, slots) = slots();
    for (id, wrong) in [
        (2, slot(64, 5, 0, 0)),
        (2, slot(64, 1, 0, 4)),
        (2, slot(64, 0, 0, 0)),
        (2, slot(64, 1, 7, 0)),
        (2, Slot { offset: u64::MAX - 1, ..slot(64, 1, 0, 0) }),
        (2, Slot { guest: GuestAddress::new(u64::MAX - 1), ..slot(64, 1, 0, 0) }),
    ] {
        let refused = slots.set(id, wrong);
        assert!(matches!(refused, Err(KvmError::SlotOutsideRegion { .. })), "{wrong:?}");
    }
    let refused = slots.set(2, slot(19, 2, 1, 0));
    assert!(matches!(refused, Err(KvmError::SlotsOverlap { other: 0, .. })), "{refused:?}");
    // In its own place it may be set again, and elsewhere the same memory can be seen twice.
    slots.set(0, slot(17, 3, 0, 0)).unwrap();
    slots.set(3, slot(64, 4, 0, 0)).unwrap();
}
