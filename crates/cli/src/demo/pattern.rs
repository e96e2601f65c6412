//! The contents of the memory that is moved: known to the source, which makes them, and to the
//! guest, which checks what it reads.

use std::{fmt, str::FromStr};

use pageferry::memory::{GuestAddress, Region};

pub(super) const PAGE: u64 = 4096;
pub(super) const WORDS: u64 = PAGE / 8;

/// One page in this many is all zero, as pages of real guests are.
const ZERO_EVERY: u64 = 16;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// What the memory of threads begins as, by seed.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) struct Pattern {
    pub(super) seed: u64,
}

impl Pattern {
    /// Word `word` of page `page`.
    pub(super) fn word(self, page: u64, word: u64) -> u64 {
        let of_page = mix(self.seed ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if of_page.is_multiple_of(ZERO_EVERY) { 0 } else { mix(of_page ^ word) }
    }

    fn page(self, page: u64, bytes: &mut [u8]) {
        for (word, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&self.word(page, word as u64).to_le_bytes());
        }
    }
}

/// What the source is to fill its memory with: what its guest expects.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Contents {
    /// For threads.
    Seeded(Pattern),
    /// For a KVM guest, which computes the words from their addresses.
    OfAddresses,
}

/// What a KVM guest's memory contains at first.
pub(super) const OF_ADDRESSES: pageferry_vmm::Pattern =
    pageferry_vmm::Pattern { zero_every: ZERO_EVERY };

impl Contents {
    /// Fills the region with it.
    pub(super) fn fill(self, region: &Region) -> anyhow::Result<()> {
        let mut bytes = [0; PAGE as usize];
        for page in 0..region.len() / PAGE {
            match self {
                Self::Seeded(pattern) => pattern.page(page, &mut bytes),
                Self::OfAddresses => {
                    let address = GuestAddress::new(region.guest_base().get() + page * PAGE);
                    OF_ADDRESSES.fill(address, &mut bytes);
                }
            }
            region.guest_view().write_at(page * PAGE, &bytes)?;
        }
        Ok(())
    }
}

const OF_ADDRESSES_NAME: &str = "of-addresses";

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seeded(pattern) => write!(f, "{}", pattern.seed),
            Self::OfAddresses => f.write_str(OF_ADDRESSES_NAME),
        }
    }
}

impl FromStr for Contents {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == OF_ADDRESSES_NAME {
            return Ok(Self::OfAddresses);
        }
        Ok(Self::Seeded(Pattern { seed: text.parse()? }))
    }
}
