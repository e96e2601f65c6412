//! The thread that traces a process.
//!
//! ptrace(2) answers to one thread only, the one that attached; and a thread that was attached to
//! but does not stop can be let go only by the end of that thread. So each stop has a thread of its
//! own, which ends with it: whatever happens, the kernel then lets go all that it still traces.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::Pid;

use super::Session;
use crate::{Process, ProcessError, sys::ptrace};

type Work = Box<dyn FnOnce(&mut Session) + Send>;

/// The threads that are traced, for others to see.
#[derive(Clone, Debug, Default)]
pub(super) struct Seized(Arc<Mutex<Vec<Pid>>>);

impl Seized {
    fn list(&self) -> MutexGuard<'_, Vec<Pid>> {
        // A list of numbers is as good as it was.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, thread: Pid) {
        self.list().push(thread);
    }

    /// Takes the news of threads that have ended, but not of their process.
    ///
    /// A thread that starts another program waits until the ends of all the others are taken note
    /// of; and the tracer, when it attaches to one of them, waits for that thread.
    fn reap(&self, process: Pid) {
        self.list().retain(|&thread| {
            thread == process || !matches!(ptrace::reap(thread), Ok(ptrace::Change::Gone))
        });
    }
}

/// A process that is stopped by ptrace.
#[derive(Debug)]
pub(super) struct Tracer {
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<Instant>>,
}

impl Tracer {
    /// Stops a process; answers with when its first thread may have stopped, too.
    pub(super) fn stop(
        process: &Process,
        patience: Duration,
    ) -> Result<(Self, Instant), ProcessError> {
        let (say, said) = mpsc::channel();
        let (work, works) = mpsc::channel::<Work>();
        let seized = Seized::default();
        let thread = {
            let (process, seized) = (process.clone(), seized.clone());
            thread::Builder::new()
                .name("pageferry-tracer".into())
                .spawn(move || trace(&process, patience, seized, &say, &works))
        };
        let thread = thread.map_err(|error| ProcessError::Kernel {
            pid: process.pid(),
            doing: "start a thread to trace it by",
            errno: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::AGAIN),
        })?;
        let tracer = Self { work: Some(work), thread: Some(thread) };
        let since = loop {
            // Longer than it takes when nothing is in the way.
            match said.recv_timeout(Duration::from_millis(20)) {
                Ok(result) => break result?,
                Err(RecvTimeoutError::Timeout) => seized.reap(process.pid()),
                Err(RecvTimeoutError::Disconnected) => tracer.panicked(),
            }
        };
        Ok((tracer, since))
    }

    /// Does something by the thread that traces.
    pub(super) fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Session) -> R + Send + 'static,
    ) -> R {
        let (say, said) = mpsc::channel();
        let work: Work = Box::new(move |session| {
            // Who asked waits for it.
            let _ = say.send(work(session));
        });
        let sent = self.work.as_ref().is_some_and(|works| works.send(work).is_ok());
        match said.recv() {
            Ok(answer) if sent => answer,
            _ => self.panicked(),
        }
    }

    /// Ends the thread; answers with when it had let all go.
    fn end(&mut self) -> Option<Instant> {
        self.work = None;
        self.thread.take()?.join().ok()
    }

    fn panicked(&self) -> ! {
        panic!("the thread that traces a process has panicked")
    }

    /// Lets the process go on, and waits until it may; answers with since when it may.
    pub(super) fn release(mut self) -> Instant {
        self.end().unwrap_or_else(|| self.panicked())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // One that has panicked has ended, which is what matters here.
        let _ = self.end();
    }
}

/// The life of the thread that traces; answers with when it had let all go.
fn trace(
    process: &Process,
    patience: Duration,
    seized: Seized,
    say: &Sender<Result<Instant, ProcessError>>,
    works: &Receiver<Work>,
) -> Instant {
    let mut session = Session::new(process, seized);
    let result = session.stop(patience);
    let stopped = result.is_ok();
    // Who asked waits for it, or has panicked.
    if say.send(result).is_ok() && stopped {
        for work in works {
            work(&mut session);
        }
    }
    session.detach()
}
