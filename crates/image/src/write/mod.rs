//! Writing an image, in one go from its first byte to its last.

mod file;
mod runs;
mod seen;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

pub use file::ImageWriter;
pub(crate) use file::directory_of;
use pageferry_memory::{ImageOffset, PageSize};
use runs::{Kind, Runs};
use seen::Seen;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::{
    Amounts, Digest, Image, ImageError, ImageId, ImageMapping, ImageRange, ParentLink, Step,
    format::{
        self, BlockRecord, END_MAGIC, FOOTER_LEN, Footer, Identity, LEAF, PLAIN, RunLeaf,
        RunRecord, VERSION,
        catalog::{Catalog, MAX_KEY, MAX_KEYS, MAX_VALUE},
        is_file_name, kind_of,
    },
};

/// How an image is to be written.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    block: PageSize,
    parent: Option<ParentLink>,
    identity: Option<(ImageId, SystemTime)>,
    remembered: usize,
}

impl WriterOptions {
    /// Digests of stored blocks that are remembered unless something else is said: seven eighths
    /// of 2^20, which fill two hash tables of 21 MiB. Enough for 3.5 GiB of different pages.
    pub const REMEMBERED: usize = 917_504;

    /// An image of its own, in blocks of this size: the unit in which memory is stored, compared
    /// and read. The page size, for what is to be read page by page.
    #[must_use]
    pub fn new(block: PageSize) -> Self {
        Self { block, parent: None, identity: None, remembered: Self::REMEMBERED }
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

/// Makes an image of what it is told, and writes it to any sink, in order: a file (for which there
/// is [`ImageWriter`]), or a connection.
///
/// Memory comes in any order, fastest in ascending order. What is said later of the same position
/// counts. Blocks that are zero are not stored; blocks with equal bytes are stored once, as far as
/// [`remembered`](WriterOptions::remembered) goes. It takes 48 bytes of memory for each stored
/// block and about 48 for each run of blocks that are alike or stored in order.
pub struct Encoder<W> {
    out: W,
    path: PathBuf,
    identity: Identity,
    header: Digest,
    offset: u64,
    failed: bool,
    blocks: Vec<BlockRecord>,
    runs: Runs,
    seen: Seen,
    catalog: Catalog,
}

impl<W> std::fmt::Debug for Encoder<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("path", &self.path)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl<W: Write> Encoder<W> {
    /// Begins an image and writes its header. `path` names it in messages.
    ///
    /// # Errors
    /// [`ImageError::Unfit`] if blocks are larger than 2 MiB or the parent's name is not a file
    /// name; [`ImageError::Write`].
    pub fn new(
        out: W,
        path: impl Into<PathBuf>,
        options: WriterOptions,
    ) -> Result<Self, ImageError> {
        let path = path.into();
        let unfit = |why: &str| ImageError::Unfit { path: path.clone(), why: why.to_owned() };
        if options.block > format::MAX_BLOCK {
            return Err(unfit("blocks are larger than 2 MiB"));
        }
        let mut ancestors = 0;
        if let Some(parent) = &options.parent {
            if !is_file_name(&parent.name) {
                return Err(unfit("the parent's name is not a file name"));
            }
            ancestors = parent
                .ancestors
                .checked_add(1)
                .ok_or_else(|| unfit("its parent has too many ancestors"))?;
        }
        let (id, created) = match options.identity {
            Some(identity) => identity,
            None => {
                let id = ImageId::random().map_err(|error| ImageError::Write {
                    path: path.clone(),
                    step: Step::Identify,
                    offset: 0,
                    error: error.into(),
                })?;
                (id, SystemTime::now())
            }
        };
        let identity = Identity {
            version: VERSION,
            id,
            parent: options.parent,
            created,
            block: options.block,
            ancestors,
        };
        let header = identity.encode();
        let mut encoder = Self {
            out,
            path,
            identity,
            header: header.digest,
            offset: 0,
            failed: false,
            blocks: Vec::new(),
            runs: Runs::default(),
            seen: Seen::new(options.remembered),
            catalog: Catalog::default(),
        };
        encoder.put(Step::Header, header.as_bytes())?;
        Ok(encoder)
    }

    /// The image's identity.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.identity.id
    }

    /// Where it is to appear.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of its blocks: what is told consists of whole ones.
    #[must_use]
    pub fn block_size(&self) -> PageSize {
        self.identity.block
    }

    /// Bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.offset
    }

