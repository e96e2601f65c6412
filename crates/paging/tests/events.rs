//! Memory removed while it is arriving: from the return of `madvise` on it reads as zero, or as
//! what was written since, never as old data; whatever is on its way, and whoever else looks.

mod common;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_memory::{Advice, Backing, GranuleIndex, GranuleRange, Layout};
use pageferry_paging::{Delivery, InstallMethod, Pager, Prefetch, Status};
use pageferry_uffd::OpenWay;

const OWNERS: u64 = 4;
const BYSTANDERS: u64 = 2;
/// How long each combination is raced.
const RACE: Duration = Duration::from_millis(100);

#[derive(Copy, Clone, Debug)]
struct Case {
    delivery: Delivery,
    backing: Backing,
    install: InstallMethod,
    advice: Advice,
    answers: Answers,
}

impl Case {
    fn page(&self) -> u64 {
        if self.backing == HUGE { 2 << 20 } else { 4096 }
    }

    /// Pages that belong to one owner.
    fn share(&self) -> u64 {
        if self.backing == HUGE { 2 } else { 32 }
    }
}

/// What the owner of a page knows of it.
#[derive(Copy, Clone, Debug)]
struct Known {
    removed: bool,
    /// Written to its first and its last word.
    written: Option<u64>,
}

/// Values that owners write say whose they are.
fn mark(page: u64, count: u64) -> u64 {
    0xfeed << 48 | page << 32 | count
}

/// Checks the first, a middle and the last word of a page.
fn check(case: &Case, layout: &Layout, page: u64, known: Known) {
    let size = case.page();
    for within in [0, size / 2, size - 8] {
        let offset = page * size + within;
        let base = if known.removed { 0 } else { word(REGION, offset) };
        let expected = if within == size / 2 { base } else { known.written.unwrap_or(base) };
        let found = peek(layout, offset);
        assert_eq!(
            found,
            expected,
            "{case:?} page {page} + {within:#x}, {known:?}, the source has {:#x}",
            word(REGION, offset)
        );
    }
}

/// Owns a stretch of pages; removes, writes and reads them.
fn owner(case: &Case, layout: &Layout, number: u64, seed: u64) {
    let share = case.share();
    let first = number * share;
    let mut known = vec![Known { removed: false, written: None }; share as usize];
    let mut random = Random::new(seed * OWNERS + number);
    for step in 1..3 * share {
        let at = random.below(share);
        let page = first + at;
        match random.below(4) {
            0 | 1 => {
                let count = 1 + random.below((share - at).min(8));
                let run = GranuleRange::new(GranuleIndex::new(page), count);
                let region = layout.get(REGION).unwrap();
                region.guest_view().advise(region.host_range(run), case.advice).unwrap();
                for known in &mut known[at as usize..(at + count) as usize] {
                    *known = Known { removed: true, written: None };
                }
                // The whole of it, now: what was on its way must not come any more.
                for removed in at..at + count {
                    check(case, layout, first + removed, known[removed as usize]);
                }
            }
            2 => {
                let value = mark(page, step);
                poke(layout, page * case.page(), value);
                poke(layout, (page + 1) * case.page() - 8, value);
                known[at as usize].written = Some(value);
            }
            _ => check(case, layout, page, known[at as usize]),
        }
    }
    for (at, known) in known.iter().enumerate() {
        check(case, layout, first + at as u64, *known);
    }
}

/// Touches the owners' pages, so that there are several faults on each.
fn bystander(case: &Case, layout: &Layout, seed: u64, over: &AtomicBool) {
    let mut random = Random::new(seed);
    let pages = OWNERS * case.share();
    while !over.load(SeqCst) {
        let page = random.below(pages);
        let offset = page * case.page();
        let found = peek(layout, offset);
        let plausible =
            found == 0 || found == word(REGION, offset) || found >> 32 == mark(page, 0) >> 32;
        assert!(plausible, "{case:?} page {page}: {found:#x}");
    }
}

