//! Frames to bytes.

use super::{
    Counts, DataHeader, Frame, HEADER_LEN, Kind, PackedHeader, Refusal, UnitRun, WireSpan,
    frame::{FLAG_FRAGMENT, FLAG_PARENT, FLAG_PREFETCH, FRAME_MAGIC, RawHeader},
};

/// Turns frames into bytes. The header-only frames of the fault path are built on the stack.
#[derive(Copy, Clone, Debug)]
pub struct Encoder;

const NO_SPAN: WireSpan = WireSpan { region: 0, first: 0, count: 0 };

fn header(kind: Kind, flags: u8, span: WireSpan, length: u32, aux: u64) -> [u8; HEADER_LEN] {
    let raw = RawHeader {
        magic: FRAME_MAGIC.into(),
        kind: kind as u8,
        flags,
        region: span.region.into(),
        reserved: 0.into(),
        count: span.count.into(),
        length: length.into(),
        first: span.first.into(),
        aux: aux.into(),
    };
    zerocopy::transmute!(raw)
}

/// A frame of two numbers: `first` and the auxiliary field.
fn numbers(kind: Kind, first: u64, aux: u64) -> [u8; HEADER_LEN] {
    header(kind, 0, WireSpan { first, ..NO_SPAN }, 0, aux)
}

/// Appends a frame of entries of `N` bytes.
fn entries<const N: usize>(
    kind: Kind,
    region: u16,
    entries: impl ExactSizeIterator<Item = [u8; N]>,
    out: &mut Vec<u8>,
) {
    let most = if kind == Kind::Missing || kind == Kind::Have {
        super::MAX_RUNS
    } else {
        super::MAX_REGIONS
    };
    assert!(entries.len() <= most as usize, "too many entries of a {kind} frame");
    let count = entries.len() as u32;
    out.extend(header(kind, 0, WireSpan { region, first: 0, count }, count * N as u32, 0));
    entries.for_each(|entry| out.extend(entry));
}

fn runs(kind: Kind, region: u16, runs: &[UnitRun], out: &mut Vec<u8>) {
    entries(kind, region, runs.iter().map(|run| run.to_bytes()), out);
}

fn chunk(kind: Kind, offset: u64, bytes: &[u8], out: &mut Vec<u8>) {
    assert!(bytes.len() <= super::MAX_CHUNK as usize, "chunk too long");
    payload(kind, 0, offset, bytes, out);
}

fn refusal(kind: Kind, refusal: &Refusal, out: &mut Vec<u8>) {
    assert!(refusal.text.len() <= super::MAX_TEXT as usize, "text too long");
    payload(kind, 0, refusal.code.to_wire().into(), refusal.text.as_bytes(), out);
}

/// Appends a frame of no span, with its payload.
fn payload(kind: Kind, flags: u8, aux: u64, bytes: &[u8], out: &mut Vec<u8>) {
    out.extend(header(kind, flags, NO_SPAN, bytes.len() as u32, aux));
    out.extend(bytes);
}

impl Encoder {
    /// A request.
    #[must_use]
    pub fn request(span: WireSpan, prefetch: bool) -> [u8; HEADER_LEN] {
        header(Kind::Request, if prefetch { FLAG_PREFETCH } else { 0 }, span, 0, 0)
    }

    /// An expedite.
    #[must_use]
    pub fn expedite(span: WireSpan) -> [u8; HEADER_LEN] {
        header(Kind::Expedite, 0, span, 0, 0)
    }

    /// The header of a data frame; `data.length` bytes of payload must follow it.
    #[must_use]
    pub fn data(data: &DataHeader) -> [u8; HEADER_LEN] {
        let (flags, offset) = match data.fragment {
            Some(offset) => (FLAG_FRAGMENT, offset),
            None => (0, 0),
        };
        header(Kind::Data, flags, data.span, data.length, offset)
    }

    /// An all-zero answer.
    #[must_use]
    pub fn zero(span: WireSpan) -> [u8; HEADER_LEN] {
        header(Kind::Zero, 0, span, 0, 0)
    }

    /// A poisoned answer.
    #[must_use]
    pub fn poison(span: WireSpan) -> [u8; HEADER_LEN] {
        header(Kind::Poison, 0, span, 0, 0)
    }

    /// The header of packed bytes; `packed.length` bytes of payload must follow it.
    #[must_use]
    pub fn packed(packed: &PackedHeader) -> [u8; HEADER_LEN] {
        header(Kind::Packed, 0, packed.span, packed.length, packed.codec.to_wire())
    }

    /// The destination's counts.
    #[must_use]
    pub fn complete(counts: Counts) -> [u8; HEADER_LEN] {
        numbers(Kind::Complete, counts.filled, counts.poisoned)
    }

    /// The source's counts.
    #[must_use]
    pub fn complete_ack(counts: Counts) -> [u8; HEADER_LEN] {
        numbers(Kind::CompleteAck, counts.filled, counts.poisoned)
    }

    /// A goodbye.
    #[must_use]
    pub fn bye() -> [u8; HEADER_LEN] {
        numbers(Kind::Bye, 0, 0)
    }

