//! Memory that is moved (`mremap`) or unmapped while it arrives.

mod common;

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
};

use common::{
    external::{Kind, Reservation, external, read, read_by_kernel},
    *,
};
use pageferry_paging::{Delivery, Pager, Prefetch, Status};
use rustix::io::Errno;

/// A third of them is a whole number of the parts that are moved: with the memory split among three
/// userfaultfds it is three mappings for the kernel, and `mremap` moves parts of one only.
const PAGES: u64 = 120;
const PAGE: u64 = 4096;
const KINDS: [Kind; 3] = [Kind::Anonymous, Kind::Shared, Kind::SharedWithFillView];

fn start(
    reservation: &std::sync::Arc<Reservation>,
    kind: Kind,
    delivery: Delivery,
    ledger: Ledger,
    prefetch: Prefetch,
) -> (std::sync::Arc<Ledger>, Pager) {
    let layout = external(reservation, PAGES * PAGE, kind);
    let (ledger, source) = ledger.source();
    // The kernel hands out faults in front of events: read one by one, a fault at a place that
    // something was moved to comes before the news that it was.
    let builder = Pager::builder(layout).delivery(delivery).prefetch(prefetch).batch(1);
    (ledger, builder.start(source).unwrap_or_else(|error| panic!("{delivery} {kind:?}: {error}")))
}

/// Ends the threads that look at it, also when the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Moves parts of the memory about while threads read what stays and, through the kernel, wait for
/// what is moved to appear at its new place.
fn moved(delivery: Delivery, kind: Kind, answers: Answers, seed: u64) {
    const MOVES: u64 = 8;
    const PART: u64 = 8;
    let case = format!("{delivery} {kind:?} {answers:?} {seed}");
    let reservation = Reservation::new(4 * PAGES * PAGE);
    let prefetch = if seed.is_multiple_of(2) { Prefetch::SWEEP } else { Prefetch::NONE };
    let (ledger, pager) =
        start(&reservation, kind, delivery, Ledger::new(PAGES, answers), prefetch);
    let over = AtomicBool::new(false);
    // Every other part of eight pages moves; and the last of them moves twice.
    let parts: Vec<u64> = (0..MOVES).map(|n| n * 2 * PART).collect();
    let stays = |page: u64| !(page / PART).is_multiple_of(2);
    let new_place = |page: u64| 2 * PAGES + page;
    thread::scope(|scope| {
        let (reservation, case, over) = (&reservation, &case, &over);
        scope.spawn(move || {
            let mut random = Random::new(seed);
            while !over.load(SeqCst) {
                let page = random.below(PAGES);
                if stays(page) {
                    let offset = page * PAGE + 8 * random.below(512);
                    assert_eq!(read(reservation.at(offset)), word(REGION, offset), "{case}");
                }
            }
        });
        // Kernel accesses are not served by signals.
        if delivery != Delivery::Signal {
            for waiter in 0..2 {
                let parts = parts.clone();
                scope.spawn(move || {
                    for part in parts {
                        let page = part + seed % PART + waiter;
                        let page = page.min(part + PART - 1);
                        let address = reservation.at(new_place(page) * PAGE);
                        let value = loop {
                            match read_by_kernel(address) {
                                Ok(value) => break value,
                                Err(Errno::FAULT) if over.load(SeqCst) => return,
                                Err(Errno::FAULT) => thread::yield_now(),
                                Err(other) => panic!("{case}: {other}"),
                            }
                        };
                        let expected = word(REGION, page * PAGE);
                        assert_eq!(value, expected, "{case}: page {page} at its new place");
                    }
                });
            }
        }
        let _over = SetOnDrop(over);
        for &part in &parts {
            let from = reservation.range(part * PAGE, PART * PAGE);
            reservation.move_to(from, new_place(part) * PAGE);
            // Nothing is there any more, or something of somebody else.
            assert_ne!(read_by_kernel(from.start()), Ok(word(REGION, part * PAGE)), "{case}");
            for page in part..part + PART / 2 {
                let (there, offset) = (new_place(page) * PAGE, page * PAGE);
                assert_eq!(read(reservation.at(there)), word(REGION, offset), "{case}");
            }
        }
    });
    let last = parts[parts.len() - 1];
    let from = reservation.range(new_place(last) * PAGE, PART * PAGE);
    reservation.move_to(from, 3 * PAGES * PAGE);
    for page in 0..PAGES {
        let place = match page {
            _ if stays(page) => page,
            _ if page >= last => 3 * PAGES + page - last,
            _ => new_place(page),
        };
        for within in [0, PAGE - 8] {
            let found = read(reservation.at(place * PAGE + within));
            assert_eq!(found, word(REGION, page * PAGE + within), "{case}: page {page}");
        }
    }
    assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)), "{case}");
    assert_eq!(pager.last_error(), None, "{case}");
    ledger.check_once();
    let counts = pager.statistics().counts;
    assert_eq!((counts.installed, counts.removed), (PAGES, 0), "{case}: {counts:?}");
}

#[test]
fn moved_memory_keeps_arriving_at_its_new_place() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(120);
    for delivery in DELIVERIES {
        for kind in KINDS {
            for answers in [Answers::Inline, Answers::Threaded] {
                for seed in 0..6 {
                    moved(delivery, kind, answers, seed);
                }
            }
        }
    }
}

