//! Numbers in base 5: how 27 granules of 5 states each are packed into 64 bits.
//!
//! Digit `i` of a word has the weight 5^i. Division by a power of 5 that is only known at run time
//! would be the slowest part of every operation, so it is done by multiplication.

use super::State;

/// How many digits a word holds: 5^27 is the highest power of 5 below 2^64.
pub(super) const PER_WORD: u32 = 27;

const BASE: u64 = State::COUNT as u64;

/// `POWERS[i]` is 5^i.
const POWERS: [u64; PER_WORD as usize + 1] = {
    let mut powers = [1; PER_WORD as usize + 1];
    let mut i = 1;
    while i < powers.len() {
        powers[i] = powers[i - 1] * BASE;
        i += 1;
    }
    powers
};

/// Dividing a number below 2^63 by a constant: multiply, then shift.
///
/// With `2^bits` the lowest power of two not below the divisor `d`, the multiplier is
/// `2^(63 + bits) / d` rounded up. It exceeds the exact value by less than 1, which makes the
/// quotient of a number below 2^63 too large by less than `2^63 / 2^(63 + bits) <= 1 / d`: too
/// little to reach the next integer. (Granlund and Montgomery, "Division by Invariant Integers
/// using Multiplication", 1994.)
#[derive(Copy, Clone)]
struct Reciprocal {
    multiplier: u64,
    shift: u32,
}

const RECIPROCALS: [Reciprocal; PER_WORD as usize + 1] = {
    let mut all = [Reciprocal { multiplier: 0, shift: 0 }; PER_WORD as usize + 1];
    let mut i = 0;
    while i < all.len() {
        let divisor = POWERS[i] as u128;
        let bits = 128 - (divisor - 1).leading_zeros();
        let multiplier = (1_u128 << (63 + bits)).div_ceil(divisor);
        assert!(multiplier <= u64::MAX as u128);
        all[i] = Reciprocal { multiplier: multiplier as u64, shift: 63 + bits };
        i += 1;
    }
    all
};

const _: () = assert!(POWERS[PER_WORD as usize] < 1 << 63);

/// `word / 5^i`.
#[inline]
fn drop_low(word: u64, i: u32) -> u64 {
    let Reciprocal { multiplier, shift } = RECIPROCALS[i as usize];
    ((u128::from(word) * u128::from(multiplier)) >> shift) as u64
}

/// The number whose `count` digits are all 1.
#[inline]
fn ones(count: u32) -> u64 {
    (POWERS[count as usize] - 1) / (BASE - 1)
}

/// `count` digits of a word from digit `low` on.
#[derive(Copy, Clone)]
pub(super) struct Slice {
    pub(super) low: u32,
    pub(super) count: u32,
}

impl Slice {
    /// These digits of `word`, as a number.
    #[inline]
    fn of(self, word: u64) -> u64 {
        if self.count == PER_WORD {
            return word;
        }
        let above = drop_low(word, self.low);
        above - drop_low(above, self.count) * POWERS[self.count as usize]
    }

    /// One bit for each of these digits, at its place.
    #[inline]
    pub(super) fn mask(self) -> u32 {
        ((1 << self.count) - 1) << self.low
    }
}

/// One digit of a word.
#[inline]
pub(super) fn digit(word: u64, i: u32) -> State {
    State::from_digit(drop_low(word, i) % BASE)
}

/// `word` with digit `i`, which is `from`, set to `to`.
#[inline]
pub(super) fn replace(word: u64, i: u32, from: State, to: State) -> u64 {
    replace_all(word, Slice { low: i, count: 1 }, from, to)
}

/// `word` with all digits of the slice, which all are `from`, set to `to`.
#[inline]
pub(super) fn replace_all(word: u64, slice: Slice, from: State, to: State) -> u64 {
    // Every digit stays a digit, so nothing is carried; only the difference may be negative.
    let difference = (to as u64).wrapping_sub(from as u64);
    word.wrapping_add(difference.wrapping_mul(ones(slice.count) * POWERS[slice.low as usize]))
}

