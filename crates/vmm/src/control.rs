//! Pausing, resuming, slowing down and stopping the vCPUs of a run from outside.
//!
//! A vCPU thread asks [`Control::next`] before each entry into the guest. Who wants something of it
//! changes what is wanted first, then sets `immediate_exit`, then sends the signal; the thread
//! clears
//! `immediate_exit` first, then looks at what is wanted. So a wish is either seen before the entry
//! or makes the entry that follows return at once.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The time of which a throttled vCPU rests a part.
const PERIOD: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
struct Wanted {
    pauses: u32,
    stop: bool,
    /// vCPUs of a run that have neither ended nor parked.
    active: usize,
    /// A run is in progress.
    running: bool,
    /// Percent of their time that vCPUs rest.
    throttle: u8,
    /// Until when they rest now.
    rest_until: Option<Instant>,
}

/// What is wanted of the vCPUs.
#[derive(Debug, Default)]
pub(crate) struct Control {
    wanted: Mutex<Wanted>,
    changed: Condvar,
    /// Who throttles waits for this.
    throttle_changed: Condvar,
}

/// What a vCPU's thread is to do.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    /// Enter the guest.
    Enter,
    /// Finish what it is in the middle of, and [park](Control::park).
    Pause,
    /// End.
    Stop,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        // A panic cannot leave it half changed.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Wanted>) -> MutexGuard<'a, Wanted> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// A run begins. Each of its vCPUs is active until its guard is dropped: from before its thread
    /// exists, so that a pause waits until it is ready to be saved.
    pub(crate) fn begin(&self, vcpus: u16) -> Vec<Active<'_>> {
        let mut wanted = self.lock();
        wanted.running = true;
        wanted.active += usize::from(vcpus);
        (0..vcpus).map(|_| Active(self)).collect()
    }

    /// What is wanted now; a vCPU that is to enter rests before, until `due` and as it is
    /// throttled.
    pub(crate) fn next(&self, due: Option<Instant>) -> Next {
        let mut wanted = self.lock();
        loop {
            if wanted.stop {
                return Next::Stop;
            }
            if wanted.pauses > 0 {
                return Next::Pause;
            }
            let until = wanted.rest_until.max(due);
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let Some(left) = left.filter(|left| !left.is_zero()) else { return Next::Enter };
            let waited = self.changed.wait_timeout(wanted, left);
            wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for every pause to end, or for a stop.
    pub(crate) fn park(&self, _active: &Active<'_>) {
        let mut wanted = self.lock();
        wanted.active -= 1;
        self.changed.notify_all();
        while wanted.pauses > 0 && !wanted.stop {
            wanted = self.wait(wanted);
        }
        wanted.active += 1;
    }

    /// Wants a pause; `kick` makes the vCPUs notice. Returns when all have parked or ended.
    pub(crate) fn pause(&self, kick: impl FnOnce()) {
        self.lock().pauses += 1;
        self.changed.notify_all();
        kick();
        let mut wanted = self.lock();
        while wanted.active > 0 {
            wanted = self.wait(wanted);
        }
    }

    /// Ends one pause.
    pub(crate) fn resume(&self) {
        let mut wanted = self.lock();
        wanted.pauses = wanted.pauses.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Wants the end of the run.
    pub(crate) fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    /// Whether the run is to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.lock().stop
    }

    /// The vCPUs of a run have ended.
    pub(crate) fn vcpus_ended(&self) {
        self.lock().running = false;
        self.throttle_changed.notify_all();
    }

    /// A run has ended: what stopped it does not stop the next.
    pub(crate) fn run_ended(&self) {
        self.lock().stop = false;
    }

    /// Wants vCPUs to rest so many percent of their time, 99 at most.
    pub(crate) fn set_throttle(&self, percent: u8) {
        let mut wanted = self.lock();
        wanted.throttle = percent.min(99);
        if percent == 0 {
            wanted.rest_until = None;
            self.changed.notify_all();
        }
        self.throttle_changed.notify_all();
    }

    /// Has vCPUs rest a part of each period, as it is wanted, until they have ended: `kick` makes
    /// them notice that a rest begins.
    pub(crate) fn throttle(&self, kick: impl Fn()) {
        let mut wanted = self.lock();
        while wanted.running {
            if wanted.throttle == 0 {
                let woken = self.throttle_changed.wait(wanted);
                wanted = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let percent = wanted.throttle;
            let begun = Instant::now();
            wanted.rest_until = Some(begun + PERIOD * percent.into() / 100);
            drop(wanted);
            kick();
            wanted = self.lock();
            while wanted.running && wanted.throttle == percent {
                let left = (begun + PERIOD).saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let waited = self.throttle_changed.wait_timeout(wanted, left);
                wanted = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        wanted.rest_until = None;
    }
}

/// A vCPU of a run that has not ended.
#[derive(Debug)]
pub(crate) struct Active<'a>(&'a Control);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let mut wanted = self.0.lock();
        wanted.active -= 1;
        self.0.changed.notify_all();
    }
}
