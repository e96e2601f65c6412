//! What the guest's memory contains before the guest runs, and what the guest makes of it.

use pageferry_memory::{GuestAddress, PageSize};

const PAGE: u64 = PageSize::SIZE_4K.bytes();

/// The odd factor of [`expected_word`].
pub(crate) const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a payload that writes adds (by xor) to the expected word.
pub const WRITTEN: u64 = 0x5a5a_1234_a5a5_4321;

/// What a payload that counts adds (by xor) after its n-th round is n times this, modulo 2^64.
pub(crate) const ROUND: u64 = 0x2545_f491_4f6c_dd1d;

/// What a device thread adds (by xor) to the expected word of the place it writes.
pub(crate) const DEVICE_WRITTEN: u64 = 0x0f0f_dead_f0f0_beef;

/// The word that each 8-aligned guest-physical address has at first, unless its page is zero:
/// the address times an odd constant, xor the page number. Neighbouring words differ, and so do the
/// same words of different pages.
pub const fn expected_word(guest: GuestAddress) -> u64 {
    guest.get().wrapping_mul(FACTOR) ^ (guest.get() / PAGE)
}

/// Which pages are zero at first; all others have their [`expected_word`]s.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Pattern {
    /// Every so-many-th page of 4 KiB, counted from guest-physical 0, is all zero. A power of two;
    /// 0: none is.
    pub zero_every: u64,
}

impl Pattern {
    /// A page whose number has none of these bits is zero.
    pub(crate) fn zero_mask(self) -> u64 {
        // With no zero pages: all bits. Page 0 is never paged.
        self.zero_every.wrapping_sub(1)
    }

    /// Whether the page with this address is zero at first.
    pub fn is_zero(self, guest: GuestAddress) -> bool {
        (guest.get() / PAGE) & self.zero_mask() == 0
    }

    /// The word at this address, which is a multiple of 8, before the guest runs.
    pub fn word(self, guest: GuestAddress) -> u64 {
        if self.is_zero(guest) { 0 } else { expected_word(guest) }
    }

    /// Fills `bytes`, whole words, with what the memory from `guest` on contains at first.
    pub fn fill(self, guest: GuestAddress, bytes: &mut [u8]) {
        let mut page_start = guest.get();
        let mut rest = bytes;
        while !rest.is_empty() {
            let left = PAGE - page_start % PAGE;
            let (page, after) = rest.split_at_mut(rest.len().min(left as usize));
            self.fill_in_page(page_start, page);
            page_start += left;
            rest = after;
        }
    }

    /// As `fill`, of bytes in one page. Sources spend their time here: no product for each word.
    fn fill_in_page(self, start: u64, bytes: &mut [u8]) {
        if self.is_zero(GuestAddress::new(start)) {
            bytes.fill(0);
            return;
        }
        let number = start / PAGE;
        let mut product = start.wrapping_mul(FACTOR);
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&(product ^ number).to_le_bytes());
            product = product.wrapping_add(FACTOR.wrapping_mul(8));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_are_those_asked_for() {
        let page = |number: u64| GuestAddress::new(number << 12);
        let none = Pattern::default();
        let fourth = Pattern { zero_every: 4 };
        let all = Pattern { zero_every: 1 };
        for number in 1..100 {
            assert!(!none.is_zero(page(number)));
            assert_eq!(fourth.is_zero(page(number)), number % 4 == 0);
            assert!(all.is_zero(page(number)));
        }
    }

    #[test]
    fn what_is_filled_has_the_words() {
        let pattern = Pattern { zero_every: 2 };
        // Beginning and end in the middle of pages, too.
        for (start, len) in [(5 << 12, 3 << 12), ((5 << 12) + 8, 16), ((6 << 12) - 16, 4096 + 32)] {
            let mut bytes = vec![0xff; len];
            pattern.fill(GuestAddress::new(start), &mut bytes);
            for (index, word) in bytes.chunks_exact(8).enumerate() {
                let address = GuestAddress::new(start + 8 * index as u64);
                let found = u64::from_le_bytes(word.try_into().unwrap());
                assert_eq!(found, pattern.word(address), "{address}");
            }
        }
    }
}
