//! Takes images from one sender after the other.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::{event::PollFlags, fd::AsFd};

use super::{
    ImageSink, ImageStreamError, ReceiveEvent, ReceivedImages,
    queue::Queue,
    session::{Receiving, Session, refusal},
    store::{Observe, Storing},
};
use crate::{
    Endpoint, MigrateError, Stop,
    core::{
        DEFAULT_MAX_PAYLOAD, Encoder, Frame, ImageLimits, ImageReceiverSession, RefusalCode, Terms,
    },
    net::{FrameReader, Listener, Stream, Timeouts, Wire, Woken},
    peer::lock,
};

/// Small payloads are read this many bytes at a time.
const READ_AHEAD: usize = 256 << 10;

/// How a receiver behaves.
#[derive(Copy, Clone, Debug)]
#[non_exhaustive]
pub struct ReceiverOptions {
    /// How much is taken.
    pub limits: ImageLimits,
    /// Largest payload of one frame, in bytes; a sender may ask for less.
    pub max_payload: u32,
    /// For the handshake.
    pub handshake_timeout: Duration,
    /// Another sender waits this long for the present one to go, and is turned away then.
    pub busy_timeout: Duration,
    /// A sender that is not being read from, because the sink takes its time, is told this often
    /// that somebody is here.
    pub keepalive: Duration,
    /// A sender that sends nothing, not even a ping, for this long is dropped.
    pub idle_timeout: Duration,
    /// A sender that takes no byte for this long is dropped.
    pub write_timeout: Duration,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            limits: ImageLimits::default(),
            max_payload: DEFAULT_MAX_PAYLOAD,
            handshake_timeout: Duration::from_secs(10),
            busy_timeout: Duration::from_secs(2),
            keepalive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
        }
    }
}

impl ReceiverOptions {
    /// How often the receiving thread looks up from a silent socket.
    fn tick(&self) -> Duration {
        let shortest = self.handshake_timeout.min(self.idle_timeout);
        (shortest / 4).clamp(Duration::from_millis(1), Duration::from_secs(1))
    }
}

type Connection = (Arc<Stream>, String);

/// A listening receiver of images. It stops listening when it is dropped.
#[derive(Debug)]
pub struct ImageReceiver {
    listener: Listener,
    endpoint: Endpoint,
    options: ReceiverOptions,
    /// Accepted, and not yet served.
    waiting: Mutex<VecDeque<Connection>>,
}

impl ImageReceiver {
    /// Listens at `endpoint`. Senders that connect wait until somebody serves.
    ///
    /// # Errors
    /// [`MigrateError::Bind`].
    pub fn listen(endpoint: &Endpoint, options: ReceiverOptions) -> Result<Self, MigrateError> {
        let bind = |error| MigrateError::Bind { endpoint: endpoint.clone(), error };
        let listener = Listener::bind(endpoint).map_err(bind)?;
        let local = listener.endpoint().map_err(bind)?;
        Ok(Self { listener, endpoint: local, options, waiting: Mutex::default() })
    }

