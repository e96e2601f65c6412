//! Walking over a map: runs of granules in one state, and counting.

use std::ops::ControlFlow;

use super::{PageMap, State, digits};
use crate::sync::Ordering;
use crate::{GranuleIndex, GranuleRange};

impl PageMap {
    /// Calls `visit` with every run of granules of the range that are in `state`, in ascending
    /// order, until it says stop. Runs are as long as possible.
    ///
    /// Other threads may change granules meanwhile: 27 granules at a time are seen as of one
    /// moment, and nothing more is certain.
    pub fn for_each_run(
        &self,
        range: GranuleRange,
        state: State,
        mut visit: impl FnMut(GranuleRange) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut run = GranuleRange::new(range.first(), 0);
        self.for_each_piece(range, |seen, piece| {
            if seen == state {
                let first = if run.is_empty() { piece.first() } else { run.first() };
                run = GranuleRange::new(first, run.count() + piece.count());
                return ControlFlow::Continue(());
            }
            let finished = std::mem::take(&mut run);
            if finished.is_empty() { ControlFlow::Continue(()) } else { visit(finished) }
        })?;
        if run.is_empty() { ControlFlow::Continue(()) } else { visit(run) }
    }

    /// The first run of granules in `state` from `from` on, cut off after `max` granules; `None`
    /// when there is none (or `max` is 0, or `from` lies beyond the end of the map).
    pub fn next_run(&self, state: State, from: GranuleIndex, max: u64) -> Option<GranuleRange> {
        let end = GranuleIndex::new(self.len);
        let range = GranuleRange::from_bounds(from, end)?;
        let mut run = GranuleRange::default();
        let _ = self.for_each_piece(range, |seen, piece| {
            if seen == state {
                let first = if run.is_empty() { piece.first() } else { run.first() };
                run = GranuleRange::new(first, run.count() + piece.count());
            }
            let is_over = run.count() >= max || (seen != state && !run.is_empty());
            if is_over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let (run, _) = run.split_at(max);
        (!run.is_empty()).then_some(run)
    }

    /// How many granules are in `state`. Looks at all of them.
    pub fn count(&self, state: State) -> u64 {
        let mut count = 0;
        let all = GranuleRange::new(GranuleIndex::new(0), self.len);
        let _: ControlFlow<()> = self.for_each_piece(all, |seen, piece| {
            if seen == state {
                count += piece.count();
            }
            ControlFlow::Continue(())
        });
        count
    }

    /// Calls `visit` with state and place of pieces that are all in one state, none of them
    /// longer than a word, in ascending order, until it says stop.
    #[inline]
    fn for_each_piece<B>(
        &self,
        range: GranuleRange,
        mut visit: impl FnMut(State, GranuleRange) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        self.for_each_word(range, |index, slice| {
            let base = index as u64 * u64::from(digits::PER_WORD);
            let word = self.words[index].load(Ordering::Acquire);
            digits::for_each_run(word, slice, |state, run| {
                let first = GranuleIndex::new(base + u64::from(run.low));
                visit(state, GranuleRange::new(first, run.count.into()))
            })
        })
    }
}
