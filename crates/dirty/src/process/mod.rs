//! Another process as a whole: whatever it maps, by its number, with nothing prepared in it.
//!
//! A look at a process goes through its mappings. For each it knows which part was tracked before,
//! and which private pages were the process's own; finds out what was written; and protects that
//! again. Two records say what changed: the marks in the page table, which are lost with whatever
//! the process unmaps or discards, and the pages that were its own at the look before, which tell
//! of that.

mod attach;
mod bits;
mod error;
mod look;
mod pages;
mod places;
mod protection;
mod runs;

use std::{fmt, sync::Arc, time::Duration};

use pageferry_process::{Mapping, Pid, Process, StopOptions, Stopped};
use pageferry_uffd::{HostRange, Pagemap};

use crate::{Choice, Harvested, Method};
use bits::Bits;
pub use error::ProcessTrackError;
use look::{Before, Sight, page_size};
use places::Known;
use protection::Protection;
use runs::Runs;

/// How a process is attached to.
#[derive(Clone, Debug, Default)]
pub struct AttachOptions {
    /// The method; `None`: what [`choose`](crate::choose) says for the memory it has.
    pub method: Option<Method>,
    /// For how long is tried to stop it. It is stopped by ptrace, whatever method these say: a
    /// process that is stopped by its control group makes no system call.
    pub stop: StopOptions,
}

/// Tracks which memory of another process changes, all that it has mapped and comes to map.
///
/// Nothing has to be prepared in the process, and nothing stays in it: when tracking ends, or this
/// process dies, the kernel lifts all protection.
///
/// * Private memory is tracked exactly, also what is discarded (`madvise(MADV_DONTNEED)`), moved or
///   replaced. There is one exception. In a mapping of which more than 1 GiB is not there, in one
///   that the process may not access at either harvest (a reservation, mostly), in one of a file,
///   and in all with soft-dirty bits, a page that comes into being and is discarded again, both
///   between two harvests, is not reported: it is what it was at both. Who copied it in between has
///   to see, at the last harvest, that it is not there (`/proc/PID/pagemap`).
/// * In shared memory and files what *others* write is not noticed, nor what the process itself
///   writes by another mapping or by `write(2)`, nor holes that are punched (`MADV_REMOVE`).
///   Nor is, anywhere, what devices write into pages that were pinned before.
/// * Memory that the method cannot track counts as changed at every harvest, as a whole: with
///   [`WpBlocking`](Method::WpBlocking) mappings of files; with either method that uses a
///   userfaultfd shared mappings of files that are open for reading only, and memory that belongs to
///   a userfaultfd of the process's own; with soft-dirty bits the pages of hugetlbfs.
/// * A child that the process makes is not tracked, and not disturbed.
/// * Pages that are not there are marked as protected, up to 1 GiB for each mapping, which takes 2
///   MiB of page tables; such a page is no transparent huge page when it is first used.
///
/// A process that starts another program (exec) has other memory then, and every call fails with
/// [`ProcessTrackError::TargetExecuted`].
///
/// With soft-dirty bits shared memory that is not mapped, pages of zeros and pages that a child
/// still shares count as changed at every harvest. Nobody else may use the bits of the process at the same time: clearing them
/// clears them for everybody. Trackers of this crate see to that; others, such as CRIU, do not ask.
///
/// With [`WpBlocking`](Method::WpBlocking) the first write to a page waits for a thread of this
/// process: while this process is stopped, writers of the other one wait. Should this process fork
/// without exec, and be killed, the child holds a copy of the userfaultfd, and writers wait until it
/// ends.
pub struct ProcessTracker {
    process: Arc<Process>,
    choice: Choice,
    stopped_to_attach: Duration,
    means: Means,
    /// Of the memory that the process had when it was attached to, whatever it has now.
    pagemap: Pagemap,
    /// What is tracked, in ascending order. Empty after a failure: what is not known is new.
    known: Vec<Known>,
    /// All mappings at the last look, for their details.
    mappings: Vec<Mapping>,
}

