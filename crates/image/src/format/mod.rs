//! The bytes of an image file; `docs/design.md` draws them.

pub(crate) mod catalog;

use std::time::{Duration, SystemTime};

use pageferry_memory::PageSize;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::{Content, Digest, ImageError, ImageId};

/// The version of the format that is written, and the latest that can be read.
pub const VERSION: u32 = 1;

/// A carriage return, a line feed and a byte above 127, so that a transfer as text shows.
pub(crate) const MAGIC: [u8; 8] = *b"\x89PFIMG\r\n";
pub(crate) const END_MAGIC: [u8; 8] = *b"PFIMGEND";
pub(crate) const HEADER_LEN: u64 = size_of::<Header>() as u64;
pub(crate) const FOOTER_LEN: u64 = size_of::<Footer>() as u64;
/// Records in every leaf of a table but the last.
pub(crate) const LEAF: u64 = 1024;
/// More than this is not read as one piece, whatever an image says.
pub(crate) const MAX_PIECE: u64 = 64 << 20;
/// The largest block.
pub(crate) const MAX_BLOCK: PageSize = PageSize::SIZE_2M;

/// The required feature of an image that may refer to blocks of its ancestors.
const REFERS: u64 = 1;
/// Features that a reader has to know.
const KNOWN_FEATURES: u64 = REFERS;

macro_rules! bytes {
    ($($item:item)*) => {$(
        #[derive(Copy, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        $item
    )*};
}

bytes! {
    pub(crate) struct Header {
        pub magic: [u8; 8],
        pub version: U32,
        pub header_len: U32,
        pub required: U64,
        pub optional: U64,
        pub id: [u8; 16],
        pub parent_id: [u8; 16],
        pub parent_seal: Digest,
        pub created: U64,
        pub block_shift: U32,
        pub ancestors: U32,
        pub parent_name_len: U16,
        pub reserved: [u8; 14],
        pub parent_name: [u8; 256],
        pub reserved_too: [u8; 3680],
        pub digest: Digest,
    }

    pub(crate) struct BlockRecord {
        pub offset: U64,
        pub stored: U32,
        pub encoding: u8,
        pub reserved: [u8; 3],
        pub digest: Digest,
    }

    pub(crate) struct RunRecord {
        pub first: U64,
        pub block: U64,
        pub count: U32,
        pub kind: u8,
        /// Of kind [`ELSEWHERE`]: how many generations up its blocks are; 1 is the parent.
        pub ancestor: U16,
        pub reserved: u8,
    }

    /// The root's entry for a leaf of the run table.
    pub(crate) struct RunLeaf {
        pub first: U64,
        pub digest: Digest,
    }

    pub(crate) struct Footer {
        pub magic: [u8; 8],
        pub version: U32,
        pub footer_len: U32,
        pub id: [u8; 16],
        pub header: Digest,
        pub root: Digest,
        pub file_len: U64,
        pub blocks_at: U64,
        pub blocks: U64,
        pub runs_at: U64,
        pub runs: U64,
        pub catalog_at: U64,
        pub catalog_len: U64,
        pub root_at: U64,
        pub root_len: U64,
        pub data: U64,
        pub zero: U64,
        pub poisoned: U64,
        pub gone: U64,
        pub elsewhere: U64,
        pub reserved: [u8; 16],
        pub seal: Digest,
    }
}

const _: () = assert!(
    HEADER_LEN == 4096
        && FOOTER_LEN == 256
        && size_of::<BlockRecord>() == 48
        && size_of::<RunRecord>() == 24
        && size_of::<RunLeaf>() == 40
);

/// A block whose bytes are stored as they are.
pub(crate) const PLAIN: u8 = 0;

/// What the kinds of runs are, by the number that stands for them.
pub(crate) const KINDS: [Content; 5] =
    [Content::Data, Content::Zero, Content::Poisoned, Content::Gone, Content::Data];
pub(crate) const DATA: u8 = 0;
pub(crate) const ZERO: u8 = 1;
pub(crate) const POISONED: u8 = 2;
pub(crate) const GONE: u8 = 3;
/// Data whose blocks are an ancestor's.
pub(crate) const ELSEWHERE: u8 = 4;

/// The image that another one is based on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParentLink {
    pub(crate) id: ImageId,
    pub(crate) seal: Digest,
    pub(crate) name: String,
    /// Of the parent.
    pub(crate) ancestors: u32,
}

impl ParentLink {
    /// Its identity.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Its seal: the digest of all it consists of.
    #[must_use]
    pub fn seal(&self) -> Digest {
        self.seal
    }

