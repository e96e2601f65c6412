//! One image: opening it, and finding and reading what it has.

mod info;
mod records;
mod table;
mod verify;

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::OnceLock,
};

pub use info::ImageInfo;
use pageferry_memory::PageSize;
use records::{BlockBounds, RunBounds};
use table::Table;
pub use verify::{Damage, Progress, Verified};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::{
    Amounts, Content, Digest, ImageError, ImageId, ImageMapping, ParentLink, Part, Storage,
    error::Trouble,
    format::{
        ALTERED, BlockRecord, ELSEWHERE, END_MAGIC, FOOTER_LEN, Footer, HEADER_LEN, Header,
        Identity, KINDS, LEAF, MAGIC, Refusal, RunLeaf, RunRecord, catalog::Catalog,
    },
};

/// One image: what it says of every position, and the bytes it has. What it lacks its parent may
/// have: a [`Chain`](crate::Chain) puts them together.
///
/// Opening reads the header, the footer and the root, which is a small part; everything else is
/// read when it is needed, and nothing is believed before its digest has been compared. Several
/// threads can read at once.
#[derive(Debug)]
pub struct Image {
    storage: Box<dyn Storage>,
    label: String,
    identity: Identity,
    header_digest: Digest,
    footer: Box<FooterBytes>,
    blocks: Table<BlockRecord>,
    runs: Table<RunRecord>,
    catalog_digest: Digest,
    catalog: OnceLock<Catalog>,
}

#[derive(Copy, Clone)]
struct FooterBytes(Footer);

impl std::fmt::Debug for FooterBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Footer").field("seal", &self.0.seal).finish_non_exhaustive()
    }
}

impl<R: table::Record> std::fmt::Debug for Table<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("records", &self.count()).finish_non_exhaustive()
    }
}

/// A run of blocks that are alike; for data, their stored blocks are consecutive too.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Run {
    /// In bytes.
    pub(crate) start: u64,
    /// In bytes.
    pub(crate) end: u64,
    pub(crate) content: Content,
    /// Of data: the first stored block.
    pub(crate) block: u64,
    /// Of data: how many generations up that is stored; 0 is this image.
    pub(crate) ancestor: u16,
}

/// What an image has at a position.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Found {
    Run(Run),
    /// Nothing up to here; `u64::MAX` where nothing follows.
    Hole(u64),
}

