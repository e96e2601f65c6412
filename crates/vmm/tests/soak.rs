//! Soak: every delivery on every set-up, every payload, in both rings, with pages of 4 KiB and of
//! 2 MiB, 2 vCPUs. Not one word is wrong, and every fault is accounted for.
//!
//! Once, unless the variable `PAGEFERRY_SOAK` says how many times: then each round tells of itself as it
//! ends. Seeds, what the vCPUs share, and who answers differ from round to round: after four,
//! every payload had each combination of these.
//!
//! How much memory a machine has follows from how long a first case takes: as much as makes a case
//! of a tenth of a second, within bounds. A round is 468 cases, and took 27 s with ring 0 emulated
//! (PVM).

mod common;

use std::{
    env,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_memory::PageSize;
use pageferry_paging::Delivery;
use pageferry_testing::fail;
use pageferry_vmm::{Operation, Order, Pattern, PatternOptions, Ring, Setup, Share, VmConfig};

/// What says how many rounds.
const ROUNDS: &str = "PAGEFERRY_SOAK";
const VCPUS: u16 = 2;
/// How long a case is to take.
const WANTED: Duration = Duration::from_millis(100);
/// With more than this for the smallest case, nobody would wait for the end of a round.
const TOO_SLOW: Duration = Duration::from_secs(4);

/// Pages that a machine has at least, and at most.
fn bounds(page_size: PageSize) -> (u64, u64) {
    if page_size == SMALL { (16, 1024) } else { (2, 4) }
}

fn machine(
    (order, operation, ring): (Order, Operation, Ring),
    page_size: PageSize,
    pages: u64,
    share: Share,
) -> VmConfig {
    let mut config = config(order, operation, ring, share, VCPUS, pages * page_size.bytes());
    config.payload.pattern = Pattern { zero_every: 16 };
    if ring == Ring::Zero {
        // Few words of each, for hosts that emulate it.
        config.payload.unit = page_size;
    }
    config
}

/// What machines of such pages need; `None`, having said so, if the host has it not.
fn reserve(page_size: PageSize) -> Option<Option<HugePages>> {
    if page_size == SMALL { Some(None) } else { HugePages::reserve(bounds(HUGE).1).map(Some) }
}

/// How many pages of this size a machine whose guest is in this ring gets. `None`, having said so, if
/// it takes too long here.
fn calibrate(ring: Ring, page_size: PageSize) -> Option<u64> {
    let case = Case { delivery: Delivery::Queue, setup: Setup::Minor, page_size };
    let payload = (Order::Random, Operation::ReadModifyWrite, ring);
    let once = |pages| {
        let started = Instant::now();
        let config = machine(payload, page_size, pages, Share::Own);
        Paged::new(case, config, PatternOptions::default()).run_and_check(0);
        started.elapsed()
    };
    // The shortest of a few: whatever else the host does only adds to it.
    let time = |pages| (0..3).map(|_| once(pages)).min().expect("three");
    let (least, most) = bounds(page_size);
    let took = time(least);
    if took > TOO_SLOW {
        println!(
            "skipped: needs a host where a guest in ring {ring:?} is faster: {took:?} for {least} \
             pages of {page_size}"
        );
        return None;
    }
    let mut pages = least;
    while pages < most && time(2 * pages) < WANTED {
        pages *= 2;
    }
    Some(pages)
}

/// Ends the process when a case does not end, and names the case.
struct Watchdog(mpsc::Sender<String>);

impl Watchdog {
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel::<String>();
        thread::spawn(move || {
            let mut case = "the first case".to_owned();
            loop {
                // What waits in a case gives up earlier, and says for what.
                match receiver.recv_timeout(2 * PATIENCE) {
                    Ok(next) => case = next,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => fail(&format!("{case}: it does not end")),
                }
            }
        });
        Self(sender)
    }

    fn enter(&self, case: String) {
        self.0.send(case).expect("it listens");
    }
}

#[derive(Copy, Clone, Default)]
struct Totals {
    cases: u64,
    faults: u64,
    pages: u64,
}

impl Totals {
    fn add(&mut self, other: Self) {
        self.cases += other.cases;
        self.faults += other.faults;
        self.pages += other.pages;
    }

    fn line(&self, what: &str, took: Duration) -> String {
        let Self { cases, faults, pages } = self;
        let seconds = took.as_secs_f64();
        format!("{what}: {cases} cases, {faults} faults, {pages} pages, {seconds:.1} s")
    }
}

/// Every case of machines of this shape.
fn round(round: u64, ring: Ring, page_size: PageSize, pages: u64, watchdog: &Watchdog) -> Totals {
    let mut totals = Totals::default();
    let of_ring = || payloads().filter(|(_, _, of)| *of == ring);
    for case in cases(page_size) {
        for (number, payload) in (round..).zip(of_ring()) {
            let share = if number % 2 == 0 { Share::Own } else { Share::All };
            let threads = if number / 2 % 2 == 0 { 0 } else { 2 };
            let mut config = machine(payload, page_size, pages, share);
            config.payload.seed = (round << 16) + number;
            watchdog.enter(name(case, &config));
            let alone = share == Share::Own && page_size == config.payload.unit;
            let source = PatternOptions { threads, ..PatternOptions::default() };
            let paged = Paged::new(case, config, source);
            paged.run_and_check(0);
            let counts = paged.pager.statistics().counts;
            if alone {
                // Nobody else touches a vCPU's pages: each fault brought one, or came late.
                let accounted = counts.demand + counts.stale;
                assert_eq!(counts.faults, accounted, "{}: {counts:?}", paged.name);
            }
            totals.add(Totals { cases: 1, faults: counts.faults, pages: counts.installed });
        }
    }
    totals
}

#[test]
fn soak() {
    if !can_page() {
        return;
    }
    let wanted = env::var(ROUNDS).ok();
    let rounds = wanted.as_deref().map_or(1, |rounds| {
        rounds.parse().unwrap_or_else(|_| panic!("{ROUNDS}={rounds}: not a number of rounds"))
    });
    // Whoever asked for it wants to see how far it is, and the test harness keeps back what tests print.
    let say = |line: &str| if wanted.is_some() { eprintln_now(line) } else { println!("{line}") };
    let mut shapes = Vec::new();
    for page_size in [SMALL, HUGE] {
        let Some(_pages) = reserve(page_size) else { continue };
        let watchdog = Watchdog::new();
        for ring in Ring::ALL {
            watchdog.enter(format!("the first of ring {ring:?} with pages of {page_size}"));
            if let Some(pages) = calibrate(ring, page_size) {
                say(&format!("ring {ring:?}: machines of {pages} pages of {page_size}"));
                shapes.push((ring, page_size, pages));
            }
        }
    }
    let (started, mut all) = (Instant::now(), Totals::default());
    for number in 0..rounds {
        let (started, mut totals) = (Instant::now(), Totals::default());
        for &(ring, page_size, pages) in &shapes {
            // Others may want huge pages, too, and wait for them.
            let Some(_pages) = reserve(page_size) else { continue };
            totals.add(round(number, ring, page_size, pages, &Watchdog::new()));
        }
        say(&totals.line(&format!("round {} of {rounds}", number + 1), started.elapsed()));
        all.add(totals);
    }
    say(&all.line(&format!("soak, {rounds} rounds"), started.elapsed()));
}

/// As `eprintln`, but at once whatever the test harness does.
fn eprintln_now(line: &str) {
    use std::io::Write;
    writeln!(std::io::stderr(), "{line}").expect("somebody who listens");
}
