//! vCPUs and threads that write all the time, and somebody who has a copy of the memory brought up to
//! date by nothing but harvests.

use std::{
    sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    thread,
    time::{Duration, Instant},
};

use pageferry_dirty::{DirtySet, Tracked, Tracker};
use pageferry_kvm::dirty::WriteMarks;
use pageferry_memory::{HostAddress, Mapping};
use pageferry_testing::Random;

/// Adds one to the first word of random pages: rcx times, rax being the seed, rdi the beginning.
pub fn adding(pages: u64, shift: u32) -> Vec<u8> {
    assert!(pages.is_power_of_two());
    let mask = (pages - 1) as u32;
    let mut code = vec![0x48, 0x69, 0xc0, 0x6d, 0x4e, 0xc6, 0x41]; // next: imul rax, rax, 0x41c64e6d
    code.extend([0x48, 0x05, 0x39, 0x30, 0x00, 0x00]); // add rax, 12345
    code.extend([0x48, 0x89, 0xc6]); // mov rsi, rax
    code.extend([0x48, 0xc1, 0xee, 0x10]); // shr rsi, 16
    code.extend([0x48, 0x81, 0xe6]); // and rsi, mask
    code.extend(mask.to_le_bytes());
    code.extend([0x48, 0xc1, 0xe6, shift as u8]); // shl rsi, shift
    code.extend([0xf0, 0x48, 0xff, 0x04, 0x37]); // lock inc qword [rdi + rsi]
    code.extend([0x48, 0xff, 0xc9]); // dec rcx
    let back = -(code.len() as i8 + 2);
    code.extend([0x75, back as u8]); // jnz next
    code
}

/// Tells threads to stop, also when the test fails.
pub struct Stop<'s>(pub &'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Has a vCPU make [`ADDITIONS`] from this seed on; answers the next seed.
pub type Adder<'a> = Box<dyn FnMut(u64) -> u64 + Send + 'a>;

/// How many a vCPU makes at a time.
pub const ADDITIONS: u64 = 100;
const HARVESTS: u64 = 1000;
/// Of the process itself.
const THREADS: u64 = 2;

/// Memory that is written while it is tracked.
pub struct Load<'a> {
    pub case: String,
    /// What is to be armed. All show the same memory.
    pub ranges: Vec<Tracked>,
    /// What the threads of the process write through: one of them.
    pub memory: &'a Mapping,
    /// Where they say so, if the tracker does not see it.
    pub marks: Option<WriteMarks>,
    /// What is in the first word of each page at first.
    pub first: &'a (dyn Fn(u64) -> u64 + Sync),
    /// Whether a page has come, as far as is known; what has not has not been written.
    pub present: &'a (dyn Fn(u64) -> bool + Sync),
}

