//! Memory that a pager brings, and has registered for write protection itself.

use std::{
    fmt,
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard},
};

use pageferry_paging::{Pager, ProtectError, WriteObserver};
use pageferry_uffd::{Features, HostRange};

use crate::{
    DirtyError, DirtySet, Harvested, Method, Overflow, Target, Tracked, Tracker, WriteEvents,
    armed::{Armed, Rearm},
    events::{Queue, WriteEvent},
    protect::{Protection, Protector},
    target::Watched,
    tracker::{check_new, check_room, remove},
};

/// What a pager tells of: writes, if its tracking is blocking, and pages that are removed.
///
/// It is made first, given to [`Builder::write_observer`](pageferry_paging::Builder::write_observer),
/// and then to [`PagedTracker::new`].
#[derive(Default)]
pub struct PagedWrites {
    /// Locked for writing only when something is armed.
    noted: RwLock<Noted>,
    queue: Mutex<Option<Arc<Queue>>>,
}

#[derive(Default)]
struct Noted {
    written: DirtySet,
    removed: DirtySet,
}

impl PagedWrites {
    /// Nothing noted so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stream of the writes from now on, of which `capacity` can wait to be taken out. The stream
    /// so far ends. What finds no room is told as [`Overflow::WholeRange`] says: the thread of the
    /// pager that brings pages must not wait.
    ///
    /// Only if the pager's tracking is blocking, and of pages, not exact addresses.
    pub fn events(&self, capacity: NonZeroUsize) -> WriteEvents {
        let (events, queue) = WriteEvents::new(capacity, Overflow::WholeRange);
        if let Some(before) = self.queue().replace(queue) {
            before.end();
        }
        events
    }

    fn noted(&self) -> RwLockReadGuard<'_, Noted> {
        self.noted.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Option<Arc<Queue>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arm(&self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        let mut noted = self.noted.write().unwrap_or_else(PoisonError::into_inner);
        let (written, removed) = (DirtySet::new(ranges)?, DirtySet::new(ranges)?);
        for (old, new) in [(&noted.written, &written), (&noted.removed, &removed)] {
            for run in old.take() {
                new.mark(run);
            }
        }
        *noted = Noted { written, removed };
        Ok(())
    }
}

impl WriteObserver for PagedWrites {
    fn written(&self, page: HostRange, thread: Option<u32>) {
        let noted = self.noted();
        noted.written.mark(page);
        // Of what is not armed nobody wants to know.
        if let Some(tracked) = noted.written.range_at(page.start())
            && let Some(queue) = &*self.queue()
        {
            queue.push(WriteEvent::now(page.start(), thread), tracked.range);
        }
    }

    fn removed(&self, range: HostRange) {
        self.noted().removed.mark(range);
    }
}

impl fmt::Debug for PagedWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedWrites").finish_non_exhaustive()
    }
}

/// Notices writes to memory that a [`Pager`] brings, which was started with
/// [`WriteTracking`](pageferry_paging::WriteTracking) on. Which way, is the pager's.
///
/// * A page that comes is not thereby dirty; a page that is written to after it came is.
/// * A mapping can be registered with one userfaultfd only, so the pager protects, and goes on doing
///   so for what comes after this is disarmed.
/// * Pages that are removed are reported, `MADV_REMOVE` of shared memory included, where the pager
///   watches events. The pager tells of them just before it happens, so they are reported by two
///   harvests.
/// * The tracker keeps the pager alive.
pub struct PagedTracker {
    writes: Arc<PagedWrites>,
    pager: Arc<Pager>,
    /// What was reported as removed by the last harvest.
    removed: Vec<HostRange>,
    way: Way,
}

enum Way {
    /// The kernel knows what is written.
    Asynchronous(Armed),
    /// The pager tells.
    Blocking(Vec<Tracked>),
}

impl PagedTracker {
    /// For the memory of a pager, which tells of writes to `writes`.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Missing`] if it was started without write tracking.
    pub fn new(pager: Arc<Pager>, writes: Arc<PagedWrites>) -> Result<Self, DirtyError> {
        let features = pager.chosen().features;
        let way = if pager.tracked().is_empty() {
            let what = "a pager that was started with write tracking";
            return Err(DirtyError::Missing { method: Method::WpAsync, what });
        } else if features.contains(Features::WP_ASYNC) {
            let protector = ByPager(Arc::clone(&pager));
            Way::Asynchronous(Armed::new(Target::Own, protector, Rearm::ByScan)?)
        } else {
            Way::Blocking(Vec::new())
        };
        Ok(Self { writes, pager, removed: Vec::new(), way })
    }

