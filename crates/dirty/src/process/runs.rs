//! Sets of addresses as runs: in ascending order, none empty, none touching the next.

use pageferry_uffd::HostRange;

/// A set of addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Runs(Vec<HostRange>);

impl Runs {
    /// What is in any of the ranges, which may be in any order and overlap.
    pub(super) fn of(mut ranges: Vec<HostRange>) -> Self {
        ranges.sort_unstable_by_key(|range| range.start());
        let mut runs = Self(Vec::with_capacity(ranges.len()));
        for range in ranges {
            runs.push(range);
        }
        runs
    }

    /// Adds a range that begins nowhere before those that are there.
    pub(super) fn push(&mut self, range: HostRange) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.end() >= range.start() => {
                let end = last.end().max(range.end());
                *last = HostRange::from_bounds(last.start(), end).expect("it begins first");
            }
            _ => self.0.push(range),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = HostRange> {
        self.0.iter().copied()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.len()).sum()
    }

    /// What is in either.
    pub(super) fn or(&self, other: &Self) -> Self {
        if other.is_empty() {
            return self.clone();
        }
        Self::of([&self.0[..], &other.0].concat())
    }

    /// What is in both.
    pub(super) fn and(&self, other: &Self) -> Self {
        let (mut both, mut others) = (Self::default(), &other.0[..]);
        for &range in &self.0 {
            // The last of those that end in this range may go on in the next.
            let ended = others.partition_point(|other| other.end() <= range.start());
            others = &others[ended..];
            for other in others.iter().take_while(|other| other.start() < range.end()) {
                both.0.extend(range.intersection(*other));
            }
        }
        both
    }

    /// What is in this one and not in the other.
    pub(super) fn without(&self, other: &Self) -> Self {
        let (mut left, mut others) = (Self::default(), &other.0[..]);
        for &range in &self.0 {
            let ended = others.partition_point(|other| other.end() <= range.start());
            others = &others[ended..];
            let mut from = range.start();
            for other in others.iter().take_while(|other| other.start() < range.end()) {
                if let Some(part) = HostRange::from_bounds(from, other.start()) {
                    left.push(part);
                }
                from = other.end();
            }
            if let Some(part) = HostRange::from_bounds(from, range.end()) {
                left.push(part);
            }
        }
        left
    }

    /// What of it is in a range.
    pub(super) fn within(&self, range: HostRange) -> Self {
        let first = self.0.partition_point(|run| run.end() <= range.start());
        let parts = self.0[first..].iter().take_while(|run| run.start() < range.end());
        Self(parts.filter_map(|run| run.intersection(range)).collect())
    }

    pub(super) fn into_vec(self) -> Vec<HostRange> {
        self.0
    }
}

impl From<HostRange> for Runs {
    fn from(range: HostRange) -> Self {
        let mut runs = Self::default();
        runs.push(range);
        runs
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pageferry_uffd::HostAddress;
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, len: u64) -> HostRange {
        HostRange::new(HostAddress::new(start), len)
    }

    fn truth(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
        ranges.iter().flat_map(|&(start, len)| start..start + len).collect()
    }

    fn runs(ranges: &[(u64, u64)]) -> Runs {
        Runs::of(ranges.iter().map(|&(start, len)| range(start, len)).collect())
    }

    /// What is in it, having looked at its form.
    fn members(runs: &Runs) -> BTreeSet<u64> {
        assert!(runs.iter().all(|run| !run.is_empty()), "{runs:?}");
        assert!(runs.0.windows(2).all(|pair| pair[0].end() < pair[1].start()), "{runs:?}");
        runs.iter().flat_map(|run| run.start().get()..run.end().get()).collect()
    }

    proptest! {
        /// Against the plain truth: sets of addresses.
        #[test]
        fn sets(
            a in prop::collection::vec((0u64..100, 0u64..9), 0..12),
            b in prop::collection::vec((0u64..100, 0u64..9), 0..12),
            part in (0u64..100, 0u64..40),
        ) {
            let (in_a, in_b, (of_a, of_b)) = (truth(&a), truth(&b), (runs(&a), runs(&b)));
            prop_assert_eq!(members(&of_a), in_a.clone());
            prop_assert_eq!(of_a.bytes(), in_a.len() as u64);
            prop_assert_eq!(members(&of_a.or(&of_b)), &in_a | &in_b);
            prop_assert_eq!(members(&of_a.and(&of_b)), &in_a & &in_b);
            prop_assert_eq!(members(&of_a.without(&of_b)), &in_a - &in_b);
            let inside = truth(&[part]);
            prop_assert_eq!(members(&of_a.within(range(part.0, part.1))), &in_a & &inside);
        }
    }
}
