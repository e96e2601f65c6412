//! Reading a peer's memory without taking it over.

use std::time::Duration;

use crate::{
    Endpoint, MigrateError, PeerOptions,
    core::{
        ClientSession, Encoder, Frame, Geometry, Outstanding, ProtocolError, RegionInfo, Role,
        Terms, WireSpan,
    },
    net::FrameReader,
    peer::{Link, lock, new_session, open},
};

/// A blocking reader of a peer's memory: to verify a copy against its source.
///
/// It has one connection and no thread. The server drops a reader that is silent for longer than
/// the server's idle timeout.
pub struct PeerReader {
    link: Link,
    reader: FrameReader,
    geometry: Geometry,
    owed: Outstanding,
    options: PeerOptions,
}

impl std::fmt::Debug for PeerReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerReader").field("regions", &self.regions()).finish_non_exhaustive()
    }
}

impl PeerReader {
    /// Connects and learns the peer's regions.
    ///
    /// # Errors
    /// [`MigrateError::Connect`], or what went wrong in the handshake.
    pub fn connect(endpoint: &Endpoint, options: PeerOptions) -> Result<Self, MigrateError> {
        let terms = Terms { max_payload: options.max_payload, ..Terms::default() };
        let session = ClientSession::demand(terms, Role::Reader, new_session()?);
        let (link, reader) = open(endpoint, session, &options)?;
        let geometry = lock(&link.session).geometry().cloned().expect("the regions have come");
        let owed = Outstanding::new(geometry.regions().iter().map(RegionInfo::granules));
        Ok(Self { link, reader, geometry, owed, options })
    }

    /// What the peer holds.
    #[must_use]
    pub fn regions(&self) -> &[RegionInfo] {
        self.geometry.regions()
    }

    /// Reads `span` into `bytes`, which must have its size.
    ///
    /// # Errors
    /// [`MigrateError::Poisoned`] if a part of it can never come: everything else of it is in
    /// `bytes` then, and the reader can go on. Any other error but [`MigrateError::Mismatch`]
    /// ends the connection.
    pub fn read(&mut self, span: WireSpan, bytes: &mut [u8]) -> Result<(), MigrateError> {
        let index = self.geometry.regions().partition_point(|region| region.id < span.region);
        let region = self.geometry.check(crate::core::Kind::Request, span)?;
        let granule = region.granule;
        let expected = u64::from(span.count).checked_mul(granule);
        if expected != Some(bytes.len() as u64) {
            return Err(MigrateError::Mismatch(format!(
                "{span}: a buffer of {} bytes for {} granules of {granule}",
                bytes.len(),
                span.count
            )));
        }
        let place = |wire: WireSpan| {
            let from = (wire.first - span.first) * granule;
            from as usize..(from + u64::from(wire.count) * granule) as usize
        };
        let Self { link, reader, owed, options, .. } = self;
        owed.owe(index, span.first, u64::from(span.count));
        let send = |frame: &[u8], what| {
            link.send(frame).map_err(|error| MigrateError::Io { what, error: error.into() })
        };
        send(&Encoder::request(span, false), "sending a request")?;
        let mut idle = |silent: Duration| {
            if silent >= options.idle_timeout {
                return Err(MigrateError::Silent { after: silent });
            }
            send(&Encoder::ping(silent.as_millis() as u64), "sending a keep-alive")
        };
        let mut poisoned = None;
        while owed.total() > 0 {
            let frame = reader.next(&mut idle)?;
            // A granule in parts is taken off what is owed with its first part.
            let continued = lock(&link.session).in_fragment();
            lock(&link.session).receive(&frame)?;
            let answered = match &frame {
                Frame::Data(data) => data.span,
                Frame::Zero { span } | Frame::Poison { span } => *span,
                Frame::Bye => return Err(MigrateError::Left),
                Frame::Ping { nonce } => {
                    send(&Encoder::pong(*nonce), "sending a keep-alive")?;
                    continue;
                }
                _ => continue,
            };
            if !continued {
                let unsolicited = |granule| ProtocolError::Unsolicited { span: answered, granule };
                let position = self.geometry.regions().partition_point(|r| r.id < answered.region);
                owed.take(position, answered.first, u64::from(answered.count))
                    .map_err(unsolicited)?;
            }
            let place = &mut bytes[place(answered)];
            match frame {
                Frame::Data(data) => {
                    let from = data.fragment.unwrap_or(0) as usize;
                    let place = &mut place[from..from + data.length as usize];
                    reader.payload(place, &mut idle)?;
                    if lock(&link.session).in_fragment() {
                        continue;
                    }
                }
                Frame::Zero { .. } => place.fill(0),
                _ => {
                    poisoned.get_or_insert(answered.first);
                }
            }
            owed.settled(u64::from(answered.count));
        }
        match poisoned {
            Some(granule) => Err(MigrateError::Poisoned { span, granule }),
            None => Ok(()),
        }
    }
}

impl Drop for PeerReader {
    fn drop(&mut self) {
        self.link.say_goodbye();
        self.link.shutdown();
    }
}
