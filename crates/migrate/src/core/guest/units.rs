//! Sets of units of a guest's memory.

use std::sync::atomic::{AtomicU64, Ordering};

use super::UnitRun;
use crate::core::outstanding::{BITS, words};

/// One bit a unit, by the index of its region.
///
/// Lock-free and without allocation after [`new`](Self::new). Whoever takes a bit has it alone;
/// the order between different units is for the caller to see to.
///
/// Methods panic if a region does not exist or a range is outside it.
#[derive(Debug)]
pub struct UnitSet {
    regions: Vec<Region>,
    total: AtomicU64,
}

#[derive(Debug)]
struct Region {
    units: u64,
    words: Box<[AtomicU64]>,
}

impl UnitSet {
    /// An empty set of regions with these numbers of units.
    #[must_use]
    pub fn new(units: impl IntoIterator<Item = u64>) -> Self {
        let regions = units
            .into_iter()
            .map(|units| Region {
                units,
                words: (0..units.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect(),
            })
            .collect();
        Self { regions, total: AtomicU64::new(0) }
    }

    /// An empty set of the same regions.
    #[must_use]
    pub fn empty_like(&self) -> Self {
        Self::new(self.regions.iter().map(|region| region.units))
    }

    /// A set of its own with the same units.
    #[cfg(test)]
    pub(super) fn fork(&self) -> Self {
        let copy = self.empty_like();
        for region in 0..self.regions.len() {
            self.runs(region, true).for_each(|run| {
                copy.insert(region, run);
            });
        }
        copy
    }

    /// Units in the set.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }

    /// Units that the regions have, in the set or not.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.regions.iter().map(|region| region.units).sum()
    }

    fn words(&self, region: usize, run: UnitRun) -> impl Iterator<Item = (&AtomicU64, u64, u64)> {
        let region = &self.regions[region];
        let within = run.first.checked_add(run.count).is_some_and(|end| end <= region.units);
        assert!(within, "{run:?} is outside the region's {} units", region.units);
        words(run.first, run.count)
            .map(|(word, bits)| (&region.words[word], bits, word as u64 * BITS))
    }

    /// Puts a run into the set; returns how many units of it were not in it.
    pub fn insert(&self, region: usize, run: UnitRun) -> u64 {
        let mut new = 0;
        for (word, bits, _) in self.words(region, run) {
            new += u64::from((bits & !word.fetch_or(bits, Ordering::AcqRel)).count_ones());
        }
        self.total.fetch_add(new, Ordering::AcqRel);
        new
    }

    /// Takes a run out of the set; returns how many units of it were in it.
    pub fn remove(&self, region: usize, run: UnitRun) -> u64 {
        let mut gone = 0;
        for (word, bits, _) in self.words(region, run) {
            gone += u64::from((bits & word.fetch_and(!bits, Ordering::AcqRel)).count_ones());
        }
        self.total.fetch_sub(gone, Ordering::AcqRel);
        gone
    }

    /// The first unit of a run that is not in the set.
    #[must_use]
    pub fn absent(&self, region: usize, run: UnitRun) -> Option<u64> {
        self.words(region, run).find_map(|(word, bits, base)| {
            let absent = bits & !word.load(Ordering::Acquire);
            (absent != 0).then(|| base + u64::from(absent.trailing_zeros()))
        })
    }

    /// Takes a run that must be in the set as a whole out of it.
    ///
    /// # Errors
    /// The first unit that is not in it; nothing is taken then.
    pub fn take(&self, region: usize, run: UnitRun) -> Result<(), u64> {
        if let Some(absent) = self.absent(region, run) {
            return Err(absent);
        }
        let gone = self.remove(region, run);
        // Somebody else took a part at the same time: neither may have it, which is for the
        // caller to say; the counts stay right.
        if gone == run.count { Ok(()) } else { Err(run.first) }
    }

    /// Takes out of the set the first units that follow one another in a run; `None` if there are
    /// none. Nobody else gets them.
    pub fn claim(&self, region: usize, run: UnitRun) -> Option<UnitRun> {
        let mut found: Option<UnitRun> = None;
        for (word, bits, base) in self.words(region, run) {
            let (start, taken) = loop {
                let now = word.load(Ordering::Acquire);
                let start = match (found, now & bits) {
                    (None, 0) => break (0, 0),
                    (None, here) => here.trailing_zeros(),
                    // What was claimed before ends where this word begins.
                    (Some(_), _) => 0,
                };
                let taken = ((now & bits) >> start).trailing_ones();
                let mask = (u64::MAX >> (u64::BITS - taken.max(1))) << start;
                let left = if taken == 0 { now } else { now & !mask };
                let swapped = word.compare_exchange(now, left, Ordering::AcqRel, Ordering::Acquire);
                if swapped.is_ok() {
                    break (start, taken);
                }
            };
            if taken > 0 {
                let first = base + u64::from(start);
                found.get_or_insert(UnitRun { first, count: 0 }).count += u64::from(taken);
            }
            if found.is_some() && start + taken < u64::BITS {
                break;
            }
        }
        if let Some(run) = found {
            self.total.fetch_sub(run.count, Ordering::AcqRel);
        }
        found
    }

    /// The first unit from `from` on that is in the set (`wanted`) or is not; where there is none,
    /// the region's number of units.
    fn seek(&self, region: usize, from: u64, wanted: bool) -> u64 {
        let Region { units, words } = &self.regions[region];
        let mut at = from;
        while at < *units {
            let word = words[(at / BITS) as usize].load(Ordering::Acquire);
            let here = (if wanted { word } else { !word }) >> (at % BITS);
            if here != 0 {
                return (at + u64::from(here.trailing_zeros())).min(*units);
            }
            at = (at / BITS + 1) * BITS;
        }
        *units
    }

    /// The longest runs of a region that are in the set (`wanted`), or outside it, ascending.
    pub fn runs(&self, region: usize, wanted: bool) -> impl Iterator<Item = UnitRun> {
        self.runs_from(region, 0, wanted)
    }

    /// The same, from unit `from` on.
    pub(super) fn runs_from(
        &self,
        region: usize,
        mut from: u64,
        wanted: bool,
    ) -> impl Iterator<Item = UnitRun> {
        std::iter::from_fn(move || {
            let first = self.seek(region, from, wanted);
            from = self.seek(region, first, !wanted);
            (first < from).then(|| UnitRun { first, count: from - first })
        })
    }

    /// The first unit that is neither in this set nor in `other`, which is of the same regions.
    #[must_use]
    pub fn uncovered(&self, other: &Self) -> Option<(usize, u64)> {
        (0..self.regions.len()).find_map(|region| {
            let absent = self.runs(region, false);
            absent.filter_map(|run| other.absent(region, run)).next().map(|unit| (region, unit))
        })
    }

    /// Takes everything out of the set that is not in `other`, which is of the same regions.
    pub(super) fn retain(&self, other: &Self) {
        for region in 0..self.regions.len() {
            other.runs(region, false).for_each(|run| {
                self.remove(region, run);
            });
        }
    }

    /// Makes the set hold what `other`, which is of the same regions, does not.
    pub(super) fn become_complement(&self, other: &Self) {
        for region in 0..self.regions.len() {
            let units = self.regions[region].units;
            self.remove(region, UnitRun { first: 0, count: units });
            other.runs(region, false).for_each(|run| {
                self.insert(region, run);
            });
        }
    }
}
