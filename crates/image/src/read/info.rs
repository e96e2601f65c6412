//! What is known of an image that has been opened.

use std::time::SystemTime;

use pageferry_memory::PageSize;

use crate::{Amounts, Digest, ImageId, ParentLink};

/// What is known of an image without reading its contents.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct ImageInfo {
    /// Version of the format.
    pub version: u32,
    /// Its identity.
    pub id: ImageId,
    /// The digest of all it consists of, its ancestors included.
    pub seal: Digest,
    /// The image it is based on.
    pub parent: Option<ParentLink>,
    /// How many images it is based on, one upon the other.
    pub ancestors: u32,
    /// When it was begun, in whole nanoseconds.
    pub created: SystemTime,
    /// Size of its blocks, the unit in which it holds memory.
    pub block_size: PageSize,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// How much of what it has.
    pub amounts: Amounts,
    /// Runs in its index.
    pub runs: u64,
}
