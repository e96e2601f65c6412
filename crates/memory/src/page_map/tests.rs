use std::sync::Barrier;
use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn at(index: u64) -> GranuleIndex {
    GranuleIndex::new(index)
}

fn range(first: u64, count: u64) -> GranuleRange {
    GranuleRange::new(at(first), count)
}

/// A map of one granule in this state.
fn in_state(state: State) -> PageMap {
    let map = PageMap::new(1);
    match state {
        State::Absent => {}
        State::Requested => assert_eq!(map.claim(at(0)), Claim::Won),
        State::Present => assert_eq!(map.set_present(range(0, 1)), 1),
        State::Poisoned => assert_eq!(map.poison(range(0, 1)), 1),
        State::Discarded => assert_eq!(map.discard(range(0, 1)), 0),
    }
    assert_eq!(map.state(at(0)), state);
    map
}

#[test]
fn every_transition() {
    use State::{Absent, Discarded, Poisoned, Present, Requested};
    type Step = fn(&PageMap) -> u64;
    /// What becomes of absent, requested, present, poisoned and discarded, and the answer.
    type Outcomes = [(State, u64); State::COUNT];
    let steps: [(&str, Step, Outcomes); 7] = [
        (
            "claim",
            |map| u64::from(map.claim(at(0)) == Claim::Won),
            [(Requested, 1), (Requested, 0), (Present, 0), (Poisoned, 0), (Discarded, 0)],
        ),
        (
            "publish",
            |map| map.publish(range(0, 1)),
            [(Absent, 0), (Present, 1), (Present, 0), (Poisoned, 0), (Discarded, 0)],
        ),
        (
            "publish_discarded",
            |map| map.publish_discarded(at(0)).into(),
            [(Absent, 0), (Requested, 0), (Present, 0), (Poisoned, 0), (Present, 1)],
        ),
        (
            "release",
            |map| map.release(range(0, 1)),
            [(Absent, 0), (Absent, 1), (Present, 0), (Poisoned, 0), (Discarded, 0)],
        ),
        (
            "poison",
            |map| map.poison(range(0, 1)),
            [(Poisoned, 1), (Poisoned, 1), (Present, 0), (Poisoned, 0), (Discarded, 0)],
        ),
        (
            "discard",
            |map| map.discard(range(0, 1)),
            [(Discarded, 0), (Discarded, 1), (Discarded, 0), (Discarded, 0), (Discarded, 0)],
        ),
        (
            "set_present",
            |map| map.set_present(range(0, 1)),
            [(Present, 1), (Requested, 0), (Present, 0), (Poisoned, 0), (Discarded, 0)],
        ),
    ];
    for (name, step, outcomes) in steps {
        for (from, (to, answer)) in State::ALL.into_iter().zip(outcomes) {
            let map = in_state(from);
            assert_eq!(step(&map), answer, "{name} of {from:?}");
            assert_eq!(map.state(at(0)), to, "{name} of {from:?}");
            assert_eq!(map.remaining(), u64::from(to.is_outstanding()), "{name} of {from:?}");
            assert_eq!(map.is_complete(), !to.is_outstanding(), "{name} of {from:?}");
            assert_eq!(map.wait_complete(Some(Duration::ZERO)), map.is_complete());
        }
    }
}

#[test]
fn claim_answers_the_state() {
    for (state, answer) in [
        (State::Absent, Claim::Won),
        (State::Requested, Claim::Requested),
        (State::Present, Claim::Present),
        (State::Poisoned, Claim::Poisoned),
        (State::Discarded, Claim::Discarded),
    ] {
        assert_eq!(in_state(state).claim(at(0)), answer);
    }
}

#[test]
fn at_most_two_and_a_half_bits_a_granule() {
    for granules in [64 << 10, 128 << 10, 1 << 20, 100_000_007] {
        let bits = PageMap::new(granules).footprint_bytes() as f64 * 8.0 / granules as f64;
        assert!(bits <= 2.5, "{bits} bits for each of {granules} granules");
    }
}

#[test]
fn an_empty_map_is_complete() {
    let map = PageMap::new(0);
    assert!(map.is_empty());
    assert!(map.is_complete());
    assert!(map.wait_complete(None));
    assert_eq!(map.publish(range(0, 0)), 0);
    assert_eq!(map.next_run(State::Absent, at(0), u64::MAX), None);
}

