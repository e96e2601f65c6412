//! The thread that lets writers go on.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use pageferry_uffd::{
    Event, EventBuffer, Fault, FaultKind, HostRange, Outcome, UffdError, Userfaultfd, Wake,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags};

use crate::{
    DirtyError, Tracked,
    events::{Queue, WriteEvent},
    scan::page_around,
};

/// Faults read at a time.
const BATCH: usize = 64;

/// Answers write faults until it is dropped.
#[derive(Debug)]
pub(crate) struct Reader {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    uffd: Arc<Userfaultfd>,
    stop: OwnedFd,
    /// In ascending order. Replaced as a whole, and held only to clone it.
    armed: Mutex<Arc<[Tracked]>>,
    queue: Mutex<Option<Arc<Queue>>>,
}

impl Reader {
    pub(crate) fn start(uffd: Arc<Userfaultfd>) -> Result<Self, DirtyError> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| DirtyError::Reader { source: errno.into() })?;
        let armed = Mutex::new(Arc::from([]));
        let shared = Arc::new(Shared { uffd, stop, armed, queue: Mutex::new(None) });
        let thread = thread::Builder::new()
            .name("pageferry-dirty".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.run()
            })
            .map_err(|source| DirtyError::Reader { source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What is armed from now on: before the first write to it can fault.
    pub(crate) fn set_armed(&self, ranges: &[Tracked]) {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable_by_key(|tracked| tracked.range.start());
        *lock(&self.shared.armed) = ranges.into();
    }

    /// Where events go from now on; the stream so far ends.
    pub(crate) fn set_queue(&self, queue: Option<Arc<Queue>>) {
        let before = std::mem::replace(&mut *lock(&self.shared.queue), queue);
        if let Some(before) = before {
            before.end();
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // It may be waiting for room in the stream.
        self.set_queue(None);
        // Cannot fail: the descriptor is open, and the counter at 0.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that answers write faults panicked");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn run(&self) {
        let mut events = EventBuffer::new(BATCH);
        loop {
            let mut fds =
                [PollFd::new(&*self.uffd, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => tracing::error!("waiting for write faults: {errno}"),
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            if let Err(error) = self.uffd.read_events(&mut events) {
                // The memory of the process is gone, or the descriptor blocks and cannot be polled.
                tracing::warn!("{error}");
                self.give_up();
                return;
            }
            if fds[0].revents().contains(PollFlags::ERR) && events.is_empty() {
                tracing::warn!("the userfaultfd reports an error: no write fault can be answered");
                self.give_up();
                return;
            }
            for event in events.drain() {
                match event {
                    Ok(Event::Fault(fault)) => self.answer(fault),
                    // No feature that brings them was asked for.
                    Ok(other) => tracing::warn!(?other, "an event that was not asked for"),
                    Err(error) => tracing::warn!("{error}"),
                }
            }
        }
    }

    fn answer(&self, fault: Fault) {
        let armed = Arc::clone(&lock(&self.armed));
        let place = armed.partition_point(|tracked| tracked.range.end() <= fault.address);
        let tracked = armed.get(place).filter(|tracked| tracked.range.contains(fault.address));
        let page = match tracked {
            Some(tracked) => page_around(fault.address, tracked.page),
            // Not armed any more, and about to be released, which wakes the thread; or a huge page
            // of unknown size, for which this does nothing.
            None => page_around(fault.address, pageferry_memory::PageSize::base()),
        };
        if fault.kind == FaultKind::WriteProtect
            && let Some(tracked) = tracked
        {
            let queue = lock(&self.queue).clone();
            if let Some(queue) = queue {
                let event = WriteEvent::now(fault.address, fault.thread);
                queue.push(event, tracked.range);
            }
        }
        // The page counts as written from here on, since a harvest looks for pages that are not
        // protected: no record of it is needed that could disagree with the page table.
        let lifted = lift(&self.uffd, page);
        if let Err(error) = lifted {
            tracing::warn!("{error}: its range is not protected any more");
            self.release(tracked.map_or(page, |tracked| tracked.range));
        }
    }

    /// The last resort: no thread may wait for ever. What is not registered is not protected, so it
    /// counts as written, and the next harvest finds out that it is gone.
    fn release(&self, range: HostRange) {
        if let Err(error) = self.uffd.unregister_raw(range) {
            tracing::error!("{error}: threads that write there wait until it is unmapped");
        }
    }

    fn give_up(&self) {
        let armed = Arc::clone(&lock(&self.armed));
        for tracked in armed.iter() {
            self.release(tracked.range);
        }
    }
}

/// Lifts the protection of a page and wakes whoever waits there.
fn lift(uffd: &Userfaultfd, page: HostRange) -> Result<(), UffdError> {
    loop {
        match uffd.write_protect(page, false, Wake::Yes)? {
            Outcome::Retry { .. } => thread::yield_now(),
            Outcome::Installed { .. } => return Ok(()),
            // Nothing is there, or something else: the thread tries again, and finds out.
            _ => return uffd.wake(page),
        }
    }
}