/// What a harvest of a process found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ProcessHarvest {
    /// All mappings, in ascending order, as they were at the beginning of the harvest. The counts
    /// in their details may be of an earlier look.
    pub mappings: Vec<Mapping>,
    /// What may have changed, in ascending order, each range in whole pages of one of the mappings
    /// that can be taken.
    pub changed: Vec<HostRange>,
    /// The part of [`changed`](Self::changed) that is there only because it could not be told, in
    /// ascending order: mappings that came since the last harvest, that cannot be tracked, or that
    /// changed during the harvest.
    pub wholesale: Vec<HostRange>,
    /// The part of [`wholesale`](Self::wholesale) that this method cannot track here, and will not
    /// the next time: whole mappings. Another userfaultfd may have them, of a tracker or of the
    /// process's own.
    pub untracked: Vec<HostRange>,
    /// What it came to.
    pub harvested: Harvested,
}

/// What a method needs while it is in use.
#[derive(Debug)]
enum Means {
    Protection(Box<Protection>),
    Bits(Bits),
}

impl Means {
    fn look(
        &mut self,
        pagemap: &Pagemap,
        mapping: &Mapping,
        before: &Before,
    ) -> Result<Sight, ProcessTrackError> {
        match self {
            Self::Protection(protection) => protection.look(pagemap, mapping, before),
            Self::Bits(bits) => bits.look(pagemap, mapping, before),
        }
    }

    fn calls(&self) -> u64 {
        match self {
            Self::Protection(protection) => protection.calls(),
            Self::Bits(bits) => bits.calls(),
        }
    }
}

impl ProcessTracker {
    /// Tracks a process from now on.
    ///
    /// With a userfaultfd the process is stopped just long enough to open one; its memory is
    /// protected while it runs again. With soft-dirty bits it is not stopped at all.
    ///
    /// # Errors
    ///
    /// [`ProcessTrackError`]; the process goes on, not tracked.
    pub fn attach(
        process: impl Into<Arc<Process>>,
        options: &AttachOptions,
    ) -> Result<Self, ProcessTrackError> {
        let process = process.into();
        Self::attach_to(Arc::clone(&process), options).map_err(|error| confirm(&process, error))
    }

    fn attach_to(
        process: Arc<Process>,
        options: &AttachOptions,
    ) -> Result<Self, ProcessTrackError> {
        let mappings = places::mappings(&process)?;
        let (pagemap, _) = attach::a_pagemap(&process)?;
        let attach::Means { means, choice, stopped } = attach::means(&process, options, &mappings)?;
        let mut tracker = Self {
            process,
            choice,
            stopped_to_attach: stopped,
            means,
            pagemap,
            known: Vec::new(),
            mappings,
        };
        tracker.look()?;
        tracing::debug!(
            pid = %tracker.pid(),
            method = %tracker.choice.method,
            reason = tracker.choice.reason,
            ?stopped,
            mappings = tracker.known.len(),
            "tracking a process"
        );
        Ok(tracker)
    }

    fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// The method, and why it was chosen.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The process.
    pub fn process(&self) -> &Arc<Process> {
        &self.process
    }

    /// For how long the process was stopped to be attached to.
    pub fn stopped_to_attach(&self) -> Duration {
        self.stopped_to_attach
    }

    /// Whether the process has to be stopped for a harvest.
    pub fn needs_stop(&self) -> bool {
        matches!(self.means, Means::Bits(_))
    }

    /// Finds out what may have changed since the last harvest, or since it was attached to, and
    /// notices the next changes.
    ///
    /// While the process runs, a change during the harvest is in this one or the next. Mappings may
    /// change, too, meanwhile: what is unsure counts as changed.
    ///
    /// # Errors
    ///
    /// [`ProcessTrackError`]. Nothing is lost by that: the next harvest reports everything.
    pub fn harvest(
        &mut self,
        stopped: Option<&Stopped<'_>>,
    ) -> Result<ProcessHarvest, ProcessTrackError> {
        let pid = self.pid();
        match stopped {
            Some(stopped) if stopped.process().pid() != pid => {
                return Err(ProcessTrackError::OtherStopped {
                    pid,
                    stopped: stopped.process().pid(),
                });
            }
            None if self.needs_stop() => {
                return Err(ProcessTrackError::NeedsStop { pid, method: self.choice.method });
            }
            _ => {}
        }
        let harvest = self.look().and_then(|harvest| match &self.means {
            Means::Bits(bits) => bits.clear().map(|()| harvest),
            Means::Protection(_) => Ok(harvest),
        });
        harvest.map_err(|error| {
            self.known.clear();
            confirm(&self.process, error)
        })
    }

