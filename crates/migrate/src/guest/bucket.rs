//! A cap on bandwidth: a bucket of tokens, one a byte, that fills at the rate allowed.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::peer::lock;

/// What may be sent at once after a pause, as a part of a second's worth.
const BURST: f64 = 0.02;

/// Shared by all who send. Those who come too early are told how long to wait.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes a second.
    rate: Option<f64>,
    /// Tokens, which may be negative (somebody is waiting for them), and when they were counted.
    level: Mutex<(f64, Instant)>,
}

impl Bucket {
    /// A bucket that lets `rate` bytes a second pass; `None` lets everything.
    pub(crate) fn new(rate: Option<u64>) -> Self {
        let rate = rate.map(|rate| rate.max(1) as f64);
        Self { rate, level: Mutex::new((0.0, Instant::now())) }
    }

    /// Takes `bytes`, which are about to be sent; returns how long to wait before that.
    pub(crate) fn take(&self, bytes: u64) -> Duration {
        if self.rate.is_none() {
            return Duration::ZERO;
        }
        self.take_at(bytes, Instant::now())
    }

    fn take_at(&self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let mut level = lock(&self.level);
        let (tokens, at) = *level;
        let passed = now.saturating_duration_since(at).as_secs_f64();
        let tokens = (tokens + passed * rate).min(rate * BURST) - bytes as f64;
        *level = (tokens, now.max(at));
        if tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-tokens / rate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_pause_saves_little() {
        let bucket = Bucket::new(Some(1_000_000));
        let mut now = Instant::now() + Duration::from_secs(5);
        let begin = now;
        for _ in 0..100 {
            now += bucket.take_at(10_000, now);
        }
        let took = now - begin;
        // A million bytes; the five seconds of pause were worth at most the burst.
        assert!(
            took > Duration::from_millis(950) && took < Duration::from_millis(1001),
            "{took:?}"
        );
    }

    #[test]
    fn without_a_rate_nobody_waits() {
        assert_eq!(Bucket::new(None).take(u64::MAX), Duration::ZERO);
    }
}
