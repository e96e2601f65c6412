//! What one connection sends: pages, from where they lie or as little of them as will do.

use std::{ops::Range, sync::Arc, time::Instant};

use super::{
    Shared,
    link::{Lane, Link},
};
use crate::{
    MigrateError, Piece,
    core::{Codec, DataHeader, Encoder, Frame, HEADER_LEN, PackedHeader, ProtocolError},
    guest::{
        bucket::Bucket,
        compress::{Chooser, pack},
        delta,
        known::Known,
        memory::is_zero,
        status::add,
        units::{UNIT, Units},
    },
    net::Wire,
    peer::lock,
};

/// Units sent together, unless a granule has more: so many that a send is worth its system call,
/// so few that something more urgent never waits for long behind them.
pub(super) const PIECE: u64 = 64;
/// Units of one part of a granule that no frame can hold.
const PART: u64 = 256;
/// A delta of more bytes than this is no better than the page.
const DELTA_MOST: usize = UNIT as usize / 2;

enum Part {
    Header([u8; HEADER_LEN]),
    Buffer(Range<usize>),
    InPlace(Units),
}

/// How pages are sent.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum How {
    /// From where they lie, unless compressing pays. The guest may be running.
    First,
    /// What has been sent before is looked at: it may not have changed, or little.
    Again,
    /// The guest stands still, and nothing is sent twice.
    Last,
    /// Somebody waits: as they are.
    Urgent,
}

/// What a granule is.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Looks {
    Zero,
    Poisoned,
    Data,
}

/// Which connection.
pub(super) enum Out {
    Control,
    Lane(Arc<Lane>),
}

/// The sending of pages on one connection.
pub(super) struct Sender {
    link: Arc<Link>,
    shared: Arc<Shared>,
    out: Out,
    known: Known,
    chooser: Chooser,
    delta: bool,
    max_payload: u64,
    /// Units that a granule of the destination has, by region; 1 while any unit can be taken.
    grains: Vec<u64>,
    /// The destination runs the guest, or is about to: what cannot be read is said to be so.
    switched: bool,
    parts: Vec<Part>,
    buffer: Vec<u8>,
    bytes: u64,
}

impl Sender {
    /// For pages that nobody has asked for. What is sent again is compared with what is known.
    pub(super) fn for_pages(link: &Arc<Link>, out: Out, known: Option<Known>) -> Self {
        let shared = Arc::clone(&link.shared);
        Self {
            link: Arc::clone(link),
            out,
            known: known.unwrap_or_else(Known::nothing),
            chooser: Chooser::new(shared.options.compression),
            delta: shared.options.delta_cache > 0,
            max_payload: u64::from(link.max_payload),
            grains: vec![1; shared.memory.len()],
            switched: false,
            parts: Vec::new(),
            buffer: Vec::new(),
            bytes: 0,
            shared,
        }
    }

    /// For pages that somebody waits for.
    pub(super) fn for_answers(link: &Arc<Link>, out: Out) -> Self {
        Self::for_pages(link, out, None)
    }

    fn wire(&self) -> &Arc<Wire> {
        match &self.out {
            Out::Control => &self.link.control,
            Out::Lane(lane) => &lane.wire,
        }
    }

    /// Tells the session what is about to be sent.
    fn note(&self, frame: &Frame) -> Result<(), ProtocolError> {
        match &self.out {
            Out::Control => lock(&self.shared.session).send(frame),
            Out::Lane(lane) => lock(&lane.state).send(frame),
        }
    }

    /// Says that the round has been sent on this connection.
    pub(super) fn end_round(&mut self, round: u64) -> Result<(), MigrateError> {
        let units = match &self.out {
            Out::Control => lock(&self.shared.session).totals(),
            Out::Lane(lane) => lock(&lane.state).units(),
        };
        let frame = Frame::RoundEnd { round, units };
        self.note(&frame)?;
        let mut bytes = Vec::new();
        Encoder::encode(&frame, &mut bytes);
        self.wire().send_frame(&bytes)
    }

    /// From now on only whole granules can be taken, of so many units by region.
    pub(super) fn only_whole(&mut self, grains: &[u64]) {
        self.grains.copy_from_slice(grains);
        self.switched = true;
    }

    /// Sends `run`, whole granules, in pieces.
    pub(super) fn send(
        &mut self,
        run: Units,
        how: How,
        bucket: Option<&Bucket>,
    ) -> Result<(), MigrateError> {
        let grain = self.grains[run.region];
        let most = PIECE.min(self.max_payload / UNIT).max(grain) / grain * grain;
        let mut first = run.first;
        while first < run.end() {
            let piece = Units { first, count: most.min(run.end() - first), ..run };
            self.add(piece, how)?;
            if self.bytes >= PIECE * UNIT || self.parts.len() >= 512 {
                self.flush(bucket)?;
            }
            first = piece.end();
        }
        Ok(())
    }

