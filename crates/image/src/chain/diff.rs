//! What differs between two chains.

use std::ops::ControlFlow;

use pageferry_memory::ImageOffset;

use super::{At, Chain, Missing, Spot};
use crate::{Content, Digest, ImageError, ImageRange};

/// Memory that is not the same in two chains.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Difference {
    /// Where.
    pub range: ImageRange,
    /// What was there.
    pub before: Content,
    /// What is there. If both are data, the bytes differ in each block of the range,
    /// the smallest blocks of the two chains.
    pub after: Content,
}

/// Compares the memory of two chains and tells `each` what differs: in ascending order, in runs as
/// long as possible, until it says that it has enough. Stored data is compared by its digests, and
/// not read, where blocks are of the same size; shared ancestors are not compared at all.
///
/// # Errors
/// [`ImageError::Read`], [`ImageError::Corrupt`].
pub fn diff(
    before: &Chain,
    after: &Chain,
    each: &mut dyn FnMut(Difference) -> ControlFlow<()>,
) -> Result<(), ImageError> {
    let unit = before.block_size().min(after.block_size()).bytes();
    let mut walk = Walk { before, after, each, unit, last: None, zero: None };
    let end = ImageRange::ALL.end().get();
    let mut at = 0;
    while at < end {
        let one = before.spot(at, end).map_err(|trouble| before.named(trouble))?;
        let other = after.spot(at, end).map_err(|trouble| after.named(trouble))?;
        let next = one.end.min(other.end);
        if walk.compare(at, next, &one, &other)?.is_break() {
            return Ok(());
        }
        at = next;
    }
    let _ = walk.tell();
    Ok(())
}

struct Walk<'a> {
    before: &'a Chain,
    after: &'a Chain,
    each: &'a mut dyn FnMut(Difference) -> ControlFlow<()>,
    /// What is compared as one: the size of the smallest blocks.
    unit: u64,
    /// Found, but not told yet: it may go on.
    last: Option<Difference>,
    /// The digest of a block of zeros of this many bytes.
    zero: Option<(u64, Digest)>,
}

impl Walk<'_> {
    /// Compares `at..end`, where each side is alike all over.
    fn compare(
        &mut self,
        at: u64,
        end: u64,
        one: &Spot,
        other: &Spot,
    ) -> Result<ControlFlow<()>, ImageError> {
        let contents = (one.content, other.content);
        let by_bytes = matches!(
            contents,
            (Content::Data, Content::Data | Content::Zero) | (Content::Zero, Content::Data)
        );
        if !by_bytes {
            return Ok(if one.content == other.content {
                ControlFlow::Continue(())
            } else {
                self.found(at, end, contents)
            });
        }
        if self.is_shared(at, one, other) {
            return Ok(ControlFlow::Continue(()));
        }
        let size = |chain: &Chain, spot: &Spot| {
            spot.stored.map(|(level, _)| chain.images[level].block_size().bytes())
        };
        let (of_one, of_other) = (size(self.before, one), size(self.after, other));
        let block = of_one.max(of_other).unwrap_or(self.unit);
        let alike = of_one.unwrap_or(block) == of_other.unwrap_or(block);
        let mut at = at;
        while at < end {
            let next = (at - at % block).saturating_add(block).min(end);
            let whole = alike && next - at == block;
            let same = whole
                && self.digest(self.before, one, at, block)?
                    == self.digest(self.after, other, at, block)?;
            let flow = if same {
                ControlFlow::Continue(())
            } else if whole && block == self.unit {
                self.found(at, next, contents)
            } else {
                self.compare_bytes(at, next, contents)?
            };
            if flow.is_break() {
                return Ok(flow);
            }
            at = next;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Whether both sides have it from the same place of the same image.
    fn is_shared(&self, at: u64, one: &Spot, other: &Spot) -> bool {
        let place = |chain: &Chain, spot: &Spot| {
            let (level, run) = spot.stored?;
            let image = &chain.images[level];
            let block = run.block + (at - run.start) / image.block_size().bytes();
            Some((image.seal(), block, at % image.block_size().bytes()))
        };
        place(self.before, one).is_some_and(|one| Some(one) == place(self.after, other))
    }

    fn digest(
        &mut self,
        chain: &Chain,
        spot: &Spot,
        at: u64,
        size: u64,
    ) -> Result<Digest, ImageError> {
        match (spot.stored, self.zero) {
            (Some((level, run)), _) => chain.images[level]
                .digest_at(&run, at)
                .map_err(|trouble| chain.named(At { level, trouble })),
            (None, Some((known, digest))) if known == size => Ok(digest),
            (None, _) => {
                let digest = Digest::of(&vec![0; size as usize]);
                self.zero = Some((size, digest));
                Ok(digest)
            }
        }
    }

    /// Reads and compares `at..end`, which is not more than a block.
    fn compare_bytes(
        &mut self,
        at: u64,
        end: u64,
        contents: (Content, Content),
    ) -> Result<ControlFlow<()>, ImageError> {
        let read = |chain: &Chain| {
            let mut bytes = vec![0; (end - at) as usize];
            chain.read_at(ImageOffset::new(at), &mut bytes, Missing::Poison).map(|()| bytes)
        };
        let (one, other) = (read(self.before)?, read(self.after)?);
        let size = self.unit as usize;
        for (n, (one, other)) in one.chunks(size).zip(other.chunks(size)).enumerate() {
            let start = at + (n * size) as u64;
            if one != other && self.found(start, start + one.len() as u64, contents).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn found(&mut self, at: u64, end: u64, (before, after): (Content, Content)) -> ControlFlow<()> {
        let range = ImageRange::new(ImageOffset::new(at), end - at);
        let now = Difference { range, before, after };
        if let Some(last) = &mut self.last
            && last.range.end() == range.start()
            && (last.before, last.after) == (before, after)
        {
            last.range = ImageRange::new(last.range.start(), last.range.len() + range.len());
            return ControlFlow::Continue(());
        }
        let flow = self.tell();
        self.last = Some(now);
        flow
    }

    fn tell(&mut self) -> ControlFlow<()> {
        self.last.take().map_or(ControlFlow::Continue(()), |last| (self.each)(last))
    }
}
