//! Pages that come: into memory that nobody uses yet, or into the engine that a guest waits for.

use std::sync::atomic::Ordering::Relaxed;

use pageferry_memory::{GranuleIndex, GranuleRange, RegionId};
use pageferry_paging::{PageSink, SinkError, SourceError, Span};

use super::link::Link;
use crate::{
    MigrateError,
    core::{Frame, HEADER_LEN, PackedHeader, Placement, ProtocolError, WireSpan},
    guest::{
        compress::unpack,
        status::add,
        units::{UNIT, Units},
    },
    net::{FrameReader, Place},
};

/// Memory is cleared in pieces of this many units.
const CLEARED: u64 = 64;
static ZEROS: [u8; (CLEARED * UNIT) as usize] = [0; (CLEARED * UNIT) as usize];

/// The connection's part of the protocol.
pub(super) trait Judge {
    /// Takes note of a frame that continues the pages before.
    fn next(&mut self, frame: &Frame) -> Result<Option<Placement>, MigrateError>;

    /// What came last is in place.
    fn settle(&mut self);
}

/// The pages of one connection.
pub(super) struct Intake {
    packed: Vec<u8>,
    unpacked: Vec<u8>,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self { packed: Vec::new(), unpacked: Vec::new() }
    }

    /// Takes a frame of pages, with its payload.
    pub(super) fn page(
        &mut self,
        link: &Link,
        reader: &mut FrameReader,
        judge: &mut dyn Judge,
        (frame, placement): (&Frame, Placement),
    ) -> Result<(), MigrateError> {
        add(&link.shared.counts.bytes, HEADER_LEN as u64 + reader.payload_remaining() as u64);
        match placement {
            Placement::Copy => self.copy(link, reader, frame)?,
            Placement::Install { last } => self.install(link, reader, judge, (frame, last))?,
        }
        judge.settle();
        link.arrived();
        Ok(())
    }

    /// Before the guest moves: nobody else touches the memory.
    fn copy(
        &mut self,
        link: &Link,
        reader: &mut FrameReader,
        frame: &Frame,
    ) -> Result<(), MigrateError> {
        let place = link.shared.place()?;
        let (memory, touched) = (&place.memory, &place.touched);
        let mut idle = |_| link.idle();
        match frame {
            Frame::Data(data) => {
                let units = Units::of_wire(data.span);
                touched.insert(units.region, units.run());
                reader.payload_to(memory.place(units)?, &mut idle)?;
                add(&link.shared.counts.data, units.count);
            }
            Frame::Packed(packed) => {
                let units = Units::of_wire(packed.span);
                self.receive_packed(reader, packed, link)?;
                self.unpacked.resize(units.bytes() as usize, 0);
                if packed.codec.is_delta() {
                    memory.read(units, &mut self.unpacked)?;
                }
                unpack(packed.codec, &self.packed, &mut self.unpacked)?;
                touched.insert(units.region, units.run());
                memory.write(units, &self.unpacked)?;
                add(&link.shared.counts.data, units.count);
            }
            Frame::Zero { span } => {
                // What nothing was written to is zero.
                let units = Units::of_wire(*span);
                let mut first = units.first;
                while first < units.end() {
                    let count = CLEARED.min(units.end() - first);
                    let part = Units { first, count, ..units };
                    first = part.end();
                    while let Some(run) = touched.claim(part.region, part.run()) {
                        let run = Units::new(part.region, run);
                        memory.write(run, &ZEROS[..run.bytes() as usize])?;
                        // It is not to be discarded for being zero: that costs more.
                        place.cleared.insert(run.region, run.run());
                    }
                }
                add(&link.shared.counts.zero, units.count);
            }
            _ => return Err(MigrateError::Misuse("not a page of a round")),
        }
        Ok(())
    }

    fn receive_packed(
        &mut self,
        reader: &mut FrameReader,
        packed: &PackedHeader,
        link: &Link,
    ) -> Result<(), MigrateError> {
        // The length was checked against what the two sides agreed on.
        self.packed.resize(packed.length as usize, 0);
        reader.payload_to(Place::Bytes(&mut self.packed), &mut |_| link.idle())
    }

    /// The guest may be waiting for it.
    fn install(
        &mut self,
        link: &Link,
        reader: &mut FrameReader,
        judge: &mut dyn Judge,
        (frame, last): (&Frame, bool),
    ) -> Result<(), MigrateError> {
        let counts = &link.shared.counts;
        let sink = link.sink()?;
        let claimed = |span| {
            let here = here(&*sink, span)?;
            claim_all(&*sink, here);
            Ok::<_, MigrateError>(here)
        };
        let answer = match frame {
            Frame::Data(data) => {
                let here = claimed(data.span)?;
                add(&counts.data, data.span.count.into());
                let bytes = u64::from(data.span.count) * UNIT;
                let mut parts = Parts {
                    link,
                    reader,
                    judge,
                    left: bytes,
                    last,
                    poisoned: false,
                    failure: None,
                };
                let answer = sink.fill(here, &mut |piece| parts.fill(piece));
                parts.drain();
                let Parts { failure, poisoned, .. } = parts;
                if let Some(failure) = failure {
                    return Err(failure);
                }
                if poisoned {
                    add(&counts.poisoned, data.span.count.into());
                    sink.poison(here)
                } else {
                    answer
                }
            }
            Frame::Packed(packed) => {
                let here = claimed(packed.span)?;
                add(&counts.data, packed.span.count.into());
                self.receive_packed(reader, packed, link)?;
                self.unpacked.resize((u64::from(packed.span.count) * UNIT) as usize, 0);
                unpack(packed.codec, &self.packed, &mut self.unpacked)?;
                sink.page(here, &self.unpacked)
            }
            Frame::Zero { span } => {
                add(&counts.zero, span.count.into());
                sink.zero(claimed(*span)?)
            }
            Frame::Poison { span } => {
                add(&counts.poisoned, span.count.into());
                sink.poison(claimed(*span)?)
            }
            _ => return Err(MigrateError::Misuse("not a page")),
        };
        match answer {
            Ok(()) => Ok(()),
            // The guest sees a memory error there, and the pager's status says why.
            Err(SinkError::Install { span, why }) => {
                tracing::warn!(%span, why, "a page could not be installed");
                Ok(())
            }
            Err(SinkError::Stopped) => Err(MigrateError::Stopped),
            Err(error) => Err(MigrateError::Sink(error.to_string())),
        }
    }
}

