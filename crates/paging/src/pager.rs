//! A running pager: given sources, watched, stopped.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::*},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use pageferry_memory::{
    Advice, GranuleRange, HostAddress, HostRange, Layout, Mapping, RegionId, State,
};
use pageferry_uffd::Registration;

use crate::{
    Builder, Chosen, Completion, PageSource, ProtectError, SourceError, Statistics,
    children::KeptOut,
    core::{AddressSpaceChanging, Core},
    delivery::{EveryQueue, Resolved, signal::Registered},
    sink::AttachedSink,
};

/// How it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Memory is arriving, on demand or in the background.
    Running,
    /// The source is lost: threads that touch absent memory wait until another is attached.
    Stalled {
        /// What happened to it.
        why: String,
    },
    /// All memory is there or accounted for, and the source agrees.
    Complete(Completion),
    /// What was missing was given up and poisoned.
    Abandoned,
}

/// Memory that arrives on demand.
///
/// While the pager lives, a thread that touches an absent granule is held until the granule is
/// there. Dropping it before everything is there [poisons](crate::PageSink::poison) what is missing:
/// the guest sees a memory error, never zeros.
///
/// Children of the process (`fork(2)`) do not have the memory: touching it there is SIGSEGV. Once a
/// pager that brought everything is dropped, later children have it again.
pub struct Pager {
    pub(crate) core: Arc<Core>,
    pub(crate) chosen: Chosen,
    pub(crate) stop: Arc<OwnedFd>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) signal: Option<Registered>,
    pub(crate) registrations: Vec<Registration<Arc<Mapping>>>,
    pub(crate) kept_out: KeptOut,
    /// One source is attached at a time.
    pub(crate) attaching: Mutex<()>,
    pub(crate) marks: Marks,
}

/// Whether marks are left that vCPUs leave KVM_RUN for.
pub(crate) struct Marks {
    gone: AtomicBool,
    asked: AtomicU32,
}

impl Marks {
    pub(crate) fn new(exits: bool) -> Self {
        Self { gone: AtomicBool::new(!exits), asked: AtomicU32::new(0) }
    }

    /// Whether to look for marks that are left after everything came: every so often, as it means
    /// to look at the whole map.
    fn look(&self) -> bool {
        self.asked.fetch_add(1, Relaxed).is_multiple_of(4096)
    }
}

impl Pager {
    /// A pager for this memory, none of which is there yet.
    pub fn builder(layout: Layout) -> Builder {
        Builder::new(layout)
    }

    /// What was chosen, and why.
    pub fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// The memory.
    pub fn layout(&self) -> &Layout {
        &self.core.layout
    }

    /// What was done so far.
    pub fn statistics(&self) -> Statistics {
        self.core.stats.snapshot()
    }

    /// Granules that are neither there nor accounted for.
    pub fn remaining(&self) -> u64 {
        self.core.remaining()
    }

    /// How it goes.
    pub fn status(&self) -> Status {
        let health = self.core.health();
        if health.abandoned {
            Status::Abandoned
        } else if let Some(counts) = health.agreed {
            Status::Complete(counts)
        } else if let Some(why) = &health.lost {
            Status::Stalled { why: why.clone() }
        } else if self.core.reason_due.load(Acquire) {
            Status::Stalled { why: "a request to the page source failed".to_owned() }
        } else {
            Status::Running
        }
    }

    /// The last thing that the kernel refused for good, if any: memory that ran out, say. The
    /// granules concerned are poisoned.
    pub fn last_error(&self) -> Option<String> {
        self.core.health().refused.clone()
    }