    /// A ping.
    #[must_use]
    pub fn ping(nonce: u64) -> [u8; HEADER_LEN] {
        numbers(Kind::Ping, 0, nonce)
    }

    /// A pong.
    #[must_use]
    pub fn pong(nonce: u64) -> [u8; HEADER_LEN] {
        numbers(Kind::Pong, 0, nonce)
    }

    /// Pages that are no longer memory.
    #[must_use]
    pub fn gone(span: WireSpan) -> [u8; HEADER_LEN] {
        header(Kind::Gone, 0, span, 0, 0)
    }

    /// Appends any frame to `out`; of a frame of pages, the header only.
    ///
    /// # Panics
    /// If there are more than [`MAX_REGIONS`](super::MAX_REGIONS) regions in a `Regions` or
    /// `Accept` frame, or [`MAX_RUNS`](super::MAX_RUNS) runs in a `Missing` or `Have` frame; if an
    /// `Error`, `Cancel` or `ImageAbort` frame has a text longer than
    /// [`MAX_TEXT`](super::MAX_TEXT), or a part of a description or state more than
    /// [`MAX_CHUNK`](super::MAX_CHUNK) bytes: [`Geometry`](super::Geometry),
    /// [`Refusal::new`](super::Refusal::new) and [`Frame::abort`] keep to that.
    pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
        match frame {
            Frame::Hello(hello) => {
                payload(Kind::Hello, 0, 0, &hello.to_bytes(), out);
            }
            Frame::Regions(regions) => {
                entries(Kind::Regions, 0, regions.iter().map(|region| region.to_bytes()), out);
            }
            Frame::Error(text) => refusal(Kind::Error, text, out),
            Frame::Request { span, prefetch } => out.extend(Self::request(*span, *prefetch)),
            Frame::Expedite { span } => out.extend(Self::expedite(*span)),
            Frame::Data(data) => out.extend(Self::data(data)),
            Frame::Zero { span } => out.extend(Self::zero(*span)),
            Frame::Poison { span } => out.extend(Self::poison(*span)),
            Frame::Complete(counts) => out.extend(Self::complete(*counts)),
            Frame::CompleteAck(counts) => out.extend(Self::complete_ack(*counts)),
            Frame::Bye => out.extend(Self::bye()),
            Frame::Ping { nonce } => out.extend(Self::ping(*nonce)),
            Frame::Pong { nonce } => out.extend(Self::pong(*nonce)),
            Frame::ImageBegin(begin) => {
                let flags = if begin.parent.is_some() { FLAG_PARENT } else { 0 };
                payload(Kind::ImageBegin, flags, 0, &begin.to_bytes(), out);
            }
            Frame::ImageMetadata { offset, bytes } => {
                chunk(Kind::ImageMetadata, *offset, bytes, out);
            }
            Frame::ImageMappings { offset, bytes } => {
                chunk(Kind::ImageMappings, *offset, bytes, out);
            }
            Frame::Gone { span } => out.extend(Self::gone(*span)),
            Frame::ImageEnd(end) => payload(Kind::ImageEnd, 0, 0, &end.to_bytes(), out),
            Frame::ImageAbort { reason } => {
                assert!(reason.len() <= super::MAX_TEXT as usize, "abort text too long");
                payload(Kind::ImageAbort, 0, 0, reason.as_bytes(), out);
            }
            Frame::ImageStored(stored) => {
                payload(Kind::ImageStored, 0, 0, &stored.to_bytes(), out);
            }
            Frame::Accept(regions) => {
                entries(Kind::Accept, 0, regions.iter().map(|region| region.to_bytes()), out);
            }
            Frame::RoundBegin { round, units } => {
                out.extend(numbers(Kind::RoundBegin, *units, *round));
            }
            Frame::RoundEnd { round, units } => {
                out.extend(numbers(Kind::RoundEnd, *units, *round));
            }
            Frame::RoundAck { round, units } => {
                out.extend(numbers(Kind::RoundAck, *units, *round));
            }
            Frame::Packed(packed) => out.extend(Self::packed(packed)),
            Frame::StateBegin(state) => payload(Kind::StateBegin, 0, 0, &state.to_bytes(), out),
            Frame::State { offset, bytes } => chunk(Kind::State, *offset, bytes, out),
            Frame::Missing { region, runs: list } => runs(Kind::Missing, *region, list, out),
            Frame::Switch { round, missing } => {
                out.extend(numbers(Kind::Switch, *missing, *round));
            }
            Frame::Ready { missing } => out.extend(numbers(Kind::Ready, *missing, 0)),
            Frame::Cancel(text) => refusal(Kind::Cancel, text, out),
            Frame::Resume(belief) => out.extend(numbers(Kind::Resume, 0, belief.to_wire())),
            Frame::Run | Frame::Running | Frame::Cancelled | Frame::Dropped => {
                out.extend(numbers(frame.kind(), 0, 0));
            }
            Frame::Have { region, runs: list } => runs(Kind::Have, *region, list, out),
            Frame::HaveEnd { present, poisoned } => {
                out.extend(numbers(Kind::HaveEnd, *present, *poisoned));
            }
        }
    }
}
