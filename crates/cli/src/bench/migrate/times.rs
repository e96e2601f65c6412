//! How long the guest waited for memory: as the pager measured it, and by the guest's own clock.

use std::time::Duration;

use pageferry::paging::Latency;
use pageferry_vmm::Report;
use serde::{Deserialize, Serialize};

/// What the pager measured: from a fault's arrival in the process to its page's presence.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Waits {
    pub(super) faults: u64,
    /// All of them together: too long by an eighth at most.
    pub(super) blocked: Duration,
    pub(super) p50: Option<Duration>,
    pub(super) p99: Option<Duration>,
    pub(super) max: Option<Duration>,
}

/// A latency's values are asked for one by one, up to so many.
const MOST_SAMPLES: u64 = 100_000;

impl Waits {
    pub(super) fn of(latency: &Latency) -> Self {
        let faults = latency.count();
        let samples = faults.min(MOST_SAMPLES);
        let sum: Duration = (0..samples)
            .filter_map(|sample| latency.quantile((sample as f64 + 0.5) / samples as f64))
            .sum();
        Self {
            faults,
            blocked: sum.mul_f64(faults as f64 / samples.max(1) as f64),
            p50: latency.quantile(0.5),
            p99: latency.quantile(0.99),
            max: (faults > 0).then(|| latency.max()),
        }
    }
}

/// How long touches took the guest, by its time stamp counter. What it counted before it was moved
/// is counted on after.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct GuestTimes {
    /// The n-th counts times with n significant bits.
    log2: Vec<u64>,
    ticks_per_ms: Option<u32>,
}

impl GuestTimes {
    pub(super) fn of(report: &Report) -> Self {
        let mut all = Self::default();
        for vcpu in &report.vcpus {
            let times = &vcpu.times;
            all.log2.resize(all.log2.len().max(times.log2.len()), 0);
            for (sum, count) in all.log2.iter_mut().zip(&times.log2) {
                *sum += count;
            }
            all.ticks_per_ms = all.ticks_per_ms.or(times.ticks_per_ms);
        }
        all
    }

    /// What has been added since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let earlier = earlier.log2.iter().copied().chain(std::iter::repeat(0));
        let log2 = self.log2.iter().zip(earlier).map(|(all, before)| all.saturating_sub(before));
        Self { log2: log2.collect(), ticks_per_ms: self.ticks_per_ms }
    }

    /// A time in microseconds that `share` (0 to 1) of the slowest `count` touches do not exceed:
    /// true to within a factor of two. `None` if there are none, and without the counter's
    /// frequency.
    pub(super) fn quantile_of_slowest_us(&self, count: u64, share: f64) -> Option<f64> {
        let frequency = f64::from(self.ticks_per_ms?);
        let count = count.min(self.log2.iter().sum());
        // So many are slower.
        let rank = count as f64 * (1.0 - share);
        let mut above = 0.0;
        for (bits, here) in self.log2.iter().enumerate().rev().filter(|(_, here)| **here > 0) {
            let here = (*here as f64).min(count as f64 - above);
            if count > 0 && above + here >= rank {
                // From 2^(bits-1) to 2^bits, evenly.
                let end = 2.0_f64.powi(bits as i32);
                let ticks = end - end / 2.0 * (rank - above) / here;
                return Some(ticks * 1e3 / frequency);
            }
            above += here;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `values` in ticks of 1 ns.
    fn times(values: impl IntoIterator<Item = u64>) -> GuestTimes {
        let mut times = GuestTimes { log2: vec![0; 65], ticks_per_ms: Some(1_000_000) };
        for value in values {
            times.log2[(u64::BITS - value.leading_zeros()) as usize] += 1;
        }
        times
    }

    #[test]
    fn the_slowest_are_found_among_many() {
        let quick = times([100; 5000]);
        let mut all = quick.clone();
        for (sum, more) in
            all.log2.iter_mut().zip(times((1..=1000).map(|us| 100_000 + us * 100)).log2)
        {
            *sum += more;
        }
        // 100.1 to 200 us.
        let there = all.since(&quick);
        for times in [&all, &there] {
            let [p50, p99] = [0.5, 0.99].map(|q| times.quantile_of_slowest_us(1000, q).unwrap());
            assert!((75.0..300.0).contains(&p50), "{p50}");
            assert!((100.0..400.0).contains(&p99) && p99 >= p50, "{p99}");
        }
        assert!(all.quantile_of_slowest_us(6000, 0.5).unwrap() < 0.2);
        assert_eq!(there.quantile_of_slowest_us(0, 0.5), None);
        assert_eq!(all.since(&all).quantile_of_slowest_us(10, 0.5), None);
        let unknown = GuestTimes { ticks_per_ms: None, ..all };
        assert_eq!(unknown.quantile_of_slowest_us(10, 0.5), None);
    }
}
