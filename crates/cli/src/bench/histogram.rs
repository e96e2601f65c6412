//! A log-linear histogram of fixed size: recording allocates nothing and never fails.

use std::{fmt, time::Duration};

/// Each power of two is divided into this many buckets, so a value is off by at most 1/32.
const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
/// Buckets up to `u64::MAX` nanoseconds.
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB;

/// Durations, in nanoseconds.
#[derive(Clone)]
pub(crate) struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: u64,
}

impl Histogram {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self { buckets: [0; BUCKETS], count: 0, max: 0 })
    }

    pub(crate) fn record(&mut self, value: Duration) {
        let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)] += 1;
        self.count += 1;
        self.max = self.max.max(nanos);
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max = self.max.max(other.max);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The smallest value that at least `share` (0 to 1) of all values do not exceed, rounded up
    /// to its bucket's end. Zero when nothing was recorded.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let rank = ((self.count as f64 * share).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper_bound(index).min(self.max));
            }
        }
        Duration::ZERO
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count)
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("max", &self.max())
            .finish()
    }
}

fn bucket(nanos: u64) -> usize {
    if nanos < SUB as u64 {
        return nanos as usize;
    }
    let shift = nanos.ilog2() - SUB_BITS;
    // The leading one of the mantissa counts as the next row's first bucket.
    shift as usize * SUB + (nanos >> shift) as usize
}

/// The largest value that falls into bucket `index`.
fn upper_bound(index: usize) -> u64 {
    if index < 2 * SUB {
        return index as u64;
    }
    let shift = (index / SUB - 1) as u32;
    let mantissa = (index - shift as usize * SUB) as u64;
    (mantissa << shift) + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_contiguous_and_ordered() {
        let mut values: Vec<u64> = (0..100_000).collect();
        for shift in 0..64 {
            let v = 1u64 << shift;
            values.extend([v - 1, v, v + 1, v + v / 3, v + (v - 1)]);
        }
        values.push(u64::MAX);
        values.sort_unstable();
        let mut last = 0;
        for v in values {
            let index = bucket(v);
            assert!(index >= last && index < BUCKETS, "{v}");
            last = index;
            let top = upper_bound(index);
            assert!(top >= v && top - v <= v / SUB as u64, "{v} counts as {top}");
            assert_eq!(bucket(top), index, "{v}");
        }
        assert_eq!(last, BUCKETS - 1, "the last bucket holds the largest value");
    }

    #[test]
    fn quantiles_of_known_values() {
        let mut h = Histogram::new();
        assert_eq!(h.quantile(0.99), Duration::ZERO);
        for micros in 1..=1000 {
            h.record(Duration::from_micros(micros));
        }
        let mut both = Histogram::new();
        both.merge(&h);
        both.merge(&h);
        assert_eq!(both.count(), 2000);
        for (share, exact) in [(0.5, 500e-6), (0.99, 990e-6), (0.001, 1e-6)] {
            for h in [&h, &both] {
                let got = h.quantile(share).as_secs_f64();
                assert!(got >= exact && got <= exact * 1.04, "{share}: {got} is not {exact}");
            }
        }
        assert_eq!(h.quantile(1.0), Duration::from_millis(1));
        assert_eq!(h.max(), Duration::from_millis(1));
    }
}
