//! One harness for tests and fuzzing of what reads images.

use std::ops::ControlFlow;

use pageferry_memory::ImageOffset;
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    Chain, Content, Digest, Image, ImageError, ImageRange, Missing, diff,
    format::{
        BLOCK_RECORD, END_MAGIC, FOOTER_LEN, Footer, HEADER_LEN, Header, LEAF, MAGIC, RUN_RECORD,
        RunLeaf,
    },
};

/// Reads all that an image has, if these bytes are one.
///
/// # Errors
/// Whatever is wrong with it.
///
/// # Panics
/// If the reader breaks a promise: extents are not in order, or an image that is intact cannot be
/// read.
pub fn read(bytes: Vec<u8>) -> Result<(), ImageError> {
    read_chain(vec![bytes])
}

/// As [`read`], of a chain: the newest image first.
///
/// # Errors
/// As [`read`].
///
/// # Panics
/// As [`read`].
pub fn read_chain(images: Vec<Vec<u8>>) -> Result<(), ImageError> {
    const MOST: usize = 1 << 16;
    let mut opened = Vec::new();
    for bytes in images {
        let image = Image::from_storage(Box::new(bytes), "fuzzed")?;
        let _ = image.mappings();
        let _ = image.metadata();
        image.verify(&mut |_| ControlFlow::Continue(()))?;
        opened.push(image);
    }
    let chain = Chain::new(opened)?;
    let intact = chain.verify(&mut |_| ControlFlow::Continue(()))?.is_intact();
    let mut end = 0;
    let mut buffer = vec![0; MOST];
    for extent in chain.extents(ImageRange::ALL).take(MOST) {
        let extent = match extent {
            Ok(extent) => extent,
            Err(error) => {
                assert!(!intact, "{error}");
                return Err(error);
            }
        };
        assert!(extent.range.start().get() >= end && !extent.range.is_empty());
        end = extent.range.end().get();
        let bytes = &mut buffer[..extent.range.len().min(MOST as u64) as usize];
        let answer = chain.read_at(extent.range.start(), bytes, Missing::Poison);
        let due = !matches!(extent.content, Content::Poisoned);
        assert!(!intact || answer.is_ok() == due, "{extent:?}: {answer:?}");
    }
    let same = diff(&chain, &chain, &mut |difference| panic!("{difference:?} from itself"));
    assert!(!intact || same.is_ok(), "{same:?}");
    let last = chain.extent_at(ImageOffset::new(u64::MAX - 1));
    assert!(!intact || last.is_ok(), "{last:?}");
    Ok(())
}

/// Makes all digests fit that lie where the footer says, so that what they protect is looked at,
/// whatever it says.
pub fn reseal(bytes: &mut [u8]) {
    let Some(end) = bytes.len().checked_sub(FOOTER_LEN as usize) else { return };
    let Ok(mut footer) = Footer::read_from_bytes(&bytes[end..]) else { return };
    if let Some(root) = reseal_root(bytes, &footer) {
        footer.root = root;
    }
    let Ok((header, _)) = Header::mut_from_prefix(&mut bytes[..end]) else { return };
    header.magic = MAGIC;
    header.digest = header.compute_digest();
    footer.magic = END_MAGIC;
    footer.id = header.id;
    footer.header = header.digest;
    footer.seal = footer.compute_seal();
    bytes[end..].copy_from_slice(footer.as_bytes());
}

/// Writes the root where the footer says that it is, as far as everything has a place.
fn reseal_root(bytes: &mut [u8], footer: &Footer) -> Option<Digest> {
    let part = |at: u64, length: u64| {
        let start = usize::try_from(at).ok()?;
        Some(start..start.checked_add(usize::try_from(length).ok()?)?)
    };
    let table = |at: u64, count: u64, size: u64| part(at, count.checked_mul(size)?);
    let mut root = Vec::new();
    let blocks = table(footer.blocks_at.get(), footer.blocks.get(), BLOCK_RECORD)?;
    for leaf in bytes.get(blocks)?.chunks((LEAF * BLOCK_RECORD) as usize) {
        root.extend_from_slice(Digest::of(leaf).as_bytes());
    }
    let runs = table(footer.runs_at.get(), footer.runs.get(), RUN_RECORD)?;
    for leaf in bytes.get(runs)?.chunks((LEAF * RUN_RECORD) as usize) {
        let (first, _) = FromBytes::read_from_prefix(leaf).ok()?;
        root.extend_from_slice(RunLeaf { first, digest: Digest::of(leaf) }.as_bytes());
    }
    let catalog = part(footer.catalog_at.get(), footer.catalog_len.get())?;
    root.extend_from_slice(Digest::of(bytes.get(catalog)?).as_bytes());
    let place = part(footer.root_at.get(), footer.root_len.get())?;
    // The header would not survive it.
    let place = bytes.get_mut(place).filter(|_| footer.root_at.get() >= HEADER_LEN)?;
    let length = place.len().min(root.len());
    place[..length].copy_from_slice(&root[..length]);
    Some(Digest::of(place))
}
