//! What becomes of a granule that can never come where the kernel cannot poison it: it is made
//! inaccessible, so that threads get SIGSEGV and system calls EFAULT, and nobody waits for ever or
//! sees zeros. Run with a userfaultfd without POISON; on Linux before 6.6 there is no other.

mod common;

use std::{sync::Arc, thread};

use common::{
    child,
    external::{Kind, Reservation, external, read, read_by_kernel},
    *,
};
use pageferry_memory::{
    Advice, Backing, GranuleRange, HostAddress, Layout, Region, RegionConfig, State,
};
use pageferry_paging::{Completion, Delivery, Events, Pager, Prefetch, Status};
use pageferry_uffd::{Errno, Features};

const GRANULES: u64 = 16;
const BAD: u64 = 5;

fn start_with(
    layout: Layout,
    delivery: Delivery,
    events: Events,
    ledger: Ledger,
    prefetch: Prefetch,
) -> (Arc<Ledger>, Pager) {
    let (ledger, source) = ledger.source();
    let pager = Pager::builder(layout)
        .without_features(Features::POISON)
        .delivery(delivery)
        .events(events)
        .prefetch(prefetch)
        .start(source)
        .unwrap();
    assert!(!pager.chosen().features.contains(Features::POISON));
    (ledger, pager)
}

fn layout_for(backing: Backing) -> Layout {
    layout(backing, GRANULES * if backing == HUGE { 2 << 20 } else { 4096 })
}

fn size_of(pager: &Pager) -> u64 {
    pager.layout().get(REGION).unwrap().granule().bytes()
}

fn host(pager: &Pager, granule: u64) -> HostAddress {
    let view = pager.layout().get(REGION).unwrap().guest_view().range();
    view.start().checked_add(granule * size_of(pager)).unwrap()
}

fn read_good_ones(pager: &Pager) {
    let size = size_of(pager);
    for granule in (0..GRANULES).filter(|granule| *granule != BAD) {
        for offset in [granule * size, (granule + 1) * size - 8] {
            assert_eq!(peek(pager.layout(), offset), word(REGION, offset));
        }
    }
}

/// What memory is tried, and the huge pages for it, to be kept for so long.
fn backings() -> (Vec<Backing>, Option<HugePages>) {
    let mut backings = vec![Backing::Anonymous, Backing::Memfd];
    let pages = HugePages::reserve(GRANULES);
    backings.extend(pages.is_some().then_some(HUGE));
    (backings, pages)
}

#[test]
fn what_the_source_poisons_is_inaccessible_and_the_rest_is_right() {
    if !userfaultfd() {
        return;
    }
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for &backing in &backings {
            for events in [Events::Watch, Events::Ignore] {
                let case = format!("{delivery} {backing} {events:?}");
                let ledger = Ledger::new(GRANULES, Answers::Threaded).with_poisoned(BAD);
                let (ledger, pager) =
                    start_with(layout_for(backing), delivery, events, ledger, Prefetch::SWEEP);
                read_good_ones(&pager);
                let agreed =
                    Completion { granules_from_source: GRANULES - 1, granules_poisoned: 1 };
                assert_eq!(pager.wait_complete(PATIENCE), Status::Complete(agreed), "{case}");
                let counts = pager.statistics().counts;
                assert_eq!(
                    (counts.poisoned, counts.closed, counts.installed),
                    (1, 1, GRANULES - 1),
                    "{case}"
                );
                assert_eq!(pager.last_error(), None, "{case}");
                let bad = host(&pager, BAD);
                assert!(!pager.resolve(bad), "{case}");
                assert_eq!(read_by_kernel(bad), Err(Errno::FAULT), "{case}");
                read_good_ones(&pager);
                ledger.check_once();
                // It stays an error when nobody serves the memory any more, and the rest stays.
                let layout = pager.layout().clone();
                let last = host(&pager, GRANULES - 1);
                drop(pager);
                assert_eq!(read_by_kernel(bad), Err(Errno::FAULT), "{case}");
                let offset = (GRANULES - 1) * layout.get(REGION).unwrap().granule().bytes();
                assert_eq!(read_by_kernel(last), Ok(word(REGION, offset)), "{case}");
            }
        }
    }
}

