//! A set of pages that is filled one by one and emptied by words.

use pageferry_memory::{GranuleIndex, GranuleRange};

/// Pages of a slot. Emptying it takes time by what is in it, and a 4096th of what could be.
#[derive(Debug)]
pub(super) struct Pages {
    len: u64,
    words: Box<[u64]>,
    /// A bit for each word that is not zero.
    summary: Box<[u64]>,
}

impl Pages {
    pub(super) fn new(len: u64) -> Self {
        let words = len.div_ceil(64) as usize;
        Self { len, words: vec![0; words].into(), summary: vec![0; words.div_ceil(64)].into() }
    }

    /// Adds a page; false when there is no such page.
    pub(super) fn add(&mut self, page: u64) -> bool {
        if page >= self.len {
            return false;
        }
        let word = (page / 64) as usize;
        self.words[word] |= 1 << (page % 64);
        self.summary[word / 64] |= 1 << (word % 64);
        true
    }

    /// Adds a word of pages, as [`take`](Self::take) of a set of the same length tells it.
    pub(super) fn add_word(&mut self, first: u64, bits: u64) {
        let word = (first / 64) as usize;
        self.words[word] |= bits;
        self.summary[word / 64] |= 1 << (word % 64);
    }

    pub(super) fn add_all(&mut self, pages: GranuleRange) {
        for page in pages.iter() {
            self.add(page.get());
        }
    }

    /// Whether there is none in it.
    pub(super) fn is_empty(&self) -> bool {
        self.summary.iter().all(|summary| *summary == 0)
    }

    /// Removes all, told as words in ascending order: the page that the lowest bit is for, and the
    /// bits, never none. Answers how many pages they were.
    pub(super) fn take(&mut self, told: &mut dyn FnMut(u64, u64)) -> u64 {
        let mut pages = 0;
        for (n, summary) in self.summary.iter_mut().enumerate() {
            while *summary != 0 {
                let word = n * 64 + summary.trailing_zeros() as usize;
                // Out of it before it is told: whoever is told may panic.
                *summary &= *summary - 1;
                let bits = std::mem::take(&mut self.words[word]);
                pages += u64::from(bits.count_ones());
                told(word as u64 * 64, bits);
            }
        }
        pages
    }
}

/// Puts words of bits together to runs, slot by slot, as long as possible.
pub(super) struct Runs<'a> {
    slot: u32,
    run: GranuleRange,
    told: &'a mut dyn FnMut(u32, GranuleRange),
}

impl<'a> Runs<'a> {
    pub(super) fn new(told: &'a mut dyn FnMut(u32, GranuleRange)) -> Self {
        Self { slot: 0, run: GranuleRange::default(), told }
    }

    /// The next word of a slot, whose lowest bit is for the page `first`.
    pub(super) fn word(&mut self, slot: u32, first: u64, bits: u64) {
        let mut bits = bits;
        while bits != 0 {
            let low = bits.trailing_zeros();
            let count = (bits >> low).trailing_ones();
            let start = GranuleIndex::new(first + u64::from(low));
            if !self.run.is_empty() && self.slot == slot && self.run.end() == start {
                self.run = GranuleRange::new(self.run.first(), self.run.count() + u64::from(count));
            } else {
                self.finish();
                (self.slot, self.run) = (slot, GranuleRange::new(start, count.into()));
            }
            bits &= !((u64::MAX >> (64 - count)) << low);
        }
    }

    /// After the last word.
    pub(super) fn finish(&mut self) {
        let run = std::mem::take(&mut self.run);
        if !run.is_empty() {
            (self.told)(self.slot, run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(pages: &mut Pages) -> (u64, Vec<(u64, u64)>) {
        let mut told = Vec::new();
        let mut tell = |_, run: GranuleRange| told.push((run.first().get(), run.count()));
        let mut runs = Runs::new(&mut tell);
        let count = pages.take(&mut |first, bits| runs.word(7, first, bits));
        runs.finish();
        assert!(pages.is_empty());
        (count, told)
    }

    #[test]
    fn runs_are_as_long_as_possible() {
        let mut pages = Pages::new(10_000);
        assert_eq!(taken(&mut pages), (0, vec![]));
        for page in [9_999, 0, 63, 64, 65, 130, 130, 4096, 4095] {
            assert!(pages.add(page));
        }
        pages.add_all(GranuleRange::new(GranuleIndex::new(128 * 64 - 2), 70));
        assert!(!pages.add(10_000) && !pages.is_empty());
        let runs = vec![(0, 1), (63, 3), (130, 1), (4095, 2), (128 * 64 - 2, 70), (9_999, 1)];
        assert_eq!(taken(&mut pages), (78, runs));
        assert_eq!(taken(&mut pages), (0, vec![]));
    }

    #[test]
    fn whole_words_run_on() {
        let mut pages = Pages::new(256);
        pages.add_all(GranuleRange::new(GranuleIndex::new(0), 256));
        let mut other = Pages::new(256);
        pages.take(&mut |first, bits| other.add_word(first, bits));
        assert!(pages.is_empty());
        assert_eq!(taken(&mut other), (256, vec![(0, 256)]));
    }

    #[test]
    fn no_run_goes_from_slot_to_slot() {
        let mut told = Vec::new();
        let mut tell = |slot, run: GranuleRange| told.push((slot, run.first().get(), run.count()));
        let mut runs = Runs::new(&mut tell);
        for (slot, first, bits) in [(3, 0, 1 << 63), (4, 64, 1), (4, 128, u64::MAX), (4, 192, 1)] {
            runs.word(slot, first, bits);
        }
        runs.finish();
        runs.finish();
        assert_eq!(told, [(3, 63, 1), (4, 64, 1), (4, 128, 65)]);
    }
}