    /// Reports what was removed, this time and the last.
    fn report_removed(&mut self, into: &DirtySet) -> u64 {
        // Whoever removed memory goes on as soon as the pager has read of it. Asking the pager where
        // its memory is waits until it has also told of all that it has read.
        self.pager.tracked();
        let removed = self.writes.noted().removed.take();
        let pages = self.removed.iter().chain(&removed).map(|run| into.mark(*run)).sum();
        self.removed = removed;
        pages
    }
}

impl Tracker for PagedTracker {
    fn method(&self) -> Method {
        match self.way {
            Way::Asynchronous(_) => Method::WpAsync,
            Way::Blocking(_) => Method::WpBlocking,
        }
    }

    fn ranges(&self) -> &[Tracked] {
        match &self.way {
            Way::Asynchronous(armed) => armed.ranges(),
            Way::Blocking(ranges) => ranges,
        }
    }

    fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        check_new(self.ranges(), ranges)?;
        let all: Vec<_> = self.ranges().iter().chain(ranges).copied().collect();
        // Before the first write can be told of.
        self.writes.arm(&all)?;
        let armed = match &mut self.way {
            Way::Asynchronous(armed) => armed.arm(ranges),
            Way::Blocking(armed) => {
                let mut protector = ByPager(Arc::clone(&self.pager));
                ranges
                    .iter()
                    .try_for_each(|&tracked| {
                        protector.register(tracked)?;
                        match protector.protect(tracked.range)? {
                            Protection::Done => Ok(()),
                            Protection::Gone => Err(DirtyError::Vanished { range: tracked.range }),
                        }
                    })
                    .map(|()| armed.extend_from_slice(ranges))
            }
        };
        if armed.is_err() {
            self.writes.arm(self.ranges())?;
        }
        armed
    }

    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        check_room(self.ranges(), into)?;
        let removed = self.report_removed(into);
        let protector = ByPager(Arc::clone(&self.pager));
        let mut harvested = match &mut self.way {
            Way::Asynchronous(armed) => armed.harvest(into)?,
            Way::Blocking(ranges) => {
                let runs = self.writes.noted().written.take();
                // All of it, before anything can fail.
                let pages = runs.iter().map(|run| into.mark(*run)).sum();
                let mut harvested = Harvested { pages, ..Harvested::default() };
                for (index, &run) in runs.iter().enumerate() {
                    harvested.calls += 1;
                    match protector.protect(run) {
                        Ok(Protection::Done) => {}
                        Ok(Protection::Gone) => harvested.lose(run),
                        Err(error) => {
                            // Not protected, so no write to them will be told: they stay dirty.
                            let noted = self.writes.noted();
                            for &run in &runs[index..] {
                                noted.written.mark(run);
                            }
                            return Err(error);
                        }
                    }
                }
                for gone in protector.gone(ranges) {
                    harvested.pages += into.mark(gone);
                    harvested.lose(gone);
                }
                for &gone in &harvested.gone {
                    remove(ranges, gone);
                }
                harvested
            }
        };
        harvested.pages += removed;
        Ok(harvested)
    }

    fn disarm(&mut self) -> Result<(), DirtyError> {
        self.removed.clear();
        match &mut self.way {
            Way::Asynchronous(armed) => armed.disarm()?,
            Way::Blocking(ranges) => ranges.clear(),
        }
        self.writes.arm(&[])
    }
}

impl Drop for PagedTracker {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!("{error}");
        }
    }
}

impl fmt::Debug for PagedTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedTracker")
            .field("method", &self.method())
            .field("ranges", &self.ranges())
            .finish_non_exhaustive()
    }
}

/// Protects through the pager, which alone knows the userfaultfd of a range.
struct ByPager(Arc<Pager>);

impl fmt::Debug for ByPager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ByPager").field(&self.0.tracked()).finish()
    }
}

impl Protector for ByPager {
    fn register(&mut self, Tracked { range, .. }: Tracked) -> Result<(), DirtyError> {
        // The pager has, if the range is one of its own.
        let shown = self.0.tracked();
        if shown.iter().any(|shown| shown.contains_range(range)) {
            return Ok(());
        }
        Err(DirtyError::NotOwned { range })
    }

    fn protect(&self, range: HostRange) -> Result<Protection, DirtyError> {
        match self.0.protect(range) {
            Ok(()) => Ok(Protection::Done),
            Err(ProtectError::Outside { .. }) => Ok(Protection::Gone),
            Err(source) => Err(DirtyError::Pager { range, source }),
        }
    }

    fn release(&mut self, _: HostRange, _: &Watched) -> Result<(), DirtyError> {
        Ok(())
    }

    fn gone(&self, ranges: &[Tracked]) -> Vec<HostRange> {
        let shown = self.0.tracked();
        let mut left = ranges.to_vec();
        for &shown in &shown {
            remove(&mut left, shown);
        }
        left.into_iter().map(|tracked| tracked.range).collect()
    }
}
