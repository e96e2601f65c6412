//! Threads that write and say afterwards what they wrote, and somebody who has a copy of the memory
//! brought up to date by nothing but harvests.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use pageferry_dirty::{DirtySet, Tracked, Tracker};
use pageferry_memory::{HostAddress, Mapping};
use pageferry_testing::{Effort, Random, wait_for};

pub(crate) const WRITERS: u64 = 6;
pub(crate) const HARVESTS: u32 = 1000;
/// An emulated machine does not get as far.
const TIME: Duration = Duration::from_secs(20);

/// Threads that count up the first word of random pages until they are told to stop.
pub(crate) struct Writers {
    /// For every page, the highest count that was in it when a thread was done with a write.
    pub(crate) done: Arc<[AtomicU64]>,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Writers {
    pub(crate) fn start(memory: &Arc<Mapping>, tracked: Tracked) -> Self {
        let done: Arc<[AtomicU64]> = (0..tracked.pages()).map(|_| AtomicU64::new(0)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..WRITERS)
            .map(|seed| {
                let (memory, done, stop) =
                    (Arc::clone(memory), Arc::clone(&done), Arc::clone(&stop));
                thread::spawn(move || write(&memory, tracked, &done, &stop, seed))
            })
            .collect();
        Self { done, stop, threads }
    }

    pub(crate) fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop();
    }
}

fn write(memory: &Mapping, tracked: Tracked, done: &[AtomicU64], stop: &AtomicBool, seed: u64) {
    let mut random = Random::new(seed);
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..32 {
            let page = random.below(tracked.pages());
            let word = memory.as_ptr().wrapping_add((page << tracked.page.shift()) as usize);
            // SAFETY: inside of the mapping, aligned to a page, and used as an atomic by every
            // thread of this process.
            let count = unsafe { AtomicU64::from_ptr(word.cast()) };
            let after = count.fetch_add(1, Ordering::AcqRel) + 1;
            done[page as usize].fetch_max(after, Ordering::AcqRel);
        }
        thread::yield_now();
    }
}

/// Where the words of a process are, seen from outside.
pub(crate) struct Field {
    memory: File,
    tracked: Tracked,
    /// One word for every page.
    done: HostAddress,
    /// Of this process, where looking at a page may bring it, with a count of 0: `/proc/PID/mem`
    /// does not wait for that.
    pub(crate) view: Option<Arc<Mapping>>,
    /// How often it is harvested.
    pub(crate) harvests: u32,
}

impl Field {
    pub(crate) fn new(pid: u32, tracked: Tracked, done: HostAddress) -> Self {
        let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
        Self { memory, tracked, done, view: None, harvests: HARVESTS }
    }

    fn words(&self, start: HostAddress, count: u64) -> Vec<u64> {
        let mut bytes = vec![0; 8 * count as usize];
        self.memory.read_exact_at(&mut bytes, start.get()).unwrap();
        bytes.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    fn count(&self, page: u64) -> u64 {
        let offset = page << self.tracked.page.shift();
        if let Some(view) = &self.view {
            let mut bytes = [0; 8];
            view.read_at(offset, &mut bytes).unwrap();
            return u64::from_ne_bytes(bytes);
        }
        self.words(self.tracked.range.skip(offset).start(), 1)[0]
    }

    /// Brings the copy up to date from what a harvest has found.
    fn copy(&self, set: &DirtySet, copy: &mut [u64]) -> u64 {
        let shift = self.tracked.page.shift();
        let mut pages = 0;
        for run in set.take() {
            let first = run.start().offset_from(self.tracked.range.start()).unwrap() >> shift;
            for page in first..first + (run.len() >> shift) {
                copy[page as usize] = self.count(page);
                pages += 1;
            }
        }
        pages
    }

    /// Harvests again and again while others write. After each harvest the copy must have every
    /// write that was done before it; when nobody writes any more, and once more was harvested, it
    /// must be the memory.
    pub(crate) fn check(&self, what: &str, tracker: &mut dyn Tracker, stop: impl FnOnce()) {
        let effort = Effort::new(self.harvests.into(), TIME);
        let _watch = effort.watch(120);
        let set = DirtySet::new(tracker.ranges()).unwrap();
        let pages = self.tracked.pages();
        // What was there before is not for a tracker to tell.
        let mut copy: Vec<u64> = if self.view.is_some() {
            vec![0; pages as usize]
        } else {
            (0..pages).map(|page| self.count(page)).collect()
        };
        let (mut harvests, mut found) = (0, 0);
        wait_for("the writers", || self.words(self.done, pages).iter().any(|&done| done > 0));
        while effort.goes_on(harvests) {
            let done = self.words(self.done, pages);
            tracker.harvest(&set).unwrap();
            found += self.copy(&set, &mut copy);
            harvests += 1;
            // Harvesting takes less time than a thread gets at a time.
            thread::yield_now();
            for (page, (&copied, &done)) in copy.iter().zip(&done).enumerate() {
                assert!(
                    copied >= done,
                    "{what}: page {page} had been written {done} times before harvest {harvests}, \
                     and was copied when it was {copied}"
                );
            }
        }
        stop();
        tracker.harvest(&set).unwrap();
        found += self.copy(&set, &mut copy);
        let memory: Vec<u64> = (0..pages).map(|page| self.count(page)).collect();
        assert_eq!(copy, memory, "{what}: the copy after {harvests} harvests");
        let writes: u64 = memory.iter().sum();
        assert!(writes > 0 && found > 0, "{what}: {writes} writes, {found} pages found");
        println!("{what}: {writes} writes, {harvests} harvests, {found} pages found");
    }
}
