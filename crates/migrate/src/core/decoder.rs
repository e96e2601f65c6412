//! Bytes to frames.

use zerocopy::FromBytes;

use super::{
    AcceptedRegion, Belief, Codec, Counts, DataHeader, Frame, HEADER_LEN, Hello, ImageBegin,
    ImageEnd, ImageStored, Kind, PackedHeader, ProtocolError, REGION_LEN, Refusal, RefusalCode,
    RegionInfo, StateInfo, UnitRun, WireSpan,
    frame::{FLAG_FRAGMENT, FLAG_PARENT, FLAG_PREFETCH, RawHeader},
    guest::{ACCEPT_LEN, RUN_LEN},
    layout::check_header,
};

/// What [`Decoder::feed`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Item<'a> {
    /// A whole frame. After [`Frame::Data`] and [`Frame::Packed`] its payload follows.
    Frame(Frame),
    /// A piece of the payload of the last `Data` or `Packed` frame.
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
/// only as its bytes arrive. Payloads of pages are never held.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    header: [u8; HEADER_LEN],
    control: Vec<u8>,
    max_payload: u32,
}

impl Decoder {
    /// A decoder that takes payloads of pages of up to `max_payload` bytes.
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
            Kind::Packed => {
                let codec = Codec::from_wire(header.aux.get())?;
                self.state = State::Payload { remaining: header.length.get() };
                Frame::Packed(PackedHeader {
                    span: span(&header),
                    codec,
                    length: header.length.get(),
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

/// Reads the code and text of an `Error` or `Cancel` frame.
fn refusal(kind: Kind, header: &RawHeader, payload: &[u8]) -> Result<Refusal, ProtocolError> {
    let code = u16::try_from(header.aux.get())
        .map_err(|_| ProtocolError::NotZero { kind, field: "the upper part of the code" })?;
    Ok(Refusal::new(RefusalCode::from_wire(code), &String::from_utf8_lossy(payload)))
}

fn runs(payload: &[u8]) -> Vec<UnitRun> {
    payload.as_chunks::<RUN_LEN>().0.iter().map(UnitRun::from_bytes).collect()
}

/// Builds any frame but those of pages from its checked header and its payload.
fn control_frame(kind: Kind, header: &RawHeader, payload: &[u8]) -> Result<Frame, ProtocolError> {
    let (region, first, aux) = (header.region.get(), header.first.get(), header.aux.get());
    let counts = || Counts { filled: first, poisoned: aux };
    Ok(match kind {
        Kind::Hello => Frame::Hello(Hello::from_bytes(payload)?),
        Kind::Regions => Frame::Regions(
            payload.as_chunks::<REGION_LEN>().0.iter().map(RegionInfo::from_bytes).collect(),
        ),
        Kind::Request => {
            Frame::Request { span: span(header), prefetch: header.flags & FLAG_PREFETCH != 0 }
        }
        Kind::Expedite => Frame::Expedite { span: span(header) },
        Kind::Data | Kind::Packed => unreachable!("payloads of pages are never gathered"),
        Kind::Zero => Frame::Zero { span: span(header) },
        Kind::Poison => Frame::Poison { span: span(header) },
        Kind::Complete => Frame::Complete(counts()),
        Kind::CompleteAck => Frame::CompleteAck(counts()),
        Kind::Error => Frame::Error(refusal(kind, header, payload)?),
        Kind::Bye => Frame::Bye,
        Kind::Ping => Frame::Ping { nonce: aux },
        Kind::Pong => Frame::Pong { nonce: aux },
        Kind::ImageBegin => {
            let has_parent = header.flags & FLAG_PARENT != 0;
            Frame::ImageBegin(ImageBegin::from_bytes(payload, has_parent)?)
        }
        Kind::ImageMetadata => Frame::ImageMetadata { offset: aux, bytes: payload.to_vec() },
        Kind::ImageMappings => Frame::ImageMappings { offset: aux, bytes: payload.to_vec() },
        Kind::Gone => Frame::Gone { span: span(header) },
        Kind::ImageEnd => Frame::ImageEnd(ImageEnd::from_bytes(payload)?),
        Kind::ImageAbort => Frame::abort(&String::from_utf8_lossy(payload)),
        Kind::ImageStored => Frame::ImageStored(ImageStored::from_bytes(payload)?),
        Kind::Accept => {
            let entries = payload.as_chunks::<ACCEPT_LEN>().0.iter();
            Frame::Accept(entries.map(AcceptedRegion::from_bytes).collect::<Result<_, _>>()?)
        }
        Kind::RoundBegin => Frame::RoundBegin { round: aux, units: first },
        Kind::RoundEnd => Frame::RoundEnd { round: aux, units: first },
        Kind::RoundAck => Frame::RoundAck { round: aux, units: first },
        Kind::StateBegin => Frame::StateBegin(StateInfo::from_bytes(payload)?),
        Kind::State => Frame::State { offset: aux, bytes: payload.to_vec() },
        Kind::Missing => Frame::Missing { region, runs: runs(payload) },
        Kind::Switch => Frame::Switch { round: aux, missing: first },
        Kind::Ready => Frame::Ready { missing: first },
        Kind::Run => Frame::Run,
        Kind::Running => Frame::Running,
        Kind::Cancel => Frame::Cancel(refusal(kind, header, payload)?),
        Kind::Cancelled => Frame::Cancelled,
        Kind::Resume => Frame::Resume(Belief::from_wire(aux)?),
        Kind::Dropped => Frame::Dropped,
        Kind::Have => Frame::Have { region, runs: runs(payload) },
        Kind::HaveEnd => Frame::HaveEnd { present: first, poisoned: aux },
    })
}
