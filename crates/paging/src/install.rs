//! Making granules present: the kernel calls, their outcomes, and what each means for the page map.

#![allow(unsafe_code)]

use std::sync::Arc;

use pageferry_memory::{GranuleIndex, GranuleRange, HostRange, PageMap, Region, RegionId, State};
use pageferry_uffd::{CopyMode, Errno, MoveMode, Outcome, UffdError, Userfaultfd, Wake};

use crate::{
    Span,
    gate::Inside,
    staging::MovablePages,
    stats::{Counter, Stats},
    views::View,
};

/// How granules of a region are made present.
#[derive(Copy, Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InstallMethod {
    /// UFFDIO_COPY from a staging buffer: any memory.
    Copy,
    /// Bytes are received into the fill view, then UFFDIO_CONTINUE maps them: shared memory with a
    /// fill view.
    Continue,
    /// UFFDIO_MOVE of pages populated ahead of time: anonymous memory of 4 KiB pages.
    Move,
}

/// A region as the engine installs into it.
pub(crate) struct Target {
    pub(crate) id: RegionId,
    pub(crate) region: Arc<Region>,
    pub(crate) method: InstallMethod,
    /// The userfaultfd of each stretch of `granules_per_shard` granules.
    pub(crate) shards: Box<[Arc<Userfaultfd>]>,
    pub(crate) granules_per_shard: u64,
    /// Whether threads may wait in the kernel for an install.
    pub(crate) wake: Wake,
    /// ZEROPAGE works on this memory: not on hugetlb, and not over markers.
    pub(crate) zeropage: bool,
}

/// What to install.
#[derive(Copy, Clone)]
pub(crate) enum Data<'a> {
    /// The bytes of the whole run.
    Bytes(&'a [u8]),
    Zero,
    /// Already in the fill view.
    InPlace,
    /// In the first pages of a movable buffer.
    Movable(&'a MovablePages<'a>),
}

/// The first granules of `run` that are requested.
pub(crate) fn requested(map: &PageMap, run: GranuleRange) -> Option<GranuleRange> {
    if run.count() == 1 {
        // Almost every demand fault; a look at one granule is cheaper than a scan for one.
        return (map.state(run.first()) == State::Requested).then_some(run);
    }
    map.next_run(State::Requested, run.first(), run.count())?.intersection(run)
}

/// Where granules are installed.
struct Place<'a> {
    inside: &'a Inside<'a>,
    uffd: &'a Userfaultfd,
    host: HostRange,
    part: GranuleRange,
}

/// How far an install came.
pub(crate) enum Progress {
    /// Every granule of the run that was still wanted is present.
    Done,
    /// The address space is changing: leave the gate, let the events be read, then go on from
    /// this granule.
    Changing(GranuleIndex),
    /// The kernel refuses this granule for good.
    Refused { at: GranuleIndex, why: String },
}

impl Target {
    /// The userfaultfd of a granule, and how many granules of `run` from its first share it.
    pub(crate) fn shard(&self, run: GranuleRange) -> (&Arc<Userfaultfd>, u64) {
        let first = run.first().get();
        let index = ((first / self.granules_per_shard) as usize).min(self.shards.len() - 1);
        let left = if index == self.shards.len() - 1 {
            u64::MAX
        } else {
            self.granules_per_shard - first % self.granules_per_shard
        };
        (&self.shards[index], run.count().min(left))
    }

    /// Installs the granules of `run` that are requested and publishes them. `data` covers `whole`,
    /// of which `run` is a part.
    ///
    /// Called inside the gate: no event takes a granule away between the look at the map and the
    /// call that installs it, or that call fails.
    pub(crate) fn install(
        &self,
        inside: &Inside<'_>,
        whole: GranuleRange,
        run: GranuleRange,
        data: Data<'_>,
        stats: &Stats,
    ) -> Progress {
        let map = self.region.page_map();
        let mut at = run.first();
        while at < run.end() {
            let rest = GranuleRange::new(at, run.end().get() - at.get());
            let Some(wanted_run) = requested(map, rest) else { break };
            stats.add(Counter::duplicate, wanted_run.first().get() - at.get());
            let (uffd, shared) = self.shard(wanted_run);
            let part = GranuleRange::new(wanted_run.first(), shared);
            let Some((host, part)) = inside.place(self.id, part) else {
                // Mapped nowhere any more: the unmap event has been applied, and with it the
                // granule's state; nothing waits for it.
                at = GranuleIndex::new(part.first().get() + 1);
                continue;
            };
            let watched = !matches!(inside, Inside::Open(_));
            let place = Place { inside, uffd, host, part };
            match self.install_mapped(&place, whole, data, watched, stats) {
                Progress::Done => at = part.end(),
                other => return other,
            }
        }
        stats.add(Counter::duplicate, run.end().get().saturating_sub(at.get()));
        Progress::Done
    }

