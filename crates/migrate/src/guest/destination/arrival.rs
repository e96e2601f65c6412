//! What the guest's arrival consists of, step by step: room, memory, devices, life.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use pageferry_memory::{Advice, Backing, GranuleIndex, GranuleRange, Layout, RegionId, State};
use pageferry_paging::{Pager, Prefetch};

use super::{
    Place,
    arrivals::Arrivals,
    link::{End, Link},
};
use crate::{
    MigrateError,
    core::{AcceptedRegion, DestinationEvent, Frame, RegionInfo, UnitRun, UnitSet},
    guest::{
        DeviceState, Event,
        memory::Memory,
        status::{Stage, add},
        units::{UNIT, Units},
    },
    peer::lock,
};

impl Link {
    /// Does what an event is about.
    pub(super) fn handle(
        self: &Arc<Self>,
        event: DestinationEvent,
    ) -> Result<Option<End>, MigrateError> {
        let shared = &self.shared;
        match event {
            DestinationEvent::Regions => self.make_room()?,
            DestinationEvent::RoundBegun { round, units } => {
                // Rounds are counted in fewer bits than they have.
                shared.journal.enter(Stage::Copying { round: round as u32 });
                shared.announced.store(units, Ordering::Relaxed);
            }
            DestinationEvent::RoundDone => {
                self.send_what(|session| session.round_ack())?;
            }
            // On a thread of its own: restoring may need answers that others have to receive.
            DestinationEvent::Switched => {
                let this = Arc::clone(self);
                self.spawn("pf-switch".into(), move || this.take_over())?;
            }
            DestinationEvent::Run => return self.run(),
            DestinationEvent::Cancelled(why) => {
                self.send(&Frame::Cancelled)?;
                return Ok(Some(End::CalledOff(why)));
            }
            DestinationEvent::Resumed(_) => return self.resume(),
            DestinationEvent::Completed => {
                self.set_completed();
                return Ok(Some(End::Completed));
            }
            DestinationEvent::Left => {
                return if self.is_completed() {
                    Ok(Some(End::Completed))
                } else {
                    Err(MigrateError::Left)
                };
            }
            DestinationEvent::Nothing | DestinationEvent::Agreed | DestinationEvent::Page(_) => {}
        }
        Ok(None)
    }

    /// The regions are known.
    fn make_room(&self) -> Result<(), MigrateError> {
        let shared = &self.shared;
        let regions = lock(&shared.session)
            .geometry()
            .map(|geometry| geometry.regions().to_vec())
            .unwrap_or_default();
        let layout = shared.guest.prepare(&regions)?;
        check_layout(&regions, &layout)?;
        let granules = (regions.iter())
            .zip(layout.iter())
            .map(|(region, (_, here))| AcceptedRegion {
                id: region.id,
                granule: here.granule().bytes(),
            })
            .collect();
        let memory = Memory::new(&layout);
        let touched = UnitSet::new(memory.lens());
        let cleared = UnitSet::new(memory.lens());
        if shared.place.set(Place { layout, memory, touched, cleared }).is_err() {
            return Err(MigrateError::Misuse("room has been made before"));
        }
        self.send(&Frame::Accept(granules))
    }

    /// The guest stands still at the source, and all that is to come before it runs here has come.
    fn take_over(self: &Arc<Self>) -> Result<(), MigrateError> {
        let shared = &self.shared;
        shared.journal.enter(Stage::Switching);
        shared.journal.stopping();
        let place = shared.place()?;
        let missing: Vec<Vec<UnitRun>> = {
            let session = lock(&shared.session);
            let missing = session.missing();
            (0..place.memory.len()).map(|region| missing.runs(region, true).collect()).collect()
        };
        let stale = place.discard(&missing)?;
        add(&shared.counts.stale, stale);
        place.assume_present(&missing);
        if missing.iter().any(|runs| !runs.is_empty()) {
            self.shorten_queues();
            let builder = Pager::builder(place.layout.clone()).prefetch(Prefetch::NONE);
            let arrivals = Arrivals { link: Arc::downgrade(self) };
            let pager = shared.guest.deliver(builder).start(Arc::new(arrivals))?;
            *lock(&shared.pager) = Some(Arc::new(pager));
        }
        let (info, bytes) = lock(&shared.session)
            .take_state()
            .ok_or(MigrateError::Misuse("the device state has been taken before"))?;
        let state =
            DeviceState { name: info.name.as_str().to_owned(), version: info.version, bytes };
        shared.guest.restore(&state)?;
        // What restoring has asked for is to be there before the source decides.
        let until = Instant::now() + shared.options.idle_timeout;
        self.wait(Some(until), || {
            !place.is_waited_for() && lock(&shared.session).ready().is_some()
        })?;
        *lock(&self.held) = Some(Vec::new());
        match self.send_what(|session| session.ready())? {
            true => Ok(()),
            false => Err(MigrateError::Misuse("memory is touched before the guest runs")),
        }
    }

