//! Frames to bytes.

use super::{
    Counts, DataHeader, Frame, HEADER_LEN, Kind, WireSpan,
    frame::{FLAG_FRAGMENT, FLAG_PREFETCH, FRAME_MAGIC, RawHeader},
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

    /// Appends any frame to `out`; of a data frame, the header only.
    ///
    /// # Panics
    /// If a `Regions` frame has more than [`MAX_REGIONS`](super::MAX_REGIONS) regions or an
    /// `Error` frame a text longer than [`MAX_TEXT`](super::MAX_TEXT): [`Geometry`](super::Geometry)
    /// and [`Refusal::new`](super::Refusal::new) keep to both.
    pub fn encode(frame: &Frame, out: &mut Vec<u8>) {
        match frame {
            Frame::Hello(hello) => {
                let payload = hello.to_bytes();
                out.extend(header(Kind::Hello, 0, NO_SPAN, payload.len() as u32, 0));
                out.extend(payload);
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
                out.extend(header(Kind::Error, 0, NO_SPAN, refusal.text.len() as u32, code));
                out.extend(refusal.text.as_bytes());
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
        }
    }
}
