//! Soft-dirty bits.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
};

use pageferry_memory::{Mapping, PageSize};
use pageferry_uffd::{ClearRefs, ClearRefsError, HostRange, PageCategories, Pagemap, PagemapEntry};
use rustix::fs::{FlockOperation, flock};

use crate::{
    DirtyError, DirtySet, Freeze, Harvested, Method, Target, Tracked, Tracker,
    page_bits::PageBits,
    scan::Scanner,
    target::{Vma, Watched, is_gone, mapped, unmapped},
    tracker::{check_new, check_room, note_unmapped, remove},
};

/// Soft-dirty bits: 4 written to `/proc/PID/clear_refs`, bit 55 of `/proc/PID/pagemap`. They need
/// nothing in the process but a kernel that is built with them (`CONFIG_MEM_SOFT_DIRTY`).
///
/// * Reading the bits and clearing them are two steps, between which a write would be lost. So
///   nothing may write meanwhile: see [`Freeze`].
/// * Clearing is for the whole process: it walks all its memory, and takes the bits from everybody
///   else who uses them. Of trackers of this kind only one at a time gets a process; others, such as
///   CRIU, do not ask.
/// * A mapping that is new, or that the kernel merged with a new one, counts as written as a whole.
/// * Anonymous memory, and private and shared mappings of files, not the huge pages of hugetlbfs,
///   for which the kernel keeps no bits. A transparent huge page is dirty as a whole.
/// * A page of shared memory that the kernel has reclaimed, or that was never there, has no bit
///   that could be kept: it is reported each time until it is there. Private memory that was there
///   and is not any more was discarded, and is reported once.
///
/// Source: `Documentation/admin-guide/mm/soft-dirty.rst`.
pub struct SoftDirty {
    watched: Watched,
    freeze: Box<dyn Freeze>,
    ranges: Vec<Tracked>,
    segments: Vec<Segment>,
    /// Found when bits were cleared to arm more ranges, for the next harvest.
    pending: Vec<HostRange>,
    scanner: Scanner,
    /// `clear_refs`, as long as anything is armed. It is locked against other trackers.
    lock: Option<File>,
}

/// A part of what is armed, all of one kind.
#[derive(Debug)]
struct Segment {
    range: HostRange,
    shared: bool,
    /// The pages that were not there when last looked at. Of shared memory nobody needs to know.
    absent: PageBits,
    /// Room for the next look.
    absent_now: PageBits,
}

impl SoftDirty {
    /// For memory of a process that `freeze` can keep from writing.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Missing`] on a kernel without soft-dirty bits, [`DirtyError::ProcessGone`].
    pub fn new(target: Target, freeze: impl Freeze + 'static) -> Result<Self, DirtyError> {
        kernel_has_it()?;
        Ok(Self {
            watched: Watched::new(target)?,
            freeze: Box::new(freeze),
            ranges: Vec::new(),
            segments: Vec::new(),
            pending: Vec::new(),
            scanner: Scanner::new(),
            lock: None,
        })
    }

    /// Reads the bits, has `more` done, and clears them, while nothing writes. Whatever fails before
    /// the bits are cleared has cost nothing, since they are all still there.
    fn collect(
        &mut self,
        mut found: impl FnMut(HostRange),
        mut more: impl FnMut(&mut Scanner, &Pagemap) -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        let Self { watched, freeze, segments, scanner, lock, .. } = self;
        // Nothing is armed: the bits are somebody else's.
        let Some(clear_refs) = lock else { return Ok(()) };
        freeze.while_frozen(&mut || {
            watched.with_pagemap(|pagemap| {
                for segment in &mut *segments {
                    segment.read(scanner, pagemap, &mut found)?;
                }
                more(scanner, pagemap)
            })?;
            scanner.calls += 1;
            let cleared = rustix::io::write(&*clear_refs, b"4");
            watched.alive()?;
            let (what, pid) = (ClearRefs::SoftDirty, watched.target.pid());
            cleared.map_err(|errno| ClearRefsError { what, pid, errno })?;
            Ok(())
        })
    }

    fn segments_for(&self, ranges: &[Tracked]) -> Result<Vec<Segment>, DirtyError> {
        let vmas = self.watched.mappings_of(ranges)?;
        let mut segments = Vec::new();
        for &Tracked { range, page } in ranges {
            let base = PageSize::base();
            let refuse =
                |reason| Err(DirtyError::Unsupported { method: Method::SoftDirty, range, reason });
            if page != base {
                return refuse("writes are told by base pages");
            }
            if !unmapped(range, &vmas).is_empty() {
                return Err(DirtyError::Vanished { range });
            }
            for (range, Vma { shared, page_size, .. }) in mapped(range, &vmas) {
                if page_size != base.bytes() {
                    return refuse("the kernel keeps no soft-dirty bits for pages of hugetlbfs");
                }
                segments.push(Segment::new(range, shared));
            }
        }
        Ok(segments)
    }
}

impl Segment {
    fn new(range: HostRange, shared: bool) -> Self {
        let pages = if shared { 0 } else { range.len() >> PageSize::base().shift() };
        Self { range, shared, absent: PageBits::new(pages), absent_now: PageBits::new(pages) }
    }

    /// The pages that have any byte of `part`, which is inside: the first of them, and their number.
    fn pages(&self, part: HostRange) -> (u64, u64) {
        let shift = PageSize::base().shift();
        ((part.start().get() - self.range.start().get()) >> shift, part.len() >> shift)
    }

    /// Notes which pages are not there, before anything is tracked.
    fn look(&mut self, scanner: &mut Scanner, pagemap: &Pagemap) -> Result<(), DirtyError> {
        if self.shared {
            return Ok(());
        }
        let looked = scanner.holes(pagemap, self.range, |hole| {
            let (first, count) = self.pages(hole);
            self.absent.set(first, count);
        });
        looked.map_err(|failed| failed.error.into())
    }

