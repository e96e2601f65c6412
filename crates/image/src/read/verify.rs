//! Reading all of an image, to see whether it is what was written.

use std::{mem, ops::ControlFlow, ops::Range};

use pageferry_memory::ImageOffset;
use zerocopy::{FromZeros, IntoBytes};

use super::{Image, Run, block_corrupt, footer_corrupt, read_piece, run_of};
use crate::{
    Digest, ImageError, ImageRange, Part,
    error::Trouble,
    format::{ALTERED, BlockRecord, DATA, FOOTER_LEN, HEADER_LEN, Header, KINDS, LEAF},
};

/// How far a long operation has come, in bytes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Done so far.
    pub done: u64,
    /// To be done in all.
    pub total: u64,
}

/// One thing that is wrong with an image.
#[derive(Debug)]
#[non_exhaustive]
pub struct Damage {
    /// What and where: mostly [`ImageError::Corrupt`], or [`ImageError::Read`] where the storage
    /// fails.
    pub error: ImageError,
    /// The memory whose stored bytes are lost by it, ascending, and then, for each younger image
    /// of the chain that refers to them, that of that image: the first [`Verified::MOST`] ranges.
    /// Empty where the damage is not to blocks or their table.
    pub lost: Vec<ImageRange>,
    /// How many bytes of memory are lost by it, those of each image counted.
    pub lost_bytes: u64,
    blocks: Range<u64>,
}

/// What verifying found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Verified {
    /// Bytes looked at: all of the file or files, but for what cannot be read.
    pub bytes: u64,
    /// Stored blocks compared with their digests.
    pub blocks: u64,
    /// What is wrong: the first [`Verified::MOST`].
    pub damage: Vec<Damage>,
    /// How many things are wrong. None: every bit is as it was written.
    pub damaged: u64,
}

/// No blocks, behind all that are damaged: damage is kept in the order of its blocks.
const BEHIND: Range<u64> = u64::MAX..u64::MAX;

impl Verified {
    /// More than this of anything is counted and not listed.
    pub const MOST: usize = 1000;

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.damaged == 0
    }

    /// Adds what was found in another image.
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.blocks += other.blocks;
        self.damaged += other.damaged;
        let room = Self::MOST - self.damage.len();
        self.damage.extend(other.damage.into_iter().take(room));
    }

    /// Notes what of `child`, so many generations down, is lost by what was found in an image.
    pub(crate) fn lose_in(&mut self, child: &Image, generations: usize) {
        if self.damage.is_empty() {
            return;
        }
        child.each_reference(&mut |run| {
            if usize::from(run.ancestor) == generations {
                lose(&mut self.damage, run, child.identity.block.bytes());
            }
        });
    }

    /// Checks that everything `child` refers to is there; `ancestor` finds an image by how many
    /// generations up it is.
    pub(crate) fn check_references<'a>(
        &mut self,
        child: &Image,
        ancestor: impl Fn(usize) -> Option<&'a Image>,
    ) {
        child.each_reference(&mut |run| {
            let image = ancestor(run.ancestor.into());
            if !image.is_some_and(|image| image.serves(child, run)) {
                self.found(child.bad_reference(run), child.label(), BEHIND);
            }
        });
    }

    fn found(&mut self, trouble: Trouble, label: &str, blocks: Range<u64>) {
        self.damaged += 1;
        if self.damage.len() < Self::MOST {
            let error = trouble.named(label);
            self.damage.push(Damage { error, lost: Vec::new(), lost_bytes: 0, blocks });
        }
    }
}