    /// The guest is this side's.
    fn run(self: &Arc<Self>) -> Result<Option<End>, MigrateError> {
        let shared = &self.shared;
        let pager = lock(&shared.pager).clone();
        if let Err(error) = shared.guest.run(pager.clone()) {
            lock(&shared.session).drop_guest()?;
            self.send(&Frame::Dropped)?;
            self.control.linger();
            return Ok(Some(End::Dropped(error.into())));
        }
        shared.running.store(true, Ordering::Release);
        shared.journal.running();
        shared.journal.enter(Stage::PostCopy);
        self.serve(pager.is_none())
    }

    /// The guest runs: the source is told, and asked for what is missing.
    fn serve(self: &Arc<Self>, complete: bool) -> Result<Option<End>, MigrateError> {
        self.send(&Frame::Running)?;
        self.release()?;
        if complete {
            self.send_what(|session| session.completion())?;
        }
        Ok(None)
    }

    /// The source is back: it hears what is here, and what became of the guest.
    fn resume(self: &Arc<Self>) -> Result<Option<End>, MigrateError> {
        let shared = &self.shared;
        let have: Vec<Frame> = lock(&shared.session).have().collect();
        have.iter().try_for_each(|frame| self.send(frame))?;
        *lock(&self.held) = Some(Vec::new());
        let pager = lock(&shared.pager).clone();
        let complete = pager.is_none();
        if let Some(pager) = pager {
            let arrivals = Arrivals { link: Arc::downgrade(self) };
            pager.attach_source(Arc::new(arrivals)).map_err(|error| {
                MigrateError::Sink(format!("the pager does not take the source back: {error}"))
            })?;
        }
        add(&shared.counts.resumed, 1);
        let standing = lock(&shared.session).standing();
        match standing {
            Some(Frame::Running) => {
                shared.journal.enter(Stage::PostCopy);
                let missing = lock(&shared.session).due().total();
                shared.journal.tell(&Event::Resumed { missing });
                self.serve(complete)
            }
            Some(frame) => {
                let dropped = matches!(frame, Frame::Dropped);
                self.send(&frame)?;
                let why =
                    || MigrateError::Misuse("the guest was dropped before the source was back");
                Ok(dropped.then(|| End::Dropped(why())))
            }
            // The link broke while the guest was being started: it runs by now, or was dropped.
            None if shared.running.load(Ordering::Acquire) => self.serve(complete),
            None => Err(MigrateError::Misuse("the guest is neither ready nor running")),
        }
    }
}

