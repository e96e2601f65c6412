//! The guest's process forks: its children do not have the memory, so that they see an error, never
//! zeros; and the parent is not disturbed. Each case runs in a process of its own, as `fork` copies the
//! memory of all pagers of a process.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use common::{child, *};
use pageferry_memory::{Advice, Backing, GranuleIndex, GranuleRange, Layout};
use pageferry_paging::{Delivery, Events, InstallMethod, Pager, Prefetch, Status};

const PAGE: u64 = 4096;
/// Enough that making all of it an error takes a moment.
const PAGES: u64 = 256;
const SIGBUS: i32 = 7;
const SIGSEGV: i32 = 11;

/// What became of a forked process.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Fate {
    Exit(i32),
    Signal(i32),
}

/// Forks; the child runs `work`, which must not allocate or take locks, and exits with its result.
fn fork(work: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child only does what is allowed between fork and exec, see above.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = work();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(code) };
    }
    pid
}

/// Waits for the end of a process. Allocates nothing, so that a forked process can use it.
fn wait_fate(pid: libc::pid_t) -> Fate {
    let mut status = 0;
    // SAFETY: a plain wait for a child of ours.
    let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(waited, pid);
    if libc::WIFSIGNALED(status) {
        Fate::Signal(libc::WTERMSIG(status))
    } else {
        Fate::Exit(libc::WEXITSTATUS(status))
    }
}

const ZEROS: i32 = 40;
const DATA: i32 = 41;
const OTHER: i32 = 42;

/// What a child sees of a page.
fn look(layout: &Layout, page: u64) -> i32 {
    match peek(layout, page * PAGE) {
        0 => ZEROS,
        found if found == word(REGION, page * PAGE) => DATA,
        _ => OTHER,
    }
}

struct Setup {
    delivery: Delivery,
    backing: Backing,
    install: InstallMethod,
    events: Events,
}

impl Setup {
    fn parse(case: &[&str]) -> Self {
        let (backing, install) = match case[1] {
            "copy" => (Backing::Anonymous, InstallMethod::Copy),
            "move" => (Backing::Anonymous, InstallMethod::Move),
            "shared" => (Backing::Memfd, InstallMethod::Copy),
            "continue" => (Backing::Memfd, InstallMethod::Continue),
            other => panic!("{other}"),
        };
        let events = if case[2] == "watch" { Events::Watch } else { Events::Ignore };
        Self { delivery: delivery_named(case[0]), backing, install, events }
    }

    /// A pager of which the first half of the pages is there, and the source holds the rest back.
    fn start(&self, answers: Answers) -> (Arc<Ledger>, Pager) {
        let (ledger, source) = Ledger::new(PAGES, answers).source();
        let pager = Pager::builder(layout(self.backing, PAGES * PAGE))
            .delivery(self.delivery)
            .install(Some(self.install))
            .events(self.events)
            .prefetch(Prefetch::NONE)
            .start(source)
            .unwrap();
        for page in 0..PAGES / 2 {
            assert_eq!(look(pager.layout(), page), DATA);
        }
        (ledger, pager)
    }
}

/// The parent goes on, and everything arrives as if nothing had happened.
fn finish(pager: &Pager, ledger: &Ledger) {
    verify_all(pager.layout());
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{status:?}");
    assert_eq!(pager.last_error(), None);
    ledger.check_once();
    let counts = pager.statistics().counts;
    assert_eq!((counts.poisoned, counts.installed), (0, PAGES), "{counts:?}");
}

fn is_error(fate: Fate) -> bool {
    matches!(fate, Fate::Signal(SIGBUS | SIGSEGV))
}

