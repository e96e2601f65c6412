//! Delivery by one reader that hands each message to a worker, through the simplest ring there is.

use std::{
    os::fd::{AsRawFd as _, RawFd},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use anyhow::Context as _;
use rustix::thread::futex;

use super::{Installer, Loop, queue, sys};
use crate::bench::case::Measurement;

/// What a message's worker is chosen by.
#[derive(Copy, Clone, Debug)]
pub(super) enum By {
    /// The faulting thread's id, so that one thread's faults stay with one worker.
    Thread,
    /// The CPU that the faulting thread last ran on.
    Cpu,
}

/// A message that ends a worker. No page has this address.
const END: u64 = u64::MAX;

/// More than there are guest threads, each of which has at most one message in all rings.
const SLOTS: usize = 1024;

/// One producer, one consumer.
#[repr(align(128))]
struct Ring {
    slots: [AtomicU64; SLOTS],
    /// Messages ever pushed, and the futex the worker sleeps on.
    pushed: Padded<AtomicU32>,
    /// Messages ever taken.
    taken: Padded<AtomicU32>,
    /// 1 while the worker sleeps or is about to.
    sleeping: Padded<AtomicU32>,
}

/// Keeps what different threads write apart.
#[repr(align(128))]
struct Padded<T>(T);

impl Ring {
    fn new() -> Box<Self> {
        let zero = || Padded(AtomicU32::new(0));
        let slots = [const { AtomicU64::new(0) }; SLOTS];
        Box::new(Self { slots, pushed: zero(), taken: zero(), sleeping: zero() })
    }

    fn push(&self, address: u64) {
        let pushed = self.pushed.0.load(Ordering::Relaxed);
        while pushed.wrapping_sub(self.taken.0.load(Ordering::Acquire)) as usize == SLOTS {
            std::thread::yield_now();
        }
        self.slots[pushed as usize % SLOTS].store(address, Ordering::Relaxed);
        // Sequentially consistent, as the worker's store of `sleeping` and load of `pushed` are:
        // either it sees this message, or it is seen sleeping.
        self.pushed.0.store(pushed.wrapping_add(1), Ordering::SeqCst);
        if self.sleeping.0.load(Ordering::SeqCst) != 0 {
            self.sleeping.0.store(0, Ordering::Relaxed);
            // It cannot fail: the address is a valid, aligned futex.
            let _ = futex::wake(&self.pushed.0, futex::Flags::PRIVATE, 1);
        }
    }

    fn pop(&self) -> u64 {
        let taken = self.taken.0.load(Ordering::Relaxed);
        while self.pushed.0.load(Ordering::Acquire) == taken {
            self.sleeping.0.store(1, Ordering::SeqCst);
            if self.pushed.0.load(Ordering::SeqCst) == taken {
                // Woken, interrupted, or the value has changed already: looking again decides.
                let _ = futex::wait(&self.pushed.0, futex::Flags::PRIVATE, taken, None);
            }
        }
        let address = self.slots[taken as usize % SLOTS].load(Ordering::Relaxed);
        self.taken.0.store(taken.wrapping_add(1), Ordering::Release);
        address
    }
}

/// Serves `uffd` with one reader and `workers` workers while `guest` runs.
pub(super) fn serve(
    shared: &Loop<Installer>,
    uffd: RawFd,
    workers: usize,
    batch: usize,
    by: By,
    guest: impl FnOnce() -> anyhow::Result<Measurement>,
) -> anyhow::Result<Measurement> {
    let rings: Vec<Box<Ring>> = (0..workers).map(|_| Ring::new()).collect();
    std::thread::scope(|scope| {
        for ring in &rings {
            scope.spawn(move || {
                loop {
                    match ring.pop() {
                        END => return,
                        address => shared.resolve(uffd, address),
                    }
                }
            });
        }
        let reader = scope.spawn(|| {
            let mut cpus = CpuOf::new();
            queue::each_fault(shared, uffd, batch, |message| {
                let key = match by {
                    By::Thread => message.thread,
                    By::Cpu => cpus.get(message.thread),
                };
                rings[key as usize % workers].push(message.address);
            });
        });
        let measured = guest();
        let raised = sys::raise(shared.stop.as_raw_fd()).context("ending the reader");
        let joined = reader.join();
        // The reader was the rings' only producer; now this thread is.
        for ring in &rings {
            ring.push(END);
        }
        raised?;
        assert!(joined.is_ok(), "the reader panicked");
        measured
    })
}

/// The CPU each thread last ran on, looked up anew every so many faults of that thread.
struct CpuOf {
    /// Indexed by thread id modulo its length; threads that share a slot drive each other out.
    slots: Vec<Seen>,
}

#[derive(Copy, Clone, Default)]
struct Seen {
    thread: u32,
    cpu: u32,
    /// For how many more faults it is believed.
    left: u32,
}

/// A look-up costs several faults' time.
const BELIEVED_FOR: u32 = 256;

impl CpuOf {
    fn new() -> Self {
        Self { slots: vec![Seen::default(); 1024] }
    }

    fn get(&mut self, thread: u32) -> u32 {
        let count = self.slots.len();
        let seen = &mut self.slots[thread as usize % count];
        if seen.thread != thread || seen.left == 0 {
            let cpu = last_cpu(thread).unwrap_or(thread);
            *seen = Seen { thread, cpu, left: BELIEVED_FOR };
        }
        seen.left -= 1;
        seen.cpu
    }
}

/// The 39th field of `/proc/PID/task/TID/stat` (proc_pid_stat(5)), counted from behind the name,
/// which is the second and may hold anything.
fn last_cpu(thread: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(39 - 3)?.parse().ok()
}
