//! The destination's (or a reader's) end of one connection.

use super::{
    Channel, Counts, Frame, Geometry, Hello, Kind, Phase, ProtocolError, Role, SessionId, Terms,
    client_next, parts::Parts,
};

/// What one connection of a destination may receive, and what it has agreed on.
///
/// Every frame received goes through [`receive`](Self::receive), which refuses by name what may
/// not come now or does not fit the regions. Whether an answer is owed is for
/// [`Outstanding`](super::Outstanding) to say.
#[derive(Debug)]
pub struct ClientSession {
    channel: Channel,
    terms: Terms,
    offer: Hello,
    phase: Phase,
    agreed: Option<Hello>,
    geometry: Option<Geometry>,
    parts: Parts,
    sent_counts: Option<Counts>,
}

impl ClientSession {
    /// A session on the demand channel. Send [`offer`](Self::offer) first.
    #[must_use]
    pub fn demand(terms: Terms, role: Role, session: SessionId) -> Self {
        Self::new(Channel::Demand, terms, role, session, None)
    }

    /// The background channel of the session whose demand channel stated `geometry`.
    #[must_use]
    pub fn background(terms: Terms, session: SessionId, geometry: Geometry) -> Self {
        Self::new(Channel::Background, terms, Role::Destination, session, Some(geometry))
    }

    fn new(
        channel: Channel,
        terms: Terms,
        role: Role,
        session: SessionId,
        geometry: Option<Geometry>,
    ) -> Self {
        Self {
            channel,
            terms,
            offer: terms.offer(role, channel, session),
            phase: Phase::Greeting,
            agreed: None,
            geometry,
            parts: Parts::default(),
            sent_counts: None,
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

    /// The source's hello, once it has come.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// The source's regions, once they have come.
    #[must_use]
    pub fn geometry(&self) -> Option<&Geometry> {
        self.geometry.as_ref()
    }

    /// Whether a granule has been received in part.
    #[must_use]
    pub fn in_fragment(&self) -> bool {
        self.parts.begun()
    }

    /// The counts are about to be sent.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] if this is not the demand channel at work.
    pub fn complete(&mut self, counts: Counts) -> Result<(), ProtocolError> {
        if self.phase != Phase::Active || self.channel != Channel::Demand {
            return Err(self.unexpected(Kind::Complete));
        }
        self.phase = Phase::Completing;
        self.sent_counts = Some(counts);
        Ok(())
    }

    fn unexpected(&self, kind: Kind) -> ProtocolError {
        ProtocolError::Unexpected { kind, channel: self.channel, phase: self.phase }
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
        let Some(next) = client_next(self.channel, self.phase, kind) else {
            return Err(self.unexpected(kind));
        };
        match frame {
            Frame::Hello(answer) => {
                self.terms.accept(&self.offer, answer)?;
                self.agreed = Some(*answer);
            }
            Frame::Regions(regions) => self.geometry = Some(Geometry::new(regions.clone())?),
            Frame::Data(data) => {
                let granule = self.regions().check_data(data)?.granule;
                self.parts.data(data, granule)?;
            }
            Frame::Zero { span } => {
                self.regions().check(kind, *span)?;
                self.parts.zero()?;
            }
            Frame::Poison { span } => {
                self.regions().check(kind, *span)?;
                self.parts.poison(*span)?;
            }
            Frame::CompleteAck(theirs) => {
                let ours = self.sent_counts.unwrap_or_default();
                if *theirs != ours {
                    return Err(ProtocolError::CompletionMismatch { ours, theirs: *theirs });
                }
            }
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal.clone())),
            _ => {}
        }
        self.phase = next;
        Ok(())
    }

    fn regions(&self) -> &Geometry {
        self.geometry.as_ref().expect("no answer is legal before the regions are known")
    }
}