    /// The file name it had when the child was made. It lay in the same directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Whether a parent may be called so: a file name without a directory, which cannot lead
/// elsewhere.
pub(crate) fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 256
        && name != "."
        && name != ".."
        && !name.bytes().any(|byte| byte == b'/' || byte == 0)
}

/// What a header says.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) version: u32,
    pub(crate) id: ImageId,
    pub(crate) parent: Option<ParentLink>,
    pub(crate) created: SystemTime,
    pub(crate) block: PageSize,
    pub(crate) ancestors: u32,
    /// Whether it may refer to blocks of its ancestors.
    pub(crate) refers: bool,
}

impl Identity {
    pub(crate) fn encode(&self) -> Header {
        let mut header = Header::new_zeroed();
        header.magic = MAGIC;
        header.version = self.version.into();
        header.header_len = (HEADER_LEN as u32).into();
        header.required = if self.refers { REFERS } else { 0 }.into();
        header.id = self.id.bytes();
        if let Some(parent) = &self.parent {
            header.parent_id = parent.id.bytes();
            header.parent_seal = parent.seal;
            header.parent_name_len = (parent.name.len() as u16).into();
            header.parent_name[..parent.name.len()].copy_from_slice(parent.name.as_bytes());
        }
        let since = self.created.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        header.created = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).into();
        header.block_shift = self.block.shift().into();
        header.ancestors = self.ancestors.into();
        header.digest = header.compute_digest();
        header
    }
}

/// Why a header is not one that can be read.
pub(crate) enum Refusal {
    NotAnImage,
    Version(u32),
    Features(u64),
    Corrupt(&'static str),
}

impl Refusal {
    pub(crate) fn named(self, label: &str) -> ImageError {
        let label = label.to_owned();
        match self {
            Self::NotAnImage => ImageError::NotAnImage { label },
            Self::Version(found) => ImageError::Version { label, found, known: VERSION },
            Self::Features(bits) => ImageError::Features { label, bits },
            Self::Corrupt(why) => ImageError::Corrupt {
                label,
                part: crate::Part::Header,
                offset: 0,
                length: HEADER_LEN,
                why,
            },
        }
    }
}

/// The digest of something is not the one that was kept of it.
pub(crate) const ALTERED: &str = "its bytes are not those that were written";

impl Header {
    pub(crate) fn compute_digest(&self) -> Digest {
        Digest::of(&self.as_bytes()[..size_of::<Self>() - size_of::<Digest>()])
    }

    pub(crate) fn decode(&self) -> Result<Identity, Refusal> {
        if self.magic != MAGIC {
            return Err(Refusal::NotAnImage);
        }
        // Every version keeps the digest in this place, so that a later one can be told from a
        // damaged one.
        if self.compute_digest() != self.digest {
            return Err(Refusal::Corrupt(ALTERED));
        }
        let version = self.version.get();
        if version > VERSION {
            return Err(Refusal::Version(version));
        }
        if version == 0 || u64::from(self.header_len.get()) != HEADER_LEN {
            return Err(Refusal::Corrupt("there is no such version"));
        }
        let unknown = self.required.get() & !KNOWN_FEATURES;
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        let id = ImageId::new(self.id).ok_or(Refusal::Corrupt("it has no identity"))?;
        let block = 1_u64
            .checked_shl(self.block_shift.get())
            .and_then(PageSize::try_new)
            .filter(|block| *block <= MAX_BLOCK)
            .ok_or(Refusal::Corrupt("there are no blocks of that size"))?;
        let ancestors = self.ancestors.get();
        let parent = match ImageId::new(self.parent_id) {
            None if ancestors == 0 => None,
            None => return Err(Refusal::Corrupt("it has ancestors and no parent")),
            Some(id) => Some(ParentLink {
                id,
                seal: self.parent_seal,
                name: self
                    .parent_name
                    .get(..usize::from(self.parent_name_len.get()))
                    .and_then(|name| str::from_utf8(name).ok())
                    .filter(|name| is_file_name(name))
                    .ok_or(Refusal::Corrupt("its parent's name is not a file name"))?
                    .to_owned(),
                ancestors: ancestors
                    .checked_sub(1)
                    .ok_or(Refusal::Corrupt("it has a parent and no ancestors"))?,
            }),
        };
        let created = SystemTime::UNIX_EPOCH + Duration::from_nanos(self.created.get());
        let refers = self.required.get() & REFERS != 0;
        Ok(Identity { version, id, parent, created, block, ancestors, refers })
    }
}

impl Footer {
    /// Units of each kind of run, by its number.
    pub(crate) fn units(&self, refers: bool) -> [u64; KINDS.len()] {
        // Those who cannot refer do not look at what is reserved without the feature.
        let elsewhere = if refers { self.elsewhere.get() } else { 0 };
        let [data, zero, poisoned, gone] =
            [self.data, self.zero, self.poisoned, self.gone].map(U64::get);
        [data, zero, poisoned, gone, elsewhere]
    }

