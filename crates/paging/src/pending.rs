//! When each outstanding granule was requested, and for whom.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pageferry_memory::{GranuleIndex, RegionId};

use crate::Urgency;

const SLOTS: usize = 1 << 12;
const TIME_BITS: u32 = 43;
/// Times are kept in units of 16 ns.
const UNIT_SHIFT: u32 = 4;
const TIME_MASK: u64 = (1 << TIME_BITS) - 1;
const DEMAND: u64 = 1 << TIME_BITS;
const TAG_SHIFT: u32 = TIME_BITS + 1;

/// A lossy table: what does not fit is not timed, and nothing else depends on it but the hint to
/// expedite. One word a slot: a tag of 20 bits, the urgency, the time of the fault's arrival.
pub(crate) struct Pending {
    slots: Box<[AtomicU64]>,
}

/// What was remembered of a request.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remembered {
    /// [`Stats::now`](crate::stats::Stats::now), rounded down to 16 ns, modulo 2^47 ns.
    pub(crate) at: u64,
    pub(crate) urgency: Urgency,
}

impl Pending {
    pub(crate) fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect() }
    }

    fn locate(&self, region: RegionId, granule: GranuleIndex) -> (&AtomicU64, u64) {
        let key = granule.get() ^ (u64::from(region.get()) << 48);
        let hash = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        // Never 0, so that an empty slot matches nothing.
        let tag = (hash >> (64 - 20 - 12)) & ((1 << 20) - 1) | 1;
        (&self.slots[(hash >> (64 - 12)) as usize], tag << TAG_SHIFT)
    }

    /// Remembers a request made at `now`. Returns whether it displaced another.
    pub(crate) fn insert(
        &self,
        region: RegionId,
        granule: GranuleIndex,
        urgency: Urgency,
        now: u64,
    ) -> bool {
        let (slot, tag) = self.locate(region, granule);
        let demand = if urgency == Urgency::Demand { DEMAND } else { 0 };
        let displaced = slot.swap(tag | demand | (now >> UNIT_SHIFT) & TIME_MASK, Relaxed);
        displaced & DEMAND != 0
    }

    /// Forgets and returns what is known of a granule's request.
    pub(crate) fn take(&self, region: RegionId, granule: GranuleIndex) -> Option<Remembered> {
        let (slot, tag) = self.locate(region, granule);
        let word = slot.load(Relaxed);
        if word >> TAG_SHIFT << TAG_SHIFT != tag {
            return None;
        }
        slot.compare_exchange(word, 0, Relaxed, Relaxed).ok()?;
        Some(decode(word))
    }

    /// Turns a remembered prefetch into demand; true for the one caller that did.
    pub(crate) fn upgrade(&self, region: RegionId, granule: GranuleIndex, now: u64) -> bool {
        let (slot, tag) = self.locate(region, granule);
        let word = slot.load(Relaxed);
        if word >> TAG_SHIFT << TAG_SHIFT != tag || word & DEMAND != 0 {
            return false;
        }
        let upgraded = tag | DEMAND | (now >> UNIT_SHIFT) & TIME_MASK;
        slot.compare_exchange(word, upgraded, Relaxed, Relaxed).is_ok()
    }
}

fn decode(word: u64) -> Remembered {
    Remembered {
        at: (word & TIME_MASK) << UNIT_SHIFT,
        urgency: if word & DEMAND != 0 { Urgency::Demand } else { Urgency::Prefetch },
    }
}

/// Nanoseconds from a remembered time to `now`, whatever wrapped in between. Zero if the time is
/// the later one: a thread may come to wait for a granule whose bytes have just arrived.
pub(crate) fn elapsed(at: u64, now: u64) -> u64 {
    let units = (now >> UNIT_SHIFT).wrapping_sub(at >> UNIT_SHIFT) & TIME_MASK;
    if units > TIME_MASK / 2 { 0 } else { units << UNIT_SHIFT }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_upgrades_once_and_forgets() {
        let pending = Pending::new();
        let (region, granule) = (RegionId::new(3), GranuleIndex::new(12345));
        assert_eq!(pending.take(region, granule), None);
        assert!(!pending.insert(region, granule, Urgency::Prefetch, 1600));
        assert!(pending.upgrade(region, granule, 3200));
        assert!(!pending.upgrade(region, granule, 4800));
        let remembered = pending.take(region, granule).unwrap();
        assert_eq!(remembered, Remembered { at: 3200, urgency: Urgency::Demand });
        assert_eq!(pending.take(region, granule), None);
    }

    #[test]
    fn time_wraps() {
        assert_eq!(elapsed(((TIME_MASK - 1) << UNIT_SHIFT) & !15, TIME_MASK << UNIT_SHIFT), 16);
        assert_eq!(elapsed(TIME_MASK << UNIT_SHIFT, 0), 16);
        assert_eq!(elapsed(3200, 1600), 0);
    }
}
