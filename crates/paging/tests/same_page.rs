//! Many threads fault on one and the same granule: one request, and all of them go on.

mod common;

use std::{
    sync::{Barrier, atomic::Ordering::SeqCst},
    thread,
};

use common::*;
use pageferry_memory::Backing;
use pageferry_paging::{Delivery, Events, InstallMethod, Pager, Prefetch, Status};

const THREADS: usize = 64;
const GRANULES: u64 = 8;

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Answering {
    /// In the request itself.
    Inline,
    /// By a thread of the source, at once.
    Threaded,
    /// By a thread of the source, once all threads have faulted.
    Held,
}

fn many_on_one(
    delivery: Delivery,
    backing: Backing,
    install: InstallMethod,
    events: Events,
    answering: Answering,
) {
    let case = format!("{delivery} {backing} {install:?} {events:?} {answering:?}");
    let size = if backing == HUGE { 2 << 20 } else { 4096 };
    let answers = match answering {
        Answering::Inline => Answers::Inline,
        Answering::Threaded | Answering::Held => Answers::Threaded,
    };
    let (ledger, source) = Ledger::new(GRANULES, answers).source();
    let pager = Pager::builder(layout(backing, GRANULES * size))
        .delivery(delivery)
        .install(Some(install))
        .events(events)
        .prefetch(Prefetch::NONE)
        .start(source)
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    // The threads, and this one, which holds the source back before it lets them touch.
    let barrier = Barrier::new(THREADS + 1);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS as u64)
            .map(|thread| {
                let (pager, barrier) = (&pager, &barrier);
                scope.spawn(move || {
                    for granule in 0..GRANULES {
                        barrier.wait();
                        // Not all the same word, but all the same granule.
                        let offset = granule * size + thread * 8;
                        assert_eq!(peek(pager.layout(), offset), word(REGION, offset));
                        barrier.wait();
                    }
                })
            })
            .collect();
        for granule in 0..GRANULES {
            if answering == Answering::Held {
                ledger.hold();
            }
            let faults = pager.statistics().counts.faults;
            barrier.wait();
            if answering == Answering::Held {
                wait_for(&format!("{case}: all fault"), || {
                    // A fault is counted before it is handled.
                    pager.statistics().counts.faults == faults + THREADS as u64
                        && ledger.asked_of(granule) > 0
                });
                ledger.release();
            }
            // All of them have to go on, or this waits in vain.
            barrier.wait();
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
    // The threads go on a moment before their page is counted.
    assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)), "{case}");
    ledger.check_once();
    let requests = ledger.requests.load(SeqCst);
    assert_eq!(requests, GRANULES, "{case}");
    let counts = pager.statistics().counts;
    assert_eq!(counts.installed, GRANULES, "{case}: {counts:?}");
    assert_eq!(counts.demand, GRANULES, "{case}: {counts:?}");
}

fn every_delivery(backing: Backing, installs: &[InstallMethod]) {
    for delivery in DELIVERIES {
        for &install in installs {
            for events in [Events::Watch, Events::Ignore] {
                for answering in [Answering::Inline, Answering::Threaded, Answering::Held] {
                    many_on_one(delivery, backing, install, events, answering);
                }
            }
        }
    }
}

#[test]
fn one_request_and_all_threads_go_on_anonymous() {
    if userfaultfd() {
        let _watch = watch(60);
        every_delivery(Backing::Anonymous, &[InstallMethod::Copy]);
        if available(InstallMethod::Move) {
            every_delivery(Backing::Anonymous, &[InstallMethod::Move]);
        }
    }
}

#[test]
fn one_request_and_all_threads_go_on_memfd() {
    if userfaultfd() {
        let _watch = watch(60);
        every_delivery(Backing::Memfd, &[InstallMethod::Copy, InstallMethod::Continue]);
    }
}

#[test]
fn one_request_and_all_threads_go_on_hugetlb() {
    if userfaultfd() && huge_pages(GRANULES) {
        let _watch = watch(60);
        every_delivery(HUGE, &[InstallMethod::Copy, InstallMethod::Continue]);
    }
}
