//! The fault path: what is done about a granule that a thread was stopped on.

use std::{os::fd::RawFd, sync::atomic::Ordering::Acquire};

use pageferry_memory::{GranuleIndex, GranuleRange, HostAddress, RegionId, State};
use pageferry_uffd::FaultKind;

use crate::{
    SinkError, Span, Urgency, WriteTracking,
    core::{AddressSpaceChanging, Core},
    delivery::signal::in_handler,
    install::{Progress, Target},
    settle,
    sink::LentSink,
    slot::InUse,
    stats::{Counter, Timed},
};

/// A fault that reached us.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) address: HostAddress,
    pub(crate) kind: FaultKind,
    pub(crate) thread: Option<u32>,
    /// The userfaultfd it was read from; `None` if it was not read, and no thread waits for us.
    pub(crate) queue: Option<RawFd>,
    /// [`Stats::now`](crate::stats::Stats::now) when it was read or caught.
    pub(crate) at: u64,
}

/// What became of a fault.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Handled {
    /// Requested, by this fault or by another: it will come.
    OnItsWay,
    /// It is there: the thread can go on.
    There,
    /// It can never come.
    Poisoned,
    /// No source is in charge.
    NoSource,
    /// The address is in no region.
    NotOurs,
}

/// Faults that arrived together, and the room to sort them out.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) faults: Vec<Arrived>,
    groups: Vec<Group>,
}

/// Adjacent granules that threads are stopped on.
struct Group {
    /// The place of the earliest of its faults in the batch.
    order: usize,
    region: RegionId,
    granules: GranuleRange,
    kind: FaultKind,
    at: u64,
}

impl Batch {
    pub(crate) fn with_capacity(faults: usize) -> Self {
        Self { faults: Vec::with_capacity(faults), groups: Vec::with_capacity(faults) }
    }
}

impl Core {
    /// Handles faults that arrived together, and empties the batch: adjacent granules are
    /// requested as one. The order of arrival is kept: served by address, the threads in low
    /// memory would always be first and the others be left to finish alone.
    pub(crate) fn faults(&self, batch: &mut Batch, changing: &dyn AddressSpaceChanging) {
        let Batch { faults, groups } = batch;
        self.stats.add(Counter::faults, faults.len() as u64);
        if let [fault] = faults[..] {
            self.fault(fault, changing);
            faults.clear();
            return;
        }
        for (order, fault) in faults.drain(..).enumerate() {
            if self.is_tracked_write(fault) {
                self.written(fault, changing);
                continue;
            }
            match self.find(fault.address) {
                Some((region, granule)) => groups.push(Group {
                    order,
                    region,
                    granules: GranuleRange::new(granule, 1),
                    kind: fault.kind,
                    at: fault.at,
                }),
                None => self.stray(fault),
            }
        }
        groups.sort_unstable_by_key(|group| (group.region, group.granules.first(), group.order));
        groups.dedup_by(|next, group| {
            let joins =
                next.region == group.region && next.granules.first() <= group.granules.end();
            if joins {
                let end = group.granules.end().max(next.granules.end());
                let first = group.granules.first();
                group.granules = GranuleRange::new(first, end.get() - first.get());
                group.order = group.order.min(next.order);
                group.at = group.at.min(next.at);
            }
            joins
        });
        groups.sort_unstable_by_key(|group| group.order);
        for group in groups.drain(..) {
            self.demand(group.region, group.granules, group.kind, group.at, changing);
        }
    }

    /// Handles one fault.
    pub(crate) fn fault(&self, fault: Arrived, changing: &dyn AddressSpaceChanging) -> Handled {
        if self.is_tracked_write(fault) {
            self.written(fault, changing);
            return Handled::There;
        }
        let Some((region, granule)) = self.find(fault.address) else {
            self.stray(fault);
            return Handled::NotOurs;
        };
        self.demand(region, GranuleRange::new(granule, 1), fault.kind, fault.at, changing)
    }

