//! The pager's own thread: sweeps what is still absent, and notices that all is there.

use std::{
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::*},
    thread::{self, JoinHandle},
    time::Duration,
};

use pageferry_memory::{GranuleIndex, GranuleRange, State, WaitPolicy};

use crate::{
    Span,
    core::{Core, WaitForReader},
    delivery::PANICS,
    stats::Counter,
};

/// How much one sweeping request asks for.
const CHUNK: u64 = 256 << 10;
/// How many such requests are on their way at once: enough to keep a connection busy, little
/// enough that a fault which finds its granule among them need not wait long.
const IN_FLIGHT: usize = 4;
/// How often a thread with nothing to do looks whether it should end.
const TICK: Duration = Duration::from_millis(50);

pub(crate) fn spawn(core: Arc<Core>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("pf-background".into()).spawn(move || {
        for panics in 0..2 * PANICS {
            // A source that panics when it is asked in advance may still serve faults, and
            // completion be agreed upon: the sweep is given up first.
            let sweeping = core.prefetcher.policy.sweep && panics < PANICS;
            if catch_unwind(AssertUnwindSafe(|| run(&core, sweeping))).is_ok() {
                return;
            }
            core.stats.add(Counter::panics, 1);
            tracing::error!("the background thread panicked");
            // What was being asked for is absent again; somebody may wait for it already.
            core.wake_everything();
        }
        core.health().refused = Some(format!("the background thread panicked {PANICS} times"));
    })
}

/// Keeps the pool of movable pages populated.
pub(crate) fn spawn_refiller(core: Arc<Core>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("pf-refill".into()).spawn(move || {
        let Some(movable) = &core.movable else { return };
        while !core.stopping.load(Acquire) {
            match movable.refill() {
                Ok(_) => movable.wait_for_empty(TICK),
                Err(error) => {
                    // Installs fall back to COPY, which reports its own shortage.
                    tracing::warn!("no pages to move in advance: {error}");
                    movable.wait_for_empty(TICK);
                }
            }
        }
    })
}

fn run(core: &Core, sweeping: bool) {
    let mut sweep = Sweep { cursor: 0, seen_fault: None, in_flight: VecDeque::new() };
    let mut agreed = false;
    while !core.stopping.load(Acquire) {
        if core.remaining() == 0 {
            if !agreed {
                core.stats.mark_complete();
                agreed = agree_on_completion(core);
            }
            core.wait_for_source_change(TICK);
        } else if !(sweeping && sweep.step(core)) {
            let incomplete = core.targets.iter().find(|t| !t.region.page_map().is_complete());
            if let Some(target) = incomplete {
                target.region.page_map().wait_complete(Some(TICK));
            }
        }
    }
}

/// False while there is nobody to agree with.
fn agree_on_completion(core: &Core) -> bool {
    let Some(source) = core.source.enter() else { return false };
    let counts = core.completion();
    match source.source().complete(counts) {
        Ok(()) => {
            core.health().agreed = Some(counts);
            core.note_source_change();
            true
        }
        Err(why) => {
            tracing::error!("all memory is there, but the source does not agree: {why}");
            core.source_lost(source.generation(), &why);
            false
        }
    }
}

struct Sweep {
    /// In granules of all regions, one after the other.
    cursor: u64,
    seen_fault: Option<(pageferry_memory::RegionId, GranuleIndex)>,
    in_flight: VecDeque<Span>,
}

impl Sweep {
    /// Asks for one chunk more. False when nothing is absent, or nobody is there to ask.
    fn step(&mut self, core: &Core) -> bool {
        if !self.make_room(core) {
            return true;
        }
        let fault = core.prefetcher.last_fault();
        if self.seen_fault != Some(fault) {
            self.seen_fault = Some(fault);
            let (region, granule) = fault;
            self.cursor = before(core, usize::from(region.get())) + granule.get();
        }
        let Some(next) = next_absent(core, self.cursor) else { return false };
        let Some(source) = core.source.enter() else { return false };
        let target = &core.targets[usize::from(next.region.get())];
        let count = (CHUNK >> target.region.granule().shift()).max(1);
        let first = next.granules.first();
        let looked_at = core.prefetch(&source, target, first, count, &WaitForReader(core));
        self.cursor = before(core, usize::from(next.region.get())) + first.get() + looked_at;
        if !source.source().answers_inline() {
            self.in_flight.push_back(target.span(GranuleRange::new(first, looked_at)));
        }
        true
    }

    /// Waits a little for the oldest chunk while too many are on their way. True when there is
    /// room for another.
    fn make_room(&mut self, core: &Core) -> bool {
        while let Some(oldest) = self.in_flight.front() {
            let map = core.targets[usize::from(oldest.region.get())].region.page_map();
            let (first, count) = (oldest.granules.first(), oldest.granules.count());
            let waiting = map
                .next_run(State::Requested, first, count)
                .filter(|run| run.first() < oldest.granules.end());
            let Some(waiting) = waiting else {
                self.in_flight.pop_front();
                continue;
            };
            if self.in_flight.len() < IN_FLIGHT {
                return true;
            }
            let policy = WaitPolicy { spins: 0, timeout: Some(TICK) };
            if map.wait(waiting.first(), policy).is_err() {
                // Still on its way: look whether the pager stops, then go on waiting.
                return false;
            }
        }
        true
    }
}

/// How many granules the regions in front of this one have.
fn before(core: &Core, region: usize) -> u64 {
    core.targets[..region].iter().map(|target| target.region.granules()).sum()
}

/// The first absent granules at the cursor or after it, or else from the beginning.
fn next_absent(core: &Core, cursor: u64) -> Option<Span> {
    let mut wrapped = None;
    let mut start = 0;
    for target in &core.targets {
        let map = target.region.page_map();
        let end = start + map.len();
        if cursor < end {
            let from = GranuleIndex::new(cursor.saturating_sub(start));
            if let Some(run) = map.next_run(State::Absent, from, map.len()) {
                return Some(target.span(run));
            }
        }
        if wrapped.is_none() && start < cursor {
            let run = map.next_run(State::Absent, GranuleIndex::new(0), map.len());
            wrapped = run.map(|run| target.span(run));
        }
        start = end;
    }
    wrapped
}