    /// Installs a part that is contiguous in host memory and belongs to one userfaultfd.
    fn install_mapped(
        &self,
        place: &Place<'_>,
        whole: GranuleRange,
        mut data: Data<'_>,
        watched: bool,
        stats: &Stats,
    ) -> Progress {
        let &Place { uffd, host, part, .. } = place;
        let granule = self.region.granule();
        let page = self.region.page_size().bytes();
        let data_offset = (part.first().get() - whole.first().get()) << granule.shift();
        let granule_at =
            |offset: u64| GranuleIndex::new(part.first().get() + (offset >> granule.shift()));
        let mut done = 0;
        let mut absent = ThoughAbsent::default();
        while done < host.len() {
            let left = host.skip(done);
            stats.add(Counter::install_calls, 1);
            match self.call(uffd, left, data, data_offset + done) {
                Ok(Outcome::Installed { bytes }) => done += bytes,
                Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
                Ok(Outcome::Retry { .. }) => {
                    stats.add(Counter::eagain, 1);
                    self.publish(place, done, stats);
                    return Progress::Changing(granule_at(done));
                }
                Ok(Outcome::AlreadyPresent { done: more })
                    if matches!(data, Data::Bytes(_))
                        && !is_present(uffd, HostRange::new(left.skip(more).start(), page)) =>
                {
                    done += more;
                    if absent.again() {
                        continue;
                    }
                    self.publish(place, done, stats);
                    return Progress::Refused { at: granule_at(done), why: NO_HUGE_PAGE.into() };
                }
                Ok(Outcome::AlreadyPresent { done: more }) => {
                    // Somebody else installed it; whoever waits for it must still be woken.
                    stats.add(Counter::eexist, 1);
                    done += more;
                    let present = HostRange::new(host.skip(done).start(), page);
                    if self.wake == Wake::Yes
                        && let Err(error) = uffd.wake(present)
                    {
                        return self.refuse(place, done, &error, stats);
                    }
                    done += page;
                }
                Ok(Outcome::RangeGone { done: more }) => {
                    done += more;
                    self.publish(place, done, stats);
                    if watched {
                        // Unmapped or moved, its event still unread.
                        return Progress::Changing(granule_at(done));
                    }
                    // Unmapped with nobody to tell us: nothing can touch it any more.
                    let gone = GranuleRange::new(granule_at(done), 1);
                    self.region.page_map().discard(gone);
                    done = (done | (granule.bytes() - 1)) + 1;
                }
                Ok(Outcome::ProcessGone { .. }) => return Progress::Done,
                Ok(Outcome::Poisoned { done: more }) => {
                    done += more;
                    self.publish(place, done, stats);
                    return Progress::Refused {
                        at: granule_at(done),
                        why: "the page is poisoned (EHWPOISON)".into(),
                    };
                }
                // Memory that the guest has locked, say, where the page to move is not locked, or
                // a mapping that differs otherwise: what was not moved is still in the buffer.
                Err(error)
                    if error.errno() == Some(Errno::INVAL)
                        && let Data::Movable(pages) = data =>
                {
                    stats.add(Counter::move_fallbacks, 1);
                    data = Data::Bytes(pages.as_bytes());
                }
                Err(error) => return self.refuse(place, done, &error, stats),
            }
        }
        self.publish(place, done, stats);
        Progress::Done
    }

    fn refuse(&self, place: &Place<'_>, done: u64, why: &UffdError, stats: &Stats) -> Progress {
        self.publish(place, done, stats);
        let at = place.part.first().get() + (done >> self.region.granule().shift());
        Progress::Refused { at: GranuleIndex::new(at), why: why.to_string() }
    }

    /// Publishes the granules that the first `done` bytes of `place` make whole.
    fn publish(&self, place: &Place<'_>, done: u64, stats: &Stats) {
        let part = place.part;
        let whole = (done >> self.region.granule().shift()).min(part.count());
        self.map_for_vcpus(place.inside, GranuleRange::new(part.first(), whole));
        // Counted first: whoever sees the last granule present also sees it counted.
        if whole > 0 {
            stats.add(Counter::installed, whole);
            stats.mark_first_page();
        }
        self.region.page_map().publish(GranuleRange::new(part.first(), whole));
    }