impl Image {
    /// Reads the whole file and compares every part of it with its digest: every bit of it counts
    /// in one of them. Goes on after damage. What it has of its ancestors is for
    /// [`Chain::verify`](crate::Chain::verify). `progress` is called now and then, and can stop it.
    ///
    /// # Errors
    /// [`ImageError::Cancelled`]; [`ImageError::Incomplete`] or [`ImageError::Examine`] if the file
    /// is no longer as long as when it was opened.
    pub fn verify(
        &self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Verified, ImageError> {
        let label = || self.label.clone();
        let length =
            self.storage.length().map_err(|error| ImageError::Examine { label: label(), error })?;
        let footer = &self.footer.0;
        if length != footer.file_len.get() {
            return Err(ImageError::Incomplete { label: label(), length });
        }
        let mut verified = Verified::default();
        for check in [Self::check_header, Self::check_footer, Self::check_root] {
            match check(self) {
                Ok(bytes) => verified.bytes += bytes,
                Err(trouble) => verified.found(trouble, &self.label, 0..0),
            }
        }
        match self.read_catalog() {
            Ok(_) => verified.bytes += footer.catalog_len.get(),
            Err(trouble) => verified.found(trouble, &self.label, 0..0),
        }
        let mut watch = |done| {
            let flow = progress(Progress { done, total: length });
            if flow.is_break() { Err(ImageError::Cancelled { what: "verifying" }) } else { Ok(()) }
        };
        for leaf in 0..self.blocks.leaves() {
            self.check_blocks(leaf, &mut verified, &mut watch)?;
        }
        self.check_runs(&mut verified);
        watch(verified.bytes)?;
        Ok(verified)
    }

    fn check_header(&self) -> Result<u64, Trouble> {
        let mut header = Box::new(Header::new_zeroed());
        self.storage.read_at(0, header.as_mut_bytes()).map_err(|error| Trouble::Io {
            offset: 0,
            length: HEADER_LEN,
            error,
        })?;
        let same = header.digest == self.header_digest;
        if same && header.compute_digest() == header.digest {
            return Ok(HEADER_LEN);
        }
        Err(Trouble::Corrupt { part: Part::Header, offset: 0, length: HEADER_LEN, why: ALTERED })
    }

    fn check_footer(&self) -> Result<u64, Trouble> {
        let length = self.footer.0.file_len.get();
        let bytes = read_piece(&*self.storage, length - FOOTER_LEN, FOOTER_LEN)?;
        // What was opened has been compared with its seal.
        if bytes == self.footer.0.as_bytes() {
            Ok(FOOTER_LEN)
        } else {
            Err(footer_corrupt(length, ALTERED))
        }
    }

    fn check_root(&self) -> Result<u64, Trouble> {
        let (offset, length) = (self.footer.0.root_at.get(), self.footer.0.root_len.get());
        if Digest::of(&read_piece(&*self.storage, offset, length)?) == self.footer.0.root {
            return Ok(length);
        }
        Err(Trouble::Corrupt { part: Part::Root, offset, length, why: ALTERED })
    }

    /// Checks a leaf of the block table and its blocks.
    fn check_blocks(
        &self,
        leaf: usize,
        verified: &mut Verified,
        watch: &mut dyn FnMut(u64) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        const PIECE: usize = 1 << 20;
        let size = self.identity.block.bytes() as usize;
        let first = leaf as u64 * LEAF;
        let records = match self.blocks.read(leaf, &*self.storage) {
            Ok(records) => records,
            Err(trouble) => {
                // Which bytes its blocks had is not known any more.
                let behind = (first + LEAF).min(self.blocks.count());
                verified.found(trouble, &self.label, first..behind);
                return Ok(());
            }
        };
        verified.bytes += mem::size_of_val(&*records) as u64;
        let mut buffer = vec![0; PIECE.max(size)];
        let mut number = first;
        for piece in records.chunks(buffer.len() / size) {
            watch(verified.bytes)?;
            let bytes = &mut buffer[..piece.len() * size];
            let read = self.storage.read_at(piece[0].offset.get(), bytes).is_ok();
            for (record, block) in piece.iter().zip(bytes.chunks_exact_mut(size)) {
                match self.check_block(number, record, block, read) {
                    Ok(()) => {
                        verified.blocks += 1;
                        verified.bytes += size as u64;
                    }
                    Err(trouble) => verified.found(trouble, &self.label, number..number + 1),
                }
                number += 1;
            }
        }
        Ok(())
    }

    /// Checks a block, whose bytes have been `read`, or have to be read now: alone, because
    /// something around it could not be.
    fn check_block(
        &self,
        number: u64,
        record: &BlockRecord,
        block: &mut [u8],
        read: bool,
    ) -> Result<(), Trouble> {
        if !read {
            let (offset, length) = (record.offset.get(), block.len() as u64);
            self.storage.read_at(offset, block).map_err(|error| Trouble::Io {
                offset,
                length,
                error,
            })?;
        }
        if Digest::of(block) == record.digest { Ok(()) } else { Err(block_corrupt(number, record)) }
    }

    /// Tells each run of blocks of ancestors, as far as the run table can be read: verifying tells
    /// of what cannot.
    fn each_reference(&self, each: &mut dyn FnMut(&Run)) {
        if !self.identity.refers {
            return;
        }
        for leaf in 0..self.runs.leaves() {
            let Ok(records) = self.runs.read(leaf, &*self.storage) else { continue };
            let runs = records.iter().map(|record| run_of(record, self.identity.block.bytes()));
            runs.filter(|run| run.ancestor > 0).for_each(|run| each(&run));
        }
    }

    /// Checks the run table, and says which memory the damaged blocks were.
    fn check_runs(&self, verified: &mut Verified) {
        let footer = &self.footer.0;
        let size = self.identity.block.bytes();
        let mut units = [0_u64; KINDS.len()];
        let mut whole = true;
        for leaf in 0..self.runs.leaves() {
            let records = match self.runs.read(leaf, &*self.storage) {
                Ok(records) => records,
                Err(trouble) => {
                    verified.found(trouble, &self.label, BEHIND);
                    whole = false;
                    continue;
                }
            };
            verified.bytes += mem::size_of_val(&*records) as u64;
            for record in &*records {
                let run = run_of(record, size);
                let count = (run.end - run.start) / size;
                units[usize::from(record.kind)] += count;
                if record.kind == DATA {
                    lose(&mut verified.damage, &run, size);
                }
            }
        }
        if whole && units != footer.units(self.identity.refers) {
            let why = "its amounts are not those of the runs";
            let damage = footer_corrupt(footer.file_len.get(), why);
            verified.found(damage, &self.label, BEHIND);
        }
    }
}

/// Notes what of a run, in blocks of `size` bytes, is damaged.
fn lose(damage: &mut [Damage], run: &Run, size: u64) {
    let run_end = run.block + (run.end - run.start) / size;
    // Ascending: what has no blocks, then the damaged blocks, then leaves of the run table.
    let behind = damage.partition_point(|damage| damage.blocks.end <= run.block);
    for damage in &mut damage[behind..] {
        let first = damage.blocks.start.max(run.block);
        let end = damage.blocks.end.min(run_end);
        if first >= end {
            break;
        }
        let (at, length) = (run.start + (first - run.block) * size, (end - first) * size);
        damage.lost_bytes += length;
        if damage.lost.len() < Verified::MOST {
            damage.lost.push(ImageRange::new(ImageOffset::new(at), length));
        }
    }
}