impl Load<'_> {
    fn pages(&self) -> u64 {
        self.ranges[0].pages()
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        assert!(page < self.pages());
        let word =
            self.memory.as_ptr().wrapping_add((page << self.ranges[0].page.shift()) as usize);
        // SAFETY: inside of the mapping, aligned to a page, and used as an atomic by every thread of
        // this process.
        unsafe { AtomicU64::from_ptr(word.cast()) }
    }

    fn page(&self, address: HostAddress) -> u64 {
        let armed = self.ranges.iter().find(|armed| armed.range.contains(address)).unwrap();
        address.offset_from(armed.range.start()).unwrap() >> armed.page.shift()
    }

    /// A thread of the process: for each page, `done` is the highest count that was in it when the
    /// thread was done with a write. Answers how many it made.
    fn write(&self, seed: u64, done: &[AtomicU64]) -> u64 {
        let mut random = Random::new(seed);
        let writes = ADDITIONS / 4;
        for _ in 0..writes {
            let page = random.below(self.pages());
            let before = self.word(page).fetch_add(1, AcqRel);
            if let Some(marks) = &self.marks {
                marks.mark(page << self.ranges[0].page.shift(), 8);
            }
            let count = before.wrapping_add(1).wrapping_sub((self.first)(page));
            done[page as usize].fetch_max(count, AcqRel);
        }
        writes
    }

    /// Whatever was written since a harvest is in the next one: after each, the copy has what the
    /// threads of the process had written before; after one during which nobody writes, it is the
    /// memory. Nor is any addition lost.
    pub fn nothing_is_lost(&self, tracker: &mut dyn Tracker, vcpus: Vec<Adder<'_>>) {
        let load = self;
        let words: Vec<u64> = (0..load.pages()).map(load.first).collect();
        let done: Vec<AtomicU64> = (0..load.pages()).map(|_| AtomicU64::new(0)).collect();
        let set = DirtySet::new(&load.ranges).unwrap();
        tracker.arm(&load.ranges).unwrap();
        let (stop, additions) = (AtomicBool::new(false), AtomicU64::new(0));
        // Held for reading by who writes.
        let writing = RwLock::new(());
        let mut writers: Vec<Box<dyn FnMut() -> u64 + Send + '_>> = Vec::new();
        for (mut rax, mut vcpu) in (1..).zip(vcpus) {
            writers.push(Box::new(move || {
                rax = vcpu(rax);
                ADDITIONS
            }));
        }
        for mut seed in 0..THREADS {
            let done = &done;
            writers.push(Box::new(move || {
                seed += THREADS;
                load.write(seed, done)
            }));
        }
        let (harvests, found) = thread::scope(|scope| {
            let (stop, additions, writing, done) = (&stop, &additions, &writing, &done);
            let stopping = Stop(stop);
            for mut write in writers {
                scope.spawn(move || {
                    while !stop.load(SeqCst) {
                        let Ok(held) = writing.read() else { break };
                        additions.fetch_add(write(), SeqCst);
                        drop(held);
                        // Whoever wants to write-lock has to get a turn.
                        thread::yield_now();
                    }
                });
            }
            let mut copy = words.clone();
            // Emulated machines are slow.
            let until = Instant::now() + Duration::from_secs(6);
            let (mut harvests, mut found) = (0, 0);
            while harvests < HARVESTS && Instant::now() < until {
                let quiet = (harvests % 16 == 15).then(|| writing.write().unwrap());
                let before: Vec<u64> = done.iter().map(|done| done.load(Acquire)).collect();
                let harvested = tracker.harvest(&set).unwrap();
                assert_eq!((&harvested.whole, &harvested.gone), (&vec![], &vec![]));
                for run in set.take() {
                    let first = load.page(run.start());
                    for page in first..first + (run.len() >> load.ranges[0].page.shift()) {
                        copy[page as usize] = load.word(page).load(Acquire);
                    }
                }
                for (page, (&copied, &before)) in copy.iter().zip(&before).enumerate() {
                    let copied = copied.wrapping_sub(words[page]);
                    assert!(
                        copied >= before,
                        "{}: page {page} had been written {before} times before harvest {harvests}, \
                         and was copied when it was {copied}",
                        load.case
                    );
                }
                if quiet.is_some() {
                    for (page, copied) in (0..).zip(&copy) {
                        let there = (load.present)(page);
                        let now = if there { load.word(page).load(Acquire) } else { *copied };
                        assert_eq!(*copied, now, "{}: page {page}, {harvests} harvests", load.case);
                    }
                }
                found += harvested.pages;
                // One that finds nothing says nothing.
                harvests += u64::from(harvested.pages > 0 || quiet.is_some());
                thread::yield_now();
            }
            drop(stopping);
            (harvests, found)
        });
        assert!(harvests >= 32, "{}: {harvests} harvests", self.case);
        // Looking at a page brings it.
        let sum = (0..self.pages())
            .map(|page| self.word(page).load(Acquire).wrapping_sub(words[page as usize]))
            .fold(0, u64::wrapping_add);
        assert_eq!(sum, additions.load(SeqCst), "{}: additions were lost", self.case);
        println!("{}: {harvests} harvests, {found} pages, {sum} writes", self.case);
        tracker.disarm().unwrap();
    }
}