    /// Maps granules that are in the page cache in the vCPU view, if there is one. Where that does
    /// not succeed a vCPU faults again, and is answered then.
    pub(crate) fn map_for_vcpus(&self, inside: &Inside<'_>, granules: GranuleRange) {
        if self.region.vcpu_view().is_none() {
            return;
        }
        let page = self.region.page_size().bytes();
        let mode = CopyMode { wake: self.wake == Wake::Yes, write_protect: false };
        self.each_vcpu_place(inside, granules, |uffd, host| {
            let mut done = 0;
            while done < host.len() {
                match uffd.continue_range(host.skip(done), mode) {
                    Ok(Outcome::Installed { bytes }) => done += bytes,
                    Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
                    other => {
                        let skipped = match other {
                            Ok(Outcome::AlreadyPresent { done: more }) => more + page,
                            // The rest is not tried: what stands in the way concerns all of it.
                            _ => host.len() - done,
                        };
                        let left = HostRange::new(host.skip(done).start(), skipped);
                        if self.wake == Wake::Yes
                            && let Err(error) = uffd.wake(left)
                        {
                            tracing::debug!("{error}");
                        }
                        done += skipped;
                    }
                }
            }
        });
    }

    /// Calls `visit` with every stretch of the vCPU view that shows some of `granules`.
    pub(crate) fn each_vcpu_place(
        &self,
        inside: &Inside<'_>,
        granules: GranuleRange,
        mut visit: impl FnMut(&Userfaultfd, HostRange),
    ) {
        let mut rest = granules;
        while self.region.vcpu_view().is_some() && !rest.is_empty() {
            let (uffd, shared) = self.shard(rest);
            let part = rest.split_at(shared).0;
            let Some((host, part)) = inside.place_in(View::Vcpu, self.id, part) else {
                rest = rest.split_at(1).1;
                continue;
            };
            visit(uffd, host);
            rest = rest.split_at(part.count()).1;
        }
    }

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
            while done < host.len() {
                match uffd.poison(host.skip(done), Wake::No)? {
                    Outcome::Installed { bytes } => done += bytes,
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

    fn call(
        &self,
        uffd: &Userfaultfd,
        host: HostRange,
        data: Data<'_>,
        offset: u64,
    ) -> Result<Outcome, UffdError> {
        let mode = CopyMode { wake: self.wake == Wake::Yes, write_protect: false };
        match data {
            Data::Bytes(bytes) => {
                let from = offset as usize;
                uffd.copy(host.start(), &bytes[from..from + host.len() as usize], mode)
            }
            Data::Zero => uffd.zeropage(host, self.wake),
            Data::InPlace => uffd.continue_range(host, mode),
            Data::Movable(pages) => {
                let from = HostRange::new(pages.range().skip(offset).start(), host.len());
                let mode = MoveMode { wake: self.wake, allow_src_holes: false };
                // SAFETY: the buffer is exclusively `pages`', which repopulates what was taken
                // before it is lent again; nobody refers to its contents now.
                unsafe { uffd.move_pages(host.start(), from, mode) }
            }
        }
    }

    /// Poisons what the page map calls poisoned, inside the gate.
    pub(crate) fn mark_poisoned(&self, inside: &Inside<'_>, granules: GranuleRange) -> Progress {
        let map = self.region.page_map();
        let mut at = granules.first();
        while at < granules.end() {
            let left = GranuleRange::new(at, granules.end().get() - at.get());
            let run = map.next_run(State::Poisoned, at, left.count());
            let Some(run) = run.and_then(|run| run.intersection(left)) else { break };
            let (uffd, shared) = self.shard(run);
            let part = GranuleRange::new(run.first(), shared);
            self.each_vcpu_place(inside, part, |uffd, host| self.poison_for_vcpus(uffd, host));
            let Some((host, part)) = inside.place(self.id, part) else {
                at = GranuleIndex::new(part.first().get() + 1);
                continue;
            };
            match self.poison_part(uffd, host, part) {
                Progress::Done => at = part.end(),
                other => return other,
            }
        }
        Progress::Done
    }

    /// Poisons what is absent in memory of a run of granules, whatever the page map calls them.
    pub(crate) fn poison_absent(&self, inside: &Inside<'_>, run: GranuleRange) -> Progress {
        let (uffd, shared) = self.shard(run);
        let Some((host, part)) = inside.place(self.id, run.split_at(shared).0) else {
            return Progress::Done;
        };
        self.poison_part(uffd, host, part)
    }

    /// Absent pages of the vCPU view are marked already where vCPUs leave KVM_RUN for them; where
    /// they wait in the kernel they are sent on to the error.
    fn poison_for_vcpus(&self, uffd: &Userfaultfd, host: HostRange) {
        let page = self.region.page_size().bytes();
        let mut done = 0;
        while done < host.len() {
            done += match uffd.poison(host.skip(done), self.wake) {
                Ok(Outcome::Installed { bytes }) => bytes,
                Ok(Outcome::Retry { done: more }) if more > 0 => more,
                // Mapped, or marked.
                Ok(Outcome::AlreadyPresent { done: more }) => more + page,
                // The vCPU faults again, and is answered then.
                _ => break,
            };
        }
        if self.wake == Wake::Yes
            && let Err(error) = uffd.wake(host)
        {
            tracing::debug!("{error}");
        }
    }

    fn poison_part(&self, uffd: &Userfaultfd, host: HostRange, part: GranuleRange) -> Progress {
        let page = self.region.page_size().bytes();
        let shift = self.region.granule().shift();
        let mut done = 0;
        while done < host.len() {
            let at = GranuleIndex::new(part.first().get() + (done >> shift));
            match uffd.poison(host.skip(done), self.wake) {
                Ok(Outcome::Installed { bytes }) => done += bytes,
                Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
                Ok(Outcome::Retry { .. }) => return Progress::Changing(at),
                // Something is mapped there already, or nothing can be: both are no zeros.
                Ok(
                    Outcome::AlreadyPresent { done: more }
                    | Outcome::RangeGone { done: more }
                    | Outcome::Poisoned { done: more },
                ) => done += more + page,
                Ok(Outcome::ProcessGone { .. }) => return Progress::Done,
                Err(error) => return Progress::Refused { at, why: error.to_string() },
            }
        }
        Progress::Done
    }

    /// Lends the bytes of `run` in the fill view to `fill`. The caller is the one party bringing
    /// these granules: they are Requested by it, and no event can take them away.
    ///
    /// # Errors
    /// What `fill` returns.
    pub(crate) fn with_fill_bytes<E>(
        &self,
        run: GranuleRange,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let range = self.region.fill_range(run).expect("CONTINUE is chosen only with a fill view");
        // SAFETY: the fill view maps the range, writable, as long as the region lives. The caller
        // owns the claim of these granules, so they are mapped in no guest view and no other
        // thread reads or writes them through any view while `fill` runs.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(range.start().as_ptr(), range.len() as usize) };
        fill(bytes)
    }

    pub(crate) fn span(&self, granules: GranuleRange) -> Span {
        Span { region: self.id, granules }
    }
}

/// Why a huge page was not installed.
pub(crate) const NO_HUGE_PAGE: &str = "no huge page is free (the kernel says EEXIST)";

/// How often COPY answered EEXIST where there was no page when we looked.
#[derive(Default)]
pub(crate) struct ThoughAbsent(u32);

impl ThoughAbsent {
    /// Whether to try again: the page may have been there, and been taken away before we looked,
    /// by a removal whose event was read before. There are as many of those as threads that
    /// remove just now the same page, and each only once while we are inside the gate.
    pub(crate) fn again(&mut self) -> bool {
        self.0 += 1;
        self.0 < 64
    }
}

/// Whether there is a page, after COPY answered EEXIST for it. For a huge page the kernel says so
/// also when it has none to give (hugetlb_mfill_atomic_pte in mm/hugetlb.c, Linux 6.18).
pub(crate) fn is_present(uffd: &Userfaultfd, page: HostRange) -> bool {
    const BASE: usize = 4096;
    if page.len() == BASE as u64 {
        return true;
    }
    let mut mapped = 0;
    // SAFETY: asks about one base page, and writes one byte.
    let answered = unsafe { libc::mincore(page.start().as_ptr().cast(), BASE, &mut mapped) };
    // Not mapped here, but perhaps in the file: then it is mapped now.
    (answered == 0 && mapped & 1 != 0)
        || matches!(
            uffd.continue_range(page, CopyMode::NO_WAKE),
            Ok(Outcome::Installed { .. } | Outcome::AlreadyPresent { .. })
        )
}
