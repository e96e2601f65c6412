//! What a sender collects before it sends.

use crate::{core::ImageSenderSession, net::Piece};

/// Whole frames not yet sent, except that the last one's payload may lie elsewhere. Payloads are
/// kept together, apart from the frames, because digests of long stretches of bytes are several
/// times faster than those of single pages.
#[derive(Debug, Default)]
pub(super) struct Unsent {
    pub(super) frames: Vec<u8>,
    payloads: Vec<u8>,
    /// Where in each a payload ends. The frames before it end with its header.
    cuts: Vec<(usize, usize)>,
    /// Bytes of `payloads` that the digest knows.
    digested: usize,
}

impl Unsent {
    pub(super) fn len(&self) -> usize {
        self.frames.len() + self.payloads.len()
    }

    /// Adds the payload of the frame added last.
    pub(super) fn add_payload(&mut self, payload: &[u8]) {
        self.payloads.extend_from_slice(payload);
        self.cuts.push((self.frames.len(), self.payloads.len()));
    }

    pub(super) fn digest(&mut self, session: &mut ImageSenderSession) {
        session.payload(&self.payloads[self.digested..]);
        self.digested = self.payloads.len();
    }

    pub(super) fn pieces(&self) -> Vec<Piece<'_>> {
        let mut pieces = Vec::with_capacity(2 * self.cuts.len() + 2);
        let (mut frame, mut payload) = (0, 0);
        for &(frame_end, payload_end) in &self.cuts {
            pieces.push(Piece::from(&self.frames[frame..frame_end]));
            pieces.push(Piece::from(&self.payloads[payload..payload_end]));
            (frame, payload) = (frame_end, payload_end);
        }
        pieces.push(Piece::from(&self.frames[frame..]));
        pieces
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        let (mut frame, mut payload) = (0, 0);
        for &(frame_end, payload_end) in &self.cuts {
            bytes.extend_from_slice(&self.frames[frame..frame_end]);
            bytes.extend_from_slice(&self.payloads[payload..payload_end]);
            (frame, payload) = (frame_end, payload_end);
        }
        bytes.extend_from_slice(&self.frames[frame..]);
        bytes
    }

    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.payloads.clear();
        self.cuts.clear();
        self.digested = 0;
    }
}
