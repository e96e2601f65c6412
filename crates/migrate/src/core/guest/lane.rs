//! The further connections of a guest's session, at both ends.

use std::sync::{Arc, atomic::Ordering};

use super::{
    UnitRun,
    memory::{Carrier, Memory, stopped},
    table::{
        guest_destination_next, guest_destination_sends, guest_source_next, guest_source_sends,
    },
};
use crate::core::{Channel, Frame, Hello, Kind, Phase, ProtocolError, Terms, WireSpan};

/// Where the bytes of a frame of pages belong.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Into memory that no guest uses yet; later rounds may bring the same units again.
    Copy,
    /// Into granules that are missing, which nothing else brings.
    Install {
        /// The granules are whole with this frame.
        last: bool,
    },
}

/// A pages connection has ended a round.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct LaneEnd {
    pub(super) index: u16,
    pub(super) round: u64,
    pub(super) link: u64,
}

/// What came on a connection of a destination.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum DestinationLaneEvent {
    /// Nothing to do. After a `Ping`, a `Pong` is due.
    Nothing,
    /// Pages. Once they are in place, call `settle`.
    Page(Placement),
    /// A round has ended here: for
    /// [`GuestDestinationSession::lane_ended`](super::GuestDestinationSession::lane_ended).
    RoundEnded(LaneEnd),
    /// The peer leaves.
    Left,
}

/// What came on a connection of a source.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum SourceLaneEvent {
    /// Nothing to do. After a `Ping`, a `Pong` is due.
    Nothing,
    /// The hellos have been said.
    Agreed,
    /// Whole granules are wanted. What of them has been sent before is on its way.
    Request {
        /// Which.
        span: WireSpan,
        /// Nobody waits for them yet.
        prefetch: bool,
    },
    /// Somebody now waits for what was requested as a prefetch.
    Expedite {
        /// What is waited for.
        span: WireSpan,
    },
    /// The peer leaves.
    Left,
}

/// The pages that come on one connection, and which of them are not in place yet.
#[derive(Debug)]
pub(super) struct Intake {
    memory: Arc<Memory>,
    carrier: Carrier,
    /// Granules that have begun to come.
    in_flight: Option<(usize, UnitRun)>,
    /// What the frame before was, until it is in place: `Some(poisoned)` if it was the last one
    /// of what is in flight.
    unsettled: Option<Option<bool>>,
}

impl Intake {
    pub(super) fn new(memory: Arc<Memory>) -> Self {
        Self { memory, carrier: Carrier::default(), in_flight: None, unsettled: None }
    }

    /// The same, for a copy of the memory.
    #[cfg(test)]
    pub(super) fn fork(&self, memory: Arc<Memory>) -> Self {
        let carrier = self.carrier.clone();
        Self { memory, carrier, in_flight: self.in_flight, unsettled: self.unsettled }
    }

    pub(super) fn page(
        &mut self,
        agreed: &Hello,
        phase: Phase,
        frame: &Frame,
    ) -> Result<Placement, ProtocolError> {
        assert!(self.unsettled.is_none(), "the pages before are not settled");
        let memory = &self.memory;
        if !stopped(phase) {
            let page = self.carrier.page(memory, agreed, false, frame)?;
            memory.come.insert(page.index, page.run);
            self.carrier.carried(memory, page.run);
            return Ok(Placement::Copy);
        }
        let page = self.carrier.page(memory, agreed, true, frame)?;
        if page.first {
            memory.due.take(page.index, page.run).map_err(|granule| {
                let region = memory.geometry.regions()[page.index].id;
                let count = page.run.count as u32;
                let span = WireSpan { region, first: page.run.first, count };
                ProtocolError::Unsolicited { span, granule }
            })?;
            memory.unsettled.fetch_add(page.run.count, Ordering::AcqRel);
            self.in_flight = Some((page.index, page.run));
        }
        self.unsettled = Some(page.last.then_some(page.poisoned));
        Ok(Placement::Install { last: page.last })
    }

    pub(super) fn settle(&mut self) {
        let Some(Some(poisoned)) = self.unsettled.take() else { return };
        let Some((index, run)) = self.in_flight.take() else { return };
        self.memory.asked.remove(index, run);
        self.memory.count(run.count, poisoned);
        self.memory.unsettled.fetch_sub(run.count, Ordering::AcqRel);
    }

    pub(super) fn end(&mut self, round: u64, units: u64) -> Result<(), ProtocolError> {
        self.carrier.end(round, units)
    }
}

impl Drop for Intake {
    /// What never came as a whole is missing again.
    fn drop(&mut self) {
        if let Some((index, run)) = self.in_flight.take() {
            self.memory.due.insert(index, run);
            self.memory.unsettled.fetch_sub(run.count, Ordering::AcqRel);
        }
    }
}

