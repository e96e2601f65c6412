//! Absent pages that carry a POISON marker: those that can never come, and those that a vCPU is to
//! leave KVM_RUN for.

use pageferry_memory::{GranuleIndex, GranuleRange, HostRange, State};
use pageferry_uffd::{Outcome, UffdError, Userfaultfd, Wake};

use crate::{
    gate::Inside,
    install::{OneMapping, Progress, Target},
    stats::Stats,
    views::View,
};

/// How often a marker of write protection, which a scan put where POISON was to go, is lifted.
const LIFTS: u32 = 8;

impl Target {
    /// Marks every absent page of what KVM maps, so that a vCPU that touches it leaves KVM_RUN.
    /// Before anything is delivered: nothing else changes this memory yet.
    pub(crate) fn mark_absent(&self, inside: &Inside<'_>) -> Result<(), UffdError> {
        let view = if self.region.vcpu_view().is_some() { View::Vcpu } else { View::Guest };
        let mut rest = self.region.all_granules();
        while !rest.is_empty() {
            let (uffd, shared) = self.shard(rest);
            let part = rest.split_at(shared).0;
            let Some((host, part)) = inside.place_in(view, self.id, part) else { break };
            let page = self.region.page_size().bytes();
            let mut done = 0;
            let mut within = OneMapping::default();
            while done < host.len() {
                let left = within.take(host.skip(done));
                match uffd.poison(left, Wake::No)? {
                    Outcome::Installed { bytes } => {
                        done += bytes;
                        within.installed();
                    }
                    Outcome::RangeGone { .. } if within.narrower(left, page) => {}
                    // Already touched: not absent, and no vCPU has to leave for it.
                    Outcome::AlreadyPresent { done: more } => done += more + page,
                    // Nothing but a moment's contention: no event is read or waited for yet.
                    Outcome::Retry { done: more } => done += more,
                    Outcome::RangeGone { .. }
                    | Outcome::ProcessGone { .. }
                    | Outcome::Poisoned { .. } => return Ok(()),
                }
            }
            rest = rest.split_at(part.count()).1;
        }
        Ok(())
    }

    /// Poisons what the page map calls poisoned, inside the gate.
    pub(crate) fn mark_poisoned(
        &self,
        inside: &Inside<'_>,
        granules: GranuleRange,
        stats: &Stats,
    ) -> Progress {
        let map = self.region.page_map();
        let mut at = granules.first();
        while at < granules.end() {
            let left = GranuleRange::new(at, granules.end().get() - at.get());
            let run = map.next_run(State::Poisoned, at, left.count());
            let Some(run) = run.and_then(|run| run.intersection(left)) else { break };
            let (uffd, shared) = self.shard(run);
            let part = GranuleRange::new(run.first(), shared);
            self.each_vcpu_place(inside, part, |uffd, host, part| {
                self.poison_for_vcpus(inside, uffd, host, part, stats);
            });
            let Some((host, part)) = inside.place(self.id, part) else {
                at = GranuleIndex::new(part.first().get() + 1);
                continue;
            };
            match self.poison_part(inside, View::Guest, uffd, host, part, stats) {
                Progress::Done => at = part.end(),
                other => return other,
            }
        }
        Progress::Done
    }

    /// Poisons what is absent in memory of a run of granules, whatever the page map calls them.
    pub(crate) fn poison_absent(
        &self,
        inside: &Inside<'_>,
        run: GranuleRange,
        stats: &Stats,
    ) -> Progress {
        let (uffd, shared) = self.shard(run);
        let Some((host, part)) = inside.place(self.id, run.split_at(shared).0) else {
            return Progress::Done;
        };
        self.poison_part(inside, View::Guest, uffd, host, part, stats)
    }

    /// Absent pages of the vCPU view are marked already where vCPUs leave KVM_RUN for them; where
    /// they wait in the kernel they are sent on to the error.
    fn poison_for_vcpus(
        &self,
        inside: &Inside<'_>,
        uffd: &Userfaultfd,
        host: HostRange,
        part: GranuleRange,
        stats: &Stats,
    ) {
        // However it ends: the vCPU faults again, and is answered then.
        let (Progress::Done | Progress::Changing(_) | Progress::Refused { .. }) =
            self.poison_part(inside, View::Vcpu, uffd, host, part, stats);
        if self.wake == Wake::Yes
            && let Err(error) = uffd.wake(host)
        {
            tracing::debug!("{error}");
        }
    }

    /// Makes what is absent of `part`, which is mapped at `host`, an error for who touches it: by a
    /// marker or, where the kernel has none, by taking away the access.
    fn poison_part(
        &self,
        inside: &Inside<'_>,
        view: View,
        uffd: &Userfaultfd,
        host: HostRange,
        part: GranuleRange,
        stats: &Stats,
    ) -> Progress {
        if !self.closed.poisons {
            let why = "this kernel has no UFFDIO_POISON";
            return self.close(inside, uffd, host, part, why, stats);
        }
        let page = self.region.page_size().bytes();
        let shift = self.region.granule().shift();
        let at = |done: u64| GranuleIndex::new(part.first().get() + (done >> shift));
        let tracked = self.tracked(view);
        // POISON does not replace the markers that protect absent pages.
        if tracked && let Ok(Outcome::Retry { .. }) = uffd.write_protect(host, false, Wake::No) {
            return Progress::Changing(at(0));
        }
        let mut done = 0;
        let mut lifted = (0, 0);
        let mut within = OneMapping::default();
        while done < host.len() {
            let left = within.take(host.skip(done));
            match uffd.poison(left, self.wake) {
                Ok(Outcome::Installed { bytes }) => {
                    done += bytes;
                    within.installed();
                }
                Ok(Outcome::RangeGone { .. }) if within.narrower(left, page) => {}
                Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
                Ok(Outcome::Retry { .. }) => return Progress::Changing(at(done)),
                Ok(Outcome::AlreadyPresent { done: more }) if tracked => {
                    done += more;
                    lifted = if lifted.0 == done { (done, lifted.1 + 1) } else { (done, 1) };
                    let there = HostRange::new(host.skip(done).start(), page);
                    if lifted.1 <= LIFTS {
                        // A scan has protected it again, or a page is there. What came of it the
                        // next try tells.
                        let _ = uffd.write_protect(there, false, Wake::No);
                        continue;
                    }
                    let why = "something is in the place of the marker";
                    let granule = GranuleRange::one(at(done));
                    match self.close(inside, uffd, there, granule, why, stats) {
                        Progress::Done => done += page,
                        other => return other,
                    }
                }
                // Something is mapped there already, or nothing can be: both are no zeros.
                Ok(
                    Outcome::AlreadyPresent { done: more }
                    | Outcome::RangeGone { done: more }
                    | Outcome::Poisoned { done: more },
                ) => done += more + page,
                Ok(Outcome::ProcessGone { .. }) => return Progress::Done,
                Err(error) => {
                    let first = at(done);
                    let left = GranuleRange::new(first, part.end().get() - first.get());
                    let why = error.to_string();
                    return self.close(inside, uffd, host.skip(done), left, &why, stats);
                }
            }
        }
        Progress::Done
    }
}
