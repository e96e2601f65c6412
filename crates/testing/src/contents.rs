//! What the memory of a guest is expected to contain.

use pageferry_memory::{Layout, RegionId};

use crate::{PAGE, REGION, peek};

/// The eight bytes at each `offset`, a multiple of eight, of a region: another word everywhere, and
/// never zero, which is what memory contains that something was forgotten in.
pub fn word(region: RegionId, offset: u64) -> u64 {
    let mut x = (offset >> 3) ^ (u64::from(region.get()) << 56) ^ 0x5851_f42d_4c95_7f2d;
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (x ^ (x >> 33)) | 1
}

/// Fills `bytes`, whole words, with what is expected from `offset` of the region on.
pub fn fill_pattern(region: RegionId, mut offset: u64, bytes: &mut [u8]) {
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word(region, offset).to_ne_bytes());
        offset += 8;
    }
}

/// What is expected in the page with this number of [`REGION`].
pub fn page(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    fill_pattern(REGION, number * PAGE, &mut bytes);
    bytes
}

/// Checks every word of [`REGION`].
#[track_caller]
pub fn verify_all(layout: &Layout) {
    let region = layout.get(REGION).unwrap();
    for offset in (0..region.len()).step_by(8) {
        assert_eq!(peek(layout, offset), word(REGION, offset), "offset {offset:#x}");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use pageferry_memory::Backing;

    use super::*;
    use crate::{layout, poke};

    #[test]
    fn words_differ_by_offset_and_region() {
        let regions = [REGION, RegionId::new(1)];
        let words: HashSet<u64> = regions
            .iter()
            .flat_map(|region| (0..4 * PAGE).step_by(8).map(|offset| word(*region, offset)))
            .collect();
        // The lowest bit is always set, so that two may fall together, if seldom.
        assert!(words.len() > 4090, "{}", words.len());
        assert!(!words.contains(&0));
    }

    #[test]
    fn a_wrong_word_is_found() {
        let layout = layout(Backing::Anonymous, 2 * PAGE);
        let view = layout.get(REGION).unwrap().guest_view();
        for number in 0..2 {
            view.write_at(number * PAGE, &page(number)).unwrap();
        }
        verify_all(&layout);
        poke(&layout, PAGE + 8, 0);
        let verified = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            verify_all(&layout);
        }));
        let message = *verified.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains("offset 0x1008"), "{message}");
    }
}