fn touch_what_cannot_come(delivery: Delivery, backing: Backing, moment: &str) {
    child::end_if_stuck();
    let ledger = Ledger::new(GRANULES, Answers::Threaded).with_poisoned(BAD);
    let (ledger, pager) =
        start_with(layout_for(backing), delivery, Events::Watch, ledger, Prefetch::NONE);
    let address = host(&pager, BAD);
    match moment {
        "first" => {
            read_good_ones(&pager);
            child::reached();
            child::saw(read(address));
        }
        "again" => {
            assert!(!pager.resolve(address));
            read_good_ones(&pager);
            child::reached();
            child::saw(read(address));
        }
        "waiting" => {
            ledger.hold();
            thread::spawn(move || child::saw(read(address)));
            wait_for("a request", || ledger.asked_of(BAD) == 1);
            child::reached();
            ledger.release();
            thread::park_timeout(PATIENCE);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn touching_it_is_a_segmentation_fault() {
    const NAME: &str = "touching_it_is_a_segmentation_fault";
    if let Some(case) = child::case() {
        let parts: Vec<&str> = case.split('/').collect();
        let backing =
            [Backing::Anonymous, Backing::Memfd, HUGE][parts[1].parse::<usize>().unwrap()];
        return touch_what_cannot_come(delivery_named(parts[0]), backing, parts[2]);
    }
    if !userfaultfd() {
        return;
    }
    let (backings, _pages) = backings();
    for delivery in DELIVERIES {
        for backing in 0..backings.len() {
            for moment in ["first", "again", "waiting"] {
                let case = format!("{delivery}/{backing}/{moment}");
                if delivery == Delivery::Signal {
                    // The access may be repeated just before it is closed: then it is the signal
                    // that nobody takes any more.
                    let (end, _) = child::run(NAME, &case);
                    assert!([child::SIGSEGV, child::SIGBUS].contains(&end), "{case}: {end:?}");
                } else {
                    child::expect(NAME, &case, child::SIGSEGV);
                }
            }
        }
    }
}

/// Waits until so many threads of this process are stopped on a fault.
fn held(pager: &Pager, faults: u64) {
    wait_for("faults", || pager.statistics().counts.faults >= faults);
}

#[test]
fn everybody_who_waits_for_it_goes_on() {
    if !userfaultfd() {
        return;
    }
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for &backing in &backings {
        for abandoned in [false, true] {
            let ledger = Ledger::new(GRANULES, Answers::Threaded).with_poisoned(BAD).holding();
            let (ledger, pager) = start_with(
                layout_for(backing),
                Delivery::QueueN(2),
                Events::Watch,
                ledger,
                Prefetch::NONE,
            );
            let bad = host(&pager, BAD);
            thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| read_by_kernel(bad))).collect();
                held(&pager, 8);
                if abandoned {
                    pager.abandon();
                } else {
                    ledger.release();
                }
                for thread in threads {
                    assert_eq!(thread.join().unwrap(), Err(Errno::FAULT), "{backing} {abandoned}");
                }
            });
        }
    }
}

/// KVM's own view is closed, too.
#[test]
fn in_both_views() {
    if !userfaultfd() || !features(Features::MINOR_SHMEM) {
        return;
    }
    let _watch = watch(60);
    let config =
        RegionConfig { vcpu_view: true, ..RegionConfig::new(GRANULES << 12, Backing::Memfd) };
    let region = Arc::new(Region::new(&config).unwrap());
    let layout = Layout::new(vec![Arc::clone(&region)]).unwrap();
    let ledger = Ledger::new(GRANULES, Answers::Threaded).with_poisoned(BAD);
    let (_, pager) = start_with(layout, Delivery::Queue, Events::Watch, ledger, Prefetch::SWEEP);
    assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)));
    for view in [region.guest_view(), region.vcpu_view().unwrap()] {
        let at = |granule: u64| view.range().skip(granule << 12).start();
        assert_eq!(read_by_kernel(at(BAD)), Err(Errno::FAULT));
        for good in [BAD - 1, BAD + 1] {
            assert_eq!(read_by_kernel(at(good)), Ok(word(REGION, good << 12)));
        }
    }
    assert_eq!(pager.statistics().counts.closed, 2);
}