    fn is_tracked_write(&self, fault: Arrived) -> bool {
        fault.kind == FaultKind::WriteProtect && self.tracking.mode == WriteTracking::Blocking
    }

    pub(crate) fn find(&self, address: HostAddress) -> Option<(RegionId, GranuleIndex)> {
        self.gate.install().find(address)
    }

    /// Threads are stopped on every granule of `run`. Returns what became of the last.
    fn demand(
        &self,
        region: RegionId,
        run: GranuleRange,
        kind: FaultKind,
        arrived: u64,
        changing: &dyn AddressSpaceChanging,
    ) -> Handled {
        let target = &self.targets[usize::from(region.get())];
        let map = target.region.page_map();
        let mut handled = Handled::There;
        let mut at = run.first();
        while at < run.end() {
            let left = GranuleRange::new(at, run.end().get() - at.get());
            match map.state(at) {
                State::Absent => {
                    // The source is entered before the claim: whoever replaces it waits for us to
                    // leave, and then hands every claim of its time to the new one.
                    let Some(source) = self.source.enter() else {
                        // The others of the run may need none.
                        self.stats.add(Counter::stalled, 1);
                        handled = Handled::NoSource;
                        at = GranuleIndex::new(at.get() + 1);
                        continue;
                    };
                    let shift = target.region.granule().shift();
                    let won = self.prefetcher.claim(map, left, shift);
                    let demanded = won.intersection(left).filter(|part| !part.is_empty());
                    self.stats.time(Timed::Queueing, self.stats.now().saturating_sub(arrived));
                    let Some(demanded) = demanded else {
                        // Lost the race for it, but perhaps won neighbours: they are on us now.
                        self.request(
                            &source,
                            target,
                            won,
                            won,
                            Urgency::Prefetch,
                            arrived,
                            changing,
                        );
                        continue;
                    };
                    self.request(
                        &source,
                        target,
                        won,
                        demanded,
                        Urgency::Demand,
                        arrived,
                        changing,
                    );
                    let ahead = self.prefetcher.ahead(region, at, won.end(), shift);
                    if ahead > 0 {
                        self.prefetch(&source, target, won.end(), ahead, changing);
                    }
                    handled = Handled::OnItsWay;
                    at = demanded.end();
                    continue;
                }
                State::Requested => {
                    if self.pending.upgrade(region, at, arrived) {
                        self.stats.add(Counter::prefetch_hits, 1);
                        self.expedite(target.span(GranuleRange::new(at, 1)));
                    }
                    handled = Handled::OnItsWay;
                }
                State::Present | State::Discarded => {
                    self.stats.add(Counter::stale, 1);
                    handled = self.settle(target, at, kind, changing);
                }
                State::Poisoned => {
                    self.report(self.poison_now(target, GranuleRange::new(at, 1), changing));
                    handled = Handled::Poisoned;
                }
            }
            at = GranuleIndex::new(at.get() + 1);
        }
        handled
    }

    /// Hands granules that were just claimed to the source.
    #[allow(clippy::too_many_arguments)]
    fn request(
        &self,
        source: &InUse<'_>,
        target: &Target,
        won: GranuleRange,
        demanded: GranuleRange,
        urgency: Urgency,
        arrived: u64,
        changing: &dyn AddressSpaceChanging,
    ) {
        if won.is_empty() {
            return;
        }
        let mut demand = 0;
        for granule in won.iter() {
            let wanted = urgency == Urgency::Demand && demanded.contains(granule);
            let urgency = if wanted { Urgency::Demand } else { Urgency::Prefetch };
            demand += u64::from(wanted);
            if self.pending.insert(target.id, granule, urgency, arrived) {
                self.stats.add(Counter::untimed, 1);
            }
        }
        self.stats.add(Counter::demand, demand);
        self.stats.add(Counter::prefetched, won.count() - demand);
        let claim = Claim { target, granules: won };
        let sink = LentSink { core: self, generation: source.generation(), changing };
        let asked = source.source().request(target.span(won), urgency, &sink);
        claim.handed_over();
        if let Err(why) = asked {
            // The granules stay requested; the next source starts with them.
            self.source_lost(source.generation(), &why);
        }
    }

