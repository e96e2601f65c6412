//! How long touches took the guest, by its own clock.

use pageferry_vmm::{Report, TouchTimes};

/// Times in powers of two of the guest's time stamp counter, of any number of vCPUs and runs.
#[derive(Clone, Debug, Default)]
pub(super) struct Times {
    /// The n-th counts times with n significant bits.
    log2: Vec<u64>,
    /// In ticks.
    max: u64,
    ticks_per_ms: Option<u32>,
}

impl Times {
    pub(super) fn of(report: &Report) -> Self {
        let mut all = Self::default();
        for vcpu in &report.vcpus {
            let TouchTimes { log2, max, ticks_per_ms, .. } = &vcpu.times;
            all.merge(&Self { log2: log2.clone(), max: *max, ticks_per_ms: *ticks_per_ms });
        }
        all
    }

    pub(super) fn merge(&mut self, other: &Self) {
        if self.log2.len() < other.log2.len() {
            self.log2.resize(other.log2.len(), 0);
        }
        for (mine, theirs) in self.log2.iter_mut().zip(&other.log2) {
            *mine += theirs;
        }
        self.max = self.max.max(other.max);
        self.ticks_per_ms = self.ticks_per_ms.or(other.ticks_per_ms);
    }

    pub(super) fn count(&self) -> u64 {
        self.log2.iter().sum()
    }

    /// In microseconds; `None` without the counter's frequency.
    pub(super) fn max_us(&self) -> Option<f64> {
        self.micros(self.max as f64)
    }

    /// A time in microseconds that `share` (0 to 1) of all do not exceed, if those that share a
    /// power of two are spread evenly over it: true to within a factor of two. `None` when there
    /// are none, and without the counter's frequency.
    pub(super) fn quantile_us(&self, share: f64) -> Option<f64> {
        let rank = self.count() as f64 * share;
        let mut below = 0.0;
        for (bits, count) in self.log2.iter().enumerate().filter(|(_, count)| **count > 0) {
            let count = *count as f64;
            if below + count >= rank {
                // 2^(bits-1) to less than 2^bits.
                let end = (2.0_f64).powi(bits as i32).min(self.max as f64);
                let start = (2.0_f64).powi(bits as i32 - 1).min(end);
                return self.micros(start + (end - start) * (rank - below) / count);
            }
            below += count;
        }
        None
    }

    fn micros(&self, ticks: f64) -> Option<f64> {
        Some(ticks * 1e3 / f64::from(self.ticks_per_ms?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `values` in ticks of 1 ns.
    fn times(values: impl IntoIterator<Item = u64>) -> Times {
        let mut times = Times { log2: vec![0; 65], max: 0, ticks_per_ms: Some(1_000_000) };
        for value in values {
            times.log2[(u64::BITS - value.leading_zeros()) as usize] += 1;
            times.max = times.max.max(value);
        }
        times
    }

    #[test]
    fn quantiles_are_right_to_within_a_factor_of_two() {
        let times = times((1..=1000).map(|micros| micros * 1000));
        for (share, exact) in [(0.01, 10.0), (0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let got = times.quantile_us(share).unwrap();
            assert!((exact / 2.0..=exact * 2.0).contains(&got), "{share}: {got} is not {exact}");
        }
        assert_eq!(times.quantile_us(1.0), times.max_us());
        assert_eq!(times.max_us(), Some(1000.0));
    }

    #[test]
    fn a_sum_has_the_values_of_both() {
        let (mut both, slow) = (times([1000; 100]), times([1_000_000; 100]));
        both.merge(&slow);
        assert_eq!((both.count(), both.max_us()), (200, Some(1000.0)));
        assert!(both.quantile_us(0.49).unwrap() < 2.0);
        assert!(both.quantile_us(0.51).unwrap() > 500.0);
    }

    #[test]
    fn without_a_frequency_there_are_no_microseconds() {
        let unknown = Times { ticks_per_ms: None, ..times([1000]) };
        assert_eq!((unknown.quantile_us(0.5), unknown.max_us()), (None, None));
        assert_eq!(Times { ticks_per_ms: Some(1), ..Times::default() }.quantile_us(0.5), None);
    }
}
