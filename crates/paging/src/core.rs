//! What the parts of a running pager share, and what is done with the answers of a source.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    },
    time::Duration,
};

use pageferry_memory::{GranuleRange, HostRange, Layout, PageMap};
use pageferry_uffd::{Userfaultfd, Wake};
use rustix::thread::futex;

use crate::{
    Completion, SinkError, SourceError, Span, Urgency,
    delivery::signal::in_handler,
    gate::{Gate, Inside},
    install::{Data, InstallMethod, Progress, Target, requested},
    pending::{Pending, elapsed},
    prefetch::Prefetcher,
    slot::SourceSlot,
    staging::{Movable, Staging},
    stats::{Counter, Stats, Timed},
    tracking::Tracking,
    views::View,
};

/// Called by an install that found the address space changing, outside the gate: returns when
/// events may have been read.
pub(crate) trait AddressSpaceChanging: Sync {
    fn let_events_be_read(&self);
}

pub(crate) struct Core {
    pub(crate) layout: Layout,
    pub(crate) targets: Box<[Target]>,
    pub(crate) gate: Gate,
    pub(crate) source: SourceSlot,
    pub(crate) stats: Stats,
    pub(crate) pending: Pending,
    pub(crate) prefetcher: Prefetcher,
    pub(crate) staging: Staging,
    pub(crate) movable: Option<Movable>,
    pub(crate) tracking: Tracking,
    /// Bumped whenever events were read and applied.
    pub(crate) events_read: AtomicU32,
    /// Bumped whenever a source is attached, lost, or the pager stops: what a thread without a
    /// source waits on.
    pub(crate) source_changed: AtomicU32,
    pub(crate) stopping: AtomicBool,
    /// The memory is not registered any more: an access that is repeated succeeds or fails by
    /// itself.
    pub(crate) unregistered: AtomicBool,
    /// A source was lost, and has not said why yet.
    pub(crate) reason_due: AtomicBool,
    pub(crate) health: Mutex<Health>,
    pub(crate) from_source: AtomicU64,
    pub(crate) poisoned_by_source: AtomicU64,
}

/// What went wrong last, for [`Pager::status`](crate::Pager::status).
#[derive(Default)]
pub(crate) struct Health {
    pub(crate) lost: Option<String>,
    pub(crate) refused: Option<String>,
    pub(crate) abandoned: bool,
    pub(crate) agreed: Option<Completion>,
}

impl Core {
    pub(crate) fn target(&self, span: Span) -> Result<&Target, SinkError> {
        let target =
            self.targets.get(usize::from(span.region.get())).ok_or(SinkError::OutOfRange(span))?;
        let granules = span.granules;
        if granules.is_empty() || granules.end().get() > target.region.granules() {
            return Err(SinkError::OutOfRange(span));
        }
        Ok(target)
    }

    pub(crate) fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Installs what `data` holds for `whole`, wherever it is still requested.
    pub(crate) fn answer(
        &self,
        target: &Target,
        whole: GranuleRange,
        data: Data<'_>,
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let arrived = self.stats.now();
        // Before the install: completion is noticed, and agreed upon, as soon as the last granule
        // is published.
        self.count_answered(target, whole);
        self.install(target, whole, data, changing)?;
        self.account(target, whole, arrived);
        Ok(())
    }

    pub(crate) fn count_answered(&self, target: &Target, granules: GranuleRange) {
        let requested = count_requested(target.region.page_map(), granules);
        self.from_source.fetch_add(requested, Relaxed);
    }

    /// Installs across address-space changes, and fails closed where the kernel refuses.
    pub(crate) fn install(
        &self,
        target: &Target,
        whole: GranuleRange,
        data: Data<'_>,
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let mut rest = whole;
        loop {
            let progress = {
                let inside = self.gate.install();
                if let Data::Bytes(bytes) = data
                    && target.method == InstallMethod::Continue
                {
                    self.continue_from(target, &inside, whole, rest, bytes)
                } else {
                    target.install(&inside, whole, rest, data, &self.stats)
                }
            };
            match progress {
                Progress::Done => return Ok(()),
                Progress::Changing(at) => {
                    if self.stopping.load(Acquire) {
                        return Err(SinkError::Stopped);
                    }
                    rest = GranuleRange::new(at, whole.end().get() - at.get());
                    changing.let_events_be_read();
                }
                Progress::Refused { at, why } => {
                    let left = GranuleRange::new(at, whole.end().get() - at.get());
                    return Err(self.refused(target, left, why, changing));
                }
            }
        }
    }

