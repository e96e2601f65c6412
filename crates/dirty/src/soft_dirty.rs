//! Soft-dirty bits.

use std::{
    fmt,
    fs::{File, OpenOptions},
};

use pageferry_memory::{Mapping, PageSize};
use pageferry_uffd::{ClearRefs, HostRange, Pagemap, PagemapEntry, clear_refs};
use rustix::fs::{FlockOperation, flock};

use crate::{
    DirtyError, DirtySet, Freeze, Harvested, Method, Target, Tracked, Tracker,
    scan::{Run, Scanner},
    target::{Detail, Vma, Watched, is_gone, mapped, unmapped},
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
    /// Held as long as anything is armed, against other trackers.
    lock: Option<File>,
}

/// A part of what is armed, all of one kind.
#[derive(Debug)]
struct Segment {
    range: HostRange,
    shared: bool,
    /// The pages that were there when last looked at, one bit each.
    populated: Vec<u64>,
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
        let Self { watched, freeze, segments, scanner, .. } = self;
        freeze.while_frozen(&mut || {
            watched.with_pagemap(|pagemap| {
                for segment in &mut *segments {
                    segment.read(scanner, pagemap, &mut found)?;
                }
                more(scanner, pagemap)
            })?;
            scanner.calls += 1;
            let cleared = clear_refs(watched.target.pid(), ClearRefs::SoftDirty);
            watched.alive()?;
            Ok(cleared?)
        })
    }

    fn segments_for(&self, ranges: &[Tracked]) -> Result<Vec<Segment>, DirtyError> {
        let vmas = self.watched.mappings(Detail::PageSize)?;
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
                let words = (range.len() >> base.shift()).div_ceil(64) as usize;
                segments.push(Segment { range, shared, populated: vec![0; words] });
            }
        }
        Ok(segments)
    }
}

impl Segment {
    /// Reports the pages that are dirty, and notes which are there.
    fn read(
        &mut self,
        scanner: &mut Scanner,
        pagemap: &Pagemap,
        found: &mut impl FnMut(HostRange),
    ) -> Result<(), DirtyError> {
        let (mut run, mut index) = (Run::default(), 0_u64);
        let read = scanner.entries(pagemap, self.range, |page, entry| {
            let word = &mut self.populated[(index / 64) as usize];
            let bit = 1 << (index % 64);
            let (was_there, is_there) = (*word & bit != 0, entry.present() || entry.swapped());
            let vanished = !is_there && (was_there || self.shared);
            if entry.soft_dirty() || vanished {
                run.add(page, found);
            }
            // What failed to be read is looked at again, with the bits still there; but that a page
            // has vanished is seen only once, and reported here.
            *word = if is_there { *word | bit } else { *word & !bit };
            index += 1;
        });
        run.end(found);
        read.map_err(|failed| failed.error.into())
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
        let mut new = self.segments_for(ranges)?;
        // Clearing takes the bits of what is armed already.
        let mut pending = std::mem::take(&mut self.pending);
        let result = self.collect(
            |run| pending.push(run),
            |scanner, pagemap| {
                new.iter_mut().try_for_each(|segment| segment.read(scanner, pagemap, &mut |_| ()))
            },
        );
        self.pending = pending;
        result?;
        self.segments.append(&mut new);
        self.ranges.extend_from_slice(ranges);
        Ok(())
    }

    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        check_room(&self.ranges, into)?;
        let calls_before = self.scanner.calls;
        let mut harvested = Harvested::default();
        for run in self.pending.drain(..) {
            harvested.pages += into.mark(run);
        }
        let mut pages = 0;
        self.collect(|run| pages += into.mark(run), |_, _| Ok(()))?;
        harvested.pages += pages;
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
    /// Cuts the segments down to the ranges.
    fn drop_segments_that_are_gone(&mut self) {
        let page = PageSize::base();
        let mut left = Vec::new();
        for segment in &self.segments {
            for tracked in &self.ranges {
                let Some(range) = segment.range.intersection(tracked.range) else { continue };
                let offset = range.start().get() - segment.range.start().get();
                let first = offset >> page.shift();
                let pages = range.len() >> page.shift();
                let mut populated = vec![0; pages.div_ceil(64) as usize];
                for index in 0..pages {
                    let old = first + index;
                    let bit = segment.populated[(old / 64) as usize] >> (old % 64) & 1;
                    populated[(index / 64) as usize] |= bit << (index % 64);
                }
                left.push(Segment { range, shared: segment.shared, populated });
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

/// Keeps other trackers of this crate away, in whatever process they are.
fn lock(target: Target) -> Result<File, DirtyError> {
    let path = target.path("clear_refs");
    let pid = target.pid();
    let file = match OpenOptions::new().write(true).open(&path) {
        Ok(file) => file,
        Err(error) if is_gone(&error) => return Err(DirtyError::ProcessGone { pid }),
        Err(source) => return Err(DirtyError::Proc { path, source }),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::AGAIN) => Err(DirtyError::AlreadyTracked { pid }),
        Err(errno) => Err(DirtyError::Proc { path, source: errno.into() }),
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
