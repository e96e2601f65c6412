//! The guest stands still; what the destination needs to run it is sent, and then the guest is
//! given away.

use std::sync::{Arc, atomic::Ordering};

use super::{driver::Driver, link::Link, rounds::unexpected};
use crate::{
    MigrateError,
    core::{Frame, MAX_CHUNK, MAX_RUNS, SourceEvent, StateInfo, StateName, UnitRun},
    guest::{DeviceState, GuestError, status::Stage, units::Units},
    peer::lock,
};

impl Driver {
    /// Stops the guest.
    pub(super) fn stop_guest(&mut self) -> Result<(), MigrateError> {
        let shared = &self.shared;
        if shared.is_called_off() {
            return Err(MigrateError::Cancelled);
        }
        shared.journal.enter(Stage::Switching);
        shared.journal.stopping();
        self.paused = true;
        shared.guest.pause()?;
        Ok(())
    }

    /// Sends what the guest is besides its memory, and what of that is missing; waits until the
    /// destination could run it; and gives it away.
    pub(super) fn hand_over(&mut self, link: &Arc<Link>, round: u32) -> Result<(), MigrateError> {
        let shared = Arc::clone(&self.shared);
        let state = shared.guest.save()?;
        send_state(link, &state, shared.options.max_state)?;
        let missing = self.send_missing(link)?;
        self.switched = true;
        link.send(&Frame::Switch { round: round.into(), missing })?;
        loop {
            let after = shared.options.switch_timeout;
            let left = after.saturating_sub(shared.journal.stopped_for());
            match self.heard("waiting until the destination could run the guest", left) {
                Ok(SourceEvent::Ready) => break,
                // The last round's.
                Ok(SourceEvent::RoundAcked { .. }) => {}
                Ok(SourceEvent::Dropped) => return Err(MigrateError::DroppedThere),
                Ok(other) => return Err(unexpected(&other)),
                Err(MigrateError::TimedOut { what, .. }) => {
                    return Err(MigrateError::TimedOut { what, after });
                }
                Err(error) => return Err(error),
            }
        }
        // Whoever cancels from here on is told that it is too late; whoever did before is heard.
        shared.committed.store(true, Ordering::SeqCst);
        if shared.cancelled.is_stopped() {
            shared.committed.store(false, Ordering::SeqCst);
            return Err(MigrateError::Cancelled);
        }
        if let Err(error) = lock(&shared.session).send(&Frame::Run) {
            shared.committed.store(false, Ordering::SeqCst);
            return Err(error.into());
        }
        // From here on it is not ours, whether or not this arrives.
        let mut run = Vec::new();
        crate::core::Encoder::encode(&Frame::Run, &mut run);
        if let Err(error) = link.control.send_frame(&run) {
            link.fail(error);
        }
        Ok(())
    }

    /// Says what is missing, in whole granules of the destination; returns how many units.
    fn send_missing(&self, link: &Link) -> Result<u64, MigrateError> {
        let shared = &self.shared;
        let grains = shared.grains();
        let mut total = 0;
        for (region, grain) in grains.into_iter().enumerate() {
            for run in shared.unreadable.runs(region, true) {
                shared.dirty.insert(region, run);
            }
            let mut runs: Vec<UnitRun> = Vec::new();
            for run in shared.dirty.runs(region, true) {
                let Units { first, count, .. } = Units::new(region, run).widened(grain);
                match runs.last_mut() {
                    Some(last) if last.first + last.count >= first => {
                        last.count = (first + count).max(last.first + last.count) - last.first;
                    }
                    _ => runs.push(UnitRun { first, count }),
                }
            }
            total += runs.iter().map(|run| run.count).sum::<u64>();
            for runs in runs.chunks(MAX_RUNS as usize) {
                // Regions are counted in 16 bits.
                link.send(&Frame::Missing { region: region as u16, runs: runs.to_vec() })?;
            }
        }
        Ok(total)
    }
}

fn send_state(link: &Link, state: &DeviceState, most: u64) -> Result<(), MigrateError> {
    let refused =
        |why: String| GuestError::State { name: state.name.clone(), version: state.version, why };
    let name = StateName::new(&state.name)
        .ok_or_else(|| refused("its name is not 1 to 16 printable ASCII characters".into()))?;
    if state.bytes.len() as u64 > most {
        return Err(refused(format!("{} bytes, more than {most}", state.bytes.len())).into());
    }
    link.send(&Frame::StateBegin(StateInfo::of(name, state.version, &state.bytes)))?;
    let mut offset = 0;
    for bytes in state.bytes.chunks(MAX_CHUNK as usize) {
        link.send(&Frame::State { offset, bytes: bytes.to_vec() })?;
        offset += bytes.len() as u64;
    }
    Ok(())
}
