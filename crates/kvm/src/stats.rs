//! What a vCPU's paging exits were, and how long they took.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Powers of two of nanoseconds that are told apart: up to 18 minutes.
const POWERS: usize = 40;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Written by one thread, read by any.
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
            times: Times,
        }

        /// What a vCPU's paging exits were, as read at one moment.
        #[derive(Clone, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct VcpuStats {
            $($(#[$doc])* pub $name: u64,)*
            /// How long each took, from leaving KVM_RUN to entering it again.
            pub time: ExitTimes,
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> VcpuStats {
                VcpuStats { $($name: self.$name.load(Relaxed),)* time: self.times.snapshot() }
            }
        }

        impl VcpuStats {
            /// Adds another vCPU's.
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
                self.time.add(&other.time);
            }
        }
    };
}

counters! {
    /// Exits because stage 2 met a marker.
    poison,
    /// Exits because KVM could not read a byte of guest memory that it emulates an access to.
    mmio_reads,
    /// The same for writes.
    mmio_writes,
    /// Exits because the guest has set a register that names an area which KVM writes by itself, where
    /// these are followed.
    register_writes,
    /// Exits because KVM could not fetch an instruction it was to emulate.
    fetches,
    /// Exits with a guest address and EFAULT, as newer kernels have them.
    memory_faults,
    /// Of all these, how many waited longer than a short while for somebody else to bring the page.
    waited,
    /// How many left KVM_RUN for good before the page had come, because of a signal of the
    /// embedder's.
    interrupted,
    /// Accesses to memory that can never come.
    memory_errors,
    /// Of these, how many became a machine check in the guest.
    machine_checks,
    /// SIGBUS that were somebody else's, and were passed on.
    foreign_signals,
    /// Exits because the vCPU's dirty ring was full, and was emptied here: no paging exits.
    rings_full,
}

impl VcpuStats {
    /// Paging exits of every kind.
    pub fn exits(&self) -> u64 {
        let accesses = self.poison + self.mmio_reads + self.mmio_writes + self.fetches;
        accesses + self.register_writes + self.memory_faults
    }
}

impl Counters {
    pub(crate) fn count(counter: &AtomicU64) {
        // There is one writer.
        counter.store(counter.load(Relaxed) + 1, Relaxed);
    }

    pub(crate) fn time(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        Self::count(&self.times.buckets[bucket_of(nanos)]);
        let times = &self.times;
        times.sum.store(times.sum.load(Relaxed).saturating_add(nanos), Relaxed);
        times.max.store(times.max.load(Relaxed).max(nanos), Relaxed);
    }
}

struct Times {
    buckets: [AtomicU64; POWERS],
    sum: AtomicU64,
    max: AtomicU64,
}

impl Default for Times {
    fn default() -> Self {
        let buckets = [const { AtomicU64::new(0) }; POWERS];
        Self { buckets, sum: AtomicU64::new(0), max: AtomicU64::new(0) }
    }
}

impl Times {
    fn snapshot(&self) -> ExitTimes {
        ExitTimes {
            buckets: self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect(),
            sum: self.sum.load(Relaxed),
            max: self.max.load(Relaxed),
        }
    }
}

/// Values below 2 ns, below 4 ns, and so on.
fn bucket_of(nanos: u64) -> usize {
    ((63 - (nanos | 1).leading_zeros()) as usize).min(POWERS - 1)
}

/// A distribution of times, kept to within a factor of two.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExitTimes {
    /// Bucket `n` counts times from 2^n up to 2^(n+1) ns. Empty when nothing was ever recorded.
    buckets: Vec<u64>,
    sum: u64,
    max: u64,
}

impl ExitTimes {
    /// How many times were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.sum)
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// A time that at least `q` (0 to 1) of all do not exceed, at most twice the least such; `None`
    /// when nothing was recorded.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let rank = ((q.clamp(0.0, 1.0) * self.count() as f64).ceil() as u64).max(1);
        let mut seen = 0;
        self.buckets.iter().enumerate().find_map(|(power, count)| {
            seen += count;
            let bound = (2_u64 << power) - 1;
            (seen >= rank).then(|| Duration::from_nanos(bound.min(self.max)))
        })
    }

    fn add(&mut self, other: &Self) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (sum, count) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum += count;
        }
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_kept_to_within_a_factor_of_two() {
        let counters = Counters::default();
        for micros in 1..=1000 {
            counters.time(Duration::from_micros(micros));
        }
        let mut times = counters.snapshot().time;
        assert_eq!(times.count(), 1000);
        assert_eq!(times.max(), Duration::from_millis(1));
        assert_eq!(times.total(), Duration::from_micros(500_500));
        let median = times.quantile(0.5).unwrap();
        assert!((Duration::from_micros(500)..Duration::from_micros(1000)).contains(&median));
        assert_eq!(times.quantile(1.0), Some(times.max()));
        times.add(&counters.snapshot().time);
        assert_eq!(times.count(), 2000);
    }

    #[test]
    fn extremes_have_a_bucket() {
        assert_eq!(ExitTimes::default().quantile(0.5), None);
        let counters = Counters::default();
        counters.time(Duration::ZERO);
        counters.time(Duration::MAX);
        assert_eq!(counters.snapshot().time.count(), 2);
    }

    #[test]
    fn sums_contain_both() {
        let counters = Counters::default();
        Counters::count(&counters.poison);
        Counters::count(&counters.fetches);
        let mut sum = VcpuStats::default();
        sum.add(&counters.snapshot());
        sum.add(&counters.snapshot());
        assert_eq!((sum.poison, sum.fetches, sum.exits()), (2, 2, 4));
    }
}
