//! Frames to bytes.

use super::{
    Counts, DataHeader, Frame, HEADER_LEN, Kind, WireSpan,
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

    /// The destination's counts.
    #[must_use]
    pub fn complete(counts: Counts) -> [u8; HEADER_LEN] {
        header(Kind::Complete, 0, WireSpan { first: counts.filled, ..NO_SPAN }, 0, counts.poisoned)
    }

    /// The source's counts.
    #[must_use]
    pub fn complete_ack(counts: Counts) -> [u8; HEADER_LEN] {
        header(
            Kind::CompleteAck,
            0,
            WireSpan { first: counts.filled, ..NO_SPAN },
            0,
            counts.poisoned,
        )
    }

    /// A goodbye.
    #[must_use]
    pub fn bye() -> [u8; HEADER_LEN] {
        header(Kind::Bye, 0, NO_SPAN, 0, 0)
    }

    /// A ping.
    #[must_use]
    pub fn ping(nonce: u64) -> [u8; HEADER_LEN] {
        header(Kind::Ping, 0, NO_SPAN, 0, nonce)
    }

    /// A pong.
    #[must_use]
    pub fn pong(nonce: u64) -> [u8; HEADER_LEN] {
        header(Kind::Pong, 0, NO_SPAN, 0, nonce)
    }

    /// Pages that are no longer memory.
    #[must_use]
    pub fn gone(span: WireSpan) -> [u8; HEADER_LEN] {
        header(Kind::Gone, 0, span, 0, 0)
    }

    /// Appends any frame to `out`; of a data frame, the header only.
    ///
    /// # Panics
    /// If a `Regions` frame has more than [`MAX_REGIONS`](super::MAX_REGIONS) regions, an `Error`
    /// or `ImageAbort` frame a text longer than [`MAX_TEXT`](super::MAX_TEXT), or a part of a
    /// description more than [`MAX_CHUNK`](super::MAX_CHUNK) bytes: [`Geometry`](super::Geometry),
    /// [`Refusal::new`](super::Refusal::new) and [`Frame::abort`] keep to that.
    pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
        match frame {
            Frame::Hello(hello) => {
                payload(Kind::Hello, 0, 0, &hello.to_bytes(), out);
            }
            Frame::Regions(regions) => {
                assert!(regions.len() <= super::MAX_REGIONS as usize, "too many regions");
                let count = regions.len() as u32;
                let length = count * super::REGION_LEN as u32;
                out.extend(header(Kind::Regions, 0, WireSpan { count, ..NO_SPAN }, length, 0));
                regions.iter().for_each(|region| out.extend(region.to_bytes()));
            }
            Frame::Error(refusal) => {
                assert!(refusal.text.len() <= super::MAX_TEXT as usize, "error text too long");
                let code = u64::from(refusal.code.to_wire());
                payload(Kind::Error, 0, code, refusal.text.as_bytes(), out);
            }
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
                assert!(bytes.len() <= super::MAX_CHUNK as usize, "chunk too long");
                payload(Kind::ImageMetadata, 0, *offset, bytes, out);
            }
            Frame::ImageMappings { offset, bytes } => {
                assert!(bytes.len() <= super::MAX_CHUNK as usize, "chunk too long");
                payload(Kind::ImageMappings, 0, *offset, bytes, out);
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
        }
    }
}
