//! What to bring that nobody asked for yet: around a fault, ahead of a stream, in the background.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use pageferry_memory::{GranuleIndex, GranuleRange, PageMap, RegionId, State};

/// What is brought beyond what was touched. Demand overtakes all of it.
#[derive(Copy, Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Prefetch {
    /// Bring the absent granules of the aligned block of this many bytes around each fault with
    /// it, in the same request. 0: only what was touched.
    pub around: u64,
    /// Notice threads that read forward through memory, and run ahead of them by up to this many
    /// bytes. 0: do not.
    pub ahead: u64,
    /// Bring everything else in the background, following the last fault.
    pub sweep: bool,
}

impl Prefetch {
    /// Only what is touched, granule by granule.
    pub const NONE: Self = Self { around: 0, ahead: 0, sweep: false };
    /// Only what is touched and, in the background, all the rest.
    pub const SWEEP: Self = Self { around: 0, ahead: 0, sweep: true };

    /// Blocks of `bytes` around each fault.
    pub const fn around(bytes: u64) -> Self {
        Self { around: bytes, ahead: 0, sweep: false }
    }
}

impl Default for Prefetch {
    /// 64 KiB around each fault, up to 1 MiB ahead of streams, and the sweep.
    fn default() -> Self {
        Self { around: 64 << 10, ahead: 1 << 20, sweep: true }
    }
}

/// How many interleaved streams are told apart.
const STREAMS: usize = 32;

#[derive(Copy, Clone)]
struct Stream {
    region: RegionId,
    /// The granule whose demand continues the stream.
    next: u64,
    /// Granules to run ahead; doubles with each hit.
    window: u64,
    used: u64,
}

pub(crate) struct Prefetcher {
    pub(crate) policy: Prefetch,
    /// Only ever tried, never waited for: a fault that finds it taken goes on without streams.
    streams: Mutex<(u64, [Option<Stream>; STREAMS])>,
    last_fault: AtomicU64,
}

impl Prefetcher {
    pub(crate) fn new(policy: Prefetch) -> Self {
        Self { policy, streams: Mutex::new((0, [None; STREAMS])), last_fault: AtomicU64::new(0) }
    }

    /// Claims `run` (granules that threads are stopped on) as far as it is absent from its first
    /// granule on, and with it what surrounds it. Empty if the first granule was not absent.
    pub(crate) fn claim(
        &self,
        map: &PageMap,
        run: GranuleRange,
        granule_shift: u32,
    ) -> GranuleRange {
        let block = self.policy.around >> granule_shift;
        if block <= 1 {
            return map.claim_run(run);
        }
        // The aligned block(s) that the run lies in.
        let from = run.first().get() / block * block;
        let to = run.end().get().div_ceil(block).saturating_mul(block).min(map.len());
        // Backwards as far as everything is absent, so that one claim covers it.
        let mut first = run.first().get();
        while first > from && map.state(GranuleIndex::new(first - 1)) == State::Absent {
            first -= 1;
        }
        let wide = GranuleRange::new(GranuleIndex::new(first), to - first);
        map.claim_run(wide)
    }

    /// A fault at `granule` whose request covered up to `end`: how many granules to bring after
    /// `end` because a stream seems to come.
    pub(crate) fn ahead(
        &self,
        region: RegionId,
        granule: GranuleIndex,
        end: GranuleIndex,
        granule_shift: u32,
    ) -> u64 {
        self.last_fault.store(u64::from(region.get()) << 48 | granule.get(), Relaxed);
        let most = self.policy.ahead >> granule_shift;
        if most == 0 {
            return 0;
        }
        let Ok(mut streams) = self.streams.try_lock() else { return 0 };
        let (clock, streams) = &mut *streams;
        *clock += 1;
        let continued = streams.iter_mut().flatten().find(|stream| {
            // Within what the stream expects: its next granule, or a little beyond.
            stream.region == region
                && (stream.next..=stream.next + stream.window.max(1)).contains(&granule.get())
        });
        if let Some(stream) = continued {
            stream.window = (stream.window * 2).clamp(1, most);
            stream.next = end.get() + stream.window;
            stream.used = *clock;
            return stream.window;
        }
        let fresh = Stream { region, next: end.get(), window: 2, used: *clock };
        let oldest = streams.iter_mut().min_by_key(|stream| stream.map_or(0, |s| s.used));
        if let Some(oldest) = oldest {
            *oldest = Some(fresh);
        }
        0
    }

    /// Where the sweep should look next: it follows the last fault.
    pub(crate) fn last_fault(&self) -> (RegionId, GranuleIndex) {
        let word = self.last_fault.load(Relaxed);
        (RegionId::new((word >> 48) as u16), GranuleIndex::new(word & ((1 << 48) - 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: RegionId = RegionId::new(0);

    fn run(first: u64, count: u64) -> GranuleRange {
        GranuleRange::new(GranuleIndex::new(first), count)
    }

    #[test]
    fn around_claims_the_absent_part_of_the_block() {
        let map = PageMap::new(100);
        let prefetcher = Prefetcher::new(Prefetch::around(64 << 10));
        assert_eq!(prefetcher.claim(&map, run(20, 1), 12), run(16, 16));
        // The block at the end is cut short; a present granule bounds it.
        map.set_present(run(97, 1));
        assert_eq!(prefetcher.claim(&map, run(99, 1), 12), run(98, 2));
        assert!(prefetcher.claim(&map, run(99, 1), 12).is_empty());
    }

    #[test]
    fn a_block_smaller_than_a_granule_is_the_granule() {
        let map = PageMap::new(100);
        let prefetcher = Prefetcher::new(Prefetch::around(64 << 10));
        assert_eq!(prefetcher.claim(&map, run(20, 1), 21), run(20, 1));
    }

    #[test]
    fn streams_are_told_apart_and_their_windows_grow_to_the_limit() {
        let prefetcher = Prefetcher::new(Prefetch { ahead: 64 << 12, ..Prefetch::NONE });
        let fault = |at: u64| {
            prefetcher.ahead(REGION, GranuleIndex::new(at), GranuleIndex::new(at + 1), 12)
        };
        assert_eq!(fault(1000), 0);
        assert_eq!(fault(5000), 0);
        let (mut a, mut b, mut windows) = (1001, 5001, Vec::new());
        for _ in 0..6 {
            let window = fault(a);
            assert_eq!(fault(b), window);
            windows.push(window);
            (a, b) = (a + 1 + window, b + 1 + window);
        }
        assert_eq!(windows, [4, 8, 16, 32, 64, 64]);
        assert_eq!(fault(77), 0, "a lone fault is no stream");
    }
}
