//! The destination's end: a page source whose pages come from a peer.

mod link;
mod receiver;
mod routes;

use std::{
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use pageferry_paging::{Completion, PageSink, PageSource, SourceError, Span, Urgency};
use rustix::io::Errno;

pub(crate) use self::link::{Link, lock, new_session, open};
use self::{receiver::Receiver, routes::Routes};
use crate::{
    Endpoint, MigrateError,
    core::{
        Channel, ClientSession, Counts, Encoder, Geometry, HEADER_LEN, Outstanding, RegionInfo,
        Role, Terms, WireSpan,
    },
    net::FrameReader,
};

/// How patient a client is.
#[derive(Copy, Clone, Debug)]
#[non_exhaustive]
pub struct PeerOptions {
    /// For a connection and its handshake.
    pub connect_timeout: Duration,
    /// For a write that makes no progress: a fault waits no longer for a stuck peer.
    pub write_timeout: Duration,
    /// After this long without a byte, the peer is asked whether it is there.
    pub keepalive: Duration,
    /// After this long without a byte, the peer counts as gone.
    pub idle_timeout: Duration,
    /// For the agreement on the counts.
    pub complete_timeout: Duration,
    /// Largest payload of one frame accepted, in bytes.
    pub max_payload: u32,
}

impl Default for PeerOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            complete_timeout: Duration::from_secs(30),
            max_payload: crate::core::DEFAULT_MAX_PAYLOAD,
        }
    }
}

impl PeerOptions {
    /// The unit in which silence is measured.
    fn tick(&self) -> Duration {
        self.keepalive.min(self.idle_timeout)
    }
}

/// What exists once a sink is attached.
struct Attached {
    routes: Routes,
    owed: Outstanding,
    sink: Arc<dyn PageSink>,
}

struct Inner {
    demand: Link,
    background: Link,
    geometry: Geometry,
    options: PeerOptions,
    attached: OnceLock<Attached>,
    /// Granules answered by the peer.
    filled: AtomicU64,
    poisoned: AtomicU64,
    /// The first failure; later ones are its consequences.
    failure: Mutex<Option<Arc<MigrateError>>>,
    failed: AtomicBool,
    /// errno of a request that could not be sent: kept without allocation for the receiver to
    /// report.
    write_error: AtomicI32,
    closing: AtomicBool,
    /// The peer has agreed to the counts.
    completed: AtomicBool,
    /// For those who wait for the last answers or for the peer's counts.
    changed: Condvar,
    changing: Mutex<()>,
}

/// A peer as a page source: two connections, one for what is waited for and one for the rest.
///
/// After [`attach`](PageSource::attach) a thread per connection receives answers and hands them
/// to the sink; payloads go from the socket to where the sink wants them. Requests are written by
/// the thread that makes them, without allocation, so that a SIGBUS handler may make them. In
/// such a handler nothing can be said about a failed write either: `request` then answers
/// [`SourceError::Lost`] with an empty text, and the reason comes through
/// [`PageSink::lost`] from a receiving thread.
///
/// The sink's `lost` must not wait for [`detach`](PageSource::detach), which waits for the thread
/// that calls it.
pub struct PeerSource {
    inner: Arc<Inner>,
    readers: Mutex<Option<(FrameReader, FrameReader)>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for PeerSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerSource")
            .field("regions", &self.inner.geometry.regions())
            .field("failure", &*lock(&self.inner.failure))
            .finish_non_exhaustive()
    }
}

impl PeerSource {
    /// Opens both connections of a new session and learns the peer's regions.
    ///
    /// Keep-alive begins with [`attach`](PageSource::attach): attach soon.
    ///
    /// # Errors
    /// [`MigrateError::Connect`], or what went wrong in the handshake.
    pub fn connect(endpoint: &Endpoint, options: PeerOptions) -> Result<Self, MigrateError> {
        let terms = Terms { max_payload: options.max_payload, ..Terms::default() };
        let id = new_session()?;
        let session = ClientSession::demand(terms, Role::Destination, id);
        let (demand, demand_reader) = open(endpoint, session, &options)?;
        let geometry = lock(&demand.session).geometry().cloned().expect("the regions have come");
        let session = ClientSession::background(terms, id, geometry.clone());
        let (background, background_reader) = open(endpoint, session, &options)?;
        Ok(Self {
            inner: Arc::new(Inner {
                demand,
                background,
                geometry,
                options,
                attached: OnceLock::new(),
                filled: AtomicU64::new(0),
                poisoned: AtomicU64::new(0),
                failure: Mutex::new(None),
                failed: AtomicBool::new(false),
                write_error: AtomicI32::new(0),
                closing: AtomicBool::new(false),
                completed: AtomicBool::new(false),
                changed: Condvar::new(),
                changing: Mutex::new(()),
            }),
            readers: Mutex::new(Some((demand_reader, background_reader))),
            threads: Mutex::new(Vec::new()),
        })
    }

