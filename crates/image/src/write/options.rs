//! How an image is to be written, and what has been.

use std::time::SystemTime;

use pageferry_memory::PageSize;

use super::Known;
use crate::{Amounts, Digest, Image, ImageId, ParentLink};

/// How an image is to be written.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    pub(super) block: PageSize,
    pub(super) parent: Option<ParentLink>,
    pub(super) identity: Option<(ImageId, SystemTime)>,
    pub(super) remembered: usize,
    pub(super) known: Option<Known>,
}

impl WriterOptions {
    /// Digests of stored blocks that are remembered unless something else is said: seven eighths
    /// of 2^20, which fill two hash tables of 21 MiB. Enough for 3.5 GiB of different pages.
    pub const REMEMBERED: usize = 917_504;

    /// An image of its own, in blocks of this size: the unit in which memory is stored, compared
    /// and read. The page size, for what is to be read page by page.
    #[must_use]
    pub fn new(block: PageSize) -> Self {
        Self { block, parent: None, identity: None, remembered: Self::REMEMBERED, known: None }
    }

    /// Only what has changed since `parent`, which lies in the same directory under this file
    /// name. What this image says nothing of is as it is there. Block sizes need not agree.
    #[must_use]
    pub fn parent(mut self, parent: &Image, name: impl Into<String>) -> Self {
        self.parent = Some(ParentLink {
            id: parent.id(),
            seal: parent.seal(),
            name: name.into(),
            ancestors: parent.info().ancestors,
        });
        self
    }

    /// Its identity and the time it is begun, in place of random bytes and now: the same contents
    /// then give the same file. Two images of one identity must never meet.
    #[must_use]
    pub fn identity(mut self, id: ImageId, created: SystemTime) -> Self {
        self.identity = Some((id, created));
        self
    }

    /// How many digests of stored blocks are remembered, to store equal ones once. Each takes up
    /// to 96 bytes of memory. If there are more different blocks, those used longest ago are
    /// forgotten, and stored again when they come again.
    #[must_use]
    pub fn remembered(mut self, digests: usize) -> Self {
        self.remembered = digests;
        self
    }

    /// What the parent and its ancestors have stored, to refer to it and not to store it again. It
    /// goes on remembering as many digests as it did. Of another image than the
    /// [`parent`](Self::parent), or in blocks of another size, it is of no use, and left aside.
    #[must_use]
    pub fn known(mut self, known: Known) -> Self {
        self.known = Some(known);
        self
    }
}

/// What has been written.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Written {
    /// The image's identity.
    pub id: ImageId,
    /// The digest of all it consists of.
    pub seal: Digest,
    /// Its length in bytes.
    pub length: u64,
    /// How much of what it has.
    pub amounts: Amounts,
}
