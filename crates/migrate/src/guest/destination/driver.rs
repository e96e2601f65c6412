//! The thread that decides: one meeting with the source after the other, as many as it takes.

use std::sync::{Arc, atomic::Ordering, mpsc};

use super::{
    Note, Shared,
    link::{Caller, End, Link},
};
use crate::{
    MigrateError,
    core::{AfterLoss, Encoder, Frame, ProtocolError},
    guest::{
        status::{Ended, Event, Stage},
        units::UNIT,
    },
    peer::lock,
};

/// The thread that decides.
pub(super) struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) notes: mpsc::Receiver<Note>,
    pub(super) ended: Arc<Ended<()>>,
}

impl Driver {
    pub(super) fn run(self) -> Result<(), MigrateError> {
        let result = self.receive();
        let shared = &self.shared;
        let link = lock(&shared.link).take();
        if let Some(link) = link {
            link.end();
        }
        // The guest keeps it for as long as it needs it.
        let pager = lock(&shared.pager).take();
        drop(pager);
        if result.is_err() && !shared.running.load(Ordering::Acquire) {
            shared.guest.drop_guest();
        }
        result
    }

    fn receive(&self) -> Result<(), MigrateError> {
        let shared = &self.shared;
        let (mut again, mut whole) = (false, false);
        loop {
            let note = if whole {
                // All is well here; the source may want to hear so, but not for ever.
                match self.notes.recv_timeout(shared.options.idle_timeout) {
                    Ok(note) => note,
                    Err(_) => return Ok(()),
                }
            } else {
                self.notes.recv().unwrap_or(Note::Drop)
            };
            let caller = match note {
                Note::Caller(caller) => *caller,
                Note::Drop | Note::Abandon if whole => return Ok(()),
                Note::Abandon => return Err(self.abandon()),
                Note::Drop if shared.running.load(Ordering::Acquire) => continue,
                Note::Drop => return Err(MigrateError::Stopped),
            };
            let result = self.meet(caller, again);
            let link = lock(&shared.link).take();
            let first = link.and_then(|link| link.end());
            let error = match result {
                Ok(End::Completed) => return Ok(()),
                Ok(End::CalledOff(why)) => return Err(MigrateError::CalledOff(why)),
                Ok(End::Dropped(why)) => return Err(why),
                // Whichever thread found out first knows best.
                Err(error) => first.unwrap_or(error),
            };
            match lock(&shared.session).lost() {
                AfterLoss::Reconnect => {}
                _ if shared.stop.is_stopped() => return Err(MigrateError::Stopped),
                _ => return Err(error),
            }
            again = true;
            shared.journal.enter(Stage::Paused);
            shared.journal.tell(&Event::Lost { why: error.to_string() });
            if self.is_whole() {
                // Only the last words were lost: nothing is to be had from the source any more.
                whole = true;
                shared.journal.enter(Stage::Completed);
                self.ended.set(Ok(()));
            }
        }
    }

    /// What is missing never comes.
    fn abandon(&self) -> MigrateError {
        let missing = lock(&self.shared.session).due().total() * UNIT;
        let pager = lock(&self.shared.pager).clone();
        if let Some(pager) = pager {
            pager.abandon();
        }
        MigrateError::Abandoned { missing }
    }

    /// Whether the guest runs here, and all of its memory is here.
    fn is_whole(&self) -> bool {
        let session = lock(&self.shared.session);
        session.may_run()
            && self.shared.running.load(Ordering::Acquire)
            && session.completion().is_some()
    }

    /// From a source's hello to the end of that connection.
    fn meet(&self, caller: Caller, again: bool) -> Result<End, MigrateError> {
        let shared = &self.shared;
        let Caller { wire, mut reader, hello } = caller;
        let refused = |error: ProtocolError| {
            wire.refuse(error.code(), &error.to_string());
            MigrateError::from(error)
        };
        let answer = {
            let mut session = lock(&shared.session);
            if again {
                session.reconnect().map_err(refused)?;
            }
            session.receive(&Frame::Hello(hello)).map_err(refused)?;
            *session.agreed().ok_or(MigrateError::Misuse("no answer to a hello"))?
        };
        reader.set_max_payload(answer.max_payload);
        let link = Arc::new(Link::new(shared, wire, &answer));
        *lock(&shared.link) = Some(Arc::clone(&link));
        let mut bytes = Vec::new();
        Encoder::encode(&Frame::Hello(answer), &mut bytes);
        let end = link.control.send_frame(&bytes).and_then(|()| link.attend(reader));
        if let Err(error) = end {
            // The reason is kept there, unless another thread had one before.
            link.fail(error);
            return Err(MigrateError::Closed);
        }
        end
    }
}
