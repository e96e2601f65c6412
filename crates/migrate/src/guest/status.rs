//! How a migration goes: what is told of it while it runs, and what it came to.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use super::options::Observer;
use crate::{MigrateError, peer::lock};

/// Where a migration stands, on either side.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Stage {
    /// The two sides have not agreed yet.
    Connecting,
    /// Pages are copied while the source's guest runs; rounds count from 1.
    Copying {
        /// Which round.
        round: u32,
    },
    /// The guest stands still.
    Switching,
    /// The guest runs at the destination, and memory is still to come.
    PostCopy,
    /// The connection is lost while memory is still to come: both sides wait for another.
    Paused,
    /// The guest runs at the destination, with all of its memory.
    Completed,
    /// It was called off: the guest is at the source.
    Cancelled,
    /// It went wrong. Where the guest is, the error says.
    Failed,
}

/// A round of pre-copy that has ended.
#[derive(Copy, Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct RoundReport {
    /// 1 and on.
    pub round: u32,
    /// Units of 4 KiB that it looked at.
    pub units: u64,
    /// Bytes that it sent.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// Bytes of memory dealt with in a second.
    pub rate: f64,
    /// Bytes of memory that the guest wrote to meanwhile.
    pub dirty: u64,
    /// The same in a second.
    pub dirty_rate: f64,
    /// What the guest would stand still for if it were stopped now.
    pub downtime: Duration,
    /// How much the vCPUs are slowed down, in percent.
    pub throttle: u8,
}

/// Something that happened.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum Event {
    /// It came to another stage.
    Stage(Stage),
    /// A round has ended.
    Round(RoundReport),
    /// The vCPUs are slowed down to make rounds help.
    Throttled {
        /// By so many percent.
        percent: u8,
    },
    /// The connection was lost in post-copy; the guest's threads that need memory wait.
    Lost {
        /// What happened.
        why: String,
    },
    /// The sides have found each other again.
    Resumed {
        /// Units of 4 KiB still to come.
        missing: u64,
    },
}

/// What a migration's source did so far.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct SourceStatus {
    /// Where it stands.
    pub stage: Stage,
    /// Since it was started, until it ended.
    pub elapsed: Duration,
    /// For how long the guest stood still: from before it was paused until the destination said
    /// that it runs, or until it was resumed here.
    pub downtime: Option<Duration>,
    /// Bytes of the guest's memory.
    pub memory: u64,
    /// Units of 4 KiB still to be sent, of the round or in all.
    pub remaining: u64,
    /// The rounds that have ended.
    pub rounds: Vec<RoundReport>,
    /// What was counted.
    pub counts: SourceCounts,
}

macro_rules! counters {
    ($live:ident, $counts:ident, $doc:literal, { $($(#[$field_doc:meta])* $name:ident,)* }) => {
        #[derive(Debug, Default)]
        pub(crate) struct $live { $(pub(crate) $name: AtomicU64,)* }

        #[doc = $doc]
        #[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct $counts { $($(#[$field_doc])* pub $name: u64,)* }

        impl $live {
            pub(crate) fn snapshot(&self) -> $counts {
                $counts { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters!(LiveSource, SourceCounts, "What a source counted. Units have 4 KiB.", {
    /// Bytes sent of pages, headers included.
    bytes,
    /// Units sent as they are.
    data,
    /// Units sent as zero.
    zero,
    /// Units sent compressed.
    packed,
    /// Units of which only what changed was sent.
    delta,
    /// Units not sent, as the destination has the same bytes.
    unchanged,
    /// Units that cannot be read.
    poisoned,
    /// Spans asked for.
    requests,
    /// Units sent because they were asked for.
    demanded,
    /// Units asked for that were on their way.
    overtaken,
    /// Times that the connection was lost and found again in post-copy.
    resumed,
});

counters!(LiveDestination, DestinationCounts, "What a destination counted. Units have 4 KiB.", {
    /// Bytes received of pages, headers included.
    bytes,
    /// Units that came, as they are or packed.
    data,
    /// Units that came as zero.
    zero,
    /// Units that cannot be read at the source.
    poisoned,
    /// Units that came before the guest ran and were stale by then.
    stale,
    /// Spans asked for.
    requests,
    /// Times that the connection was lost and found again in post-copy.
    resumed,
});

/// How something ended, for those who wait for it.
pub(crate) struct Ended<T> {
    result: Mutex<Option<Result<T, Arc<MigrateError>>>>,
    changed: Condvar,
}

impl<T> Default for Ended<T> {
    fn default() -> Self {
        Self { result: Mutex::new(None), changed: Condvar::new() }
    }
}

impl<T: Clone> Ended<T> {
    /// It has ended; what is said first counts.
    pub(crate) fn set(&self, result: Result<T, MigrateError>) {
        lock(&self.result).get_or_insert(result.map_err(Arc::new));
        self.changed.notify_all();
    }

    pub(crate) fn wait(&self) -> Result<T, Arc<MigrateError>> {
        let mut result = lock(&self.result);
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            result = match self.changed.wait(result) {
                Ok(result) => result,
                Err(poison) => poison.into_inner(),
            };
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

/// What all of a side's threads tell of.
pub(crate) struct Journal {
    observer: Option<Observer>,
    state: Mutex<State>,
}

struct State {
    stage: Stage,
    begun: Instant,
    ended: Option<Duration>,
    stopped: Option<Instant>,
    downtime: Option<Duration>,
    rounds: Vec<RoundReport>,
}

/// What is known of a migration's course.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    pub(crate) stage: Stage,
    pub(crate) elapsed: Duration,
    pub(crate) downtime: Option<Duration>,
    pub(crate) rounds: Vec<RoundReport>,
}

impl Journal {
    pub(crate) fn new(observer: Option<Observer>) -> Self {
        let state = State {
            stage: Stage::Connecting,
            begun: Instant::now(),
            ended: None,
            stopped: None,
            downtime: None,
            rounds: Vec::new(),
        };
        Self { observer, state: Mutex::new(state) }
    }

    pub(crate) fn tell(&self, event: &Event) {
        tracing::debug!(?event, "migration");
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }

    pub(crate) fn stage(&self) -> Stage {
        lock(&self.state).stage
    }

    pub(crate) fn enter(&self, stage: Stage) {
        let changed = {
            let mut state = lock(&self.state);
            let changed = state.stage != stage;
            state.stage = stage;
            if matches!(stage, Stage::Completed | Stage::Cancelled | Stage::Failed) {
                let elapsed = state.begun.elapsed();
                state.ended.get_or_insert(elapsed);
            }
            changed
        };
        if changed {
            self.tell(&Event::Stage(stage));
        }
    }

    pub(crate) fn round(&self, report: RoundReport) {
        lock(&self.state).rounds.push(report);
        self.tell(&Event::Round(report));
    }

    /// The guest is about to be stopped.
    pub(crate) fn stopping(&self) {
        lock(&self.state).stopped = Some(Instant::now());
    }

    /// A guest runs again, here or there.
    pub(crate) fn running(&self) {
        let mut state = lock(&self.state);
        if let Some(stopped) = state.stopped.take() {
            state.downtime = Some(stopped.elapsed());
        }
    }

    /// For how long the guest has been standing still.
    pub(crate) fn stopped_for(&self) -> Duration {
        lock(&self.state).stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed())
    }

    pub(crate) fn course(&self) -> Course {
        let state = lock(&self.state);
        Course {
            stage: state.stage,
            elapsed: state.ended.unwrap_or_else(|| state.begun.elapsed()),
            downtime: state.downtime,
            rounds: state.rounds.clone(),
        }
    }
}
