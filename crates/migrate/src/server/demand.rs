//! The demand connection: whatever comes is answered at once.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Instant,
};

use super::{
    Session, Shared,
    answer::Outbox,
    background::idle,
    connection::{Connection, End},
    stats::add,
};
use crate::{
    MigrateError,
    core::{Encoder, Frame, Hello, ProtocolError, Role, WireSpan},
    net::Wire,
    peer::lock,
};

impl Connection {
    /// Serves the demand connection until the client leaves.
    pub(super) fn demand(&mut self, session: &Session, agreed: Hello) -> Result<End, MigrateError> {
        self.reader.set_max_payload(agreed.max_payload);
        let (shared, wire) = (Arc::clone(&self.shared), Arc::clone(&self.wire));
        let mut outbox = Outbox::new(&shared, session, &wire, agreed.max_payload);
        if shared.options.delay.is_zero() {
            return self.serve(session, &mut |answer| match answer {
                Answer::Span(span, _) => outbox.add(span),
                Answer::Flush => outbox.flush(),
            });
        }
        let later = Later::default();
        thread::scope(|scope| {
            let sender = thread::Builder::new()
                .name("pf-delayed".into())
                .spawn_scoped(scope, || {
                    // However this thread ends, the client must not wait for it.
                    struct Ends<'a>(&'a Session, &'a Later);
                    impl Drop for Ends<'_> {
                        fn drop(&mut self) {
                            if !lock(&self.1.queue).closed {
                                self.0.close();
                            }
                        }
                    }
                    let _ends = Ends(session, &later);
                    later.send(&shared, session, &wire, agreed.max_payload)
                })
                .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
            let served = {
                let _closes = Closes(&later);
                self.serve(session, &mut |answer| {
                    if let Answer::Span(span, ready) = answer {
                        later.push(span, ready);
                    }
                    Ok(())
                })
            };
            let sent = sender.join().unwrap_or(Err(MigrateError::Stopped));
            match (served, sent) {
                // The sender failing ends the connection under the reader.
                (Err(MigrateError::Closed), Err(error)) => Err(error),
                (served, _) => served,
            }
        })
    }

    fn serve(
        &mut self,
        session: &Session,
        answer: &mut dyn FnMut(Answer) -> Result<(), MigrateError>,
    ) -> Result<End, MigrateError> {
        let options = &self.shared.options;
        let opened = Instant::now();
        let alone = |session: &Session| {
            session.info.role == Role::Destination
                && !session.is_paired()
                && opened.elapsed() >= options.pair_timeout
        };
        let mut end = End::Left;
        let mut taken = Vec::new();
        loop {
            let frame = self.reader.next(&mut |silent| {
                if alone(session) {
                    return Err(MigrateError::TimedOut {
                        what: "waiting for the background channel",
                        after: options.pair_timeout,
                    });
                }
                idle(options.idle_timeout, silent)
            });
            let frame = match frame {
                // The goodbye on the other connection was read first.
                Err(MigrateError::Closed) if session.has_left() => return Ok(end),
                other => other?,
            };
            self.machine.receive(&frame)?;
            match frame {
                Frame::Request { span, .. } => {
                    add(&self.shared.counters.requests_demand, 1);
                    answer(Answer::Span(span, options.ready()))?;
                }
                Frame::Expedite { span } => {
                    session.take(span, &mut taken);
                    for (span, ready) in taken.drain(..) {
                        add(&self.shared.counters.expedited, u64::from(span.count));
                        answer(Answer::Span(span, Some(ready)))?;
                    }
                }
                Frame::Complete(theirs) => {
                    answer(Answer::Flush)?;
                    let ours = session.counts();
                    if ours != theirs {
                        return Err(ProtocolError::CompletionMismatch { ours, theirs }.into());
                    }
                    self.wire.send_frame(&Encoder::complete_ack(ours))?;
                    if let Some(observer) = &options.observer {
                        observer.completed(&session.info, ours);
                    }
                    end = End::Completed(ours);
                }
                Frame::Ping { nonce } => {
                    answer(Answer::Flush)?;
                    self.wire.send_frame(&Encoder::pong(nonce))?;
                }
                Frame::Bye => {
                    answer(Answer::Flush)?;
                    return Ok(end);
                }
                _ => {}
            }
            // Requests that came together are answered together.
            if !self.reader.has_frame() {
                answer(Answer::Flush)?;
            }
        }
    }
}

impl super::ServerOptions {
    /// When a request that comes now may be answered.
    fn ready(&self) -> Option<Instant> {
        (!self.delay.is_zero()).then(|| Instant::now() + self.delay)
    }
}

enum Answer {
    Span(WireSpan, Option<Instant>),
    Flush,
}

#[derive(Default)]
struct Due {
    spans: BTreeMap<(Instant, u64), WireSpan>,
    sequence: u64,
    closed: bool,
}

/// Answers that have to wait for their time.
#[derive(Default)]
struct Later {
    queue: Mutex<Due>,
    changed: Condvar,
}

/// No more answers will come, even if the reader panics.
struct Closes<'a>(&'a Later);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        lock(&self.0.queue).closed = true;
        self.0.changed.notify_all();
    }
}

impl Later {
    fn push(&self, span: WireSpan, ready: Option<Instant>) {
        let mut due = lock(&self.queue);
        due.sequence += 1;
        let key = (ready.unwrap_or_else(Instant::now), due.sequence);
        due.spans.insert(key, span);
        drop(due);
        self.changed.notify_one();
    }

    fn send(
        &self,
        shared: &Shared,
        session: &Session,
        wire: &Wire,
        max_payload: u32,
    ) -> Result<(), MigrateError> {
        // A played delay should be as long as it says, not up to 50 us longer: prctl(2).
        if let Err(error) = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)) {
            tracing::debug!(%error, "timer slack stays as it is");
        }
        let mut outbox = Outbox::new(shared, session, wire, max_payload);
        let mut due = lock(&self.queue);
        loop {
            let now = Instant::now();
            match due.spans.first_entry() {
                Some(first) if first.key().0 <= now => {
                    let span = first.remove();
                    drop(due);
                    outbox.add(span)?;
                    due = lock(&self.queue);
                }
                next => {
                    let next = next.map(|entry| entry.key().0);
                    // Never sleep on something that could be sent.
                    drop(due);
                    outbox.flush()?;
                    due = lock(&self.queue);
                    let earliest = due.spans.first_key_value().map(|(key, _)| key.0);
                    if earliest != next {
                        continue;
                    }
                    due = match (next, due.closed) {
                        (_, true) => return Ok(()),
                        (Some(next), false) => {
                            let left = next.saturating_duration_since(Instant::now());
                            match self.changed.wait_timeout(due, left) {
                                Ok((due, _)) => due,
                                Err(poison) => poison.into_inner().0,
                            }
                        }
                        (None, false) => {
                            self.changed.wait(due).unwrap_or_else(|poison| poison.into_inner())
                        }
                    };
                }
            }
        }
    }
}