impl Image {
    /// Opens the image at `path`, read-only.
    ///
    /// # Errors
    /// [`ImageError::Open`], and those of [`from_storage`](Self::from_storage).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let file = open_file(path)?;
        Self::from_storage(Box::new(file), path.display().to_string())
    }

    /// Opens the image in `storage`; `label` names it in messages.
    ///
    /// # Errors
    /// [`ImageError::Examine`], [`ImageError::Read`] if the storage fails; else what is wrong
    /// with it: [`ImageError::NotAnImage`], [`ImageError::Version`], [`ImageError::Features`],
    /// [`ImageError::Incomplete`], [`ImageError::Corrupt`].
    pub fn from_storage(
        storage: Box<dyn Storage>,
        label: impl Into<String>,
    ) -> Result<Self, ImageError> {
        let label = label.into();
        let length = storage
            .length()
            .map_err(|error| ImageError::Examine { label: label.clone(), error })?;
        let (header, identity) = read_header(&*storage, length, &label)?;
        let footer = read_footer(&*storage, length, &label)?;
        let named = |trouble: Trouble| trouble.named(&label);
        let corrupt = |why| named(footer_corrupt(length, why));
        if footer.version != header.version || u64::from(footer.footer_len.get()) != FOOTER_LEN {
            return Err(corrupt("it is of another version than the header"));
        }
        if footer.id != header.id || footer.header != header.digest {
            return Err(corrupt("it belongs to another header"));
        }
        if footer.file_len.get() != length {
            return Err(ImageError::Incomplete { label, length });
        }
        footer.check_places(identity.block).map_err(corrupt)?;
        let (blocks, runs, catalog_digest) =
            read_root(&*storage, &footer, &identity).map_err(named)?;
        Ok(Self {
            storage,
            label,
            identity,
            header_digest: header.digest,
            footer: Box::new(FooterBytes(footer)),
            blocks,
            runs,
            catalog_digest,
            catalog: OnceLock::new(),
        })
    }

    /// What the image is called in messages.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.identity.id
    }

    /// The digest of all it consists of. It covers the parent's seal, and so all ancestors.
    #[must_use]
    pub fn seal(&self) -> Digest {
        self.footer.0.seal
    }

    /// The image it is based on.
    #[must_use]
    pub fn parent(&self) -> Option<&ParentLink> {
        self.identity.parent.as_ref()
    }

    /// Size of its blocks, the unit in which it holds memory.
    #[must_use]
    pub fn block_size(&self) -> PageSize {
        self.identity.block
    }

    /// What is known without reading any more.
    #[must_use]
    pub fn info(&self) -> ImageInfo {
        let footer = &self.footer.0;
        ImageInfo {
            version: self.identity.version,
            id: self.identity.id,
            seal: footer.seal,
            parent: self.identity.parent.clone(),
            ancestors: self.identity.ancestors,
            created: self.identity.created,
            block_size: self.identity.block,
            file_length: footer.file_len.get(),
            amounts: Amounts::new(
                footer.units(self.identity.refers),
                footer.blocks.get(),
                self.identity.block.bytes(),
            ),
            runs: footer.runs.get(),
        }
    }

    /// The mappings of the memory it was made of, ascending and apart. Read at the first call.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Corrupt`].
    pub fn mappings(&self) -> Result<&[ImageMapping], ImageError> {
        self.catalog().map(|catalog| &*catalog.mappings)
    }

    /// The metadata, ascending by key. Read at the first call.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Corrupt`].
    pub fn metadata(&self) -> Result<impl ExactSizeIterator<Item = (&str, &[u8])>, ImageError> {
        Ok(self.catalog()?.metadata.iter().map(|(key, value)| (&**key, &**value)))
    }

    /// Reads all of the index that has not been read, in ascending order. From then on, finding
    /// something reads and allocates nothing. The index takes 48 bytes of memory for each stored
    /// block and 24 for each run.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Corrupt`].
    pub fn preload(&self) -> Result<(), ImageError> {
        let all = || {
            for leaf in 0..self.blocks.leaves() {
                self.blocks.leaf(leaf, &*self.storage)?;
            }
            (0..self.runs.leaves())
                .try_for_each(|leaf| self.runs.leaf(leaf, &*self.storage).map(drop))
        };
        all().map_err(|trouble: Trouble| trouble.named(&self.label))
    }

    pub(crate) fn catalog(&self) -> Result<&Catalog, ImageError> {
        match self.catalog.get() {
            Some(catalog) => Ok(catalog),
            None => {
                let read = self.read_catalog().map_err(|trouble| trouble.named(&self.label))?;
                Ok(self.catalog.get_or_init(|| read))
            }
        }
    }

    fn read_catalog(&self) -> Result<Catalog, Trouble> {
        let (offset, length) = (self.footer.0.catalog_at.get(), self.footer.0.catalog_len.get());
        let bytes = read_piece(&*self.storage, offset, length)?;
        let corrupt = |why| Trouble::Corrupt { part: Part::Catalog, offset, length, why };
        if Digest::of(&bytes) != self.catalog_digest {
            return Err(corrupt(ALTERED));
        }
        Catalog::decode(&bytes).map_err(corrupt)
    }

    /// What is at this position. Reads and allocates nothing once the index has been read there.
    pub(crate) fn find(&self, at: u64) -> Result<Found, Trouble> {
        let size = self.identity.block.bytes();
        let unit = at / size;
        let behind = self.runs.up_to(unit);
        // Keys of leaves have not been compared with the leaf yet: any number may be one.
        let start_of = |key: u64| key.saturating_mul(size);
        let next_leaf = self.runs.key(behind).map_or(u64::MAX, start_of);
        let Some(leaf) = behind.checked_sub(1) else { return Ok(Found::Hole(next_leaf)) };
        let records = self.runs.leaf(leaf, &*self.storage)?;
        let index = records.partition_point(|run| run.first.get() <= unit);
        // The leaf's first run begins at its key, so that there is one.
        let run = run_of(&records[index.saturating_sub(1)], size);
        Ok(if at < run.end {
            Found::Run(run)
        } else {
            Found::Hole(records.get(index).map_or(next_leaf, |run| start_of(run.first.get())))
        })
    }

    /// Fills `bytes` with what lies from `at` on, all within a run of data.
    pub(crate) fn read_run(&self, run: &Run, at: u64, bytes: &mut [u8]) -> Result<(), Trouble> {
        debug_assert!(run.start <= at && at + bytes.len() as u64 <= run.end);
        let size = self.identity.block.bytes();
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let number = run.block + (at - run.start) / size;
            let within = ((at - run.start) % size) as usize;
            let whole = rest.len() - rest.len() % size as usize;
            let (piece, after);
            if within == 0 && whole > 0 {
                (piece, after) = rest.split_at_mut(whole);
                self.read_blocks(number, piece)?;
            } else {
                let count = rest.len().min(size as usize - within);
                (piece, after) = rest.split_at_mut(count);
                let mut block = vec![0; size as usize];
                self.read_blocks(number, &mut block)?;
                piece.copy_from_slice(&block[within..within + count]);
            }
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Fills `bytes` with whole blocks, which lie one behind the other, and compares their
    /// digests.
    fn read_blocks(&self, first: u64, bytes: &mut [u8]) -> Result<(), Trouble> {
        /// Enough to make a call cheap, and little enough to stay in a cache until it is hashed.
        const PIECE: usize = 256 << 10;
        let size = self.identity.block.bytes() as usize;
        let (mut number, mut rest) = (first, bytes);
        while !rest.is_empty() {
            let records = &self.blocks.leaf((number / LEAF) as usize, &*self.storage)?
                [(number % LEAF) as usize..];
            let count = records.len().min(rest.len() / size).min((PIECE / size).max(1));
            let (piece, after) = rest.split_at_mut(count * size);
            let offset = records[0].offset.get();
            self.storage.read_at(offset, piece).map_err(|error| Trouble::Io {
                offset,
                length: piece.len() as u64,
                error,
            })?;
            for (record, (block, number)) in
                records.iter().zip(piece.chunks_exact(size).zip(number..))
            {
                if Digest::of(block) != record.digest {
                    return Err(block_corrupt(number, record));
                }
            }
            number += count as u64;
            rest = after;
        }
        Ok(())
    }

    /// Whether it can have been meant by this run of `child`: it has these blocks, and they are of
    /// that size.
    pub(crate) fn serves(&self, child: &Self, run: &Run) -> bool {
        let size = self.identity.block;
        let count = (run.end - run.start) / size.bytes();
        // Their sum has been checked.
        size == child.identity.block && run.block + count <= self.blocks.count()
    }

    /// What is wrong if nobody has the blocks of this run.
    pub(crate) fn bad_reference(&self, run: &Run) -> Trouble {
        let leaf = self.runs.up_to(run.start / self.identity.block.bytes()).saturating_sub(1);
        let (offset, length) = self.runs.place(leaf);
        let why = "a run has blocks of an ancestor that there are not";
        Trouble::Corrupt { part: Part::RunTable(leaf as u64), offset, length, why }
    }

    /// The digest of the stored block that holds this position of a run.
    pub(crate) fn digest_at(&self, run: &Run, at: u64) -> Result<Digest, Trouble> {
        let number = run.block + (at - run.start) / self.identity.block.bytes();
        let records = self.blocks.leaf((number / LEAF) as usize, &*self.storage)?;
        Ok(records[(number % LEAF) as usize].digest)
    }
}

