//! Pre-copy: rounds of what the guest has written since the last one.

use std::{
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    driver::Driver,
    link::Link,
    sender::{How, Out, Sender},
};
use crate::{
    MigrateError,
    core::{Frame, SourceEvent},
    guest::{
        converge::{self, Limits, Next, Round},
        known::Known,
        options::Mode,
        status::{Event, RoundReport, Stage},
        units::{UNIT, Units},
    },
    peer::lock,
};

/// Units that always take the same connection, so that no page is overtaken by its older self.
const CHUNK: u64 = 256;
/// What stopping the guest and saving its devices is expected to take.
const FIXED: Duration = Duration::from_millis(10);

/// What comes after the rounds.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum After {
    /// The guest is stopped, the rest sent, and then it moves.
    SendRest,
    /// It moves, and the rest comes behind it.
    PostCopy,
}

/// The connections that carry rounds, and what each has sent.
pub(super) struct Rounds {
    link: Arc<Link>,
    senders: Vec<Sender>,
    pub(super) number: u32,
}

impl Rounds {
    pub(super) fn new(link: &Arc<Link>, seed: u64) -> Self {
        let cache = link.shared.options.delta_cache / link.pages.len().max(1);
        let known = || Some(Known::new(seed, cache));
        let senders = if link.pages.is_empty() {
            vec![Sender::for_pages(link, Out::Control, known())]
        } else {
            let lanes = link.pages.iter();
            lanes
                .map(|lane| Sender::for_pages(link, Out::Lane(Arc::clone(lane)), known()))
                .collect()
        };
        Self { link: Arc::clone(link), senders, number: 0 }
    }

    /// Sends what is dirty, and says that it did; returns how many bytes that took.
    pub(super) fn send(&mut self, how: How) -> Result<u64, MigrateError> {
        let link = &self.link;
        let shared = &link.shared;
        self.number += 1;
        let round = u64::from(self.number);
        let before = shared.counts.bytes.load(Relaxed);
        link.send(&Frame::RoundBegin { round, units: shared.dirty.total() })?;
        let count = self.senders.len() as u64;
        let sent: Result<(), MigrateError> = thread::scope(|scope| {
            let threads: Vec<_> = (0..)
                .zip(&mut self.senders)
                .map(|(index, sender)| {
                    thread::Builder::new()
                        .name("pf-round".into())
                        .spawn_scoped(scope, move || send_chunks(link, sender, index, count, how))
                        .map_err(|error| MigrateError::Io { what: "starting a thread", error })
                })
                .collect::<Result<_, _>>()?;
            let mut all = Ok(());
            for thread in threads {
                let one = thread.join().unwrap_or(Err(MigrateError::Misuse("a sender panicked")));
                all = all.and(one);
            }
            all
        });
        sent?;
        for sender in &mut self.senders {
            sender.end_round(round)?;
        }
        if !link.pages.is_empty() {
            let units = lock(&shared.session).totals();
            link.send(&Frame::RoundEnd { round, units })?;
        }
        Ok(shared.counts.bytes.load(Relaxed) - before)
    }
}

/// Sends the chunks of one connection: every `of`th from `index` on.
fn send_chunks(
    link: &Link,
    sender: &mut Sender,
    index: u64,
    of: u64,
    how: How,
) -> Result<(), MigrateError> {
    let shared = &link.shared;
    let bucket = (how != How::Last).then_some(&shared.precopy);
    for region in 0..shared.memory.len() {
        let len = shared.memory.units(region);
        let mut chunk = index;
        while chunk * CHUNK < len {
            let first = chunk * CHUNK;
            let units = Units { region, first, count: CHUNK.min(len - first) };
            chunk += of;
            let mut any = false;
            while let Some(run) = shared.dirty.claim(region, units.run()) {
                sender.send(Units::new(region, run), how, bucket)?;
                any = true;
            }
            if !any {
                continue;
            }
            link.pause_for(Duration::ZERO)?;
            if how != How::Last && shared.hurry.load(Acquire) {
                return sender.flush(bucket);
            }
        }
    }
    sender.flush(bucket)
}

impl Driver {
    /// Takes what was written since the last time into what is dirty.
    pub(super) fn harvest(&mut self) -> Result<(), MigrateError> {
        let shared = &self.shared;
        let mut outside = None;
        shared.guest.harvest(&mut |region, range| match shared.memory.units_of(
            region,
            range.first().get(),
            range.count(),
        ) {
            Some(units) => {
                shared.dirty.insert(units.region, units.run());
            }
            None => outside = Some((region, range)),
        })?;
        match outside {
            None => Ok(()),
            Some((region, range)) => Err(MigrateError::Mismatch(format!(
                "the guest reports {range} of region {region} as written, which it does not have"
            ))),
        }
    }

    /// Rounds, until something else is to be done.
    pub(super) fn copy(&mut self, rounds: &mut Rounds) -> Result<After, MigrateError> {
        let shared = Arc::clone(&self.shared);
        let options = &shared.options;
        let limits = Limits {
            downtime: options.downtime,
            timeout: options.timeout,
            rounds: options.rounds,
            otherwise: options.on_no_convergence,
        };
        let begun = Instant::now();
        let mut dirty_before = None;
        loop {
            let number = rounds.number + 1;
            shared.journal.enter(Stage::Copying { round: number });
            let (started, units) = (Instant::now(), shared.dirty.total());
            let how = if number == 1 { How::First } else { How::Again };
            let bytes = rounds.send(how)?;
            self.await_ack(number)?;
            let took = started.elapsed();
            self.harvest()?;
            let dirty = shared.dirty.total() * UNIT;
            let seconds = took.as_secs_f64().max(1e-6);
            let rate = (units * UNIT) as f64 / seconds;
            let round = Round {
                number,
                dirty,
                dirty_before,
                rate,
                elapsed: begun.elapsed(),
                throttle: self.throttled,
                fixed: FIXED,
            };
            shared.journal.round(RoundReport {
                round: number,
                units,
                bytes,
                took,
                rate,
                dirty,
                dirty_rate: dirty as f64 / seconds,
                downtime: round.downtime(),
                throttle: self.throttled,
            });
            dirty_before = Some(dirty);
            if shared.hurry.load(Acquire) {
                return Ok(After::PostCopy);
            }
            if options.mode == Mode::Hybrid && number >= options.hybrid_rounds.max(1) {
                return Ok(After::PostCopy);
            }
            match converge::decide(&limits, &round) {
                Next::Round => {}
                Next::Switch => return Ok(After::SendRest),
                Next::PostCopy => return Ok(After::PostCopy),
                Next::GiveUp => {
                    return Err(MigrateError::NotConverging {
                        downtime: round.downtime(),
                        wanted: options.downtime,
                    });
                }
                Next::Throttle(percent) => {
                    self.throttle(percent);
                    shared.journal.tell(&Event::Throttled { percent });
                }
            }
        }
    }

    fn await_ack(&mut self, number: u32) -> Result<(), MigrateError> {
        let after = self.shared.options.idle_timeout;
        match self.heard("waiting for a round to be acknowledged", after)? {
            SourceEvent::RoundAcked { round, .. } if round == u64::from(number) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

/// Something that cannot come here: the session would not have let it pass.
pub(super) fn unexpected(event: &SourceEvent) -> MigrateError {
    tracing::error!(?event, "unexpected");
    MigrateError::Misuse("the destination said something out of turn")
}