    /// Puts another source in charge, after the last one was lost or in its place. What had been
    /// asked of the last one is asked of this one.
    ///
    /// # Errors
    /// When the source does not fit; there is no source in charge then.
    pub fn attach_source(&self, source: Arc<dyn PageSource>) -> Result<(), SourceError> {
        let core = &self.core;
        let _attaching = self.attaching.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(last) = core.source.vacate() {
            last.detach();
        }
        // Nobody is bringing anything now: every claim is given back, and those who wait for it
        // claim again.
        for target in &core.targets {
            target.region.page_map().release(target.region.all_granules());
        }
        core.from_source.store(0, Release);
        core.poisoned_by_source.store(0, Release);
        // Before it is attached: from then on it can be lost.
        core.health().lost = None;
        core.reason_due.store(false, Release);
        let generation = core.source.next_generation();
        if let Err(error) = source.attach(Arc::new(AttachedSink::new(core, generation))) {
            source.detach();
            core.health().lost = Some(error.to_string());
            return Err(error);
        }
        core.source.install(source);
        core.note_source_change();
        core.wake_everything();
        Ok(())
    }

    /// Gives up on everything that is missing: it is poisoned, and whoever touches it sees a
    /// memory error ([`PageSink::poison`](crate::PageSink::poison) says which). The source is let
    /// go.
    pub fn abandon(&self) {
        let _attaching = self.attaching.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(last) = self.core.source.vacate() {
            last.detach();
        }
        self.core.health().abandoned = true;
        self.poison_missing();
        self.core.note_source_change();
    }

    fn poison_missing(&self) -> bool {
        let mut all = true;
        // The readers may have been given up, and an event be waiting.
        let changing = EveryQueue::of(&self.core);
        for target in &self.core.targets {
            let granules = target.region.all_granules();
            if let Err(error) = self.core.poison_now(target, granules, &changing) {
                tracing::error!("{error}");
                all = false;
            }
        }
        self.core.wake_everything();
        all
    }

    /// Waits until all memory is there or accounted for and the source agrees, or there is no
    /// more hope for it, or the time is up.
    pub fn wait_complete(&self, timeout: Duration) -> Status {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.status();
            let left = deadline.saturating_duration_since(Instant::now());
            if matches!(status, Status::Complete(_) | Status::Abandoned) || left.is_zero() {
                return status;
            }
            let tick = left.min(Duration::from_millis(20));
            for target in &self.core.targets {
                if !target.region.page_map().wait_complete(Some(tick)) {
                    break;
                }
            }
            if self.core.remaining() == 0 {
                // Only the agreement is outstanding.
                self.core.wait_for_source_change(tick);
            }
        }
    }

    /// Brings the granule at `address` on the calling thread, for a component that knows that it
    /// is about to touch it, or was told by other means that somebody did. True when it is there
    /// (or the address is in no region), false when it can never come.
    pub fn resolve(&self, address: HostAddress) -> bool {
        self.core.resolve(address)
    }

    /// Brings the granule at `address`, which a vCPU left KVM_RUN for, on the calling thread: an
    /// address of the guest view or of the vCPU view. While it has to wait, `interrupted` is asked
    /// at least every 5 ms whether to return without the granule, for a signal that is pending,
    /// say.
    ///
    /// When the granule was there all the time, but not mapped at `address`, it is mapped
    /// (CONTINUE, then MADV_POPULATE_WRITE).
    pub fn resolve_exit(
        &self,
        address: HostAddress,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Resolved {
        self.core.resolve_exit(address, interrupted)
    }

    /// Whether vCPUs may still leave KVM_RUN for absent memory: the delivery is by exits, and
    /// there may be marked pages. Once false it stays so.
    pub fn delivers_exits(&self) -> bool {
        if self.marks.gone.load(Acquire) {
            return false;
        }
        if self.core.remaining() > 0 || !self.marks.look() {
            return true;
        }
        // A mark is left where memory was removed through its file, and where it is poisoned.
        let gone = self.core.targets.iter().all(|target| {
            let map = target.region.page_map();
            map.count(State::Poisoned) + map.count(State::Discarded) == 0
        });
        if gone && self.core.remaining() == 0 {
            self.marks.gone.store(true, Release);
        }
        !gone
    }

    /// Takes away the marks that are left where shared memory was removed through its file: it
    /// reads as zero there. What was mapped there can be mapped again from the file.
    fn clear_marks(&self) {
        for target in &self.core.targets {
            let region = &target.region;
            let shared = region.vcpu_view().is_some() || region.fill_view().is_some();
            if !self.chosen.delivery.exits() || !(shared || region.file().is_some()) {
                continue;
            }
            let view = region.kvm_view();
            let shift = region.granule().shift();
            let mut rest = region.all_granules();
            while let Some(run) =
                region.page_map().next_run(State::Discarded, rest.first(), rest.count())
            {
                let (offset, len) = (run.first().get() << shift, run.count() << shift);
                let range = view.range().split_at(offset).1.split_at(len).0;
                if let Err(error) = view.advise(range, Advice::DontNeed) {
                    tracing::warn!("removed memory at {range} may still be marked: {error}");
                }
                rest = rest.split_at(run.end().get() - rest.first().get()).1;
            }
        }
    }

    /// Write-protects the pages of `range` in tracked memory again, those that have not come
    /// included: from its return on, every write to one is noticed. Of a write while it runs that
    /// is not sure, so whoever collects takes what is known to be written first, then protects, and
    /// only then copies the pages.
    ///
    /// With [`WriteTracking::Asynchronous`](crate::WriteTracking::Asynchronous) this forgets what
    /// was written: it is how tracking begins, or begins afresh, while `PAGEMAP_SCAN` collects and
    /// protects in one step.
    ///
    /// Not to be called by a [`WriteObserver`](crate::WriteObserver).
    ///
    /// # Errors
    /// [`ProtectError`].
    pub fn protect(&self, range: HostRange) -> Result<(), ProtectError> {
        self.core.protect(range)
    }

    /// What a tracker may arm: the addresses where tracked memory is mapped now; none with
    /// [`WriteTracking::Off`](crate::WriteTracking::Off). It changes when the guest moves or unmaps
    /// memory.
    pub fn tracked(&self) -> Vec<HostRange> {
        self.core.tracked()
    }

    /// Reports every granule of this range, known to be present already, as such.
    pub fn assume_present(&self, region: RegionId, granules: GranuleRange) -> u64 {
        let Some(region) = self.core.layout.get(region) else { return 0 };
        region.page_map().set_present(granules)
    }
}