    /// What the peer holds.
    #[must_use]
    pub fn regions(&self) -> &[RegionInfo] {
        self.inner.geometry.regions()
    }

    /// Why the source was lost, if it was.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<MigrateError>> {
        lock(&self.inner.failure).clone()
    }

    /// How many granules the peer has answered.
    #[must_use]
    pub fn answered(&self) -> Counts {
        self.inner.answered()
    }

    /// Granules asked for and not yet answered.
    #[must_use]
    pub fn outstanding(&self) -> u64 {
        self.inner.attached.get().map_or(0, |attached| attached.owed.total())
    }

    fn agree(&self, counts: Completion) -> Result<(), MigrateError> {
        let inner = &*self.inner;
        let attached = inner.attached.get().ok_or(MigrateError::Misuse("not attached"))?;
        let after = inner.options.complete_timeout;
        let until = Instant::now() + after;
        // What the guest discarded while it was on its way is still owed, though nobody waits.
        inner
            .wait(until, || attached.owed.total() == 0)
            .ok_or(MigrateError::TimedOut { what: "waiting for the last answers", after })??;
        let ours = inner.answered();
        let installed =
            Counts { filled: counts.granules_from_source, poisoned: counts.granules_poisoned };
        // Fewer is no contradiction: answers for discarded granules are dropped, and a granule
        // that could not be installed counts as poisoned on this side only.
        if installed.filled > ours.filled
            || installed.filled.saturating_add(installed.poisoned) > ours.filled + ours.poisoned
        {
            return Err(MigrateError::MoreThanAnswered { installed, answered: ours });
        }
        lock(&inner.demand.session).complete(ours)?;
        inner.demand.send_counts(&Encoder::complete(ours)).map_err(|error| MigrateError::Io {
            what: "sending the counts",
            error: error.into(),
        })?;
        inner
            .wait(until, || inner.completed())
            .ok_or(MigrateError::TimedOut { what: "waiting for the peer's counts", after })?
    }
}

impl Inner {
    fn link(&self, channel: Channel) -> &Link {
        match channel {
            Channel::Demand => &self.demand,
            Channel::Background => &self.background,
            _ => unreachable!("a destination has no such channel"),
        }
    }

    fn answered(&self) -> Counts {
        Counts {
            filled: self.filled.load(Ordering::Acquire),
            poisoned: self.poisoned.load(Ordering::Acquire),
        }
    }

    fn completed(&self) -> bool {
        self.completed.load(Ordering::Acquire)
    }

    /// Waits until `done`, a failure (the inner error) or the time (`None`).
    fn wait(&self, until: Instant, done: impl Fn() -> bool) -> Option<Result<(), MigrateError>> {
        let mut guard = lock(&self.changing);
        loop {
            if done() {
                return Some(Ok(()));
            }
            if self.failed.load(Ordering::Acquire) {
                return Some(Err(self.failure_again()));
            }
            if self.closing.load(Ordering::Acquire) {
                return Some(Err(MigrateError::Stopped));
            }
            let left = until.checked_duration_since(Instant::now())?;
            guard = match self.changed.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poison) => poison.into_inner().0,
            };
        }
    }

    /// Wakes those in [`wait`](Self::wait).
    fn notify(&self) {
        drop(lock(&self.changing));
        self.changed.notify_all();
    }

    /// The recorded failure once more, for a second one who must hear of it.
    fn failure_again(&self) -> MigrateError {
        match lock(&self.failure).as_deref() {
            Some(MigrateError::Protocol(error)) => MigrateError::Protocol(error.clone()),
            Some(MigrateError::Silent { after }) => MigrateError::Silent { after: *after },
            Some(MigrateError::Left) => MigrateError::Left,
            _ => MigrateError::Closed,
        }
    }

    /// Ends the session for `why`. The first time, unless this side is leaving, the sink is told.
    fn fail(&self, why: MigrateError) {
        if self.closing.load(Ordering::Acquire) {
            return;
        }
        let why = match (self.write_error.load(Ordering::Acquire), why) {
            (0, why) | (_, why @ MigrateError::Protocol(_)) => why,
            (errno, _) => MigrateError::Io {
                what: "sending a request",
                error: std::io::Error::from_raw_os_error(errno),
            },
        };
        let source_error = why.to_source_error();
        {
            let mut failure = lock(&self.failure);
            if failure.is_some() {
                return;
            }
            *failure = Some(Arc::new(why));
            self.failed.store(true, Ordering::Release);
        }
        self.shutdown();
        self.notify();
        if let Some(attached) = self.attached.get() {
            attached.sink.lost(source_error);
        }
    }

    fn shutdown(&self) {
        self.demand.shutdown();
        self.background.shutdown();
    }

    /// Sends a header-only frame. Allocates nothing: see [`PeerSource`].
    fn send(&self, channel: Channel, frame: &[u8; HEADER_LEN]) -> Result<(), SourceError> {
        self.sent(|| self.link(channel).send(frame))
    }

    /// Calls `send`, and ends the session if it fails. Allocates nothing.
    fn sent(&self, send: impl FnOnce() -> Result<(), Errno>) -> Result<(), SourceError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(SourceError::Lost(String::new()));
        }
        send().map_err(|error| {
            // The receiving threads wake up, find this, and tell the sink.
            let _ = self.write_error.compare_exchange(
                0,
                error.raw_os_error(),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            self.shutdown();
            SourceError::Lost(String::new())
        })
    }

    /// Calls `each` with `span` in the wire's terms, in as many pieces as its counter needs.
    fn wire_spans(
        &self,
        span: Span,
        mut each: impl FnMut(&Attached, WireSpan) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let Some(attached) = self.attached.get() else {
            return Err(SourceError::Lost(String::new()));
        };
        let Some((region, mut first)) = attached.routes.to_wire(span) else {
            return Err(SourceError::Mismatch(String::new()));
        };
        let mut left = span.granules.count();
        while left > 0 {
            let count = u32::try_from(left).unwrap_or(u32::MAX);
            each(attached, WireSpan { region, first, count })?;
            first += u64::from(count);
            left -= u64::from(count);
        }
        Ok(())
    }
}

