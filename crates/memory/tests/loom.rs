//! The page map under every interleaving of a few threads:
//! `RUSTFLAGS="--cfg loom" cargo test -p pageferry-memory --release --test loom`.
#![cfg(loom)]

use std::sync::atomic::Ordering;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;
use pageferry_memory::{Claim, GranuleIndex, GranuleRange, PageMap, State, WaitPolicy};

/// Sleeps at once: spinning would only multiply the interleavings.
const SLEEP: WaitPolicy = WaitPolicy { spins: 0, timeout: None };

fn at(index: u64) -> GranuleIndex {
    GranuleIndex::new(index)
}

fn range(first: u64, count: u64) -> GranuleRange {
    GranuleRange::new(at(first), count)
}

fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(test);
}

#[test]
fn one_of_two_claimers_wins() {
    model(|| {
        let map = Arc::new(PageMap::new(1));
        let other = {
            let map = map.clone();
            thread::spawn(move || map.claim(at(0)))
        };
        let outcomes = [map.claim(at(0)), other.join().unwrap()];
        assert_eq!(outcomes.iter().filter(|claim| **claim == Claim::Won).count(), 1);
        assert!(outcomes.contains(&Claim::Requested));
    });
}

#[test]
fn claims_of_neighbours_do_not_disturb_each_other() {
    model(|| {
        let map = Arc::new(PageMap::new(2));
        let other = {
            let map = map.clone();
            thread::spawn(move || map.claim(at(1)))
        };
        assert_eq!(map.claim(at(0)), Claim::Won);
        assert_eq!(other.join().unwrap(), Claim::Won);
        assert_eq!(map.count(State::Requested), 2);
    });
}

#[test]
fn overlapping_runs_are_won_once() {
    model(|| {
        let map = Arc::new(PageMap::new(29));
        let other = {
            let map = map.clone();
            // Both cross from the first word into the second.
            thread::spawn(move || map.claim_run(range(26, 3)))
        };
        let mine = map.claim_run(range(25, 3));
        let theirs = other.join().unwrap();
        assert!(!mine.overlaps(theirs), "{mine} and {theirs}");
        assert_eq!(map.count(State::Requested), mine.count() + theirs.count());
        assert!(!mine.is_empty());
    });
}

#[test]
fn a_discarded_granule_is_never_published() {
    model(|| {
        let map = Arc::new(PageMap::new(1));
        let fetcher = {
            let map = map.clone();
            thread::spawn(move || match map.claim(at(0)) {
                Claim::Won => Some(map.publish(range(0, 1))),
                Claim::Discarded => None,
                other => panic!("{other:?}"),
            })
        };
        let requested = map.discard(range(0, 1));
        let published = fetcher.join().unwrap();
        assert_eq!(map.state(at(0)), State::Discarded);
        // The discard came upon a request exactly when the answer to it was dropped.
        assert_eq!(requested == 1, published == Some(0));
        assert!(map.is_complete());
        assert!(map.publish_discarded(at(0)));
        assert_eq!(map.remaining(), 0);
    });
}

#[test]
fn poison_and_publish_exclude_each_other() {
    model(|| {
        let map = Arc::new(PageMap::new(2));
        assert_eq!(map.claim(at(0)), Claim::Won);
        let other = {
            let map = map.clone();
            thread::spawn(move || map.publish(range(0, 1)))
        };
        let poisoned = map.poison(range(0, 1));
        let published = other.join().unwrap();
        assert_eq!(poisoned + published, 1);
        let expected = if published == 1 { State::Present } else { State::Poisoned };
        assert_eq!(map.state(at(0)), expected);
        assert_eq!(map.remaining(), 1);
    });
}

/// A thread waits while another ends the wait: it must always wake, and see what was written
/// before.
fn waiter_is_woken(end: fn(&PageMap) -> u64, expected: State) {
    model(move || {
        let map = Arc::new(PageMap::new(1));
        let data = Arc::new(AtomicU64::new(0));
        assert_eq!(map.claim(at(0)), Claim::Won);
        let waiter = {
            let (map, data) = (map.clone(), data.clone());
            thread::spawn(move || {
                let state = map.wait(at(0), SLEEP).unwrap();
                (state, data.load(Ordering::Relaxed))
            })
        };
        data.store(42, Ordering::Relaxed);
        assert_eq!(end(&map), 1);
        assert_eq!(waiter.join().unwrap(), (expected, 42));
    });
}

#[test]
fn publishing_wakes() {
    waiter_is_woken(|map| map.publish(range(0, 1)), State::Present);
}

#[test]
fn poisoning_wakes() {
    waiter_is_woken(|map| map.poison(range(0, 1)), State::Poisoned);
}

#[test]
fn discarding_wakes() {
    waiter_is_woken(|map| map.discard(range(0, 1)), State::Discarded);
}

#[test]
fn releasing_wakes() {
    waiter_is_woken(|map| map.release(range(0, 1)), State::Absent);
}

#[test]
fn two_waiters_of_one_bucket_are_both_woken() {
    model(|| {
        let map = Arc::new(PageMap::new(2));
        assert_eq!(map.claim_run(range(0, 2)), range(0, 2));
        let waiters = [0, 1].map(|granule| {
            let map = map.clone();
            thread::spawn(move || map.wait(at(granule), SLEEP).unwrap())
        });
        assert_eq!(map.publish(range(0, 1)), 1);
        assert_eq!(map.publish(range(1, 1)), 1);
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap(), State::Present);
        }
    });
}

#[test]
fn a_released_granule_is_claimed_by_its_waiter() {
    model(|| {
        let map = Arc::new(PageMap::new(1));
        assert_eq!(map.claim(at(0)), Claim::Won);
        let other = {
            let map = map.clone();
            thread::spawn(move || match map.claim(at(0)) {
                Claim::Won => {}
                Claim::Requested => {
                    assert_eq!(map.wait(at(0), SLEEP), Ok(State::Absent));
                    assert_eq!(map.claim(at(0)), Claim::Won);
                }
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(map.release(range(0, 1)), 1);
        other.join().unwrap();
        assert_eq!(map.state(at(0)), State::Requested);
    });
}

#[test]
fn completion_is_announced_once_all_have_come() {
    model(|| {
        let map = Arc::new(PageMap::new(2));
        assert_eq!(map.claim_run(range(0, 2)), range(0, 2));
        let publisher = {
            let map = map.clone();
            thread::spawn(move || map.publish(range(0, 1)))
        };
        let waiter = {
            let map = map.clone();
            thread::spawn(move || {
                assert!(map.wait_complete(None));
                assert_eq!(map.count(State::Present), 2);
            })
        };
        assert_eq!(map.publish(range(1, 1)), 1);
        assert_eq!(publisher.join().unwrap(), 1);
        waiter.join().unwrap();
    });
}