#[test]
fn granules_beyond_the_end_are_refused() {
    let map = PageMap::new(30);
    let refused: [fn(&PageMap) -> bool; 4] = [
        |map| map.state(at(30)) == State::Absent,
        |map| map.claim(at(u64::MAX)) == Claim::Won,
        |map| map.publish(range(29, 2)) == 0,
        |map| map.discard(range(u64::MAX, 0)) == 0,
    ];
    for call in refused {
        let panic =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| call(&map))).unwrap_err();
        let text = panic.downcast_ref::<String>().unwrap();
        assert!(text.contains("in a map of 30"), "{text}");
    }
    assert_eq!(map.publish(range(30, 0)), 0);
}

#[test]
fn runs_are_claimed_up_to_the_first_obstacle() {
    let map = PageMap::new(100);
    assert_eq!(map.claim(at(80)), Claim::Won);
    assert_eq!(map.claim_run(range(10, 90)), range(10, 70));
    assert_eq!(map.claim_run(range(10, 90)), range(10, 0));
    assert_eq!(map.claim_run(range(81, 0)), range(81, 0));
    assert_eq!(map.claim_run(range(0, 20)), range(0, 10));
    assert_eq!(map.count(State::Requested), 81);
}

#[test]
fn runs_are_found_and_cut_off() {
    let map = PageMap::new(200);
    map.set_present(range(20, 100));
    map.set_present(range(150, 1));
    assert_eq!(map.next_run(State::Present, at(0), 1000), Some(range(20, 100)));
    assert_eq!(map.next_run(State::Present, at(0), 30), Some(range(20, 30)));
    assert_eq!(map.next_run(State::Present, at(119), 1000), Some(range(119, 1)));
    assert_eq!(map.next_run(State::Present, at(120), 1000), Some(range(150, 1)));
    assert_eq!(map.next_run(State::Present, at(151), 1000), None);
    assert_eq!(map.next_run(State::Absent, at(151), 1000), Some(range(151, 49)));
    assert_eq!(map.next_run(State::Absent, at(200), 1000), None);
    assert_eq!(map.next_run(State::Absent, at(u64::MAX), 1000), None);
    assert_eq!(map.next_run(State::Absent, at(0), 0), None);
}

#[test]
fn a_walk_can_be_stopped() {
    let map = PageMap::new(200);
    map.set_present(range(10, 1));
    map.set_present(range(20, 1));
    let mut runs = Vec::new();
    let flow = map.for_each_run(range(0, 200), State::Present, |run| {
        runs.push(run);
        ControlFlow::Break(())
    });
    assert_eq!(flow, ControlFlow::Break(()));
    assert_eq!(runs, [range(10, 1)]);
}

#[test]
fn waiting_ends_with_the_timeout() {
    let map = in_state(State::Requested);
    let timeout = Duration::from_millis(20);
    for spins in [0, 10] {
        let before = Instant::now();
        let outcome = map.wait(at(0), WaitPolicy { spins, timeout: Some(timeout) });
        assert_eq!(outcome, Err(TimedOut { granule: at(0) }));
        assert!(before.elapsed() >= timeout);
    }
    assert!(!map.wait_complete(Some(Duration::from_millis(1))));
}

#[test]
fn waiting_for_what_nobody_brings_ends_at_once() {
    for state in State::ALL {
        if state != State::Requested {
            assert_eq!(in_state(state).wait(at(0), WaitPolicy::default()), Ok(state));
        }
    }
}

#[test]
fn a_timeout_beyond_the_clock_is_for_ever() {
    let map = in_state(State::Requested);
    thread::scope(|scope| {
        let policy = WaitPolicy { spins: 0, timeout: Some(Duration::MAX) };
        let map = &map;
        let waiter = scope.spawn(move || map.wait(at(0), policy));
        map.publish(range(0, 1));
        assert_eq!(waiter.join().unwrap(), Ok(State::Present));
    });
}