    /// These bytes lie from `at` on.
    ///
    /// # Errors
    /// [`ImageError::Unaligned`], [`ImageError::Write`], [`ImageError::Failed`].
    pub fn write(&mut self, at: ImageOffset, bytes: &[u8]) -> Result<(), ImageError> {
        let (first, _) = self.units(at, bytes.len() as u64)?;
        let size = self.identity.block.bytes() as usize;
        // New blocks that have not been written yet; they lie side by side.
        let mut fresh = 0..0;
        for (n, block) in bytes.chunks_exact(size).enumerate() {
            let kind = if is_zero(block) {
                Kind::Zero
            } else {
                let digest = Digest::of(block);
                match self.seen.get(&digest) {
                    Some(number) => Kind::Data(number),
                    None => {
                        if fresh.end != n * size {
                            self.put(Step::Data, &bytes[fresh])?;
                            fresh = n * size..n * size;
                        }
                        fresh.end += size;
                        Kind::Data(self.add_block(digest))
                    }
                }
            };
            self.runs.set(first + n as u64, 1, kind);
        }
        self.put(Step::Data, &bytes[fresh])
    }

    /// The range is zero.
    ///
    /// # Errors
    /// [`ImageError::Unaligned`], [`ImageError::Failed`].
    pub fn zero(&mut self, range: ImageRange) -> Result<(), ImageError> {
        self.set(range, Kind::Zero)
    }

    /// The range cannot be read, for good.
    ///
    /// # Errors
    /// [`ImageError::Unaligned`], [`ImageError::Failed`].
    pub fn poison(&mut self, range: ImageRange) -> Result<(), ImageError> {
        self.set(range, Kind::Poisoned)
    }

    /// The range is no longer memory: what ancestors have there does not count any more.
    ///
    /// # Errors
    /// [`ImageError::Unaligned`], [`ImageError::Failed`].
    pub fn gone(&mut self, range: ImageRange) -> Result<(), ImageError> {
        self.set(range, Kind::Gone)
    }

    /// What was mapped, in place of what was said before. In any order; empty ones are left out.
    ///
    /// # Errors
    /// [`ImageError::Overlap`]; [`ImageError::Unfit`] if a name is longer than 65535 bytes.
    pub fn set_mappings(&mut self, mut mappings: Vec<ImageMapping>) -> Result<(), ImageError> {
        mappings.retain(|mapping| !mapping.range.is_empty());
        mappings.sort_by_key(|mapping| mapping.range.start());
        for pair in mappings.windows(2) {
            let (first, second) = (pair[0].range, pair[1].range);
            if first.overlaps(second) {
                return Err(ImageError::Overlap { path: self.path.clone(), first, second });
            }
        }
        if let Some(long) = mappings.iter().find(|one| one.name.len() > usize::from(u16::MAX)) {
            return Err(self.unfit(format!("the name of the mapping {} is too long", long.range)));
        }
        self.catalog.mappings = mappings;
        Ok(())
    }

    /// Something else that is to be known of the image, in place of what was said under this key.
    ///
    /// # Errors
    /// [`ImageError::Unfit`] if there are more than 4096 keys, the key is longer than 255 bytes,
    /// or the value larger than 1 MiB.
    pub fn set_metadata(
        &mut self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
    ) -> Result<(), ImageError> {
        let (key, value) = (key.into(), value.into());
        let metadata = &mut self.catalog.metadata;
        if metadata.len() >= MAX_KEYS && !metadata.contains_key(&key) {
            return Err(self.unfit(format!("there are more than {MAX_KEYS} keys")));
        }
        if key.len() > MAX_KEY || value.len() > MAX_VALUE {
            return Err(self.unfit(format!("the metadata {key:?} is too long")));
        }
        metadata.insert(key, value);
        Ok(())
    }

    /// Writes everything but the data, and returns the sink.
    ///
    /// # Errors
    /// [`ImageError::Unfit`] if mappings and metadata take more than 64 MiB, or there are more
    /// blocks or runs than an index can have; [`ImageError::Write`], [`ImageError::Failed`].
    pub fn finish(mut self) -> Result<(W, Written), ImageError> {
        self.usable()?;
        let written = self.put_index()?;
        Ok((self.out, written))
    }