impl PageSource for PeerSource {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        let fail = |error: MigrateError| Err(error.to_source_error());
        let routes = match Routes::new(&self.inner.geometry, sink.layout()) {
            Ok(routes) => routes,
            Err(error) => return fail(error),
        };
        let owed = Outstanding::new(sink.layout().iter().map(|(_, region)| region.granules()));
        let Some((demand, background)) = lock(&self.readers).take() else {
            return fail(MigrateError::Misuse("a peer can be attached once"));
        };
        if self.inner.attached.set(Attached { routes, owed, sink }).is_err() {
            return fail(MigrateError::Misuse("a peer can be attached once"));
        }
        for (channel, name, reader) in [
            (Channel::Demand, "pf-demand", demand),
            (Channel::Background, "pf-background", background),
        ] {
            let receiver = Receiver::new(Arc::clone(&self.inner), channel, reader);
            match thread::Builder::new().name(name.into()).spawn(move || receiver.run()) {
                Ok(thread) => lock(&self.threads).push(thread),
                Err(error) => {
                    self.detach();
                    return Err(SourceError::Io { what: "starting a receiver".into(), error });
                }
            }
        }
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        urgency: Urgency,
        _sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let (channel, prefetch) = match urgency {
            Urgency::Demand => (Channel::Demand, false),
            Urgency::Prefetch => (Channel::Background, true),
        };
        let region = usize::from(span.region.get());
        let (first, count) = (span.granules.first().get(), span.granules.count());
        let mut owing = false;
        let sent = self.inner.wire_spans(span, |attached, wire| {
            if !owing {
                owing = true;
                attached.owed.owe(region, first, count);
            }
            self.inner.send(channel, &Encoder::request(wire, prefetch))
        });
        if sent.is_err()
            && owing
            && let Some(attached) = self.inner.attached.get()
        {
            attached.owed.forgive(region, first, count);
        }
        sent
    }

    fn expedite(&self, span: Span) -> Result<(), SourceError> {
        let inner = &*self.inner;
        inner.wire_spans(span, |_, wire| {
            inner.sent(|| inner.demand.send_before_counts(&Encoder::expedite(wire)))
        })
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn complete(&self, counts: Completion) -> Result<(), SourceError> {
        self.agree(counts).map_err(|error| error.to_source_error())
    }

    fn detach(&self) {
        if !self.inner.closing.swap(true, Ordering::AcqRel) {
            self.inner.demand.say_goodbye();
            self.inner.background.say_goodbye();
        }
        self.inner.shutdown();
        self.inner.notify();
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            // Called from the sink's `lost`, against its documentation: waiting for oneself
            // would hang.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!("a receiving thread of a peer panicked");
            }
        }
        drop(lock(&self.readers).take());
        self.inner.demand.close();
        self.inner.background.close();
    }
}

impl Drop for PeerSource {
    fn drop(&mut self) {
        self.detach();
    }
}
