//! One connection of a client: its socket, its state, and the handshake.

use std::sync::{
    Arc, Mutex, MutexGuard, TryLockError,
    atomic::{AtomicBool, Ordering},
};

use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};

use super::PeerOptions;
use crate::{
    Endpoint, MigrateError,
    core::{ClientSession, Encoder, Frame, Phase, SessionId},
    net::{FrameReader, Stream, Timeouts},
};

/// Locks `mutex` even if a thread panicked while it held it: none of the data behind this
/// crate's locks is left half-changed by a panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// One connection.
pub(crate) struct Link {
    /// Held while a frame is written, so that frames do not mix. Whoever holds it touches no
    /// guest memory.
    writer: Mutex<Option<Arc<Stream>>>,
    /// The counts were sent. Changed with `writer` held.
    counted: AtomicBool,
    /// The same socket for whoever must not wait for a writer.
    control: Mutex<Option<Arc<Stream>>>,
    pub(crate) session: Mutex<ClientSession>,
}

impl Link {
    /// Sends a whole frame. Allocates nothing.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<(), Errno> {
        match &*lock(&self.writer) {
            Some(stream) => stream.send(frame),
            None => Err(Errno::NOTCONN),
        }
    }

    /// Sends the counts: nothing is asked for afterwards.
    pub(crate) fn send_counts(&self, frame: &[u8]) -> Result<(), Errno> {
        let writer = lock(&self.writer);
        self.counted.store(true, Ordering::Relaxed);
        writer.as_ref().map_or(Err(Errno::NOTCONN), |stream| stream.send(frame))
    }

    /// Sends a frame that means nothing once all pages have come, unless they have: whoever wants
    /// a page hurried may be overtaken by that page, and by the counts. Allocates nothing.
    pub(crate) fn send_before_counts(&self, frame: &[u8]) -> Result<(), Errno> {
        let writer = lock(&self.writer);
        if self.counted.load(Ordering::Relaxed) {
            return Ok(());
        }
        writer.as_ref().map_or(Err(Errno::NOTCONN), |stream| stream.send(frame))
    }

    /// Ends both directions of the connection, whatever is being done on it.
    pub(crate) fn shutdown(&self) {
        if let Some(stream) = &*lock(&self.control) {
            stream.shutdown();
        }
    }

    /// Says goodbye if that can be done at once.
    pub(crate) fn say_goodbye(&self) {
        self.send_last(&Encoder::bye());
    }

    /// Sends a last frame if that can be done at once: the peer will notice the end anyway.
    pub(crate) fn send_last(&self, frame: &[u8]) {
        let writer = match self.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(poison)) => poison.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if let Some(stream) = &*writer {
            let _ = stream.send_last(frame);
        }
    }

    /// Lets go of the socket.
    pub(crate) fn close(&self) {
        lock(&self.writer).take();
        lock(&self.control).take();
    }
}

/// A session id that nobody guesses.
pub(crate) fn new_session() -> Result<SessionId, MigrateError> {
    let mut id = [0; 16];
    // Up to 256 bytes come whole or not at all: getrandom(2).
    getrandom(&mut id[..], GetRandomFlags::empty())
        .map_err(|error| MigrateError::Io { what: "choosing a session id", error: error.into() })?;
    Ok(SessionId(id))
}

/// Connects and shakes hands: afterwards `session` is active.
pub(crate) fn open(
    endpoint: &Endpoint,
    mut session: ClientSession,
    options: &PeerOptions,
) -> Result<(Link, FrameReader), MigrateError> {
    // Silence is looked at often enough for the handshake's limit to hold.
    let handshake_tick = options.tick().min(options.connect_timeout / 4);
    let timeouts = Timeouts { read: handshake_tick, write: options.write_timeout };
    let stream = Stream::connect(endpoint, options.connect_timeout, timeouts, None)
        .map_err(|error| MigrateError::Connect { endpoint: endpoint.clone(), error })?;
    let stream = Arc::new(stream);
    let mut hello = Vec::new();
    Encoder::encode(&Frame::Hello(session.offer()), &mut hello);
    stream
        .send(&hello)
        .map_err(|error| MigrateError::Io { what: "sending the hello", error: error.into() })?;
    let mut reader = FrameReader::new(Arc::clone(&stream), options.max_payload, handshake_tick);
    reader.set_deadline(Some(options.connect_timeout));
    while session.phase() != Phase::Active {
        let frame = reader.next(&mut |_| Ok(()))?;
        session.receive(&frame)?;
    }
    if let Some(agreed) = session.agreed() {
        reader.set_max_payload(agreed.max_payload);
    }
    reader.set_deadline(None);
    reader.set_tick(options.tick())?;
    let link = Link {
        writer: Mutex::new(Some(Arc::clone(&stream))),
        counted: AtomicBool::new(false),
        control: Mutex::new(Some(stream)),
        session: Mutex::new(session),
    };
    Ok((link, reader))
}
