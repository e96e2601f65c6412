//! Threads that read forward are noticed, and memory is brought ahead of them; others are not.

mod common;

use std::sync::{Arc, atomic::Ordering::SeqCst};

use common::*;
use pageferry_memory::Backing;
use pageferry_paging::{Counts, Delivery, Pager, Prefetch, Status};

const PAGES: u64 = 4096;
/// Up to 32 pages ahead, and nothing in the background.
const AHEAD: Prefetch = Prefetch { around: 0, ahead: 128 << 10, sweep: false };

/// Has each thread touch its pages in order.
fn touched(
    case: &str,
    delivery: Delivery,
    prefetch: Prefetch,
    threaded: bool,
    threads: &[Vec<u64>],
) -> Counts {
    let source = Arc::new(Pattern { threaded, ..Pattern::default() });
    let pager = Pager::builder(layout(Backing::Anonymous, PAGES << 12))
        .delivery(delivery)
        .prefetch(prefetch)
        .start(Arc::clone(&source) as _)
        .unwrap();
    std::thread::scope(|scope| {
        for pages in threads {
            let layout = pager.layout();
            scope.spawn(move || {
                for page in pages {
                    assert_eq!(peek(layout, page << 12), word(REGION, page << 12));
                }
            });
        }
    });
    // What is still on its way ahead of them is counted already, or will be asked for in a moment.
    if threads.iter().map(Vec::len).sum::<usize>() as u64 == PAGES {
        let status = pager.wait_complete(PATIENCE);
        assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
    }
    let counts = pager.statistics().counts;
    assert!(counts.demand + counts.prefetched <= source.granules.load(SeqCst), "{case}");
    counts
}

fn each_case(mut test: impl FnMut(&str, Delivery, bool)) {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for threaded in [false, true] {
            if !(threaded && delivery == Delivery::Signal) {
                test(&format!("{delivery} threaded: {threaded}"), delivery, threaded);
            }
        }
    }
}

#[test]
fn reading_forward_is_run_ahead_of() {
    each_case(|case, delivery, threaded| {
        let forward = [(0..PAGES).collect::<Vec<_>>()];
        let counts = touched(case, delivery, AHEAD, threaded, &forward);
        assert_eq!(counts.demand + counts.prefetched, PAGES, "{case}: {counts:?}");
        assert!(counts.prefetched >= PAGES / 2, "{case}: {counts:?}");
        // The same without it, so that it is this and nothing else.
        let counts = touched(case, delivery, Prefetch::NONE, threaded, &forward);
        assert_eq!((counts.demand, counts.prefetched), (PAGES, 0), "{case}: {counts:?}");
    });
}

#[test]
fn streams_of_several_threads_are_told_apart() {
    each_case(|case, delivery, threaded| {
        let part = PAGES / 4;
        let threads = [0, 1, 2, 3].map(|n| (n * part..(n + 1) * part).collect::<Vec<_>>());
        let counts = touched(case, delivery, AHEAD, threaded, &threads);
        assert_eq!(counts.demand + counts.prefetched, PAGES, "{case}: {counts:?}");
        assert!(counts.prefetched >= PAGES / 4, "{case}: {counts:?}");
    });
}

#[test]
fn reading_at_random_or_backwards_brings_nothing_more() {
    each_case(|case, delivery, threaded| {
        // Apart by more than what a first fault is expected to be followed by.
        let random: Vec<u64> = shuffled(PAGES / 16, 3).into_iter().map(|n| n * 16).collect();
        let backwards: Vec<u64> = (0..PAGES / 16).rev().collect();
        // Where one reader may overtake another, two faults may seem to have come forward.
        let in_order = !matches!(delivery, Delivery::QueueN(_) | Delivery::ByCpu(_));
        for pages in [Some(random), in_order.then_some(backwards)].into_iter().flatten() {
            let demanded = pages.len() as u64;
            let counts = touched(case, delivery, AHEAD, threaded, &[pages]);
            assert_eq!((counts.demand, counts.prefetched), (demanded, 0), "{case}: {counts:?}");
        }
    });
}
