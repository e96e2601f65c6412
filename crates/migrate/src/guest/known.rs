//! What the destination is known to have: hashes of all that was sent, and some of it whole.

use std::collections::{HashMap, VecDeque};

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::units::UNIT;

/// Units whose hashes are kept together.
const BLOCK: u64 = 256;
/// No page: its hash is never compared.
const UNKNOWN: u128 = 0;

/// What one connection sent. Only what was copied out of the memory before it was hashed and sent
/// is noted here: of what the kernel copied from under a running guest nobody knows what it was.
#[derive(Debug)]
pub(crate) struct Known {
    /// Nobody outside can foresee it, so nobody can make two pages of the same hash.
    seed: u64,
    hashes: HashMap<(usize, u64), Box<[u128; BLOCK as usize]>>,
    pages: HashMap<(usize, u64), Box<[u8; UNIT as usize]>>,
    /// Roughly by age.
    order: VecDeque<(usize, u64)>,
    most_pages: usize,
    /// The hash of a page of zeros.
    zeros: u128,
}

impl Known {
    /// Nothing is known yet. Whole pages are kept up to `bytes`; hashes of all, 16 bytes each.
    pub(crate) fn new(seed: u64, bytes: usize) -> Self {
        let zeros = hash(&[0; UNIT as usize], seed);
        Self {
            seed,
            hashes: HashMap::new(),
            pages: HashMap::new(),
            order: VecDeque::new(),
            most_pages: bytes / UNIT as usize,
            zeros,
        }
    }

    /// For who sends everything once.
    pub(crate) fn nothing() -> Self {
        Self::new(0, 0)
    }

    /// Whether nothing has been noted.
    pub(crate) fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// The hash of `page`.
    pub(crate) fn hash(&self, page: &[u8]) -> u128 {
        hash(page, self.seed)
    }

    /// Whether the destination has just this.
    pub(crate) fn has(&self, region: usize, unit: u64, hash: u128) -> bool {
        self.hashes
            .get(&(region, unit / BLOCK))
            .is_some_and(|block| block[(unit % BLOCK) as usize] == hash && hash != UNKNOWN)
    }

    /// Whether the destination has zeros there.
    pub(crate) fn has_zeros(&self, region: usize, unit: u64) -> bool {
        self.has(region, unit, self.zeros)
    }

    fn note_hash(&mut self, region: usize, unit: u64, hash: u128) {
        let block = self
            .hashes
            .entry((region, unit / BLOCK))
            .or_insert_with(|| Box::new([UNKNOWN; BLOCK as usize]));
        block[(unit % BLOCK) as usize] = hash;
    }

    /// Zeros were sent.
    pub(crate) fn note_zeros(&mut self, region: usize, unit: u64) {
        self.note_hash(region, unit, self.zeros);
        self.pages.remove(&(region, unit));
    }

    /// Something was sent of which nothing is known.
    pub(crate) fn forget(&mut self, region: usize, unit: u64) {
        if let Some(block) = self.hashes.get_mut(&(region, unit / BLOCK)) {
            block[(unit % BLOCK) as usize] = UNKNOWN;
        }
        self.pages.remove(&(region, unit));
    }

    /// The page as it was sent last, if it was kept.
    pub(crate) fn page(&self, region: usize, unit: u64) -> Option<&[u8; UNIT as usize]> {
        self.pages.get(&(region, unit)).map(Box::as_ref)
    }

    /// `page`, whose hash is `hash`, was sent.
    ///
    /// With `keep` it is kept whole, for as long as there is room.
    pub(crate) fn note(&mut self, region: usize, unit: u64, hash: u128, page: &[u8], keep: bool) {
        self.note_hash(region, unit, hash);
        if !keep || self.most_pages == 0 {
            self.pages.remove(&(region, unit));
            return;
        }
        if let Some(kept) = self.pages.get_mut(&(region, unit)) {
            kept.copy_from_slice(page);
            return;
        }
        let mut place = None;
        // What was forgotten is in the order still, and is skipped.
        while self.pages.len() >= self.most_pages
            && let Some(oldest) = self.order.pop_front()
        {
            place = self.pages.remove(&oldest).or(place);
        }
        let mut place = place.unwrap_or_else(|| Box::new([0; UNIT as usize]));
        place.copy_from_slice(page);
        self.pages.insert((region, unit), place);
        self.order.push_back((region, unit));
        if self.order.len() > 2 * self.most_pages + 16 {
            let pages = &self.pages;
            let mut seen = std::collections::HashSet::new();
            self.order.retain(|key| pages.contains_key(key) && seen.insert(*key));
        }
    }
}

fn hash(page: &[u8], seed: u64) -> u128 {
    // Hashing to what stands for "unknown" only means that the page is sent again.
    xxh3_128_with_seed(page, seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_page_again_is_known() {
        let mut known = Known::new(7, 0);
        let page = [5; UNIT as usize];
        let hash = known.hash(&page);
        assert!(!known.has(0, 300, hash));
        known.note(0, 300, hash, &page, true);
        assert!(known.has(0, 300, hash) && !known.has(0, 301, hash) && !known.has(1, 300, hash));
        assert!(known.page(0, 300).is_none(), "no room for pages was given");
        known.forget(0, 300);
        assert!(!known.has(0, 300, hash));
        known.note_zeros(0, 300);
        assert!(known.has_zeros(0, 300) && !known.has_zeros(0, 299));
    }

    #[test]
    fn pages_are_kept_within_bounds_and_the_oldest_goes() {
        let mut known = Known::new(7, 4 * UNIT as usize);
        for round in 0..50_u64 {
            for unit in 0..6 {
                let page = [(round + unit) as u8; UNIT as usize];
                let hash = known.hash(&page);
                known.note(0, unit, hash, &page, true);
                assert_eq!(known.page(0, unit), Some(&page));
                assert!(known.pages.len() <= 4 && known.order.len() <= 24);
            }
            known.forget(0, 3);
        }
        assert!(known.page(0, 0).is_none() && known.page(0, 5).is_some());
    }
}