fn block_corrupt(number: u64, record: &BlockRecord) -> Trouble {
    Trouble::Corrupt {
        part: Part::Block(number),
        offset: record.offset.get(),
        length: record.stored.get().into(),
        why: ALTERED,
    }
}

fn footer_corrupt(length: u64, why: &'static str) -> Trouble {
    Trouble::Corrupt { part: Part::Footer, offset: length - FOOTER_LEN, length: FOOTER_LEN, why }
}

/// A record of a leaf that has been checked.
fn run_of(record: &RunRecord, size: u64) -> Run {
    let (first, count) = (record.first.get(), u64::from(record.count.get()));
    Run {
        start: first * size,
        end: (first + count) * size,
        content: KINDS[usize::from(record.kind)],
        block: record.block.get(),
        ancestor: if record.kind == ELSEWHERE { record.ancestor.get() } else { 0 },
    }
}

/// Reads a part that is read as a whole. Its length has been compared with the file's and with
/// the most that is allowed.
fn read_piece(storage: &dyn Storage, offset: u64, length: u64) -> Result<Vec<u8>, Trouble> {
    let mut bytes = vec![0; length as usize];
    storage.read_at(offset, &mut bytes).map_err(|error| Trouble::Io { offset, length, error })?;
    Ok(bytes)
}

