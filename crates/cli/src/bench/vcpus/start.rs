//! A common start for all vCPUs, and the time from it to the last one's end.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kvm_ioctls::VcpuFd;
use pageferry_kvm::{Exit, RunError, VcpuStats};
use pageferry_vmm::VcpuRunner;

use super::super::guest::cpu_time;

/// Where the vCPUs wait for each other.
#[derive(Debug)]
pub(super) struct StartLine {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// vCPUs that are still to come, or to say that they never will.
    awaited: usize,
    /// vCPUs that have not come to their end.
    unfinished: usize,
    begun: Option<Moment>,
    ended: Option<Moment>,
}

#[derive(Copy, Clone, Debug)]
struct Moment {
    at: Instant,
    /// What the process had used.
    cpu: Duration,
}

impl Moment {
    fn now() -> Self {
        Self { cpu: cpu_time(), at: Instant::now() }
    }
}

impl StartLine {
    /// For so many runners, each of which is to be made by [`runner`](Self::runner).
    pub(super) fn new(vcpus: usize) -> Self {
        let state = State { awaited: vcpus, unfinished: vcpus, begun: None, ended: None };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// `inner`, whose first entry into the guest waits for all the others'.
    pub(super) fn runner<'r>(
        &'r self,
        inner: Box<dyn VcpuRunner + 'r>,
    ) -> Box<dyn VcpuRunner + 'r> {
        Box::new(Runner { inner, line: self, arrived: false })
    }

    /// Wall and processor time from the start to the end; `None` if not all got so far.
    pub(super) fn took(&self) -> Option<(Duration, Duration)> {
        let state = self.lock();
        let (begun, ended) = (state.begun?, state.ended?);
        Some((ended.at - begun.at, ended.cpu.saturating_sub(begun.cpu)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn one_less(&self, state: &mut State) {
        state.awaited -= 1;
        if state.awaited == 0 {
            state.begun = Some(Moment::now());
            self.changed.notify_all();
        }
    }

    fn arrive(&self) {
        let mut state = self.lock();
        self.one_less(&mut state);
        while state.awaited > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn finish(&self, arrived: bool) {
        let mut state = self.lock();
        if !arrived {
            // Nobody is to wait for one that was stopped, or had no thread.
            self.one_less(&mut state);
        }
        state.unfinished -= 1;
        if state.unfinished == 0 {
            state.ended = Some(Moment::now());
        }
    }
}

struct Runner<'r> {
    inner: Box<dyn VcpuRunner + 'r>,
    line: &'r StartLine,
    arrived: bool,
}

impl VcpuRunner for Runner<'_> {
    fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        if !std::mem::replace(&mut self.arrived, true) {
            self.line.arrive();
        }
        self.inner.run(vcpu)
    }

    fn stats(&self) -> Option<VcpuStats> {
        self.inner.stats()
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        self.line.finish(self.arrived);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    struct Never;

    impl VcpuRunner for Never {
        fn run<'a>(&mut self, _: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
            unreachable!("the tests enter no guest")
        }
    }

    #[test]
    fn nobody_waits_for_one_that_never_comes() {
        let line = StartLine::new(3);
        let never = line.runner(Box::new(Never));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    line.arrive();
                    line.finish(true);
                });
            }
            assert!(line.took().is_none(), "one has not come");
            drop(never);
        });
        assert!(line.took().is_some());
    }
}
