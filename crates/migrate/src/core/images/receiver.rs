//! The end of a connection that takes images.

use std::collections::HashSet;

use super::{
    ImageBegin, ImageCounts, ImageId, ImageStored, ImageTotals, ledger::Ledger, sender::check_end,
};
use crate::core::{
    Channel, Frame, HEADER_LEN, Hello, Kind, Phase, ProtocolError, Role, Terms, image_receiver_next,
};

/// How much a receiver takes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct ImageLimits {
    /// Bytes of an image's metadata. They are held in memory.
    pub metadata: u32,
    /// Bytes of an image's table of mappings. They are held in memory.
    pub mappings: u32,
    /// Bytes of one image: its frames, headers and payloads.
    pub image_bytes: u64,
    /// Bytes of all images of a session together, counted in the same way.
    pub session_bytes: u64,
    /// Images begun in a session.
    pub images: u64,
}

impl Default for ImageLimits {
    /// 1 MiB of metadata, 64 MiB of mappings, 65,536 images in a session, of any size.
    fn default() -> Self {
        Self {
            metadata: 1 << 20,
            mappings: 64 << 20,
            image_bytes: u64::MAX,
            session_bytes: u64::MAX,
            images: 1 << 16,
        }
    }
}

/// What a connection that takes images may receive, and what it has agreed on.
///
/// Every frame received goes through [`receive`](Self::receive), and the payload of `Data` frames
/// through [`payload`](Self::payload).
#[derive(Debug)]
pub struct ImageReceiverSession {
    terms: Terms,
    limits: ImageLimits,
    phase: Phase,
    agreed: Option<Hello>,
    image: Option<Ledger>,
    metadata: Vec<u8>,
    mappings: Vec<u8>,
    /// Bytes of frames of the image begun, and of all images.
    image_bytes: u64,
    session_bytes: u64,
    begun: u64,
    /// The images stored. At most as many as may be begun.
    known: HashSet<ImageId>,
    totals: ImageTotals,
    last: Option<ImageId>,
}

impl ImageReceiverSession {
    /// A connection on which nothing has come yet.
    #[must_use]
    pub fn new(terms: Terms, limits: ImageLimits) -> Self {
        Self {
            terms,
            limits,
            phase: Phase::Greeting,
            agreed: None,
            image: None,
            metadata: Vec::new(),
            mappings: Vec::new(),
            image_bytes: 0,
            session_bytes: 0,
            begun: 0,
            known: HashSet::new(),
            totals: ImageTotals::default(),
            last: None,
        }
    }

    /// Where the connection stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The answer to the sender's hello, once that has come. To be sent.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// How the image begun began.
    #[must_use]
    pub fn image(&self) -> Option<&ImageBegin> {
        self.image.as_ref().map(Ledger::begin)
    }

    /// The last image that [`stored`](Self::stored) told of.
    #[must_use]
    pub fn last_stored(&self) -> Option<ImageId> {
        self.last
    }

    /// Images stored and images given up. Once completed, the sender agrees; to be sent as
    /// `CompleteAck`.
    #[must_use]
    pub fn totals(&self) -> ImageTotals {
        self.totals
    }

    /// Whether all of the description of the image begun has come.
    #[must_use]
    pub fn described(&self) -> bool {
        self.image.as_ref().is_some_and(|image| image.undescribed() == 0)
    }

    /// The metadata and the table of mappings of the image begun, as far as they have come; they
    /// are forgotten here.
    pub fn take_description(&mut self) -> (Vec<u8>, Vec<u8>) {
        (std::mem::take(&mut self.metadata), std::mem::take(&mut self.mappings))
    }

