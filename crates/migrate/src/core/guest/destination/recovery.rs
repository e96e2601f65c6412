//! How a destination goes on after its link is gone, or without the guest.

use std::sync::Arc;

use super::{GuestDestinationSession, Stage};
use crate::core::{
    Frame, Kind, MAX_RUNS, Phase, ProtocolError, UnitRun,
    guest::{
        lane::Intake,
        source::{AfterLoss, no_lanes},
    },
};

impl GuestDestinationSession {
    /// What is here, for a source that is back: `Have` frames and a `HaveEnd`. Everything that had
    /// come must be in place, or given up with its connection.
    pub fn have(&self) -> impl Iterator<Item = Frame> {
        let memory = Arc::clone(self.memory());
        let ids: Vec<u16> = memory.geometry.regions().iter().map(|region| region.id).collect();
        let present = memory.due.capacity() - memory.due.total();
        let poisoned = memory.counts().poisoned;
        let (mut index, mut from) = (0, 0);
        let lists = std::iter::from_fn(move || {
            while index < ids.len() {
                let here = memory.due.runs_from(index, from, false);
                let runs: Vec<UnitRun> = here.take(MAX_RUNS as usize).collect();
                if let Some(last) = runs.last() {
                    from = last.first + last.count;
                    return Some(Frame::Have { region: ids[index], runs });
                }
                (index, from) = (index + 1, 0);
            }
            None
        });
        lists.chain(std::iter::once(Frame::HaveEnd { present, poisoned }))
    }

    /// What follows [`have`](Self::have): `Ready`, `Running`, or `Dropped`, before which nothing
    /// needs to be said. `None` if the guest is still being started, or pages are not settled.
    #[must_use]
    pub fn standing(&self) -> Option<Frame> {
        match self.stage {
            Stage::Early | Stage::Started { said: false } => None,
            Stage::Prepared => self.ready(),
            Stage::Started { said: true } => Some(Frame::Running),
            Stage::Dropped => Some(Frame::Dropped),
        }
    }

    /// This side will never run the guest, for reasons of its own, or because starting it failed
    /// before it ran at all. On a link that is up, `Dropped` or `Error` is to be sent; on one that
    /// comes later, the source will be told.
    ///
    /// # Errors
    /// [`ProtocolError::Contradiction`] if the guest runs.
    pub fn drop_guest(&mut self) -> Result<(), ProtocolError> {
        if self.stage == (Stage::Started { said: true }) {
            let why = "the guest runs";
            return Err(ProtocolError::Contradiction { kind: Kind::Dropped, why });
        }
        self.stage = Stage::Dropped;
        Ok(())
    }

    /// The link is gone, or given up. All [lanes](Self::join) are of no use any more, and are to
    /// be dropped.
    pub fn lost(&mut self) -> AfterLoss {
        self.set_phase(Phase::Closed);
        self.intake = None;
        if let Some(memory) = &self.memory {
            memory.next_link();
        }
        match self.stage {
            _ if self.completed => AfterLoss::Nothing,
            Stage::Early => {
                self.stage = Stage::Dropped;
                AfterLoss::Drop
            }
            Stage::Prepared | Stage::Started { .. } => AfterLoss::Reconnect,
            Stage::Dropped => AfterLoss::Nothing,
        }
    }

    /// A new control connection on which the source's hello is awaited.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] if the link has not been lost, or there is nothing to go on
    /// with; [`ProtocolError::BadLane`] if lanes of the old link still exist.
    pub fn reconnect(&mut self) -> Result<(), ProtocolError> {
        let Some(memory) = self.memory.as_ref().filter(|_| self.phase == Phase::Closed) else {
            return Err(self.unexpected(Kind::Hello));
        };
        if self.completed || self.stage == Stage::Early {
            return Err(self.unexpected(Kind::Hello));
        }
        no_lanes(memory)?;
        memory.next_link();
        self.intake = Some(Intake::new(Arc::clone(memory)));
        self.joined = [0; 2];
        self.have_ended = false;
        self.agreed = None;
        self.set_phase(Phase::Returning);
        Ok(())
    }
}
