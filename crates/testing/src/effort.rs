//! How much a test does of what could go on for ever.

use std::time::{Duration, Instant};

use crate::{Watch, watch};

/// How often a test repeats what it is about: a number of times, or until its time is over. With
/// `PAGEFERRY_HARVESTS=N` in the environment it is N times, however long that takes.
#[derive(Debug)]
pub struct Effort {
    times: u64,
    until: Option<Instant>,
}

impl Effort {
    /// Begins now. Emulated machines, and busy ones, do not get as far as `times`.
    ///
    /// # Panics
    ///
    /// The variable is there and no number.
    pub fn new(times: u64, time: Duration) -> Self {
        match std::env::var("PAGEFERRY_HARVESTS") {
            Ok(asked) => {
                let times = asked.parse().unwrap_or_else(|_| {
                    panic!("PAGEFERRY_HARVESTS is a number of times, not {asked:?}")
                });
                Self { times, until: None }
            }
            Err(_) => Self { times, until: Some(Instant::now() + time) },
        }
    }

    /// Whether to do it once more, when it has been done so often.
    pub fn goes_on(&self, done: u64) -> bool {
        done < self.times && self.until.is_none_or(|until| Instant::now() < until)
    }

    /// As [`watch`], where that many seconds are enough for the usual time.
    #[track_caller]
    pub fn watch(&self, seconds: u64) -> Watch {
        watch(if self.until.is_some() { seconds } else { 3600 })
    }
}
