//! The thread that decides, from the first connection to the moment in which the guest is given
//! away, or stays.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use super::{
    Note, Outcome, Shared, Told,
    link::{Lanes, Link, Opened},
    rounds::{After, Rounds},
    sender::How,
};
use crate::{
    MigrateError,
    core::{AfterLoss, Encoder, Frame, Lane as LaneNumbers, Refusal, RefusalCode, SourceEvent},
    guest::{
        options::Mode,
        units::{UNIT, Units},
        via::Via,
    },
    net::Wire,
    peer::lock,
};

/// The thread that decides.
pub(super) struct Driver {
    pub(super) shared: Arc<Shared>,
    notes: mpsc::Receiver<Told>,
    teller: mpsc::Sender<Told>,
    /// The number of the link that is listened to.
    link: u64,
    tracking: bool,
    pub(super) paused: bool,
    pub(super) throttled: u8,
    /// The destination has been told all that it needs to run the guest.
    pub(super) switched: bool,
}

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        notes: mpsc::Receiver<Told>,
        teller: mpsc::Sender<Told>,
    ) -> Self {
        Self {
            shared,
            notes,
            teller,
            link: 0,
            tracking: false,
            paused: false,
            throttled: 0,
            switched: false,
        }
    }

    /// All of it.
    pub(super) fn run(mut self, mut via: Via) -> Result<Outcome, MigrateError> {
        let link = match self.meet(&mut via) {
            Ok(link) => link,
            Err(MigrateError::Cancelled) => return Ok(Outcome::Cancelled),
            Err(error) => return Err(error),
        };
        match self.until_given(&link) {
            Ok(()) => self.serve(link, via),
            Err(error) => {
                let ours = lock(&self.shared.session).may_run();
                debug_assert!(ours, "nothing has been given away");
                self.call_off(&link, &mut via, error)
            }
        }
    }

    /// Connects, and agrees on what is to be sent.
    fn meet(&mut self, via: &mut Via) -> Result<Arc<Link>, MigrateError> {
        let shared = Arc::clone(&self.shared);
        let offer = lock(&shared.session).offer();
        let mut control = shared.open(via, offer)?;
        lock(&shared.session).receive(&Frame::Hello(control.answer))?;
        let regions = Frame::Regions(shared.memory.stated()?);
        self.say(&control.wire, &regions)?;
        // Making room for the guest may take as long as silence may last.
        control.reader.set_deadline(Some(shared.options.idle_timeout));
        loop {
            let frame = control.reader.next(&mut |_| match shared.is_called_off() {
                true => Err(MigrateError::Cancelled),
                false => Ok(()),
            })?;
            let event = lock(&shared.session).receive(&frame)?;
            match (event, frame) {
                (SourceEvent::Accepted, _) => break,
                (SourceEvent::Left, _) => return Err(MigrateError::Left),
                (_, Frame::Ping { nonce }) => self.say(&control.wire, &Frame::Pong { nonce })?,
                _ => {}
            }
        }
        control.reader.set_deadline(None);
        let grains =
            lock(&shared.session).granules().iter().map(|region| region.granule / UNIT).collect();
        shared.grains.get_or_init(|| grains);
        let lanes = Lanes::open(&shared, via, shared.lanes)?;
        self.listen_to(control, lanes)
    }

    pub(super) fn say(&self, wire: &Wire, frame: &Frame) -> Result<(), MigrateError> {
        lock(&self.shared.session).send(frame)?;
        let mut bytes = Vec::new();
        Encoder::encode(frame, &mut bytes);
        wire.send_frame(&bytes)
    }

    /// Everything up to the moment in which the guest is given away.
    fn until_given(&mut self, link: &Arc<Link>) -> Result<(), MigrateError> {
        let shared = Arc::clone(&self.shared);
        let mode = shared.options.mode;
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty()).map_err(
            |error| MigrateError::Io { what: "choosing a seed for hashes", error: error.into() },
        )?;
        let mut rounds = Rounds::new(link, u64::from_ne_bytes(seed));
        for region in 0..shared.memory.len() {
            let all = Units { region, first: 0, count: shared.memory.units(region) };
            shared.dirty.insert(region, all.run());
        }
        let mut after = After::PostCopy;
        if mode != Mode::PostCopy {
            self.tracking = true;
            shared.guest.start_tracking()?;
            after = self.copy(&mut rounds)?;
        }
        self.stop_guest()?;
        if mode != Mode::PostCopy {
            self.harvest()?;
        }
        if after == After::SendRest {
            rounds.send(How::Again)?;
        }
        self.hand_over(link, rounds.number)
    }

    /// Waits for what the destination says, at most for `after`.
    pub(super) fn heard(
        &mut self,
        what: &'static str,
        after: Duration,
    ) -> Result<SourceEvent, MigrateError> {
        let until = Instant::now() + after;
        loop {
            match self.next(Some(until)) {
                Note::Heard(SourceEvent::Left) => return Err(MigrateError::Left),
                Note::Heard(SourceEvent::Cancelled | SourceEvent::Nothing) => {}
                Note::Heard(event) => return Ok(event),
                Note::Lost(error) => return Err(error),
                Note::Cancel => return Err(MigrateError::Cancelled),
                Note::Recover(_) | Note::Reclaim | Note::GiveUp => {}
                Note::TimedOut => return Err(MigrateError::TimedOut { what, after }),
            }
        }
    }

    /// What is said next: by the link in use, or by who started the migration.
    pub(super) fn next(&mut self, until: Option<Instant>) -> Note {
        loop {
            let told = match until {
                Some(until) => {
                    self.notes.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
                }
                // The driver itself could still say something, so this waits for ever.
                None => self.notes.recv().ok(),
            };
            match told {
                Some(Told(from, note)) if from == 0 || from == self.link => return note,
                // What was said of a link that is over.
                Some(_) => {}
                None => return Note::TimedOut,
            }
        }
    }

    /// Starts to listen to new connections.
    pub(super) fn listen_to(
        &mut self,
        control: Opened,
        lanes: Lanes,
    ) -> Result<Arc<Link>, MigrateError> {
        self.link += 1;
        Link::start(&self.shared, control, lanes, (self.link, self.teller.clone()))
    }

    /// The connections that are listened to next have said this already.
    pub(super) fn heard_before(&self, event: SourceEvent) {
        // The driver itself is the one who listens.
        let _ = self.teller.send(Told(self.link + 1, Note::Heard(event)));
    }

    /// The guest stays: it goes on as if nothing had been, and then the destination is told.
    fn call_off(
        &mut self,
        link: &Arc<Link>,
        via: &mut Via,
        error: MigrateError,
    ) -> Result<Outcome, MigrateError> {
        let restored = self.restore();
        let (code, text) = match &error {
            MigrateError::Cancelled => (RefusalCode::Asked, "cancelled".to_owned()),
            MigrateError::NotConverging { .. } => (RefusalCode::NotConverging, error.to_string()),
            MigrateError::TimedOut { .. } => (RefusalCode::TimedOut, error.to_string()),
            other => (RefusalCode::Stopping, other.to_string()),
        };
        if !link.is_over() && link.send(&Frame::Cancel(Refusal::new(code, &text))).is_ok() {
            // That it was heard is good to know, and no more.
            let until = Instant::now() + Duration::from_secs(2);
            while !matches!(
                self.next(Some(until)),
                Note::Heard(SourceEvent::Cancelled) | Note::Lost(_) | Note::TimedOut
            ) {}
            link.leave(&[Frame::Bye]);
        } else {
            link.end();
            self.free_destination(via, (code, &text));
        }
        restored?;
        match error {
            MigrateError::Cancelled => Ok(Outcome::Cancelled),
            error => Err(error),
        }
    }

    /// A destination that could run the guest, and does not know that the source had not told it
    /// to, would wait for ever. It is looked for once.
    fn free_destination(&mut self, via: &mut Via, (code, text): (RefusalCode, &str)) {
        let shared = Arc::clone(&self.shared);
        let after = lock(&shared.session).lost();
        if after != AfterLoss::Keep || !self.switched || via.is_single() {
            return;
        }
        let told = (|| {
            let offer = lock(&shared.session).reconnect(LaneNumbers::default())?;
            // That it was called off is just what is to be said.
            let control = shared.open_until(via, offer, None)?;
            lock(&shared.session).receive(&Frame::Hello(control.answer))?;
            self.say(&control.wire, &Frame::Cancel(Refusal::new(code, text)))?;
            control.wire.linger();
            Ok::<_, MigrateError>(())
        })();
        if let Err(error) = told {
            tracing::info!(%error, "the destination is not told that the guest stays here");
        }
    }

    /// Undoes all that was done to the guest.
    pub(super) fn restore(&mut self) -> Result<(), MigrateError> {
        let guest = &self.shared.guest;
        if std::mem::take(&mut self.throttled) > 0
            && let Err(error) = guest.throttle(0)
        {
            tracing::error!(%error, "the guest stays slowed down");
        }
        if std::mem::take(&mut self.tracking)
            && let Err(error) = guest.stop_tracking()
        {
            tracing::warn!(%error, "writes may still be tracked");
        }
        if std::mem::take(&mut self.paused) {
            guest.resume().map_err(MigrateError::NotResumed)?;
            self.shared.journal.running();
        }
        Ok(())
    }

    pub(super) fn throttle(&mut self, percent: u8) {
        match self.shared.guest.throttle(percent) {
            Ok(()) => self.throttled = percent,
            Err(error) => {
                tracing::warn!(%error, "the guest cannot be slowed down");
                // As slow as it gets.
                self.throttled = 100;
            }
        }
    }
}