    /// Bytes of frames received of all images.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.session_bytes
    }

    fn unexpected(&self, kind: Kind) -> ProtocolError {
        ProtocolError::Unexpected { kind, channel: Channel::Images, phase: self.phase }
    }

    /// Takes note of a frame that has come.
    ///
    /// # Errors
    /// What is wrong with it; for an `Error` frame, [`ProtocolError::Refused`]. The session is
    /// closed then, and what was begun is to be dropped.
    pub fn receive(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        self.judge(frame).inspect_err(|_| self.phase = Phase::Closed)
    }

    fn judge(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let kind = frame.kind();
        let next = image_receiver_next(self.phase, kind).ok_or_else(|| self.unexpected(kind))?;
        match frame {
            Frame::Hello(offer) => {
                self.agreed = Some(self.terms.answer_as(Role::ImageReceiver, offer)?);
            }
            Frame::ImageBegin(begin) => self.begin(begin)?,
            Frame::ImageMetadata { bytes, .. } => {
                self.note(frame, bytes.len() as u64)?;
                self.metadata.extend_from_slice(bytes);
            }
            Frame::ImageMappings { bytes, .. } => {
                self.note(frame, bytes.len() as u64)?;
                self.mappings.extend_from_slice(bytes);
            }
            Frame::Data(data) => self.note(frame, data.length.into())?,
            Frame::Zero { .. } | Frame::Poison { .. } | Frame::Gone { .. } => {
                self.note(frame, 0)?
            }
            Frame::ImageEnd(end) => {
                let image = self.image.as_ref().ok_or_else(|| self.unexpected(kind))?;
                image.check_described(kind)?;
                check_end(image, end)?;
            }
            Frame::ImageAbort { .. } => {
                self.image = None;
                self.totals.aborted += 1;
            }
            Frame::Complete(counts) => {
                let theirs = (*counts).into();
                if theirs != self.totals {
                    return Err(ProtocolError::ImagesMismatch { ours: self.totals, theirs });
                }
            }
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal.clone())),
            _ => {}
        }
        self.phase = next;
        Ok(())
    }

    fn begin(&mut self, begin: &ImageBegin) -> Result<(), ProtocolError> {
        if self.known.contains(&begin.id) {
            let why = "an image with this identity has been stored already";
            return Err(ProtocolError::BadImage { image: begin.id, why });
        }
        let limits = &self.limits;
        for (what, wanted, limit) in [
            ("images in a session", self.begun.saturating_add(1), limits.images),
            ("bytes of metadata", begin.metadata_len.into(), limits.metadata.into()),
            ("bytes of mappings", begin.mappings_len.into(), limits.mappings.into()),
        ] {
            within(what, wanted, limit)?;
        }
        let agreed = self.agreed.as_ref().expect("nothing begins before the hellos");
        self.image = Some(Ledger::new(*begin, agreed.max_payload)?);
        self.begun += 1;
        self.image_bytes = 0;
        self.metadata = Vec::new();
        self.mappings = Vec::new();
        self.charge(super::IMAGE_BEGIN_LEN as u64)
    }

    fn note(&mut self, frame: &Frame, payload: u64) -> Result<(), ProtocolError> {
        self.charge(payload)?;
        match &mut self.image {
            Some(image) => image.note(frame),
            None => Err(self.unexpected(frame.kind())),
        }
    }

    /// Counts a frame with this payload against the limits.
    fn charge(&mut self, payload: u64) -> Result<(), ProtocolError> {
        let bytes = payload + HEADER_LEN as u64;
        self.image_bytes = self.image_bytes.saturating_add(bytes);
        self.session_bytes = self.session_bytes.saturating_add(bytes);
        within("bytes of an image", self.image_bytes, self.limits.image_bytes)?;
        within("bytes of a session's images", self.session_bytes, self.limits.session_bytes)
    }

    /// Takes note of payload bytes of `Data` frames, in order: all of them before the `ImageEnd`
    /// frame, and the more at a time the faster.
    pub fn payload(&mut self, bytes: &[u8]) {
        if let Some(image) = &mut self.image {
            image.payload(bytes);
        }
    }

    /// Takes note that the image that ended is stored for good, with as many pages as `counts`
    /// says. Returns what to send as `ImageStored`.
    ///
    /// # Errors
    /// [`ProtocolError::ImageMismatch`] if other pages were stored than came; the session is
    /// closed then. [`ProtocolError::Unexpected`] if no image has ended, or the session was closed
    /// before this one was stored, which it is all the same.
    pub fn stored(&mut self, counts: ImageCounts) -> Result<ImageStored, ProtocolError> {
        let Some(image) = &self.image else { return Err(self.unexpected(Kind::ImageStored)) };
        let (id, theirs) = (image.begin().id, image.counts());
        if counts != theirs {
            self.phase = Phase::Closed;
            return Err(ProtocolError::ImageMismatch { image: id, ours: counts, theirs });
        }
        if self.phase != Phase::Storing {
            return Err(self.unexpected(Kind::ImageStored));
        }
        self.image = None;
        self.known.insert(id);
        self.last = Some(id);
        self.totals.stored += 1;
        self.phase = Phase::Active;
        Ok(ImageStored { id, counts })
    }
}

fn within(what: &'static str, wanted: u64, limit: u64) -> Result<(), ProtocolError> {
    if wanted > limit { Err(ProtocolError::Limit { what, wanted, limit }) } else { Ok(()) }
}
