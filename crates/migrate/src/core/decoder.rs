//! Bytes to frames.

use zerocopy::FromBytes;

use super::{
    Counts, DataHeader, Frame, HEADER_LEN, Hello, ImageBegin, ImageEnd, ImageStored, Kind,
    MAX_CHUNK, MAX_REGIONS, MAX_TEXT, ProtocolError, REGION_LEN, Refusal, RefusalCode, RegionInfo,
    WireSpan,
    frame::{FLAG_FRAGMENT, FLAG_PARENT, FLAG_PREFETCH, FRAME_MAGIC, RawHeader},
    hello::{HELLO_LEN, HELLO_MAX},
    images::{IMAGE_BEGIN_LEN, IMAGE_END_LEN, IMAGE_STORED_LEN},
};

/// What [`Decoder::feed`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Item<'a> {
    /// A whole frame. After [`Frame::Data`] its payload follows.
    Frame(Frame),
    /// A piece of the payload of the last `Data` frame.
    Payload(&'a [u8]),
}

#[derive(Debug)]
enum State {
    /// Gathering a header.
    Header { have: usize },
    /// Gathering the payload of a control frame.
    Control { header: RawHeader, kind: Kind },
    /// A data payload passes by.
    Payload { remaining: u32 },
    /// A violation was found; nothing after it means anything.
    Failed(ProtocolError),
}

/// Takes bytes in any split and yields frames.
///
/// Holds at most one control frame ([`MAX_CONTROL`](super::MAX_CONTROL) bytes), and memory for it
/// only as its bytes arrive. Data payloads are never held.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    header: [u8; HEADER_LEN],
    control: Vec<u8>,
    max_payload: u32,
}

impl Decoder {
    /// A decoder that takes `Data` payloads of up to `max_payload` bytes.
    #[must_use]
    pub fn new(max_payload: u32) -> Self {
        Self {
            state: State::Header { have: 0 },
            header: [0; HEADER_LEN],
            control: Vec::new(),
            max_payload,
        }
    }

    /// Sets the bound that the two hellos agreed on.
    pub fn set_max_payload(&mut self, max_payload: u32) {
        self.max_payload = max_payload;
    }

    /// Whether the bytes so far end between two frames.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header { have: 0 })
    }

    /// Bytes of a data payload still to come.
    #[must_use]
    pub fn payload_remaining(&self) -> u32 {
        match self.state {
            State::Payload { remaining } => remaining,
            _ => 0,
        }
    }

    /// Tells that `n` bytes of the data payload went by without [`feed`](Self::feed): the
    /// transport put them straight where they belong.
    ///
    /// # Panics
    /// If that is more than [`payload_remaining`](Self::payload_remaining).
    pub fn payload_taken(&mut self, n: u32) {
        if n == 0 {
            return;
        }
        let State::Payload { remaining } = &mut self.state else {
            panic!("no payload is being received")
        };
        *remaining = remaining.checked_sub(n).expect("more taken than the payload has");
        if *remaining == 0 {
            self.state = State::Header { have: 0 };
        }
    }

    /// Takes bytes from the front of `input` until something is complete; returns how many it
    /// took and what is complete. `None` means that all were taken and more are needed.
    ///
    /// # Errors
    /// The first violation found, and that same one for ever after.
    pub fn feed<'a>(
        &mut self,
        input: &'a [u8],
    ) -> Result<(usize, Option<Item<'a>>), ProtocolError> {
        self.advance(input).inspect_err(|error| self.state = State::Failed(error.clone()))
    }

    fn advance<'a>(&mut self, input: &'a [u8]) -> Result<(usize, Option<Item<'a>>), ProtocolError> {
        let mut taken = 0;
        loop {
            let rest = &input[taken..];
            match &mut self.state {
                State::Failed(error) => return Err(error.clone()),
                State::Payload { remaining } => {
                    let n = rest.len().min(*remaining as usize);
                    if n == 0 {
                        return Ok((taken, None));
                    }
                    self.payload_taken(n as u32);
                    return Ok((taken + n, Some(Item::Payload(&rest[..n]))));
                }
                State::Header { have } => {
                    let n = rest.len().min(HEADER_LEN - *have);
                    self.header[*have..*have + n].copy_from_slice(&rest[..n]);
                    *have += n;
                    taken += n;
                    if *have < HEADER_LEN {
                        return Ok((taken, None));
                    }
                    if let Some(frame) = self.header_complete()? {
                        return Ok((taken, Some(Item::Frame(frame))));
                    }
                }
                State::Control { header, kind } => {
                    let (header, kind) = (*header, *kind);
                    let n = rest.len().min(header.length.get() as usize - self.control.len());
                    self.control.extend_from_slice(&rest[..n]);
                    taken += n;
                    if self.control.len() < header.length.get() as usize {
                        return Ok((taken, None));
                    }
                    let frame = control_frame(kind, &header, &self.control)?;
                    self.control = Vec::new();
                    self.state = State::Header { have: 0 };
                    return Ok((taken, Some(Item::Frame(frame))));
                }
            }
        }
    }

    /// All 32 bytes are there: yields the frame, or moves on to gather its payload.
    fn header_complete(&mut self) -> Result<Option<Frame>, ProtocolError> {
        let header =
            RawHeader::read_from_bytes(&self.header).expect("the buffer has the size of a header");
        let kind = check_header(&header, self.max_payload)?;
        self.state = State::Header { have: 0 };
        let frame = match kind {
            Kind::Data => {
                self.state = State::Payload { remaining: header.length.get() };
                Frame::Data(DataHeader {
                    span: span(&header),
                    length: header.length.get(),
                    fragment: (header.flags & FLAG_FRAGMENT != 0).then(|| header.aux.get()),
                })
            }
            // Every other payload is a control frame's: `check_header` has bounded it.
            _ if header.length.get() != 0 => {
                self.state = State::Control { header, kind };
                return Ok(None);
            }
            _ => control_frame(kind, &header, &[])?,
        };
        Ok(Some(frame))
    }
}

