//! Numbers that look random and are the same in every run.

/// A sequence of numbers (xorshift64), the same for the same seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        // Never 0, of which there is no way on.
        Self(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed.wrapping_add(1)) | 1)
    }

    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The next number, below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The lowest bits are the least random ones.
        (self.next() >> 16) % bound
    }
}

/// The numbers below `count` in an order of their own for every `seed`.
pub fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut random = Random::new(seed);
    for index in (1..order.len()).rev() {
        order.swap(index, random.below(index as u64 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_once_in_another_order_for_every_seed() {
        let (one, other) = (shuffled(100, 1), shuffled(100, 2));
        assert_ne!(one, other);
        assert_eq!(one, shuffled(100, 1));
        for mut order in [one, other] {
            assert!(!order.is_sorted());
            order.sort_unstable();
            assert_eq!(order, (0..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn there_is_no_seed_that_stands_still() {
        for seed in [0, 1, u64::MAX - 1, u64::MAX] {
            let mut random = Random::new(seed);
            assert_ne!(random.next(), random.next());
        }
    }
}