    /// The kernel has no memory for these granules, or refuses them otherwise: they are an error
    /// for who touches them.
    pub(crate) fn refused(
        &self,
        target: &Target,
        granules: GranuleRange,
        why: String,
        changing: &dyn AddressSpaceChanging,
    ) -> SinkError {
        let span = target.span(granules);
        if !in_handler() {
            self.health().refused = Some(format!("{span}: {why}"));
        }
        match self.poison_now(target, granules, changing) {
            Ok(()) => SinkError::Install { span, why },
            Err(error) => error,
        }
    }

    /// Copies bytes into the fill view, then maps them. Inside the gate, so that no removal comes
    /// between; page by page of what is still requested.
    fn continue_from(
        &self,
        target: &Target,
        inside: &Inside<'_>,
        whole: GranuleRange,
        rest: GranuleRange,
        bytes: &[u8],
    ) -> Progress {
        let map = target.region.page_map();
        let shift = target.region.granule().shift();
        let mut at = rest.first();
        while at < rest.end() {
            let left = GranuleRange::new(at, rest.end().get() - at.get());
            let Some(run) = requested(map, left) else { break };
            self.stats.add(Counter::duplicate, run.first().get() - at.get());
            let (backed, shortage) = target.back(run);
            if backed.is_empty()
                && let Some(why) = shortage
            {
                return Progress::Refused { at: run.first(), why };
            }
            let run = backed;
            let from = ((run.first().get() - whole.first().get()) << shift) as usize;
            let len = (run.count() << shift) as usize;
            let copied: Result<(), std::convert::Infallible> =
                target.with_fill_bytes(run, |fill| {
                    fill.copy_from_slice(&bytes[from..from + len]);
                    Ok(())
                });
            let Ok(()) = copied;
            match target.install(inside, run, run, Data::InPlace, &self.stats) {
                Progress::Done => at = run.end(),
                other => return other,
            }
        }
        self.stats.add(Counter::duplicate, rest.end().get().saturating_sub(at.get()));
        Progress::Done
    }

    /// Makes granules that have not come poisoned, in the map and in memory, and wakes whoever
    /// waits for them.
    pub(crate) fn poison_now(
        &self,
        target: &Target,
        granules: GranuleRange,
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let map = target.region.page_map();
        self.stats.add(Counter::poisoned, map.poison(granules));
        let mut rest = granules;
        loop {
            let progress = target.mark_poisoned(&self.gate.install(), rest, &self.stats);
            match progress {
                Progress::Done => return Ok(()),
                Progress::Changing(at) => {
                    if self.stopping.load(Acquire) {
                        return Err(SinkError::Stopped);
                    }
                    rest = GranuleRange::new(at, granules.end().get() - at.get());
                    changing.let_events_be_read();
                }
                Progress::Refused { at, why } => {
                    let left = GranuleRange::new(at, granules.end().get() - at.get());
                    return Err(SinkError::Install { span: target.span(left), why });
                }
            }
        }
    }

    /// Records the latencies of those granules that a thread waited for.
    fn account(&self, target: &Target, granules: GranuleRange, arrived: u64) {
        let now = self.stats.now();
        self.stats.time(Timed::Install, now.saturating_sub(arrived));
        for granule in granules.iter() {
            if let Some(request) = self.pending.take(target.id, granule)
                && request.urgency == Urgency::Demand
            {
                self.stats.time(Timed::Fetch, elapsed(request.at, arrived));
                self.stats.time(Timed::Total, elapsed(request.at, now));
            }
        }
    }

