//! The contents of the memory that is moved: known to the source, which makes them, and to the
//! guest, which checks what it reads.

use pageferry::memory::Mapping;

pub(super) const PAGE: u64 = 4096;
pub(super) const WORDS: u64 = PAGE / 8;

/// One page in this many is all zero, as pages of real guests are.
const ZERO_EVERY: u64 = 16;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// What the memory begins as, by seed.
#[derive(Copy, Clone, Debug)]
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

    /// Fills `memory` with it.
    pub(super) fn fill(self, memory: &Mapping) -> anyhow::Result<()> {
        let mut bytes = [0; PAGE as usize];
        for page in 0..memory.range().len() / PAGE {
            self.page(page, &mut bytes);
            memory.write_at(page * PAGE, &bytes)?;
        }
        Ok(())
    }
}
