//! The end of a connection that sends images.

use super::{ImageCounts, ImageEnd, ImageId, ImageTotals, ledger::Ledger};
use crate::core::{
    Channel, Frame, Hello, Kind, Phase, ProtocolError, Role, SessionId, Terms, image_receiver_next,
    image_sender_next,
};

/// What a connection that sends images may send and receive, and what it has agreed on.
///
/// Every frame received goes through [`receive`](Self::receive), and every frame of an image
/// through [`send`](Self::send) before it is sent, so that nothing leaves that a receiver would
/// have to refuse.
#[derive(Debug)]
pub struct ImageSenderSession {
    terms: Terms,
    offer: Hello,
    phase: Phase,
    agreed: Option<Hello>,
    image: Option<Ledger>,
    totals: ImageTotals,
    last: Option<ImageId>,
}

impl ImageSenderSession {
    /// A connection that has just been made. Send [`offer`](Self::offer) first.
    #[must_use]
    pub fn new(terms: Terms, session: SessionId) -> Self {
        Self {
            terms,
            offer: terms.offer(Role::ImageSender, Channel::Images, session),
            phase: Phase::Greeting,
            agreed: None,
            image: None,
            totals: ImageTotals::default(),
            last: None,
        }
    }

    /// The hello to send.
    #[must_use]
    pub fn offer(&self) -> Hello {
        self.offer
    }

    /// Where the connection stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The receiver's hello, once it has come.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// The image begun and not yet acknowledged.
    #[must_use]
    pub fn image(&self) -> Option<ImageId> {
        self.image.as_ref().map(|image| image.begin().id)
    }

    /// The last image that the receiver has acknowledged.
    #[must_use]
    pub fn last_stored(&self) -> Option<ImageId> {
        self.last
    }

    /// Images acknowledged and images given up.
    #[must_use]
    pub fn totals(&self) -> ImageTotals {
        self.totals
    }

    /// Pages sent of the image begun.
    #[must_use]
    pub fn counts(&self) -> ImageCounts {
        self.image.as_ref().map(Ledger::counts).unwrap_or_default()
    }

    /// How the image ends, if nothing more is said of it and all payloads have been noted; `None` if
    /// none has begun.
    #[must_use]
    pub fn end(&self) -> Option<ImageEnd> {
        self.image.as_ref().map(Ledger::end)
    }

    fn unexpected(&self, kind: Kind) -> ProtocolError {
        ProtocolError::Unexpected { kind, channel: Channel::Images, phase: self.phase }
    }

    /// Takes note of a frame that is about to be sent: one of an image, or `Complete` with
    /// [`totals`](Self::totals).
    ///
    /// # Errors
    /// Why a receiver would refuse it. Nothing has changed then, and it may not be sent.
    pub fn send(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let kind = frame.kind();
        let next = image_receiver_next(self.phase, kind).ok_or_else(|| self.unexpected(kind))?;
        match (frame, &mut self.image) {
            (Frame::ImageBegin(begin), image) => {
                let agreed = self.agreed.as_ref().expect("nothing begins before the hellos");
                *image = Some(Ledger::new(*begin, agreed.max_payload)?);
            }
            (Frame::ImageEnd(end), Some(image)) => {
                image.check_described(kind)?;
                check_end(image, end)?;
            }
            (Frame::ImageAbort { .. }, image) => {
                *image = None;
                self.totals.aborted += 1;
            }
            (Frame::Complete(counts), _) => {
                let theirs = (*counts).into();
                if theirs != self.totals {
                    return Err(ProtocolError::ImagesMismatch { ours: self.totals, theirs });
                }
                self.phase = Phase::Completing;
                return Ok(());
            }
            (
                Frame::Data(_)
                | Frame::Zero { .. }
                | Frame::Poison { .. }
                | Frame::Gone { .. }
                | Frame::ImageMetadata { .. }
                | Frame::ImageMappings { .. },
                Some(image),
            ) => image.note(frame)?,
            _ => return Err(self.unexpected(kind)),
        }
        self.phase = next;
        Ok(())
    }

    /// Takes note of payload bytes of `Data` frames, in order: all of them before the image ends,
    /// and the more at a time the faster.
    pub fn payload(&mut self, bytes: &[u8]) {
        if let Some(image) = &mut self.image {
            image.payload(bytes);
        }
    }

    /// Takes note of a frame that has come.
    ///
    /// # Errors
    /// What is wrong with it; for an `Error` frame, [`ProtocolError::Refused`]. The session is
    /// closed then.
    pub fn receive(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        self.judge(frame).inspect_err(|_| self.phase = Phase::Closed)
    }

    fn judge(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        let kind = frame.kind();
        let next = image_sender_next(self.phase, kind).ok_or_else(|| self.unexpected(kind))?;
        match frame {
            Frame::Hello(answer) => {
                self.terms.accept(&self.offer, answer)?;
                self.agreed = Some(*answer);
            }
            Frame::ImageStored(stored) => {
                let image = self.image.as_ref().expect("an image is being stored");
                let (ours, counts) = (image.begin().id, image.counts());
                if stored.id != ours {
                    return Err(ProtocolError::WrongImage { ours, theirs: stored.id });
                }
                if stored.counts != counts {
                    return Err(ProtocolError::ImageMismatch {
                        image: ours,
                        ours: counts,
                        theirs: stored.counts,
                    });
                }
                self.image = None;
                self.last = Some(ours);
                self.totals.stored += 1;
            }
            Frame::CompleteAck(counts) => {
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
}

/// Compares what the image ends with and what came of it.
pub(super) fn check_end(image: &Ledger, end: &ImageEnd) -> Result<(), ProtocolError> {
    let (id, ours) = (image.begin().id, image.end());
    if end.counts != ours.counts {
        return Err(ProtocolError::ImageMismatch {
            image: id,
            ours: ours.counts,
            theirs: end.counts,
        });
    }
    let of = match (end.frames == ours.frames, end.pages == ours.pages) {
        (true, true) => return Ok(()),
        (false, _) => "frames",
        (true, false) => "pages",
    };
    Err(ProtocolError::ImageDigest { image: id, of })
}
