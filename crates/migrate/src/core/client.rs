//! The destination's (or a reader's) end of one connection.

use super::{
    Channel, Counts, Frame, Geometry, Hello, Kind, Phase, ProtocolError, Role, SessionId, Terms,
    WireSpan, client_next,
};

/// A granule that is being received in parts.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
struct Fragment {
    region: u16,
    granule: u64,
    next: u64,
}

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
    fragment: Option<Fragment>,
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
            fragment: None,
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
        self.fragment.is_some()
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
                self.sequence(data.span, data.fragment, data.length, granule)?;
            }
            Frame::Zero { span } => {
                self.regions().check(kind, *span)?;
                self.no_fragment("a zero answer")?;
            }
            Frame::Poison { span } => {
                self.regions().check(kind, *span)?;
                let begun = self.fragment.map(|f| WireSpan {
                    region: f.region,
                    first: f.granule,
                    count: 1,
                });
                if begun == Some(*span) {
                    self.fragment = None;
                }
                self.no_fragment("a poison answer")?;
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

    fn no_fragment(&self, what: &'static str) -> Result<(), ProtocolError> {
        match self.fragment {
            None => Ok(()),
            Some(Fragment { region, granule, next }) => {
                Err(ProtocolError::Fragment { region, granule, expected: next, what })
            }
        }
    }

    /// Parts of a granule come in order, from 0 on, with no other answer among them.
    fn sequence(
        &mut self,
        span: WireSpan,
        fragment: Option<u64>,
        length: u32,
        granule_len: u64,
    ) -> Result<(), ProtocolError> {
        let Some(offset) = fragment else {
            return self.no_fragment("another granule's data");
        };
        let due =
            self.fragment.unwrap_or(Fragment { region: span.region, granule: span.first, next: 0 });
        if (due.region, due.granule, due.next) != (span.region, span.first, offset) {
            return Err(ProtocolError::Fragment {
                region: due.region,
                granule: due.granule,
                expected: due.next,
                what: "another part",
            });
        }
        let next = offset + u64::from(length);
        self.fragment = (next < granule_len).then_some(Fragment { next, ..due });
        Ok(())
    }
}