/// Children that touch what is absent, or is there, or is on its way.
fn children_touch(setup: &Setup) {
    let (ledger, pager) = setup.start(Answers::Threaded);
    let layout = pager.layout();
    child::reached();
    for round in 0..8 {
        for page in [PAGES - 1 - round, round] {
            let fate = wait_fate(fork(|| look(layout, page)));
            assert!(is_error(fate), "page {page}: {fate:?}");
        }
        ledger.hold();
        let page = PAGES / 2 + round;
        thread::scope(|scope| {
            let waiting = scope.spawn(|| look(layout, page));
            wait_for("a request", || ledger.asked_of(page) == 1);
            let child = fork(|| look(layout, page));
            ledger.release();
            assert_eq!(waiting.join().unwrap(), DATA, "the parent's thread");
            let fate = wait_fate(child);
            assert!(is_error(fate), "on its way in round {round}: {fate:?}");
        });
    }
    finish(&pager, &ledger);
    // Without a pager there is nothing left to be careful about.
    let region = Arc::clone(layout.get(REGION).unwrap());
    drop(pager);
    let layout = Layout::new(vec![region]).unwrap();
    assert_eq!(wait_fate(fork(|| look(&layout, PAGES - 1))), Fate::Exit(DATA));
}

/// A daemon forks twice: the second time at once, when the first fork may not have been dealt with.
fn children_fork(setup: &Setup) {
    let (ledger, pager) = setup.start(Answers::Inline);
    let layout = pager.layout();
    child::reached();
    for round in 0..8 {
        let child = fork(|| {
            let grandchild = fork(|| look(layout, PAGES - 1));
            match wait_fate(grandchild) {
                fate if is_error(fate) => 0,
                Fate::Signal(_) => 1,
                Fate::Exit(code) => code,
            }
        });
        assert_eq!(wait_fate(child), Fate::Exit(0), "round {round}");
    }
    finish(&pager, &ledger);
}

/// Children that change their copy of the address space at once.
fn children_remove(setup: &Setup) {
    let (ledger, pager) = setup.start(Answers::Inline);
    let region = pager.layout().get(REGION).unwrap();
    let all = region.guest_view().range();
    child::reached();
    for round in 0..8 {
        let child = fork(|| {
            let (start, len) = (all.start().as_ptr().cast(), all.len() as usize);
            // SAFETY: the child's own copy of memory that it does not use any more.
            let result = unsafe {
                if round % 2 == 0 {
                    libc::madvise(start, len / 2, libc::MADV_DONTNEED)
                } else {
                    libc::munmap(start, len)
                }
            };
            // Refused, as there is nothing; but not held up.
            i32::from(result != 0)
        });
        let fate = wait_fate(child);
        assert!(matches!(fate, Fate::Exit(0 | 1)), "round {round}: {fate:?}");
    }
    finish(&pager, &ledger);
}

/// Forks while other threads fault, remove and allocate: whoever forks holds the locks of the
/// allocator until the engine has read the fork's event.
fn forks_among_events(setup: &Setup) {
    let (_, source) = Ledger::new(PAGES, Answers::Threaded).source();
    let pager = Pager::builder(layout(setup.backing, PAGES * PAGE))
        .delivery(setup.delivery)
        .install(Some(setup.install))
        .prefetch(Prefetch::NONE)
        .start(source)
        .unwrap();
    let over = AtomicBool::new(false);
    child::reached();
    thread::scope(|scope| {
        let (layout, over) = (pager.layout(), &over);
        let region = layout.get(REGION).unwrap();
        for number in 0..2 {
            scope.spawn(move || {
                let mut random = Random::new(number);
                while !over.load(SeqCst) {
                    let page = random.below(PAGES / 2);
                    assert_eq!(look(layout, page), DATA);
                    drop(std::hint::black_box(vec![0_u8; 1 << (6 + random.below(12))]));
                }
            });
        }
        scope.spawn(move || {
            let advice =
                if setup.backing == Backing::Memfd { Advice::Remove } else { Advice::DontNeed };
            let mut random = Random::new(9);
            while !over.load(SeqCst) {
                let page = PAGES / 2 + random.below(PAGES / 2);
                let run = GranuleRange::one(GranuleIndex::new(page));
                region.guest_view().advise(region.host_range(run), advice).unwrap();
                assert_eq!(look(layout, page), ZEROS);
            }
        });
        let until = Instant::now() + Duration::from_millis(100);
        let mut forks = 0;
        while Instant::now() < until || forks < 5 {
            assert_eq!(wait_fate(fork(|| 7)), Fate::Exit(7));
            forks += 1;
        }
        over.store(true, SeqCst);
    });
    assert_eq!(pager.last_error(), None);
}

