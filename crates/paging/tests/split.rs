//! Memory of which the embedder makes several mappings, in the kernel's eyes, after the pager has
//! started: the kernel installs and poisons within one at a time.

mod common;

use std::sync::{Arc, atomic::AtomicBool};

use common::{
    external::{Kind, Reservation, external, read_by_kernel},
    *,
};
use pageferry_paging::{Events, Pager, Prefetch, Status};

const PAGES: u64 = 64;
const KINDS: [Kind; 3] = [Kind::Anonymous, Kind::Shared, Kind::SharedWithFillView];

/// Makes mappings of its own of some pages.
fn split(reservation: &Reservation) {
    for (page, count) in [(3, 1), (7, 6), (33, 2), (63, 1)] {
        let range = reservation.range(page << 12, count << 12);
        // SAFETY: changes what core dumps contain, and no contents.
        let advised = unsafe {
            libc::madvise(range.start().as_ptr().cast(), range.len() as usize, libc::MADV_DONTDUMP)
        };
        assert_eq!(advised, 0);
    }
}

#[test]
fn what_comes_at_once_goes_into_all_of_them() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for kind in KINDS {
            for events in [Events::Watch, Events::Ignore] {
                let case = format!("{delivery} {kind:?} {events:?}");
                let reservation = Reservation::new(PAGES << 12);
                let source = Arc::new(Pattern::default());
                let pager = Pager::builder(external(&reservation, PAGES << 12, kind))
                    .delivery(delivery)
                    .events(events)
                    .prefetch(Prefetch::around(PAGES << 12))
                    .start(Arc::clone(&source) as _)
                    .unwrap();
                split(&reservation);
                verify_all(pager.layout());
                let status = pager.wait_complete(PATIENCE);
                assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
                let counts = pager.statistics().counts;
                assert_eq!((counts.installed, counts.eexist), (PAGES, 0), "{case}: {counts:?}");
            }
        }
    }
}

#[test]
fn what_is_given_up_is_an_error_in_all_of_them() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for kind in KINDS {
            for events in [Events::Watch, Events::Ignore] {
                let case = format!("{delivery} {kind:?} {events:?}");
                let reservation = Reservation::new(PAGES << 12);
                let source = Pattern { hold: AtomicBool::new(true), ..Pattern::default() };
                let pager = Pager::builder(external(&reservation, PAGES << 12, kind))
                    .delivery(delivery)
                    .events(events)
                    .prefetch(Prefetch::NONE)
                    .start(Arc::new(source))
                    .unwrap();
                split(&reservation);
                // When it is dropped at the latest.
                if events == Events::Watch {
                    pager.abandon();
                }
                let layout = pager.layout().clone();
                drop(pager);
                for page in 0..PAGES {
                    let found = read_by_kernel(reservation.at(page << 12));
                    assert!(found.is_err(), "{case}: page {page}: {found:?}");
                }
                drop(layout);
            }
        }
    }
}