/// Removed memory reads as zero, as it does where POISON marked it. Old kernels refuse MADV_REMOVE
/// of what may not be written to.
#[test]
fn removing_it_gives_zeros() {
    if !userfaultfd() {
        return;
    }
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for &backing in &backings {
        let ledger = Ledger::new(GRANULES, Answers::Threaded).with_poisoned(BAD);
        let (_, pager) =
            start_with(layout_for(backing), Delivery::Queue, Events::Watch, ledger, Prefetch::NONE);
        let bad = host(&pager, BAD);
        read_good_ones(&pager);
        assert_eq!(read_by_kernel(bad), Err(Errno::FAULT), "{backing}");
        let region = Arc::clone(pager.layout().get(REGION).unwrap());
        let one = region.host_range(GranuleRange::one(span(BAD, 1).granules.first()));
        let advice = if backing == Backing::Anonymous { Advice::DontNeed } else { Advice::Remove };
        match region.guest_view().advise(one, advice) {
            Ok(()) => {
                // The removal goes on when it has been told of, and may be done before the access
                // is given back.
                wait_for("access", || read_by_kernel(bad) != Err(Errno::FAULT));
                assert_eq!(read_by_kernel(bad), Ok(0), "{backing}");
                let state = || region.page_map().state(span(BAD, 1).granules.first());
                wait_for("its state", || state() == State::Present);
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{backing}");
                assert_eq!(read_by_kernel(bad), Err(Errno::FAULT), "{backing}");
            }
        }
        read_good_ones(&pager);
    }
}

/// Moved memory takes its errors along, and what is closed after a move is closed where it is then.
#[test]
fn moving_it_moves_the_error() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let bytes = GRANULES << 12;
    for kind in [Kind::Anonymous, Kind::Shared, Kind::SharedWithFillView] {
        for before in [true, false] {
            let reservation = Reservation::new(4 * bytes);
            let ledger = Ledger::new(GRANULES, Answers::Threaded).with_poisoned(BAD);
            let (_, pager) = start_with(
                external(&reservation, bytes, kind),
                Delivery::Queue,
                Events::Watch,
                ledger,
                Prefetch::NONE,
            );
            if before {
                assert_eq!(read_by_kernel(host(&pager, BAD)), Err(Errno::FAULT), "{kind:?}");
            }
            // One mapping at a time can be moved.
            let one = reservation.range(BAD << 12, 4096);
            let new = reservation.move_to(one, 2 * bytes);
            assert_eq!(read_by_kernel(new.start()), Err(Errno::FAULT), "{kind:?} {before}");
            let next = host(&pager, BAD + 1);
            assert_eq!(read_by_kernel(next), Ok(word(REGION, (BAD + 1) << 12)), "{kind:?}");
            assert_eq!(pager.statistics().counts.closed, 1);
            // The reservation's own fresh memory is nobody's error.
            let fresh = reservation.map(BAD << 12, 4096, None);
            assert_eq!(read_by_kernel(fresh.start()), Ok(0), "{kind:?}");
        }
    }
}

/// A process has only so many mappings: where too many stretches are missing all of the region is
/// an error, and nobody waits for ever.
#[test]
fn too_many_stretches_close_the_region() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    const PAGES: u64 = 2 * 8192 + 64;
    let ledger = Ledger::new(PAGES, Answers::Threaded).holding();
    let (_, pager) = start_with(
        layout(Backing::Anonymous, PAGES << 12),
        Delivery::Queue,
        Events::Watch,
        ledger,
        Prefetch::NONE,
    );
    for granule in (0..PAGES).step_by(2) {
        let granules = span(granule, 1).granules;
        assert_eq!(pager.assume_present(REGION, granules), 1);
    }
    thread::scope(|scope| {
        let waiting = scope.spawn(|| read_by_kernel(host(&pager, PAGES - 1)));
        held(&pager, 1);
        pager.abandon();
        assert_eq!(waiting.join().unwrap(), Err(Errno::FAULT));
    });
    assert_eq!(pager.status(), Status::Abandoned);
    for granule in [0, 1, 8191, 8192, PAGES - 2, PAGES - 1] {
        assert_eq!(read_by_kernel(host(&pager, granule)), Err(Errno::FAULT), "{granule}");
    }
    let mappings = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(mappings < 1000, "{mappings} mappings: the region is one again");
}