/// Everything that ends waiting, with threads that sleep on granules of many words.
#[test]
fn every_waiter_is_woken() {
    type Step = fn(&PageMap, GranuleRange) -> u64;
    let steps: [(Step, State); 4] = [
        (PageMap::publish, State::Present),
        (PageMap::release, State::Absent),
        (PageMap::poison, State::Poisoned),
        (PageMap::discard, State::Discarded),
    ];
    // In the first case all waiters share one granule, in the last they share buckets.
    for (granules, stride) in [(1, 0), (27, 1), (40_000, 27), (40_000, 27 * 64)] {
        for (step, end_state) in steps {
            const WAITERS: u64 = 16;
            let map = PageMap::new(granules);
            let all = range(0, granules);
            assert_eq!(map.claim_run(all), all);
            let started = Barrier::new(WAITERS as usize + 1);
            thread::scope(|scope| {
                let waiters: Vec<_> = (0..WAITERS)
                    .map(|i| {
                        let (map, started) = (&map, &started);
                        scope.spawn(move || {
                            started.wait();
                            let policy = WaitPolicy { spins: i as u32, timeout: None };
                            map.wait(at(i * stride), policy)
                        })
                    })
                    .collect();
                started.wait();
                // Some of the waiters sleep by now, and others are about to: both must be woken.
                assert_eq!(step(&map, all), granules);
                for waiter in waiters {
                    assert_eq!(waiter.join().unwrap(), Ok(end_state));
                }
            });
        }
    }
}

