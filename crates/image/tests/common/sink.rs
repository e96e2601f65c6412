//! A sink that records what it is given.
#![allow(dead_code, unreachable_pub, reason = "shared by test binaries that use parts of it")]

use std::sync::{Arc, Mutex};

use pageferry_memory::{GranuleIndex, GranuleRange, Layout, RegionId};
use pageferry_paging::{Fill, PageSink, SinkError, SourceError, Span};
use pageferry_testing::{RegionShape, layout_of};

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// All of this byte.
    Data(u8),
    /// Of different bytes.
    Mixed,
    Zero,
    Poison,
}

/// Records one answer a granule.
pub struct Sink {
    pub layout: Layout,
    pub piece: u64,
    pub answers: Mutex<Vec<(u16, u64, Answer)>>,
    pub calls: Mutex<u32>,
    /// Is reported as not installed.
    pub refuse: Option<u64>,
    /// Stops here.
    pub stop_at: Option<u64>,
}

impl Sink {
    pub fn new(layout: Layout, piece: u64) -> Arc<Self> {
        Arc::new(Self {
            layout,
            piece,
            answers: Mutex::default(),
            calls: Mutex::default(),
            refuse: None,
            stop_at: None,
        })
    }

    fn push_all(&self, span: Span, answer: Answer) {
        *self.calls.lock().unwrap() += 1;
        let region = span.region.get();
        let all = span.granules.iter().map(|g| (region, g.get(), answer));
        self.answers.lock().unwrap().extend(all);
    }

    /// The answers of a region by granule; panics if one has another number of answers than one.
    pub fn by_granule(&self, region: u16) -> Vec<Answer> {
        let mut answers = self.answers.lock().unwrap().clone();
        answers.retain(|(r, _, _)| *r == region);
        answers.sort_by_key(|(_, g, _)| *g);
        for (n, (_, granule, _)) in answers.iter().enumerate() {
            assert_eq!(*granule, n as u64, "not one answer each: {answers:?}");
        }
        answers.into_iter().map(|(_, _, answer)| answer).collect()
    }
}

impl PageSink for Sink {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn page(&self, _span: Span, _bytes: &[u8]) -> Result<(), SinkError> {
        panic!("images are read in place")
    }

    fn fill(&self, span: Span, fill: &mut Fill<'_>) -> Result<(), SinkError> {
        *self.calls.lock().unwrap() += 1;
        let size = self.layout.get(span.region).unwrap().granule().bytes();
        let mut rest = span.granules;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(self.piece.min(rest.count()));
            if self.stop_at.is_some_and(|at| piece.contains(GranuleIndex::new(at))) {
                return Err(SinkError::Stopped);
            }
            let mut bytes = vec![0xcc; (piece.count() * size) as usize];
            fill(&mut bytes)?;
            for (granule, bytes) in piece.iter().zip(bytes.chunks(size as usize)) {
                let alike = bytes.iter().all(|byte| *byte == bytes[0]);
                let answer = if alike { Answer::Data(bytes[0]) } else { Answer::Mixed };
                let answer = (span.region.get(), granule.get(), answer);
                self.answers.lock().unwrap().push(answer);
            }
            rest = after;
        }
        if self.refuse.is_some_and(|at| span.granules.contains(GranuleIndex::new(at))) {
            return Err(SinkError::Install { span, why: "on purpose".into() });
        }
        Ok(())
    }

    fn zero(&self, span: Span) -> Result<(), SinkError> {
        self.push_all(span, Answer::Zero);
        Ok(())
    }

    fn poison(&self, span: Span) -> Result<(), SinkError> {
        self.push_all(span, Answer::Poison);
        Ok(())
    }

    fn push(&self, _span: Span, _bytes: &[u8]) -> Result<u64, SinkError> {
        panic!("nothing is pushed")
    }

    fn lost(&self, why: SourceError) {
        panic!("a file is never lost: {why}")
    }
}

/// Regions of (granules, granule bytes, image offset).
pub fn layout(regions: &[(u64, u64, u64)]) -> Layout {
    let shape =
        |&(granules, granule, image_offset)| RegionShape { granules, granule, image_offset };
    layout_of(regions.iter().map(shape))
}

pub fn span(region: u16, first: u64, count: u64) -> Span {
    Span {
        region: RegionId::new(region),
        granules: GranuleRange::new(GranuleIndex::new(first), count),
    }
}
