//! What an image, or a chain of them, says about a position.

use std::fmt;

use crate::{ImageRange, format::KINDS};

/// What is known about the memory at some position.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Content {
    /// Nothing. In one image of a chain: its parent is to be asked. In a chain: no image has it,
    /// or the latest that knows says that it is gone.
    Absent,
    /// Its bytes are stored.
    Data,
    /// It is all zero.
    Zero,
    /// It could not be read when the image was made: there was a memory error.
    Poisoned,
    /// It is no longer memory, whatever the ancestors say. Only in one image; a chain says
    /// [`Absent`](Self::Absent).
    Gone,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Absent => "absent",
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Poisoned => "poisoned",
            Self::Gone => "gone",
        })
    }
}

/// A range that is alike all over.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Extent {
    /// Where.
    pub range: ImageRange,
    /// What is there.
    pub content: Content,
}

/// How many bytes of each kind there are.
#[derive(Copy, Clone, PartialEq, Eq, Default, Debug)]
pub struct Amounts {
    /// Bytes whose contents are stored; those that share a stored block count every time.
    pub data: u64,
    /// Bytes that are zero.
    pub zero: u64,
    /// Bytes that could not be read when the image was made.
    pub poisoned: u64,
    /// Bytes that are no longer memory.
    pub gone: u64,
    /// Bytes that are stored, each block once.
    pub stored: u64,
    /// Of the data, the bytes that ancestors have stored.
    pub elsewhere: u64,
}

impl Amounts {
    /// Of so many units of each kind of run, by its number, and so many stored blocks, each of
    /// `size` bytes. The numbers may be a liar's.
    pub(crate) fn new(units: [u64; KINDS.len()], stored: u64, size: u64) -> Self {
        let [data, zero, poisoned, gone, elsewhere] = units.map(|units| units.saturating_mul(size));
        let data = data.saturating_add(elsewhere);
        let stored = stored.saturating_mul(size);
        Self { data, zero, poisoned, gone, stored, elsewhere }
    }
}
