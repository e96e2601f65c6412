//! The background connection: one thread reads requests into the queue, one answers them.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    Session, Shared,
    answer::{Outbox, piece_granules},
    connection::Connection,
    stats::add,
};
use crate::{
    MigrateError,
    core::{Encoder, Frame, Hello},
    net::Wire,
};

impl Connection {
    /// Serves the background connection until the session ends.
    pub(super) fn background(
        &mut self,
        session: &Session,
        agreed: Hello,
    ) -> Result<(), MigrateError> {
        self.reader.set_max_payload(agreed.max_payload);
        let (shared, wire) = (Arc::clone(&self.shared), Arc::clone(&self.wire));
        thread::scope(|scope| {
            let sender = thread::Builder::new()
                .name("pf-background".into())
                .spawn_scoped(scope, || {
                    let ends = Ends(session);
                    let sent = send(&shared, session, &wire, agreed.max_payload);
                    if sent.is_ok() {
                        // Somebody closed the queue, and may yet have something to tell the
                        // client before the end.
                        std::mem::forget(ends);
                    }
                    sent
                })
                .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
            let received = {
                let _ends = Ends(session);
                // Told from here, because the sender ends the session as soon as it can.
                self.receive(session).inspect_err(|error| session.fail(&self.wire, error))
            };
            let sent = sender.join().unwrap_or(Err(MigrateError::Stopped));
            received.and(sent)
        })
    }

    fn receive(&mut self, session: &Session) -> Result<(), MigrateError> {
        let options = &self.shared.options;
        loop {
            let frame = self.reader.next(&mut |silent| idle(options.idle_timeout, silent))?;
            self.machine.receive(&frame)?;
            match frame {
                Frame::Request { span, .. } => {
                    add(&self.shared.counters.requests_background, 1);
                    let ready = Instant::now() + options.delay;
                    session.push(span, ready, options.max_queued)?;
                }
                Frame::Ping { nonce } => self.wire.send_frame(&Encoder::pong(nonce))?,
                Frame::Bye => {
                    session.left();
                    return Ok(());
                }
                _ => {}
            }
        }
    }
}

/// Whichever of the two threads fails, even by a panic, ends the session for the other.
struct Ends<'a>(&'a Session);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The answering thread.
fn send(
    shared: &Shared,
    session: &Session,
    wire: &Wire,
    max_payload: u32,
) -> Result<(), MigrateError> {
    let mut outbox = Outbox::new(shared, session, wire, max_payload);
    let limit = |region| {
        shared
            .geometry
            .region(region)
            .map_or(1, |region| piece_granules(region.granule, u64::from(max_payload)))
    };
    while let Some(span) = session.pop(limit) {
        outbox.add(span)?;
        outbox.flush()?;
    }
    Ok(())
}

/// Nothing has come for `silent`.
pub(super) fn idle(limit: Duration, silent: Duration) -> Result<(), MigrateError> {
    if silent >= limit { Err(MigrateError::Silent { after: silent }) } else { Ok(()) }
}
