//! The source's end: serves a store to any number of clients.

mod answer;
mod background;
mod connection;
mod demand;
mod session;
mod stats;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

pub use self::stats::ServerStats;
use self::{connection::Connection, session::Session, stats::Counters};
use crate::{
    Endpoint, MigrateError, PageStore,
    core::{Counts, DEFAULT_MAX_PAYLOAD, Geometry, RefusalCode, Role, SessionId},
    net::{Listener, Stream, Timeouts, Wire},
    peer::lock,
};

/// A session, as an observer sees it.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Its id.
    pub id: SessionId,
    /// What the client is.
    pub role: Role,
    /// Where it comes from.
    pub peer: String,
}

/// How a session ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum SessionOutcome {
    /// Both sides agreed on these counts.
    Completed(Counts),
    /// The client said goodbye without completing, as a reader does.
    Left,
    /// It was lost, or broke the protocol.
    Failed(MigrateError),
}

/// Is told of sessions as they come and go, on the thread that serves them: be quick.
pub trait ServerObserver: Send + Sync {
    /// A session has begun.
    fn opened(&self, _session: &SessionInfo) {}
    /// Both sides of a session agreed on the counts; it has not ended yet.
    fn completed(&self, _session: &SessionInfo, _counts: Counts) {}
    /// A session has ended.
    fn closed(&self, _session: &SessionInfo, _outcome: &SessionOutcome) {}
}

/// How a server behaves.
#[derive(Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Largest payload of one frame, in bytes; a client may ask for less.
    pub max_payload: u32,
    /// Sessions at one time.
    pub max_sessions: usize,
    /// Connections at one time, those still in their handshake included.
    pub max_connections: usize,
    /// Requests that one session may have queued. Beyond that its background channel is not read
    /// until there is room.
    pub max_queued: usize,
    /// For the handshake.
    pub handshake_timeout: Duration,
    /// For a destination's background channel to come after its demand channel.
    pub pair_timeout: Duration,
    /// A client that sends nothing, not even a ping, for this long is dropped.
    pub idle_timeout: Duration,
    /// A client that takes no byte for this long is dropped.
    pub write_timeout: Duration,
    /// Every answer leaves this long after its request came, to play a slow source. Answers do
    /// not wait for one another.
    pub delay: Duration,
    /// Is told of sessions.
    pub observer: Option<Arc<dyn ServerObserver>>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_payload: DEFAULT_MAX_PAYLOAD,
            max_sessions: 64,
            max_connections: 192,
            max_queued: 1 << 16,
            handshake_timeout: Duration::from_secs(10),
            pair_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
            delay: Duration::ZERO,
            observer: None,
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("max_payload", &self.max_payload)
            .field("max_sessions", &self.max_sessions)
            .field("max_connections", &self.max_connections)
            .field("max_queued", &self.max_queued)
            .field("delay", &self.delay)
            .field("observer", &self.observer.is_some())
            .finish_non_exhaustive()
    }
}

impl ServerOptions {
    /// How often a connection's thread looks up from a silent socket.
    fn tick(&self) -> Duration {
        let shortest = self.handshake_timeout.min(self.pair_timeout).min(self.idle_timeout);
        (shortest / 4).clamp(Duration::from_millis(1), Duration::from_secs(1))
    }

    fn timeouts(&self) -> Timeouts {
        Timeouts { read: self.tick(), write: self.write_timeout }
    }
}

/// What all threads of a server share.
struct Shared {
    store: Arc<dyn PageStore>,
    geometry: Geometry,
    options: ServerOptions,
    counters: Counters,
    sessions: Mutex<HashMap<SessionId, Arc<Session>>>,
    stopping: AtomicBool,
}