/// Checks a request or an expedite, and returns what is wanted.
pub(super) fn check_ask(
    memory: &Memory,
    frame: &Frame,
) -> Result<Option<(usize, UnitRun)>, ProtocolError> {
    match frame {
        Frame::Request { span, .. } | Frame::Expedite { span } => {
            memory.whole(frame.kind(), *span).map(Some)
        }
        _ => Ok(None),
    }
}

/// Notes that a destination asks for something. What has come before is no longer waited for, but
/// may be marked again here.
pub(super) fn asking(memory: &Memory, frame: &Frame) -> Result<(), ProtocolError> {
    if let Some((index, run)) = check_ask(memory, frame)?
        && frame.kind() == Kind::Request
    {
        memory.asked.insert(index, run);
    }
    Ok(())
}

/// A further connection of a destination. To be dropped when its connection has ended.
#[derive(Debug)]
pub struct DestinationLane {
    agreed: Hello,
    link: u64,
    intake: Intake,
    closed: bool,
}

impl DestinationLane {
    pub(super) fn new(memory: &Arc<Memory>, agreed: Hello) -> Self {
        memory.lanes.fetch_add(1, Ordering::AcqRel);
        let intake = Intake::new(Arc::clone(memory));
        Self { agreed, link: memory.link(), intake, closed: false }
    }

    /// The answer to the peer's hello, to be sent first.
    #[must_use]
    pub fn agreed(&self) -> &Hello {
        &self.agreed
    }

    /// Where the session stands, as far as this connection is concerned.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.closed { Phase::Closed } else { self.intake.memory.phase(self.link) }
    }

    fn unexpected(&self, kind: Kind, phase: Phase) -> ProtocolError {
        ProtocolError::Unexpected { kind, channel: self.agreed.channel, phase }
    }

    /// Takes note of a frame that is about to be sent.
    ///
    /// # Errors
    /// Why the peer would refuse it. Nothing has changed then, and it may not be sent.
    pub fn send(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let (kind, phase, channel) = (frame.kind(), self.phase(), self.agreed.channel);
        let next = guest_destination_sends(self.agreed.lane, channel, phase, kind)
            .ok_or_else(|| self.unexpected(kind, phase))?;
        asking(&self.intake.memory, frame)?;
        self.closed = next == Phase::Closed;
        Ok(())
    }

    /// Takes note of a frame that has come.
    ///
    /// # Errors
    /// What is wrong with it; for an `Error` frame, [`ProtocolError::Refused`]. The whole link is
    /// of no use any more.
    ///
    /// # Panics
    /// If the pages that came before have not been [settled](Self::settle).
    pub fn receive(&mut self, frame: &Frame) -> Result<DestinationLaneEvent, ProtocolError> {
        self.judge(frame).inspect_err(|_| self.closed = true)
    }

    fn judge(&mut self, frame: &Frame) -> Result<DestinationLaneEvent, ProtocolError> {
        let (kind, phase, channel) = (frame.kind(), self.phase(), self.agreed.channel);
        guest_destination_next(self.agreed.lane, channel, phase, kind)
            .ok_or_else(|| self.unexpected(kind, phase))?;
        Ok(match frame {
            Frame::RoundEnd { round, units } => {
                self.intake.end(*round, *units)?;
                let (index, link) = (self.agreed.lane.index, self.link);
                DestinationLaneEvent::RoundEnded(LaneEnd { index, round: *round, link })
            }
            Frame::Data(_) | Frame::Packed(_) | Frame::Zero { .. } | Frame::Poison { .. } => {
                DestinationLaneEvent::Page(self.intake.page(&self.agreed, phase, frame)?)
            }
            Frame::Bye => {
                self.closed = true;
                DestinationLaneEvent::Left
            }
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal.clone())),
            _ => DestinationLaneEvent::Nothing,
        })
    }

    /// The pages that came last are where they belong.
    pub fn settle(&mut self) {
        self.intake.settle();
    }
}

