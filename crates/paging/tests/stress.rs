//! The stress of the kernel's own userfaultfd test, for this engine: round after round of new
//! memory and new pagers, with threads that read and write at random or all at the same place, and
//! somebody who installs pages behind the engine's back.

mod common;

use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_memory::{Backing, Layout};
use pageferry_paging::{Delivery, Events, InstallMethod, Pager, Prefetch, Status};
use pageferry_uffd::{CopyMode, HostAddress, Options, Outcome};

/// For each kind of memory.
const ENOUGH: Duration = Duration::from_millis(3000);

#[derive(Copy, Clone, Debug)]
struct Round {
    seed: u64,
    delivery: Delivery,
    backing: Backing,
    install: InstallMethod,
    events: Events,
    prefetch: Prefetch,
    answers: Answers,
    threads: u64,
    /// All threads go the same way, and wait for each other at every page.
    racing: bool,
    /// Every word of a page is looked at, not only a few.
    verify: bool,
    /// Another userfaultfd of the same process installs pages too, as fast as it can. Not with
    /// CONTINUE: bytes that arrive are then written before they are mapped, over what the guest
    /// wrote to a page that somebody else mapped.
    rogue: bool,
}

impl Round {
    fn new(seed: u64, backing: Backing, installs: &[InstallMethod]) -> Self {
        let mut random = Random::new(seed);
        let mut chance = |of: u64| random.below(of);
        let count = 1 + chance(4) as u16;
        let delivery = match chance(6) {
            0 => Delivery::Queue,
            1 => Delivery::QueueN(count),
            2 => Delivery::ByThread(count),
            3 => Delivery::ByCpu(count),
            4 => Delivery::Sharded(count),
            _ => Delivery::Signal,
        };
        let block = 4096 << chance(6);
        let install = installs[chance(installs.len() as u64) as usize];
        Self {
            seed,
            delivery,
            backing,
            install,
            events: if chance(2) == 0 { Events::Watch } else { Events::Ignore },
            prefetch: Prefetch {
                around: if chance(2) == 0 { 0 } else { block },
                ahead: if chance(2) == 0 { 0 } else { 4 * block },
                sweep: chance(2) == 0,
            },
            answers: if chance(2) == 0 { Answers::Inline } else { Answers::Threaded },
            threads: 1 + chance(12),
            racing: chance(3) == 0,
            verify: chance(3) == 0,
            rogue: chance(2) == 0 && install != InstallMethod::Continue,
        }
    }

    fn page(&self) -> u64 {
        if self.backing == HUGE { 2 << 20 } else { 4096 }
    }

    fn pages(&self) -> u64 {
        if self.backing == HUGE { 8 } else { 64 + Random::new(self.seed ^ 77).below(200) }
    }
}

/// The word of a page that a thread counts its visits in.
fn own_word(round: &Round, page: u64, thread: u64) -> u64 {
    page * round.page() + 64 + 8 * thread
}

/// Checks a page but for the words that threads count in.
fn check(round: &Round, layout: &Layout, page: u64) {
    let start = page * round.page();
    let counted = own_word(round, page, 0)..own_word(round, page, round.threads);
    // A huge page has very many words.
    let step = if round.verify && round.backing != HUGE { 8 } else { round.page() / 8 };
    let mut offset = start;
    while offset < start + round.page() {
        if !counted.contains(&offset) {
            assert_eq!(peek(layout, offset), word(REGION, offset), "{round:?} at {offset:#x}");
        }
        offset += step;
    }
}

/// Visits every page, and counts the visit in it.
fn guest(round: &Round, layout: &Layout, thread: u64, barrier: &Barrier) {
    let order = if round.racing {
        (0..round.pages()).collect()
    } else {
        shuffled(round.pages(), round.seed * 64 + thread)
    };
    let mut random = Random::new(round.seed * 64 + thread);
    for page in order {
        if round.racing {
            barrier.wait();
        }
        let offset = own_word(round, page, thread);
        // First touched by reading or by writing.
        if random.below(2) == 0 {
            check(round, layout, page);
        }
        let before = peek(layout, offset);
        assert_eq!(before, word(REGION, offset), "{round:?} page {page}");
        poke(layout, offset, before.wrapping_add(1));
        check(round, layout, page);
    }
}