/// How many digits at the low end of the slice are 0.
#[inline]
pub(super) fn leading_absent(word: u64, slice: Slice) -> u32 {
    let mut digits = slice.of(word);
    if digits == 0 {
        return slice.count;
    }
    let mut count = 0;
    while digits.is_multiple_of(BASE) {
        digits /= BASE;
        count += 1;
    }
    count
}

/// Calls `visit` with state, first digit and number of digits of every longest run of equal digits
/// in the slice, from the low end up, until it says stop.
#[inline]
pub(super) fn for_each_run<B>(
    word: u64,
    slice: Slice,
    mut visit: impl FnMut(State, Slice) -> std::ops::ControlFlow<B>,
) -> std::ops::ControlFlow<B> {
    let digits = slice.of(word);
    let first = digits % BASE;
    if digits == first * ones(slice.count) {
        return visit(State::from_digit(first), slice);
    }
    let (mut rest, mut current) = (digits / BASE, first);
    let mut run = Slice { low: slice.low, count: 1 };
    for _ in 1..slice.count {
        let digit = rest % BASE;
        rest /= BASE;
        if digit == current {
            run.count += 1;
        } else {
            visit(State::from_digit(current), run)?;
            run = Slice { low: run.low + run.count, count: 1 };
            current = digit;
        }
    }
    visit(State::from_digit(current), run)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::ops::ControlFlow;

    use proptest::prelude::*;

    use super::*;

    fn pack(digits: &[u64]) -> u64 {
        digits.iter().rev().fold(0, |word, digit| word * BASE + digit)
    }

    #[test]
    fn division_is_exact_at_every_boundary() {
        let max = POWERS[PER_WORD as usize] - 1;
        for (i, divisor) in POWERS.iter().enumerate() {
            // The quotient is most easily wrong next to a multiple of the divisor.
            for multiple in [0, 1, 2, 4, 5, 1 << 20, (1 << 62) / divisor, max / divisor] {
                let Some(middle) = multiple.checked_mul(*divisor) else { continue };
                for word in [middle.saturating_sub(1), middle, middle + 1, max - 1, max] {
                    if word <= max {
                        assert_eq!(drop_low(word, i as u32), word / divisor, "{word} / {divisor}");
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn division_is_exact(word in 0..POWERS[PER_WORD as usize], i in 0..=PER_WORD) {
            prop_assert_eq!(drop_low(word, i), word / POWERS[i as usize]);
        }

        #[test]
        fn digits_are_found_and_replaced(
            mut digits in prop::collection::vec(0..BASE, PER_WORD as usize),
            i in 0..PER_WORD,
            new in 0..BASE,
        ) {
            let word = pack(&digits);
            let old = digit(word, i);
            prop_assert_eq!(old as u64, digits[i as usize]);
            digits[i as usize] = new;
            prop_assert_eq!(replace(word, i, old, State::from_digit(new)), pack(&digits));
        }

        #[test]
        fn runs_cover_the_slice(
            digits in prop::collection::vec(prop::sample::select(vec![0, 0, 0, 2, 2, 4]), PER_WORD as usize),
            low in 0..PER_WORD,
            count in 1..=PER_WORD,
        ) {
            let slice = Slice { low, count: count.min(PER_WORD - low) };
            let expected = &digits[low as usize..(low + slice.count) as usize];
            let mut seen = Vec::new();
            let mut last = None;
            let flow: ControlFlow<()> = for_each_run(pack(&digits), slice, |state, run| {
                assert_eq!(run.low as usize, low as usize + seen.len());
                assert_ne!(last.replace(state), Some(state), "runs are as long as possible");
                seen.extend(std::iter::repeat_n(state as u64, run.count as usize));
                ControlFlow::Continue(())
            });
            prop_assert_eq!(flow, ControlFlow::Continue(()));
            prop_assert_eq!(&seen, expected);
            let zeros = expected.iter().take_while(|digit| **digit == 0).count();
            prop_assert_eq!(leading_absent(pack(&digits), slice) as usize, zeros);
        }
    }
}
