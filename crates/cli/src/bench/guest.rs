//! The guest's side of a measurement, the same for every contender: threads that start together
//! and touch every page of their own slice once, timing each touch.

use std::{
    ops::Range,
    sync::Barrier,
    time::{Duration, Instant},
};

use anyhow::bail;
use rustix::time::{ClockId, clock_gettime};

use super::{
    case::{Access, Case, Measurement, Order, PAGE},
    histogram::Histogram,
};

/// What every page must begin with once it is present.
const MARK: u64 = 0x7061_6765_6665_7272;

/// The fixed page that everybody installs: [`MARK`] over and over.
pub(crate) fn page_contents() -> Box<[u8; PAGE]> {
    let mut page = Box::new([0; PAGE]);
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&MARK.to_ne_bytes());
    }
    page
}

/// What one guest thread saw.
struct Visit {
    latency: Box<Histogram>,
    end: Instant,
    wrong: u64,
}

/// Runs the guest threads of `case` on the memory at `base` and measures them. Whoever calls this
/// is serving the faults already, and goes on until it returns.
///
/// Fails when a page did not hold [`page_contents`] as it was touched.
///
/// # Safety
/// `base` is the start of a mapping of `case.bytes()` bytes, readable and writable, which stays
/// mapped, and to which no reference exists, until this returns.
pub(crate) unsafe fn run(base: *mut u8, case: &Case) -> anyhow::Result<Measurement> {
    let address = base as usize;
    // The first meeting keeps the threads' creation out of what is measured.
    let [ready, start, end] = [(); 3].map(|()| Barrier::new(case.threads + 1));
    let orders: Vec<Vec<u32>> = (0..case.threads).map(|thread| order(case, thread)).collect();
    let (begun, cpu, visits) = std::thread::scope(|scope| {
        let guests: Vec<_> = orders
            .iter()
            .map(|order| {
                let (ready, start, end) = (&ready, &start, &end);
                scope.spawn(move || {
                    let mut latency = Histogram::new();
                    ready.wait();
                    start.wait();
                    // SAFETY: as this function's own contract; `order` has only pages of the case.
                    let wrong = unsafe { touch_all(address, order, case.access, &mut latency) };
                    let visit = Visit { latency, end: Instant::now(), wrong };
                    end.wait();
                    visit
                })
            })
            .collect();
        ready.wait();
        let cpu_before = cpu_time();
        let begun = Instant::now();
        start.wait();
        end.wait();
        let cpu = cpu_time().saturating_sub(cpu_before);
        let visits: Result<Vec<Visit>, _> = guests.into_iter().map(|g| g.join()).collect();
        (begun, cpu, visits)
    });
    let Ok(visits) = visits else { bail!("a guest thread panicked") };
    let mut latency = Histogram::new();
    let mut wall = Duration::ZERO;
    let mut wrong = 0;
    for visit in &visits {
        latency.merge(&visit.latency);
        wall = wall.max(visit.end.saturating_duration_since(begun));
        wrong += visit.wrong;
    }
    if wrong != 0 {
        bail!("{wrong} of {} pages had the wrong contents", case.pages);
    }
    if latency.count() != case.pages as u64 {
        bail!("{} of {} pages were touched", latency.count(), case.pages);
    }
    Ok(Measurement { pages: case.pages, wall, cpu, latency })
}

/// Touches the pages `order` of the memory at `address` and returns how many were wrong.
///
/// # Safety
/// As [`run`]; every page of `order` lies in the memory.
unsafe fn touch_all(address: usize, order: &[u32], access: Access, out: &mut Histogram) -> u64 {
    let mut wrong = 0;
    for &page in order {
        let page = (address + page as usize * PAGE) as *mut u8;
        let before = Instant::now();
        match access {
            // SAFETY: the page is in the mapping, and aligned for a u64.
            Access::Read => _ = unsafe { page.cast::<u64>().read_volatile() },
            // SAFETY: the page is in the mapping.
            Access::Write => unsafe { page.add(PAGE - 1).write_volatile(0) },
        }
        out.record(before.elapsed());
        // SAFETY: as above.
        wrong += u64::from(unsafe { page.cast::<u64>().read_volatile() } != MARK);
    }
    wrong
}

/// The pages that guest thread `thread` touches, in order: a permutation of its slice.
fn order(case: &Case, thread: usize) -> Vec<u32> {
    let Range { start, end } = case.slice(thread);
    let mut pages: Vec<u32> = (start as u32..end as u32).collect();
    if case.order == Order::Random {
        let mut state = case.seed ^ (thread as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
        for upper in (1..pages.len()).rev() {
            let other = next_random(&mut state) % (upper as u64 + 1);
            pages.swap(upper, other as usize);
        }
    }
    pages
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// User and system time that all threads of this process have used (clock_gettime(2)): what
/// getrusage(2) reports, with a finer resolution.
pub(crate) fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bench::{
        case::{Backing, Delivery, Kind},
        memory::Memory,
    };

    fn case(threads: usize, order: Order) -> Case {
        Case {
            delivery: Delivery::Queue,
            backing: Backing::Anon,
            kind: Kind::Missing,
            threads,
            pages: 1000,
            order,
            access: Access::Read,
            seed: 1,
            workers: 1,
            batch: 1,
        }
    }

    #[test]
    fn every_page_is_in_one_order_once() {
        for (threads, kind) in [(1, Order::Random), (7, Order::Random), (7, Order::Sequential)] {
            let case = case(threads, kind);
            let all: Vec<u32> = (0..threads).flat_map(|t| order(&case, t)).collect();
            assert_eq!(all.len(), 1000);
            assert_eq!(all.iter().copied().collect::<BTreeSet<_>>().len(), 1000);
            assert_eq!(all.is_sorted(), kind == Order::Sequential);
            assert_eq!(order(&case, 0), order(&case, 0), "depends only on the seed");
        }
    }

    #[test]
    fn wrong_contents_are_noticed() {
        for access in [Access::Read, Access::Write] {
            let case = Case { access, ..case(2, Order::Random) };
            let memory = Memory::new(&case).unwrap();
            // SAFETY: `memory` is a mapping of `case.bytes()` bytes that only this test uses.
            let error = unsafe { run(memory.guest(), &case) }.expect_err("the memory is zero");
            assert!(error.to_string().contains("1000 of 1000 pages"), "{error}");
        }
    }

    #[test]
    fn right_contents_are_measured() {
        for access in [Access::Read, Access::Write] {
            let case = Case { access, ..case(3, Order::Random) };
            let memory = Memory::new(&case).unwrap();
            let page = page_contents();
            for index in 0..case.pages {
                // SAFETY: the page lies in the mapping, which nothing else touches yet.
                unsafe {
                    let to = memory.guest().add(index * PAGE);
                    std::ptr::copy_nonoverlapping(page.as_ptr(), to, PAGE);
                }
            }
            // SAFETY: as above.
            let measured = unsafe { run(memory.guest(), &case) }.unwrap();
            assert_eq!(measured.pages, 1000);
            assert_eq!(measured.latency.count(), 1000);
            assert!(measured.wall > Duration::ZERO && measured.cpu > Duration::ZERO);
        }
    }
}
