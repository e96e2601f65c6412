//! Every delivery x install x backing x prefetch, with real threads on real userfaultfds.

mod common;

use std::{sync::Arc, time::Duration};

use common::*;
use pageferry_memory::Backing;
use pageferry_paging::{
    Delivery, Events, Hints, InstallMethod, Pager, Prefetch, StartError, Status,
};

const PREFETCHES: [Prefetch; 4] = [
    Prefetch::NONE,
    Prefetch::SWEEP,
    Prefetch::around(64 << 10),
    Prefetch { around: 0, ahead: 256 << 10, sweep: true },
];

fn one(
    delivery: Delivery,
    install: Option<InstallMethod>,
    backing: Backing,
    prefetch: Prefetch,
    events: Events,
    threaded: bool,
) {
    let case = format!("{delivery} {install:?} {backing} {prefetch:?} {events:?} {threaded}");
    let bytes = if backing == HUGE { 8 << 20 } else { 3 << 20 };
    let source = Arc::new(Pattern { threaded, ..Pattern::default() });
    let pager = Pager::builder(layout(backing, bytes))
        .delivery(delivery)
        .install(install)
        .prefetch(prefetch)
        .events(events)
        .start(Arc::clone(&source) as _)
        .unwrap_or_else(|error| panic!("{case}: {error}"));
    touch_at_random(pager.layout(), 4);
    verify_all(pager.layout());
    let status = pager.wait_complete(Duration::from_secs(10));
    let granules = pager.layout().total_granules();
    match status {
        Status::Complete(counts) => assert_eq!(counts.granules_from_source, granules, "{case}"),
        other => panic!("{case}: {other:?} {:?}", pager.statistics()),
    }
    let statistics = pager.statistics();
    let counts = statistics.counts;
    assert_eq!(counts.installed, granules, "{case}: {counts:?}");
    assert_eq!(counts.demand + counts.prefetched, granules, "{case}: {counts:?}");
    assert_eq!(counts.eexist, 0, "{case}: {counts:?}");
    assert_eq!(counts.panics, 0, "{case}");
    assert_eq!(source.granules.load(std::sync::atomic::Ordering::SeqCst), granules, "{case}");
    assert!(statistics.time_to_complete >= statistics.time_to_first_page, "{case}");
    assert_eq!(pager.last_error(), None, "{case}");
}

fn every_delivery(backing: Backing, installs: &[InstallMethod]) {
    for delivery in DELIVERIES {
        for &install in installs {
            for prefetch in PREFETCHES {
                for events in [Events::Watch, Events::Ignore] {
                    one(delivery, Some(install), backing, prefetch, events, false);
                    if delivery != Delivery::Signal {
                        one(delivery, Some(install), backing, prefetch, events, true);
                    }
                }
            }
        }
    }
}

#[test]
fn anonymous_memory() {
    if userfaultfd() {
        every_delivery(Backing::Anonymous, &[InstallMethod::Copy]);
        if available(InstallMethod::Move) {
            every_delivery(Backing::Anonymous, &[InstallMethod::Move]);
        }
    }
}

#[test]
fn memfd() {
    if userfaultfd() {
        every_delivery(Backing::Memfd, &[InstallMethod::Copy, InstallMethod::Continue]);
    }
}

#[test]
fn hugetlb() {
    if userfaultfd() && huge_pages(4) {
        every_delivery(HUGE, &[InstallMethod::Copy, InstallMethod::Continue]);
    }
}

#[test]
fn auto_says_why() {
    if !userfaultfd() {
        return;
    }
    let pager = Pager::builder(layout(Backing::Memfd, 1 << 20))
        .hints(Hints { guest_threads: Some(4), user_mode_only: true })
        .start(Arc::new(Pattern::default()))
        .unwrap();
    assert_eq!(pager.chosen().delivery, Delivery::Signal);
    assert_eq!(pager.chosen().install, [InstallMethod::Continue]);
    assert!(!pager.chosen().why.is_empty());
    verify_all(pager.layout());
}

#[test]
fn what_does_not_fit_is_refused_and_said() {
    if !userfaultfd() {
        return;
    }
    let start = |backing, method, source: Pattern, delivery| {
        Pager::builder(layout(backing, 1 << 20))
            .install(Some(method))
            .delivery(delivery)
            .start(Arc::new(source))
            .err()
    };
    let pattern = Pattern::default;
    let error = start(Backing::Memfd, InstallMethod::Move, pattern(), Delivery::Queue).unwrap();
    let text = error.to_string();
    let expected = ["MOVE moves pages of anonymous memory", "MOVE needs Linux 6.8"];
    assert!(expected.iter().any(|expected| text.contains(expected)), "{error}");
    let error =
        start(Backing::Anonymous, InstallMethod::Continue, pattern(), Delivery::Queue).unwrap();
    assert!(error.to_string().contains("fill view"), "{error}");
    let unsafe_source = Pattern { not_signal_safe: true, ..Pattern::default() };
    let error =
        start(Backing::Memfd, InstallMethod::Copy, unsafe_source, Delivery::Signal).unwrap();
    assert!(matches!(error, StartError::SourceNotSignalSafe), "{error}");
}
