//! Images to test with.
#![allow(dead_code, unreachable_pub, reason = "shared by test binaries that use parts of it")]

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, SystemTime},
};

use pageferry_image::{
    Encoder, Image, ImageId, ImageMapping, ImageRange, Known, MappingFlags, Progress, Storage,
    WriterOptions,
};
use pageferry_memory::{ImageOffset, PageSize};

pub const PAGE: u64 = 4096;

pub fn at(page: u64) -> ImageOffset {
    ImageOffset::new(page * PAGE)
}

pub fn pages(first: u64, count: u64) -> ImageRange {
    ImageRange::new(at(first), count * PAGE)
}

/// A page of one byte.
pub fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE as usize]
}

pub fn options() -> WriterOptions {
    WriterOptions::new(PageSize::SIZE_4K)
}

pub fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// An identity and a time that are the same in every run.
pub fn identity(number: u8) -> (ImageId, SystemTime) {
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + u64::from(number));
    (ImageId::new([number; 16]).unwrap(), created)
}

/// The bytes of an image in memory.
pub fn encode(options: WriterOptions, tell: impl FnOnce(&mut Encoder<Vec<u8>>)) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new(), "in memory", options).unwrap();
    tell(&mut encoder);
    encoder.finish().unwrap().0
}

pub fn open(bytes: Vec<u8>) -> Image {
    Image::from_storage(Box::new(bytes), "in memory").unwrap()
}

/// A small image that has some of everything: the same in every run.
pub fn small() -> Vec<u8> {
    let (id, created) = identity(1);
    encode(options().identity(id, created), tell_small)
}

/// An image, and what the writer of its child has to know.
pub fn encode_for_child(
    options: WriterOptions,
    tell: impl FnOnce(&mut Encoder<Vec<u8>>),
) -> (Vec<u8>, Known) {
    let mut encoder = Encoder::new(Vec::new(), "in memory", options).unwrap();
    tell(&mut encoder);
    let (bytes, _, known) = encoder.finish_for_child().unwrap();
    (bytes, known)
}

/// The small image, and one that refers to its blocks: the same in every run. The second has one
/// block of its own, and all there is of the first: two of its blocks, in three runs.
pub fn small_referring() -> (Vec<u8>, Vec<u8>) {
    let (id, created) = identity(1);
    let (parent, known) = encode_for_child(options().identity(id, created), tell_small);
    let (id, created) = identity(3);
    let options = options().parent(&open(parent.clone()), "small.pfi").known(known);
    let child = encode(options.identity(id, created), |encoder| {
        encoder.write(at(0x101), &[page(8), page(9), page(7)].concat()).unwrap();
        encoder.write(at(0x300), &[page(7), page(8), page(0)].concat()).unwrap();
    });
    (parent, child)
}

/// Another one, based on it.
pub fn small_child(parent: &Image) -> Vec<u8> {
    let (id, created) = identity(2);
    encode(options().parent(parent, "small.pfi").identity(id, created), |encoder| {
        encoder.write(at(0x101), &page(9)).unwrap();
        encoder.gone(pages(0x102, 1)).unwrap();
        encoder.set_metadata("round", "1").unwrap();
    })
}

pub fn tell_small(encoder: &mut Encoder<Vec<u8>>) {
    encoder.write(at(0x100), &[page(7), page(8), page(7), page(0)].concat()).unwrap();
    encoder.zero(pages(0x200, 1 << 20)).unwrap();
    encoder.poison(pages(0x90, 1)).unwrap();
    encoder.set_metadata("comm", "small").unwrap();
    encoder
        .set_mappings(vec![ImageMapping {
            range: pages(0x100, 4),
            flags: MappingFlags::READ | MappingFlags::WRITE | MappingFlags::SHARED,
            page_size: PageSize::SIZE_4K,
            file_offset: 0x3000,
            device: (8, 1),
            inode: 4711,
            name: b"/tmp/file (deleted)".to_vec(),
        }])
        .unwrap();
}

/// Storage of which one byte reads differently.
#[derive(Debug)]
pub struct Flipped {
    pub bytes: Arc<Vec<u8>>,
    pub at: usize,
    pub mask: u8,
}

impl Storage for Flipped {
    fn length(&self) -> std::io::Result<u64> {
        self.bytes.length()
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.bytes.read_at(offset, bytes)?;
        if let Some(byte) = (self.at as u64).checked_sub(offset).map(|n| n as usize)
            && byte < bytes.len()
        {
            bytes[byte] ^= self.mask;
        }
        Ok(())
    }
}