/// A listening server. Dropping it stops it.
pub struct PageServer {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    listener: Mutex<Option<Arc<Listener>>>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for PageServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageServer")
            .field("endpoint", &self.endpoint)
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

impl PageServer {
    /// Listens at `endpoint` and serves `store`, each connection on a thread of its own.
    ///
    /// # Errors
    /// [`MigrateError::Bind`]; [`MigrateError::Protocol`] if the store's regions cannot be.
    pub fn bind(
        endpoint: &Endpoint,
        store: Arc<dyn PageStore>,
        options: ServerOptions,
    ) -> Result<Self, MigrateError> {
        let geometry = Geometry::new(store.regions().to_vec())?;
        let bind = |error| MigrateError::Bind { endpoint: endpoint.clone(), error };
        let listener = Arc::new(Listener::bind(endpoint).map_err(bind)?);
        let local = listener.endpoint().map_err(bind)?;
        let shared = Arc::new(Shared {
            store,
            geometry,
            options,
            counters: Counters::default(),
            sessions: Mutex::new(HashMap::new()),
            stopping: AtomicBool::new(false),
        });
        let acceptor = {
            let (shared, listener) = (Arc::clone(&shared), Arc::clone(&listener));
            thread::Builder::new()
                .name("pf-accept".into())
                .spawn(move || accept(&shared, &listener))
                .map_err(|error| MigrateError::Io { what: "starting a thread", error })?
        };
        Ok(Self {
            shared,
            endpoint: local,
            listener: Mutex::new(Some(listener)),
            acceptor: Mutex::new(Some(acceptor)),
        })
    }

    /// Where it listens, with the port that the kernel chose.
    #[must_use]
    pub fn local_endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ServerStats {
        self.shared.counters.snapshot(lock(&self.shared.sessions).len() as u64)
    }

    /// Ends all sessions, joins every thread and removes the Unix socket. Safe to call again.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(listener) = lock(&self.listener).take() {
            listener.stop();
        }
        if let Some(acceptor) = lock(&self.acceptor).take()
            && acceptor.join().is_err()
        {
            tracing::error!("the accepting thread of a page server panicked");
        }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The accepting thread: it owns the connections' threads.
fn accept(shared: &Arc<Shared>, listener: &Listener) {
    let mut connections: Vec<(JoinHandle<()>, Arc<Stream>)> = Vec::new();
    let reap = |connections: &mut Vec<(JoinHandle<()>, Arc<Stream>)>, all: bool| {
        let mut n = 0;
        while n < connections.len() {
            if all || connections[n].0.is_finished() {
                let (thread, _stream) = connections.swap_remove(n);
                if thread.join().is_err() {
                    tracing::error!("a connection's thread of a page server panicked");
                }
            } else {
                n += 1;
            }
        }
    };
    while !shared.stopping.load(Ordering::Acquire) {
        let accepted = listener.accept(Duration::from_secs(1));
        reap(&mut connections, false);
        let (socket, peer) = match accepted {
            Ok(Some(connection)) => connection,
            Ok(None) => continue,
            Err(error) => {
                // Too many open files, say: others leave in time. Not to be retried at once.
                tracing::warn!(%error, "accepting a connection failed");
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let stream = match Stream::new(socket, shared.options.timeouts()) {
            Ok(stream) => Arc::new(stream),
            Err(error) => {
                tracing::warn!(peer, %error, "a connection cannot be set up");
                continue;
            }
        };
        if connections.len() >= shared.options.max_connections {
            shared.counters.refused();
            Wire::new(stream).refuse(RefusalCode::Busy, "too many connections");
            continue;
        }
        let connection = Connection::new(Arc::clone(shared), Arc::clone(&stream), peer);
        match thread::Builder::new().name("pf-serve".into()).spawn(move || connection.run()) {
            Ok(thread) => connections.push((thread, stream)),
            Err(error) => tracing::warn!(%error, "no thread for a connection"),
        }
    }
    for session in lock(&shared.sessions).values() {
        session.stop();
    }
    for (_, stream) in &connections {
        stream.shutdown();
    }
    reap(&mut connections, true);
}