    fn add(&mut self, piece: Units, how: How) -> Result<(), MigrateError> {
        match how {
            // What was written to is no hole.
            How::First | How::Last | How::Urgent if self.shared.memory.is_hole(piece) => {
                self.zero(piece)
            }
            How::First => match self.chooser.next() {
                None => self.add_in_place(piece),
                codec => self.add_copied(piece, codec, false),
            },
            How::Again => {
                let codec = self.chooser.next();
                self.add_copied(piece, codec, true)
            }
            How::Last => match self.chooser.next() {
                None => self.add_in_place(piece),
                Some(codec) => self.add_packed(piece, codec),
            },
            How::Urgent => self.add_in_place(piece),
        }
    }

    /// What a granule is, as of now.
    fn looks(&self, granule: Units) -> Result<Looks, MigrateError> {
        let memory = &self.shared.memory;
        let units = granule.first..granule.end();
        if units.clone().any(|unit| memory.is_poisoned(granule.region, unit)) {
            return Ok(Looks::Poisoned);
        }
        let mut scratch = [0; UNIT as usize];
        for unit in units {
            if !memory.is_zero(granule.region, unit, &mut scratch)? {
                return Ok(Looks::Data);
            }
        }
        Ok(Looks::Zero)
    }

    /// Calls `each` for every run of granules that look alike.
    fn alike(
        &mut self,
        piece: Units,
        mut each: impl FnMut(&mut Self, Units, Looks) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        let grain = self.grains[piece.region];
        let mut open: Option<(Units, Looks)> = None;
        let mut first = piece.first;
        while first < piece.end() {
            let granule = Units { first, count: grain, ..piece };
            let looks = self.looks(granule)?;
            match &mut open {
                Some((run, same)) if *same == looks => run.count += grain,
                _ => {
                    if let Some((run, looks)) = open.replace((granule, looks)) {
                        each(self, run, looks)?;
                    }
                }
            }
            first += grain;
        }
        match open {
            Some((run, looks)) => each(self, run, looks),
            None => Ok(()),
        }
    }

    fn add_in_place(&mut self, piece: Units) -> Result<(), MigrateError> {
        self.alike(piece, |sender, run, looks| match looks {
            Looks::Zero => sender.zero(run),
            Looks::Poisoned => sender.poison(run),
            Looks::Data => {
                sender.forget(run);
                if run.count * UNIT > sender.max_payload {
                    return sender.add_large(run);
                }
                sender.data_header(run, run, None)?;
                sender.parts.push(Part::InPlace(run));
                Ok(())
            }
        })
    }

    /// One granule that no frame can hold, in parts.
    fn add_large(&mut self, granule: Units) -> Result<(), MigrateError> {
        let mut first = granule.first;
        while first < granule.end() {
            let part = Units { first, count: PART.min(granule.end() - first), ..granule };
            self.data_header(granule, part, Some((first - granule.first) * UNIT))?;
            self.parts.push(Part::InPlace(part));
            first = part.end();
        }
        Ok(())
    }

    /// Of memory that stands still: compressed where it helps.
    fn add_packed(&mut self, piece: Units, codec: Codec) -> Result<(), MigrateError> {
        if piece.count * UNIT > self.max_payload {
            return self.add_in_place(piece);
        }
        self.alike(piece, |sender, run, looks| match looks {
            Looks::Zero => sender.zero(run),
            Looks::Poisoned => sender.poison(run),
            Looks::Data => {
                let mut copy = vec![0; (run.count * UNIT) as usize];
                sender.shared.memory.read(run, &mut copy)?;
                sender.data_from(run, &copy, Some(codec))
            }
        })
    }

    /// Copies first, so that what is hashed, compressed and sent is the same, whatever the guest
    /// does meanwhile.
    fn add_copied(
        &mut self,
        piece: Units,
        codec: Option<Codec>,
        keep: bool,
    ) -> Result<(), MigrateError> {
        let mut copy = vec![0; (piece.count * UNIT) as usize];
        if (piece.first..piece.end()).any(|n| self.shared.memory.is_poisoned(piece.region, n)) {
            // Rare, and slow therefore: what cannot be read is left out.
            return self.add_in_place(piece);
        }
        self.shared.memory.read(piece, &mut copy)?;
        let bytes_of = |run: Units| {
            let from = ((run.first - piece.first) * UNIT) as usize;
            from..from + (run.count * UNIT) as usize
        };
        let mut open: Option<Units> = None;
        for unit in piece.first..piece.end() {
            let one = Units { first: unit, count: 1, ..piece };
            if self.add_known(one, &copy[bytes_of(one)], keep)? {
                if let Some(run) = open.take() {
                    self.data_from(run, &copy[bytes_of(run)], codec)?;
                }
            } else {
                match &mut open {
                    Some(run) => run.count += 1,
                    None => open = Some(one),
                }
            }
        }
        match open {
            Some(run) => self.data_from(run, &copy[bytes_of(run)], codec),
            None => Ok(()),
        }
    }

