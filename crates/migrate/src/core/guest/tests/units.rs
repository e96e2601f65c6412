//! Sets of units, against sets of numbers.

use std::collections::BTreeSet;

use super::*;

proptest! {
    #[test]
    fn set_model(ops in prop::collection::vec((0..5_u8, 0..190_u64, 1..140_u64), 1..60)) {
        let units = 333;
        let set = UnitSet::new([7, units]);
        let mut model = BTreeSet::new();
        for (op, first, count) in ops {
            let range = first..first + count;
            let inside = range.clone().filter(|unit| model.contains(unit)).count() as u64;
            match op {
                0 | 1 => {
                    prop_assert_eq!(set.insert(1, run(first, count)), count - inside);
                    model.extend(range);
                }
                2 => {
                    prop_assert_eq!(set.remove(1, run(first, count)), inside);
                    range.for_each(|unit| { model.remove(&unit); });
                }
                3 => {
                    let absent = range.clone().find(|unit| !model.contains(unit));
                    prop_assert_eq!(set.absent(1, run(first, count)), absent);
                    prop_assert_eq!(set.take(1, run(first, count)), absent.map_or(Ok(()), Err));
                    if absent.is_none() {
                        range.for_each(|unit| { model.remove(&unit); });
                    }
                }
                _ => {
                    let from = range.clone().find(|unit| model.contains(unit));
                    let want = from.map(|from| {
                        let end = (from..range.end).find(|unit| !model.contains(unit));
                        run(from, end.unwrap_or(range.end) - from)
                    });
                    prop_assert_eq!(set.claim(1, run(first, count)), want);
                    if let Some(want) = want {
                        (want.first..want.first + want.count).for_each(|unit| {
                            model.remove(&unit);
                        });
                    }
                }
            }
            prop_assert_eq!(set.total(), model.len() as u64);
            for wanted in [true, false] {
                let found: Vec<u64> =
                    set.runs(1, wanted).flat_map(|run| run.first..run.first + run.count).collect();
                let expected: Vec<u64> =
                    (0..units).filter(|unit| model.contains(unit) == wanted).collect();
                prop_assert_eq!(found, expected);
            }
        }
        let rest = set.empty_like();
        rest.become_complement(&set);
        prop_assert_eq!(rest.uncovered(&set), None);
        prop_assert_eq!(rest.total() + set.total(), 7 + units);
        if let Some(unit) = model.first() {
            set.remove(1, run(*unit, 1));
            prop_assert_eq!(rest.uncovered(&set), Some((1, *unit)));
        }
        rest.retain(&set);
        prop_assert_eq!(rest.total(), 0);
    }
}

/// Whatever many threads claim at once, each unit is one's alone.
#[test]
fn claimed_once_by_many() {
    let units = 40_000;
    let set = UnitSet::new([units]);
    set.insert(0, run(0, units));
    let mut all: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let set = &set;
                scope.spawn(move || {
                    let mut mine = Vec::new();
                    let window = 37 + n * 50;
                    while set.total() > 0 {
                        for first in (0..units).step_by(61) {
                            let count = window.min(units - first);
                            if let Some(found) = set.claim(0, run(first, count)) {
                                mine.extend(found.first..found.first + found.count);
                            }
                        }
                    }
                    mine
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    all.sort_unstable();
    assert!(all.into_iter().eq(0..units));
}

#[test]
#[should_panic(expected = "outside the region")]
fn ranges_are_checked() {
    UnitSet::new([64]).insert(0, run(60, 5));
}
