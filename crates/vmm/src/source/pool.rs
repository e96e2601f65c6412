//! Threads that answer requests, each request when its time has come.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use pageferry_paging::Span;

#[derive(Default)]
struct Queue {
    /// In the order of their times: every request of a source has the same delay.
    spans: VecDeque<(Instant, Span)>,
    stopping: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads. Dropping it ends them; what was not answered is not.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn start(
        threads: usize,
        answer: impl Fn(Span) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (shared, answer) = (Arc::new(Shared::default()), Arc::new(answer));
        let mut pool = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for number in 0..threads {
            let (shared, answer) = (Arc::clone(&shared), Arc::clone(&answer));
            let thread = thread::Builder::new().name(format!("source {number}"));
            pool.threads.push(thread.spawn(move || {
                while let Some((at, span)) = next(&shared) {
                    wait_until(at);
                    answer(span);
                }
            })?);
        }
        Ok(pool)
    }

    pub(super) fn push(&self, span: Span, delay: Duration) {
        self.shared.lock().spans.push_back((Instant::now() + delay, span));
        self.shared.changed.notify_one();
    }
}

fn next(shared: &Shared) -> Option<(Instant, Span)> {
    let mut queue = shared.lock();
    loop {
        if queue.stopping {
            return None;
        }
        if let Some(next) = queue.spans.pop_front() {
            return Some(next);
        }
        queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Sleeps, as one who waits for a network does, and so leaves the processor to the vCPUs. How much
/// longer it takes than it should is the timer slack of whoever made the thread (prctl(2)).
fn wait_until(at: Instant) {
    loop {
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of a page source panicked");
            }
        }
    }
}
