//! A bit for each page of a range.

const BITS: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(crate) struct PageBits(Vec<u64>);

impl PageBits {
    /// For so many pages, no bit set.
    pub(crate) fn new(pages: u64) -> Self {
        Self(vec![0; pages.div_ceil(BITS) as usize])
    }

    pub(crate) fn clear(&mut self) {
        self.0.fill(0);
    }

    pub(crate) fn set(&mut self, first: u64, count: u64) {
        for (word, mask) in words(first, count) {
            self.0[word] |= mask;
        }
    }

    /// Shows the pages among these whose bit is not set: the first of each run, and their number.
    pub(crate) fn each_unset(&self, first: u64, count: u64, mut each: impl FnMut(u64, u64)) {
        let (mut start, mut len) = (first, 0);
        for (word, mask) in words(first, count) {
            let mut left = !self.0[word] & mask;
            while left != 0 {
                let low = left.trailing_zeros();
                let more = (left >> low).trailing_ones();
                let page = word as u64 * BITS + u64::from(low);
                if start + len != page {
                    if len > 0 {
                        each(start, len);
                    }
                    (start, len) = (page, 0);
                }
                len += u64::from(more);
                left &= !((u64::MAX >> (u64::BITS - more)) << low);
            }
        }
        if len > 0 {
            each(start, len);
        }
    }

    /// Those of so many pages from this one on.
    pub(crate) fn part(&self, first: u64, count: u64) -> Self {
        let mut part = Self::new(count);
        part.set(0, count);
        self.each_unset(first, count, |page, count| part.unset(page - first, count));
        part
    }

    fn unset(&mut self, first: u64, count: u64) {
        for (word, mask) in words(first, count) {
            self.0[word] &= !mask;
        }
    }
}

/// The words that have the bits of these pages, and which bits they are.
fn words(first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let (mut page, end) = (first, first + count);
    std::iter::from_fn(move || {
        let (word, low) = (page / BITS, page % BITS);
        let bits = (end - page).min(BITS - low);
        page += bits;
        (bits > 0).then(|| (word as usize, (u64::MAX >> (BITS - bits)) << low))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unset(bits: &PageBits, first: u64, count: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        bits.each_unset(first, count, |first, count| runs.push((first, count)));
        runs
    }

    #[test]
    fn what_is_not_set() {
        let mut bits = PageBits::new(200);
        bits.set(3, 2);
        bits.set(63, 66);
        assert_eq!(unset(&bits, 0, 200), [(0, 3), (5, 58), (129, 71)]);
        assert_eq!(unset(&bits, 64, 64), []);
        assert_eq!(unset(&bits, 4, 1), []);
        assert_eq!(unset(&bits, 0, 0), []);
        bits.clear();
        assert_eq!(unset(&bits, 1, 199), [(1, 199)]);
    }

    proptest! {
        #[test]
        fn parts_are_the_same_pages(
            sets in prop::collection::vec((0_u64..300, 0_u64..100), 0..8),
            (first, count) in (0_u64..300, 0_u64..100),
        ) {
            let mut bits = PageBits::new(400);
            let mut model = [false; 400];
            for (first, count) in sets {
                bits.set(first, count);
                model[first as usize..(first + count) as usize].fill(true);
            }
            let part = bits.part(first, count);
            let found: Vec<u64> = unset(&part, 0, count)
                .into_iter()
                .flat_map(|(first, count)| first..first + count)
                .collect();
            let expected: Vec<u64> =
                (0..count).filter(|page| !model[(first + page) as usize]).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
