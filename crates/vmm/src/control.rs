//! Pausing, resuming and stopping the vCPUs of a run from outside.
//!
//! A vCPU thread passes a checkpoint before each entry into the guest. Who wants something of it
//! changes what is wanted first, then sets `immediate_exit`, then sends the signal; the thread clears
//! `immediate_exit` first, then looks at what is wanted. So a wish is either seen at the checkpoint
//! or makes the entry that follows return at once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Wanted {
    pauses: u32,
    stop: bool,
    /// Threads of vCPUs that may be in the guest.
    active: usize,
}

/// What is wanted of the vCPUs.
#[derive(Debug, Default)]
pub(crate) struct Control {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        // A panic cannot leave it half changed.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Wanted>) -> MutexGuard<'a, Wanted> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// A vCPU's thread begins. It counts as active until the guard is dropped.
    pub(crate) fn enter(&self) -> Active<'_> {
        self.lock().active += 1;
        Active(self)
    }

    /// Waits for every pause to end. False: the vCPU is to stop.
    pub(crate) fn checkpoint(&self, _active: &Active<'_>) -> bool {
        let mut wanted = self.lock();
        if wanted.pauses > 0 && !wanted.stop {
            wanted.active -= 1;
            self.changed.notify_all();
            while wanted.pauses > 0 && !wanted.stop {
                wanted = self.wait(wanted);
            }
            wanted.active += 1;
        }
        !wanted.stop
    }

    /// Wants a pause; `kick` makes the vCPUs notice. Returns when none is in the guest.
    pub(crate) fn pause(&self, kick: impl FnOnce()) {
        self.lock().pauses += 1;
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

    /// A run has ended: what stopped it does not stop the next.
    pub(crate) fn run_ended(&self) {
        self.lock().stop = false;
    }
}

/// The thread of a vCPU that may be in the guest.
pub(crate) struct Active<'a>(&'a Control);

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let mut wanted = self.0.lock();
        wanted.active -= 1;
        self.0.changed.notify_all();
    }
}
