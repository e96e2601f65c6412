//! Who comes, and where the connection belongs.

use std::{io, os::fd::OwnedFd, sync::Arc, thread::JoinHandle, time::Duration};

use super::{Note, Shared, link::Caller};
use crate::{
    Endpoint, MigrateError,
    core::{Channel, Frame, ProtocolError, RefusalCode, Role, Terms},
    net::{FrameReader, Listener, Stream, Timeouts, Wire},
    peer::lock,
};

/// A listener and its thread; both end when it is dropped.
pub(super) struct Listening {
    listener: Arc<Listener>,
    pub(super) at: Endpoint,
    thread: Option<JoinHandle<()>>,
}

impl Listening {
    /// Listens at `endpoint`.
    pub(super) fn begin(shared: &Arc<Shared>, endpoint: &Endpoint) -> Result<Self, MigrateError> {
        let bind = |error| MigrateError::Bind { endpoint: endpoint.clone(), error };
        let listener = Arc::new(Listener::bind(endpoint).map_err(bind)?);
        let at = listener.endpoint().map_err(bind)?;
        let (shared, ours) = (Arc::clone(shared), Arc::clone(&listener));
        let thread = std::thread::Builder::new()
            .name("pf-listen".into())
            .spawn(move || listen(&shared, &ours))
            .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
        Ok(Self { listener, at, thread: Some(thread) })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.listener.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a listening thread panicked");
        }
    }
}

/// Takes connections until the listener is stopped.
fn listen(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        match listener.accept(Duration::from_secs(3600)) {
            Ok(Some((socket, _))) => {
                if let Err(error) = accepted(shared, socket) {
                    tracing::warn!(%error, "a connection could not be taken");
                }
            }
            Ok(None) if listener.is_stopped() => return,
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                // Out of descriptors, say: there is nothing to do but to wait for better times.
                if listener.wait_stopped(Duration::from_millis(100)) {
                    return;
                }
            }
        }
    }
}

fn accepted(shared: &Arc<Shared>, socket: OwnedFd) -> io::Result<()> {
    let options = &shared.options;
    let timeouts = Timeouts { read: options.connect_timeout / 4, write: options.write_timeout };
    let stream = Stream::new(socket, timeouts)?;
    let shared = Arc::clone(shared);
    std::thread::Builder::new().name("pf-greet".into()).spawn(move || greet(&shared, stream))?;
    Ok(())
}

/// Hears who it is, and brings the connection where it belongs.
pub(super) fn greet(shared: &Arc<Shared>, stream: Stream) {
    let wire = Arc::new(Wire::new(Arc::new(stream)));
    match greeted(shared, &wire) {
        Ok(()) => {}
        Err(MigrateError::Protocol(error)) => {
            tracing::debug!(%error, "a connection is refused");
            wire.refuse(error.code(), &error.to_string());
        }
        Err(error) => {
            tracing::debug!(%error, "a connection is refused");
            wire.stream().shutdown();
        }
    }
}

fn greeted(shared: &Arc<Shared>, wire: &Arc<Wire>) -> Result<(), MigrateError> {
    let options = &shared.options;
    let tick = options.connect_timeout / 4;
    let stream = Arc::clone(wire.stream());
    let mut reader = FrameReader::new(stream, options.max_payload, tick);
    reader.set_tick(tick)?;
    reader.set_deadline(Some(options.connect_timeout));
    let frame = reader.next(&mut |_| Ok(()))?;
    let Frame::Hello(hello) = frame else {
        return Err(ProtocolError::BadHello("something else came first").into());
    };
    reader.set_deadline(None);
    reader.set_tick(shared.tick())?;
    let ours = *lock(&shared.id);
    let caller = Caller { wire: Arc::clone(wire), reader, hello };
    match hello.channel {
        Channel::Pages | Channel::Faults => {
            if ours != Some(hello.session) {
                wire.refuse(RefusalCode::UnknownSession, "no such session");
                return Ok(());
            }
            let link = lock(&shared.link).clone();
            match link {
                Some(link) => link.join(caller),
                None => {
                    wire.refuse(RefusalCode::UnknownSession, "the session is not connected");
                    Ok(())
                }
            }
        }
        _ => {
            let mut id = lock(&shared.id);
            if id.is_some_and(|id| id != hello.session) {
                drop(id);
                wire.refuse(RefusalCode::Busy, "another guest is coming here");
                return Ok(());
            }
            // Whether it is a source's hello at all, the session judges; a wrong one is refused
            // before it can keep others out.
            let terms = Terms { max_payload: options.max_payload, ..Terms::guest() };
            terms.answer_as(Role::GuestDestination, &hello)?;
            let again = id.replace(hello.session).is_some();
            drop(id);
            if again && let Some(link) = lock(&shared.link).clone() {
                // The source knows of a loss that was not noticed here.
                link.fail(MigrateError::Closed);
            }
            shared.tell(Note::Caller(Box::new(caller)));
            Ok(())
        }
    }
}
