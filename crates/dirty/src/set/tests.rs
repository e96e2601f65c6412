use std::collections::BTreeSet;

use pageferry_memory::PageSize;
use proptest::prelude::*;

use super::*;

const PAGE: u64 = 4096;

fn range(start: u64, len: u64) -> HostRange {
    HostRange::new(HostAddress::new(start), len)
}

fn tracked(start: u64, len: u64, page: u64) -> Tracked {
    Tracked { range: range(start, len), page: PageSize::try_new(page).unwrap() }
}

/// Two ranges side by side, a gap, and one of large pages.
fn shapes() -> [Tracked; 3] {
    [
        tracked(0x10000, 0x8000, PAGE),
        tracked(0x18000, 0x4000, PAGE),
        tracked(0x40000, 0x40000, 0x10000),
    ]
}

#[test]
fn ranges_are_sorted_and_apart() {
    let mut shapes = shapes();
    shapes.reverse();
    let mut set = DirtySet::new(&shapes).unwrap();
    assert!(set.ranges().map(|tracked| tracked.range.start()).is_sorted());
    for bad in [tracked(0x17000, 0x1000, PAGE), tracked(0, 0x11000, PAGE)] {
        assert!(matches!(set.add(bad), Err(DirtyError::Overlaps { .. })), "{bad:?}");
    }
    assert!(matches!(set.add(tracked(0x1800, PAGE, PAGE)), Err(DirtyError::Unaligned { .. })));
    assert!(matches!(set.add(tracked(0, 0, PAGE)), Err(DirtyError::Unaligned { .. })));
    set.add(tracked(0xf000, 0x1000, PAGE)).unwrap();
    assert_eq!(set.ranges().len(), 4);
}

#[test]
fn what_is_covered() {
    let set = DirtySet::new(&shapes()).unwrap();
    for (start, len, covered) in [
        (0x10000, 0x8000, true),
        (0x10000, 0xc000, true),
        (0x17fff, 2, true),
        (0xffff, 2, false),
        (0x1bfff, 2, false),
        (0x1c000, 1, false),
        (0x10000, 0x40000, false),
        (0x7ffff, 1, true),
        (0x7ffff, 2, false),
        (0x90000, 1, false),
    ] {
        assert_eq!(set.covers(range(start, len)), covered, "{start:#x} {len:#x}");
    }
}

#[test]
fn runs_end_where_ranges_do() {
    let set = DirtySet::new(&shapes()).unwrap();
    assert_eq!(set.mark(range(0x17000, 0x2000)), 2);
    assert_eq!(set.mark(range(0x5ffff, 2)), 2);
    assert_eq!(set.mark(range(0x30000, 0x100)), 0);
    assert_eq!((set.count(), set.bytes()), (4, 2 * PAGE + 0x20000));
    let mut runs = Vec::new();
    assert_eq!(set.take_into(&mut runs), 2 * PAGE + 0x20000);
    assert_eq!(runs, [range(0x17000, PAGE), range(0x18000, PAGE), range(0x50000, 0x20000)]);
    assert_eq!((set.count(), set.take()), (0, vec![]));
}

#[test]
fn sets_of_other_ranges_are_not_merged() {
    let set = DirtySet::new(&shapes()).unwrap();
    let other = DirtySet::new(&[shapes()[1], tracked(0x10000, 0x4000, PAGE)]).unwrap();
    other.mark(range(0, 1 << 20));
    assert!(matches!(set.merge(&other), Err(DirtyError::NotInSet { .. })));
    assert_eq!(set.count(), 0, "nothing is marked");
    let part = DirtySet::new(&shapes()[2..]).unwrap();
    part.mark(range(0x40000, 1));
    set.merge(&part).unwrap();
    assert_eq!((set.take(), part.count()), (vec![range(0x40000, 0x10000)], 1));
}

#[test]
fn what_was_marked_is_there_when_the_marker_has_gone() {
    let set = DirtySet::new(&shapes()).unwrap();
    let mut marker = set.marker();
    marker.mark(range(0x11000, 1));
    marker.mark(range(0x13000, 1));
    drop(marker);
    assert_eq!(set.take(), [range(0x11000, PAGE), range(0x13000, PAGE)]);
    let lost = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut marker = set.marker();
        marker.mark(range(0x11000, 1));
        panic!("on purpose");
    }));
    assert!(lost.is_err());
    assert_eq!(set.take(), [range(0x11000, PAGE)]);
}

proptest! {
    /// Words of any place and page size against the pages they stand for.
    #[test]
    fn words_are_the_pages_of_their_bits(
        words in prop::collection::vec((0u64..0x90, any::<u64>(), any::<u64>(), any::<bool>()), 1..8),
    ) {
        // The first is of more pages than a word has.
        let shapes = [tracked(0, 0x50000, PAGE), tracked(0x50000, 0x40000, 0x10000)];
        let (set, expected) = (DirtySet::new(&shapes).unwrap(), DirtySet::new(&shapes).unwrap());
        let (mut marker, mut pages) = (set.marker(), 0);
        for (page, one, other, large) in words {
            let size = if large { 0x2000 } else { PAGE };
            // Some are all set, some none, most a quarter.
            let bits = if one % 8 == 0 { u64::MAX } else { one & other };
            marker.mark_word(HostAddress::new(page * PAGE), PageSize::try_new(size).unwrap(), bits);
            for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                pages += expected.mark(range(page * PAGE + bit * size, size));
            }
        }
        // One that several bits are in counts as often at most.
        prop_assert!(marker.finish() <= pages);
        prop_assert_eq!(set.take(), expected.take());
    }

    /// The set against the plain truth: a set of page addresses.
    #[test]
    fn marks_are_those_of_the_pages(
        marks in prop::collection::vec((0u64..0x90000, 0u64..0x20000), 0..12),
        merged in prop::collection::vec((0u64..0x90000, 1u64..0x2000), 0..6),
    ) {
        let shapes = shapes();
        let (set, other) = (DirtySet::new(&shapes).unwrap(), DirtySet::new(&shapes).unwrap());
        let mut expected = BTreeSet::new();
        for (target, marks) in [(&set, &marks), (&other, &merged)] {
            for &(start, len) in marks {
                let mut pages = 0;
                for shape in &shapes {
                    for page in 0..shape.pages() {
                        let page = shape.range.skip(page * shape.page.bytes());
                        let page = page.take(shape.page.bytes());
                        if page.overlaps(range(start, len)) {
                            expected.insert((page.start().get(), page.len()));
                            pages += 1;
                        }
                    }
                }
                prop_assert_eq!(target.mark(range(start, len)), pages);
            }
        }
        set.merge(&other).unwrap();
        prop_assert_eq!(set.count(), expected.len() as u64);
        prop_assert_eq!(set.bytes(), expected.iter().map(|&(_, len)| len).sum::<u64>());
        for address in (0..0x90000).step_by(0x800) {
            let marked = expected.iter().any(|&(start, len)| (start..start + len).contains(&address));
            prop_assert_eq!(set.test(HostAddress::new(address)), marked, "{:#x}", address);
        }
        let runs = set.take();
        prop_assert!(runs.is_sorted_by_key(|run| run.start()));
        let mut taken = BTreeSet::new();
        for run in runs {
            let page = set.range_at(run.start()).unwrap().page.bytes();
            for offset in (0..run.len()).step_by(page as usize) {
                prop_assert!(taken.insert((run.start().get() + offset, page)));
            }
        }
        prop_assert_eq!(taken, expected);
        prop_assert_eq!(set.count(), 0);
    }
}