/// What is unmapped needs not come: the rest is complete without it. A thread that waits for it
/// finds out.
#[test]
fn unmapped_memory_is_not_waited_for() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for kind in KINDS {
            let case = format!("{delivery} {kind:?}");
            let reservation = Reservation::new(PAGES * PAGE);
            let ledger = Ledger::new(PAGES, Answers::Threaded).holding();
            let (ledger, pager) = start(&reservation, kind, delivery, ledger, Prefetch::NONE);
            thread::scope(|scope| {
                let reservation = &reservation;
                let waiting = (delivery != Delivery::Signal).then(|| {
                    let waiting = scope.spawn(|| read_by_kernel(reservation.at(40 * PAGE)));
                    wait_for(&case, || ledger.asked_of(40) == 1);
                    waiting
                });
                reservation.unmap(reservation.range(32 * PAGE, 16 * PAGE));
                if let Some(waiting) = waiting {
                    wait_for(&format!("{case}: the waiting thread"), || waiting.is_finished());
                    assert_ne!(waiting.join().unwrap(), Ok(word(REGION, 40 * PAGE)), "{case}");
                }
            });
            ledger.release();
            for page in (0..32).chain(48..PAGES) {
                assert_eq!(read(reservation.at(page * PAGE)), word(REGION, page * PAGE), "{case}");
            }
            let found = read_by_kernel(reservation.at(40 * PAGE));
            assert_ne!(found, Ok(word(REGION, 40 * PAGE)), "{case}");
            assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)), "{case}");
            assert_eq!(pager.statistics().counts.installed, PAGES - 16, "{case}");
        }
    }
}

/// Unmapped piece by piece while everything is swept in.
#[test]
fn unmapping_races_with_the_sweep() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for kind in KINDS {
            for answers in [Answers::Inline, Answers::Threaded] {
                let case = format!("{delivery} {kind:?} {answers:?}");
                let reservation = Reservation::new(PAGES * PAGE);
                let ledger = Ledger::new(PAGES, answers);
                let (ledger, pager) = start(&reservation, kind, delivery, ledger, Prefetch::SWEEP);
                for page in shuffled(PAGES / 2, 7) {
                    reservation.unmap(reservation.range(2 * page * PAGE, PAGE));
                    let offset = (2 * page + 1) * PAGE;
                    assert_eq!(read(reservation.at(offset)), word(REGION, offset), "{case}");
                }
                assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)), "{case}");
                assert_eq!(pager.last_error(), None, "{case}");
                // `munmap` returns when its event is read, a moment before it is counted.
                wait_for(&case, || pager.statistics().counts.removed == PAGES / 2);
                ledger.check_once();
            }
        }
    }
}

/// A place that the engine does not know is none of its business, even if another pager's
/// userfaultfd serves it.
#[test]
fn one_pager_does_not_touch_the_memory_of_another() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        let start = || {
            let (ledger, source) = Ledger::new(16, Answers::Inline).source();
            let pager = Pager::builder(layout(pageferry_memory::Backing::Anonymous, 64 << 10))
                .delivery(delivery)
                .prefetch(Prefetch::NONE)
                .start(source)
                .unwrap();
            (ledger, pager)
        };
        let (_, one) = start();
        let (ledger, other) = start();
        let view = other.layout().get(REGION).unwrap().guest_view().range();
        for page in 0..16 {
            assert!(one.resolve(view.start().checked_add(page * PAGE).unwrap()));
            assert!(!ledger.has_answered(page), "{delivery}");
        }
        verify_all(other.layout());
        ledger.check_once();
        assert!(ledger.has_answered(15), "{delivery}");
    }
}

/// Where two userfaultfds meet two mappings do, and the kernel moves one at a time: nothing is
/// changed then, and what lies on one side can be moved.
#[test]
fn a_move_across_two_userfaultfds_is_refused_and_harms_nothing() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for kind in KINDS {
        let reservation = Reservation::new(4 * PAGES * PAGE);
        let ledger = Ledger::new(PAGES, Answers::Threaded);
        let (ledger, _pager) =
            start(&reservation, kind, Delivery::Sharded(2), ledger, Prefetch::NONE);
        let border = PAGES / 2;
        let across = reservation.range((border - 2) * PAGE, 4 * PAGE);
        // SAFETY: inside the reservation, whose addresses only the test uses. It has to grow, and so
        // to move; to no place of ours, which a kernel might unmap before it refuses.
        let moved = unsafe {
            libc::mremap(
                across.start().as_ptr().cast(),
                across.len() as usize,
                2 * across.len() as usize,
                libc::MREMAP_MAYMOVE,
            )
        };
        let error = std::io::Error::last_os_error();
        assert_eq!(moved, libc::MAP_FAILED, "{kind:?}");
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{kind:?}");
        let half = reservation.range((border - 2) * PAGE, 2 * PAGE);
        let half = reservation.move_to(half, 3 * PAGES * PAGE);
        for page in 0..PAGES {
            let offset = page * PAGE;
            let address = match page.checked_sub(border - 2) {
                Some(moved @ 0..2) => half.skip(moved * PAGE).start(),
                _ => reservation.at(offset),
            };
            assert_eq!(read_by_kernel(address), Ok(word(REGION, offset)), "{kind:?} {page}");
        }
        ledger.check_once();
    }
}
