//! The interface of everything that notices writes.

use std::fmt;

use pageferry_memory::PageSize;
use pageferry_uffd::HostRange;

use crate::{
    DirtyError, DirtySet, Target,
    target::{Detail, Watched, unmapped},
};

/// A way to notice writes.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Method {
    /// Soft-dirty bits: `/proc/PID/clear_refs` and `/proc/PID/pagemap`.
    SoftDirty,
    /// Write protection by userfaultfd: the first write to a page waits until it is noted.
    WpBlocking,
    /// Write protection by userfaultfd that the kernel lifts by itself.
    WpAsync,
    /// KVM's dirty log.
    KvmLog,
    /// KVM's dirty ring.
    KvmRing,
}

impl Method {
    /// Its name, such as `wp-async`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SoftDirty => "soft-dirty",
            Self::WpBlocking => "wp-blocking",
            Self::WpAsync => "wp-async",
            Self::KvmLog => "kvm-log",
            Self::KvmRing => "kvm-ring",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A range in which writes are noticed, and how finely.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tracked {
    /// The addresses, in the address space that is tracked.
    pub range: HostRange,
    /// What a write makes dirty: the page around it, of this size. For huge pages of hugetlbfs it is
    /// theirs; for everything else the base page, whether or not it is part of a transparent huge
    /// page.
    pub page: PageSize,
}

impl Tracked {
    /// Memory of base pages.
    pub fn base(range: HostRange) -> Self {
        Self { range, page: PageSize::base() }
    }

    /// How many pages it has.
    pub const fn pages(&self) -> u64 {
        self.range.len() >> self.page.shift()
    }

    /// Whether it is a positive, whole number of pages.
    pub(crate) fn check(&self) -> Result<(), DirtyError> {
        let Self { range, page } = *self;
        let whole = page.is_multiple(range.start().get()) && page.is_multiple(range.len());
        if range.is_empty() || !whole {
            return Err(DirtyError::Unaligned { range, page });
        }
        Ok(())
    }
}

/// What a harvest came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Harvested {
    /// Pages reported. One that was reported twice by the same harvest counts twice.
    pub pages: u64,
    /// Calls of the kernel that took.
    pub calls: u64,
    /// Ranges reported as a whole because it could not be found out what in them was written. They
    /// are armed again.
    pub whole: Vec<HostRange>,
    /// Ranges that are not tracked any more, because they were unmapped, moved away, or replaced by
    /// other mappings. They were reported as a whole, for the last time; whatever is there now may
    /// be armed afresh.
    pub gone: Vec<HostRange>,
}

impl Harvested {
    /// A range that was found to be gone, maybe not for the first time.
    pub(crate) fn lose(&mut self, range: HostRange) {
        if !self.gone.iter().any(|gone| gone.contains_range(range)) {
            self.gone.push(range);
        }
    }
}

/// Notices which pages of some ranges are written to.
///
/// * A write that had returned when [`harvest`](Self::harvest) was called is in the set that this
///   harvest fills, or was in that of an earlier one. A write while it runs is in this one or the
///   next. So whoever copies the reported pages after each harvest has everything that was written
///   before it.
/// * A page may be reported without having been written to.
/// * Noticed is what is written *through the tracked mapping*: not what another mapping of the same
///   file, `write(2)` on it, or a device by DMA into pages pinned before writes.
/// * Contents that change because they are discarded (`madvise(MADV_DONTNEED)`) are reported, too,
///   except where a method says otherwise. A hole punched into a shared file (`MADV_REMOVE` does
///   that, too) is a change made to the file, not through a mapping.
///
/// Dropping a tracker disarms it.
pub trait Tracker: Send + fmt::Debug {
    /// The way writes are noticed.
    fn method(&self) -> Method;

    /// What is armed, and not gone as of the last harvest.
    fn ranges(&self) -> &[Tracked];

    /// Notices writes to these ranges too, from now on. Those armed already stay so, with what was
    /// written to them.
    ///
    /// # Errors
    ///
    /// [`DirtyError`]; none of `ranges` is armed then.
    fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError>;

    /// Adds what was written since the last harvest to `into`, and notices the next writes.
    ///
    /// # Errors
    ///
    /// [`DirtyError`]. Nothing is lost by that: see there.
    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError>;