fn span(header: &RawHeader) -> WireSpan {
    WireSpan { region: header.region.get(), first: header.first.get(), count: header.count.get() }
}

/// Checks everything about a header that needs no region.
fn check_header(header: &RawHeader, max_payload: u32) -> Result<Kind, ProtocolError> {
    if header.magic.get() != FRAME_MAGIC {
        return Err(ProtocolError::BadMagic { got: header.magic.get() });
    }
    let kind = Kind::from_wire(header.kind).ok_or(ProtocolError::UnknownKind(header.kind))?;
    let length = header.length.get();
    let bad_length =
        |expected: String| ProtocolError::PayloadLength { kind, got: u64::from(length), expected };

    // Which of region+first, count, aux and flags this kind uses.
    let (place, count, aux, flags) = match kind {
        Kind::Hello | Kind::Bye | Kind::ImageEnd | Kind::ImageAbort | Kind::ImageStored => {
            (false, false, false, 0)
        }
        Kind::Regions => (false, true, false, 0),
        Kind::Request => (true, true, false, FLAG_PREFETCH),
        Kind::Expedite | Kind::Zero | Kind::Poison | Kind::Gone => (true, true, false, 0),
        Kind::Data => (true, true, header.flags & FLAG_FRAGMENT != 0, FLAG_FRAGMENT),
        Kind::Complete | Kind::CompleteAck => (true, false, true, 0),
        Kind::Error | Kind::Ping | Kind::Pong | Kind::ImageMetadata | Kind::ImageMappings => {
            (false, false, true, 0)
        }
        Kind::ImageBegin => (false, false, false, FLAG_PARENT),
    };
    let counts_only = matches!(kind, Kind::Complete | Kind::CompleteAck);
    let not_zero = |field| Err(ProtocolError::NotZero { kind, field });
    if header.reserved.get() != 0 {
        return not_zero("the reserved field");
    }
    if header.flags & !flags != 0 {
        return not_zero("an unknown flag");
    }
    if (!place || counts_only) && header.region.get() != 0 {
        return not_zero("the region");
    }
    if !place && header.first.get() != 0 {
        return not_zero("the first granule");
    }
    if !count && header.count.get() != 0 {
        return not_zero("the count");
    }
    if !aux && header.aux.get() != 0 {
        return not_zero("the auxiliary field");
    }

    let exactly = |expected: usize| {
        if length as usize == expected {
            Ok(())
        } else {
            Err(bad_length(format!("exactly {expected} needed")))
        }
    };
    match kind {
        Kind::Data if length == 0 || length > max_payload => {
            return Err(bad_length(format!("1 to {max_payload} allowed")));
        }
        Kind::Hello if !(HELLO_LEN as u32..=HELLO_MAX).contains(&length) => {
            return Err(bad_length(format!("{HELLO_LEN} to {HELLO_MAX} allowed")));
        }
        Kind::Regions => {
            if header.count.get() > MAX_REGIONS {
                return Err(ProtocolError::TooManyRegions(header.count.get()));
            }
            let expected = header.count.get() * REGION_LEN as u32;
            if length != expected {
                return Err(bad_length(format!("its regions have {expected}")));
            }
        }
        Kind::Error | Kind::ImageAbort if length > MAX_TEXT => {
            return Err(bad_length(format!("at most {MAX_TEXT} allowed")));
        }
        Kind::ImageMetadata | Kind::ImageMappings if length == 0 || length > MAX_CHUNK => {
            return Err(bad_length(format!("1 to {MAX_CHUNK} allowed")));
        }
        Kind::ImageBegin => exactly(IMAGE_BEGIN_LEN)?,
        Kind::ImageEnd => exactly(IMAGE_END_LEN)?,
        Kind::ImageStored => exactly(IMAGE_STORED_LEN)?,
        Kind::Data
        | Kind::Hello
        | Kind::Error
        | Kind::ImageAbort
        | Kind::ImageMetadata
        | Kind::ImageMappings => {}
        _ if length != 0 => return Err(bad_length("none allowed".into())),
        _ => {}
    }
    Ok(kind)
}

