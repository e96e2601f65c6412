//! One bit for every granule that was written.

use std::fmt;

use crate::sync::{AtomicU64, Ordering, zeroed};
use crate::{GranuleIndex, GranuleRange};

const BITS: u64 = u64::BITS as u64;

/// Which granules were written since the last harvest.
///
/// All methods may be called from any number of threads at once. A mark is never lost: one that
/// is set while the bitmap is taken is either part of what is taken, or still there afterwards.
///
/// # Panics
///
/// Every method that takes granules panics when they are not all in the bitmap.
pub struct DirtyBitmap {
    len: u64,
    words: Box<[AtomicU64]>,
}

impl DirtyBitmap {
    /// A bitmap for this many granules, none of them marked.
    pub fn new(granules: u64) -> Self {
        let words = usize::try_from(granules.div_ceil(BITS))
            .expect("the granules of mapped memory can be counted in usize");
        Self { len: granules, words: zeroed(words) }
    }

    /// How many granules it is for.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is for no granules at all.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Marks granules.
    pub fn set(&self, range: GranuleRange) {
        assert!(
            range.end().get() <= self.len,
            "{range} are not all in a bitmap of {} granules",
            self.len
        );
        let mut position = range.first().get();
        let end = range.end().get();
        while position < end {
            let low = position % BITS;
            let count = (end - position).min(BITS - low);
            let mask = (u64::MAX >> (BITS - count)) << low;
            // Not even a granule that looks marked may be skipped: the mark seen could be one that
            // is being taken by somebody who does not see the write yet that this one stands for.
            self.words[(position / BITS) as usize].fetch_or(mask, Ordering::AcqRel);
            position += count;
        }
    }

    /// Marks a word of granules at once: bit n of `bits` stands for the n-th granule from `first`
    /// on, wherever that is.
    #[inline]
    pub fn set_bits(&self, first: GranuleIndex, bits: u64) {
        let Some(last) = bits.checked_ilog2() else { return };
        let first = first.get();
        assert!(
            first.checked_add(last.into()).is_some_and(|last| last < self.len),
            "granules from {first} on are not all in a bitmap of {}",
            self.len
        );
        let (word, low) = ((first / BITS) as usize, first % BITS);
        // As above: whatever looks marked is marked again.
        self.words[word].fetch_or(bits << low, Ordering::AcqRel);
        // In two steps, since 64 is no number of bits to shift by.
        let next = bits >> 1 >> (BITS - 1 - low);
        if next != 0 {
            self.words[word + 1].fetch_or(next, Ordering::AcqRel);
        }
    }

    /// Whether a granule is marked.
    #[inline]
    pub fn test(&self, granule: GranuleIndex) -> bool {
        let index = granule.get();
        assert!(index < self.len, "granule {index} is not in a bitmap of {}", self.len);
        self.words[(index / BITS) as usize].load(Ordering::Acquire) & (1 << (index % BITS)) != 0
    }

