//! Sets of addresses: ranges that ascend and do not overlap.

use pageferry_uffd::HostRange;

/// The parts of `ranges` (ascending, not overlapping) inside `within`.
pub(crate) fn clip(ranges: &[HostRange], within: HostRange) -> impl Iterator<Item = HostRange> {
    let first = ranges.partition_point(|range| range.end() <= within.start());
    ranges[first..]
        .iter()
        .take_while(move |range| range.start() < within.end())
        .filter_map(move |range| {
            let start = range.start().max(within.start());
            HostRange::from_bounds(start, range.end().min(within.end()))
        })
        .filter(|range| !range.is_empty())
}

/// What of `before` is not in `now` any more. Both are ascending and do not overlap.
pub(crate) fn lost(before: &[HostRange], now: &[HostRange]) -> Vec<HostRange> {
    let mut lost = Vec::new();
    for range in before {
        let mut at = range.start();
        for kept in clip(now, *range) {
            if at < kept.start() {
                lost.push(HostRange::new(at, kept.start().get() - at.get()));
            }
            at = kept.end();
        }
        if at < range.end() {
            lost.push(HostRange::new(at, range.end().get() - at.get()));
        }
    }
    lost
}

/// Ascending, not overlapping, and no two of them adjacent.
pub(crate) fn union(mut ranges: Vec<HostRange>) -> Vec<HostRange> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start());
    let mut united: Vec<HostRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match united.last_mut() {
            Some(last) if range.start() <= last.end() => {
                let end = last.end().max(range.end());
                *last = HostRange::new(last.start(), end.get() - last.start().get());
            }
            _ => united.push(range),
        }
    }
    united
}

#[cfg(test)]
mod tests {
    use pageferry_uffd::HostAddress;

    use super::*;

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::new(HostAddress::new(start), end - start)
    }

    #[test]
    fn clipped_and_united() {
        let ranges = [range(2, 4), range(6, 8), range(9, 12)];
        let inside: Vec<_> = clip(&ranges, range(3, 10)).collect();
        assert_eq!(inside, [range(3, 4), range(6, 8), range(9, 10)]);
        assert_eq!(clip(&ranges, range(4, 6)).count(), 0);
        let mixed = vec![range(6, 8), range(1, 3), range(3, 5), range(7, 9), range(20, 20)];
        assert_eq!(union(mixed), [range(1, 5), range(6, 9)]);
    }

    #[test]
    fn what_is_gone_is_found() {
        let before = [range(0, 10), range(20, 30), range(40, 41)];
        let now = [range(2, 4), range(6, 25), range(28, 50)];
        assert_eq!(lost(&before, &now), [range(0, 2), range(4, 6), range(25, 28)]);
        assert_eq!(lost(&now, &now), []);
        assert_eq!(lost(&before, &[]).len(), 3);
    }
}
