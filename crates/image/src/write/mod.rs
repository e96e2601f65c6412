//! Writing an image, in one go from its first byte to its last.

mod file;
mod known;
mod options;
mod runs;
mod seen;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

pub use file::ImageWriter;
pub(crate) use file::directory_of;
pub use known::Known;
pub use options::{WriterOptions, Written};
use pageferry_memory::{ImageOffset, PageSize};
use runs::{Kind, Runs};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::{
    Amounts, Chain, Digest, ImageError, ImageId, ImageMapping, ImageRange, ParentLink, Step,
    format::{
        self, BlockRecord, DATA, ELSEWHERE, END_MAGIC, FOOTER_LEN, Footer, GONE, Identity, KINDS,
        LEAF, PLAIN, POISONED, RunLeaf, RunRecord, VERSION, ZERO,
        catalog::{Catalog, MAX_KEY, MAX_KEYS, MAX_VALUE},
        is_file_name,
    },
};

/// Makes an image of what it is told, and writes it to any sink, in order: a file (for which there
/// is [`ImageWriter`]), or a connection.
///
/// Memory comes in any order, fastest in ascending order. What is said later of the same position
/// counts. Blocks that are zero are not stored; blocks with equal bytes are stored once, as far as
/// [`remembered`](WriterOptions::remembered) goes, and not at all if ancestors have them, as far as
/// that is [`known`](WriterOptions::known). It takes 48 bytes of memory for each stored
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
    known: Known,
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
        let known = options.known.filter(|known| {
            let fits = |link: &ParentLink| known.fits(options.block, link.id, link.seal);
            // A longer chain cannot be opened.
            ancestors < Chain::MOST_IMAGES as u32 && options.parent.as_ref().is_some_and(fits)
        });
        let refers = known.is_some();
        let mut known = known.unwrap_or_else(|| Known::new(options.block, options.remembered));
        known.begin(ancestors);
        let identity = Identity {
            version: VERSION,
            id,
            parent: options.parent,
            created,
            block: options.block,
            ancestors,
            refers,
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
            known,
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
                match self.known.get(&digest) {
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
    pub fn finish(self) -> Result<(W, Written), ImageError> {
        self.finish_for_child().map(|(out, written, _)| (out, written))
    }

    /// As [`finish`](Self::finish), and says what the writer of a child has to
    /// [know](WriterOptions::known) in order to store none of it again.
    ///
    /// # Errors
    /// Those of [`finish`](Self::finish).
    pub fn finish_for_child(mut self) -> Result<(W, Written, Known), ImageError> {
        self.usable()?;
        let written = self.put_index()?;
        self.known.complete(written.id, written.seal);
        Ok((self.out, written, self.known))
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
        let stored = blocks.len() as u64;
        drop(blocks);

        footer.runs_at = self.offset.into();
        let mut units = [0_u64; KINDS.len()];
        let mut count = 0_u64;
        let runs = std::mem::take(&mut self.runs);
        let mut leaf = Vec::with_capacity(LEAF as usize);
        for (first, length, kind) in runs.iter() {
            let mut done = 0;
            while done < length {
                let record = self.record_of(first + done, length - done, kind.skip(done));
                done += u64::from(record.count.get());
                units[usize::from(record.kind)] += u64::from(record.count.get());
                count += 1;
                leaf.push(record);
                if leaf.len() == LEAF as usize {
                    self.put_run_leaf(&mut leaf, &mut root)?;
                }
            }
        }
        if !leaf.is_empty() {
            self.put_run_leaf(&mut leaf, &mut root)?;
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
        [footer.data, footer.zero, footer.poisoned, footer.gone, footer.elsewhere] =
            units.map(Into::into);
        footer.seal = footer.compute_seal();
        self.put(Step::Index, footer.as_bytes())?;

        Ok(Written {
            id: self.identity.id,
            seal: footer.seal,
            length: self.offset,
            amounts: Amounts::new(units, stored, self.identity.block.bytes()),
        })
    }

    /// As much of a run as one record can say: at least one block.
    fn record_of(&self, first: u64, count: u64, kind: Kind) -> RunRecord {
        let mut record = RunRecord::new_zeroed();
        record.first = first.into();
        let mut most = u64::from(u32::MAX);
        record.kind = match kind {
            Kind::Zero => ZERO,
            Kind::Poisoned => POISONED,
            Kind::Gone => GONE,
            Kind::Data(number) => {
                let place = self.known.place(number);
                most = most.min(place.more);
                record.block = place.block.into();
                let up = self.identity.ancestors - place.ancestors;
                // No more than there may be images in a chain.
                record.ancestor = (up as u16).into();
                if up == 0 { DATA } else { ELSEWHERE }
            }
        };
        record.count = (count.min(most) as u32).into();
        record
    }

    fn put_run_leaf(
        &mut self,
        leaf: &mut Vec<RunRecord>,
        root: &mut Vec<u8>,
    ) -> Result<(), ImageError> {
        let digest = self.put_leaf(leaf)?;
        root.extend_from_slice(RunLeaf { first: leaf[0].first, digest }.as_bytes());
        leaf.clear();
        Ok(())
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
        self.known.add(digest)
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

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}