/// Opens a file that should be an image.
fn open_file(path: &Path) -> Result<File, ImageError> {
    // So that a FIFO in its place does not block; reading a file never does.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| ImageError::Open { path: path.to_owned(), error })
}

/// Only what the header of the image at `path` says.
pub(crate) fn peek(path: &Path) -> Result<Identity, ImageError> {
    let file = open_file(path)?;
    let label = path.display().to_string();
    let length =
        file.length().map_err(|error| ImageError::Examine { label: label.clone(), error })?;
    Ok(read_header(&file, length, &label)?.1)
}

fn read_header(
    storage: &dyn Storage,
    length: u64,
    label: &str,
) -> Result<(Box<Header>, Identity), ImageError> {
    let named = |trouble: Trouble| trouble.named(label);
    let read = |bytes: &mut [u8]| {
        let length = bytes.len() as u64;
        storage.read_at(0, bytes).map_err(|error| named(Trouble::Io { offset: 0, length, error }))
    };
    if length < HEADER_LEN + FOOTER_LEN {
        let mut magic = [0; MAGIC.len()];
        let there = &mut magic[..length.min(MAGIC.len() as u64) as usize];
        read(there)?;
        let begins = MAGIC.starts_with(there);
        let label = label.to_owned();
        return Err(if begins {
            ImageError::Incomplete { label, length }
        } else {
            ImageError::NotAnImage { label }
        });
    }
    let mut header = Box::new(Header::new_zeroed());
    read(header.as_mut_bytes())?;
    let identity = header.decode().map_err(|refusal: Refusal| refusal.named(label))?;
    Ok((header, identity))
}

fn read_footer(storage: &dyn Storage, length: u64, label: &str) -> Result<Footer, ImageError> {
    let offset = length - FOOTER_LEN;
    let mut footer = Footer::new_zeroed();
    storage
        .read_at(offset, footer.as_mut_bytes())
        .map_err(|error| Trouble::Io { offset, length: FOOTER_LEN, error }.named(label))?;
    match (footer.magic == END_MAGIC, footer.compute_seal() == footer.seal) {
        (true, true) => Ok(footer),
        (false, false) => Err(ImageError::Incomplete { label: label.to_owned(), length }),
        _ => Err(footer_corrupt(length, ALTERED).named(label)),
    }
}

type Parts = (Table<BlockRecord>, Table<RunRecord>, Digest);

fn read_root(
    storage: &dyn Storage,
    footer: &Footer,
    identity: &Identity,
) -> Result<Parts, Trouble> {
    let (offset, length) = (footer.root_at.get(), footer.root_len.get());
    let bytes = read_piece(storage, offset, length)?;
    let corrupt = |why| Trouble::Corrupt { part: Part::Root, offset, length, why };
    if Digest::of(&bytes) != footer.root {
        return Err(corrupt(ALTERED));
    }
    let (blocks, runs) = (footer.blocks.get(), footer.runs.get());
    let short = || corrupt("it is shorter than what it has");
    let (of_blocks, rest) =
        <[Digest]>::ref_from_prefix_with_elems(&bytes, blocks.div_ceil(LEAF) as usize)
            .ok()
            .ok_or_else(short)?;
    let (of_runs, rest) =
        <[RunLeaf]>::ref_from_prefix_with_elems(rest, runs.div_ceil(LEAF) as usize)
            .ok()
            .ok_or_else(short)?;
    let catalog = Digest::read_from_bytes(rest).ok().ok_or_else(short)?;
    if !of_runs.is_sorted_by(|one, next| one.first.get() < next.first.get()) {
        return Err(corrupt("its leaves are not in order"));
    }
    let size = identity.block.bytes();
    let ancestors = identity.refers.then_some(identity.ancestors);
    Ok((
        Table::new(
            footer.blocks_at.get(),
            blocks,
            of_blocks.iter().map(|digest| (0, *digest)),
            BlockBounds { size },
        ),
        Table::new(
            footer.runs_at.get(),
            runs,
            of_runs.iter().map(|leaf| (leaf.first.get(), leaf.digest)),
            RunBounds { blocks, size, ancestors },
        ),
        catalog,
    ))
}
