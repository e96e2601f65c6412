//! The source's end of a guest's session: its control connection, and who has the guest.

mod recovery;

use std::sync::{Arc, atomic::Ordering};

pub use recovery::AfterLoss;
pub(super) use recovery::no_lanes;

use super::{
    AcceptedRegion, Belief, StateInfo, UnitSet,
    lane::{Outflow, SourceLane, SourceLaneEvent},
    memory::{Memory, RunOrder, check_regions},
    table::{guest_source_next, guest_source_sends},
};
use crate::core::{
    Channel, Counts, Frame, Geometry, Hello, Kind, Lane, Phase, ProtocolError, RegionInfo, Role,
    SessionId, Terms,
};

/// Who may run the guest, as far as the source knows.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Hold {
    /// The source, and nobody else.
    Ours,
    /// It was given away, and nothing was heard since: the destination may run it, or may not have
    /// been told yet.
    Unknown,
    /// The destination has started it.
    Theirs,
}

/// What came on the control connection of a source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceEvent {
    /// Nothing to do. After a `Ping`, a `Pong` is due.
    Nothing,
    /// The hellos have been said: send `Regions`, or after a loss `Resume` or `Cancel`.
    Agreed,
    /// The destination has made room: connect the lanes, begin the rounds.
    Accepted,
    /// The round begun last has come as a whole.
    RoundAcked {
        /// Which.
        round: u64,
        /// Units that have come since the session began.
        units: u64,
    },
    /// The destination could run the guest: send `Run` or `Cancel`.
    Ready,
    /// The guest runs at the destination: send what it does not have.
    Running,
    /// The guest never ran at the destination and never will: it goes on here.
    Dropped,
    /// The destination has dropped the guest, as it was told.
    Cancelled,
    /// Everything is there, by both sides' counts: send `CompleteAck`.
    Completed(Counts),
    /// A request came on control, in a session without faults connections.
    Lane(SourceLaneEvent),
    /// The peer leaves.
    Left,
}

/// Rounds of pre-copy, as the source drives them.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
struct Rounds {
    begun: u64,
    ended: u64,
    acked: u64,
}

/// What one side says that it has, as it is said.
#[derive(Debug)]
struct Having {
    set: UnitSet,
    order: RunOrder,
    ended: bool,
}

/// A source's control connection, and everything about the session that outlives it.
///
/// Every frame goes through [`send`](Self::send) before it is sent, and through
/// [`receive`](Self::receive) when it has come. After a violation or a loss, call
/// [`lost`](Self::lost).
#[derive(Debug)]
pub struct GuestSourceSession {
    terms: Terms,
    geometry: Geometry,
    offer: Hello,
    agreed: Option<Hello>,
    phase: Phase,
    hold: Hold,
    completed: bool,
    acknowledged: bool,
    memory: Option<Arc<Memory>>,
    outflow: Option<Outflow>,
    rounds: Rounds,
    /// The device state and how much of it has been sent.
    state: Option<(StateInfo, u64)>,
    missing: RunOrder,
    having: Option<Having>,
}

impl GuestSourceSession {
    /// A session that is about to begin, with `lanes` for the numbers of further connections. Send
    /// [`offer`](Self::offer) first.
    ///
    /// # Errors
    /// What is wrong with the regions or the numbers.
    pub fn new(
        terms: Terms,
        session: SessionId,
        lanes: Lane,
        regions: Vec<RegionInfo>,
    ) -> Result<Self, ProtocolError> {
        let geometry = Geometry::new(regions)?;
        check_regions(&geometry, u64::MAX)?;
        let mut offer = terms.offer(Role::GuestSource, Channel::Control, session);
        offer.lane = lanes;
        offer.check_lane()?;
        Ok(Self {
            terms,
            geometry,
            offer,
            agreed: None,
            phase: Phase::Greeting,
            hold: Hold::Ours,
            completed: false,
            acknowledged: false,
            memory: None,
            outflow: None,
            rounds: Rounds::default(),
            state: None,
            missing: RunOrder::default(),
            having: None,
        })
    }

    /// A session of its own in the same state, without further connections.
    #[cfg(test)]
    pub(super) fn fork(&self) -> Self {
        let memory = self.memory.as_ref().map(|memory| Arc::new(memory.fork()));
        let having = self.having.as_ref().map(|having| Having {
            set: having.set.fork(),
            order: having.order.clone(),
            ended: having.ended,
        });
        Self {
            geometry: self.geometry.clone(),
            outflow: self.outflow.as_ref().zip(memory.clone()).map(|(o, memory)| o.fork(memory)),
            memory,
            missing: self.missing.clone(),
            having,
            ..*self
        }
    }

