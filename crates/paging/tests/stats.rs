//! The statistics add up.

mod common;

use std::sync::{Arc, atomic::Ordering::SeqCst};

use common::*;
use pageferry_memory::Backing;
use pageferry_paging::{Delivery, Pager, Prefetch, Statistics, Status};

const PAGES: u64 = 512;
const PREFETCHES: [Prefetch; 4] = [
    Prefetch::NONE,
    Prefetch::SWEEP,
    Prefetch::around(64 << 10),
    Prefetch { around: 0, ahead: 128 << 10, sweep: true },
];

/// A thread goes on with its page a moment before all about it is counted.
fn settled(case: &str, pager: &Pager) -> Statistics {
    wait_for(case, || {
        let statistics = pager.statistics();
        let counts = statistics.counts;
        statistics.total.count() + counts.untimed == counts.demand + counts.prefetch_hits
    });
    pager.statistics()
}

fn adds_up(delivery: Delivery, backing: Backing, prefetch: Prefetch, threaded: bool) {
    let case = format!("{delivery} {backing} {prefetch:?} {threaded}");
    let source = Arc::new(Pattern { threaded, zero_every: Some(8), ..Pattern::default() });
    let pager = Pager::builder(layout(backing, PAGES << 12))
        .delivery(delivery)
        .prefetch(prefetch)
        .start(Arc::clone(&source) as _)
        .unwrap();
    let before = pager.statistics();
    // The sweep may be done already.
    if prefetch == Prefetch::NONE {
        assert_eq!(before.time_to_complete, None, "{case}");
    }
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let layout = pager.layout();
            scope.spawn(move || {
                for page in shuffled(PAGES, thread) {
                    let expected =
                        if page.is_multiple_of(8) { 0 } else { word(REGION, page << 12) };
                    assert_eq!(peek(layout, page << 12), expected);
                }
            });
        }
    });
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
    let statistics = settled(&case, &pager);
    let counts = statistics.counts;
    let case = format!("{case}: {counts:?}");
    assert_eq!(counts.demand + counts.prefetched, PAGES, "{case}");
    assert_eq!(counts.installed, PAGES, "{case}");
    assert_eq!(counts.zero, PAGES / 8, "{case}");
    assert!(counts.prefetch_hits <= counts.prefetched, "{case}");
    assert_eq!(source.granules.load(SeqCst), PAGES, "{case}");
    let demanded = source.demanded.load(SeqCst);
    assert!(demanded >= counts.demand && demanded <= PAGES, "{case}: {demanded} demanded");
    assert!(counts.faults >= counts.demand, "{case}");
    for (name, none) in [
        ("pushed", counts.pushed),
        ("duplicate", counts.duplicate),
        ("eexist", counts.eexist),
        ("poisoned", counts.poisoned),
        ("removed", counts.removed),
        ("stalled", counts.stalled),
        ("panics", counts.panics),
        ("move_fallbacks", counts.move_fallbacks),
    ] {
        assert_eq!(none, 0, "{name}: {case}");
    }
    if prefetch == Prefetch::NONE {
        assert_eq!((counts.demand, counts.prefetched, counts.prefetch_hits), (PAGES, 0, 0));
    } else {
        assert!(counts.prefetched > 0, "{case}");
    }
    if delivery == Delivery::Signal {
        assert_eq!(counts.reads, 0, "nothing is queued: {case}");
    } else {
        // The sweep may have been faster than every thread.
        assert!(counts.reads > 0 || counts.faults == 0, "{case}");
        assert!(counts.reads <= counts.faults, "{case}");
    }
    // Each latency is counted where it belongs, and none is negative, endless or out of order.
    assert!(statistics.install.count() > 0, "{case}");
    assert!(statistics.install.count() <= counts.install_calls, "{case}");
    assert!(counts.install_calls <= PAGES, "{case}");
    assert_eq!(statistics.fetch.count(), statistics.total.count(), "{case}");
    assert!(statistics.queueing.count() > 0 || counts.demand == 0, "{case}");
    assert!(statistics.queueing.count() <= counts.faults, "{case}");
    for latency in [&statistics.queueing, &statistics.fetch, &statistics.install, &statistics.total]
    {
        assert_eq!(latency.quantile(0.5).is_none(), latency.count() == 0, "{case}");
        let quantiles = [0.0, 0.5, 0.99, 1.0].map(|q| latency.quantile(q).unwrap_or_default());
        assert!(quantiles.is_sorted(), "{case}: {latency:?}");
        assert_eq!(quantiles[3], latency.max(), "{case}: {latency:?}");
        assert!(latency.max() < PATIENCE, "{case}: {latency:?}");
    }
    assert!(statistics.fetch.max() <= statistics.total.max(), "{case}: {statistics:?}");
    let (first, complete) = (statistics.time_to_first_page, statistics.time_to_complete);
    assert!(first.unwrap() <= complete.unwrap(), "{case}");
}

#[test]
fn counts_and_latencies_add_up() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            for prefetch in PREFETCHES {
                for threaded in [false, true] {
                    if !(threaded && delivery == Delivery::Signal) {
                        adds_up(delivery, backing, prefetch, threaded);
                    }
                }
            }
        }
    }
}

/// The first page is never later than the last, not even if it is the only one: many times, as
/// the one is noted by another thread than the other.
#[test]
fn the_only_page_is_the_first_and_the_last() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for round in 0..300 {
        for delivery in [Delivery::Queue, Delivery::Signal] {
            let (_, source) = Ledger::new(1, Answers::Inline).source();
            let pager = Pager::builder(layout(Backing::Anonymous, 4096))
                .delivery(delivery)
                .prefetch(Prefetch::NONE)
                .start(source)
                .unwrap();
            assert_eq!(peek(pager.layout(), 0), word(REGION, 0));
            assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)));
            let statistics = pager.statistics();
            let (first, complete) = (statistics.time_to_first_page, statistics.time_to_complete);
            assert!(
                first.is_some() && first <= complete,
                "{delivery} round {round}: first {first:?}, complete {complete:?}"
            );
        }
    }
}