    /// Where it listens, with the port that the kernel chose.
    #[must_use]
    pub fn local_endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Serves one sender after the other until `stop` is called for; `observe` is told how each
    /// of them ended. A sender that comes while another is served waits a little, and is turned
    /// away then.
    ///
    /// # Errors
    /// [`MigrateError::Io`] if there is no thread or no descriptor to serve with.
    pub fn serve(
        &self,
        sink: &mut dyn ImageSink,
        observe: &mut dyn FnMut(ReceiveEvent<'_>),
        stop: &Stop,
    ) -> Result<(), MigrateError> {
        self.take_senders(sink, observe, stop, &mut |_| Next::Another)
    }

    /// As [`serve`](Self::serve), but only the first sender that shakes hands.
    ///
    /// # Errors
    /// How that sender was lost, or [`MigrateError::Stopped`] if none came before `stop` was
    /// called for.
    pub fn serve_one(
        &self,
        sink: &mut dyn ImageSink,
        observe: &mut dyn FnMut(ReceiveEvent<'_>),
        stop: &Stop,
    ) -> Result<ReceivedImages, ImageStreamError> {
        let mut first = None;
        let served = self.take_senders(sink, observe, stop, &mut |outcome| {
            first = Some(outcome);
            Next::Enough
        });
        let nobody = |error| {
            let error = Arc::new(error);
            Err(ImageStreamError { image: None, in_doubt: false, last_stored: None, error })
        };
        match (first, served) {
            (Some(outcome), _) => outcome,
            (None, Ok(())) => nobody(MigrateError::Stopped),
            (None, Err(error)) => nobody(error),
        }
    }

    fn take_senders(
        &self,
        sink: &mut dyn ImageSink,
        observe: &mut dyn FnMut(ReceiveEvent<'_>),
        stop: &Stop,
        ended: &mut dyn FnMut(Result<ReceivedImages, ImageStreamError>) -> Next,
    ) -> Result<(), MigrateError> {
        let door = Door::new()?;
        thread::scope(|scope| {
            let accepting = thread::Builder::new()
                .name("pf-accept".into())
                .spawn_scoped(scope, || self.accept(&door, stop))
                .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
            // A sink that panics ends the accepting thread, too.
            let closing = Closing(&door);
            while let Some((stream, peer)) = door.next() {
                let outcome = self.serve_sender(stream, &peer, sink, observe, stop);
                if let Some(outcome) = outcome {
                    observe(ReceiveEvent::Ended { outcome: &outcome });
                    if let Next::Enough = ended(outcome) {
                        break;
                    }
                }
                door.leave();
            }
            drop(closing);
            accepting.join().unwrap_or(Err(MigrateError::Misuse("the accepting thread panicked")))
        })
    }

    /// The accepting thread: sees to it that one sender is served at a time.
    fn accept(&self, door: &Door, stop: &Stop) -> Result<(), MigrateError> {
        let _closing = Closing(door);
        loop {
            let next = lock(&self.waiting).pop_front();
            let (stream, peer) = match next {
                Some(connection) => connection,
                None => {
                    let fds = [self.listener.as_fd(), door.closing.as_fd()];
                    let woken = stop
                        .wait(&fds, PollFlags::IN, Duration::from_secs(60))
                        .map_err(|error| MigrateError::Io { what: "awaiting senders", error })?;
                    match woken {
                        Woken::Stopped => return Ok(()),
                        _ if door.is_closed() => return Ok(()),
                        Woken::TimedOut => continue,
                        Woken::Ready => {}
                    }
                    match self.connection() {
                        Some(connection) => connection,
                        None => continue,
                    }
                }
            };
            match door.enter((stream, peer), self.options.busy_timeout, stop) {
                Entry::Entered => {}
                Entry::Closed(connection) => {
                    // Served next time.
                    lock(&self.waiting).push_front(connection);
                    return Ok(());
                }
                Entry::Busy((stream, peer)) => {
                    tracing::debug!(peer, "turned away: another sender is being served");
                    Wire::new(stream).refuse(RefusalCode::Busy, "another sender is being served");
                }
            }
        }
    }

    /// A connection that has been made, if it is still there.
    fn connection(&self) -> Option<Connection> {
        let timeouts = Timeouts { read: self.options.tick(), write: self.options.write_timeout };
        let accepted = self.listener.accept(Duration::ZERO).and_then(|accepted| {
            accepted.map(|(socket, peer)| Ok((Stream::new(socket, timeouts)?, peer))).transpose()
        });
        match accepted {
            Ok(accepted) => accepted.map(|(stream, peer)| (Arc::new(stream), peer)),
            Err(error) => {
                // Too many open files, say: not to be retried at once.
                tracing::warn!(%error, "accepting a connection failed");
                thread::sleep(Duration::from_millis(50));
                None
            }
        }
    }

    /// Serves one sender; `None` if it did not shake hands properly.
    fn serve_sender(
        &self,
        stream: Arc<Stream>,
        peer: &str,
        sink: &mut dyn ImageSink,
        observe: &mut Observe<'_>,
        stop: &Stop,
    ) -> Option<Result<ReceivedImages, ImageStreamError>> {
        let terms = Terms { max_payload: self.options.max_payload, ..Terms::default() };
        let mut machine = ImageReceiverSession::new(terms, self.options.limits);
        let wire = Wire::new(Arc::clone(&stream));
        let mut reader = FrameReader::new(stream, terms.max_payload, self.options.tick())
            .with_read_ahead(READ_AHEAD);
        reader.set_stop(stop.clone());
        if let Err(error) = self.greet(&mut machine, &wire, &mut reader) {
            match refusal(&error) {
                Some(code) => wire.refuse(code, &error.to_string()),
                None => wire.stream().shutdown(),
            }
            observe(ReceiveEvent::TurnedAway { peer, why: &error });
            return None;
        }
        observe(ReceiveEvent::Connected { peer });
        let session = Session {
            wire,
            machine: Mutex::new(machine),
            queue: Queue::default(),
            options: &self.options,
            stop,
        };
        Some(thread::scope(|scope| {
            let receiving = Receiving::new(&session, reader);
            let started = thread::Builder::new()
                .name("pf-receive".into())
                .spawn_scoped(scope, move || receiving.run());
            if let Err(error) = started {
                session.queue.finish(Err(MigrateError::Io { what: "starting a thread", error }));
                session.wire.stream().shutdown();
            }
            Storing::new(&session, observe).run(sink)
        }))
    }

    fn greet(
        &self,
        machine: &mut ImageReceiverSession,
        wire: &Wire,
        reader: &mut FrameReader,
    ) -> Result<(), MigrateError> {
        reader.set_deadline(Some(self.options.handshake_timeout));
        let frame = reader.next(&mut |_| Ok(()))?;
        machine.receive(&frame)?;
        reader.set_deadline(None);
        let agreed = *machine.agreed().expect("only a hello is legal here");
        reader.set_max_payload(agreed.max_payload);
        let mut bytes = Vec::new();
        Encoder::encode(&Frame::Hello(agreed), &mut bytes);
        wire.send_frame(&bytes)
    }
}

/// Whether to serve more senders.
enum Next {
    Another,
    Enough,
}

/// What became of a connection at the door.
enum Entry {
    Entered,
    Busy(Connection),
    Closed(Connection),
}

#[derive(Default)]
struct Inside {
    arrived: Option<Connection>,
    busy: bool,
    closed: bool,
}

/// Lets one sender in at a time.
struct Door {
    inside: Mutex<Inside>,
    changed: Condvar,
    /// Called for when the door is closed, for whoever waits in the kernel.
    closing: Stop,
}

/// Closes the door when it goes out of scope.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        lock(&self.0.inside).closed = true;
        self.0.closing.stop();
        self.0.changed.notify_all();
    }
}

impl Door {
    fn new() -> Result<Self, MigrateError> {
        let closing =
            Stop::new().map_err(|error| MigrateError::Io { what: "making an eventfd", error })?;
        Ok(Self { inside: Mutex::default(), changed: Condvar::new(), closing })
    }

