//! A guest of threads, which read and write memory that is not all there yet, and check what
//! they read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    thread::JoinHandle,
    time::Instant,
};

use clap::ValueEnum;
use pageferry::memory::{GranuleIndex, Region, State};

use super::{
    guest::{Left, Seen},
    pattern::{PAGE, Pattern, WORDS},
};
use crate::bench::histogram::Histogram;

/// What the guest's threads do.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Random and sequential, reads and writes, half and half
    Mixed,
    /// Uniformly random reads and writes
    Random,
    /// Each thread reads and writes its own part, upwards
    Sequential,
    /// A few pages often, most pages seldom
    Zipf,
}

/// The word of each page that the guest writes: the last. The page's owner adds one to it.
const WRITTEN: u64 = WORDS - 1;

/// Threads that run. Dropping this asks them to stop.
#[derive(Debug)]
pub(super) struct Threads {
    threads: Vec<JoinHandle<SeenByThread>>,
    stop: Arc<AtomicBool>,
    touches: Arc<AtomicU64>,
}

/// What one thread saw and did.
struct SeenByThread {
    /// How long accesses to granules took that were not there before.
    latency: Box<Histogram>,
    touches: u64,
    writes: u64,
    wrong: u64,
    /// How often each page that the thread owns was written, in order.
    increments: Vec<u32>,
}

/// How often each page was written.
#[derive(Clone, Debug)]
pub(super) struct Increments {
    by_thread: Vec<Vec<u32>>,
}

impl Increments {
    pub(super) fn of(&self, page: u64) -> u64 {
        let threads = self.by_thread.len() as u64;
        u64::from(self.by_thread[(page % threads) as usize][(page / threads) as usize])
    }
}

impl Threads {
    /// Starts `threads` threads, each making `touches` accesses at the most.
    pub(super) fn start(
        region: &Arc<Region>,
        pattern: Pattern,
        workload: Workload,
        threads: u64,
        touches: u64,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let threads = (0..threads)
            .map(|thread| {
                let guest = Thread {
                    region: Arc::clone(region),
                    pattern,
                    thread,
                    threads,
                    pages: region.len() / PAGE,
                    stop: Arc::clone(&stop),
                };
                let done = Arc::clone(&done);
                std::thread::Builder::new()
                    .name(format!("guest-{thread}"))
                    .spawn(move || guest.run(workload, touches, &done))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { threads, stop, touches: done })
    }

    /// Accesses made so far.
    pub(super) fn touches(&self) -> u64 {
        self.touches.load(Relaxed)
    }

    pub(super) fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for the threads and adds up what they saw.
    pub(super) fn join(mut self) -> anyhow::Result<Seen> {
        let mut latency = Histogram::new();
        let (mut accesses, mut writes, mut wrong) = (0, 0, 0);
        let mut by_thread = Vec::new();
        for thread in std::mem::take(&mut self.threads) {
            let Ok(seen) = thread.join() else { anyhow::bail!("a guest thread panicked") };
            latency.merge(&seen.latency);
            accesses += seen.touches;
            writes += seen.writes;
            wrong += seen.wrong;
            by_thread.push(seen.increments);
        }
        let left = Left::Counted(Increments { by_thread });
        Ok(Seen {
            accesses,
            writes: Some(writes),
            wrong,
            latency: Some(latency),
            left,
            vcpus: None,
        })
    }
}

impl Drop for Threads {
    /// Asks the threads to end after their current access.
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// One of the guest's threads.
struct Thread {
    region: Arc<Region>,
    pattern: Pattern,
    thread: u64,
    threads: u64,
    pages: u64,
    stop: Arc<AtomicBool>,
}

impl Thread {
    fn run(&self, workload: Workload, touches: u64, done: &AtomicU64) -> SeenByThread {
        let owned = self.pages.div_ceil(self.threads) as usize;
        let mut seen = SeenByThread {
            latency: Histogram::new(),
            touches: 0,
            writes: 0,
            wrong: 0,
            increments: vec![0; owned],
        };
        let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(self.thread + 1) | 1;
        // Each thread's stream begins in its own part of the memory.
        let mut stream = self.pages * self.thread / self.threads;
        while seen.touches < touches && !self.stop.load(Relaxed) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let sequential = match workload {
                Workload::Sequential => true,
                Workload::Mixed => random & 1 == 0,
                Workload::Random | Workload::Zipf => false,
            };
            let page = if sequential {
                stream = (stream + 1) % self.pages;
                stream
            } else if workload == Workload::Zipf {
                self.zipf(random)
            } else {
                (random >> 8) % self.pages
            };
            self.touch(page, random, &mut seen);
            seen.touches += 1;
            if seen.touches.is_multiple_of(256) {
                done.fetch_add(256, Relaxed);
            }
        }
        seen
    }

    /// A page whose rank is distributed as 1/rank, ranks being scattered over the memory.
    fn zipf(&self, random: u64) -> u64 {
        let uniform = (random >> 11) as f64 / (1u64 << 53) as f64;
        let rank = ((self.pages as f64).powf(uniform) as u64).min(self.pages - 1);
        rank.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.pages
    }

    /// Reads a page, and writes it if it is this thread's to write and the dice say so.
    fn touch(&self, page: u64, random: u64, seen: &mut SeenByThread) {
        let granule = GranuleIndex::new(page * PAGE / self.region.granule().bytes());
        let absent = self.region.page_map().state(granule) != State::Present;
        let word = (random >> 40) % WRITTEN;
        let started = Instant::now();
        let value = self.read(page, word);
        if absent {
            seen.latency.record(started.elapsed());
        }
        seen.wrong += u64::from(value != self.pattern.word(page, word));
        if page % self.threads == self.thread && random & 6 == 0 {
            let index = (page / self.threads) as usize;
            let before = self.read(page, WRITTEN);
            let expected =
                self.pattern.word(page, WRITTEN).wrapping_add(seen.increments[index].into());
            seen.wrong += u64::from(before != expected);
            self.write(page, WRITTEN, before.wrapping_add(1));
            seen.increments[index] += 1;
            seen.writes += 1;
        }
    }

    fn at(&self, page: u64, word: u64) -> *mut u64 {
        assert!(page < self.pages && word < WORDS);
        self.region.guest_view().as_ptr().wrapping_add((page * PAGE + word * 8) as usize).cast()
    }

    fn read(&self, page: u64, word: u64) -> u64 {
        // SAFETY: `at` checks that the word lies in the region, which `self.region` keeps mapped;
        // it is aligned, and no reference to guest memory exists.
        u64::from_le(unsafe { self.at(page, word).read_volatile() })
    }

    fn write(&self, page: u64, word: u64, value: u64) {
        // SAFETY: as in `read`. Only the page's owner writes it, and nobody else reads this word.
        unsafe { self.at(page, word).write_volatile(value.to_le()) }
    }
}
