//! The destination's end of a guest's session: its control connection, and who has the guest.

mod incoming;
mod recovery;

use std::sync::{Arc, atomic::Ordering};

use super::{
    AcceptedRegion, Belief, StateInfo, UnitSet,
    destination::incoming::Incoming,
    lane::{DestinationLane, Intake, LaneEnd, Placement, asking},
    memory::{Memory, RunOrder, check_regions},
    source::{check_begin, check_switch},
    table::{guest_destination_next, guest_destination_sends},
};
use crate::core::{
    Channel, Counts, Frame, Geometry, Hello, Kind, Lane, Phase, ProtocolError, Refusal, Role,
    SessionId, Terms,
};

/// How much a destination takes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct GuestLimits {
    /// Bytes of a device state. They are held in memory.
    pub state_bytes: u64,
    /// Bytes of a guest's memory. For each 4 KiB, 4 bits are held in memory once the regions are
    /// accepted.
    pub memory_bytes: u64,
}

impl Default for GuestLimits {
    /// 16 MiB of state, 16 TiB of memory.
    fn default() -> Self {
        Self { state_bytes: 16 << 20, memory_bytes: 16 << 40 }
    }
}

/// What came on the control connection of a destination.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DestinationEvent {
    /// Nothing to do. After a `Ping`, a `Pong` is due.
    Nothing,
    /// The source's hello has come: send [`agreed`](GuestDestinationSession::agreed).
    Agreed,
    /// The regions have come: make room, send `Accept`; or `Error`.
    Regions,
    /// A round of at most so many units has begun.
    RoundBegun {
        /// Which.
        round: u64,
        /// Units that it will carry at most.
        units: u64,
    },
    /// A round has come as a whole: send [`round_ack`](GuestDestinationSession::round_ack).
    RoundDone,
    /// Everything but the missing memory has come: discard what is
    /// [missing](GuestDestinationSession::missing), load the state, and send
    /// [`ready`](GuestDestinationSession::ready); or `Error`.
    Switched,
    /// The guest is this side's: start it and send `Running`; or `Dropped`, if that failed before
    /// it ran at all.
    Run,
    /// The source gives up: drop the guest and send `Cancelled`.
    Cancelled(Refusal),
    /// The source is back: send [`have`](GuestDestinationSession::have) and then
    /// [`standing`](GuestDestinationSession::standing).
    Resumed(Belief),
    /// Both sides agree that everything is there.
    Completed,
    /// Pages came on control. Once they are in place, call `settle`.
    Page(Placement),
    /// The peer leaves.
    Left,
}

/// How far this side has the guest. Outlives a link.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Stage {
    /// It could not run it.
    Early,
    /// It could, and has not been told to.
    Prepared,
    /// It has been told to.
    Started {
        /// And has said so.
        said: bool,
    },
    /// It never ran it, and never will.
    Dropped,
}

/// The rounds, as they come.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
struct Rounds {
    begun: u64,
    /// What control says of the last one, until all connections have said so.
    end: Option<u64>,
    /// Come as a whole.
    done: u64,
    acked: u64,
}

/// A destination's control connection, and everything about the session that outlives it.
///
/// Every frame goes through [`send`](Self::send) before it is sent, and through
/// [`receive`](Self::receive) when it has come. After a violation or a loss, call
/// [`lost`](Self::lost).
#[derive(Debug)]
pub struct GuestDestinationSession {
    terms: Terms,
    limits: GuestLimits,
    session: Option<SessionId>,
    agreed: Option<Hello>,
    phase: Phase,
    stage: Stage,
    completed: bool,
    geometry: Option<Geometry>,
    memory: Option<Arc<Memory>>,
    intake: Option<Intake>,
    /// Which pages and which faults connections have come.
    joined: [u32; 2],
    rounds: Rounds,
    /// The last round that each pages connection has ended.
    ends: Vec<u64>,
    state: Option<Incoming>,
    missing: RunOrder,
    have_ended: bool,
}

