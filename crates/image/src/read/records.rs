//! What the records of the two tables have to be.

use super::table::Record;
use crate::{
    Part,
    format::{BlockRecord, DATA, ELSEWHERE, HEADER_LEN, KINDS, PLAIN, RunRecord},
};

/// What is known of every block.
pub(crate) struct BlockBounds {
    /// Bytes of a block.
    pub(crate) size: u64,
}

impl Record for BlockRecord {
    type Bounds = BlockBounds;

    fn part(leaf: u64) -> Part {
        Part::BlockTable(leaf)
    }

    fn check(
        records: &[Self],
        number: u64,
        _key: u64,
        _next: Option<u64>,
        bounds: &BlockBounds,
    ) -> Result<(), &'static str> {
        // They fill the space between the header and the tables, so that each one's place is
        // known, and none lies beyond.
        let mut due = HEADER_LEN + number * bounds.size;
        for record in records {
            if record.encoding != PLAIN {
                return Err("a block is encoded in an unknown way");
            }
            if record.offset.get() != due || u64::from(record.stored.get()) != bounds.size {
                return Err("a block does not lie where it has to");
            }
            due += bounds.size;
        }
        Ok(())
    }
}

const UNKNOWN: &str = "a run is of an unknown kind";

/// What runs may say.
pub(crate) struct RunBounds {
    /// Blocks there are.
    pub(crate) blocks: u64,
    /// Bytes of a block.
    pub(crate) size: u64,
    /// Ancestors whose blocks may be referred to; `None` if none may.
    pub(crate) ancestors: Option<u32>,
}

impl Record for RunRecord {
    type Bounds = RunBounds;

    fn part(leaf: u64) -> Part {
        Part::RunTable(leaf)
    }

    fn check(
        records: &[Self],
        _number: u64,
        key: u64,
        next: Option<u64>,
        bounds: &RunBounds,
    ) -> Result<(), &'static str> {
        let mut free = key;
        if records.first().is_none_or(|record| record.first.get() != key) {
            return Err("it does not begin where the root says");
        }
        // The end, in bytes, has to be a position too.
        let last = u64::MAX / bounds.size;
        for record in records {
            let (first, count) = (record.first.get(), u64::from(record.count.get()));
            let end = first.checked_add(count).filter(|end| *end <= last);
            let Some(end) = end.filter(|_| count > 0 && first >= free) else {
                return Err("its runs are not in order");
            };
            free = end;
            if usize::from(record.kind) >= KINDS.len() {
                return Err(UNKNOWN);
            }
            let behind = record.block.get().checked_add(count);
            match record.kind {
                DATA if behind.is_none_or(|end| end > bounds.blocks) => {
                    return Err("a run has blocks that there are not");
                }
                ELSEWHERE => {
                    let ancestors = bounds.ancestors.ok_or(UNKNOWN)?;
                    // Which blocks the ancestor has is seen where it is at hand.
                    let ancestor = u32::from(record.ancestor.get());
                    if !(1..=ancestors).contains(&ancestor) || behind.is_none() {
                        return Err("a run has blocks of an ancestor that there is not");
                    }
                }
                _ => {}
            }
        }
        if next.is_some_and(|next| next < free) {
            return Err("it reaches into the next leaf");
        }
        Ok(())
    }
}
