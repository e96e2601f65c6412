//! The guest has been given away: its memory follows, over as many connections as it takes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Note, Outcome, background,
    driver::Driver,
    link::{Lanes, Link, Opened},
    rounds::unexpected,
};
use crate::{
    MigrateError,
    core::{AfterLoss, Belief, Counts, Frame, Hold, Lane as LaneNumbers, SourceEvent},
    guest::{
        status::{Event, Stage, add},
        units::UNIT,
        via::Via,
    },
    peer::lock,
};

/// Between attempts to connect again, for who was told where.
const AGAIN: Duration = Duration::from_millis(100);

/// How a meeting with the destination ended.
enum Met {
    Completed(Counts),
    /// The destination never ran the guest, and never will.
    Dropped,
    Lost(MigrateError),
    /// Somebody knows a better way to the destination.
    Elsewhere(Via),
    Reclaimed,
    GivenUp,
}

impl Driver {
    /// Sees it through to the end.
    pub(super) fn serve(&mut self, link: Arc<Link>, mut via: Via) -> Result<Outcome, MigrateError> {
        let shared = Arc::clone(&self.shared);
        let mut met_on = Some(link);
        loop {
            // The session wants no connection of an old link to be left when there is a new one.
            let Some(link) = met_on.take() else {
                return Err(MigrateError::Misuse("there is no connection to serve"));
            };
            let met = self.see_to(&link);
            let again = match met {
                Ok(Met::Completed(counts)) => {
                    link.leave(&[Frame::CompleteAck(counts), Frame::Bye]);
                    shared.guest.release();
                    return Ok(Outcome::Completed);
                }
                Ok(Met::Dropped) => {
                    link.leave(&[Frame::Bye]);
                    return self.taken_back(MigrateError::DroppedThere);
                }
                Ok(Met::Reclaimed) => {
                    link.end();
                    return self.reclaimed();
                }
                Ok(Met::GivenUp) => {
                    link.end();
                    return Err(self.gone());
                }
                Ok(Met::Elsewhere(other)) => {
                    link.end();
                    Some(other)
                }
                Ok(Met::Lost(error)) | Err(error) => {
                    link.fail(MigrateError::Closed);
                    link.end();
                    shared.journal.tell(&Event::Lost { why: error.to_string() });
                    None
                }
            };
            drop(link);
            if lock(&shared.session).lost() == AfterLoss::Keep {
                // The destination said that it never ran the guest, and had not been told again.
                return self.taken_back(MigrateError::DroppedThere);
            }
            shared.journal.enter(Stage::Paused);
            match self.find_again(via, again) {
                Ok((found, way)) => {
                    (met_on, via) = (Some(found), way);
                    add(&shared.counts.resumed, 1);
                }
                Err(Lost::Reclaimed) => return self.reclaimed(),
                Err(Lost::GivenUp) => return Err(self.gone()),
                Err(Lost::Dropped) => return self.taken_back(MigrateError::DroppedThere),
            }
        }
    }

    /// Waits for what the destination says, and does it, until the link ends.
    fn see_to(&mut self, link: &Arc<Link>) -> Result<Met, MigrateError> {
        let shared = Arc::clone(&self.shared);
        loop {
            match self.next(None) {
                Note::Heard(SourceEvent::Running) => {
                    shared.journal.running();
                    shared.journal.enter(Stage::PostCopy);
                    let missing = shared.to_send().total();
                    if shared.counts.snapshot().resumed > 0 {
                        shared.journal.tell(&Event::Resumed { missing });
                    }
                    background::start(link)?;
                }
                // It never heard that it is to run the guest: it is told again.
                Note::Heard(SourceEvent::Ready) => link.send(&Frame::Run)?,
                Note::Heard(SourceEvent::Dropped) => return Ok(Met::Dropped),
                Note::Heard(SourceEvent::Completed(counts)) => return Ok(Met::Completed(counts)),
                Note::Heard(SourceEvent::Left) => return Ok(Met::Lost(MigrateError::Left)),
                Note::Heard(SourceEvent::Nothing | SourceEvent::RoundAcked { .. }) => {}
                Note::Heard(other) => return Err(unexpected(&other)),
                Note::Lost(error) => return Ok(Met::Lost(error)),
                Note::Recover(via) => return Ok(Met::Elsewhere(via)),
                Note::Reclaim => return Ok(Met::Reclaimed),
                Note::GiveUp => return Ok(Met::GivenUp),
                // Too late to be cancelled; and nobody set a time.
                Note::Cancel | Note::TimedOut => {}
            }
        }
    }

