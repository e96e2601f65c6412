//! A guest restored from a memory image while it runs: whatever the image has is served, whatever
//! it has not is a memory error, and nothing is ever made up.

mod common;

use std::{os::unix::fs::FileExt, sync::Arc, thread, time::Duration};

use common::*;
use pageferry::{
    image::RawImage,
    memory::{
        Advice, Backing, GranuleIndex, HostRange, ImageOffset, Layout, Region, RegionConfig, State,
    },
    paging::{Completion, Delivery, Pager, Prefetch, Status},
};

const DELIVERIES: [Delivery; 2] = [Delivery::Queue, Delivery::Signal];
const PREFETCHES: [Prefetch; 2] = [Prefetch::NONE, Prefetch::SWEEP];

/// Pages of the memory.
const PAGES: u64 = 256;
/// Pages of the image's hole.
const HOLE: std::ops::Range<u64> = 64..97;
/// Pages that the image has in full; of the next one it has a part.
const WHOLE: u64 = 200;

/// An image with a hole, too short for the memory.
fn short_image() -> RawImage {
    let file = tempfile::tempfile().unwrap();
    for number in (0..WHOLE).filter(|number| !HOLE.contains(number)) {
        file.write_all_at(&page(number), number * PAGE).unwrap();
    }
    file.write_all_at(&page(WHOLE)[..100], WHOLE * PAGE).unwrap();
    RawImage::from_file(file, "a short image").unwrap()
}

/// Pages that cannot be read, in [`unreadable_image`].
const UNREADABLE: std::ops::Range<u64> = 100..103;

/// This process's own memory as an image, with pages in it that no read gets over (EIO), and the
/// memory that takes its pages from there.
struct Unreadable {
    image: RawImage,
    layout: Layout,
    _image_memory: OwnMemory,
}

fn unreadable_image(backing: Backing) -> Unreadable {
    let memory = OwnMemory::new(PAGES, UNREADABLE, page);
    let mut config = RegionConfig::new(PAGES * PAGE, backing);
    config.image_offset = ImageOffset::new(memory.offset());
    let region = Region::new(&config).unwrap();
    Unreadable {
        image: RawImage::from_file_sized(memory.file(), "own memory", i64::MAX as u64),
        layout: Layout::new(vec![Arc::new(region)]).unwrap(),
        _image_memory: memory,
    }
}

fn start(layout: Layout, image: RawImage, delivery: Delivery, prefetch: Prefetch) -> Pager {
    Pager::builder(layout).delivery(delivery).prefetch(prefetch).start(Arc::new(image)).unwrap()
}

/// Several threads read these pages, each in an order of its own, and check every word.
fn read_by_guests(layout: &Layout, pages: &[u64], expected: impl Fn(u64) -> u64 + Sync) {
    thread::scope(|scope| {
        for thread in 0..4 {
            let expected = &expected;
            scope.spawn(move || {
                for index in shuffled(pages.len() as u64, thread) {
                    let start = pages[index as usize] * PAGE;
                    for offset in (start..start + PAGE).step_by(8) {
                        assert_eq!(peek(layout, offset), expected(offset), "{offset:#x}");
                    }
                }
            });
        }
    });
}

/// These pages, and no others, can never come: the engine says so to a component that asks first.
fn check_missing(pager: &Pager, missing: impl Fn(u64) -> bool) {
    let region = pager.layout().get(REGION).unwrap();
    let first = region.guest_view().range().start();
    for number in 0..PAGES {
        let come = pager.resolve(first.checked_add(number * PAGE).unwrap());
        assert_eq!(come, !missing(number), "page {number}");
        let state = region.page_map().state(GranuleIndex::new(number));
        let expected = if missing(number) { State::Poisoned } else { State::Present };
        assert_eq!(state, expected, "page {number}");
    }
}

fn expect_complete(pager: &Pager, missing: u64, case: &str) {
    let status = pager.wait_complete(PATIENCE);
    let granules_from_source = PAGES - missing;
    let counts = Completion { granules_from_source, granules_poisoned: missing };
    assert_eq!(status, Status::Complete(counts), "{case}");
}

#[test]
fn an_image_with_holes_shorter_than_the_memory() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let served: Vec<u64> = (0..WHOLE).collect();
    for delivery in DELIVERIES {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            for prefetch in PREFETCHES {
                let case = format!("{delivery} {backing} {prefetch:?}");
                let image = short_image();
                let pager = start(layout(backing, PAGES * PAGE), image, delivery, prefetch);
                read_by_guests(pager.layout(), &served, |offset| {
                    if HOLE.contains(&(offset / PAGE)) { 0 } else { word(offset) }
                });
                check_missing(&pager, |number| number >= WHOLE);
                expect_complete(&pager, PAGES - WHOLE, &case);
                let counts = pager.statistics().counts;
                assert_eq!(counts.zero, HOLE.end - HOLE.start, "{case}: a hole is not read");
                assert_eq!(counts.poisoned, PAGES - WHOLE, "{case}");
                assert_eq!(pager.last_error(), None, "{case}: the kernel refused nothing");
            }
        }
    }
}

