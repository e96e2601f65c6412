//! The machine that goes away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_dirty::{DirtySet, Tracker};
use pageferry_memory::{GranuleIndex, GranuleRange, HostRange, Layout};
use pageferry_migrate::{DeviceState, DirtySink, GuestError, SourceGuest};

use super::{NAME, failed};
use crate::{Machine, Report, VmError, WriteTracking, state};

/// Bytes of the units that dirty memory is reported in.
const UNIT: u64 = 4096;

/// A running [`Machine`] that is to be moved away. Its memory must all be there.
#[derive(Debug)]
pub struct MachineSource {
    machine: Arc<Machine>,
    how: WriteTracking,
    tracking: Mutex<Tracking>,
}

#[derive(Debug, Default)]
struct Tracking {
    /// Kept when tracking ends: a machine has one tracker of dirty rings in its life.
    tracker: Option<Box<dyn Tracker>>,
    dirty: Option<DirtySet>,
    paused: bool,
    /// What the machine came to when it was released.
    report: Option<Result<Report, VmError>>,
}

impl MachineSource {
    /// Moves this machine, and tracks its writes in this way meanwhile.
    pub fn new(machine: Arc<Machine>, how: WriteTracking) -> Self {
        Self { machine, how, tracking: Mutex::default() }
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// What the machine came to, once it runs elsewhere for good.
    pub fn take_report(&self) -> Option<Result<Report, VmError>> {
        self.lock().report.take()
    }

    fn lock(&self) -> MutexGuard<'_, Tracking> {
        // A panic cannot leave it half changed.
        self.tracking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works with the tracker, without holding the lock meanwhile.
    fn with_tracker<T>(
        &self,
        what: &'static str,
        work: impl FnOnce(&mut dyn Tracker, &DirtySet) -> Result<T, GuestError>,
    ) -> Result<T, GuestError> {
        let mut tracking = self.lock();
        let taken = (tracking.tracker.take(), tracking.dirty.take());
        drop(tracking);
        let (Some(mut tracker), Some(dirty)) = taken else {
            return Err(GuestError::failed(what, "writes are not tracked"));
        };
        let result = work(&mut *tracker, &dirty);
        let mut tracking = self.lock();
        (tracking.tracker, tracking.dirty) = (Some(tracker), Some(dirty));
        result
    }

    /// Reports a run of host addresses as units of regions.
    fn report(layout: &Layout, run: HostRange, into: &mut DirtySink<'_>) {
        for (id, region) in layout.iter() {
            let view = region.kvm_view().range();
            if let Some(part) = view.intersection(run) {
                let first = (part.start().get() - view.start().get()) / UNIT;
                into(id, GranuleRange::new(GranuleIndex::new(first), part.len() / UNIT));
            }
        }
    }
}

impl SourceGuest for MachineSource {
    fn layout(&self) -> Layout {
        self.machine.vm().layout()
    }

    fn start_tracking(&self) -> Result<(), GuestError> {
        let what = "beginning to track writes";
        let ranges = self.machine.vm().tracked();
        let kept = self.lock().tracker.take();
        let mut tracker = match kept {
            Some(tracker) => tracker,
            None => self.machine.vm().tracker(self.how).map_err(failed(what))?,
        };
        let dirty = DirtySet::new(&ranges).map_err(failed(what))?;
        let armed = tracker.arm(&ranges).map_err(failed(what));
        let mut tracking = self.lock();
        tracking.tracker = Some(tracker);
        armed?;
        tracking.dirty = Some(dirty);
        Ok(())
    }

    fn harvest(&self, into: &mut DirtySink<'_>) -> Result<(), GuestError> {
        let what = "finding out what was written";
        let layout = self.layout();
        self.with_tracker(what, |tracker, dirty| {
            let harvested = tracker.harvest(dirty).map_err(failed(what))?;
            for run in dirty.take().into_iter().chain(harvested.whole) {
                Self::report(&layout, run, into);
            }
            match harvested.gone.first() {
                Some(gone) => Err(GuestError::failed(what, format!("{gone} is tracked no more"))),
                None => Ok(()),
            }
        })
    }

    fn stop_tracking(&self) -> Result<(), GuestError> {
        let what = "ending to track writes";
        self.with_tracker(what, |tracker, _| tracker.disarm().map_err(failed(what)))
    }

    fn pause(&self) -> Result<(), GuestError> {
        let before = std::mem::replace(&mut self.lock().paused, true);
        if !before {
            self.machine.vm().pause();
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        let before = std::mem::take(&mut self.lock().paused);
        if before {
            self.machine.vm().resume();
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, GuestError> {
        let state = self.machine.vm().save().map_err(failed("saving the machine's state"))?;
        Ok(DeviceState { name: NAME.to_owned(), version: state::VERSION, bytes: state.encode() })
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.machine.vm().throttle(percent);
        Ok(())
    }

    fn release(&self) {
        // It stays paused: its vCPUs end where they are.
        let report = self.machine.stop();
        let mut tracking = self.lock();
        tracking.report = Some(report);
        (tracking.tracker, tracking.dirty) = (None, None);
    }
}