    /// The hello to send.
    #[must_use]
    pub fn offer(&self) -> Hello {
        self.offer
    }

    /// Where the session stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The destination's hello, once it has come.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// Who may run the guest.
    #[must_use]
    pub fn hold(&self) -> Hold {
        let proof = self.memory.as_ref().is_some_and(|m| m.proof.load(Ordering::Acquire));
        if self.hold == Hold::Unknown && proof { Hold::Theirs } else { self.hold }
    }

    /// Whether the guest may run here. While the session stops it, that it does not is the
    /// embedder's business.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.hold == Hold::Ours
    }

    /// What to say on coming back after a loss; `None` if the guest is here.
    #[must_use]
    pub fn belief(&self) -> Option<Belief> {
        match self.hold() {
            Hold::Ours => None,
            Hold::Unknown => Some(Belief::Given),
            Hold::Theirs => Some(Belief::Running),
        }
    }

    /// The `Regions` frame.
    #[must_use]
    pub fn regions(&self) -> Frame {
        Frame::Regions(self.geometry.regions().to_vec())
    }

    /// The regions.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The destination's granules, by region, once they are known.
    #[must_use]
    pub fn granules(&self) -> &[AcceptedRegion] {
        self.memory.as_ref().map_or(&[], |memory| &memory.granules)
    }

    /// Units sent in rounds on all connections: to be said when a round ends on control.
    #[must_use]
    pub fn totals(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.units.load(Ordering::Acquire))
    }

    /// What the destination does not have and nobody has sent: filled by the `Missing` frames and,
    /// after a loss, by what the destination says that it has, while nobody may be claiming.
    /// Whoever [claims](UnitSet::claim) a granule sends it.
    ///
    /// # Panics
    /// Before the regions are accepted.
    #[must_use]
    pub fn to_send(&self) -> &Arc<UnitSet> {
        &self.memory().due
    }

    /// How much of what was missing at the switch has been sent, or is known to be there.
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

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("the tables let nothing of this come before Accept")
    }

    /// One of the further connections of the session. Its hello is its
    /// [`offer`](SourceLane::offer).
    ///
    /// # Errors
    /// [`ProtocolError::BadLane`] if the session has no such connection, or none yet.
    pub fn lane(&self, channel: Channel, index: u16) -> Result<SourceLane, ProtocolError> {
        let of = match channel {
            Channel::Pages => self.offer.lane.index,
            Channel::Faults => self.offer.lane.of,
            _ => 0,
        };
        let live = !matches!(self.phase, Phase::Closed | Phase::Greeting | Phase::Returning);
        match &self.memory {
            Some(memory) if live && index < of => {
                let lane = Lane { index, of };
                Ok(SourceLane::new(memory, self.terms, Hello { channel, lane, ..self.offer }))
            }
            _ => {
                let why = "the session has no such connection now";
                Err(ProtocolError::BadLane { channel, index, of, why })
            }
        }
    }

    /// Takes note of a frame that is about to be sent on control. `Run` is the point of no return.
    ///
    /// # Errors
    /// Why the peer would refuse it. It may not be sent then.
    pub fn send(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let kind = frame.kind();
        let next = guest_source_sends(self.offer.lane, Channel::Control, self.phase, kind)
            .ok_or_else(|| self.unexpected(kind))?;
        match frame {
            Frame::Regions(regions) if regions != self.geometry.regions() => {
                let why = "not the regions that the session is about";
                return Err(ProtocolError::BadRegion { id: 0, why });
            }
            Frame::RoundBegin { round, units } => self.begin_round(*round, *units)?,
            Frame::RoundEnd { round, units } => self.end_round(*round, *units)?,
            Frame::StateBegin(info) => {
                if self.rounds.begun != self.rounds.ended {
                    return Err(self.unexpected(kind));
                }
                self.state = Some((*info, 0));
            }
            Frame::State { offset, bytes } => {
                let (info, sent) = self.state.as_mut().expect("it has begun");
                *sent = info.part(*offset, bytes, *sent)?;
            }
            Frame::Missing { region, runs } => {
                self.state_sent()?;
                let memory = self.memory.as_ref().expect("there are regions");
                let sets = [&memory.missing, &memory.due];
                self.missing.note(kind, (*region, runs), memory, &sets)?;
            }
            Frame::Switch { round, missing } => {
                self.state_sent()?;
                check_switch(self.memory(), self.rounds.begun, (*round, *missing))?;
            }
            Frame::Run => self.hold = Hold::Unknown,
            Frame::Cancel(_) if self.hold != Hold::Ours => {
                let why = "the guest has been given away";
                return Err(ProtocolError::Contradiction { kind, why });
            }
            Frame::Resume(belief) => {
                if self.belief() != Some(*belief) {
                    let why = "that is not what this side believes";
                    return Err(ProtocolError::Contradiction { kind, why });
                }
                let set = self.memory().due.empty_like();
                self.having = Some(Having { set, order: RunOrder::default(), ended: false });
            }
            Frame::CompleteAck(theirs) => {
                let ours = self.counts();
                if *theirs != ours {
                    return Err(ProtocolError::CompletionMismatch { ours, theirs: *theirs });
                }
                if std::mem::replace(&mut self.acknowledged, true) {
                    return Err(self.unexpected(kind));
                }
            }
            Frame::Data(_) | Frame::Packed(_) | Frame::Zero { .. } | Frame::Poison { .. } => {
                // A page of a round belongs to one.
                if self.phase == Phase::Copying && self.rounds.begun == self.rounds.ended {
                    return Err(self.unexpected(kind));
                }
                let agreed = self.agreed.unwrap_or(self.offer);
                let outflow = self.outflow.as_mut().expect("there are regions");
                outflow.send(&agreed, self.phase, frame)?;
            }
            _ => {}
        }
        self.set_phase(next);
        Ok(())
    }

    fn begin_round(&mut self, round: u64, units: u64) -> Result<(), ProtocolError> {
        let kind = Kind::RoundBegin;
        let Rounds { begun, ended, acked } = self.rounds;
        if begun != ended || acked != begun {
            return Err(self.unexpected(kind));
        }
        check_begin(self.memory(), (round, units), begun + 1)?;
        self.rounds.begun = round;
        Ok(())
    }

    fn end_round(&mut self, round: u64, units: u64) -> Result<(), ProtocolError> {
        let kind = Kind::RoundEnd;
        let Rounds { begun, ended, .. } = self.rounds;
        if begun == ended {
            return Err(self.unexpected(kind));
        }
        if round != begun {
            return Err(ProtocolError::Round { kind, got: round, due: begun });
        }
        let ours = self.totals();
        if units != ours {
            return Err(ProtocolError::Units { kind, ours, theirs: units });
        }
        self.rounds.ended = round;
        Ok(())
    }

    fn state_sent(&self) -> Result<(), ProtocolError> {
        match &self.state {
            Some((info, sent)) if *sent == info.length => Ok(()),
            _ => Err(ProtocolError::BadState("not all of it has come")),
        }
    }

    /// Takes note of a frame that has come on control.
    ///
    /// # Errors
    /// What is wrong with it; for an `Error` frame, [`ProtocolError::Refused`]. The link is of no
    /// use any more: see [`lost`](Self::lost).
    pub fn receive(&mut self, frame: &Frame) -> Result<SourceEvent, ProtocolError> {
        self.judge(frame).inspect_err(|_| self.set_phase(Phase::Closed))
    }

    fn judge(&mut self, frame: &Frame) -> Result<SourceEvent, ProtocolError> {
        let (kind, phase) = (frame.kind(), self.phase);
        let next = guest_source_next(self.offer.lane, Channel::Control, phase, kind)
            .ok_or_else(|| self.unexpected(kind))?;
        let event = match frame {
            // What was said before it was heard that the source has given up.
            _ if phase == Phase::Cancelling && kind != Kind::Error => match kind {
                Kind::Cancelled => SourceEvent::Cancelled,
                Kind::Bye => SourceEvent::Left,
                _ => SourceEvent::Nothing,
            },
            Frame::Hello(answer) => {
                self.terms.accept(&self.offer, answer)?;
                self.agreed = Some(*answer);
                SourceEvent::Agreed
            }
            Frame::Accept(regions) => {
                let memory = Arc::new(Memory::new(&self.geometry, regions, false)?);
                self.outflow = Some(Outflow::new(Arc::clone(&memory)));
                self.memory = Some(memory);
                SourceEvent::Accepted
            }
            Frame::RoundAck { round, units } => self.round_acked(*round, *units)?,
            Frame::Ready { missing } => self.ready(*missing)?,
            Frame::Running => {
                self.compared(kind)?;
                self.hold = Hold::Theirs;
                SourceEvent::Running
            }
            Frame::Dropped => {
                if self.hold() == Hold::Theirs {
                    let why = "the guest has been heard of";
                    return Err(ProtocolError::Contradiction { kind, why });
                }
                self.hold = Hold::Ours;
                SourceEvent::Dropped
            }
            Frame::Complete(counts) => self.complete(*counts)?,
            Frame::Have { region, runs } => {
                let memory = self.memory.as_ref().expect("there are regions");
                let having = self.having.as_mut().filter(|having| !having.ended);
                let Some(having) = having else { return Err(self.unexpected(kind)) };
                let set = [&having.set];
                having.order.note(kind, (*region, runs), memory, &set)?;
                SourceEvent::Nothing
            }
            Frame::HaveEnd { present, poisoned } => self.have_end(*present, *poisoned)?,
            Frame::Request { .. } | Frame::Expedite { .. } => {
                let outflow = self.outflow.as_ref().expect("there are regions");
                SourceEvent::Lane(outflow.asked(phase, frame)?)
            }
            Frame::Bye => SourceEvent::Left,
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal.clone())),
            _ => SourceEvent::Nothing,
        };
        self.set_phase(next);
        Ok(event)
    }

    fn round_acked(&mut self, round: u64, theirs: u64) -> Result<SourceEvent, ProtocolError> {
        let kind = Kind::RoundAck;
        let Rounds { ended, acked, .. } = self.rounds;
        if acked == ended {
            return Err(self.unexpected(kind));
        }
        if round != ended {
            return Err(ProtocolError::Round { kind, got: round, due: ended });
        }
        let ours = self.totals();
        if theirs != ours {
            return Err(ProtocolError::Units { kind, ours, theirs });
        }
        self.rounds.acked = round;
        Ok(SourceEvent::RoundAcked { round, units: theirs })
    }

    fn ready(&mut self, theirs: u64) -> Result<SourceEvent, ProtocolError> {
        let kind = Kind::Ready;
        self.compared(kind)?;
        if self.hold() == Hold::Theirs {
            let why = "the guest has been heard of, and cannot be waiting";
            return Err(ProtocolError::Contradiction { kind, why });
        }
        let ours = self.memory().due.total();
        if theirs != ours {
            return Err(ProtocolError::Units { kind, ours, theirs });
        }
        // Run, if it was sent, was never read, and what carried it is gone.
        self.hold = Hold::Ours;
        self.rounds.acked = self.rounds.ended;
        Ok(SourceEvent::Ready)
    }

    fn complete(&mut self, theirs: Counts) -> Result<SourceEvent, ProtocolError> {
        let (ours, left) = (self.counts(), self.memory().due.total());
        if left > 0 {
            return Err(ProtocolError::Units { kind: Kind::Complete, ours: left, theirs: 0 });
        }
        if theirs != ours {
            return Err(ProtocolError::CompletionMismatch { ours, theirs });
        }
        self.completed = true;
        Ok(SourceEvent::Completed(ours))
    }
}

/// Checks a round's beginning, of which both sides think the same.
pub(super) fn check_begin(
    memory: &Memory,
    (round, units): (u64, u64),
    due: u64,
) -> Result<(), ProtocolError> {
    let kind = Kind::RoundBegin;
    if round != due {
        return Err(ProtocolError::Round { kind, got: round, due });
    }
    let most = memory.missing.capacity();
    if units > most {
        return Err(ProtocolError::Units { kind, ours: most, theirs: units });
    }
    Ok(())
}

/// Compares what the switch says with what came before it.
pub(super) fn check_switch(
    memory: &Memory,
    begun: u64,
    (round, missing): (u64, u64),
) -> Result<(), ProtocolError> {
    let kind = Kind::Switch;
    if round != begun {
        return Err(ProtocolError::Round { kind, got: round, due: begun });
    }
    let ours = memory.missing.total();
    if missing != ours {
        return Err(ProtocolError::Units { kind, ours, theirs: missing });
    }
    Ok(())
}
