//! Tables of records in leaves, each of which is read and checked when it is first needed.

use std::sync::OnceLock;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    Digest, Part, Storage,
    error::Trouble,
    format::{ALTERED, LEAF},
};

/// What a table consists of.
pub(crate) trait Record:
    Copy + FromBytes + IntoBytes + Immutable + KnownLayout + Send + Sync
{
    /// What is needed to check records.
    type Bounds;

    /// What the leaf with this number is called.
    fn part(leaf: u64) -> Part;

    /// Checks the records of a leaf, of which the first has this number and, in the root, this
    /// key; `next` is the key of the leaf behind it.
    fn check(
        records: &[Self],
        number: u64,
        key: u64,
        next: Option<u64>,
        bounds: &Self::Bounds,
    ) -> Result<(), &'static str>;
}

struct Leaf<R> {
    /// Its first record's key; 0 where records are found by number.
    key: u64,
    digest: Digest,
    /// A leaf that has been checked stays: a table is a small part of its image.
    records: OnceLock<Box<[R]>>,
}

pub(crate) struct Table<R: Record> {
    at: u64,
    count: u64,
    leaves: Box<[Leaf<R>]>,
    bounds: R::Bounds,
}

impl<R: Record> Table<R> {
    /// The table of `count` records from `at` on. `leaves` are key and digest of each leaf.
    pub(crate) fn new(
        at: u64,
        count: u64,
        leaves: impl Iterator<Item = (u64, Digest)>,
        bounds: R::Bounds,
    ) -> Self {
        let leaves =
            leaves.map(|(key, digest)| Leaf { key, digest, records: OnceLock::new() }).collect();
        Self { at, count, leaves, bounds }
    }

    pub(crate) fn leaves(&self) -> usize {
        self.leaves.len()
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The key of this leaf; `None` behind the last one.
    pub(crate) fn key(&self, leaf: usize) -> Option<u64> {
        self.leaves.get(leaf).map(|leaf| leaf.key)
    }

    /// How many leaves have a key that is not above this.
    pub(crate) fn up_to(&self, key: u64) -> usize {
        self.leaves.partition_point(|leaf| leaf.key <= key)
    }

    /// Records of a leaf, read now unless they were before. Allocates nothing then.
    pub(crate) fn leaf(&self, index: usize, storage: &dyn Storage) -> Result<&[R], Trouble> {
        let records = &self.leaves[index].records;
        match records.get() {
            Some(records) => Ok(records),
            None => {
                // Not within `get_or_init`: two threads may read the same leaf, and none waits
                // for the I/O of another.
                let read = self.read(index, storage)?;
                Ok(records.get_or_init(|| read))
            }
        }
    }

    /// Offset and length of a leaf in the file.
    pub(crate) fn place(&self, index: usize) -> (u64, u64) {
        let first = index as u64 * LEAF;
        let size = size_of::<R>() as u64;
        // The footer's checks have shown that all of the table has a place in the file.
        (self.at + first * size, (self.count - first).min(LEAF) * size)
    }

    /// Reads and checks a leaf.
    pub(crate) fn read(&self, index: usize, storage: &dyn Storage) -> Result<Box<[R]>, Trouble> {
        let (offset, length) = self.place(index);
        let leaf = &self.leaves[index];
        let first = index as u64 * LEAF;
        let mut records =
            vec![R::new_zeroed(); length as usize / size_of::<R>()].into_boxed_slice();
        storage.read_at(offset, records.as_mut_bytes()).map_err(|error| Trouble::Io {
            offset,
            length,
            error,
        })?;
        let corrupt = |why| Trouble::Corrupt { part: R::part(index as u64), offset, length, why };
        if Digest::of(records.as_bytes()) != leaf.digest {
            return Err(corrupt(ALTERED));
        }
        R::check(&records, first, leaf.key, self.key(index + 1), &self.bounds).map_err(corrupt)?;
        Ok(records)
    }
}