/// The granules that units are: the session has checked that they are whole ones within a region.
fn here(sink: &dyn PageSink, span: WireSpan) -> Result<Span, MigrateError> {
    let id = RegionId::new(span.region);
    let outside = || ProtocolError::UnknownRegion(span.region);
    let region = sink.layout().get(id).ok_or_else(outside)?;
    let shift = region.granule().shift();
    let (first, count) = (span.first * UNIT, u64::from(span.count) * UNIT);
    let granules = GranuleRange::new(GranuleIndex::new(first >> shift), count >> shift);
    Ok(Span { region: id, granules })
}

/// Nobody else is to ask for these granules, since they are about to come. Whoever has asked
/// already gets them, too.
fn claim_all(sink: &dyn PageSink, span: Span) {
    let Some(region) = sink.layout().get(span.region) else { return };
    let map = region.page_map();
    let mut rest = span.granules;
    while !rest.is_empty() {
        let won = map.claim_run(rest);
        let end = if won.is_empty() { rest.first().get() + 1 } else { won.end().get() };
        rest = rest.split_at(end - rest.first().get()).1;
    }
}

/// The bytes of granules: of one frame, or of a granule's parts one after the other.
struct Parts<'a> {
    link: &'a Link,
    reader: &'a mut FrameReader,
    judge: &'a mut dyn Judge,
    left: u64,
    /// The frame is the last one of these granules.
    last: bool,
    poisoned: bool,
    failure: Option<MigrateError>,
}

impl Parts<'_> {
    fn fill(&mut self, piece: &mut [u8]) -> Result<(), SourceError> {
        if self.failure.is_some() || self.poisoned {
            return Err(SourceError::Lost("no more of these granules comes".into()));
        }
        let mut done = 0;
        while done < piece.len() {
            match self.some(&mut piece[done..]) {
                Ok(n) => done += n,
                Err(error) => {
                    let same = error.to_source_error();
                    self.failure = Some(error);
                    return Err(same);
                }
            }
            if self.poisoned {
                return Err(SourceError::Lost("the granule turned out poisoned".into()));
            }
        }
        Ok(())
    }

    /// Receives some bytes; none if the source could not read on.
    fn some(&mut self, place: &mut [u8]) -> Result<usize, MigrateError> {
        let ready = self.reader.payload_remaining().min(place.len());
        if ready > 0 {
            self.reader.payload(&mut place[..ready], &mut |_| self.link.idle())?;
            self.left -= ready as u64;
            return Ok(ready);
        }
        if self.last {
            return Err(MigrateError::Sink("more bytes are wanted than the granules have".into()));
        }
        let frame = self.reader.next(&mut |_| self.link.idle())?;
        match &frame {
            Frame::Data(_) | Frame::Poison { .. } => self.judge.settle(),
            _ => {}
        }
        match self.judge.next(&frame)? {
            Some(Placement::Install { last }) => {
                add(
                    &self.link.shared.counts.bytes,
                    HEADER_LEN as u64 + self.reader.payload_remaining() as u64,
                );
                self.last = last;
                self.poisoned = matches!(frame, Frame::Poison { .. });
                Ok(0)
            }
            Some(Placement::Copy) => Err(MigrateError::Misuse("a copy within a granule")),
            None => Ok(0),
        }
    }

    /// Reads away what was not wanted, so that the next frame can be found.
    fn drain(&mut self) {
        let mut bin = vec![0; if self.left > 0 { 64 << 10 } else { 0 }];
        while self.left > 0 && !self.poisoned && self.failure.is_none() {
            let n = self.left.min(bin.len() as u64) as usize;
            // What ends this early is kept in `self`.
            let _ = self.fill(&mut bin[..n]);
        }
    }
}

impl Link {
    /// Where pages are handed in.
    fn sink(&self) -> Result<std::sync::Arc<dyn PageSink>, MigrateError> {
        self.attached.get().cloned().ok_or(MigrateError::Misuse("no pager wants pages"))
    }

    /// Notes that pages are in place, for who waits for the last one.
    pub(super) fn arrived(&self) {
        if self.waiting.load(Relaxed) > 0 {
            self.notify();
        }
    }
}
