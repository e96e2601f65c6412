//! What changed of a page that the other side has: runs of bytes, and how far apart they are.
//!
//! The format: any number of `skip length bytes`, where `skip` (bytes that are as they were) and
//! `length` (at least 1) are LEB128 numbers. What follows the last run is as it was.

/// Changed bytes closer together than this are sent as one run: two numbers cost as much.
const GAP: usize = 8;

/// Why a delta cannot be applied.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum DeltaError {
    /// It ends in the middle of a run.
    #[error("the delta ends early")]
    Truncated,
    /// It reaches beyond what it is applied to.
    #[error("the delta reaches beyond its pages")]
    Outside,
    /// A run of nothing, or a number of more digits than needed.
    #[error("the delta has an impossible number")]
    Number,
}

fn number(mut value: usize, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn parse(bytes: &mut &[u8]) -> Result<usize, DeltaError> {
    let mut value = 0_usize;
    // Four digits hold more than any payload has bytes.
    for shift in [0, 7, 14, 21] {
        let (&byte, rest) = bytes.split_first().ok_or(DeltaError::Truncated)?;
        *bytes = rest;
        value |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return if shift > 0 && byte == 0 { Err(DeltaError::Number) } else { Ok(value) };
        }
    }
    Err(DeltaError::Number)
}

/// Where the next difference is, from `at` on.
fn next_difference(old: &[u8], new: &[u8], at: usize) -> Option<usize> {
    let (old, new) = (&old[at..], &new[at..]);
    let words = old.len() / 8;
    let same =
        old.chunks_exact(8).zip(new.chunks_exact(8)).position(|(a, b)| a != b).unwrap_or(words);
    let from = same * 8;
    old[from..].iter().zip(&new[from..]).position(|(a, b)| a != b).map(|n| at + from + n)
}

/// Appends the delta from `old` to `new`, which are of the same length; false, with `out` as it
/// was, if it would have more than `most` bytes.
pub(crate) fn encode(old: &[u8], new: &[u8], most: usize, out: &mut Vec<u8>) -> bool {
    assert_eq!(old.len(), new.len(), "a delta is of equal lengths");
    let begin = out.len();
    let mut done = 0;
    while let Some(first) = next_difference(old, new, done) {
        // To the first GAP bytes in a row that are equal.
        let (mut end, mut at) = (first + 1, first + 1);
        while at < new.len() && at - end < GAP {
            if old[at] != new[at] {
                end = at + 1;
            }
            at += 1;
        }
        number(first - done, out);
        number(end - first, out);
        out.extend_from_slice(&new[first..end]);
        if out.len() - begin > most {
            out.truncate(begin);
            return false;
        }
        done = end;
    }
    true
}

/// Applies `delta` to `bytes`.
pub(crate) fn apply(mut delta: &[u8], bytes: &mut [u8]) -> Result<(), DeltaError> {
    let mut at = 0_usize;
    while !delta.is_empty() {
        let skip = parse(&mut delta)?;
        let length = parse(&mut delta)?;
        if length == 0 {
            return Err(DeltaError::Number);
        }
        let first = at.checked_add(skip).ok_or(DeltaError::Outside)?;
        let end = first.checked_add(length).ok_or(DeltaError::Outside)?;
        let place = bytes.get_mut(first..end).ok_or(DeltaError::Outside)?;
        let (run, rest) = delta.split_at_checked(length).ok_or(DeltaError::Truncated)?;
        place.copy_from_slice(run);
        (delta, at) = (rest, end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn applied_it_gives_the_new_bytes(
            old in prop::collection::vec(any::<u8>(), 4096),
            changes in prop::collection::vec((0_usize..4096, any::<u8>()), 0..200),
        ) {
            let mut new = old.clone();
            for (at, byte) in changes {
                new[at] = byte;
            }
            let mut delta = vec![7];
            prop_assert!(encode(&old, &new, usize::MAX, &mut delta));
            let mut got = old.clone();
            prop_assert_eq!(apply(&delta[1..], &mut got), Ok(()));
            prop_assert!(got == new);
            // Any bound is kept.
            let length = delta.len() - 1;
            if length > 0 {
                let mut out = vec![7];
                prop_assert!(!encode(&old, &new, length - 1, &mut out));
                prop_assert_eq!(out, vec![7]);
            }
        }

        #[test]
        fn anything_can_be_tried(
            delta in prop::collection::vec(any::<u8>(), 0..300), length in 0_usize..600,
        ) {
            // Whatever comes of it, nothing outside is touched: that would be a panic.
            let _ = apply(&delta, &mut vec![0; length]);
        }
    }

    #[test]
    fn refused_by_name() {
        for (delta, why) in [
            (&[0_u8][..], DeltaError::Truncated),
            (&[0, 2, 9], DeltaError::Truncated),
            (&[0, 0], DeltaError::Number),
            (&[0x80, 0, 1, 1], DeltaError::Number),
            (&[0xff, 0xff, 0xff, 0xff, 1, 1, 1], DeltaError::Number),
            (&[8, 1, 1], DeltaError::Outside),
            (&[0, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1], DeltaError::Outside),
        ] {
            assert_eq!(apply(delta, &mut [0; 8]), Err(why), "{delta:?}");
        }
    }

    #[test]
    fn one_word_changed_costs_a_few_bytes() {
        let old = vec![1; 4096];
        let mut new = old.clone();
        new[2000..2008].copy_from_slice(&[9; 8]);
        let mut delta = Vec::new();
        assert!(encode(&old, &new, 4096, &mut delta));
        assert_eq!(delta.len(), 11);
    }
}