    /// Deals with a unit that need not be sent as a whole page; true if that was all. Otherwise
    /// it is noted as about to be sent.
    fn add_known(&mut self, unit: Units, page: &[u8], keep: bool) -> Result<bool, MigrateError> {
        let (region, number) = (unit.region, unit.first);
        let counts = &self.shared.counts;
        if is_zero(page) {
            if self.known.has_zeros(region, number) {
                add(&counts.unchanged, 1);
            } else {
                self.zero(unit)?;
                self.known.note_zeros(region, number);
            }
            return Ok(true);
        }
        let hash = self.known.hash(page);
        if self.known.has(region, number, hash) {
            add(&counts.unchanged, 1);
            return Ok(true);
        }
        let mut sent = false;
        if self.delta
            && let Some(old) = self.known.page(region, number)
        {
            let begin = self.buffer.len();
            if delta::encode(old, page, DELTA_MOST, &mut self.buffer) {
                self.packed(unit, Codec::Delta, begin)?;
                add(&self.shared.counts.delta, 1);
                sent = true;
            }
        }
        self.known.note(region, number, hash, page, keep && self.delta);
        Ok(sent)
    }

    fn forget(&mut self, run: Units) {
        if !self.known.is_empty() {
            (run.first..run.end()).for_each(|unit| self.known.forget(run.region, unit));
        }
    }

    /// Sends `bytes`, which are those of `run`, compressed where that makes them fewer.
    fn data_from(
        &mut self,
        run: Units,
        bytes: &[u8],
        codec: Option<Codec>,
    ) -> Result<(), MigrateError> {
        let begin = self.buffer.len();
        if let Some(codec) = codec {
            let started = Instant::now();
            let fewer = pack(codec, bytes, &mut self.buffer);
            let to = if fewer { self.buffer.len() - begin } else { bytes.len() };
            self.chooser.packed(bytes.len(), to, started.elapsed());
            if fewer {
                self.packed(run, codec, begin)?;
                add(&self.shared.counts.packed, run.count);
                return Ok(());
            }
        }
        self.data_header(run, run, None)?;
        self.buffer.extend_from_slice(bytes);
        self.parts.push(Part::Buffer(begin..self.buffer.len()));
        Ok(())
    }

    fn header(&mut self, frame: &Frame, header: [u8; HEADER_LEN]) -> Result<(), MigrateError> {
        self.note(frame)?;
        self.parts.push(Part::Header(header));
        self.bytes += HEADER_LEN as u64;
        Ok(())
    }

    fn zero(&mut self, run: Units) -> Result<(), MigrateError> {
        let span = run.to_wire();
        self.header(&Frame::Zero { span }, Encoder::zero(span))?;
        if !self.known.is_empty() {
            (run.first..run.end()).for_each(|unit| self.known.note_zeros(run.region, unit));
        }
        add(&self.shared.counts.zero, run.count);
        Ok(())
    }

    /// Before the guest moves, what cannot be read is left for afterwards.
    fn poison(&mut self, run: Units) -> Result<(), MigrateError> {
        if !self.switched {
            self.shared.unreadable.insert(run.region, run.run());
            return Ok(());
        }
        let span = run.to_wire();
        self.header(&Frame::Poison { span }, Encoder::poison(span))?;
        add(&self.shared.counts.poisoned, run.count);
        Ok(())
    }

    /// The beginning of a frame of pages: all of `span`, or the part of it at an offset.
    fn data_header(
        &mut self,
        span: Units,
        part: Units,
        fragment: Option<u64>,
    ) -> Result<(), MigrateError> {
        let length = (part.count * UNIT) as u32;
        let data = DataHeader { span: span.to_wire(), length, fragment };
        self.header(&Frame::Data(data), Encoder::data(&data))?;
        self.bytes += u64::from(length);
        add(&self.shared.counts.data, part.count);
        Ok(())
    }

    /// What is in the buffer from `begin` on is `run`, packed.
    fn packed(&mut self, run: Units, codec: Codec, begin: usize) -> Result<(), MigrateError> {
        let length = (self.buffer.len() - begin) as u32;
        let packed = PackedHeader { span: run.to_wire(), codec, length };
        self.header(&Frame::Packed(packed), Encoder::packed(&packed))?;
        self.bytes += u64::from(length);
        self.parts.push(Part::Buffer(begin..self.buffer.len()));
        Ok(())
    }

    /// Sends what was added.
    pub(super) fn flush(&mut self, bucket: Option<&Bucket>) -> Result<(), MigrateError> {
        if self.parts.is_empty() {
            return Ok(());
        }
        if let Some(bucket) = bucket {
            self.link.pause_for(bucket.take(self.bytes))?;
        }
        let mut pieces = self
            .parts
            .iter()
            .map(|part| {
                Ok(match part {
                    Part::Header(header) => Piece::from(&header[..]),
                    Part::Buffer(range) => Piece::from(&self.buffer[range.clone()]),
                    Part::InPlace(run) => self.shared.memory.piece(*run)?,
                })
            })
            .collect::<Result<Vec<Piece<'_>>, MigrateError>>()?;
        let started = Instant::now();
        let sent = self.wire().send(&mut pieces);
        self.chooser.sent(self.bytes as usize, started.elapsed());
        add(&self.shared.counts.bytes, self.bytes);
        self.parts.clear();
        self.buffer.clear();
        self.bytes = 0;
        sent
    }
}