    /// Goes through all mappings once.
    fn look(&mut self) -> Result<ProcessHarvest, ProcessTrackError> {
        let known = std::mem::take(&mut self.known);
        let calls = self.means.calls();
        let result = self.look_at_all(&known);
        // Before any other error, and before what may have been read of no memory at all: was it
        // that of the process?
        self.process.check()?;
        let (mut harvest, known_now) = result?;
        harvest.harvested.calls = self.means.calls() - calls;
        self.mappings.clone_from(&harvest.mappings);
        self.known = known_now;
        Ok(harvest)
    }

    fn look_at_all(
        &mut self,
        known: &[Known],
    ) -> Result<(ProcessHarvest, Vec<Known>), ProcessTrackError> {
        let mut harvest = ProcessHarvest {
            mappings: match &self.means {
                Means::Protection(protection) if protection.needs_flags() => {
                    places::mappings(&self.process)?
                }
                _ => places::mappings_after(&self.process, &self.mappings)?,
            },
            ..ProcessHarvest::default()
        };
        let mut known_now = Vec::with_capacity(known.len());
        if let Means::Protection(protection) = &self.means {
            protection.expect(harvest.mappings.iter().filter(|one| one.takeable().is_ok()));
        }
        for mapping in &mut harvest.mappings {
            if mapping.takeable().is_err() {
                continue;
            }
            let range = mapping.range;
            let before = places::before(mapping, known);
            let sight = self.means.look(&self.pagemap, mapping, &before)?;
            let (changed, wholesale) = match &sight {
                Sight::Tracked { changed, .. } => {
                    (changed.and(&before.tracked), Runs::from(range).without(&before.tracked))
                }
                _ => (Runs::default(), range.into()),
            };
            if matches!(sight, Sight::Untracked) {
                harvest.untracked.push(range);
            }
            if let Sight::Tracked { own, .. } | Sight::Replaced { own } = sight {
                places::hide_tracking(mapping);
                known_now.push(Known { mapping: mapping.clone(), own });
            }
            let changed = changed.or(&wholesale);
            harvest.harvested.pages += changed.bytes() >> page_size(mapping).shift();
            harvest.changed.extend(changed.iter());
            harvest.wholesale.extend(wholesale.iter());
        }
        harvest.harvested.whole.clone_from(&harvest.wholesale);
        harvest.harvested.gone = places::unmapped(known, &harvest.mappings);
        Ok((harvest, known_now))
    }

    /// Ends tracking: lifts all protection. Dropping the tracker does so, too.
    ///
    /// # Errors
    ///
    /// A mapping could not be released, or the mappings cannot be read. What is left is released
    /// with the last copy of the userfaultfd. That the process is no more is no error.
    pub fn detach(mut self) -> Result<(), ProcessTrackError> {
        self.release()
    }

    fn release(&mut self) -> Result<(), ProcessTrackError> {
        let Means::Protection(protection) = &mut self.means else { return Ok(()) };
        match protection.release().map_err(|error| confirm(&self.process, error)) {
            Err(error) if error.is_gone() => Ok(()),
            result => result,
        }
    }
}

impl Drop for ProcessTracker {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!("{error}");
        }
    }
}

/// What an error is of, if the process is no more.
fn confirm(process: &Process, error: ProcessTrackError) -> ProcessTrackError {
    match process.check() {
        Err(gone) if gone.is_gone() => gone.into(),
        _ => error,
    }
}

impl fmt::Debug for ProcessTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessTracker")
            .field("pid", &self.pid())
            .field("choice", &self.choice)
            .field("means", &self.means)
            .field("mappings", &self.known.len())
            .finish_non_exhaustive()
    }
}
