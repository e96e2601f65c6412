//! How a source goes on after its link is gone.

use std::sync::{Arc, atomic::Ordering};

use super::{GuestSourceSession, Hold, SourceEvent};
use crate::core::{
    Channel, Counts, Hello, Kind, Lane, Phase, ProtocolError,
    guest::{lane::Outflow, memory::Memory},
};

/// What is to be done once the link is gone.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum AfterLoss {
    /// Source: the guest goes on here as if nothing had been. A destination that waits may be told
    /// so by [`GuestSourceSession::reconnect`] and `Cancel`.
    Keep,
    /// Destination: the guest is to be dropped.
    Drop,
    /// The other side is needed: the source connects anew, the destination waits for that.
    Reconnect,
    /// Nothing.
    Nothing,
}

impl GuestSourceSession {
    /// After a loss, the destination says what it has before it says anything else.
    pub(super) fn compared(&self, kind: Kind) -> Result<(), ProtocolError> {
        let compared = self.having.as_ref().is_some_and(|having| having.ended);
        if self.phase == Phase::Comparing && !compared {
            let why = "the destination has not said what it has";
            return Err(ProtocolError::Contradiction { kind, why });
        }
        Ok(())
    }

    pub(super) fn have_end(
        &mut self,
        present: u64,
        poisoned: u64,
    ) -> Result<SourceEvent, ProtocolError> {
        let kind = Kind::HaveEnd;
        let memory = self.memory.as_ref().expect("there are regions");
        let having = self.having.as_mut().filter(|having| !having.ended);
        let Some(having) = having else { return Err(self.unexpected(kind)) };
        let ours = having.set.total();
        if present != ours {
            return Err(ProtocolError::Units { kind, ours, theirs: present });
        }
        // Everything that is not there now was missing at the switch.
        if let Some((index, unit)) = having.set.uncovered(&memory.missing) {
            let region = self.geometry.regions()[index].id;
            return Err(ProtocolError::NeverSent { region, unit });
        }
        let absent = having.set.capacity() - present;
        let answered = memory.missing.total() - absent;
        let Some(filled) = answered.checked_sub(poisoned) else {
            return Err(ProtocolError::Units { kind, ours: answered, theirs: poisoned });
        };
        memory.due.become_complement(&having.set);
        memory.set_counts(Counts { filled, poisoned });
        having.ended = true;
        Ok(SourceEvent::Nothing)
    }

    /// The link is gone, or given up. All [lanes](Self::lane) are of no use any more, and are to
    /// be dropped.
    pub fn lost(&mut self) -> AfterLoss {
        self.set_phase(Phase::Closed);
        if let Some(memory) = &self.memory {
            memory.next_link();
        }
        match self.hold() {
            _ if self.completed => AfterLoss::Nothing,
            Hold::Ours => AfterLoss::Keep,
            Hold::Unknown | Hold::Theirs => AfterLoss::Reconnect,
        }
    }

    /// A new control connection to the same destination, with these numbers of further ones: send
    /// the hello it returns. Then, `Resume` with [`belief`](Self::belief); or `Cancel`, if the
    /// guest is here.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] if the link has not been lost, or there is nothing to go on
    /// with; [`ProtocolError::BadLane`] if lanes of the old link still exist.
    pub fn reconnect(&mut self, lanes: Lane) -> Result<Hello, ProtocolError> {
        if self.phase != Phase::Closed || self.completed {
            return Err(self.unexpected(Kind::Hello));
        }
        let offer = Hello { lane: lanes, ..self.offer };
        offer.check_lane()?;
        let Some(memory) = &self.memory else { return Err(self.unexpected(Kind::Hello)) };
        no_lanes(memory)?;
        self.outflow = Some(Outflow::new(Arc::clone(memory)));
        memory.next_link();
        self.offer = offer;
        self.agreed = None;
        self.having = None;
        self.set_phase(Phase::Returning);
        Ok(self.offer)
    }

    /// Takes the guest back although it was given away: somebody who knows states that the
    /// destination is gone for good. If it is not, two copies may run.
    ///
    /// # Errors
    /// [`ProtocolError::Contradiction`] if the guest has been heard of at the destination: what it
    /// did there cannot be taken back.
    pub fn reclaim(&mut self) -> Result<(), ProtocolError> {
        if self.hold() == Hold::Theirs {
            let why = "the guest has run at the destination";
            return Err(ProtocolError::Contradiction { kind: Kind::Run, why });
        }
        self.lost();
        self.hold = Hold::Ours;
        Ok(())
    }
}

/// The connections of a link that is gone may not be in use any more.
pub(in crate::core::guest) fn no_lanes(memory: &Memory) -> Result<(), ProtocolError> {
    match memory.lanes.load(Ordering::Acquire) {
        0 => Ok(()),
        n => Err(ProtocolError::BadLane {
            channel: Channel::Pages,
            index: 0,
            of: u16::try_from(n).unwrap_or(u16::MAX),
            why: "connections of the link that was lost are still in use",
        }),
    }
}