    /// Reports the pages that are dirty, and notes which are not there.
    fn read(
        &mut self,
        scanner: &mut Scanner,
        pagemap: &Pagemap,
        found: &mut impl FnMut(HostRange),
    ) -> Result<(), DirtyError> {
        const THERE: PageCategories = PageCategories::PRESENT.union(PageCategories::SWAPPED);
        let base = PageSize::base();
        self.absent_now.clear();
        let read = scanner.soft_dirty_or_absent(pagemap, self.range, &mut |run, kind| {
            let is_absent = !kind.intersects(THERE);
            let (first, count) = self.pages(run);
            if is_absent && !self.shared {
                self.absent_now.set(first, count);
            }
            if kind.contains(PageCategories::SOFT_DIRTY) || is_absent && self.shared {
                found(run);
            } else if is_absent {
                self.absent.each_unset(first, count, |page, count| {
                    found(self.range.skip(page * base.bytes()).take(count * base.bytes()));
                });
            }
        });
        read.map_err(|failed| failed.error)?;
        // Not before: what failed to be read is looked at again, with the bits still there, and that
        // a page has vanished must be seen then, too.
        std::mem::swap(&mut self.absent, &mut self.absent_now);
        Ok(())
    }
}

impl Tracker for SoftDirty {
    fn method(&self) -> Method {
        Method::SoftDirty
    }

    fn ranges(&self) -> &[Tracked] {
        &self.ranges
    }

    fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        check_new(&self.ranges, ranges)?;
        if self.lock.is_none() {
            self.lock = Some(lock(self.watched.target)?);
        }
        let armed = self.arm_more(ranges);
        if self.ranges.is_empty() {
            self.lock = None;
        }
        armed
    }

    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        check_room(&self.ranges, into)?;
        let calls_before = self.scanner.calls;
        let mut harvested = Harvested::default();
        // What it has not marked yet it does on its way out, whatever happens.
        let mut marker = into.marker();
        for run in self.pending.drain(..) {
            marker.mark(run);
        }
        self.collect(|run| marker.mark(run), |_, _| Ok(()))?;
        harvested.pages += marker.finish();
        note_unmapped(&self.watched, &self.ranges, into, &mut harvested)?;
        for &gone in &harvested.gone {
            remove(&mut self.ranges, gone);
        }
        if !harvested.gone.is_empty() {
            self.drop_segments_that_are_gone();
        }
        harvested.calls += self.scanner.calls - calls_before;
        Ok(harvested)
    }

    fn disarm(&mut self) -> Result<(), DirtyError> {
        // There is nothing to undo: the bits are nobody's until somebody clears them again, and a
        // page that is still write-protected for them costs its next write one fault.
        self.ranges.clear();
        self.segments.clear();
        self.pending.clear();
        self.lock = None;
        Ok(())
    }
}

impl SoftDirty {
    fn arm_more(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        let mut new = self.segments_for(ranges)?;
        // Clearing takes the bits of what is armed already.
        let mut pending = std::mem::take(&mut self.pending);
        let result = self.collect(
            |run| pending.push(run),
            |scanner, pagemap| {
                new.iter_mut().try_for_each(|segment| segment.look(scanner, pagemap))
            },
        );
        self.pending = pending;
        result?;
        self.segments.append(&mut new);
        self.ranges.extend_from_slice(ranges);
        Ok(())
    }

    /// Cuts the segments down to the ranges.
    fn drop_segments_that_are_gone(&mut self) {
        let mut left = Vec::new();
        for segment in &self.segments {
            for tracked in &self.ranges {
                let Some(range) = segment.range.intersection(tracked.range) else { continue };
                let mut part = Segment::new(range, segment.shared);
                if !segment.shared {
                    let (first, count) = segment.pages(range);
                    part.absent = segment.absent.part(first, count);
                }
                left.push(part);
            }
        }
        self.segments = left;
    }
}

impl fmt::Debug for SoftDirty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftDirty")
            .field("target", &self.watched.target)
            .field("ranges", &self.ranges)
            .finish_non_exhaustive()
    }
}

fn lock(target: Target) -> Result<File, DirtyError> {
    let path = target.path("clear_refs");
    let pid = target.pid();
    match claim(&path) {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(DirtyError::AlreadyTracked { pid }),
        Err(error) if is_gone(&error) => Err(DirtyError::ProcessGone { pid }),
        Err(source) => Err(DirtyError::Proc { path, source }),
    }
}

/// Opens the `clear_refs` of a process, and keeps other trackers of this crate away from it, in
/// whatever process they are; `None` if there is one.
pub(crate) fn claim(path: &str) -> io::Result<Option<File>> {
    let file = OpenOptions::new().write(true).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether this kernel has soft-dirty bits. A page is born with one, so that nothing has to be
/// cleared, in a process in which somebody may be tracking.
pub(crate) fn kernel_has_it() -> Result<(), DirtyError> {
    let missing = |what| DirtyError::Missing { method: Method::SoftDirty, what };
    let page = PageSize::base().bytes();
    let memory = Mapping::anonymous(page).map_err(|_| missing("a page to try it on"))?;
    memory.write_at(0, &[1]).map_err(|_| missing("a page to try it on"))?;
    let mut entry = [PagemapEntry::default()];
    Pagemap::open_self()?.read_entries(memory.range(), &mut entry)?;
    if entry[0].soft_dirty() {
        return Ok(());
    }
    Err(missing("a kernel built with CONFIG_MEM_SOFT_DIRTY"))
}