    fn put_index(&mut self) -> Result<Written, ImageError> {
        let catalog = self.catalog.encode().map_err(|why| self.unfit(why))?;
        let mut footer = Footer::new_zeroed();
        let mut root = Vec::new();

        footer.blocks_at = self.offset.into();
        footer.blocks = (self.blocks.len() as u64).into();
        let blocks = std::mem::take(&mut self.blocks);
        for leaf in blocks.chunks(LEAF as usize) {
            root.extend_from_slice(self.put_leaf(leaf)?.as_bytes());
        }
        let stored = blocks.len() as u64 * self.identity.block.bytes();
        drop(blocks);

        footer.runs_at = self.offset.into();
        let mut units = [0_u64; 4];
        let mut count = 0_u64;
        let runs = std::mem::take(&mut self.runs);
        let mut leaf = Vec::with_capacity(LEAF as usize);
        let mut records = runs.iter().flat_map(records_of).peekable();
        while let Some(record) = records.next() {
            units[usize::from(record.kind)] += u64::from(record.count.get());
            count += 1;
            leaf.push(record);
            if leaf.len() == LEAF as usize || records.peek().is_none() {
                let digest = self.put_leaf(&leaf)?;
                root.extend_from_slice(RunLeaf { first: leaf[0].first, digest }.as_bytes());
                leaf.clear();
            }
        }
        footer.runs = count.into();

        footer.catalog_at = self.offset.into();
        footer.catalog_len = (catalog.len() as u64).into();
        self.put(Step::Index, &catalog)?;
        root.extend_from_slice(Digest::of(&catalog).as_bytes());
        if root.len() as u64 > format::MAX_PIECE {
            return Err(self.unfit("it has more blocks or runs than an index can have"));
        }

        footer.root_at = self.offset.into();
        footer.root_len = (root.len() as u64).into();
        footer.root = Digest::of(&root);
        self.put(Step::Index, &root)?;

        footer.magic = END_MAGIC;
        footer.version = self.identity.version.into();
        footer.footer_len = (FOOTER_LEN as u32).into();
        footer.id = self.identity.id.bytes();
        footer.header = self.header;
        footer.file_len = (self.offset + FOOTER_LEN).into();
        [footer.data, footer.zero, footer.poisoned, footer.gone] = units.map(Into::into);
        footer.seal = footer.compute_seal();
        self.put(Step::Index, footer.as_bytes())?;

        let size = self.identity.block.bytes();
        let [data, zero, poisoned, gone] = units.map(|units| units.saturating_mul(size));
        Ok(Written {
            id: self.identity.id,
            seal: footer.seal,
            length: self.offset,
            amounts: Amounts { data, zero, poisoned, gone, stored },
        })
    }

    fn put_leaf<R: IntoBytes + Immutable>(&mut self, records: &[R]) -> Result<Digest, ImageError> {
        self.put(Step::Index, records.as_bytes())?;
        Ok(Digest::of(records.as_bytes()))
    }

    fn add_block(&mut self, digest: Digest) -> u64 {
        let number = self.blocks.len() as u64;
        let size = self.identity.block.bytes();
        let mut record = BlockRecord::new_zeroed();
        record.offset = (format::HEADER_LEN + number * size).into();
        record.stored = (size as u32).into();
        record.encoding = PLAIN;
        record.digest = digest;
        self.blocks.push(record);
        self.seen.insert(digest, number);
        number
    }

    fn set(&mut self, range: ImageRange, kind: Kind) -> Result<(), ImageError> {
        let (first, count) = self.units(range.start(), range.len())?;
        if count > 0 {
            self.runs.set(first, count, kind);
        }
        Ok(())
    }

    /// First and number of the blocks that so many bytes from `at` on are.
    fn units(&self, at: ImageOffset, length: u64) -> Result<(u64, u64), ImageError> {
        self.usable()?;
        let block = self.identity.block;
        let fits =
            at.is_aligned(block) && block.is_multiple(length) && at.checked_add(length).is_some();
        if fits {
            return Ok((at.get() >> block.shift(), length >> block.shift()));
        }
        let (path, block) = (self.path.clone(), block.bytes());
        Err(ImageError::Unaligned { path, at, length, block })
    }

    fn usable(&self) -> Result<(), ImageError> {
        if self.failed { Err(ImageError::Failed { path: self.path.clone() }) } else { Ok(()) }
    }

    fn unfit(&self, why: impl Into<String>) -> ImageError {
        ImageError::Unfit { path: self.path.clone(), why: why.into() }
    }

    fn put(&mut self, step: Step, bytes: &[u8]) -> Result<(), ImageError> {
        if let Err(error) = self.out.write_all(bytes) {
            return Err(self.broken(step, error));
        }
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn broken(&mut self, step: Step, error: io::Error) -> ImageError {
        self.failed = true;
        ImageError::Write { path: self.path.clone(), step, offset: self.offset, error }
    }
}

/// A run as records: more than one if it is longer than a record can say.
fn records_of((first, count, kind): (u64, u64, Kind)) -> impl Iterator<Item = RunRecord> {
    const MOST: u64 = u32::MAX as u64;
    let (content, block) = match kind {
        Kind::Data(block) => (crate::Content::Data, block),
        Kind::Zero => (crate::Content::Zero, 0),
        Kind::Poisoned => (crate::Content::Poisoned, 0),
        Kind::Gone => (crate::Content::Gone, 0),
    };
    let number = kind_of(content).expect("every kind of run has a number");
    (0..count.div_ceil(MOST)).map(move |part| {
        let before = part * MOST;
        let mut record = RunRecord::new_zeroed();
        record.first = (first + before).into();
        record.count = ((count - before).min(MOST) as u32).into();
        record.block = if content == crate::Content::Data { block + before } else { 0 }.into();
        record.kind = number;
        record
    })
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}