impl Drop for Pager {
    /// Detaches the source, poisons what is missing, stops the threads, and unregisters.
    fn drop(&mut self) {
        if let Some(last) = self.core.source.vacate() {
            last.detach();
        }
        let whole = self.core.targets.iter().all(|target| {
            let map = target.region.page_map();
            map.is_complete() && map.count(State::Poisoned) == 0
        });
        // Unregistering lets waiting threads go on with zero pages: only poison prevents that.
        let safe = self.core.remaining() == 0 || self.poison_missing();
        self.core.stopping.store(true, Release);
        self.core.note_source_change();
        if let Err(error) = rustix::io::write(&*self.stop, &1u64.to_ne_bytes()) {
            tracing::error!("stopping the fault delivery: {error}");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the pager panicked");
            }
        }
        let inside = self.core.gate.install();
        let mut places = Vec::new();
        for registration in self.registrations.drain(..) {
            // Not dropped: what is mapped at its addresses now may be somebody else's.
            let uffd = Arc::clone(registration.uffd());
            let mapping = registration.into_inner_registered();
            if !safe {
                // Keeps the memory registered and its userfaultfd open.
                std::mem::forget((uffd, mapping));
            }
        }
        if !safe {
            tracing::error!(
                "missing pages could not be poisoned: threads that touch them wait for ever"
            );
        }
        self.core.each_place(&inside, |_, _, uffd, host| {
            places.push(host);
            if safe && let Err(error) = uffd.unregister_raw(host) {
                tracing::error!("{error}");
            }
        });
        drop(inside);
        if safe {
            // A thread that is being held up by an event goes on.
            EveryQueue::of(&self.core).let_events_be_read();
        }
        if safe {
            self.clear_marks();
        }
        // Only now: until then threads need their handler to get at memory that they removed.
        self.core.unregistered.store(true, Release);
        self.signal = None;
        // What was poisoned would be zeros in a child: the marks are not copied with shared memory.
        self.kept_out.moved_to(places.into_iter().filter(|_| whole));
        drop(std::mem::take(&mut self.kept_out));
    }
}
