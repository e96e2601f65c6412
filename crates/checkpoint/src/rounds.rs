//! The rounds of a checkpoint.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use pageferry_dirty::{AttachOptions, Method, ProcessTracker};
use pageferry_process::{Detail, Mapping, Process, StopMethod, StopOptions, Stopped};
use pageferry_uffd::HostRange;

use crate::{
    CheckpointError, Destination, Head, Stored, Why,
    contents::{self, Copied, Reader, Trouble},
    ranges,
};

/// In larger mappings the tracker does not tell of every page that came and went.
const TOLD_UP_TO: u64 = 1 << 30;

/// How a checkpoint is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rounds while the process runs, at most. With 0 it stands still for all of it, and nothing is
    /// tracked.
    pub rounds: u32,
    /// For how long it may stand still for the last round. As soon as what is left takes less, by
    /// what the rounds before took, the last round follows.
    pub downtime: Duration,
    /// How its writes are tracked; `None`: what fits best.
    pub method: Option<Method>,
    /// How it is stopped.
    pub stop: StopOptions,
    /// Leave it stopped after the last round.
    pub leave_stopped: bool,
    /// Take all shared memory again in the last round: others may have written to it.
    pub retake_shared: bool,
}

impl Default for Options {
    /// At most 8 rounds, 50 ms, the method that fits best; the process goes on.
    fn default() -> Self {
        Self {
            rounds: 8,
            downtime: Duration::from_millis(50),
            method: None,
            stop: StopOptions::default(),
            leave_stopped: false,
            retake_shared: false,
        }
    }
}

/// What happens while a checkpoint is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The process is tracked from now on.
    Attached {
        /// The method, and why it was chosen.
        method: Method,
        /// Why.
        reason: String,
        /// For how long the process was stopped for it.
        stopped: Duration,
    },
    /// A round begins to copy.
    Copying {
        /// Which, from 0 on.
        round: u32,
        /// Bytes that may have changed.
        bytes: u64,
        /// Whether the process stands still.
        last: bool,
    },
    /// A round has looked at so many more of them.
    Copied {
        /// Bytes.
        bytes: u64,
    },
    /// A round's image is complete.
    Completed(Box<Round>),
}

/// A round that is complete.
#[derive(Clone, Debug)]
pub struct Round {
    /// Which, from 0 on.
    pub round: u32,
    /// Whether it is the last: the chain up to it is the memory of one moment.
    pub last: bool,
    /// For how long the process was stopped.
    pub stopped: Duration,
    /// By what; `None` if it was not.
    pub stopped_by: Option<StopMethod>,
    /// Bytes that may have changed since the round before; of the first round: all.
    pub changed: u64,
    /// Bytes that count as changed only because it is not known: new mappings, and those that the
    /// method cannot track.
    pub wholesale: u64,
    /// Bytes read from the process.
    pub read: u64,
    /// Bytes that could not be read because of memory errors.
    pub broken: u64,
    /// Until the image was complete.
    pub took: Duration,
    /// The image.
    pub stored: Stored,
}

/// A checkpoint that is complete.
#[derive(Clone, Debug)]
pub struct Report {
    /// For how long the process was stopped when tracking began.
    pub attach: Duration,
    /// The method of tracking; `None` if nothing was tracked.
    pub method: Option<Method>,
    /// Every round; the last one is the checkpoint.
    pub rounds: Vec<Round>,
    /// From the first stop to the last image.
    pub took: Duration,
    /// How it was left stopped, if it was.
    pub left_stopped: Option<StopMethod>,
}

/// Makes a checkpoint of the memory of `process`.
///
/// `observe` is told what happens, and ends the checkpoint by answering `false`: the process goes
/// on, and what is complete stays.
///
/// # Errors
///
/// [`CheckpointError`]; the process goes on, no longer tracked.
pub fn checkpoint(
    process: &Process,
    destination: &mut dyn Destination,
    options: &Options,
    observe: &mut dyn FnMut(Event) -> bool,
) -> Result<Report, CheckpointError> {
    let mut making = Making {
        process,
        options,
        observe,
        begun: Instant::now(),
        rounds: Vec::new(),
        taken: Vec::new(),
        again: Vec::new(),
        had: Vec::new(),
        method: None,
    };
    let result = making.run(destination);
    result.map_err(|why| CheckpointError {
        round: making.rounds.len() as u32,
        last_complete: making.rounds.last().map(|round| round.stored.place.clone()),
        why: match (why, process.check()) {
            // A file of a process that is no more says less.
            (Why::Pagemap(_), Err(gone)) if gone.is_gone() => Why::Process(gone),
            (why, _) => why,
        },
    })
}

struct Making<'a> {
    process: &'a Process,
    options: &'a Options,
    observe: &'a mut dyn FnMut(Event) -> bool,
    begun: Instant,
    rounds: Vec<Round>,
    /// What the chain has contents of, so far.
    taken: Vec<HostRange>,
    /// What the round before could not read.
    again: Vec<HostRange>,
    /// Memory whose bytes were copied in any round.
    had: Vec<HostRange>,
    method: Option<Method>,
}