/// Builds any frame but `Data` from its checked header and its payload.
fn control_frame(kind: Kind, header: &RawHeader, payload: &[u8]) -> Result<Frame, ProtocolError> {
    let counts = || Counts { filled: header.first.get(), poisoned: header.aux.get() };
    let nonce = header.aux.get();
    Ok(match kind {
        Kind::Hello => Frame::Hello(Hello::from_bytes(payload)?),
        Kind::Regions => Frame::Regions(
            payload.as_chunks::<REGION_LEN>().0.iter().map(RegionInfo::from_bytes).collect(),
        ),
        Kind::Request => {
            Frame::Request { span: span(header), prefetch: header.flags & FLAG_PREFETCH != 0 }
        }
        Kind::Expedite => Frame::Expedite { span: span(header) },
        Kind::Data => unreachable!("a data frame's payload is never gathered"),
        Kind::Zero => Frame::Zero { span: span(header) },
        Kind::Poison => Frame::Poison { span: span(header) },
        Kind::Complete => Frame::Complete(counts()),
        Kind::CompleteAck => Frame::CompleteAck(counts()),
        Kind::Error => {
            let code = u16::try_from(nonce).map_err(|_| ProtocolError::NotZero {
                kind,
                field: "the upper part of the code",
            })?;
            Frame::Error(Refusal::new(
                RefusalCode::from_wire(code),
                &String::from_utf8_lossy(payload),
            ))
        }
        Kind::Bye => Frame::Bye,
        Kind::Ping => Frame::Ping { nonce },
        Kind::Pong => Frame::Pong { nonce },
        Kind::ImageBegin => {
            let has_parent = header.flags & FLAG_PARENT != 0;
            Frame::ImageBegin(ImageBegin::from_bytes(payload, has_parent)?)
        }
        Kind::ImageMetadata => Frame::ImageMetadata { offset: nonce, bytes: payload.to_vec() },
        Kind::ImageMappings => Frame::ImageMappings { offset: nonce, bytes: payload.to_vec() },
        Kind::Gone => Frame::Gone { span: span(header) },
        Kind::ImageEnd => Frame::ImageEnd(ImageEnd::from_bytes(payload)?),
        Kind::ImageAbort => Frame::abort(&String::from_utf8_lossy(payload)),
        Kind::ImageStored => Frame::ImageStored(ImageStored::from_bytes(payload)?),
    })
}
