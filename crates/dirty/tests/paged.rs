//! Writes are noticed in memory that is just being brought by a pager.

mod common;

use std::{num::NonZeroUsize, sync::Arc};

use common::{
    field::{Field, Writers},
    harvest, pages,
};
use pageferry_dirty::{
    DirtyError, DirtySet, Method, Notice, PagedTracker, PagedWrites, Tracked, Tracker,
};
use pageferry_memory::{Advice, Backing, HostAddress, HostRange, Mapping};
use pageferry_paging::{
    Delivery, PageSink, PageSource, Pager, Prefetch, SourceError, Span, Urgency, WriteTracking,
};
use pageferry_testing::{HUGE, HugePages, PATIENCE, REGION, features, layout, watch};
use pageferry_uffd::Features;

/// Pages that contain a 0, and then this.
const FILL: u8 = 0xa5;

#[derive(Debug)]
struct Source;

impl PageSource for Source {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let region = sink.layout().get(span.region).expect("a region of the layout");
        let granule = region.granule().bytes() as usize;
        let mut bytes = vec![FILL; granule * span.granules.count() as usize];
        bytes.chunks_mut(granule).for_each(|page| page[..8].fill(0));
        // The pager says itself what goes wrong with it.
        let _ = sink.page(span, &bytes);
        Ok(())
    }

    fn detach(&self) {}
}

struct Guest {
    pager: Arc<Pager>,
    writes: Arc<PagedWrites>,
    view: Arc<Mapping>,
    tracked: Tracked,
}

impl Guest {
    fn new(backing: Backing, tracking: WriteTracking, delivery: Delivery, sweep: bool) -> Self {
        let layout = layout(backing, if backing == HUGE { 8 << 21 } else { 1200 << 12 });
        let region = Arc::clone(layout.get(REGION).unwrap());
        let view = Arc::clone(region.guest_view());
        let writes = Arc::new(PagedWrites::new());
        let pager = Pager::builder(layout)
            .delivery(delivery)
            .prefetch(if sweep { Prefetch::SWEEP } else { Prefetch::NONE })
            .write_tracking(tracking)
            .write_observer(Arc::clone(&writes) as _)
            .start(Arc::new(Source))
            .unwrap();
        let tracked = Tracked { range: view.range(), page: region.page_size() };
        Self { pager: Arc::new(pager), writes, view, tracked }
    }

    fn tracker(&self) -> PagedTracker {
        PagedTracker::new(Arc::clone(&self.pager), Arc::clone(&self.writes)).unwrap()
    }

    fn offset(&self, page: u64) -> u64 {
        page * self.tracked.page.bytes()
    }

    fn write(&self, page: u64) {
        self.view.write_at(self.offset(page) + 16, &[7]).unwrap();
    }

    fn read(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.view.read_at(self.offset(page) + 16, &mut byte).unwrap();
        byte[0]
    }

    fn pages(&self, first: u64, count: u64) -> HostRange {
        pages(self.tracked, first, count)
    }
}

/// Runs a test with everything that goes together.
fn each(test: impl Fn(&str, &dyn Fn(bool) -> Guest)) {
    let huge = HugePages::reserve(16);
    // From when it is its turn to have them. On an emulated machine each case takes long.
    let _watch = watch(600);
    let mut backings = vec![Backing::Anonymous, Backing::Memfd];
    backings.extend(huge.is_some().then_some(HUGE));
    let kinds = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
    for (tracking, needed) in [
        (WriteTracking::Asynchronous, kinds | Features::WP_ASYNC),
        (WriteTracking::Blocking, kinds),
    ] {
        if !features(needed) {
            continue;
        }
        for &backing in &backings {
            for delivery in [Delivery::Queue, Delivery::Sharded(2)] {
                let what = format!("{tracking:?}, {backing}, {delivery}");
                test(&what, &|sweep| Guest::new(backing, tracking, delivery, sweep));
            }
        }
    }
}

#[test]
fn what_comes_is_not_dirty_and_what_is_then_written_is() {
    each(|what, guest| {
        let guest = guest(false);
        let mut tracker = guest.tracker();
        tracker.arm(&[guest.tracked]).unwrap();
        let set = DirtySet::new(&[guest.tracked]).unwrap();
        let mut harvest = || harvest(&mut tracker, &set);
        assert_eq!(harvest(), [], "{what}: nothing has come");
        assert_eq!(guest.read(3), FILL);
        assert_eq!(harvest(), [], "{what}: a page came");
        guest.write(3);
        guest.write(6);
        let expected = [guest.pages(3, 1), guest.pages(6, 1)];
        assert_eq!(harvest(), expected, "{what}: one that was there, one that came for it");
        assert_eq!(harvest(), [], "{what}");
        guest.write(3);
        assert_eq!(harvest(), [guest.pages(3, 1)], "{what}: again");
        assert_eq!((guest.read(3), guest.read(2), guest.read(6)), (7, FILL, 7), "{what}");
    });
}

