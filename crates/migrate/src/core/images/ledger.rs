//! What was said of one image so far.

use super::{ImageBegin, ImageCounts, ImageEnd};
use crate::core::{Encoder, Frame, Kind, ProtocolError, WireSpan};

/// Checks, counts and digests the frames of one image. A frame that is refused leaves no trace.
#[derive(Debug)]
pub(super) struct Ledger {
    begin: ImageBegin,
    metadata: u64,
    mappings: u64,
    /// The lowest page that may still come.
    next: u64,
    counts: ImageCounts,
    frames: blake3::Hasher,
    pages: blake3::Hasher,
    scratch: Vec<u8>,
}

impl Ledger {
    pub(super) fn new(begin: ImageBegin, max_payload: u32) -> Result<Self, ProtocolError> {
        begin.check(max_payload)?;
        let mut ledger = Self {
            begin,
            metadata: 0,
            mappings: 0,
            next: 0,
            counts: ImageCounts::default(),
            frames: blake3::Hasher::new(),
            pages: blake3::Hasher::new(),
            scratch: Vec::new(),
        };
        ledger.hash(&Frame::ImageBegin(begin));
        Ok(ledger)
    }

    pub(super) fn begin(&self) -> &ImageBegin {
        &self.begin
    }

    pub(super) fn counts(&self) -> ImageCounts {
        self.counts
    }

    /// How the image ends if nothing more is said.
    pub(super) fn end(&self) -> ImageEnd {
        let digest = |of: &blake3::Hasher| *of.finalize().as_bytes();
        ImageEnd { counts: self.counts, frames: digest(&self.frames), pages: digest(&self.pages) }
    }

    /// Bytes of the description that have not come.
    pub(super) fn undescribed(&self) -> u64 {
        let announced = u64::from(self.begin.metadata_len) + u64::from(self.begin.mappings_len);
        announced - self.metadata - self.mappings
    }

    /// Takes note of a frame. Of a `Data` frame the payload is noted apart.
    pub(super) fn note(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let kind = frame.kind();
        match frame {
            Frame::ImageMetadata { offset, bytes } => {
                let announced = u64::from(self.begin.metadata_len);
                self.metadata = chunk(kind, *offset, bytes, self.metadata, announced)?;
            }
            Frame::ImageMappings { offset, bytes } => {
                if self.metadata < u64::from(self.begin.metadata_len) {
                    return Err(ProtocolError::Undescribed { kind, missing: self.undescribed() });
                }
                let announced = u64::from(self.begin.mappings_len);
                self.mappings = chunk(kind, *offset, bytes, self.mappings, announced)?;
            }
            Frame::Data(data) => {
                let (first, count) = (data.span.first, data.span.count);
                if data.fragment.is_some() {
                    let why = "pages of an image come whole";
                    return Err(ProtocolError::BadPages { kind, first, count, why });
                }
                let expected = u128::from(count) * u128::from(self.begin.page_size);
                if u128::from(data.length) != expected {
                    return Err(ProtocolError::PayloadLength {
                        kind,
                        got: data.length.into(),
                        expected: format!("its pages have {expected}"),
                    });
                }
                self.counts.data += self.pages(kind, data.span)?;
            }
            Frame::Zero { span } => self.counts.zero += self.pages(kind, *span)?,
            Frame::Poison { span } => self.counts.poisoned += self.pages(kind, *span)?,
            Frame::Gone { span } => self.counts.gone += self.pages(kind, *span)?,
            _ => unreachable!("the tables let nothing else into an image"),
        }
        self.hash(frame);
        Ok(())
    }

    /// Digests bytes of the payloads of `Data` frames.
    pub(super) fn payload(&mut self, bytes: &[u8]) {
        self.pages.update(bytes);
    }

    /// Whether the image may end, or its pages begin.
    pub(super) fn check_described(&self, kind: Kind) -> Result<(), ProtocolError> {
        match self.undescribed() {
            0 => Ok(()),
            missing => Err(ProtocolError::Undescribed { kind, missing }),
        }
    }

    /// Checks that a span may come now, and moves on behind it. Returns its pages.
    fn pages(&mut self, kind: Kind, span: WireSpan) -> Result<u64, ProtocolError> {
        self.check_described(kind)?;
        let WireSpan { region, first, count } = span;
        if count == 0 {
            return Err(ProtocolError::EmptySpan(kind));
        }
        if region != 0 {
            return Err(ProtocolError::UnknownRegion(region));
        }
        let end = span.end().filter(|end| end.checked_mul(self.begin.page_size).is_some());
        let Some(end) = end else {
            let why = "they lie beyond the address space";
            return Err(ProtocolError::BadPages { kind, first, count, why });
        };
        if first < self.next {
            return Err(ProtocolError::PageOrder { kind, first, count, due: self.next });
        }
        self.next = end;
        Ok(count.into())
    }

    fn hash(&mut self, frame: &Frame) {
        self.scratch.clear();
        Encoder::encode(frame, &mut self.scratch);
        self.frames.update(&self.scratch);
    }
}

/// Checks a part of a description, of which `due` bytes have come. Returns how many have then.
fn chunk(
    kind: Kind,
    offset: u64,
    bytes: &[u8],
    due: u64,
    announced: u64,
) -> Result<u64, ProtocolError> {
    let length = bytes.len() as u64;
    if offset != due || length > announced - due {
        return Err(ProtocolError::Description { kind, offset, length, due, announced });
    }
    Ok(due + length)
}
