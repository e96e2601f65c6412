//! Ranges under write protection by a userfaultfd, and their harvest: what both ways of it share.

use pageferry_uffd::{HostRange, Pagemap};

use crate::{
    DirtyError, DirtySet, Harvested, Target, Tracked,
    protect::{Protection, Protector},
    scan::{Failed, Scanner},
    target::{Detail, Watched, mapped, unmapped},
    tracker::{check_new, check_room, note_unmapped, remove},
};

/// How what was found is protected again.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Rearm {
    /// By the kernel, in the step in which it is found.
    ByScan,
    /// Run by run, after it was reported. A write that falls between is one to a page that is
    /// reported, whose contents are looked at after the harvest: it is not lost.
    RunByRun,
}

#[derive(Debug)]
pub(crate) struct Armed {
    pub(crate) watched: Watched,
    protector: Box<dyn Protector>,
    ranges: Vec<Tracked>,
    /// All that was registered, gone or not, and is to be released.
    registered: Vec<HostRange>,
    scanner: Scanner,
    rearm: Rearm,
}

impl Armed {
    pub(crate) fn new(
        target: Target,
        protector: impl Protector + 'static,
        rearm: Rearm,
    ) -> Result<Self, DirtyError> {
        Ok(Self {
            watched: Watched::new(target)?,
            protector: Box::new(protector),
            ranges: Vec::new(),
            registered: Vec::new(),
            scanner: Scanner::new(),
            rearm,
        })
    }

    pub(crate) fn ranges(&self) -> &[Tracked] {
        &self.ranges
    }

    pub(crate) fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        check_new(&self.ranges, ranges)?;
        for (index, &tracked) in ranges.iter().enumerate() {
            if let Err(error) = self.arm_one(tracked) {
                self.watched.alive()?;
                for tracked in &ranges[..index] {
                    self.release(tracked.range)?;
                }
                return Err(error);
            }
        }
        self.ranges.extend_from_slice(ranges);
        Ok(())
    }

    fn arm_one(&mut self, tracked: Tracked) -> Result<(), DirtyError> {
        let range = tracked.range;
        self.protector.register(tracked)?;
        self.registered.push(range);
        let error = match self.protector.protect(range) {
            Ok(Protection::Done) => return Ok(()),
            Ok(Protection::Gone) => DirtyError::Vanished { range },
            Err(error) => error,
        };
        self.release(range)?;
        Err(error)
    }

    fn release(&mut self, range: HostRange) -> Result<(), DirtyError> {
        self.registered.retain(|registered| *registered != range);
        self.protector.release(range, &self.watched)
    }

    pub(crate) fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        check_room(&self.ranges, into)?;
        let calls_before = self.scanner.calls;
        let mut harvested = Harvested::default();
        let Self { watched, protector, ranges, scanner, rearm, .. } = self;
        let result = watched.with_pagemap(|pagemap| {
            let mut harvest = Harvest {
                watched,
                protector: &**protector,
                scanner,
                rearm: *rearm,
                pagemap,
                into,
                harvested: &mut harvested,
            };
            ranges.iter().try_for_each(|tracked| harvest.one(*tracked))?;
            for gone in protector.gone(ranges) {
                harvested.pages += into.mark(gone);
                harvested.lose(gone);
            }
            note_unmapped(watched, ranges, into, &mut harvested)
        });
        for &gone in &harvested.gone {
            remove(&mut self.ranges, gone);
        }
        harvested.calls += self.scanner.calls - calls_before;
        result.map(|()| harvested)
    }

    pub(crate) fn disarm(&mut self) -> Result<(), DirtyError> {
        self.ranges.clear();
        let mut result = Ok(());
        for range in std::mem::take(&mut self.registered) {
            match self.protector.release(range, &self.watched) {
                // Its registrations are gone with it.
                Ok(()) | Err(DirtyError::ProcessGone { .. }) => {}
                Err(error) => {
                    if result.is_ok() {
                        result = Err(error);
                    }
                }
            }
        }
        result
    }
}

/// One harvest while it runs.
struct Harvest<'a> {
    watched: &'a Watched,
    protector: &'a dyn Protector,
    scanner: &'a mut Scanner,
    rearm: Rearm,
    pagemap: &'a Pagemap,
    into: &'a DirtySet,
    harvested: &'a mut Harvested,
}

impl Harvest<'_> {
    fn one(&mut self, Tracked { range, page }: Tracked) -> Result<(), DirtyError> {
        let by_scan = self.rearm == Rearm::ByScan;
        let (mut again, mut result) = (Again::default(), Ok(()));
        let Self { protector, scanner, into, harvested, .. } = self;
        // Marks first, and what it has not marked yet it does on its way out, whatever happens:
        // nothing that is protected again may be forgotten.
        let mut marker = into.marker();
        let looked = scanner.unprotected(self.pagemap, range, by_scan, |run| {
            marker.mark(run);
            if !by_scan {
                again.protect(*protector, run, harvested, &mut result);
            }
        });
        harvested.pages += marker.finish();
        self.settle(looked, &mut again, result)?;

        if self.scanner.must_look_for_holes(page) {
            let (mut again, mut result) = (Again::default(), Ok(()));
            let Self { protector, scanner, into, harvested, .. } = self;
            let looked = scanner.holes(self.pagemap, range, |run| {
                harvested.pages += into.mark(run);
                again.protect(*protector, run, harvested, &mut result);
            });
            self.settle(looked, &mut again, result)?;
        }
        Ok(())
    }

    /// Where something could not be looked at or protected, finds out what is there now, reports
    /// that as a whole, and protects what is still to be protected.
    fn settle(
        &mut self,
        looked: Result<(), Failed>,
        again: &mut Again,
        protected: Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        let mut changed = std::mem::take(&mut again.gone);
        let mut failure = None;
        if let Err(Failed { left, error }) = looked {
            // The kernel may have protected pages again that it did not come to report.
            self.harvested.pages += self.into.mark(left);
            changed.push(left);
            failure = Some(error);
        }
        protected?;
        if changed.is_empty() {
            return Ok(());
        }
        self.watched.alive()?;
        let vmas = self.watched.mappings(Detail::Place)?;
        let gone_before = self.harvested.gone.len();
        for range in changed {
            for (part, _) in mapped(range, &vmas) {
                self.harvested.calls += 1;
                match self.protector.protect(part)? {
                    Protection::Done => self.harvested.whole.push(part),
                    Protection::Gone => self.harvested.lose(part),
                }
            }
            for part in unmapped(range, &vmas) {
                self.harvested.lose(part);
            }
        }
        match failure {
            // A failure that no change of the mappings explains.
            Some(error) if self.harvested.gone.len() == gone_before => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Protects runs while they are reported.
#[derive(Default)]
struct Again {
    gone: Vec<HostRange>,
}

impl Again {
    fn protect(
        &mut self,
        protector: &dyn Protector,
        run: HostRange,
        harvested: &mut Harvested,
        result: &mut Result<(), DirtyError>,
    ) {
        if result.is_err() {
            return;
        }
        harvested.calls += 1;
        match protector.protect(run) {
            Ok(Protection::Done) => {}
            Ok(Protection::Gone) => self.gone.push(run),
            Err(error) => *result = Err(error),
        }
    }
}
