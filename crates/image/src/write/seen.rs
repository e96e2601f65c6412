//! Which blocks are stored already, by their digests, in bounded memory.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    mem,
};

use crate::Digest;

/// A digest is as good as random: its first bytes are its hash.
#[derive(Default)]
struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    // The length that comes before a digest's bytes.
    fn write_usize(&mut self, _: usize) {}
}

type Generation = HashMap<Digest, u64, BuildHasherDefault<FirstBytes>>;

/// The stored blocks that were used last. When it is full, the half that was used longest ago is
/// forgotten.
#[derive(Clone, Default)]
pub(crate) struct Seen {
    /// Digests in each generation at most.
    limit: usize,
    young: Generation,
    old: Generation,
}

impl Seen {
    /// Remembers `limit` digests at most, at 48 bytes and up to 96 each, as hash tables grow by
    /// doubling.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit: limit / 2, ..Self::default() }
    }

    /// The number of the stored block with this digest, if it is remembered.
    pub(crate) fn get(&mut self, digest: &Digest) -> Option<u64> {
        if let Some(number) = self.young.get(digest) {
            return Some(*number);
        }
        let number = self.old.remove(digest)?;
        self.insert(*digest, number);
        Some(number)
    }

    /// Remembers a stored block.
    pub(crate) fn insert(&mut self, digest: Digest, number: u64) {
        if self.limit == 0 {
            return;
        }
        if self.young.len() >= self.limit {
            // The cleared one keeps its memory, so that there is no more of it from here on.
            mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(digest, number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(number: u64) -> Digest {
        Digest::of(&number.to_le_bytes())
    }

    #[test]
    fn what_is_used_is_kept_and_the_rest_is_bounded() {
        let mut seen = Seen::new(8);
        for number in 0..1000 {
            seen.insert(digest(number), number);
            // Asked for all the time.
            assert_eq!(seen.get(&digest(0)), Some(0), "after {number}");
            assert!(seen.young.len() + seen.old.len() <= 8);
        }
        assert_eq!(seen.get(&digest(999)), Some(999));
        assert_eq!(seen.get(&digest(500)), None);
    }

    #[test]
    fn can_be_switched_off() {
        let mut seen = Seen::new(0);
        seen.insert(digest(1), 1);
        assert_eq!(seen.get(&digest(1)), None);
    }
}
