//! One connection: its handshake, and which kind of connection it becomes.

use std::sync::{Arc, atomic::Ordering};

use super::{Session, SessionInfo, SessionOutcome, Shared, stats::add};
use crate::{
    MigrateError,
    core::{Channel, Counts, Encoder, Frame, Hello, RefusalCode, Role, ServerSession, Terms},
    net::{FrameReader, Stream, Wire},
    peer::lock,
};

pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    peer: String,
    pub(super) wire: Arc<Wire>,
    pub(super) reader: FrameReader,
    pub(super) machine: ServerSession,
}

/// How a connection ended well.
pub(super) enum End {
    Left,
    Completed(Counts),
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, stream: Arc<Stream>, peer: String) -> Self {
        let terms = Terms { max_payload: shared.options.max_payload, ..Terms::default() };
        let machine = ServerSession::new(terms, shared.geometry.clone());
        let reader =
            FrameReader::new(Arc::clone(&stream), terms.max_payload, shared.options.tick());
        Self { shared, peer, wire: Arc::new(Wire::new(stream)), reader, machine }
    }

    pub(super) fn run(mut self) {
        match self.greet() {
            Ok(hello) => match hello.channel {
                Channel::Demand => self.run_demand(hello),
                Channel::Background => self.run_background(hello),
                _ => unreachable!("a source agrees to no such channel"),
            },
            Err(error) => {
                tracing::debug!(peer = self.peer, %error, "handshake failed");
                add(&self.shared.counters.failed, 1);
                match &error {
                    MigrateError::Protocol(error) => {
                        self.wire.refuse(ServerSession::code(error), &error.to_string());
                    }
                    MigrateError::TimedOut { .. } => {
                        self.wire.refuse(RefusalCode::Silent, &error.to_string());
                    }
                    _ => self.wire.stream().shutdown(),
                }
            }
        }
    }

    /// Awaits the client's hello. Returns what was agreed.
    fn greet(&mut self) -> Result<Hello, MigrateError> {
        self.reader.set_deadline(Some(self.shared.options.handshake_timeout));
        let shared = &self.shared;
        let frame = self.reader.next(&mut |_| {
            if shared.stopping.load(Ordering::Acquire) {
                Err(MigrateError::Stopped)
            } else {
                Ok(())
            }
        })?;
        self.machine.receive(&frame)?;
        self.reader.set_deadline(None);
        let agreed = *self.machine.agreed().expect("only a hello is legal here");
        Ok(agreed)
    }

    /// Answers the hello, on the demand channel with the regions.
    fn welcome(&self, agreed: Hello) -> Result<(), MigrateError> {
        let mut bytes = Vec::new();
        Encoder::encode(&Frame::Hello(agreed), &mut bytes);
        if agreed.channel == Channel::Demand {
            let regions = self.shared.geometry.regions().to_vec();
            Encoder::encode(&Frame::Regions(regions), &mut bytes);
        }
        self.wire.send_frame(&bytes)
    }

    fn refuse(&self, code: RefusalCode, text: &str) {
        self.shared.counters.refused();
        self.wire.refuse(code, text);
    }

    /// A demand connection opens a session and lives as long as it.
    fn run_demand(mut self, agreed: Hello) {
        let info = SessionInfo {
            id: agreed.session,
            role: self.machine.peer_role(),
            peer: self.peer.clone(),
        };
        let session = Arc::new(Session::new(info.clone(), Arc::clone(&self.wire)));
        {
            let mut sessions = lock(&self.shared.sessions);
            let refusal = if sessions.contains_key(&info.id) {
                Some((RefusalCode::DuplicateChannel, "the session has a demand channel"))
            } else if sessions.len() >= self.shared.options.max_sessions {
                Some((RefusalCode::Busy, "too many sessions"))
            } else if self.shared.stopping.load(Ordering::Acquire) {
                Some((RefusalCode::Stopping, "the server stops"))
            } else {
                sessions.insert(info.id, Arc::clone(&session));
                None
            };
            drop(sessions);
            if let Some((code, text)) = refusal {
                return self.refuse(code, text);
            }
        }
        let registered = Registered { shared: Arc::clone(&self.shared), session };
        let session = &registered.session;
        add(&self.shared.counters.sessions_opened, 1);
        if let Some(observer) = &self.shared.options.observer {
            observer.opened(&info);
        }
        let outcome = match self.welcome(agreed).and_then(|()| self.demand(session, agreed)) {
            Ok(End::Left) => SessionOutcome::Left,
            Ok(End::Completed(counts)) => SessionOutcome::Completed(counts),
            Err(error) => {
                let error = if session.is_stopping() { MigrateError::Stopped } else { error };
                // Counted, and its place free, before the client has heard why it lost it.
                add(&self.shared.counters.failed, 1);
                registered.unregister();
                session.fail(&self.wire, &error);
                tracing::debug!(session = %info.id, %error, "session failed");
                SessionOutcome::Failed(error)
            }
        };
        if let Some(observer) = &self.shared.options.observer {
            observer.closed(&info, &outcome);
        }
        drop(registered);
    }

    /// A background connection joins the session of its demand connection.
    fn run_background(mut self, agreed: Hello) {
        let session = lock(&self.shared.sessions).get(&agreed.session).cloned();
        let Some(session) = session.filter(|session| session.info.role == Role::Destination) else {
            return self.refuse(RefusalCode::UnknownSession, "no such session");
        };
        if !session.pair(Arc::clone(&self.wire)) {
            return self
                .refuse(RefusalCode::DuplicateChannel, "the session has a background channel");
        }
        if let Err(error) = self.welcome(agreed).and_then(|()| self.background(&session, agreed)) {
            tracing::debug!(session = %session.info.id, %error, "background channel ended");
            session.fail(&self.wire, &error);
        }
    }
}

/// Takes a session off the list, and ends its connections, whatever happens to its thread.
struct Registered {
    shared: Arc<Shared>,
    session: Arc<Session>,
}

impl Registered {
    fn unregister(&self) {
        let mut sessions = lock(&self.shared.sessions);
        let id = &self.session.info.id;
        if sessions.get(id).is_some_and(|found| Arc::ptr_eq(found, &self.session)) {
            sessions.remove(id);
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.unregister();
        self.session.close();
    }
}
