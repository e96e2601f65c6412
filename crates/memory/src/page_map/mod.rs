//! The page map: the state of every granule of a region, and the one authority on who brings it.
//!
//! # Representation
//!
//! A granule is in one of five [`State`]s. 27 of them make one number in base 5, which fits into
//! 64 bits: 2.37 bits a granule. All changes are a compare-and-swap of such a word, so they never
//! wait for each other, and a run of granules in one word changes in one step. Absent is digit 0:
//! a new map is zeroed memory, and costs nothing where no granule was ever touched.
//!
//! # Memory order
//!
//! Publishing releases, looking at a state acquires: whoever sees a granule present sees also what
//! was written before it was published. (The pages themselves need no such order: a kernel install
//! makes contents and page-table entry visible in that order.)
//!
//! # Signal handlers
//!
//! [`PageMap::claim`], [`PageMap::wait`], [`PageMap::publish`] and everything else here except
//! [`PageMap::new`] use atomic operations and, when there is somebody to wait for or to wake, the
//! system calls `futex` and `clock_gettime`. They allocate nothing, take no lock and leave `errno`
//! alone, and may be called from a signal handler that has interrupted any of them.

mod digits;
mod scan;
mod state;
mod wait;

use std::fmt;
use std::ops::ControlFlow;
use std::time::Duration;

use self::digits::{PER_WORD, Slice};
pub use self::state::{Claim, State};
use self::wait::Waiters;
pub use self::wait::{TimedOut, WaitPolicy};
use crate::sync::{AtomicU64, Deadline, Ordering, zeroed};
use crate::{GranuleIndex, GranuleRange};

/// The state of every granule of a region; see the description of its states at [`State`].
///
/// All methods may be called from any number of threads at once, and none waits for another,
/// except those called `wait…`.
///
/// # Panics
///
/// Every method that takes granules panics when they are not all in the map.
pub struct PageMap {
    len: u64,
    words: Box<[AtomicU64]>,
    waiters: Waiters,
    outstanding: CacheLine,
}

/// The number of granules that are absent or requested, away from the fields that every claim
/// reads, as it changes with every publish.
#[repr(align(64))]
struct CacheLine(AtomicU64);

/// What a state becomes, for every state.
type Transition = [State; State::COUNT];

const PUBLISH: Transition =
    [State::Absent, State::Present, State::Present, State::Poisoned, State::Discarded];
const RELEASE: Transition =
    [State::Absent, State::Absent, State::Present, State::Poisoned, State::Discarded];
const POISON: Transition =
    [State::Poisoned, State::Poisoned, State::Present, State::Poisoned, State::Discarded];
const DISCARD: Transition = [State::Discarded; State::COUNT];
const SET_PRESENT: Transition =
    [State::Present, State::Requested, State::Present, State::Poisoned, State::Discarded];

/// How many granules a [`Transition`] has changed, by the state they had.
#[derive(Copy, Clone, Default)]
struct Changed([u64; State::COUNT]);

impl Changed {
    fn from(self, state: State) -> u64 {
        self.0[state as usize]
    }

    fn total(self) -> u64 {
        self.0.iter().sum()
    }
}

impl PageMap {
    /// A map of this many granules, all absent.
    pub fn new(granules: u64) -> Self {
        let words = usize::try_from(granules.div_ceil(u64::from(PER_WORD)))
            .expect("the granules of mapped memory can be counted in usize");
        // The first look at the clock finds the kernel's vDSO, for which kernels before 6.4 are
        // asked in a way that allocates. Not later, in a signal handler.
        let _ = Deadline::after(Some(Duration::ZERO));
        Self {
            len: granules,
            words: zeroed(words),
            waiters: Waiters::new(words, granules == 0),
            outstanding: CacheLine(AtomicU64::new(granules)),
        }
    }