impl GuestDestinationSession {
    /// A connection on which nothing has come yet.
    #[must_use]
    pub fn new(terms: Terms, limits: GuestLimits) -> Self {
        Self {
            terms,
            limits,
            session: None,
            agreed: None,
            phase: Phase::Greeting,
            stage: Stage::Early,
            completed: false,
            geometry: None,
            memory: None,
            intake: None,
            joined: [0; 2],
            rounds: Rounds::default(),
            ends: Vec::new(),
            state: None,
            missing: RunOrder::default(),
            have_ended: false,
        }
    }

    /// A session of its own in the same state, without further connections.
    #[cfg(test)]
    pub(super) fn fork(&self) -> Self {
        let memory = self.memory.as_ref().map(|memory| Arc::new(memory.fork()));
        Self {
            geometry: self.geometry.clone(),
            intake: self.intake.as_ref().zip(memory.clone()).map(|(i, memory)| i.fork(memory)),
            memory,
            ends: self.ends.clone(),
            state: self.state.clone(),
            missing: self.missing.clone(),
            ..*self
        }
    }

    /// Where the session stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The answer to the source's hello, once that has come. To be sent.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// The numbers of further connections.
    #[must_use]
    pub fn lanes(&self) -> Lane {
        self.agreed.map(|hello| hello.lane).unwrap_or_default()
    }

    /// The source's regions, once they have come.
    #[must_use]
    pub fn geometry(&self) -> Option<&Geometry> {
        self.geometry.as_ref()
    }

    /// The granules accepted, by region.
    #[must_use]
    pub fn granules(&self) -> &[AcceptedRegion] {
        self.memory.as_ref().map_or(&[], |memory| &memory.granules)
    }

    /// Whether the guest may run here.
    #[must_use]
    pub fn may_run(&self) -> bool {
        matches!(self.stage, Stage::Started { .. })
    }

    /// Units that were missing at the switch.
    ///
    /// # Panics
    /// Before the regions are accepted.
    #[must_use]
    pub fn missing(&self) -> &UnitSet {
        &self.memory().missing
    }

    /// Units that are missing still, and have not begun to come.
    ///
    /// # Panics
    /// Before the regions are accepted.
    #[must_use]
    pub fn due(&self) -> &Arc<UnitSet> {
        &self.memory().due
    }

    /// Units that were asked for and have not begun to come; after a loss, they are to be asked
    /// for again.
    #[must_use]
    pub fn asked(&self) -> Option<&UnitSet> {
        let memory = self.memory.as_ref()?;
        memory.asked.retain(&memory.due);
        Some(&memory.asked)
    }

    /// What the device state is and its bytes, once all have come and been checked; they are
    /// forgotten here.
    pub fn take_state(&mut self) -> Option<(StateInfo, Vec<u8>)> {
        let state = self.state.as_mut().filter(|state| state.complete().is_ok())?;
        Some((state.info, std::mem::take(&mut state.bytes)))
    }