    /// Claims up to `count` absent granules from `from` on and asks for them without urgency.
    /// Returns how many granules were looked at.
    pub(crate) fn prefetch(
        &self,
        source: &InUse<'_>,
        target: &Target,
        from: GranuleIndex,
        count: u64,
        changing: &dyn AddressSpaceChanging,
    ) -> u64 {
        let map = target.region.page_map();
        let end = from.get().saturating_add(count).min(map.len());
        if from.get() >= end {
            return 0;
        }
        let window = GranuleRange::new(from, end - from.get());
        let mut at = from;
        while at < window.end() {
            let left = GranuleRange::new(at, window.end().get() - at.get());
            let absent = map.next_run(State::Absent, at, left.count());
            let Some(run) = absent.and_then(|run| run.intersection(left)) else { break };
            let won = map.claim_run(run);
            if won.is_empty() {
                at = GranuleIndex::new(run.first().get() + 1);
                continue;
            }
            self.request(source, target, won, won, Urgency::Prefetch, self.stats.now(), changing);
            at = won.end();
        }
        window.count()
    }

    fn expedite(&self, span: Span) {
        if let Some(source) = self.source.enter()
            && let Err(why) = source.source().expedite(span)
        {
            self.source_lost(source.generation(), &why);
        }
    }

    /// A thread was stopped on a granule that needs no source any more.
    ///
    /// Present: the fault is older than the install, or the page was removed since and its event
    /// is older than the fault; the kernel knows which. A page of zeros is right if there is none
    /// (EEXIST otherwise), since only removal can have taken it.
    fn settle(
        &self,
        target: &Target,
        granule: GranuleIndex,
        kind: FaultKind,
        changing: &dyn AddressSpaceChanging,
    ) -> Handled {
        loop {
            match settle::settle(self, target, granule, kind) {
                Progress::Done => return Handled::There,
                // Nobody may be left to read the events; the thread is woken when the pager is gone.
                Progress::Changing(_) if self.stopping.load(Acquire) && !in_handler() => {
                    return Handled::OnItsWay;
                }
                Progress::Changing(_) if self.unregistered.load(Acquire) => return Handled::There,
                Progress::Changing(_) => changing.let_events_be_read(),
                Progress::Refused { why, .. } => {
                    let span = target.span(GranuleRange::one(granule));
                    self.report(Err(SinkError::Install { span, why }));
                    break;
                }
            }
        }
        // It cannot come: an error for who touches it, and not for ever nothing. With memory to be
        // had again, a later touch by signal may still succeed.
        loop {
            match target.poison_absent(
                &self.gate.install(),
                GranuleRange::one(granule),
                &self.stats,
            ) {
                Progress::Changing(_) if !self.stopping.load(Acquire) => {
                    changing.let_events_be_read();
                }
                _ => return Handled::Poisoned,
            }
        }
    }

    /// A fault at an address that shows no granule: something was mapped over, or moved by an
    /// `mremap` that left its source registered. It reads as zero, as any fresh memory would.
    fn stray(&self, fault: Arrived) {
        if let Some(queue) = fault.queue {
            settle::zero_stray(self, queue, fault.address);
        }
    }

    pub(crate) fn report(&self, result: Result<(), SinkError>) {
        if let Err(error) = result
            && !in_handler()
        {
            tracing::error!("{error}");
            self.health().refused = Some(error.to_string());
        }
    }
}

/// Granules claimed and not yet handed to a source. If the hand-over unwinds they become absent
/// again, so that the next fault claims them.
struct Claim<'a> {
    target: &'a Target,
    granules: GranuleRange,
}

impl Claim<'_> {
    fn handed_over(self) {
        std::mem::forget(self);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.target.region.page_map().release(self.granules);
    }
}