/// One pager, from its start until everything is there. Returns how many EAGAINs there were.
fn round(case: &Case, seed: u64, ways: Option<Vec<OpenWay>>) -> u64 {
    let pages = OWNERS * case.share();
    let (ledger, source) = Ledger::new(pages, case.answers).source();
    let mut builder = Pager::builder(layout(case.backing, pages * case.page()))
        .delivery(case.delivery)
        .install(Some(case.install))
        .prefetch(if seed.is_multiple_of(2) {
            Prefetch::SWEEP
        } else {
            Prefetch::around(16 << 10)
        });
    if let Some(ways) = ways {
        builder = builder.open_ways(ways);
    }
    let pager = builder.start(source).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (layout, over) = (pager.layout(), &over);
        for number in 0..BYSTANDERS {
            scope.spawn(move || bystander(case, layout, seed * BYSTANDERS + number, over));
        }
        let owners: Vec<_> = (0..OWNERS)
            .map(|number| scope.spawn(move || owner(case, layout, number, seed)))
            .collect();
        let results: Vec<_> = owners.into_iter().map(|owner| owner.join()).collect();
        over.store(true, SeqCst);
        for result in results {
            result.unwrap();
        }
    });
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{case:?}: {status:?}");
    assert_eq!(pager.last_error(), None, "{case:?}");
    ledger.check_once();
    let counts = pager.statistics().counts;
    assert!(counts.removed > 0, "{case:?}: {counts:?}");
    assert_eq!((counts.poisoned, counts.panics), (0, 0), "{case:?}: {counts:?}");
    counts.eagain
}

fn race(backing: Backing, kinds: &[(InstallMethod, Advice)]) {
    let _watch = watch(120);
    let mut again = 0;
    for delivery in DELIVERIES {
        for &(install, advice) in kinds {
            for answers in [Answers::Inline, Answers::Threaded] {
                let case = Case { delivery, backing, install, advice, answers };
                let until = Instant::now() + RACE;
                let mut seed = 0;
                while seed < 2 || Instant::now() < until {
                    again += round(&case, seed, None);
                    seed += 1;
                }
            }
        }
    }
    assert!(again > 0, "no install ever met a change of the address space");
}

#[test]
fn removed_anonymous_memory_stays_removed() {
    if userfaultfd() {
        let mut ways =
            vec![(InstallMethod::Copy, Advice::DontNeed), (InstallMethod::Move, Advice::DontNeed)];
        ways.retain(|(install, _)| available(*install));
        race(Backing::Anonymous, &ways);
    }
}

/// Shared memory that was only unmapped (DONTNEED) counts as removed too where installs go through
/// the fill view: there the engine maps what is behind, and would show what arrived.
#[test]
fn removed_memfd_memory_stays_removed() {
    if userfaultfd() {
        race(
            Backing::Memfd,
            &[
                (InstallMethod::Copy, Advice::Remove),
                (InstallMethod::Continue, Advice::Remove),
                (InstallMethod::Continue, Advice::DontNeed),
            ],
        );
    }
}

#[test]
fn removed_hugetlb_memory_stays_removed() {
    if userfaultfd() && huge_pages(8) {
        race(
            HUGE,
            &[
                (InstallMethod::Copy, Advice::Remove),
                (InstallMethod::Continue, Advice::Remove),
                (InstallMethod::Continue, Advice::DontNeed),
            ],
        );
    }
}

/// All of this is done in user mode, so it needs no more than that.
#[test]
fn removal_is_followed_without_privilege_to_see_the_kernels_faults() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for (backing, install, advice) in [
            (Backing::Anonymous, InstallMethod::Copy, Advice::DontNeed),
            (Backing::Memfd, InstallMethod::Continue, Advice::Remove),
        ] {
            let case = Case { delivery, backing, install, advice, answers: Answers::Threaded };
            for seed in 0..3 {
                round(&case, seed, Some(vec![OpenWay::SyscallUserModeOnly]));
            }
        }
    }
}