    /// How much of what was missing at the switch has come, and is in place.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.memory.as_ref().map(|memory| memory.counts()).unwrap_or_default()
    }

    fn unexpected(&self, kind: Kind) -> ProtocolError {
        ProtocolError::Unexpected { kind, channel: Channel::Control, phase: self.phase }
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
        if let Some(memory) = &self.memory {
            memory.set_phase(phase);
        }
    }

    fn memory(&self) -> &Arc<Memory> {
        self.memory.as_ref().expect("the tables let nothing of this come before Accept")
    }

    /// The `RoundAck` that is due, if one is. Nothing may be sent on control between this, its
    /// [`send`](Self::send), and its sending.
    #[must_use]
    pub fn round_ack(&self) -> Option<Frame> {
        let due = self.rounds.acked < self.rounds.done
            && matches!(self.phase, Phase::Receiving | Phase::Loading);
        due.then(|| {
            let units = self.memory().units.load(Ordering::Acquire);
            Frame::RoundAck { round: self.rounds.done, units }
        })
    }

    /// `Ready`, if nothing is on its way and the guest could be run.
    #[must_use]
    pub fn ready(&self) -> Option<Frame> {
        let memory = self.memory.as_ref()?;
        let quiet = self.asked()?.total() == 0 && memory.unsettled.load(Ordering::Acquire) == 0;
        quiet.then(|| Frame::Ready { missing: memory.due.total() })
    }

    /// `Complete`, if everything that was missing is in place.
    #[must_use]
    pub fn completion(&self) -> Option<Frame> {
        let (memory, counts) = (self.memory.as_ref()?, self.counts());
        let all = counts.filled + counts.poisoned == memory.missing.total();
        all.then_some(Frame::Complete(counts))
    }

    /// A further connection of the session, on which this hello has come.
    ///
    /// # Errors
    /// What is wrong with the hello, or that the session has no such connection now.
    pub fn join(&mut self, offer: &Hello) -> Result<DestinationLane, ProtocolError> {
        let agreed = self.terms.answer_as(Role::GuestDestination, offer)?;
        let Lane { index, of } = offer.lane;
        let (which, planned) = match offer.channel {
            Channel::Pages => (0, self.lanes().index),
            Channel::Faults => (1, self.lanes().of),
            _ => return Err(ProtocolError::BadHello("only further connections join a session")),
        };
        let live = !matches!(self.phase, Phase::Closed | Phase::Greeting | Phase::Returning);
        let bit = 1_u32.checked_shl(index.into()).unwrap_or(0);
        let why = match &self.memory {
            _ if Some(offer.session) != self.session => "it is of another session",
            Some(_) if live && of != planned => "not as many were announced",
            Some(_) if live && self.joined[which] & bit != 0 => "it is there already",
            Some(memory) if live => {
                self.joined[which] |= bit;
                return Ok(DestinationLane::new(memory, agreed));
            }
            _ => "the session is not ready for it",
        };
        Err(ProtocolError::BadLane { channel: offer.channel, index, of, why })
    }

    /// Takes note of a frame that is about to be sent on control.
    ///
    /// # Errors
    /// Why the peer would refuse it. It may not be sent then.
    pub fn send(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let (kind, phase) = (frame.kind(), self.phase);
        let next = guest_destination_sends(self.lanes(), Channel::Control, phase, kind)
            .ok_or_else(|| self.unexpected(kind))?;
        let contradiction = |why| Err(ProtocolError::Contradiction { kind, why });
        match frame {
            Frame::Accept(regions) => {
                let geometry = self.geometry.as_ref().expect("the regions have come");
                let memory = Arc::new(Memory::new(geometry, regions, true)?);
                self.intake = Some(Intake::new(Arc::clone(&memory)));
                self.memory = Some(memory);
            }
            Frame::RoundAck { round, .. } => {
                if self.round_ack().as_ref() != Some(frame) {
                    return contradiction("no such acknowledgement is due");
                }
                self.rounds.acked = *round;
            }
            Frame::Ready { .. } => {
                if self.ready().as_ref() != Some(frame) {
                    return contradiction("something is still on its way");
                }
                if phase == Phase::Comparing && (self.stage != Stage::Prepared || !self.have_ended)
                {
                    return contradiction("that is not how things stand");
                }
                self.stage = Stage::Prepared;
            }
            Frame::Running => {
                if !self.may_run() || phase == Phase::Comparing && !self.have_ended {
                    return contradiction("that is not how things stand");
                }
                self.stage = Stage::Started { said: true };
            }
            Frame::Dropped => {
                if phase == Phase::Comparing && self.stage != Stage::Dropped {
                    return contradiction("that is not how things stand");
                }
                self.stage = Stage::Dropped;
            }
            Frame::HaveEnd { .. } => self.have_ended = true,
            Frame::Complete(_) if self.completion().as_ref() != Some(frame) => {
                return contradiction("not everything is in place");
            }
            Frame::Request { .. } | Frame::Expedite { .. } => asking(self.memory(), frame)?,
            _ => {}
        }
        self.set_phase(next);
        Ok(())
    }

    /// Takes note of a frame that has come on control.
    ///
    /// # Errors
    /// What is wrong with it; for an `Error` frame, [`ProtocolError::Refused`]. The link is of no
    /// use any more: see [`lost`](Self::lost).
    ///
    /// # Panics
    /// If pages that came before have not been [settled](Self::settle).
    pub fn receive(&mut self, frame: &Frame) -> Result<DestinationEvent, ProtocolError> {
        self.judge(frame).inspect_err(|_| self.set_phase(Phase::Closed))
    }

    fn judge(&mut self, frame: &Frame) -> Result<DestinationEvent, ProtocolError> {
        let (kind, phase) = (frame.kind(), self.phase);
        let next = guest_destination_next(self.lanes(), Channel::Control, phase, kind)
            .ok_or_else(|| self.unexpected(kind))?;
        let event = match frame {
            Frame::Hello(offer) => self.hello(offer)?,
            Frame::Regions(regions) => {
                let geometry = Geometry::new(regions.clone())?;
                check_regions(&geometry, self.limits.memory_bytes)?;
                self.geometry = Some(geometry);
                DestinationEvent::Regions
            }
            Frame::RoundBegin { round, units } => {
                let Rounds { begun, acked, .. } = self.rounds;
                if acked != begun {
                    return Err(self.unexpected(kind));
                }
                check_begin(self.memory(), (*round, *units), begun + 1)?;
                self.rounds.begun = *round;
                DestinationEvent::RoundBegun { round: *round, units: *units }
            }
            Frame::RoundEnd { round, units } => {
                if !self.in_round() {
                    return Err(self.unexpected(kind));
                }
                if *round != self.rounds.begun {
                    let due = self.rounds.begun;
                    return Err(ProtocolError::Round { kind, got: *round, due });
                }
                self.rounds.end = Some(*units);
                self.settled()?
            }
            Frame::Data(_) | Frame::Packed(_) | Frame::Zero { .. } | Frame::Poison { .. } => {
                if phase == Phase::Receiving && !self.in_round() {
                    return Err(self.unexpected(kind));
                }
                let agreed = self.agreed.expect("hellos come first");
                let intake = self.intake.as_mut().expect("there are regions");
                DestinationEvent::Page(intake.page(&agreed, phase, frame)?)
            }
            Frame::StateBegin(info) => {
                if self.in_round() {
                    return Err(self.unexpected(kind));
                }
                self.state = Some(Incoming::new(*info, self.limits.state_bytes)?);
                DestinationEvent::Nothing
            }
            Frame::State { offset, bytes } => {
                let state = self.state.as_mut().expect("it has begun");
                state.info.part(*offset, bytes, state.bytes.len() as u64)?;
                state.hasher.update(bytes);
                state.bytes.extend_from_slice(bytes);
                DestinationEvent::Nothing
            }
            Frame::Missing { region, runs } => {
                self.state_complete()?;
                let memory = self.memory.as_ref().expect("there are regions");
                let sets = [&memory.missing, &memory.due];
                self.missing.note(kind, (*region, runs), memory, &sets)?;
                DestinationEvent::Nothing
            }
            Frame::Switch { round, missing } => {
                self.state_complete()?;
                check_switch(self.memory(), self.rounds.begun, (*round, *missing))?;
                self.set_phase(next);
                return self.settled();
            }
            Frame::Run => {
                self.stage = Stage::Started { said: false };
                DestinationEvent::Run
            }
            Frame::Cancel(refusal) => {
                if self.may_run() {
                    let why = "the guest has been given away";
                    return Err(ProtocolError::Contradiction { kind, why });
                }
                self.stage = Stage::Dropped;
                DestinationEvent::Cancelled(refusal.clone())
            }
            Frame::Resume(belief) => {
                if *belief == Belief::Running && !self.may_run() {
                    let why = "the guest has never run here";
                    return Err(ProtocolError::Contradiction { kind, why });
                }
                DestinationEvent::Resumed(*belief)
            }
            Frame::CompleteAck(theirs) => {
                let ours = self.counts();
                if *theirs != ours {
                    return Err(ProtocolError::CompletionMismatch { ours, theirs: *theirs });
                }
                self.completed = true;
                DestinationEvent::Completed
            }
            Frame::Bye => DestinationEvent::Left,
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal.clone())),
            _ => DestinationEvent::Nothing,
        };
        self.set_phase(next);
        Ok(event)
    }

    fn hello(&mut self, offer: &Hello) -> Result<DestinationEvent, ProtocolError> {
        let agreed = self.terms.answer_as(Role::GuestDestination, offer)?;
        if offer.channel != Channel::Control {
            return Err(ProtocolError::BadHello("a session begins with its control connection"));
        }
        if self.session.is_some_and(|session| session != offer.session) {
            return Err(ProtocolError::BadHello("another session is to go on here"));
        }
        self.session = Some(offer.session);
        self.ends = vec![0; agreed.lane.index.into()];
        self.agreed = Some(agreed);
        Ok(DestinationEvent::Agreed)
    }

    /// Whether a round has begun that control has not ended.
    fn in_round(&self) -> bool {
        self.rounds.begun != self.rounds.done && self.rounds.end.is_none()
    }

    fn state_complete(&self) -> Result<(), ProtocolError> {
        self.state.as_ref().expect("it has begun").complete()
    }

    /// The pages that came last on control are where they belong.
    pub fn settle(&mut self) {
        if let Some(intake) = &mut self.intake {
            intake.settle();
        }
    }

    /// A pages connection has ended a round. What came on it before must be in place.
    ///
    /// # Errors
    /// What is wrong with that. The link is of no use any more: see [`lost`](Self::lost).
    pub fn lane_ended(&mut self, end: LaneEnd) -> Result<DestinationEvent, ProtocolError> {
        let phase = self.memory.as_ref().map_or(Phase::Closed, |memory| memory.phase(end.link));
        if !matches!(phase, Phase::Receiving | Phase::Loading | Phase::Settling) {
            // Its connection belongs to a link that is gone.
            return Ok(DestinationEvent::Nothing);
        }
        // A round's beginning may be behind its pages; the one after it begins when this side has
        // said that all of it came.
        let (got, due) = (end.round, self.rounds.acked + 1);
        let settled = if got > due || self.phase != Phase::Receiving && got > self.rounds.begun {
            Err(ProtocolError::Round { kind: Kind::RoundEnd, got, due })
        } else {
            self.ends[usize::from(end.index)] = got;
            self.settled()
        };
        settled.inspect_err(|_| self.set_phase(Phase::Closed))
    }

    /// Looks whether a round has come as a whole, and with it everything there is to come.
    fn settled(&mut self) -> Result<DestinationEvent, ProtocolError> {
        let begun = self.rounds.begun;
        let mut event = DestinationEvent::Nothing;
        if let Some(theirs) = self.rounds.end
            && self.ends.iter().all(|end| *end == begun)
        {
            let ours = self.memory().units.load(Ordering::Acquire);
            if ours != theirs {
                return Err(ProtocolError::Units { kind: Kind::RoundEnd, ours, theirs });
            }
            self.rounds.end = None;
            self.rounds.done = begun;
            event = DestinationEvent::RoundDone;
        }
        if self.phase == Phase::Settling && self.rounds.done == begun {
            let memory = self.memory();
            if let Some((index, unit)) = memory.come.uncovered(&memory.missing) {
                let region = memory.geometry.regions()[index].id;
                return Err(ProtocolError::NeverSent { region, unit });
            }
            self.set_phase(Phase::Restoring);
            event = DestinationEvent::Switched;
        }
        Ok(event)
    }
}