    fn is_closed(&self) -> bool {
        lock(&self.inside).closed
    }

    /// The next sender, to be served until [`leave`](Self::leave); `None` once the door is
    /// closed.
    fn next(&self) -> Option<Connection> {
        let mut inside = lock(&self.inside);
        loop {
            if inside.closed {
                return None;
            }
            if let Some(connection) = inside.arrived.take() {
                inside.busy = true;
                return Some(connection);
            }
            inside = self.changed.wait(inside).unwrap_or_else(|poison| poison.into_inner());
        }
    }

    /// The sender being served has gone.
    fn leave(&self) {
        lock(&self.inside).busy = false;
        self.changed.notify_all();
    }

    /// Brings a connection in once nobody else is there, waiting for that as long as `limit`.
    fn enter(&self, connection: Connection, limit: Duration, stop: &Stop) -> Entry {
        /// How often to look whether to stop.
        const SLICE: Duration = Duration::from_millis(50);
        let until = Instant::now() + limit;
        let mut inside = lock(&self.inside);
        loop {
            if inside.closed || stop.is_stopped() {
                return Entry::Closed(connection);
            }
            if !inside.busy && inside.arrived.is_none() {
                inside.arrived = Some(connection);
                self.changed.notify_all();
                return Entry::Entered;
            }
            if Instant::now() >= until {
                return Entry::Busy(connection);
            }
            inside = match self.changed.wait_timeout(inside, SLICE) {
                Ok((inside, _)) => inside,
                Err(poison) => poison.into_inner().0,
            };
        }
    }
}