    /// Leaves out the magic, so that damage to that is told from a file that was cut short.
    pub(crate) fn compute_seal(&self) -> Digest {
        let end = size_of::<Self>() - size_of::<Digest>();
        Digest::of(&self.as_bytes()[END_MAGIC.len()..end])
    }

    /// Checks that everything lies where it has to, which leaves a file no choice: each part
    /// begins where the one before it ends.
    pub(crate) fn check_places(&self, block: PageSize) -> Result<(), &'static str> {
        const OVER: &str = "its numbers do not fit together";
        let sum = |start: u64, count: u64, size: u64| {
            count.checked_mul(size).and_then(|bytes| start.checked_add(bytes)).ok_or(OVER)
        };
        let (blocks, runs) = (self.blocks.get(), self.runs.get());
        let places = [
            (self.blocks_at.get(), sum(HEADER_LEN, blocks, block.bytes())?),
            (self.runs_at.get(), sum(self.blocks_at.get(), blocks, BLOCK_RECORD)?),
            (self.catalog_at.get(), sum(self.runs_at.get(), runs, RUN_RECORD)?),
            (self.root_at.get(), sum(self.catalog_at.get(), self.catalog_len.get(), 1)?),
            (self.root_len.get(), root_len(blocks, runs).ok_or(OVER)?),
            (self.file_len.get(), {
                let end = sum(self.root_at.get(), self.root_len.get(), 1)?;
                sum(end, FOOTER_LEN, 1)?
            }),
        ];
        if places.iter().any(|(said, due)| said != due) {
            return Err(OVER);
        }
        if self.catalog_len.get() > MAX_PIECE || self.root_len.get() > MAX_PIECE {
            return Err("its catalog or its root is larger than any may be");
        }
        Ok(())
    }
}

pub(crate) const BLOCK_RECORD: u64 = size_of::<BlockRecord>() as u64;
pub(crate) const RUN_RECORD: u64 = size_of::<RunRecord>() as u64;

/// Length of the root of an image with so many blocks and runs.
pub(crate) fn root_len(blocks: u64, runs: u64) -> Option<u64> {
    let of_blocks = blocks.div_ceil(LEAF).checked_mul(size_of::<Digest>() as u64)?;
    let of_runs = runs.div_ceil(LEAF).checked_mul(size_of::<RunLeaf>() as u64)?;
    // The last digest is the catalog's.
    of_blocks.checked_add(of_runs)?.checked_add(size_of::<Digest>() as u64)
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn fields_lie_where_the_design_document_draws_them() {
        for (at, drawn) in [
            (offset_of!(Header, version), 8),
            (offset_of!(Header, required), 16),
            (offset_of!(Header, id), 32),
            (offset_of!(Header, parent_id), 48),
            (offset_of!(Header, parent_seal), 64),
            (offset_of!(Header, created), 96),
            (offset_of!(Header, block_shift), 104),
            (offset_of!(Header, ancestors), 108),
            (offset_of!(Header, parent_name_len), 112),
            (offset_of!(Header, parent_name), 128),
            (offset_of!(Header, digest), 4064),
            (offset_of!(BlockRecord, digest), 16),
            (offset_of!(RunRecord, count), 16),
            (offset_of!(RunRecord, ancestor), 21),
            (offset_of!(Footer, id), 16),
            (offset_of!(Footer, header), 32),
            (offset_of!(Footer, root), 64),
            (offset_of!(Footer, file_len), 96),
            (offset_of!(Footer, root_at), 152),
            (offset_of!(Footer, data), 168),
            (offset_of!(Footer, elsewhere), 200),
            (offset_of!(Footer, seal), 224),
        ] {
            assert_eq!(at, drawn);
        }
    }

    #[test]
    fn names_of_parents_stay_in_the_directory() {
        for (name, fits) in [
            ("a.pfi", true),
            ("", false),
            (".", false),
            ("..", false),
            ("../a", false),
            ("a/b", false),
            ("/a", false),
            ("a\0b", false),
        ] {
            assert_eq!(is_file_name(name), fits, "{name}");
        }
        assert!(is_file_name(&"x".repeat(255)) && !is_file_name(&"x".repeat(256)));
    }
}