/// What a round is to copy.
struct Work {
    mappings: Vec<Mapping>,
    changed: Vec<HostRange>,
    wholesale: u64,
}

impl Work {
    fn bytes(&self) -> u64 {
        self.changed.iter().map(|range| range.len()).sum()
    }
}

/// What images have contents of, of these mappings.
fn taken(mappings: &[Mapping]) -> Vec<HostRange> {
    let mappings = mappings.iter().filter(|mapping| contents::is_taken(mapping));
    ranges::union(mappings.map(|mapping| mapping.range).collect())
}

/// One thing to say in an image.
enum Part<'a> {
    Gone(HostRange),
    Copy(&'a Mapping, HostRange),
}

/// All that is to be said of a round, by ascending address.
fn parts(work: &Work, gone: Vec<HostRange>) -> Vec<Part<'_>> {
    let taken = work.mappings.iter().filter(|mapping| contents::is_taken(mapping));
    let copies = taken.flat_map(|mapping| {
        ranges::clip(&work.changed, mapping.range).map(move |range| Part::Copy(mapping, range))
    });
    let mut parts: Vec<Part<'_>> = gone.into_iter().map(Part::Gone).chain(copies).collect();
    parts.sort_by_key(|part| match part {
        Part::Gone(range) | Part::Copy(_, range) => range.start(),
    });
    parts
}