impl Drop for DestinationLane {
    fn drop(&mut self) {
        self.intake.memory.lanes.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The pages that leave on one connection.
#[derive(Debug)]
pub(super) struct Outflow {
    pub(super) memory: Arc<Memory>,
    carrier: Carrier,
}

impl Outflow {
    pub(super) fn new(memory: Arc<Memory>) -> Self {
        Self { memory, carrier: Carrier::default() }
    }

    /// The same, for a copy of the memory.
    #[cfg(test)]
    pub(super) fn fork(&self, memory: Arc<Memory>) -> Self {
        Self { memory, carrier: self.carrier.clone() }
    }

    /// Units sent in rounds.
    pub(super) fn units(&self) -> u64 {
        self.carrier.units
    }

    /// Checks a frame of pages or a round's end that is about to be sent, and counts it.
    pub(super) fn send(
        &mut self,
        agreed: &Hello,
        phase: Phase,
        frame: &Frame,
    ) -> Result<(), ProtocolError> {
        match frame {
            Frame::RoundEnd { round, units } => self.carrier.end(*round, *units),
            Frame::Data(_) | Frame::Packed(_) | Frame::Zero { .. } | Frame::Poison { .. } => {
                let stopped = stopped(phase);
                let page = self.carrier.page(&self.memory, agreed, stopped, frame)?;
                if !stopped {
                    self.carrier.carried(&self.memory, page.run);
                } else if page.last {
                    self.memory.count(page.run.count, page.poisoned);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes note of what a destination asks for.
    pub(super) fn asked(
        &self,
        phase: Phase,
        frame: &Frame,
    ) -> Result<SourceLaneEvent, ProtocolError> {
        check_ask(&self.memory, frame)?;
        if phase == Phase::Committing {
            self.memory.proof.store(true, Ordering::Release);
        }
        Ok(match frame {
            Frame::Request { span, prefetch } => {
                SourceLaneEvent::Request { span: *span, prefetch: *prefetch }
            }
            Frame::Expedite { span } => SourceLaneEvent::Expedite { span: *span },
            _ => SourceLaneEvent::Nothing,
        })
    }
}

/// A further connection of a source. To be dropped when its connection has ended.
#[derive(Debug)]
pub struct SourceLane {
    terms: Terms,
    offer: Hello,
    agreed: Option<Hello>,
    link: u64,
    outflow: Outflow,
    closed: bool,
}

impl SourceLane {
    pub(super) fn new(memory: &Arc<Memory>, terms: Terms, offer: Hello) -> Self {
        memory.lanes.fetch_add(1, Ordering::AcqRel);
        let outflow = Outflow::new(Arc::clone(memory));
        Self { terms, offer, agreed: None, link: memory.link(), outflow, closed: false }
    }

    /// The hello to send.
    #[must_use]
    pub fn offer(&self) -> Hello {
        self.offer
    }

    /// The destination's hello, once it has come.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// Where the session stands, as far as this connection is concerned.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match (self.closed, self.outflow.memory.phase(self.link)) {
            (true, _) | (_, Phase::Closed) => Phase::Closed,
            (_, phase) if self.agreed.is_some() => phase,
            _ => Phase::Greeting,
        }
    }

    /// Units sent in rounds on this connection; to be said when one ends.
    #[must_use]
    pub fn units(&self) -> u64 {
        self.outflow.units()
    }

    fn unexpected(&self, kind: Kind, phase: Phase) -> ProtocolError {
        ProtocolError::Unexpected { kind, channel: self.channel(), phase }
    }

    fn channel(&self) -> Channel {
        self.offer.channel
    }

    /// Takes note of a frame that is about to be sent.
    ///
    /// # Errors
    /// Why the peer would refuse it. It may not be sent then.
    pub fn send(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let (kind, phase) = (frame.kind(), self.phase());
        let next = guest_source_sends(self.offer.lane, self.channel(), phase, kind)
            .ok_or_else(|| self.unexpected(kind, phase))?;
        let agreed = self.agreed.unwrap_or(self.offer);
        self.outflow.send(&agreed, phase, frame)?;
        self.closed = next == Phase::Closed;
        Ok(())
    }

    /// Takes note of a frame that has come.
    ///
    /// # Errors
    /// What is wrong with it; for an `Error` frame, [`ProtocolError::Refused`]. The whole link is
    /// of no use any more.
    pub fn receive(&mut self, frame: &Frame) -> Result<SourceLaneEvent, ProtocolError> {
        self.judge(frame).inspect_err(|_| self.closed = true)
    }

    fn judge(&mut self, frame: &Frame) -> Result<SourceLaneEvent, ProtocolError> {
        let (kind, phase) = (frame.kind(), self.phase());
        guest_source_next(self.offer.lane, self.channel(), phase, kind)
            .ok_or_else(|| self.unexpected(kind, phase))?;
        match frame {
            Frame::Hello(answer) => {
                self.terms.accept(&self.offer, answer)?;
                self.agreed = Some(*answer);
                Ok(SourceLaneEvent::Agreed)
            }
            Frame::Bye => {
                self.closed = true;
                Ok(SourceLaneEvent::Left)
            }
            Frame::Error(refusal) => Err(ProtocolError::Refused(refusal.clone())),
            _ => self.outflow.asked(phase, frame),
        }
    }
}

impl Drop for SourceLane {
    fn drop(&mut self) {
        self.outflow.memory.lanes.fetch_sub(1, Ordering::AcqRel);
    }
}
