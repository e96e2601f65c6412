//! Waiting for granules that somebody else brings.
//!
//! Waiting threads share a few *buckets*; the granules of a word share one, and within it a
//! thread is told apart by its granule's place in the word. A bucket is an event count: a thread
//! registers, reads the bucket's sequence number, looks at the granule, and goes to sleep only
//! while the number is unchanged. Whoever changes a granule does so first, and then, if anybody is
//! registered, increments the number and wakes those that wait for one of the changed places.
//!
//! No wake-up is lost: either the waking side sees the registration, or the waiting side sees the
//! changed granule. Both sides have a sequentially consistent fence between their write and their
//! read for this.

use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::time::Duration;

use super::digits::Slice;
use super::{PageMap, State};
use crate::sync::{AtomicU32, Deadline, Futex, Ordering, fence, spin_loop};
use crate::{GranuleIndex, GranuleRange};

/// Enough that threads waiting for different granules rarely meet in one, and small enough that
/// waking all of them is cheap.
const MAX_BUCKETS: usize = 64;

const EVERY_PLACE: NonZeroU32 = NonZeroU32::MAX;

/// How a thread waits for a granule.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct WaitPolicy {
    /// How often to look at the granule before going to sleep. A look takes some ten nanoseconds.
    pub spins: u32,
    /// How long to wait in total, for ever if `None`.
    pub timeout: Option<Duration>,
}

impl Default for WaitPolicy {
    /// Spins for about as long as going to sleep and being woken would take, and never gives up.
    fn default() -> Self {
        Self { spins: 100, timeout: None }
    }
}

/// The time to wait was over before the granule had changed.
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[error("granule {granule} was still requested when the time to wait for it was over")]
pub struct TimedOut {
    /// The granule.
    pub granule: GranuleIndex,
}

/// Everybody who waits for something in a map.
pub(super) struct Waiters {
    /// A power of two of them.
    buckets: Box<[Bucket]>,
    /// 1 as soon as no granule has still to come.
    complete: Futex,
}

struct Bucket {
    sequence: Futex,
    registered: AtomicU32,
}

impl Waiters {
    pub(super) fn new(words: usize, complete: bool) -> Self {
        let buckets = words.clamp(1, MAX_BUCKETS).next_power_of_two();
        Self {
            buckets: (0..buckets)
                .map(|_| Bucket { sequence: Futex::new(0), registered: AtomicU32::new(0) })
                .collect(),
            complete: Futex::new(complete.into()),
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.buckets)
    }

    /// To be called once, when the last granule has come.
    pub(super) fn complete(&self) {
        self.complete.increment();
        self.complete.wake(EVERY_PLACE);
    }

    #[inline]
    fn bucket(&self, word: usize) -> &Bucket {
        &self.buckets[word & (self.buckets.len() - 1)]
    }
}

impl Bucket {
    #[inline]
    fn wake(&self, places: NonZeroU32) {
        if self.registered.load(Ordering::Relaxed) != 0 {
            self.sequence.increment();
            self.sequence.wake(places);
        }
    }
}

/// The digits of a word as bits for the kernel to match.
#[inline]
fn places(slice: Slice) -> NonZeroU32 {
    NonZeroU32::new(slice.mask()).unwrap_or(EVERY_PLACE)
}

impl PageMap {
    /// Waits until a granule is no longer requested, and answers what it is then. If it is absent,
    /// its bringer has given it back: the caller may claim it.
    ///
    /// Looks at it a number of times first, then sleeps in the kernel.
    ///
    /// # Errors
    ///
    /// [`TimedOut`] when it is still requested at the end of the policy's timeout.
    pub fn wait(&self, granule: GranuleIndex, policy: WaitPolicy) -> Result<State, TimedOut> {
        for _ in 0..policy.spins {
            let state = self.state(granule);
            if state != State::Requested {
                return Ok(state);
            }
            spin_loop();
        }
        let deadline = Deadline::after(policy.timeout);
        let (word, digit) = self.locate(granule);
        let places = places(Slice { low: digit, count: 1 });
        let bucket = self.waiters.bucket(word);

        bucket.registered.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut in_time = true;
        let outcome = loop {
            let sequence = bucket.sequence.load();
            let state = self.state(granule);
            if state != State::Requested {
                break Ok(state);
            }
            if !in_time {
                break Err(TimedOut { granule });
            }
            in_time = bucket.sequence.wait(sequence, places, &deadline);
        };
        bucket.registered.fetch_sub(1, Ordering::Relaxed);
        outcome
    }

    /// Waits until no granule has still to come, at most for `timeout`, and answers whether that
    /// is so.
    pub fn wait_complete(&self, timeout: Option<Duration>) -> bool {
        let deadline = Deadline::after(timeout);
        while self.waiters.complete.load() == 0 {
            if !self.waiters.complete.wait(0, EVERY_PLACE, &deadline) {
                return self.is_complete();
            }
        }
        true
    }

    /// Wakes whoever waits for a granule of the range. To be called after the change.
    pub(super) fn wake_waiters(&self, range: GranuleRange) {
        fence(Ordering::SeqCst);
        let mut left = self.waiters.buckets.len();
        let flow = self.for_each_word(range, |word, slice| {
            // From here on words share buckets that were already looked at.
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
            self.waiters.bucket(word).wake(places(slice));
            ControlFlow::Continue(())
        });
        if flow.is_break() {
            for bucket in &self.waiters.buckets {
                bucket.wake(EVERY_PLACE);
            }
        }
    }
}