    /// How many granules it has.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no granules at all.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes of memory it takes, everything included: 8 for every 27 granules, 8 for
    /// every bucket of waiting threads (one for every 27 granules, rounded up to a power of two,
    /// and at most 64), and a constant. From 64 Ki granules on (256 MiB in granules of 4 KiB) this
    /// is below 2.5 bits a granule.
    pub fn footprint_bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.words) + self.waiters.heap_bytes()
    }

    /// The state of one granule.
    #[inline]
    pub fn state(&self, granule: GranuleIndex) -> State {
        let (word, digit) = self.locate(granule);
        digits::digit(self.words[word].load(Ordering::Acquire), digit)
    }

    /// Undertakes to bring a granule: absent becomes requested, for exactly one of all callers.
    /// Every other state is left alone and answered.
    #[inline]
    pub fn claim(&self, granule: GranuleIndex) -> Claim {
        let (word, digit) = self.locate(granule);
        let word = &self.words[word];
        let mut old = word.load(Ordering::Acquire);
        loop {
            match digits::digit(old, digit) {
                State::Absent => {}
                State::Requested => return Claim::Requested,
                State::Present => return Claim::Present,
                State::Poisoned => return Claim::Poisoned,
                State::Discarded => return Claim::Discarded,
            }
            let new = digits::replace(old, digit, State::Absent, State::Requested);
            match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Claim::Won,
                Err(current) => old = current,
            }
        }
    }

    /// Undertakes to bring as many granules from the first of `range` on as are absent, without a
    /// gap. The answer begins where `range` does, and is empty when its first granule is not
    /// absent.
    #[must_use = "whoever has won granules must bring them"]
    pub fn claim_run(&self, range: GranuleRange) -> GranuleRange {
        let mut won = 0;
        // A break means that the run has ended within this word.
        let _ = self.for_each_word(range, |word, slice| {
            let word = &self.words[word];
            let mut old = word.load(Ordering::Acquire);
            loop {
                let count = digits::leading_absent(old, slice);
                if count == 0 {
                    return ControlFlow::Break(());
                }
                let run = Slice { low: slice.low, count };
                let new = digits::replace_all(old, run, State::Absent, State::Requested);
                match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => {
                        won += u64::from(count);
                        return if count < slice.count {
                            ControlFlow::Break(())
                        } else {
                            ControlFlow::Continue(())
                        };
                    }
                    Err(current) => old = current,
                }
            }
        });
        range.split_at(won).0
    }

    /// Declares granules installed: requested becomes present, and whoever waits for them is
    /// woken. Granules in another state are left alone: those discarded meanwhile must not become
    /// present by an old answer. Answers how many have changed.
    pub fn publish(&self, range: GranuleRange) -> u64 {
        self.change(range, &PUBLISH).total()
    }

    /// Declares a zero page installed for a discarded granule: it is present from now on. Answers
    /// whether it was discarded.
    pub fn publish_discarded(&self, granule: GranuleIndex) -> bool {
        let (word, digit) = self.locate(granule);
        let word = &self.words[word];
        let mut old = word.load(Ordering::Acquire);
        loop {
            if digits::digit(old, digit) != State::Discarded {
                return false;
            }
            let new = digits::replace(old, digit, State::Discarded, State::Present);
            match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                // Nobody waits for a discarded granule, so there is nobody to wake.
                Ok(_) => return true,
                Err(current) => old = current,
            }
        }
    }

    /// Gives granules back that were claimed, but never asked for: requested becomes absent, and
    /// whoever waits is woken, to claim them itself. Answers how many have changed.
    pub fn release(&self, range: GranuleRange) -> u64 {
        self.change(range, &RELEASE).total()
    }

    /// Declares that granules can never come: absent or requested becomes poisoned, and whoever
    /// waits is woken. Answers how many have changed.
    pub fn poison(&self, range: GranuleRange) -> u64 {
        self.change(range, &POISON).total()
    }

    /// The guest has given granules up: whatever they were, they become discarded, and whoever
    /// waits is woken. Answers how many were requested: their bytes will still arrive, and must
    /// be dropped.
    pub fn discard(&self, range: GranuleRange) -> u64 {
        self.change(range, &DISCARD).from(State::Requested)
    }

    /// Declares that absent granules are known to be there without having been claimed. Granules
    /// in another state are left alone. Answers how many have changed.
    pub fn set_present(&self, range: GranuleRange) -> u64 {
        self.change(range, &SET_PRESENT).total()
    }

    /// How many granules have still to come: absent or requested. It only ever falls. While other
    /// threads change granules it may lag behind, never run ahead.
    #[inline]
    pub fn remaining(&self) -> u64 {
        self.outstanding.0.load(Ordering::Acquire)
    }

    /// Whether no granule has still to come: each is present, poisoned or discarded.
    #[inline]
    pub fn is_complete(&self) -> bool {
        self.remaining() == 0
    }

    /// Applies the transition to every granule of the range, word by word, and does what follows
    /// from it: waiting threads go on, and the map may be complete.
    fn change(&self, range: GranuleRange, rule: &Transition) -> Changed {
        let mut total = Changed::default();
        let _: ControlFlow<()> = self.for_each_word(range, |word, slice| {
            let changed = change_word(&self.words[word], slice, rule);
            for (sum, count) in total.0.iter_mut().zip(changed.0) {
                *sum += count;
            }
            ControlFlow::Continue(())
        });
        if total.from(State::Requested) > 0 {
            self.wake_waiters(range);
        }
        let settled: u64 = [State::Absent, State::Requested]
            .into_iter()
            .filter(|from| !rule[*from as usize].is_outstanding())
            .map(|from| total.from(from))
            .sum();
        if settled > 0 && self.outstanding.0.fetch_sub(settled, Ordering::AcqRel) == settled {
            self.waiters.complete();
        }
        total
    }

    #[inline]
    fn locate(&self, granule: GranuleIndex) -> (usize, u32) {
        let index = granule.get();
        assert!(index < self.len, "granule {index} is not in a map of {}", self.len);
        let per_word = u64::from(PER_WORD);
        ((index / per_word) as usize, (index % per_word) as u32)
    }

    /// Calls `visit` with every word that holds granules of the range, and which of its digits
    /// they are, in ascending order, until it says stop.
    #[inline]
    fn for_each_word<B>(
        &self,
        range: GranuleRange,
        mut visit: impl FnMut(usize, Slice) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        assert!(
            range.end().get() <= self.len,
            "{range} are not all in a map of {} granules",
            self.len
        );
        let per_word = u64::from(PER_WORD);
        let mut word = (range.first().get() / per_word) as usize;
        let mut low = (range.first().get() % per_word) as u32;
        let mut left = range.count();
        while left > 0 {
            let count = left.min(u64::from(PER_WORD - low)) as u32;
            visit(word, Slice { low, count })?;
            left -= u64::from(count);
            word += 1;
            low = 0;
        }
        ControlFlow::Continue(())
    }
}

/// Applies the transition to some granules of a word in one step, and answers what has changed.
fn change_word(word: &AtomicU64, slice: Slice, rule: &Transition) -> Changed {
    let mut old = word.load(Ordering::Acquire);
    loop {
        let mut new = old;
        let mut changed = Changed::default();
        let _: ControlFlow<()> = digits::for_each_run(old, slice, |from, run| {
            let to = rule[from as usize];
            if to != from {
                new = digits::replace_all(new, run, from, to);
                changed.0[from as usize] += u64::from(run.count);
            }
            ControlFlow::Continue(())
        });
        if new == old {
            return changed;
        }
        match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return changed,
            Err(current) => old = current,
        }
    }
}

impl fmt::Debug for PageMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageMap")
            .field("len", &self.len)
            .field("remaining", &self.remaining())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