#[test]
fn no_write_is_lost_while_memory_comes() {
    each(|what, guest| {
        for sweep in [false, true] {
            let guest = guest(sweep);
            let mut tracker = guest.tracker();
            tracker.arm(&[guest.tracked]).unwrap();
            let mut writers = Writers::start(&guest.view, guest.tracked);
            let done = HostAddress::from_ptr(writers.done.as_ptr());
            let mut field = Field::new(std::process::id(), guest.tracked, done);
            field.view = Some(Arc::clone(&guest.view));
            // The memory has come long before, but for the first of them.
            field.harvests = 200;
            field.check(&format!("{what}, sweep {sweep}"), &mut tracker, || writers.stop());
            for page in 0..guest.tracked.pages() {
                assert_eq!(guest.read(page), FILL, "{what}: what came is whole");
            }
        }
    });
}

#[test]
fn what_is_removed_is_reported() {
    each(|what, guest| {
        let guest = guest(false);
        let mut tracker = guest.tracker();
        tracker.arm(&[guest.tracked]).unwrap();
        let set = DirtySet::new(&[guest.tracked]).unwrap();
        for page in 0..4 {
            guest.write(page);
        }
        harvest(&mut tracker, &set);
        let gone = guest.pages(1, 2);
        guest.view.advise(gone, Advice::DontNeed).unwrap();
        let found = harvest(&mut tracker, &set);
        assert!(found.iter().any(|run| run.contains_range(gone)), "{what}: {found:?}");
        // Once more, since the pager tells of it beforehand; and then no more.
        harvest(&mut tracker, &set);
        assert_eq!(harvest(&mut tracker, &set), [], "{what}");
        guest.write(2);
        let found = harvest(&mut tracker, &set);
        assert!(found.iter().any(|run| run.contains_range(guest.pages(2, 1))), "{what}: {found:?}");
    });
}

#[test]
fn blocking_tells_of_each_write() {
    each(|what, guest| {
        let guest = guest(false);
        let mut tracker = guest.tracker();
        let events = guest.writes.events(NonZeroUsize::new(2).unwrap());
        tracker.arm(&[guest.tracked]).unwrap();
        guest.read(1);
        guest.write(1);
        if tracker.method() == Method::WpAsync {
            assert!(events.try_next().is_err(), "{what}");
            return;
        }
        let Ok(Notice::Write(event)) = events.next_within(PATIENCE) else {
            panic!("{what}: no event")
        };
        assert_eq!(event.address, guest.pages(1, 1).start(), "{what}");
        for page in 2..6 {
            guest.write(page);
        }
        let told: Vec<_> = std::iter::from_fn(|| events.try_next().ok()).collect();
        assert_eq!(told.len(), 3, "{what}: {told:?}");
        assert_eq!(told[2], Notice::Whole(guest.tracked.range), "{what}");
    });
}

#[test]
fn ranges_are_added_and_those_of_others_refused() {
    each(|what, guest| {
        let guest = guest(false);
        let mut tracker = guest.tracker();
        let part = |first, count| Tracked { range: guest.pages(first, count), ..guest.tracked };
        tracker.arm(&[part(0, 2)]).unwrap();
        guest.write(1);
        tracker.arm(&[part(2, 2)]).unwrap();
        guest.write(3);
        let error = tracker.arm(&[part(3, 2)]).unwrap_err();
        assert!(matches!(error, DirtyError::Overlaps { .. }), "{what}: {error}");
        let other = Mapping::anonymous(4 << 20).unwrap();
        let other = Tracked { range: other.range(), ..guest.tracked };
        let error = tracker.arm(&[other]).unwrap_err();
        assert!(matches!(error, DirtyError::NotOwned { .. }), "{what}: {error}");
        let set = DirtySet::new(tracker.ranges()).unwrap();
        let expected = [guest.pages(1, 1), guest.pages(3, 1)];
        assert_eq!(harvest(&mut tracker, &set), expected, "{what}");
        tracker.disarm().unwrap();
        assert!(tracker.ranges().is_empty());
        guest.write(1);
        assert_eq!(guest.read(1), 7, "{what}");
    });
}

#[test]
fn a_pager_without_tracking_is_refused() {
    if !pageferry_testing::userfaultfd() {
        return;
    }
    let guest = Guest::new(Backing::Anonymous, WriteTracking::Off, Delivery::Queue, false);
    let error = PagedTracker::new(guest.pager, guest.writes).unwrap_err();
    assert!(matches!(error, DirtyError::Missing { .. }), "{error}");
}
