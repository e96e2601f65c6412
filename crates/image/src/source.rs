//! A chain of images as a page source.

use std::sync::Arc;

use pageferry_memory::{GranuleRange, PageSize, Region};
use pageferry_paging::{PageSink, PageSource, SourceError, Span, Urgency};
use rustix::io::Errno;

use crate::{
    Chain, Content, ImageError, Missing,
    chain::At,
    error::Trouble,
    serve::{answered, region_of, serve_data},
};

/// Serves the memory of a chain of images to a pager: a restore that reads each page when it is
/// touched.
///
/// A granule lies at its region's image offset plus its place in the region; for the image of a
/// process, the offset of a region is the address it had. A granule of which any part is
/// poisoned, damaged or unreadable is answered as poisoned, and so is, unless
/// [`Missing::Zero`] is chosen, one that no image has. Everything else is served.
#[derive(Debug)]
pub struct ChainSource {
    chain: Arc<Chain>,
    missing: Missing,
    /// Whether serving allocates nothing.
    lean: bool,
}

/// What the granules of a run have in common.
enum Alike {
    Zero,
    Poisoned,
    /// Their bytes have to be read.
    Mixed,
}

impl ChainSource {
    /// Serves `chain`, reading its index where it is needed.
    #[must_use]
    pub fn new(chain: Arc<Chain>, missing: Missing) -> Self {
        Self { chain, missing, lean: false }
    }

    /// Serves `chain` after reading all of its index: see [`Chain::preload`]. If its blocks are no
    /// larger than the smallest granule, 4 KiB, it can be served from a SIGBUS handler then.
    ///
    /// # Errors
    /// Those of [`Chain::preload`].
    pub fn preloaded(chain: Arc<Chain>, missing: Missing) -> Result<Self, ImageError> {
        chain.preload()?;
        // Part of a block is read by way of a buffer.
        let lean = chain.images().iter().all(|image| image.block_size() == PageSize::SIZE_4K);
        Ok(Self { chain, missing, lean })
    }

    /// The chain.
    #[must_use]
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// What the first of these granules is, and how many are alike; at least one.
    fn run(&self, region: &Region, granules: GranuleRange) -> Result<(Alike, u64), At> {
        let size = region.granule().bytes();
        let (start, length) = region.image_range(granules);
        let (start, end) = (start.get(), start.get() + length);
        let (first, count) = self.whole(start, end, size)?;
        if count > 0 {
            return Ok((first, count));
        }
        // Up to the first granule that need not be read.
        let mut at = start + size;
        while at < end {
            let (_, count) = self.whole(at, end, size)?;
            if count > 0 {
                break;
            }
            // To the granule in which the extent ends.
            let spot = self.chain.spot(at, end)?;
            at += ((spot.end - at) / size).max(1) * size;
        }
        Ok((Alike::Mixed, (at.min(end) - start) / size))
    }

    /// How many whole granules from `at` on need not be read, and what they are.
    fn whole(&self, at: u64, end: u64, size: u64) -> Result<(Alike, u64), At> {
        let zero = |content| match content {
            Content::Zero => Some(true),
            Content::Absent => Some(self.missing == Missing::Zero),
            Content::Data => None,
            _ => Some(false),
        };
        let mut spot = self.chain.spot(at, end)?;
        let first = zero(spot.content);
        // A large granule may be put together from several runs, of several images.
        while first.is_some() && spot.end < end {
            let next = self.chain.spot(spot.end, end)?;
            if zero(next.content) != first {
                break;
            }
            spot = next;
        }
        let count = (spot.end - at) / size;
        Ok(match first {
            None => (Alike::Mixed, 0),
            Some(true) => (Alike::Zero, count),
            Some(false) => (Alike::Poisoned, count),
        })
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SourceError> {
        self.chain.fill(offset, bytes, self.missing).map_err(|At { level, trouble }| {
            // No `format!`: this may run where nothing can be allocated. What is wrong is seen
            // when the chain is verified.
            let error = match trouble {
                Trouble::Io { error, .. } => error,
                Trouble::Corrupt { .. } => Errno::BADMSG.into(),
                Trouble::NoBytes { .. } => Errno::NODATA.into(),
            };
            if !self.lean {
                let image = self.chain.images()[level].label();
                tracing::warn!(image, offset, %error, "memory that cannot be read is poisoned");
            }
            SourceError::Io { what: String::new(), error }
        })
    }
}

impl PageSource for ChainSource {
    fn attach(&self, _sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        // Any layout fits: of each of its positions the chain can say what is there.
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        _urgency: Urgency,
        sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let region = region_of(sink, span)?;
        let mut rest = span.granules;
        while !rest.is_empty() {
            let (alike, count) = self.run(region, rest).unwrap_or_else(|At { level, trouble }| {
                // Nobody knows what the granule is. Never so once the index has been read.
                let error = trouble.named(self.chain.images()[level].label());
                tracing::warn!(%error, granules = %rest, "memory that cannot be found is poisoned");
                (Alike::Poisoned, 1)
            });
            let (now, after) = rest.split_at(count);
            let run = Span { granules: now, ..span };
            let answer = match alike {
                Alike::Zero => sink.zero(run),
                Alike::Poisoned => sink.poison(run),
                Alike::Mixed => {
                    serve_data(run, region, sink, &|offset, bytes| self.read(offset, bytes))
                }
            };
            answered(answer)?;
            rest = after;
        }
        Ok(())
    }

    fn signal_safe(&self) -> bool {
        self.lean
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn detach(&self) {}
}
