//! One reader handing faults to workers, by hash of the faulting thread or of its CPU.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, atomic::Ordering::*},
    thread::{self, JoinHandle},
};

use pageferry_uffd::Userfaultfd;

use super::{
    cpu::CpuOf,
    queue::{Reader, ReaderConfig, surviving_panics},
};
use crate::{
    core::{Core, WaitForReader},
    fault::{Arrived, Batch},
};

/// What chooses the worker.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum HashOf {
    Thread,
    Cpu,
}

/// A worker's inbox. Held for a push or a swap only, never while a fault is handled.
struct Inbox {
    faults: Mutex<VecDeque<Arrived>>,
    filled: Condvar,
}

/// Faults that an inbox has room for from the beginning. A stopped thread has one, so it grows, and
/// the reader allocates, only with more threads than this stopped for one worker.
const ROOM: usize = 4096;

impl Inbox {
    fn new() -> Self {
        Self { faults: Mutex::new(VecDeque::with_capacity(ROOM)), filled: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Arrived>> {
        self.faults.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Starts the reader and `workers` workers.
pub(crate) fn spawn_dispatched(
    core: &Arc<Core>,
    uffd: Arc<Userfaultfd>,
    stop: &Arc<OwnedFd>,
    config: ReaderConfig,
    workers: u16,
    by: HashOf,
) -> io::Result<Vec<JoinHandle<()>>> {
    let inboxes: Arc<[Inbox]> = (0..workers).map(|_| Inbox::new()).collect();
    let mut threads = Vec::new();
    for index in 0..usize::from(workers) {
        let (core, inboxes) = (Arc::clone(core), Arc::clone(&inboxes));
        let worker = thread::Builder::new().name(format!("pf-worker-{index}"));
        threads.push(worker.spawn(move || {
            surviving_panics(&core, || {
                work(&core, &inboxes[index], config.batch);
                Ok(())
            });
        })?);
    }
    let (core, stop) = (Arc::clone(core), Arc::clone(stop));
    let reader = thread::Builder::new().name("pf-reader".into());
    threads.push(reader.spawn(move || {
        surviving_panics(&core, || dispatch(&core, &uffd, &stop, config, &inboxes, by));
        // The workers look at `stopping` when they wake.
        for inbox in &*inboxes {
            drop(inbox.lock());
            inbox.filled.notify_all();
        }
    })?);
    Ok(threads)
}

fn dispatch(
    core: &Core,
    uffd: &Userfaultfd,
    stop: &Arc<OwnedFd>,
    config: ReaderConfig,
    inboxes: &[Inbox],
    by: HashOf,
) -> Result<(), pageferry_uffd::UffdError> {
    let reader = Reader::new(core, uffd, config);
    let mut batch = Batch::with_capacity(4 * config.batch);
    let mut cpus = CpuOf::default();
    while reader.next(&mut batch, stop)? {
        for fault in batch.faults.drain(..) {
            // Thread ids are not negotiated on old kernels: everything then goes to one worker.
            let thread = fault.thread.unwrap_or(0);
            let hash = if by == HashOf::Cpu { cpus.get(thread) } else { thread };
            let inbox = &inboxes[hash as usize % inboxes.len()];
            inbox.lock().push_back(fault);
            inbox.filled.notify_one();
        }
    }
    Ok(())
}

fn work(core: &Core, inbox: &Inbox, most: usize) {
    let mut batch = Batch::with_capacity(most);
    loop {
        {
            let mut faults = inbox.lock();
            while faults.is_empty() {
                if core.stopping.load(Acquire) {
                    return;
                }
                faults = inbox.filled.wait(faults).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            let taken = faults.len().min(most);
            batch.faults.extend(faults.drain(..taken));
        }
        core.faults(&mut batch, &WaitForReader(core));
    }
}