    /// Waits for a way to the destination, and takes it.
    fn find_again(&mut self, mut via: Via, next: Option<Via>) -> Result<(Arc<Link>, Via), Lost> {
        let shared = Arc::clone(&self.shared);
        // Whoever is told where to go tries for a while: the other side may be closing its old
        // connections still.
        let patience = shared.options.connect_timeout;
        let mut eager = next.is_some().then(|| Instant::now() + patience);
        let mut try_now = next.is_some();
        if let Some(next) = next {
            via = next;
        }
        loop {
            if !try_now {
                let now = Instant::now();
                let again = match eager {
                    Some(until) if now < until => Some(AGAIN),
                    _ => shared.options.reconnect,
                };
                let until = again.filter(|_| !via.is_single()).map(|again| now + again);
                match self.next(until) {
                    Note::Recover(other) => {
                        via = other;
                        eager = Some(Instant::now() + patience);
                    }
                    Note::Reclaim => return Err(Lost::Reclaimed),
                    Note::GiveUp => return Err(Lost::GivenUp),
                    Note::TimedOut => {}
                    _ => continue,
                }
            }
            try_now = false;
            match self.rejoin(&mut via) {
                Ok(link) => return Ok((link, via)),
                Err(MigrateError::DroppedThere) => return Err(Lost::Dropped),
                Err(error) => {
                    tracing::info!(%error, "the destination is not back yet");
                    shared.journal.tell(&Event::Lost { why: error.to_string() });
                    lock(&shared.session).lost();
                }
            }
        }
    }

    /// Connects once more, and hears what the destination has.
    fn rejoin(&mut self, via: &mut Via) -> Result<Arc<Link>, MigrateError> {
        let shared = Arc::clone(&self.shared);
        let lanes = if via.is_single() { LaneNumbers::default() } else { shared.lanes };
        let offer = lock(&shared.session).reconnect(lanes)?;
        let mut control: Opened = shared.open(via, offer)?;
        lock(&shared.session).receive(&Frame::Hello(control.answer))?;
        let belief = lock(&shared.session).belief().unwrap_or(Belief::Given);
        let lanes = Lanes::open(&shared, via, lanes)?;
        self.say(&control.wire, &Frame::Resume(belief))?;
        control.reader.set_deadline(Some(shared.options.idle_timeout));
        // Until all is said of what it has, and what it does with it: what it asks for on other
        // connections may overtake that, and must not be heard before.
        let does = loop {
            let frame = control.reader.next(&mut |_| Ok(()))?;
            let event = lock(&shared.session).receive(&frame)?;
            match event {
                SourceEvent::Dropped => return Err(MigrateError::DroppedThere),
                SourceEvent::Left => return Err(MigrateError::Left),
                SourceEvent::Ready | SourceEvent::Running => break event,
                _ => {
                    if let Frame::Ping { nonce } = frame {
                        self.say(&control.wire, &Frame::Pong { nonce })?;
                    }
                }
            }
        };
        control.reader.set_deadline(None);
        self.heard_before(does);
        self.listen_to(control, lanes)
    }

    /// The guest is here again, since the destination never ran it.
    fn taken_back(&mut self, why: MigrateError) -> Result<Outcome, MigrateError> {
        if !lock(&self.shared.session).may_run() {
            return Err(MigrateError::Misuse("the guest was dropped, and is not this side's"));
        }
        self.restore()?;
        Err(why)
    }

    /// The guest is lost, with what was not sent.
    fn gone(&self) -> MigrateError {
        MigrateError::Gone { unsent: self.shared.to_send().total() * UNIT }
    }

    /// Somebody gave their word that the destination is gone.
    fn reclaimed(&mut self) -> Result<Outcome, MigrateError> {
        {
            let mut session = lock(&self.shared.session);
            session.lost();
            session.reclaim()?;
            debug_assert_eq!(session.hold(), Hold::Ours);
        }
        self.restore()?;
        Err(MigrateError::Reclaimed)
    }
}

/// Why the destination is not looked for any more.
enum Lost {
    Reclaimed,
    GivenUp,
    Dropped,
}
