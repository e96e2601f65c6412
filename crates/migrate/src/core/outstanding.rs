//! Which granules the source owes.

use std::sync::atomic::{AtomicU64, Ordering};

/// One bit a granule: set when it is asked for, taken when it is answered.
///
/// Lock-free and without allocation after [`new`](Self::new), so that a request can be made from
/// a signal handler.
#[derive(Debug)]
pub struct Outstanding {
    regions: Vec<Box<[AtomicU64]>>,
    total: AtomicU64,
}

pub(super) const BITS: u64 = u64::BITS as u64;

/// The words of `first..first + count` and the bits of the range in each.
pub(super) fn words(first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first + count;
    (first / BITS..end.div_ceil(BITS)).map(move |word| {
        let from = first.max(word * BITS) % BITS;
        let n = end.min((word + 1) * BITS) - first.max(word * BITS);
        let ones = if n == BITS { u64::MAX } else { (1 << n) - 1 };
        (word as usize, ones << from)
    })
}

impl Outstanding {
    /// Nothing is owed of regions with these numbers of granules.
    #[must_use]
    pub fn new(granules: impl IntoIterator<Item = u64>) -> Self {
        Self {
            regions: granules
                .into_iter()
                .map(|n| (0..n.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect())
                .collect(),
            total: AtomicU64::new(0),
        }
    }

    /// Notes that `first..first + count` of the region is about to be asked for.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn owe(&self, region: usize, first: u64, count: u64) {
        // The total first: it may be too high for a moment, but never misses a granule.
        self.total.fetch_add(count, Ordering::AcqRel);
        for (word, bits) in words(first, count) {
            self.regions[region][word].fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Takes back an [`owe`](Self::owe) whose request was never sent.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn forgive(&self, region: usize, first: u64, count: u64) {
        for (word, bits) in words(first, count) {
            self.regions[region][word].fetch_and(!bits, Ordering::AcqRel);
        }
        self.total.fetch_sub(count, Ordering::AcqRel);
    }

    /// Takes the bits of an answer. The total goes down only with
    /// [`settled`](Self::settled), when the answer has been put where it belongs.
    ///
    /// # Errors
    /// The first granule that is not owed. The peer has broken the protocol, and the bits before
    /// it stay taken.
    ///
    /// # Panics
    /// If the range is outside the region.
    pub fn take(&self, region: usize, first: u64, count: u64) -> Result<(), u64> {
        for (word, bits) in words(first, count) {
            let was = self.regions[region][word].fetch_and(!bits, Ordering::AcqRel);
            let missing = bits & !was;
            if missing != 0 {
                return Err(word as u64 * BITS + u64::from(missing.trailing_zeros()));
            }
        }
        Ok(())
    }

    /// Notes that answers of `count` granules have been dealt with; returns whether nothing is
    /// owed any more.
    pub fn settled(&self, count: u64) -> bool {
        self.total.fetch_sub(count, Ordering::AcqRel) == count
    }

    /// Granules asked for and not yet dealt with.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }
}
