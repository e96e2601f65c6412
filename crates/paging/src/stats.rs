//! Counters and latency histograms of one pager.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use crate::histogram::{Histogram, Latency};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        #[derive(Copy, Clone, Debug)]
        #[allow(non_camel_case_types)]
        pub(crate) enum Counter { $($name),* }

        const COUNTERS: usize = [$(Counter::$name),*].len();

        /// Counts since the pager started. Granules unless said otherwise.
        #[derive(Copy, Clone, Default, Debug, PartialEq, Eq, serde::Serialize)]
        #[non_exhaustive]
        pub struct Counts { $($(#[$doc])* pub $name: u64),* }

        impl Counts {
            fn from_totals(totals: &[u64; COUNTERS]) -> Self {
                Self { $($name: totals[Counter::$name as usize]),* }
            }
        }
    };
}

counters! {
    /// Faults delivered, of every kind, stale ones included.
    faults,
    /// Granules that a thread was stopped on and that were requested for it.
    demand,
    /// Granules requested that no thread was stopped on.
    prefetched,
    /// Granules that a thread came to need after they were requested as prefetch.
    prefetch_hits,
    /// Granules installed.
    installed,
    /// Granules that the source said are zero, and pages that the guest removed and touched again.
    zero,
    /// Granules that arrived unasked and were taken.
    pushed,
    /// Granules that arrived though they were no longer wanted, and were dropped.
    duplicate,
    /// Installs that found a page there (EEXIST).
    eexist,
    /// Installs told to try again because the address space was changing (EAGAIN).
    eagain,
    /// Granules poisoned.
    poisoned,
    /// Granules made inaccessible (`PROT_NONE`) as the kernel could not poison them, once for each
    /// view; counted as poisoned, too.
    closed,
    /// Writes to protected pages that were reported. Pages.
    written,
    /// Granules that the guest removed.
    removed,
    /// Faults on granules already there: the thread was sent back in.
    stale,
    /// Faults that met no source; their threads wait for one.
    stalled,
    /// Latency samples lost because too many requests were in flight to time each.
    untimed,
    /// Panics of a delivery thread that were survived.
    panics,
    /// Install system calls issued.
    install_calls,
    /// Reads of the queue that returned something.
    reads,
    /// Times a MOVE install fell back to COPY for want of a staging page.
    move_fallbacks,
}

/// What is timed, for each granule that a thread waited for.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Timed {
    /// From the fault's arrival in this process to its claim.
    Queueing,
    /// From the request to the bytes.
    Fetch,
    /// From the bytes to their granules being present: the installing system calls.
    Install,
    /// From the fault's arrival to the granule being present.
    Total,
}
const TIMED: usize = 4;

/// Threads record into different slots so that they do not share cache lines.
const SLOTS: usize = 16;

#[repr(align(128))]
struct Slot {
    counters: [AtomicU64; COUNTERS],
    histograms: [Histogram; TIMED],
}

pub(crate) struct Stats {
    slots: Box<[Slot]>,
    started: Instant,
    first_page: AtomicU64,
    complete: AtomicU64,
}

thread_local! {
    // Constant initialiser and no destructor: usable in a signal handler.
    static SLOT: Cell<usize> = const { Cell::new(usize::MAX) };
}
static NEXT_SLOT: AtomicUsize = AtomicUsize::new(0);

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            slots: (0..SLOTS)
                .map(|_| Slot {
                    counters: std::array::from_fn(|_| AtomicU64::new(0)),
                    histograms: std::array::from_fn(|_| Histogram::new()),
                })
                .collect(),
            started: Instant::now(),
            first_page: AtomicU64::new(0),
            complete: AtomicU64::new(0),
        }
    }

    fn slot(&self) -> &Slot {
        let slot = SLOT.with(|slot| {
            if slot.get() == usize::MAX {
                slot.set(NEXT_SLOT.fetch_add(1, Relaxed) % SLOTS);
            }
            slot.get()
        });
        &self.slots[slot]
    }

    pub(crate) fn add(&self, counter: Counter, n: u64) {
        if n > 0 {
            self.slot().counters[counter as usize].fetch_add(n, Relaxed);
        }
    }

    pub(crate) fn time(&self, what: Timed, nanos: u64) {
        self.slot().histograms[what as usize].record(nanos);
    }

    /// Nanoseconds since the pager started: the clock of every [`Timed`] value.
    pub(crate) fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    pub(crate) fn mark_first_page(&self) {
        if self.first_page.load(Relaxed) == 0 {
            let now = self.now().max(1);
            // Losing the race means that another thread's mark stands: equally right.
            let _ = self.first_page.compare_exchange(0, now, Relaxed, Relaxed);
        }
    }

    pub(crate) fn mark_complete(&self) {
        let _ = self.complete.compare_exchange(0, self.now().max(1), Relaxed, Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Statistics {
        let mut totals = [0; COUNTERS];
        let mut latencies: [Latency; TIMED] = std::array::from_fn(|_| Latency::empty());
        for slot in &self.slots {
            for (total, counter) in totals.iter_mut().zip(&slot.counters) {
                *total += counter.load(Relaxed);
            }
            for (total, histogram) in latencies.iter_mut().zip(&slot.histograms) {
                histogram.add_to(total);
            }
        }
        let since_start = |mark: &AtomicU64| match mark.load(Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        };
        let [queueing, fetch, install, total] = latencies;
        Statistics {
            counts: Counts::from_totals(&totals),
            queueing,
            fetch,
            install,
            total,
            time_to_first_page: since_start(&self.first_page),
            time_to_complete: since_start(&self.complete),
        }
    }
}

/// What a pager did so far.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Statistics {
    /// How often each thing happened.
    pub counts: Counts,
    /// From a fault's arrival in this process (its message read, its signal caught) to the claim
    /// of its granule.
    pub queueing: Latency,
    /// From the request to the bytes, for granules that a thread waited for.
    pub fetch: Latency,
    /// From the bytes of an answer to their granules being present: the installing system calls.
    pub install: Latency,
    /// From a fault's arrival to its granule being present. The time that the kernel held the
    /// fault in its queue before it was read is not in it: only the guest can measure that.
    pub total: Latency,
    /// From the pager's start to the first granule installed.
    pub time_to_first_page: Option<Duration>,
    /// From the pager's start to the last granule accounted for.
    pub time_to_complete: Option<Duration>,
}