impl Place {
    /// Discards what has come of what is missing, so that touching it faults; returns how many
    /// units that were.
    fn discard(&self, missing: &[Vec<UnitRun>]) -> Result<u64, MigrateError> {
        let mut stale = 0;
        for (index, missing) in missing.iter().enumerate() {
            for run in self.cleared.runs(index, true) {
                self.touched.insert(index, run);
            }
            let region = self.memory.region(index);
            let (view, page) = (region.guest_view(), region.page_size().bytes() / UNIT);
            // Many parts, and the guest stands still for them: anonymous memory is told of all at
            // once.
            let mut together = Vec::new();
            for run in common(missing.iter().copied(), self.touched.runs(index, true)) {
                stale += run.count;
                let units = Units::new(index, run).widened(page);
                let (offset, length) = (units.first * UNIT, units.bytes());
                let range = view.range().skip(offset).take(length);
                let discarded = match (region.file(), region.backing()) {
                    (Some(file), _) => file.punch_hole(offset, length),
                    (None, Backing::Anonymous) => {
                        together.push(range);
                        Ok(())
                    }
                    // Shared memory, or else private.
                    (None, _) => view
                        .advise(range, Advice::Remove)
                        .or_else(|_| view.advise(range, Advice::DontNeed)),
                };
                discarded.map_err(MigrateError::Discard)?;
            }
            let discarded = view.advise_all(&together, Advice::DontNeed);
            discarded.map_err(MigrateError::Discard)?;
        }
        Ok(stale)
    }

    /// Everything else is there: what came, and what nothing was written to, which is zero.
    fn assume_present(&self, missing: &[Vec<UnitRun>]) {
        for ((_, region), missing) in self.layout.iter().zip(missing) {
            let shift = region.granule().shift();
            let present = |first: u64, end: u64| {
                if first < end {
                    let index = GranuleIndex::new((first * UNIT) >> shift);
                    let granules = GranuleRange::new(index, ((end - first) * UNIT) >> shift);
                    region.page_map().set_present(granules);
                }
            };
            let mut first = 0;
            for run in missing {
                present(first, run.first);
                first = run.first + run.count;
            }
            present(first, region.len() / UNIT);
        }
    }

    /// Whether something was asked for and is not there.
    fn is_waited_for(&self) -> bool {
        self.layout.iter().any(|(_, region)| region.page_map().count(State::Requested) > 0)
    }
}

/// The runs that are in both lists, which ascend.
fn common(
    ours: impl Iterator<Item = UnitRun>,
    theirs: impl Iterator<Item = UnitRun>,
) -> impl Iterator<Item = UnitRun> {
    let (mut ours, mut theirs) = (ours.peekable(), theirs.peekable());
    std::iter::from_fn(move || {
        loop {
            let (a, b) = (*ours.peek()?, *theirs.peek()?);
            let first = a.first.max(b.first);
            let (a_end, b_end) = (a.first + a.count, b.first + b.count);
            if a_end <= b_end {
                ours.next();
            } else {
                theirs.next();
            }
            let end = a_end.min(b_end);
            if first < end {
                return Some(UnitRun { first, count: end - first });
            }
        }
    })
}

/// Whether the memory made is that of these regions.
fn check_layout(regions: &[RegionInfo], layout: &Layout) -> Result<(), MigrateError> {
    let bad = |why: String| Err(MigrateError::Mismatch(why));
    if regions.len() != layout.len() {
        return bad(format!("{} regions were made for {}", layout.len(), regions.len()));
    }
    for (region, (id, here)) in regions.iter().zip(layout.iter()) {
        if RegionId::new(region.id) != id {
            return bad(format!("region {} is not called so by its place", region.id));
        }
        let same = here.guest_base().get() == region.guest_base && here.len() == region.length;
        if !same || here.granule().bytes() < region.granule || region.granule != UNIT {
            return bad(format!(
                "region {id}: {:#x} bytes at {:#x} in granules of {} were made for {:#x} at {:#x} \
                 in units of {}",
                here.len(),
                here.guest_base().get(),
                here.granule().bytes(),
                region.length,
                region.guest_base,
                region.granule
            ));
        }
        if here.granule().bytes() < here.page_size().bytes() {
            return bad(format!("region {id}: its granules are parts of pages"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_lists_have_in_common() {
        let run = |(first, end)| UnitRun { first, count: end - first };
        let ours = [(0, 4), (6, 10), (20, 30)].map(run);
        let theirs = [(2, 7), (9, 12), (22, 24), (25, 26), (29, 40)].map(run);
        let both: Vec<_> = common(ours.into_iter(), theirs.into_iter()).collect();
        assert_eq!(both, [(2, 4), (6, 7), (9, 10), (22, 24), (25, 26), (29, 30)].map(run));
    }
}