    /// Stops noticing writes, and leaves the memory as it was before.
    ///
    /// # Errors
    ///
    /// The first [`DirtyError`]; as much as possible is released nevertheless.
    fn disarm(&mut self) -> Result<(), DirtyError>;
}

/// Checks ranges that are to be armed beside others.
pub(crate) fn check_new(armed: &[Tracked], new: &[Tracked]) -> Result<(), DirtyError> {
    for (index, tracked) in new.iter().enumerate() {
        tracked.check()?;
        let others = armed.iter().chain(&new[..index]);
        if let Some(other) = others.map(|other| other.range).find(|o| o.overlaps(tracked.range)) {
            return Err(DirtyError::Overlaps { range: tracked.range, other });
        }
    }
    Ok(())
}

/// Takes the parts of `gone` out of `ranges`.
pub(crate) fn remove(ranges: &mut Vec<Tracked>, gone: HostRange) {
    let mut left = Vec::with_capacity(ranges.len() + 1);
    for tracked in ranges.drain(..) {
        match tracked.range.intersection(gone) {
            None => left.push(tracked),
            Some(common) => {
                let parts = [
                    HostRange::from_bounds(tracked.range.start(), common.start()),
                    HostRange::from_bounds(common.end(), tracked.range.end()),
                ];
                let parts = parts.into_iter().flatten().filter(|part| !part.is_empty());
                left.extend(parts.map(|range| Tracked { range, ..tracked }));
            }
        }
    }
    *ranges = left;
}

/// Reports what is not mapped any more: there is no page of it that could be found to be dirty.
pub(crate) fn note_unmapped(
    watched: &Watched,
    ranges: &[Tracked],
    into: &DirtySet,
    harvested: &mut Harvested,
) -> Result<(), DirtyError> {
    if watched.target == Target::Own {
        // Of this process only memory is tracked that promises to stay mapped.
        return Ok(());
    }
    let vmas = watched.mappings(Detail::Place)?;
    for tracked in ranges {
        for part in unmapped(tracked.range, &vmas) {
            harvested.pages += into.mark(part);
            harvested.lose(part);
        }
    }
    Ok(())
}

/// Whoever harvests must have room for all that may be found, before anything is armed again.
pub(crate) fn check_room(ranges: &[Tracked], into: &DirtySet) -> Result<(), DirtyError> {
    match ranges.iter().find(|tracked| !into.covers(tracked.range)) {
        Some(tracked) => Err(DirtyError::NotInSet { range: tracked.range }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use pageferry_uffd::HostAddress;

    use super::*;

    fn tracked(first: u64, pages: u64) -> Tracked {
        let page = PageSize::SIZE_4K;
        let range = HostRange::new(HostAddress::new(first * page.bytes()), pages * page.bytes());
        Tracked { range, page }
    }

    #[test]
    fn what_is_armed_neither_overlaps_nor_has_parts_of_pages() {
        let armed = [tracked(10, 4)];
        assert!(check_new(&armed, &[tracked(14, 1), tracked(9, 1)]).is_ok());
        for bad in [vec![tracked(13, 2)], vec![tracked(20, 2), tracked(21, 2)]] {
            assert!(matches!(check_new(&armed, &bad), Err(DirtyError::Overlaps { .. })), "{bad:?}");
        }
        let half = Tracked { page: PageSize::SIZE_2M, ..tracked(512, 1) };
        for bad in [tracked(20, 0), half] {
            let refused = check_new(&armed, &[bad]);
            assert!(matches!(refused, Err(DirtyError::Unaligned { .. })), "{bad:?}");
        }
    }

    #[test]
    fn what_is_gone_leaves_the_rest() {
        for (gone, left) in [
            (tracked(0, 10), vec![tracked(10, 4)]),
            (tracked(10, 4), vec![]),
            (tracked(9, 2), vec![tracked(11, 3)]),
            (tracked(13, 9), vec![tracked(10, 3)]),
            (tracked(11, 1), vec![tracked(10, 1), tracked(12, 2)]),
        ] {
            let mut ranges = vec![tracked(10, 4)];
            remove(&mut ranges, gone.range);
            assert_eq!(ranges, left, "{gone:?}");
        }
    }
}
