//! Threads that read a userfaultfd.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering::*},
    thread::{self, JoinHandle},
};

use pageferry_uffd::{EventBuffer, HostRange, Userfaultfd};
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    core::{AddressSpaceChanging, Core},
    events::read_queue,
    fault::{Arrived, Batch},
    stats::Counter,
};

/// How many panics of one thread are survived before it is given up.
pub(crate) const PANICS: u32 = 16;

#[derive(Copy, Clone)]
pub(crate) struct ReaderConfig {
    /// Messages taken by one read.
    pub(crate) batch: usize,
}

/// One thread's end of a queue.
pub(crate) struct Reader<'a> {
    core: &'a Core,
    uffd: &'a Userfaultfd,
    /// Only this thread locks it; a source is lent the reader as part of a sink, which is Sync.
    inbox: Mutex<Inbox>,
}

struct Inbox {
    buffer: EventBuffer,
    /// Read and not yet handled: by this read, or while an install let events be read.
    faults: Vec<Arrived>,
    wake: Vec<HostRange>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(core: &'a Core, uffd: &'a Userfaultfd, config: ReaderConfig) -> Self {
        Self {
            core,
            uffd,
            inbox: Mutex::new(Inbox {
                buffer: EventBuffer::new(config.batch),
                faults: Vec::with_capacity(4 * config.batch),
                wake: Vec::with_capacity(config.batch),
            }),
        }
    }

    /// Reads once. Returns how many messages there were.
    fn read(&self) -> Result<usize, pageferry_uffd::UffdError> {
        let Inbox { buffer, faults, wake } = &mut *self.inbox();
        read_queue(self.core, self.uffd, buffer, faults, wake)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Moves the faults that were read into `batch`; blocks until there are some. False when the
    /// pager stops.
    pub(crate) fn next(
        &self,
        batch: &mut Batch,
        stop: &impl AsFd,
    ) -> Result<bool, pageferry_uffd::UffdError> {
        loop {
            if self.core.stopping.load(Acquire) {
                return Ok(false);
            }
            if self.inbox().faults.is_empty() && self.read()? == 0 {
                self.wait(stop);
                continue;
            }
            let faults = &mut self.inbox().faults;
            if !faults.is_empty() {
                std::mem::swap(&mut batch.faults, faults);
                return Ok(true);
            }
        }
    }

    fn wait(&self, stop: &impl AsFd) {
        let mut fds = [PollFd::new(self.uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        // EINTR, and readiness that another reader was faster to use, both mean: look again.
        let _ = poll(&mut fds, None);
    }
}

/// For somebody who does not know whether there are readers left: reads all queues. The faults that
/// it reads are not handled; [`Core::wake_everything`] makes their threads fault again.
pub(crate) struct EveryQueue<'a>(Vec<Reader<'a>>);

impl<'a> EveryQueue<'a> {
    pub(crate) fn of(core: &'a Core) -> Self {
        let mut uffds: Vec<&Userfaultfd> = Vec::new();
        for uffd in core.targets.iter().flat_map(|target| target.shards.iter()) {
            if !uffds.iter().any(|known| std::ptr::eq(*known, &**uffd)) {
                uffds.push(uffd);
            }
        }
        let config = ReaderConfig { batch: 64 };
        Self(uffds.into_iter().map(|uffd| Reader::new(core, uffd, config)).collect())
    }
}

impl AddressSpaceChanging for EveryQueue<'_> {
    fn let_events_be_read(&self) {
        for reader in &self.0 {
            reader.let_events_be_read();
            reader.inbox().faults.clear();
        }
    }
}

impl AddressSpaceChanging for Reader<'_> {
    /// The reader itself is installing: nobody else would read the event it waits for.
    fn let_events_be_read(&self) {
        match self.read() {
            Ok(0) => thread::yield_now(),
            Ok(_) => {}
            Err(error) => tracing::error!("{error}"),
        }
    }
}

/// Starts a thread that handles the faults of one queue.
pub(crate) fn spawn_reader(
    core: Arc<Core>,
    uffd: Arc<Userfaultfd>,
    stop: Arc<OwnedFd>,
    config: ReaderConfig,
    name: String,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name).spawn(move || {
        surviving_panics(&core, || {
            let reader = Reader::new(&core, &uffd, config);
            let mut batch = Batch::with_capacity(4 * config.batch);
            while reader.next(&mut batch, &stop)? {
                core.faults(&mut batch, &reader);
            }
            Ok(())
        });
    })
}

/// Runs a delivery thread's loop until it ends by itself. A panic loses the messages it had read:
/// the threads behind them are woken so that they fault again.
pub(crate) fn surviving_panics(
    core: &Core,
    mut run: impl FnMut() -> Result<(), pageferry_uffd::UffdError>,
) {
    for _ in 0..PANICS {
        match catch_unwind(AssertUnwindSafe(&mut run)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => {
                tracing::error!("fault delivery ends: {error}; its faults stall");
                core.health().refused = Some(error.to_string());
                return;
            }
            Err(_) => {
                core.stats.add(Counter::panics, 1);
                tracing::error!("a fault delivery thread panicked; its faults are read again");
                core.wake_everything();
            }
        }
    }
    // The queue has no reader now: its faults stall, they do not see zeros.
    core.health().refused = Some(format!("a fault delivery thread panicked {PANICS} times"));
}
