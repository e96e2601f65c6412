//! Demand overtakes prefetch: what a thread comes to need while it is on its way unasked is
//! hurried, asked for once and answered once; and demand is not kept waiting behind the sweep.

mod common;

use std::{sync::atomic::Ordering::SeqCst, thread};

use common::*;
use pageferry_memory::Backing;
use pageferry_paging::{Delivery, Pager, Prefetch, Status};

const PAGES: u64 = 512;

fn overtake(delivery: Delivery, backing: Backing, prefetch: Prefetch) {
    let case = format!("{delivery} {backing} {prefetch:?}");
    let (ledger, source) = Ledger::new(PAGES, Answers::Threaded).holding().source();
    let pager = Pager::builder(layout(backing, PAGES << 12))
        .delivery(delivery)
        .prefetch(prefetch)
        .start(source)
        .unwrap();
    let asked = |page: &u64| ledger.asked_of(*page) > 0;
    thread::scope(|scope| {
        let layout = pager.layout();
        let touch = |page: u64| {
            scope.spawn(move || assert_eq!(peek(layout, page << 12), word(REGION, page << 12)))
        };
        if !prefetch.sweep {
            // A fault brings its neighbours.
            touch(0);
        }
        // Let the engine ask in advance as much as it likes: nothing is answered yet.
        wait_for(&case, || (0..PAGES).filter(asked).count() >= 16);
        let first_touched = if prefetch.sweep { 0 } else { 1 };
        let on_their_way: Vec<u64> = (first_touched..PAGES).filter(asked).take(12).collect();
        let before = pager.statistics().counts;
        let threads: Vec<_> = on_their_way.iter().map(|page| touch(*page)).collect();
        // Which requests are remembered as prefetch is a lossy table: nearly all must be.
        wait_for(&case, || {
            let hurried = on_their_way
                .iter()
                .filter(|page| ledger.expedited[**page as usize].load(SeqCst) == 1);
            hurried.count() >= on_their_way.len() - 2
        });
        let counts = pager.statistics().counts;
        assert_eq!(counts.demand, before.demand, "{case}: they are not asked for again");
        assert!(counts.prefetch_hits >= on_their_way.len() as u64 - 2, "{case}: {counts:?}");
        // Somebody needs what was not asked for at all: that is asked for though nothing of all
        // the rest has been answered.
        let far = PAGES - 1;
        assert_eq!(ledger.asked_of(far), 0, "{case}: more was asked in advance than is wise");
        touch(far);
        wait_for(&case, || ledger.asked_of(far) == 1);
        assert_eq!(ledger.answered_total(), 0, "{case}");
        ledger.release();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    verify_all(pager.layout());
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
    ledger.check_once();
    for page in 0..PAGES {
        assert!(ledger.expedited[page as usize].load(SeqCst) <= 1, "{case}: page {page}");
        assert!(ledger.has_answered(page), "{case}: page {page}");
    }
    let counts = pager.statistics().counts;
    assert_eq!((counts.installed, counts.duplicate, counts.eexist), (PAGES, 0, 0), "{case}");
}

#[test]
fn what_is_needed_while_it_is_on_its_way_is_hurried() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            for prefetch in [Prefetch::SWEEP, Prefetch::around(128 << 10)] {
                overtake(delivery, backing, prefetch);
            }
        }
    }
}
