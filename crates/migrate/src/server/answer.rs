//! From a span to the frames that answer it.

use super::{Shared, session::Session, stats::add};
use crate::{
    MigrateError, PageKind, Piece, Placement,
    core::{DataHeader, Encoder, HEADER_LEN, WireSpan},
    net::Wire,
};

/// Answers go out in frames of about this many bytes, so that something more urgent never waits
/// for long behind one, and the first page of a run arrives early.
pub(super) const PIECE: u64 = 256 << 10;
/// A large granule is sent in parts of at most this many bytes.
const PART: u64 = 1 << 20;

/// One thing to be sent, in order.
enum Part<'a> {
    Header([u8; HEADER_LEN]),
    Buffer(std::ops::Range<usize>),
    InPlace(Piece<'a>),
}

/// Collects answers for one connection and sends them together.
pub(super) struct Outbox<'a> {
    shared: &'a Shared,
    session: &'a Session,
    wire: &'a Wire,
    max_payload: u64,
    parts: Vec<Part<'a>>,
    buffer: Vec<u8>,
    kinds: Vec<PageKind>,
    bytes: u64,
}

impl<'a> Outbox<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        session: &'a Session,
        wire: &'a Wire,
        max_payload: u32,
    ) -> Self {
        Self {
            shared,
            session,
            wire,
            max_payload: u64::from(max_payload),
            parts: Vec::new(),
            buffer: Vec::new(),
            kinds: Vec::new(),
            bytes: 0,
        }
    }

    /// Adds the answer to `span`, which lies within its region. What had to be waited for, and
    /// what is much, is sent at once; the rest with [`flush`](Self::flush).
    pub(super) fn add(&mut self, span: WireSpan) -> Result<(), MigrateError> {
        let granule = self.shared.geometry.region(span.region)?.granule;
        let end = span.first + u64::from(span.count);
        if granule > self.max_payload {
            return (span.first..end).try_for_each(|n| self.add_large(span.region, n, granule));
        }
        let mut first = span.first;
        while first < end {
            let most = piece_granules(granule, self.max_payload);
            let count = (end - first).min(u64::from(most)) as u32;
            let copied = self.add_run(WireSpan { region: span.region, first, count }, granule);
            if copied || self.bytes >= PIECE {
                self.flush()?;
            }
            first += u64::from(count);
        }
        Ok(())
    }

    /// Adds frames for `span`: one for each run of granules of one kind. Returns whether the
    /// bytes had to be fetched.
    fn add_run(&mut self, span: WireSpan, granule: u64) -> bool {
        self.kinds.clear();
        let start = self.buffer.len();
        let placement = self.shared.store.load(span, &mut self.buffer, &mut self.kinds);
        assert_eq!(self.kinds.len(), span.count as usize, "a store says what every granule is");
        let counters = &self.shared.counters;
        let mut at = 0;
        for run in self.kinds.chunk_by(|a, b| a == b) {
            let count = run.len() as u32;
            let wire = WireSpan { first: span.first + at as u64, count, region: span.region };
            match run[0] {
                PageKind::Zero => {
                    self.session.count(u64::from(count), 0);
                    add(&counters.granules_zero, u64::from(count));
                    self.parts.push(Part::Header(Encoder::zero(wire)));
                }
                PageKind::Poisoned => {
                    self.session.count(0, u64::from(count));
                    add(&counters.granules_poisoned, u64::from(count));
                    self.parts.push(Part::Header(Encoder::poison(wire)));
                }
                PageKind::Data => {
                    let from = at * granule as usize;
                    let length = run.len() * granule as usize;
                    self.session.count(u64::from(count), 0);
                    add(&counters.granules_data, u64::from(count));
                    add(&counters.bytes, length as u64);
                    self.parts.push(Part::Header(Encoder::data(&DataHeader {
                        span: wire,
                        length: length as u32,
                        fragment: None,
                    })));
                    self.parts.push(match placement {
                        Placement::Buffer => Part::Buffer(start + from..start + from + length),
                        Placement::InPlace(piece) => {
                            Part::InPlace(piece.slice(from..from + length))
                        }
                    });
                    self.bytes += length as u64;
                }
            }
            self.bytes += HEADER_LEN as u64;
            at += run.len();
        }
        matches!(placement, Placement::Buffer)
    }

    /// Sends one granule that no frame can hold, in parts.
    fn add_large(&mut self, region: u16, granule: u64, size: u64) -> Result<(), MigrateError> {
        let span = WireSpan { region, first: granule, count: 1 };
        let counters = &self.shared.counters;
        match self.shared.store.probe(region, granule) {
            PageKind::Zero => {
                self.session.count(1, 0);
                add(&counters.granules_zero, 1);
                self.parts.push(Part::Header(Encoder::zero(span)));
                return self.flush();
            }
            PageKind::Poisoned => {
                self.session.count(0, 1);
                add(&counters.granules_poisoned, 1);
                self.parts.push(Part::Header(Encoder::poison(span)));
                return self.flush();
            }
            PageKind::Data => {}
        }
        self.session.count(1, 0);
        self.flush()?;
        let mut offset = 0;
        while offset < size {
            let length = PART.min(self.max_payload).min(size - offset);
            let store = &*self.shared.store;
            let placement =
                store.load_part(region, granule, offset, length as usize, &mut self.buffer);
            let Some(placement) = placement else {
                self.session.recount_poisoned();
                add(&counters.granules_poisoned, 1);
                self.parts.push(Part::Header(Encoder::poison(span)));
                return self.flush();
            };
            self.parts.push(Part::Header(Encoder::data(&DataHeader {
                span,
                length: length as u32,
                fragment: Some(offset),
            })));
            self.parts.push(match placement {
                Placement::Buffer => {
                    Part::Buffer(self.buffer.len() - length as usize..self.buffer.len())
                }
                Placement::InPlace(piece) => Part::InPlace(piece),
            });
            self.flush()?;
            add(&counters.bytes, length);
            offset += length;
        }
        add(&counters.granules_data, 1);
        Ok(())
    }

    /// Sends what was added.
    pub(super) fn flush(&mut self) -> Result<(), MigrateError> {
        if self.parts.is_empty() {
            return Ok(());
        }
        let mut pieces: Vec<Piece<'_>> = self
            .parts
            .iter()
            .map(|part| match part {
                Part::Header(header) => Piece::from(&header[..]),
                Part::Buffer(range) => Piece::from(&self.buffer[range.clone()]),
                Part::InPlace(piece) => *piece,
            })
            .collect();
        let sent = self.wire.send(&mut pieces);
        self.parts.clear();
        self.buffer.clear();
        self.bytes = 0;
        sent
    }
}

/// Granules in one piece of an answer: at least one.
pub(super) fn piece_granules(granule: u64, max_payload: u64) -> u32 {
    (PIECE.min(max_payload) / granule).max(1) as u32
}
