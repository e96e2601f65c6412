//! What the two connections of a session share.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use super::SessionInfo;
use crate::{
    MigrateError,
    core::{Counts, ProtocolError, RefusalCode, RequestQueue, WireSpan},
    net::Wire,
    peer::lock,
};

#[derive(Default)]
struct Queue {
    requests: RequestQueue<Instant>,
    closed: bool,
}

/// A session: a demand connection, maybe a background connection, and the queue between them.
pub(super) struct Session {
    pub(super) info: SessionInfo,
    demand: Arc<Wire>,
    background: Mutex<Option<Arc<Wire>>>,
    paired: AtomicBool,
    stopping: AtomicBool,
    left: AtomicBool,
    filled: AtomicU64,
    poisoned: AtomicU64,
    queue: Mutex<Queue>,
    work: Condvar,
    room: Condvar,
}

impl Session {
    pub(super) fn new(info: SessionInfo, demand: Arc<Wire>) -> Self {
        Self {
            info,
            demand,
            background: Mutex::new(None),
            paired: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            left: AtomicBool::new(false),
            filled: AtomicU64::new(0),
            poisoned: AtomicU64::new(0),
            queue: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        }
    }

    /// Makes `wire` the background connection; false if there is one already.
    pub(super) fn pair(&self, wire: Arc<Wire>) -> bool {
        let mut background = lock(&self.background);
        if background.is_some() {
            return false;
        }
        *background = Some(wire);
        self.paired.store(true, Ordering::Release);
        true
    }

    pub(super) fn is_paired(&self) -> bool {
        self.paired.load(Ordering::Acquire)
    }

    /// Notes answers. Before they are sent: a client that has them all may complete at once.
    pub(super) fn count(&self, filled: u64, poisoned: u64) {
        self.filled.fetch_add(filled, Ordering::AcqRel);
        self.poisoned.fetch_add(poisoned, Ordering::AcqRel);
    }

    /// A granule noted as filled turned out poisoned.
    pub(super) fn recount_poisoned(&self) {
        self.filled.fetch_sub(1, Ordering::AcqRel);
        self.poisoned.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            filled: self.filled.load(Ordering::Acquire),
            poisoned: self.poisoned.load(Ordering::Acquire),
        }
    }

    /// Queues a background request, to be answered from `ready` on. Waits for room, so that a
    /// client that asks for ever more is read more slowly.
    pub(super) fn push(
        &self,
        span: WireSpan,
        ready: Instant,
        limit: usize,
    ) -> Result<(), MigrateError> {
        let mut queue = lock(&self.queue);
        while queue.requests.len() >= limit && !queue.closed {
            queue = wait(&self.room, queue);
        }
        if queue.closed {
            return Err(MigrateError::Stopped);
        }
        queue.requests.push(span, ready)?;
        drop(queue);
        self.work.notify_one();
        Ok(())
    }

    /// The next piece to answer in the background, when its time has come; `None` once the
    /// session is over.
    pub(super) fn pop(&self, limit: impl Fn(u16) -> u32) -> Option<WireSpan> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            let now = Instant::now();
            match queue.requests.front() {
                Some(ready) if ready <= now => break,
                Some(ready) => {
                    queue = match self.work.wait_timeout(queue, ready - now) {
                        Ok((queue, _)) => queue,
                        Err(poison) => poison.into_inner().0,
                    };
                }
                None => queue = wait(&self.work, queue),
            }
        }
        let popped = queue.requests.pop(limit);
        drop(queue);
        self.room.notify_one();
        popped.map(|(span, _)| span)
    }

    /// Takes what is still queued of `span`, to be answered on the demand connection.
    pub(super) fn take(&self, span: WireSpan, out: &mut Vec<(WireSpan, Instant)>) {
        lock(&self.queue).requests.take(span, out);
        self.room.notify_one();
    }

    /// The server stops: both sides of both connections see an end.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.demand.send_last(RefusalCode::Stopping, "the server stops");
        self.close();
    }

    /// The client has said goodbye.
    pub(super) fn left(&self) {
        self.left.store(true, Ordering::Release);
    }

    pub(super) fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Ends both connections. One without the other is of no use.
    pub(super) fn close(&self) {
        self.close_queue();
        self.demand.stream().shutdown();
        if let Some(background) = &*lock(&self.background) {
            background.stream().shutdown();
        }
    }

    /// Lets whoever works on the queue finish what it is sending, and no more.
    fn close_queue(&self) {
        lock(&self.queue).closed = true;
        self.work.notify_all();
        self.room.notify_all();
    }

    /// Tells the client why, on the connection where it went wrong, and ends both.
    pub(super) fn fail(&self, wire: &Wire, error: &MigrateError) {
        self.close_queue();
        match error {
            MigrateError::Protocol(ProtocolError::Refused(_)) => {}
            MigrateError::Protocol(error) => {
                wire.refuse(crate::core::ServerSession::code(error), &error.to_string());
            }
            MigrateError::TimedOut { .. } => wire.refuse(RefusalCode::Unpaired, &error.to_string()),
            MigrateError::Silent { .. } => wire.refuse(RefusalCode::Silent, &error.to_string()),
            _ => {}
        }
        self.close();
    }
}

fn wait<'a, T>(
    condvar: &Condvar,
    guard: std::sync::MutexGuard<'a, T>,
) -> std::sync::MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(|poison| poison.into_inner())
}
