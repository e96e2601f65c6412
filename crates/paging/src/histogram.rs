//! A latency histogram that many threads, and signal handlers, record into without locking.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Buckets per power of two: values are kept to within 1/8.
const SUB: u32 = 8;
const SUB_BITS: u32 = SUB.trailing_zeros();
/// Values up to 2^40 ns (18 minutes); longer ones land in the last bucket.
const POWERS: u32 = 40;
const BUCKETS: usize = ((POWERS - SUB_BITS + 1) * SUB) as usize;

/// Log-linear, fixed size, allocation-free on record. Nanoseconds in, quantiles out.
pub(crate) struct Histogram {
    buckets: Box<[AtomicU64]>,
    max: AtomicU64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max: AtomicU64::new(0) }
    }

    pub(crate) fn record(&self, nanos: u64) {
        self.buckets[bucket_of(nanos)].fetch_add(1, Relaxed);
        // Read first: the maximum changes rarely, and a plain load keeps its cache line shared.
        if nanos > self.max.load(Relaxed) {
            self.max.fetch_max(nanos, Relaxed);
        }
    }

    pub(crate) fn add_to(&self, total: &mut Latency) {
        for (sum, bucket) in total.buckets.iter_mut().zip(self.buckets.iter()) {
            *sum += bucket.load(Relaxed);
        }
        total.max = total.max.max(self.max.load(Relaxed));
    }
}

fn bucket_of(value: u64) -> usize {
    if value < u64::from(SUB) {
        return value as usize;
    }
    let power = 63 - value.leading_zeros();
    let sub = (value >> (power - SUB_BITS)) as u32 & (SUB - 1);
    (((power - SUB_BITS + 1) * SUB + sub) as usize).min(BUCKETS - 1)
}

/// The largest value that falls into a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let (power, sub) = (bucket as u32 / SUB, bucket as u64 % u64::from(SUB));
    if power == 0 {
        return sub;
    }
    ((u64::from(SUB) + sub + 1) << (power - 1)) - 1
}

/// A latency distribution, as read at one moment. Values are kept to within one eighth.
#[derive(Clone)]
pub struct Latency {
    buckets: Vec<u64>,
    max: u64,
}

impl Latency {
    pub(crate) fn empty() -> Self {
        Self { buckets: vec![0; BUCKETS], max: 0 }
    }

    /// How many values were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The smallest recorded value that at least `q` (0 to 1) of all values do not exceed;
    /// `None` when nothing was recorded.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = ((q.clamp(0.0, 1.0) * count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return Some(Duration::from_nanos(upper_bound(bucket).min(self.max)));
            }
        }
        Some(self.max())
    }

    /// The largest value.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }
}

impl std::fmt::Debug for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Latency")
            .field("count", &self.count())
            .field("p50", &self.quantile(0.5))
            .field("p99", &self.quantile(0.99))
            .field("max", &self.max())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_within_an_eighth_below_its_buckets_bound() {
        for shift in 0..40 {
            for value in [1u64 << shift, (1 << shift) + (1 << shift) / 3, (2 << shift) - 1] {
                let bound = upper_bound(bucket_of(value));
                assert!(bound >= value, "{value} {bound}");
                assert!(bound - value <= value / 8, "{value} {bound}");
            }
        }
    }

    #[test]
    fn buckets_are_contiguous() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(upper_bound(bucket)), bucket);
            assert_eq!(bucket_of(upper_bound(bucket) + 1), bucket + 1);
        }
    }

    #[test]
    fn quantiles() {
        let histogram = Histogram::new();
        for value in 1..=1000 {
            histogram.record(value * 1000);
        }
        let mut latency = Latency::empty();
        histogram.add_to(&mut latency);
        assert_eq!(latency.count(), 1000);
        assert_eq!(latency.max(), Duration::from_micros(1000));
        let p50 = latency.quantile(0.5).unwrap().as_nanos() as f64;
        assert!((500_000.0..563_000.0).contains(&p50), "{p50}");
        assert_eq!(latency.quantile(1.0), Some(Duration::from_micros(1000)));
        assert_eq!(Latency::empty().quantile(0.5), None);
    }
}
