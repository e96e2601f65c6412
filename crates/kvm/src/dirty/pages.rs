//! A set of pages that is filled one by one and emptied as runs.

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

    pub(super) fn add_all(&mut self, pages: GranuleRange) {
        for page in pages.iter() {
            self.add(page.get());
        }
    }

    /// Removes all, told as runs in ascending order, as long as possible. Answers how many they were.
    pub(super) fn take(&mut self, told: &mut dyn FnMut(GranuleRange)) -> u64 {
        let mut runs = Runs::default();
        for (n, summary) in self.summary.iter_mut().enumerate() {
            let mut left = std::mem::take(summary);
            while left != 0 {
                let word = n * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                runs.word(word as u64 * 64, std::mem::take(&mut self.words[word]), told);
            }
        }
        runs.finish(told)
    }
}

/// Puts words of bits together to runs.
#[derive(Default)]
pub(super) struct Runs {
    run: GranuleRange,
    pages: u64,
}

impl Runs {
    /// The next word, whose lowest bit is `first`.
    pub(super) fn word(&mut self, first: u64, bits: u64, told: &mut dyn FnMut(GranuleRange)) {
        let mut bits = bits;
        self.pages += u64::from(bits.count_ones());
        while bits != 0 {
            let low = bits.trailing_zeros();
            let count = (bits >> low).trailing_ones();
            let start = GranuleIndex::new(first + u64::from(low));
            if !self.run.is_empty() && self.run.end() == start {
                self.run = GranuleRange::new(self.run.first(), self.run.count() + u64::from(count));
            } else {
                self.tell(told);
                self.run = GranuleRange::new(start, count.into());
            }
            bits &= !((u64::MAX >> (64 - count)) << low);
        }
    }

    /// After the last word: how many pages they were.
    pub(super) fn finish(mut self, told: &mut dyn FnMut(GranuleRange)) -> u64 {
        self.tell(told);
        self.pages
    }

    fn tell(&mut self, told: &mut dyn FnMut(GranuleRange)) {
        if !self.run.is_empty() {
            told(self.run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(pages: &mut Pages) -> (u64, Vec<(u64, u64)>) {
        let mut runs = Vec::new();
        let count = pages.take(&mut |run| runs.push((run.first().get(), run.count())));
        (count, runs)
    }

    #[test]
    fn runs_are_as_long_as_possible() {
        let mut pages = Pages::new(10_000);
        assert_eq!(taken(&mut pages), (0, vec![]));
        for page in [9_999, 0, 63, 64, 65, 130, 130, 4096, 4095] {
            assert!(pages.add(page));
        }
        pages.add_all(GranuleRange::new(GranuleIndex::new(128 * 64 - 2), 70));
        assert!(!pages.add(10_000));
        let runs = vec![(0, 1), (63, 3), (130, 1), (4095, 2), (128 * 64 - 2, 70), (9_999, 1)];
        assert_eq!(taken(&mut pages), (78, runs));
        assert_eq!(taken(&mut pages), (0, vec![]));
    }

    #[test]
    fn whole_words_run_on() {
        let mut pages = Pages::new(256);
        pages.add_all(GranuleRange::new(GranuleIndex::new(0), 256));
        assert_eq!(taken(&mut pages), (256, vec![(0, 256)]));
    }
}