impl Making<'_> {
    fn run(&mut self, destination: &mut dyn Destination) -> Result<Report, Why> {
        let mut attach = Duration::ZERO;
        let mut tracker = None;
        if self.options.rounds > 0 {
            let options = AttachOptions { method: self.options.method, stop: self.options.stop };
            let attached = ProcessTracker::attach(Arc::new(self.process.clone()), &options)?;
            attach = attached.stopped_to_attach();
            let choice = attached.choice();
            self.method = Some(choice.method);
            self.tell(Event::Attached {
                method: choice.method,
                reason: choice.reason.clone(),
                stopped: attach,
            })?;
            tracker = Some(attached);
        }
        let held;
        if let Some(tracker) = &mut tracker {
            let work = self.everything()?;
            self.copy(destination, work, None)?;
            loop {
                let stopped = self.process.stop_with(self.options.stop)?;
                let harvest = tracker.harvest(Some(&stopped))?;
                let wholesale = contents::taken_of(&harvest.mappings, &harvest.wholesale);
                // The mappings of a process that runs cannot be listed at one moment: the first
                // round may have missed some that the tracker knew.
                let missed = ranges::lost(&taken(&harvest.mappings), &self.taken);
                let wholesale = ranges::union([wholesale, missed.clone()].concat());
                let wholesale = wholesale.iter().map(|range| range.len()).sum();
                let again = std::mem::take(&mut self.again);
                let changed = [harvest.changed, again, missed].concat();
                let changed = contents::taken_of(&harvest.mappings, &ranges::union(changed));
                let changed = contents::with_aliases(&harvest.mappings, changed);
                let mut work = Work { mappings: harvest.mappings, changed, wholesale };
                let enough = self.rounds.len() as u32 >= self.options.rounds
                    || self.estimate(&work) <= self.options.downtime;
                if enough {
                    self.retake(&mut work);
                    self.discarded(&mut work)?;
                    held = self.copy(destination, work, Some((stopped, true)))?;
                    break;
                }
                self.copy(destination, work, Some((stopped, false)))?;
            }
        } else {
            let stopped = self.process.stop_with(self.options.stop)?;
            let work = self.everything()?;
            held = self.copy(destination, work, Some((stopped, true)))?;
        }
        if let Some(tracker) = tracker {
            tracker.detach()?;
        }
        destination.close().map_err(Why::Destination)?;
        // Last of all: whatever fails before, the process goes on.
        let left_stopped = held.map(Stopped::leave_stopped).transpose()?;
        Ok(Report {
            attach,
            method: self.method,
            rounds: std::mem::take(&mut self.rounds),
            took: self.begun.elapsed(),
            left_stopped,
        })
    }

    fn tell(&mut self, event: Event) -> Result<(), Why> {
        if (self.observe)(event) { Ok(()) } else { Err(Why::Stopped) }
    }

    /// All that is mapped.
    fn everything(&self) -> Result<Work, Why> {
        let mappings = self.process.mappings(Detail::Full)?;
        let changed = taken(&mappings);
        Ok(Work { mappings, changed, wholesale: 0 })
    }

    /// What others may have written to, all of it, if that is asked for.
    fn retake(&self, work: &mut Work) {
        if self.options.retake_shared {
            let shared = work.mappings.iter().filter(|mapping| contents::is_others_too(mapping));
            let ranges = shared.map(|mapping| mapping.range);
            let all = work.changed.iter().copied().chain(ranges).collect();
            work.changed = ranges::union(all);
        }
    }

    /// Adds what was copied while the process ran and has been discarded since, where the tracker
    /// does not tell of pages that came and went between two harvests (see
    /// [`ProcessTracker`]).
    fn discarded(&self, work: &mut Work) -> Result<(), Why> {
        let untold = |mapping: &&Mapping| {
            contents::is_taken(mapping)
                && (mapping.shared
                    || self.method == Some(Method::SoftDirty)
                    || mapping.range.len() > TOLD_UP_TO
                    || !mapping.permissions.read
                    || !mapping.is_anonymous())
        };
        let mut found = Vec::new();
        let mut reader = Reader::new(self.process, true)?;
        for mapping in work.mappings.iter().filter(untold) {
            for range in ranges::clip(&self.had, mapping.range) {
                reader.find_discarded(mapping, range, &mut found)?;
            }
        }
        let all = work.changed.iter().copied().chain(found).collect();
        work.changed = ranges::union(all);
        Ok(())
    }

    /// How long copying this takes, by the rounds before.
    fn estimate(&self, work: &Work) -> Duration {
        let changed: u64 = self.rounds.iter().map(|round| round.changed).sum();
        let took: Duration = self.rounds.iter().map(|round| round.took).sum();
        let seconds = took.as_secs_f64() * work.bytes() as f64 / changed.max(1) as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Makes the image of a round. A process that is stopped goes on before anything is copied,
    /// or, in the last round, when everything has been read; unless it is to be left stopped: then
    /// this answers with it.
    fn copy<'s>(
        &mut self,
        destination: &mut dyn Destination,
        work: Work,
        stopped: Option<(Stopped<'s>, bool)>,
    ) -> Result<Option<Stopped<'s>>, Why> {
        let begun = Instant::now();
        let round = self.rounds.len() as u32;
        let last = matches!(stopped, Some((_, true)));
        let changed = work.bytes();
        let mut still = Duration::ZERO;
        let stopped_by = stopped.as_ref().map(|(stopped, _)| stopped.method());
        let stopped = match stopped {
            Some((stopped, false)) => {
                still = stopped.resume()?;
                None
            }
            Some((stopped, true)) => Some(stopped),
            None => None,
        };
        self.tell(Event::Copying { round, bytes: changed, last })?;
        let mut image =
            destination.begin(self.head(&work, round, last)).map_err(Why::Destination)?;
        let now = taken(&work.mappings);
        let mut reader = Reader::new(self.process, last)?;
        let mut copied = Copied::default();
        for part in parts(&work, ranges::lost(&self.taken, &now)) {
            match part {
                Part::Gone(range) => image.gone(range.into()).map_err(Why::Destination)?,
                Part::Copy(mapping, range) => {
                    let observe = &mut self.observe;
                    let mut progress = |bytes| observe(Event::Copied { bytes });
                    reader.copy(mapping, range, image.as_mut(), &mut copied, &mut progress)?;
                }
            }
        }
        // It may have gone while it was to be read; the next round knows.
        self.again = copied.unread;
        self.had = ranges::union([std::mem::take(&mut self.had), copied.had].concat());
        let mut held = None;
        if let Some(stopped) = stopped {
            if self.options.leave_stopped {
                still = stopped.since().elapsed();
                held = Some(stopped);
            } else {
                still = stopped.resume()?;
            }
        }
        let stored = image.finish().map_err(Why::Destination)?;
        self.taken = now;
        let round = Round {
            round,
            last,
            stopped: still,
            stopped_by,
            changed,
            wholesale: work.wholesale,
            read: copied.bytes,
            broken: copied.broken,
            took: begun.elapsed(),
            stored,
        };
        self.rounds.push(round.clone());
        self.tell(Event::Completed(Box::new(round)))?;
        Ok(held)
    }

    fn head(&self, work: &Work, round: u32, last: bool) -> Head {
        let pid = self.process.pid().as_raw_nonzero();
        let mut metadata = vec![
            ("pid".to_owned(), pid.to_string().into_bytes()),
            ("round".to_owned(), round.to_string().into_bytes()),
            // What one can rely on: only the last image of a checkpoint is of one moment.
            ("moment".to_owned(), if last { "one" } else { "many" }.into()),
        ];
        if let Some(method) = self.method {
            metadata.push(("method".to_owned(), method.name().into()));
        }
        // Both are for people only: a process without them, or one that is just ending, has none.
        if let Ok(command) = std::fs::read(format!("/proc/{pid}/comm")) {
            metadata.push(("command".to_owned(), command.trim_ascii_end().to_vec()));
        }
        if let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            metadata.push(("time".to_owned(), now.as_secs().to_string().into_bytes()));
        }
        let mappings = work.mappings.iter().map(contents::described).collect();
        Head { round, mappings, metadata }
    }
}

impl From<Trouble> for Why {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Process(error) => Self::Process(error),
            Trouble::Pagemap(error) => Self::Pagemap(error),
            Trouble::Destination(error) => Self::Destination(error),
            Trouble::Served(range) => Self::Served { range },
            Trouble::Stopped => Self::Stopped,
        }
    }
}