#[test]
fn an_image_that_cannot_be_read_in_the_middle() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let served: Vec<u64> = (0..PAGES).filter(|number| !UNREADABLE.contains(number)).collect();
    for delivery in DELIVERIES {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            for prefetch in PREFETCHES {
                let case = format!("{delivery} {backing} {prefetch:?}");
                let Unreadable { image, layout, _image_memory } = unreadable_image(backing);
                let pager = start(layout, image, delivery, prefetch);
                read_by_guests(pager.layout(), &served, word);
                check_missing(&pager, |number| UNREADABLE.contains(&number));
                expect_complete(&pager, UNREADABLE.end - UNREADABLE.start, &case);
            }
        }
    }
}

#[test]
fn a_huge_page_that_the_image_does_not_fill() {
    if !userfaultfd() {
        return;
    }
    let Some(_huge_pages) = HugePages::reserve(4) else { return };
    let _watch = watch(60);
    let huge = 2 << 20;
    for delivery in DELIVERIES {
        let file = tempfile::tempfile().unwrap();
        for number in 0..2 * huge / PAGE {
            file.write_all_at(&page(number), number * PAGE).unwrap();
        }
        // A third page that is a hole, and a fourth that begins with data and is cut short.
        file.write_all_at(&page(0), 3 * huge).unwrap();
        let image = RawImage::from_file(file, "a short image").unwrap();
        let pager = start(layout(HUGE, 4 * huge), image, delivery, Prefetch::NONE);
        for offset in (0..3 * huge).step_by(1000 * 8) {
            let expected = if offset < 2 * huge { word(offset) } else { 0 };
            assert_eq!(peek(pager.layout(), offset), expected, "{delivery} {offset:#x}");
        }
        let region = pager.layout().get(REGION).unwrap();
        let last = region.guest_view().range().start().checked_add(3 * huge).unwrap();
        assert!(!pager.resolve(last), "{delivery}");
        assert_eq!(region.page_map().state(GranuleIndex::new(3)), State::Poisoned);
    }
}

/// What a guest sees that touches such a page: it dies of SIGBUS, and never sees zeros.
#[test]
fn a_page_that_the_image_has_not_is_a_memory_error() {
    const ME: &str = "a_page_that_the_image_has_not_is_a_memory_error";
    if let Some(case) = child::case() {
        let (delivery, rest) = case.split_once(' ').unwrap();
        let (swept, what) = rest.split_once(' ').unwrap();
        let delivery = DELIVERIES.into_iter().find(|d| d.to_string() == delivery).unwrap();
        let prefetch = if swept == "swept" { Prefetch::SWEEP } else { Prefetch::NONE };
        let Unreadable { image, layout: memory, _image_memory } =
            unreadable_image(Backing::Anonymous);
        let (pager, number) = match what {
            "unreadable" => (start(memory, image, delivery, prefetch), UNREADABLE.start + 1),
            "cut" => {
                let memory = layout(Backing::Anonymous, PAGES * PAGE);
                (start(memory, short_image(), delivery, prefetch), WHOLE)
            }
            _ => {
                let memory = layout(Backing::Memfd, PAGES * PAGE);
                (start(memory, short_image(), delivery, prefetch), PAGES - 1)
            }
        };
        if prefetch.sweep {
            // Poisoned before it is touched, not because it is.
            assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)));
        }
        touch_and_die(pager.layout(), number * PAGE + 8);
    }
    if !userfaultfd() {
        return;
    }
    for delivery in DELIVERIES {
        for swept in ["touched", "swept"] {
            for what in ["unreadable", "cut", "beyond"] {
                child::expect(ME, &format!("{delivery} {swept} {what}"), child::SIGBUS);
            }
        }
    }
}

/// Memory that the guest gives up reads as zero, also where the image had nothing.
#[test]
fn discarded_memory_is_zero_and_no_error() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let layout = layout(Backing::Anonymous, PAGES * PAGE);
    let pager = start(layout, short_image(), Delivery::Queue, Prefetch::NONE);
    let region = pager.layout().get(REGION).unwrap();
    let view = region.guest_view();
    let from = |number: u64| view.range().start().checked_add(number * PAGE).unwrap();
    // A page that came, some that did not, and the whole part that can never come.
    assert_eq!(peek(pager.layout(), 0), word(0));
    view.advise(HostRange::new(from(0), 4 * PAGE), Advice::DontNeed).unwrap();
    view.advise(HostRange::new(from(WHOLE), (PAGES - WHOLE) * PAGE), Advice::DontNeed).unwrap();
    for number in (0..4).chain(WHOLE..PAGES) {
        assert_eq!(peek(pager.layout(), number * PAGE), 0, "page {number}");
    }
    for number in 4..HOLE.start {
        assert_eq!(peek(pager.layout(), number * PAGE), word(number * PAGE), "page {number}");
    }
    assert_eq!(pager.wait_complete(Duration::ZERO), Status::Running, "the rest is not there");
}
