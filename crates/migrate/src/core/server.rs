//! The source's end of one connection.

use super::{
    Channel, Frame, Geometry, Hello, Kind, Phase, ProtocolError, RefusalCode, Role, Terms,
    server_next,
};

/// What one connection of a source may receive, and what it has agreed on.
///
/// Every frame received goes through [`receive`](Self::receive), which refuses by name what may
/// not come now or does not fit the regions.
#[derive(Debug)]
pub struct ServerSession {
    terms: Terms,
    geometry: Geometry,
    phase: Phase,
    agreed: Option<Hello>,
    role: Role,
}

impl ServerSession {
    /// A connection on which nothing has come yet.
    #[must_use]
    pub fn new(terms: Terms, geometry: Geometry) -> Self {
        Self { terms, geometry, phase: Phase::Greeting, agreed: None, role: Role::Source }
    }

    /// Where the connection stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The regions stated.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The answer to the peer's hello, once that has come. To be sent, followed on the demand
    /// channel by the regions.
    #[must_use]
    pub fn agreed(&self) -> Option<&Hello> {
        self.agreed.as_ref()
    }

    /// The peer's role; meaningful once [`agreed`](Self::agreed).
    #[must_use]
    pub fn peer_role(&self) -> Role {
        self.role
    }

    fn channel(&self) -> Channel {
        self.agreed.map_or(Channel::Demand, |hello| hello.channel)
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
        let unexpected =
            ProtocolError::Unexpected { kind, channel: self.channel(), phase: self.phase };
        let next = server_next(self.channel(), self.phase, kind).ok_or(unexpected.clone())?;
        match frame {
            Frame::Hello(offer) => {
                self.agreed = Some(self.terms.answer(offer)?);
                self.role = offer.role;
            }
            Frame::Request { span, prefetch } => {
                self.geometry.check(kind, *span)?;
                if *prefetch != (self.channel() == Channel::Background) {
                    return Err(ProtocolError::WrongChannel(self.channel()));
                }
            }
            Frame::Expedite { span } => {
                self.geometry.check(kind, *span)?;
                if self.role == Role::Reader {
                    return Err(unexpected);
                }
            }
            Frame::Complete(_) if self.role == Role::Reader => return Err(unexpected),
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal.clone())),
            _ => {}
        }
        self.phase = next;
        Ok(())
    }

    /// The code of the `Error` frame that tells the peer of `error`.
    #[must_use]
    pub fn code(error: &ProtocolError) -> RefusalCode {
        error.code()
    }

    /// Whether `kind` may be sent to the peer now; for tests of the two tables against each other.
    #[must_use]
    pub fn may_receive(&self, kind: Kind) -> bool {
        server_next(self.channel(), self.phase, kind).is_some()
    }
}