/// While a child lives that was forked before, the parent's pages are installed as ever.
fn a_child_lives_on(setup: &Setup) {
    let (ledger, pager) = setup.start(Answers::Inline);
    child::reached();
    let child = fork(|| {
        loop {
            // SAFETY: waits for a signal, and touches nothing.
            unsafe { libc::pause() };
        }
    });
    finish(&pager, &ledger);
    // SAFETY: the child of this test.
    unsafe { libc::kill(child, libc::SIGKILL) };
    assert_eq!(wait_fate(child), Fate::Signal(libc::SIGKILL));
}

/// The pager goes away while children are being made.
fn dropped_among_forks(setup: &Setup) {
    for _ in 0..6 {
        let (_, pager) = setup.start(Answers::Inline);
        let region = Arc::clone(pager.layout().get(REGION).unwrap());
        let layout = Layout::new(vec![Arc::clone(&region)]).unwrap();
        child::reached();
        thread::scope(|scope| {
            let forker = scope.spawn(|| {
                for round in 0..6 {
                    let fate = wait_fate(fork(|| look(&layout, PAGES - 1)));
                    assert!(is_error(fate), "round {round}: {fate:?}");
                }
            });
            drop(pager);
            forker.join().unwrap();
        });
        // What is missing stays missing.
        let fate = wait_fate(fork(|| look(&layout, PAGES - 1)));
        assert!(is_error(fate), "afterwards: {fate:?}");
    }
}

type Step = fn(&Setup);

const STEPS: [(&str, Step); 6] = [
    ("children touch", children_touch),
    ("children fork", children_fork),
    ("children remove", children_remove),
    ("forks among events", forks_among_events),
    ("a child lives on", a_child_lives_on),
    ("dropped among forks", dropped_among_forks),
];

fn run_case(case: &str) {
    child::end_if_stuck();
    let parts: Vec<&str> = case.split('/').collect();
    let (_, step) = STEPS.into_iter().find(|(name, _)| *name == parts[3]).unwrap();
    step(&Setup::parse(&parts));
}

fn every_setup(test: &str, step: &str, memory: &[&str], events: &[&str]) {
    if let Some(case) = child::case() {
        return run_case(&case);
    }
    if !userfaultfd() {
        return;
    }
    for delivery in DELIVERIES {
        for memory in memory {
            if *memory == "move" && !available(InstallMethod::Move) {
                continue;
            }
            for events in events {
                let case = format!("{delivery}/{memory}/{events}/{step}");
                child::expect(test, &case, child::End::Exit(0));
            }
        }
    }
}

const ALL: [&str; 4] = ["copy", "move", "shared", "continue"];

#[test]
fn children_see_an_error() {
    let test = "children_see_an_error";
    every_setup(test, "children touch", &ALL, &["watch", "ignore"]);
}

#[test]
fn children_may_fork_at_once() {
    let test = "children_may_fork_at_once";
    every_setup(test, "children fork", &["copy", "continue"], &["watch", "ignore"]);
}

#[test]
fn children_may_change_their_address_space_at_once() {
    let test = "children_may_change_their_address_space_at_once";
    every_setup(test, "children remove", &["copy", "continue"], &["watch"]);
}

#[test]
fn forks_among_faults_and_events_go_on() {
    let test = "forks_among_faults_and_events_go_on";
    every_setup(test, "forks among events", &["copy", "continue"], &["watch"]);
}

#[test]
fn a_living_child_does_not_disturb_the_parent() {
    every_setup("a_living_child_does_not_disturb_the_parent", "a child lives on", &ALL, &["watch"]);
}

#[test]
fn a_pager_dropped_among_forks_leaves_no_zeros() {
    let test = "a_pager_dropped_among_forks_leaves_no_zeros";
    every_setup(test, "dropped among forks", &["copy", "shared"], &["watch", "ignore"]);
}