    /// Removes all marks, and appends the granules that had one to `runs`, as runs in ascending
    /// order that are as long as possible. Answers how many granules that are.
    pub fn take_into(&self, runs: &mut Vec<GranuleRange>) -> u64 {
        let mut taken = 0;
        let mut run = GranuleRange::default();
        for (index, word) in self.words.iter().enumerate() {
            // Looking first spares a write to every clean word. A mark not seen stays.
            let mut bits =
                if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) };
            taken += u64::from(bits.count_ones());
            while bits != 0 {
                let low = bits.trailing_zeros();
                let count = (bits >> low).trailing_ones();
                let first = GranuleIndex::new(index as u64 * BITS + u64::from(low));
                if run.end() == first && !run.is_empty() {
                    run = GranuleRange::new(run.first(), run.count() + u64::from(count));
                } else {
                    if !run.is_empty() {
                        runs.push(run);
                    }
                    run = GranuleRange::new(first, count.into());
                }
                bits &= !((u64::MAX >> (u64::BITS - count)) << low);
            }
        }
        if !run.is_empty() {
            runs.push(run);
        }
        taken
    }

    /// Marks every granule that `other` has marked.
    ///
    /// # Panics
    ///
    /// When the two are not for the same number of granules.
    pub fn merge(&self, other: &Self) {
        assert_eq!(self.len, other.len, "merging bitmaps of different sizes");
        for (word, other) in self.words.iter().zip(&other.words) {
            let bits = other.load(Ordering::Acquire);
            if bits != 0 {
                word.fetch_or(bits, Ordering::AcqRel);
            }
        }
    }

    /// How many granules are marked.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("len", &self.len)
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, count: u64) -> GranuleRange {
        GranuleRange::new(GranuleIndex::new(first), count)
    }

    #[test]
    fn runs_cross_words() {
        let bitmap = DirtyBitmap::new(300);
        for marked in [range(0, 1), range(60, 70), range(130, 0), range(191, 1), range(299, 1)] {
            bitmap.set(marked);
        }
        let mut runs = vec![range(7, 7)];
        assert_eq!(bitmap.take_into(&mut runs), 73);
        assert_eq!(runs, [range(7, 7), range(0, 1), range(60, 70), range(191, 1), range(299, 1)]);
        assert_eq!(bitmap.count(), 0);
    }

    #[test]
    #[should_panic(expected = "not all in a bitmap of 100")]
    fn marks_beyond_the_end_are_refused() {
        DirtyBitmap::new(100).set(range(99, 2));
    }

    #[test]
    fn bits_are_the_granules_they_stand_for() {
        for (first, bits, expected) in [
            (0, 0b1011, vec![range(0, 2), range(3, 1)]),
            (64, u64::MAX, vec![range(64, 64)]),
            (65, u64::MAX, vec![range(65, 64)]),
            (127, 0b101, vec![range(127, 1), range(129, 1)]),
            (139, 1, vec![range(139, 1)]),
            (1000, 0, vec![]),
        ] {
            let bitmap = DirtyBitmap::new(140);
            bitmap.set_bits(GranuleIndex::new(first), bits);
            let mut runs = Vec::new();
            bitmap.take_into(&mut runs);
            assert_eq!(runs, expected, "{bits:#x} from {first} on");
        }
    }

    #[test]
    #[should_panic(expected = "not all in a bitmap of 100")]
    fn bits_beyond_the_end_are_refused() {
        DirtyBitmap::new(100).set_bits(GranuleIndex::new(99), 0b10);
    }

    #[test]
    fn no_mark_is_lost_while_taking() {
        const GRANULES: u64 = 256;
        const ROUNDS: u64 = 20_000;
        let bitmap = DirtyBitmap::new(GRANULES);
        let written: Vec<_> = (0..GRANULES).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
        let finished = std::sync::atomic::AtomicU32::new(0);
        let mut seen = vec![0; GRANULES as usize];
        std::thread::scope(|scope| {
            for writer in 0..2 {
                let (bitmap, written, finished) = (&bitmap, &written, &finished);
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        let granule = (round * 7 * 2 + writer) % GRANULES;
                        written[granule as usize].store(round, Ordering::Relaxed);
                        bitmap.set(range(granule, 1));
                    }
                    finished.fetch_add(1, Ordering::Release);
                });
            }
            let mut runs = Vec::new();
            loop {
                let last = finished.load(Ordering::Acquire) == 2;
                bitmap.take_into(&mut runs);
                for granule in runs.drain(..).flat_map(GranuleRange::iter) {
                    let granule = granule.get() as usize;
                    seen[granule] = written[granule].load(Ordering::Relaxed);
                }
                if last {
                    break;
                }
            }
        });
        for (granule, seen) in seen.into_iter().enumerate() {
            assert_eq!(seen, written[granule].load(Ordering::Relaxed), "granule {granule}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_vector(
            len in 1_u64..400,
            sets in prop::collection::vec((0_u64..400, 0_u64..150, any::<bool>()), 0..20),
        ) {
            let (one, other) = (DirtyBitmap::new(len), DirtyBitmap::new(len));
            let mut model = vec![false; len as usize];
            for (first, count, which) in sets {
                let first = first.min(len);
                let marked = range(first, count.min(len - first));
                if which { &one } else { &other }.set(marked);
                marked.iter().for_each(|granule| model[granule.get() as usize] = true);
            }
            one.merge(&other);
            for (granule, marked) in model.iter().enumerate() {
                prop_assert_eq!(one.test(GranuleIndex::new(granule as u64)), *marked);
            }
            let wanted = model.iter().filter(|marked| **marked).count() as u64;
            prop_assert_eq!(one.count(), wanted);
            let mut runs = Vec::new();
            prop_assert_eq!(one.take_into(&mut runs), wanted);
            for run in &runs {
                prop_assert!(run.iter().all(|granule| model[granule.get() as usize]));
            }
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first()));
            prop_assert_eq!(runs.iter().map(|run| run.count()).sum::<u64>(), wanted);
        }
    }
}
