//! What has been said of every block so far; what is said later counts.

use std::collections::BTreeMap;

/// What a run of blocks is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Stored, from the block with this [number](super::Known) on.
    Data(u64),
    Zero,
    Poisoned,
    Gone,
}

impl Kind {
    /// What lies so many blocks further on in a run of this.
    pub(crate) fn skip(self, count: u64) -> Self {
        match self {
            Self::Data(block) => Self::Data(block + count),
            other => other,
        }
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
struct Run {
    count: u64,
    kind: Kind,
}

/// Runs by their first block, apart, and none of them continued by the next one.
#[derive(Default, Debug)]
pub(crate) struct Runs {
    map: BTreeMap<u64, Run>,
}

impl Runs {
    /// Says that `count` blocks from `first` on, at least one, are this.
    pub(crate) fn set(&mut self, first: u64, count: u64, kind: Kind) {
        let end = first + count;
        let (mut first, mut run) = (first, Run { count, kind });
        // Mostly it lies behind everything else.
        if self.map.last_key_value().is_some_and(|(start, last)| start + last.count > first) {
            self.carve(first, end);
        }
        if let Some((start, before)) = self.map.range(..first).next_back()
            && start + before.count == first
            && before.kind.skip(before.count) == kind
        {
            (first, run) = (*start, Run { count: before.count + count, kind: before.kind });
        }
        if let Some(after) = self.map.get(&end)
            && after.kind == kind.skip(count)
        {
            run.count += after.count;
            self.map.remove(&end);
        }
        self.map.insert(first, run);
    }

    /// Forgets what was said of `first..end`.
    fn carve(&mut self, first: u64, end: u64) {
        if let Some((start, run)) = self.map.range(..first).next_back() {
            let (start, run) = (*start, *run);
            let run_end = start + run.count;
            if run_end > first {
                self.map.insert(start, Run { count: first - start, ..run });
                self.keep_tail(start, run, end);
            }
        }
        while let Some((start, run)) = self.map.range(first..end).next() {
            let (start, run) = (*start, *run);
            self.map.remove(&start);
            self.keep_tail(start, run, end);
        }
    }

    /// Keeps what of a run lies from `end` on.
    fn keep_tail(&mut self, start: u64, run: Run, end: u64) {
        let run_end = start + run.count;
        if run_end > end {
            let tail = Run { count: run_end - end, kind: run.kind.skip(end - start) };
            self.map.insert(end, tail);
        }
    }

    /// The runs in ascending order: first block, count and what they are.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, Kind)> {
        self.map.iter().map(|(first, run)| (*first, run.count, run.kind))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kind() -> impl Strategy<Value = Kind> {
        prop_oneof![
            (0..40_u64).prop_map(Kind::Data),
            Just(Kind::Zero),
            Just(Kind::Poisoned),
            Just(Kind::Gone),
        ]
    }

    proptest! {
        #[test]
        fn says_what_was_said_last(
            said in prop::collection::vec((0..40_u64, 1..20_u64, kind()), 0..40),
        ) {
            let mut runs = Runs::default();
            let mut model = vec![None; 64];
            for (first, count, kind) in said {
                runs.set(first, count, kind);
                for n in 0..count {
                    model[(first + n) as usize] = Some(kind.skip(n));
                }
            }
            let mut found = vec![None; 64];
            let mut last: Option<(u64, Kind)> = None;
            for (first, count, kind) in runs.iter() {
                prop_assert!(count > 0);
                if let Some((end, next)) = last {
                    prop_assert!(end < first || (end == first && next != kind), "{runs:?}");
                }
                last = Some((first + count, kind.skip(count)));
                for n in 0..count {
                    found[(first + n) as usize] = Some(kind.skip(n));
                }
            }
            prop_assert_eq!(found, model);
        }
    }
}