/// Threads claim everything at random, publish what they won, and wait for the rest.
#[test]
fn every_granule_is_won_once_and_every_waiter_resumes() {
    const THREADS: u64 = 8;
    const GRANULES: u64 = 5_003;
    for round in 0..10_u64 {
        let map = PageMap::new(GRANULES);
        let wins: Vec<_> = (0..GRANULES).map(|_| AtomicUsize::new(0)).collect();
        let won = |granule: GranuleIndex| {
            let before = wins[granule.get() as usize].fetch_add(1, Ordering::Relaxed);
            assert_eq!(before, 0, "granule {granule} was won twice");
        };
        thread::scope(|scope| {
            let completion = scope.spawn(|| map.wait_complete(Some(Duration::from_secs(60))));
            for thread in 0..THREADS {
                let (map, won) = (&map, &won);
                scope.spawn(move || {
                    // A step that has no common divisor with the prime number of granules visits
                    // each of them, in an order of its own.
                    let step = 1 + (round * THREADS + thread) * 37 % (GRANULES - 1);
                    let mut index = thread * 601 % GRANULES;
                    for _ in 0..GRANULES {
                        let granule = at(index);
                        if index.is_multiple_of(3) {
                            let wanted = range(index, 40.min(GRANULES - index));
                            let claimed = map.claim_run(wanted);
                            claimed.iter().for_each(won);
                            assert_eq!(map.publish(claimed), claimed.count());
                        } else if map.claim(granule) == Claim::Won {
                            won(granule);
                            assert_eq!(map.publish(GranuleRange::one(granule)), 1);
                        }
                        let spins = if index.is_multiple_of(2) { 0 } else { 20 };
                        let policy = WaitPolicy { spins, timeout: Some(Duration::from_secs(60)) };
                        assert_eq!(map.wait(granule, policy), Ok(State::Present));
                        index = (index + step) % GRANULES;
                    }
                });
            }
            assert!(completion.join().unwrap());
        });
        assert!(wins.iter().all(|wins| wins.load(Ordering::Relaxed) == 1));
        assert_eq!(map.count(State::Present), GRANULES);
        assert_eq!(map.remaining(), 0);
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Claim,
    ClaimRun,
    Publish,
    PublishDiscarded,
    Release,
    Poison,
    Discard,
    SetPresent,
    NextRun(State, u64),
}

fn operations() -> impl Strategy<Value = Operation> {
    prop_oneof![
        Just(Operation::Claim),
        Just(Operation::ClaimRun),
        Just(Operation::Publish),
        Just(Operation::PublishDiscarded),
        Just(Operation::Release),
        Just(Operation::Poison),
        Just(Operation::Discard),
        Just(Operation::SetPresent),
        (prop::sample::select(State::ALL.to_vec()), 0_u64..80)
            .prop_map(|(state, max)| Operation::NextRun(state, max)),
    ]
}

/// The map as it should be: one state for each granule.
struct Model(Vec<State>);

impl Model {
    fn change(&mut self, range: GranuleRange, rule: impl Fn(State) -> State) -> u64 {
        let states = &mut self.0[range.first().get() as usize..range.end().get() as usize];
        let mut changed = 0;
        for state in states {
            let new = rule(*state);
            changed += u64::from(new != *state);
            *state = new;
        }
        changed
    }

    fn runs(&self, range: GranuleRange, state: State) -> Vec<GranuleRange> {
        let mut runs: Vec<GranuleRange> = Vec::new();
        for granule in range.iter().filter(|granule| self.0[granule.get() as usize] == state) {
            match runs.last_mut() {
                Some(run) if run.end() == granule => {
                    *run = GranuleRange::new(run.first(), run.count() + 1);
                }
                _ => runs.push(GranuleRange::one(granule)),
            }
        }
        runs
    }
}

proptest! {
    #[test]
    fn agrees_with_a_vector_of_states(
        len in 1_u64..200,
        steps in prop::collection::vec((operations(), 0_u64..200, 0_u64..90), 1..60),
    ) {
        use State::{Absent, Discarded, Poisoned, Present, Requested};
        let map = PageMap::new(len);
        let mut model = Model(vec![Absent; len as usize]);
        for (operation, first, count) in steps {
            let first = first % len;
            let granule = at(first);
            let range = range(first, count.min(len - first));
            let replace = |from: State, to: State| {
                move |state| if state == from { to } else { state }
            };
            match operation {
                Operation::Claim => {
                    let before = model.0[first as usize];
                    let won = map.claim(granule) == Claim::Won;
                    prop_assert_eq!(won, before == Absent);
                    model.change(GranuleRange::one(granule), replace(Absent, Requested));
                }
                Operation::ClaimRun => {
                    let absent = model.0[first as usize..].iter().take(range.count() as usize)
                        .take_while(|state| **state == Absent).count() as u64;
                    let (expected, _) = range.split_at(absent);
                    prop_assert_eq!(map.claim_run(range), expected);
                    model.change(expected, |_| Requested);
                }
                Operation::Publish => prop_assert_eq!(
                    map.publish(range),
                    model.change(range, replace(Requested, Present))
                ),
                Operation::PublishDiscarded => prop_assert_eq!(
                    u64::from(map.publish_discarded(granule)),
                    model.change(GranuleRange::one(granule), replace(Discarded, Present))
                ),
                Operation::Release => prop_assert_eq!(
                    map.release(range),
                    model.change(range, replace(Requested, Absent))
                ),
                Operation::Poison => prop_assert_eq!(
                    map.poison(range),
                    model.change(range, |state| match state {
                        Absent | Requested => Poisoned,
                        other => other,
                    })
                ),
                Operation::Discard => {
                    let requested: u64 =
                        model.runs(range, Requested).iter().map(|run| run.count()).sum();
                    prop_assert_eq!(map.discard(range), requested);
                    model.change(range, |_| Discarded);
                }
                Operation::SetPresent => prop_assert_eq!(
                    map.set_present(range),
                    model.change(range, replace(Absent, Present))
                ),
                Operation::NextRun(state, max) => {
                    let rest = GranuleRange::from_bounds(granule, at(len)).unwrap();
                    let expected = model.runs(rest, state).first()
                        .map(|run| run.split_at(max).0).filter(|run| !run.is_empty());
                    prop_assert_eq!(map.next_run(state, granule, max), expected);
                    let mut runs = Vec::new();
                    let flow = map.for_each_run(range, state, |run| {
                        runs.push(run);
                        ControlFlow::Continue(())
                    });
                    prop_assert_eq!(flow, ControlFlow::Continue(()));
                    prop_assert_eq!(runs, model.runs(range, state));
                }
            }
            for (index, state) in model.0.iter().enumerate() {
                prop_assert_eq!(map.state(at(index as u64)), *state, "granule {}", index);
            }
            let mut counts = State::ALL.map(|state| map.count(state));
            prop_assert_eq!(counts.iter().sum::<u64>(), len);
            prop_assert_eq!(map.remaining(), counts[0] + counts[1]);
            for state in &model.0 {
                counts[*state as usize] -= 1;
            }
            prop_assert_eq!(counts, [0; 5]);
        }
    }
}
