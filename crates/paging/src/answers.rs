//! What a source hands in: bytes, to be received where they are needed; zeros; pages unasked for.

use pageferry_memory::GranuleRange;

use crate::{
    Fill, SinkError, Span,
    core::{AddressSpaceChanging, Core},
    install::{Data, InstallMethod, Target, requested},
    staging::Movable,
    stats::Counter,
};

impl Core {
    /// Whether bytes may be received straight into the fill view: nobody can take the granule
    /// away meanwhile.
    fn fills_in_place(&self, target: &Target, granules: GranuleRange) -> bool {
        target.method == InstallMethod::Continue
            && !self.gate.events_watched()
            && requested(target.region.page_map(), granules) == Some(granules)
    }

    /// [`PageSink::fill`], with the caller's way of letting events be read.
    pub(crate) fn fill_with(
        &self,
        span: Span,
        fill: &mut Fill<'_>,
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let target = self.target(span)?;
        let granule = target.region.granule().bytes();
        let mut rest = span.granules;
        while !rest.is_empty() {
            let most = (self.staging.buffer_len() / granule).max(1).min(rest.count());
            let (piece, after) = rest.split_at(most);
            if let Err(error) = self.fill_piece(target, piece, fill, changing) {
                if let SinkError::Install { .. } = error {
                    // Nobody brings the rest of the span. It counts as answered, as for the source.
                    self.count_answered(target, after);
                    self.poison_now(target, after, changing)?;
                }
                return Err(error);
            }
            rest = after;
        }
        Ok(())
    }

    /// No more than a staging buffer holds.
    fn fill_piece(
        &self,
        target: &Target,
        piece: GranuleRange,
        fill: &mut Fill<'_>,
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let len = (piece.count() * target.region.granule().bytes()) as usize;
        if self.fills_in_place(target, piece) {
            let (backed, shortage) = target.back(piece);
            if !backed.is_empty() {
                target.with_fill_bytes(backed, |bytes| fill(bytes))?;
                self.answer(target, backed, Data::InPlace, changing)?;
            }
            let Some(why) = shortage else { return Ok(()) };
            let (_, left) = piece.split_at(backed.count());
            self.count_answered(target, left);
            Err(self.refused(target, left, why, changing))
        } else if let Some(mut pages) = self.movable_pages(target, len) {
            fill(&mut pages.bytes()[..len])?;
            self.answer(target, piece, Data::Movable(&pages), changing)
        } else {
            let mut staged = self.staging.take();
            let bytes = &mut staged.bytes()[..len];
            fill(bytes)?;
            self.answer(target, piece, Data::Bytes(bytes), changing)
        }
    }

    fn movable_pages(
        &self,
        target: &Target,
        len: usize,
    ) -> Option<crate::staging::MovablePages<'_>> {
        if target.method != InstallMethod::Move || len as u64 > Movable::BUFFER {
            return None;
        }
        let pages = self.movable.as_ref().and_then(Movable::try_take);
        if pages.is_none() {
            self.stats.add(Counter::move_fallbacks, 1);
        }
        pages
    }

    pub(crate) fn page_with(
        &self,
        span: Span,
        bytes: &[u8],
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let target = self.target(span)?;
        let expected = span.granules.count() * target.region.granule().bytes();
        if bytes.len() as u64 != expected {
            return Err(SinkError::WrongLength { span, expected, got: bytes.len() as u64 });
        }
        self.answer(target, span.granules, Data::Bytes(bytes), changing)
    }

    pub(crate) fn zero_with(
        &self,
        span: Span,
        changing: &dyn AddressSpaceChanging,
    ) -> Result<(), SinkError> {
        let target = self.target(span)?;
        self.stats.add(Counter::zero, span.granules.count());
        if target.zeropage && target.method != InstallMethod::Continue {
            return self.answer(target, span.granules, Data::Zero, changing);
        }
        // CONTINUE needs a page in the page cache, and hugetlb has no zero page: bytes it is.
        self.fill_with(
            span,
            &mut |bytes| {
                bytes.fill(0);
                Ok(())
            },
            changing,
        )
    }

    pub(crate) fn push_with(
        &self,
        span: Span,
        bytes: &[u8],
        changing: &dyn AddressSpaceChanging,
    ) -> Result<u64, SinkError> {
        let target = self.target(span)?;
        let granule = target.region.granule().bytes();
        let expected = span.granules.count() * granule;
        if bytes.len() as u64 != expected {
            return Err(SinkError::WrongLength { span, expected, got: bytes.len() as u64 });
        }
        let map = target.region.page_map();
        let mut taken = 0;
        let mut rest = span.granules;
        while !rest.is_empty() {
            let won = map.claim_run(rest);
            if won.is_empty() {
                self.stats.add(Counter::duplicate, 1);
                rest = rest.split_at(1).1;
                continue;
            }
            let from = ((won.first().get() - span.granules.first().get()) * granule) as usize;
            let len = (won.count() * granule) as usize;
            self.answer(target, won, Data::Bytes(&bytes[from..from + len]), changing)?;
            taken += won.count();
            rest = rest.split_at(won.end().get() - rest.first().get()).1;
        }
        self.stats.add(Counter::pushed, taken);
        Ok(taken)
    }
}
