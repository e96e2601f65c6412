//! Making granules present: the kernel calls, their outcomes, and what each means for the page map.

#![allow(unsafe_code)]

use std::sync::Arc;

use pageferry_memory::{
    Advice, Backing, GranuleIndex, GranuleRange, HostRange, PageMap, Region, RegionId, State,
};
use pageferry_uffd::{CopyMode, Errno, MoveMode, Outcome, UffdError, Userfaultfd, Wake};

use crate::{
    Span, WriteTracking,
    closed::Closed,
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
    /// ZEROPAGE works on this memory: not on hugetlb, not over markers (of POISON, and those
    /// that protect absent pages), and not where pages come protected.
    pub(crate) zeropage: bool,
    /// Whether pages are write-protected when they are mapped.
    pub(crate) tracking: WriteTracking,
    /// Also in the vCPU view.
    pub(crate) vcpus_tracked: bool,
    /// What comes is mapped in the vCPU view only, for which the vCPU is waiting. Whoever waits in
    /// the guest view is woken, faults again, and has it mapped then: see [`settle`](crate::settle).
    pub(crate) lazy: bool,
    pub(crate) closed: Closed,
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
    view: View,
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
            let lazily = self.lazy.then(|| inside.place_in(View::Vcpu, self.id, part)).flatten();
            let placed = match lazily {
                Some((host, part)) => Some((View::Vcpu, host, part)),
                None => inside.place(self.id, part).map(|(host, part)| (View::Guest, host, part)),
            };
            let Some((view, host, part)) = placed else {
                // Mapped nowhere any more: the unmap event has been applied, and with it the
                // granule's state; nothing waits for it.
                at = GranuleIndex::new(part.first().get() + 1);
                continue;
            };
            let watched = !matches!(inside, Inside::Open(_));
            let place = Place { inside, view, uffd, host, part };
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
        let mut within = OneMapping::default();
        while done < host.len() {
            let left = within.take(host.skip(done));
            stats.add(Counter::install_calls, 1);
            match self.call(uffd, left, data, data_offset + done) {
                Ok(Outcome::Installed { bytes }) => {
                    done += bytes;
                    within.installed();
                }
                Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
                Ok(Outcome::RangeGone { .. }) if within.narrower(left, page) => {}
                Ok(Outcome::Retry { .. }) => {
                    stats.add(Counter::eagain, 1);
                    self.publish(place, done, stats);
                    return Progress::Changing(granule_at(done));
                }
                Ok(Outcome::AlreadyPresent { done: more })
                    if matches!(data, Data::Bytes(_))
                        && !self
                            .is_present(uffd, HostRange::new(left.skip(more).start(), page)) =>
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
                    if place.view == View::Vcpu {
                        // But in the guest view, which has it from the fill view.
                        done = (done | (granule.bytes() - 1)) + 1;
                        continue;
                    }
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
        let granules = GranuleRange::new(part.first(), whole);
        if place.view == View::Guest {
            self.map_for_vcpus(place.inside, granules, self.arriving());
        }
        // Counted first: whoever sees the last granule present also sees it counted.
        if whole > 0 {
            stats.add(Counter::installed, whole);
            stats.mark_first_page();
        }
        self.region.page_map().publish(granules);
        if place.view == View::Vcpu && self.wake == Wake::Yes {
            // After it is published: whoever faulted before is woken, and whoever faults from now
            // on, the woken included, finds it present.
            self.wake_guest(place.inside, granules);
        }
    }

    fn call(
        &self,
        uffd: &Userfaultfd,
        host: HostRange,
        data: Data<'_>,
        offset: u64,
    ) -> Result<Outcome, UffdError> {
        let mode = self.arriving();
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

    /// Sees to it that there is memory behind the fill view, so that writing there is no SIGBUS on a
    /// file system that is full or without huge pages. Returns the first granules of `run` that
    /// have it, and what is wrong with the next.
    ///
    /// A memfd of base pages is on a file system without a limit, and needs nothing. For others it
    /// takes a system call more than the page fault that it saves: of 16 pages at once it takes no
    /// more, of one page 3 us where system calls are dear (PVM), which beside the clearing of a huge
    /// page is nothing.
    pub(crate) fn back(&self, run: GranuleRange) -> (GranuleRange, Option<String>) {
        if self.region.backing() == Backing::Memfd {
            return (run, None);
        }
        let (Some(view), Some(range)) = (self.region.fill_view(), self.region.fill_range(run))
        else {
            return (run, None);
        };
        let populate = |range| match view.advise(range, Advice::PopulateWrite) {
            // Before Linux 5.14 only writing tells.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        };
        if populate(range).is_ok() {
            return (run, None);
        }
        let granule = self.region.granule().bytes();
        for (index, _) in run.iter().enumerate() {
            let one = HostRange::new(range.skip(index as u64 * granule).start(), granule);
            if let Err(error) = populate(one) {
                let why = format!(
                    "no memory for it behind the fill view: {error} (the file system is full, \
                     or has no free huge page)"
                );
                return (run.split_at(index as u64).0, Some(why));
            }
        }
        (run, None)
    }

    /// Lends the bytes of `run` in the fill view to `fill`. The caller has it [backed](Self::back),
    /// is the one party bringing these granules: they are Requested by it, and no event can take
    /// them away.
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

    /// Whether writes to memory in this view are noticed.
    pub(crate) fn tracked(&self, view: View) -> bool {
        self.tracking != WriteTracking::Off && (view == View::Guest || self.vcpus_tracked)
    }

    /// How what comes from the source is mapped.
    fn arriving(&self) -> CopyMode {
        let write_protect = self.tracking.protects_arrivals();
        CopyMode { wake: self.wake == Wake::Yes, write_protect }
    }

    /// How what was mapped before, or was removed, is mapped.
    pub(crate) fn mapping_again(&self) -> CopyMode {
        let write_protect = self.tracking.protects_again();
        CopyMode { wake: self.wake == Wake::Yes, write_protect }
    }

    /// Whether there is a page, after COPY answered EEXIST for it. For a huge page the kernel says
    /// so also when it has none to give (hugetlb_mfill_atomic_pte in mm/hugetlb.c, Linux 6.18).
    pub(crate) fn is_present(&self, uffd: &Userfaultfd, page: HostRange) -> bool {
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
                uffd.continue_range(page, CopyMode { wake: false, ..self.mapping_again() }),
                Ok(Outcome::Installed { .. } | Outcome::AlreadyPresent { .. })
            )
    }

    pub(crate) fn span(&self, granules: GranuleRange) -> Span {
        Span { region: self.id, granules }
    }
}

/// How much is installed by one call: the kernel does it within one mapping and says ENOENT
/// otherwise, and the guest's process may have made several of one (`mprotect`, `mlock`, `madvise`).
#[derive(Default)]
pub(crate) struct OneMapping {
    /// No more than this, unless it is 0.
    most: u64,
}

impl OneMapping {
    pub(crate) fn take(&self, left: HostRange) -> HostRange {
        if self.most == 0 { left } else { left.take(self.most) }
    }

    /// Nothing was registered at `tried`, or not all of it in one mapping. False for a page: it is
    /// not registered.
    pub(crate) fn narrower(&mut self, tried: HostRange, page: u64) -> bool {
        self.most = (tried.len() / 2 / page * page).max(page);
        tried.len() > page
    }

    pub(crate) fn installed(&mut self) {
        self.most = self.most.saturating_mul(2);
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
