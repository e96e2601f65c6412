//! What the page map costs: `cargo bench -p pageferry-memory`.
#![allow(missing_docs, reason = "criterion's macros generate undocumented functions")]

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use pageferry_memory::{Claim, GranuleIndex, GranuleRange, PageMap, State};

const MILLION: u64 = 1 << 20;

fn at(index: u64) -> GranuleIndex {
    GranuleIndex::new(index)
}

fn range(first: u64, count: u64) -> GranuleRange {
    GranuleRange::new(at(first), count)
}

fn claimed(granules: u64) -> PageMap {
    let map = PageMap::new(granules);
    assert_eq!(map.claim_run(range(0, granules)).count(), granules);
    map
}

/// Granules in an order that is neither ascending nor random to the reader of this code: a step
/// that has no common divisor with the number of granules visits each once.
fn scattered(granules: u64) -> impl Iterator<Item = GranuleIndex> {
    const STEP: u64 = 40_503;
    (0..granules).map(move |i| at(i * STEP % granules))
}

fn one_thread(criterion: &mut Criterion) {
    const GRANULES: u64 = 1 << 16;
    let mut group = criterion.benchmark_group("per granule");
    group.throughput(Throughput::Elements(GRANULES));
    group.bench_function("claim ascending", |bencher| {
        bencher.iter_batched_ref(
            || PageMap::new(GRANULES),
            |map| (0..GRANULES).for_each(|i| assert_eq!(map.claim(at(i)), Claim::Won)),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("claim scattered", |bencher| {
        bencher.iter_batched_ref(
            || PageMap::new(GRANULES),
            |map| scattered(GRANULES).for_each(|g| assert_eq!(map.claim(g), Claim::Won)),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("claim present", |bencher| {
        let map = PageMap::new(GRANULES);
        map.set_present(range(0, GRANULES));
        bencher.iter(|| scattered(GRANULES).for_each(|g| assert_eq!(map.claim(g), Claim::Present)));
    });
    group.bench_function("claim_run of 16", |bencher| {
        bencher.iter_batched_ref(
            || PageMap::new(GRANULES),
            |map| {
                for i in (0..GRANULES).step_by(16) {
                    assert_eq!(map.claim_run(range(i, 16)).count(), 16);
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.bench_function("publish", |bencher| {
        bencher.iter_batched_ref(
            || claimed(GRANULES),
            |map| {
                scattered(GRANULES).for_each(|g| assert_eq!(map.publish(GranuleRange::one(g)), 1))
            },
            BatchSize::LargeInput,
        );
    });
    group.bench_function("publish 16 at once", |bencher| {
        bencher.iter_batched_ref(
            || claimed(GRANULES),
            |map| {
                for i in (0..GRANULES).step_by(16) {
                    assert_eq!(map.publish(range(i, 16)), 16);
                }
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn scan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("over 1 Mi granules");
    group.throughput(Throughput::Elements(MILLION));
    let uniform = PageMap::new(MILLION);
    uniform.set_present(range(0, MILLION - 1));
    group.bench_function("next_run, all but the last present", |bencher| {
        bencher.iter(|| {
            let run = uniform.next_run(State::Absent, black_box(at(0)), u64::MAX);
            assert_eq!(run, Some(range(MILLION - 1, 1)));
        });
    });
    let mixed = PageMap::new(MILLION);
    for i in (0..MILLION).step_by(2) {
        mixed.set_present(range(i, 1));
    }
    group.bench_function("count, every second present", |bencher| {
        bencher.iter(|| assert_eq!(mixed.count(black_box(State::Present)), MILLION / 2));
    });
    group.finish();
}

fn two_threads(criterion: &mut Criterion) {
    const GRANULES: u64 = 1 << 18;
    let mut group = criterion.benchmark_group("two threads");
    group.throughput(Throughput::Elements(GRANULES));
    // `distance` granules lie between where the two threads begin.
    for (name, distance) in [("claim far apart", GRANULES / 2), ("claim the same words", 0)] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                (0..rounds).map(|_| claim_with_two_threads(GRANULES, distance)).sum()
            });
        });
    }
    group.finish();
}

/// Both threads claim half of the granules each. Answers how long the slower one took.
fn claim_with_two_threads(granules: u64, distance: u64) -> Duration {
    let map = PageMap::new(granules);
    let start = Barrier::new(2);
    let run = |thread: u64| {
        start.wait();
        let before = Instant::now();
        for i in 0..granules / 2 {
            // Far apart: consecutive granules; otherwise every second one.
            let granule = if distance > 0 { thread * distance + i } else { 2 * i + thread };
            assert_eq!(map.claim(at(granule)), Claim::Won);
        }
        before.elapsed()
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        let mine = run(0);
        mine.max(other.join().expect("the other thread claims without failing"))
    })
}

criterion_group!(benches, one_thread, scan, two_threads);
criterion_main!(benches);