/// A guest that frees memory through the file instead of the mapping (a balloon does) is not
/// reported as an event; what it freed after it was there reads as zero all the same.
#[test]
fn holes_punched_in_the_file_read_as_zero() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let backings = if huge_pages(8) { vec![Backing::Memfd, HUGE] } else { vec![Backing::Memfd] };
    for delivery in DELIVERIES {
        for &backing in &backings {
            for install in [InstallMethod::Copy, InstallMethod::Continue] {
                let size = if backing == HUGE { 2 << 20 } else { 4096 };
                let (_, source) = Ledger::new(8, Answers::Inline).source();
                let pager = Pager::builder(layout(backing, 8 * size))
                    .delivery(delivery)
                    .install(Some(install))
                    .prefetch(Prefetch::NONE)
                    .start(source)
                    .unwrap();
                for page in 0..7 {
                    assert_eq!(peek(pager.layout(), page * size), word(REGION, page * size));
                }
                let file = pager.layout().get(REGION).unwrap().file().unwrap();
                file.punch_hole(2 * size, 2 * size).unwrap();
                let punched = AtomicU64::new(0);
                thread::scope(|scope| {
                    for page in 2..4 {
                        let (pager, punched) = (&pager, &punched);
                        scope.spawn(move || {
                            assert_eq!(peek(pager.layout(), page * size), 0);
                            punched.fetch_add(1, SeqCst);
                        });
                    }
                    wait_for(&format!("{delivery} {backing} {install:?}"), || {
                        punched.load(SeqCst) == 2
                    });
                });
                assert_eq!(peek(pager.layout(), 7 * size), word(REGION, 7 * size));
                assert_eq!(pager.last_error(), None, "{delivery} {backing} {install:?}");
            }
        }
    }
}

/// A pager that goes away while threads remove memory, and touch what they removed, lets all of
/// them go on.
#[test]
fn a_pager_dropped_among_events_holds_nobody_up() {
    if !userfaultfd() || !poison() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for (backing, install, advice) in [
            (Backing::Anonymous, InstallMethod::Copy, Advice::DontNeed),
            (Backing::Memfd, InstallMethod::Copy, Advice::Remove),
            (Backing::Memfd, InstallMethod::Continue, Advice::Remove),
        ] {
            for round in 0..8 {
                let (_, source) = Ledger::new(64, Answers::Inline).source();
                let layout = layout(backing, 64 << 12);
                let region = std::sync::Arc::clone(layout.get(REGION).unwrap());
                let pager = Pager::builder(layout)
                    .delivery(delivery)
                    .install(Some(install))
                    .prefetch(if round % 2 == 0 { Prefetch::NONE } else { Prefetch::SWEEP })
                    .start(source)
                    .unwrap();
                if advice == Advice::Remove {
                    // A hole in a file leaves in place the mark that makes absent memory an error
                    // (unmap_mapping_range spares what it takes for private pages).
                    for page in 0..48 {
                        assert_eq!(peek(pager.layout(), page << 12), word(REGION, page << 12));
                    }
                }
                let over = AtomicBool::new(false);
                let removals = AtomicU64::new(0);
                thread::scope(|scope| {
                    let (region, over, removals) = (&region, &over, &removals);
                    for number in 0..3 {
                        scope.spawn(move || {
                            let mut random = Random::new(number);
                            while !over.load(SeqCst) {
                                let page = 16 * number + random.below(16);
                                let run = GranuleRange::one(GranuleIndex::new(page));
                                let view = region.guest_view();
                                view.advise(region.host_range(run), advice).unwrap();
                                let mut bytes = [1; 8];
                                view.read_at(page << 12, &mut bytes).unwrap();
                                assert_eq!(bytes, [0; 8], "{delivery} {backing} {install:?}");
                                removals.fetch_add(1, SeqCst);
                            }
                        });
                    }
                    let case = format!("{delivery} {backing} {install:?} {round}");
                    wait_for(&case, || removals.load(SeqCst) > 10 * round);
                    drop(pager);
                    let so_far = removals.load(SeqCst);
                    // All three of them, and more than once.
                    wait_for(&case, || removals.load(SeqCst) > so_far + 100);
                    over.store(true, SeqCst);
                });
            }
        }
    }
}
