//! A chain as one image.

use std::{io::Write, ops::ControlFlow};

use super::{Chain, Missing};
use crate::{Content, Encoder, Extent, ImageError, ImageRange, Progress};

/// Tells `encoder` everything that `chain` has: memory, mappings, metadata. What is absent is left
/// out. The image is still to be finished; that it has no parent is up to the caller.
///
/// `progress` is called now and then with the bytes of memory that have been dealt with, and can
/// stop it.
///
/// # Errors
/// Those of [`Chain::read_at`] and [`Encoder::write`]; [`ImageError::Unaligned`] if the encoder's
/// blocks are larger than some of the chain's and do not fit; [`ImageError::Cancelled`].
pub fn flatten<W: Write>(
    chain: &Chain,
    encoder: &mut Encoder<W>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<(), ImageError> {
    let mut total = 0_u64;
    for extent in chain.extents(ImageRange::ALL) {
        total = total.saturating_add(extent?.range.len());
    }
    let mut done = 0_u64;
    let mut buffer = vec![0; 1 << 20];
    for extent in chain.extents(ImageRange::ALL) {
        let Extent { range, content } = extent?;
        // So that every piece has whole blocks, if the extent has.
        let piece = (buffer.len() as u64).max(encoder.block_size().bytes());
        buffer.resize(piece as usize, 0);
        let mut rest = range;
        while !rest.is_empty() {
            if progress(Progress { done, total }).is_break() {
                return Err(ImageError::Cancelled { what: "flattening" });
            }
            let now;
            (now, rest) = if content == Content::Data {
                rest.split_at(piece)
            } else {
                rest.split_at(u64::MAX)
            };
            match content {
                Content::Data => {
                    let bytes = &mut buffer[..now.len() as usize];
                    chain.read_at(now.start(), bytes, Missing::Poison)?;
                    encoder.write(now.start(), bytes)?;
                }
                Content::Zero => encoder.zero(now)?,
                Content::Poisoned => encoder.poison(now)?,
                // A chain never says the second.
                Content::Absent | Content::Gone => {}
            }
            done = done.saturating_add(now.len());
        }
    }
    let newest = chain.newest();
    encoder.set_mappings(newest.mappings()?.to_vec())?;
    for (key, value) in newest.metadata()? {
        encoder.set_metadata(key, value)?;
    }
    if progress(Progress { done, total }).is_break() {
        return Err(ImageError::Cancelled { what: "flattening" });
    }
    Ok(())
}
