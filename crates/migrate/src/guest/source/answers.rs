//! What the destination asks for, it gets, ahead of everything else.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::{
    link::{Lane, Link},
    sender::{How, Out, Sender},
};
use crate::{
    MigrateError,
    core::{SourceLaneEvent, WireSpan},
    guest::{status::add, units::Units},
    net::FrameReader,
    peer::lock,
};

/// Answers on one connection.
pub(super) struct Answerer {
    link: Arc<Link>,
    sender: Sender,
}

impl Answerer {
    fn new(link: &Arc<Link>, out: Out) -> Self {
        let mut sender = Sender::for_answers(link, out);
        sender.only_whole(&link.shared.grains());
        Self { link: Arc::clone(link), sender }
    }

    /// Answers on control, where nothing else carries answers.
    pub(super) fn on_control(link: &Arc<Link>) -> Self {
        Self::new(link, Out::Control)
    }

    /// Adds the answer to what was asked; it goes with [`flush`](Self::flush).
    pub(super) fn hear(&mut self, event: SourceLaneEvent) -> Result<(), MigrateError> {
        match event {
            SourceLaneEvent::Request { span, .. } => self.answer(span),
            SourceLaneEvent::Expedite { span } => {
                self.link.shared.hint(Units::of_wire(span));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn answer(&mut self, span: WireSpan) -> Result<(), MigrateError> {
        let shared = Arc::clone(&self.link.shared);
        add(&shared.counts.requests, 1);
        let asked = Units::of_wire(span);
        let to_send = shared.to_send();
        let mut sent = 0;
        // What is not there any more is on its way.
        while let Some(run) = to_send.claim(asked.region, asked.run()) {
            let run = Units::new(asked.region, run);
            sent += run.count;
            self.sender.send(run, How::Urgent, None)?;
        }
        add(&shared.counts.demanded, sent);
        add(&shared.counts.overtaken, asked.count - sent.min(asked.count));
        shared.hint(Units { first: asked.end(), ..asked });
        Ok(())
    }

    /// Sends what was added.
    pub(super) fn flush(&mut self) -> Result<(), MigrateError> {
        self.sender.flush(None)
    }
}

/// Answers what is asked on a lane, until it ends.
pub(super) fn serve(
    link: &Arc<Link>,
    lane: &Arc<Lane>,
    mut reader: FrameReader,
) -> Result<(), MigrateError> {
    let mut answerer = None;
    loop {
        // Nobody need ask for anything: whether the other side is there, control finds out.
        let frame = reader.next(&mut |_| match link.is_over() {
            true => Err(MigrateError::Closed),
            false => Ok(()),
        })?;
        let event = lock(&lane.state).receive(&frame)?;
        match event {
            SourceLaneEvent::Left => return Ok(()),
            SourceLaneEvent::Nothing => {}
            event => {
                let answerer = answerer
                    .get_or_insert_with(|| Answerer::new(link, Out::Lane(Arc::clone(lane))));
                answerer.hear(event)?;
                if !reader.has_frame() {
                    answerer.flush()?;
                }
            }
        }
    }
}

impl super::Shared {
    /// The background goes on at `units`, or after them.
    fn hint(&self, units: Units) {
        let place = (units.region as u64) << 48 | (units.first & ((1 << 48) - 1));
        self.last_fault.store(place, Relaxed);
    }

    /// Where the last fault was.
    pub(super) fn last_fault(&self) -> u64 {
        self.last_fault.load(Relaxed)
    }
}