/// Installs the right bytes in pages at random. The kernel lets any userfaultfd of the process do
/// that in memory registered with another.
fn rogue(round: &Round, layout: &Layout, over: &AtomicBool) -> u64 {
    let userfaultfd = Options::new().open().unwrap();
    let start = layout.get(REGION).unwrap().guest_view().range().start().get();
    let mut bytes = vec![0; round.page() as usize];
    let mut random = Random::new(round.seed ^ 0xbad);
    let mut installed = 0;
    while !over.load(SeqCst) {
        let offset = random.below(round.pages()) * round.page();
        fill_pattern(REGION, offset, &mut bytes);
        match userfaultfd.copy(HostAddress::new(start + offset), &bytes, CopyMode::WAKE) {
            Ok(Outcome::Installed { .. }) => installed += 1,
            Ok(_) => thread::yield_now(),
            Err(error) => panic!("{round:?}: {error}"),
        }
    }
    installed
}

fn run(round: &Round) -> (u64, u64) {
    let granules = round.pages();
    let (ledger, source) = Ledger::new(granules, round.answers).source();
    let pager = Pager::builder(layout(round.backing, granules * round.page()))
        .delivery(round.delivery)
        .install(Some(round.install))
        .events(round.events)
        .prefetch(round.prefetch)
        .start(source)
        .unwrap_or_else(|error| panic!("{round:?}: {error}"));
    let over = Arc::new(AtomicBool::new(false));
    let barrier = Barrier::new(round.threads as usize);
    let installed_by_rogue = AtomicU64::new(0);
    thread::scope(|scope| {
        let (layout, barrier, over) = (pager.layout(), &barrier, &over);
        if round.rogue {
            scope.spawn(|| installed_by_rogue.store(rogue(round, layout, over), SeqCst));
        }
        let threads: Vec<_> = (0..round.threads)
            .map(|thread| scope.spawn(move || guest(round, layout, thread, barrier)))
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        over.store(true, SeqCst);
        for result in results {
            result.unwrap();
        }
    });
    // Nothing that was written is lost, be it to an install that came late.
    for page in 0..granules {
        check(round, pager.layout(), page);
        for thread in 0..round.threads {
            let offset = own_word(round, page, thread);
            let expected = word(REGION, offset).wrapping_add(1);
            assert_eq!(peek(pager.layout(), offset), expected, "{round:?} page {page} {thread}");
        }
    }
    ledger.check_once();
    assert_eq!(pager.last_error(), None, "{round:?}");
    // What the rogue installed was touched without a fault: only the sweep asks for it.
    if !round.rogue || round.prefetch.sweep {
        let status = pager.wait_complete(PATIENCE);
        assert!(matches!(status, Status::Complete(_)), "{round:?}: {status:?}");
        assert_eq!(ledger.answered_total(), granules, "{round:?}");
    }
    let counts = pager.statistics().counts;
    assert_eq!((counts.poisoned, counts.panics), (0, 0), "{round:?}: {counts:?}");
    assert!(round.rogue || counts.eexist == 0, "{round:?}: {counts:?}");
    (installed_by_rogue.load(SeqCst), counts.eexist)
}

fn stress(backing: Backing, installs: &[InstallMethod], seed: u64) {
    let _watch = watch(100);
    let until = Instant::now() + ENOUGH;
    let (mut rounds, mut by_rogue, mut eexist) = (0, 0, 0);
    while rounds < 20 || Instant::now() < until {
        let (installed, found) = run(&Round::new(seed + rounds, backing, installs));
        by_rogue += installed;
        eexist += found;
        rounds += 1;
    }
    assert!(by_rogue > 0, "the rogue installed nothing in {rounds} rounds");
    assert!(eexist > 0, "no install met a page of the rogue's in {rounds} rounds");
}

#[test]
fn stress_anonymous_memory() {
    if userfaultfd() {
        let mut installs = vec![InstallMethod::Copy, InstallMethod::Move];
        installs.retain(|install| available(*install));
        stress(Backing::Anonymous, &installs, 1000);
    }
}

#[test]
fn stress_shmem() {
    if userfaultfd() {
        stress(Backing::Memfd, &[InstallMethod::Copy, InstallMethod::Continue], 2000);
    }
}

#[test]
fn stress_hugetlb() {
    if userfaultfd() && huge_pages(8) {
        stress(HUGE, &[InstallMethod::Copy, InstallMethod::Continue], 3000);
    }
}