    /// A source of `generation` failed: the guest stalls, nothing is poisoned.
    ///
    /// A request that must not allocate can only say that it failed, with an empty text; the source
    /// then says why from a thread of its own, and that is the reason kept.
    pub(crate) fn source_lost(&self, generation: u64, why: &SourceError) {
        let first = self.source.lose(generation);
        let silent = in_handler() || matches!(why, SourceError::Lost(text) if text.is_empty());
        if silent {
            self.reason_due.fetch_or(first, AcqRel);
        } else if first || self.reason_due.swap(false, AcqRel) {
            tracing::warn!("{why}; the guest stalls until another source is attached");
            self.health().lost = Some(why.to_string());
        }
        if first {
            self.note_source_change();
        }
    }

    pub(crate) fn note_source_change(&self) {
        self.source_changed.fetch_add(1, SeqCst);
        // Nobody waiting is not an error, and waking cannot otherwise fail on our own memory.
        let _ = futex::wake(&self.source_changed, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    /// Waits until something is said about the source, or the pager stops, or for `most`.
    pub(crate) fn wait_for_source_change(&self, most: Duration) {
        let seen = self.source_changed.load(SeqCst);
        if self.stopping.load(Acquire) {
            return;
        }
        let most =
            futex::Timespec { tv_sec: most.as_secs() as i64, tv_nsec: most.subsec_nanos().into() };
        // Woken, timed out, interrupted or changed: the caller looks again.
        let _ = futex::wait(&self.source_changed, futex::Flags::PRIVATE, seen, Some(&most));
    }

    /// Wakes every thread that waits in the kernel, so that it faults again and is seen afresh.
    pub(crate) fn wake_everything(&self) {
        let inside = self.gate.install();
        self.each_place(&inside, |target, _, uffd, host| {
            if target.wake == Wake::Yes
                && let Err(error) = uffd.wake(host)
            {
                tracing::error!("{error}");
            }
        });
    }

    /// Calls `visit` with every stretch of addresses where memory is mapped now, and the
    /// userfaultfd that serves it.
    pub(crate) fn each_place(
        &self,
        inside: &Inside<'_>,
        mut visit: impl FnMut(&Target, View, &Arc<Userfaultfd>, HostRange),
    ) {
        for target in &self.targets {
            let mut rest = target.region.all_granules();
            while !rest.is_empty() {
                let (uffd, shared) = target.shard(rest);
                let (mut part, after) = rest.split_at(shared);
                while !part.is_empty() {
                    let Some((host, placed)) = inside.place(target.id, part) else {
                        part = part.split_at(1).1;
                        continue;
                    };
                    visit(target, View::Guest, uffd, host);
                    part = part.split_at(placed.count()).1;
                }
                rest = after;
            }
            target.each_vcpu_place(inside, target.region.all_granules(), |uffd, host, _| {
                visit(target, View::Vcpu, uffd, host);
            });
        }
    }

    pub(crate) fn remaining(&self) -> u64 {
        self.targets.iter().map(|target| target.region.page_map().remaining()).sum()
    }

    pub(crate) fn completion(&self) -> Completion {
        Completion {
            granules_from_source: self.from_source.load(Acquire),
            granules_poisoned: self.poisoned_by_source.load(Acquire),
        }
    }
}

/// Granules of `whole` that are requested: all of them, but for answers given twice or removed.
fn count_requested(map: &PageMap, whole: GranuleRange) -> u64 {
    let mut count = 0;
    let mut rest = whole;
    while let Some(run) = requested(map, rest) {
        count += run.count();
        rest = rest.split_at(run.end().get() - rest.first().get()).1;
        if rest.is_empty() {
            break;
        }
    }
    count
}

/// Waits for another thread, the reader, to read the events.
pub(crate) struct WaitForReader<'a>(pub(crate) &'a Core);

impl AddressSpaceChanging for WaitForReader<'_> {
    fn let_events_be_read(&self) {
        // The kernel answers EAGAIN also for a moment's contention with no event behind it, so
        // the wait is bounded and the install simply tried again.
        let seen = self.0.events_read.load(Acquire);
        let millisecond = futex::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let _ = futex::wait(&self.0.events_read, futex::Flags::PRIVATE, seen, Some(&millisecond));
    }
}
