//! Frames: the header's 32 bytes and what they mean.

use std::fmt;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::{
    AcceptedRegion, Belief, Hello, ImageBegin, ImageEnd, ImageStored, Kind, PackedHeader,
    RegionInfo, StateInfo, UnitRun,
};

/// Bytes of every frame's header.
pub const HEADER_LEN: usize = 32;
/// The first two bytes of every frame, `PF`, as a little-endian number.
pub const FRAME_MAGIC: u16 = u16::from_le_bytes(*b"PF");
/// Most regions that a source may state.
pub const MAX_REGIONS: u32 = 4096;
/// Longest text of an error frame, in bytes.
pub const MAX_TEXT: u32 = 1024;
/// Longest payload of any frame but `Data`, in bytes: the most that a decoder ever holds.
pub const MAX_CONTROL: u32 = MAX_REGIONS * super::REGION_LEN as u32;

/// The header as it lies on the wire.
#[derive(Copy, Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: U16,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) region: U16,
    pub(super) reserved: U16,
    pub(super) count: U32,
    pub(super) length: U32,
    pub(super) first: U64,
    pub(super) aux: U64,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// `Request`: nobody waits for it yet.
pub(super) const FLAG_PREFETCH: u8 = 1;
/// `Data`: one part of one granule.
pub(super) const FLAG_FRAGMENT: u8 = 1;
/// `ImageBegin`: the image has a parent.
pub(super) const FLAG_PARENT: u8 = 1;

/// A run of granules as the wire names it. Not checked against any region.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WireSpan {
    /// The region's id.
    pub region: u16,
    /// Index of the first granule.
    pub first: u64,
    /// Number of granules.
    pub count: u32,
}

impl WireSpan {
    /// One past the last granule; `None` if there is no such number.
    #[must_use]
    pub fn end(self) -> Option<u64> {
        self.first.checked_add(u64::from(self.count))
    }
}

impl fmt::Display for WireSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {} granules {}+{}", self.region, self.first, self.count)
    }
}

/// What a connection is for.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Channel {
    /// Somebody waits for every answer.
    Demand,
    /// Nobody waits yet.
    Background,
    /// Whole images, one after the other. The only connection of its session.
    Images,
    /// A guest's migration: what decides. Pages and requests too, where nothing else carries them.
    Control,
    /// A guest's migration: pages that nobody has asked for.
    Pages,
    /// A guest's migration: requests, and their answers.
    Faults,
}

impl Channel {
    /// Every channel, in wire order.
    pub const ALL: [Self; 6] =
        [Self::Demand, Self::Background, Self::Images, Self::Control, Self::Pages, Self::Faults];

    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u8 {
        self as u8 + 1
    }

    /// The channel with this number.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Demand => "demand",
            Self::Background => "background",
            Self::Images => "images",
            Self::Control => "control",
            Self::Pages => "pages",
            Self::Faults => "faults",
        })
    }
}

/// How many granules were answered in a session, and how.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// By data or as zero.
    pub filled: u64,
    /// As poisoned.
    pub poisoned: u64,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} filled and {} poisoned", self.filled, self.poisoned)
    }
}

/// What a `Data` frame's header says of the payload that follows it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct DataHeader {
    /// The granules answered; exactly one when `fragment` is there.
    pub span: WireSpan,
    /// Payload bytes.
    pub length: u32,
    /// The payload is the part at this offset (in bytes) of one granule.
    pub fragment: Option<u64>,
}

/// Why a peer gives up, by number.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum RefusalCode {
    /// The other side broke the protocol.
    Protocol,
    /// No version in common.
    Version,
    /// Role, channel or features do not go together.
    Hello,
    /// No room for another session or connection.
    Busy,
    /// A background channel for a session that does not exist.
    UnknownSession,
    /// The session has this channel already.
    DuplicateChannel,
    /// The session's other channel did not come in time.
    Unpaired,
    /// The counts of a completion differ.
    Counts,
    /// Nothing was heard for too long.
    Silent,
    /// The process is about to stop.
    Stopping,
    /// The memory does not fit.
    Mismatch,
    /// An image cannot be stored.
    Storage,
    /// More than this side takes.
    Limit,
    /// There is not enough memory.
    Memory,
    /// The device state cannot be loaded.
    Device,
    /// Somebody who may asked for it.
    Asked,
    /// The guest writes faster than it can be sent.
    NotConverging,
    /// It took longer than it may.
    TimedOut,
    /// A number this version has no name for.
    Other(u16),
}

impl RefusalCode {
    const NAMED: [(u16, Self); 18] = [
        (1, Self::Protocol),
        (2, Self::Version),
        (3, Self::Hello),
        (4, Self::Busy),
        (5, Self::UnknownSession),
        (6, Self::DuplicateChannel),
        (7, Self::Unpaired),
        (8, Self::Counts),
        (9, Self::Silent),
        (10, Self::Stopping),
        (11, Self::Mismatch),
        (12, Self::Storage),
        (13, Self::Limit),
        (14, Self::Memory),
        (15, Self::Device),
        (16, Self::Asked),
        (17, Self::NotConverging),
        (18, Self::TimedOut),
    ];

    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u16 {
        match self {
            Self::Other(number) => number,
            named => Self::NAMED.iter().find(|(_, code)| *code == named).map_or(0, |(n, _)| *n),
        }
    }

    /// The code with this number.
    #[must_use]
    pub fn from_wire(number: u16) -> Self {
        Self::NAMED
            .iter()
            .find(|(n, _)| *n == number)
            .map_or(Self::Other(number), |(_, code)| *code)
    }
}

/// An `Error` frame: a code to act on and a text to show.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// To act on.
    pub code: RefusalCode,
    /// To show. At most [`MAX_TEXT`] bytes, without control characters.
    pub text: String,
}

impl Refusal {
    /// A refusal with `text` cut to what the wire takes.
    #[must_use]
    pub fn new(code: RefusalCode, text: &str) -> Self {
        Self { code, text: clean_text(text) }
    }
}

/// `text` without control characters, and cut to [`MAX_TEXT`] bytes.
pub(super) fn clean_text(text: &str) -> String {
    let mut clean = String::new();
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if clean.len() + c.len_utf8() > MAX_TEXT as usize {
            break;
        }
        clean.push(c);
    }
    clean
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, self.text)
    }
}

/// One frame. The payload of a `Data` or `Packed` frame is not part of the value: it goes straight
/// from the transport to where it belongs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frame {
    /// See [`Kind::Hello`].
    Hello(Hello),
    /// See [`Kind::Regions`].
    Regions(Vec<RegionInfo>),
    /// See [`Kind::Request`].
    Request {
        /// What is wanted.
        span: WireSpan,
        /// Nobody waits for it yet.
        prefetch: bool,
    },
    /// See [`Kind::Expedite`].
    Expedite {
        /// What is now waited for.
        span: WireSpan,
    },
    /// See [`Kind::Data`].
    Data(DataHeader),
    /// See [`Kind::Zero`].
    Zero {
        /// What is all zero.
        span: WireSpan,
    },
    /// See [`Kind::Poison`].
    Poison {
        /// What can never come.
        span: WireSpan,
    },
    /// See [`Kind::Complete`].
    Complete(Counts),
    /// See [`Kind::CompleteAck`].
    CompleteAck(Counts),
    /// See [`Kind::Error`].
    Error(Refusal),
    /// See [`Kind::Bye`].
    Bye,
    /// See [`Kind::Ping`].
    Ping {
        /// Comes back in the pong.
        nonce: u64,
    },
    /// See [`Kind::Pong`].
    Pong {
        /// The ping's.
        nonce: u64,
    },
    /// See [`Kind::ImageBegin`].
    ImageBegin(ImageBegin),
    /// See [`Kind::ImageMetadata`].
    ImageMetadata {
        /// Where in the metadata these bytes belong.
        offset: u64,
        /// The bytes: 1 to [`MAX_CHUNK`](super::MAX_CHUNK).
        bytes: Vec<u8>,
    },
    /// See [`Kind::ImageMappings`].
    ImageMappings {
        /// Where in the table these bytes belong.
        offset: u64,
        /// The bytes: 1 to [`MAX_CHUNK`](super::MAX_CHUNK).
        bytes: Vec<u8>,
    },
    /// See [`Kind::Gone`].
    Gone {
        /// What is no longer memory.
        span: WireSpan,
    },
    /// See [`Kind::ImageEnd`].
    ImageEnd(ImageEnd),
    /// See [`Kind::ImageAbort`].
    ImageAbort {
        /// To show. At most [`MAX_TEXT`] bytes, without control characters.
        reason: String,
    },
    /// See [`Kind::ImageStored`].
    ImageStored(ImageStored),
    /// See [`Kind::Accept`].
    Accept(Vec<AcceptedRegion>),
    /// See [`Kind::RoundBegin`].
    RoundBegin {
        /// Counted from 1.
        round: u64,
        /// Units that it will carry at most; for showing progress.
        units: u64,
    },
    /// See [`Kind::RoundEnd`].
    RoundEnd {
        /// The round begun last.
        round: u64,
        /// Units sent since the session began: on this connection; on control, on all.
        units: u64,
    },
    /// See [`Kind::RoundAck`].
    RoundAck {
        /// The round that has come.
        round: u64,
        /// Units received since the session began, on all connections.
        units: u64,
    },
    /// See [`Kind::Packed`].
    Packed(PackedHeader),
    /// See [`Kind::StateBegin`].
    StateBegin(StateInfo),
    /// See [`Kind::State`].
    State {
        /// Where in the state these bytes belong.
        offset: u64,
        /// The bytes: 1 to [`MAX_CHUNK`](super::MAX_CHUNK).
        bytes: Vec<u8>,
    },
    /// See [`Kind::Missing`].
    Missing {
        /// The region.
        region: u16,
        /// Whole granules of the destination, ascending: 1 to [`MAX_RUNS`](super::MAX_RUNS).
        runs: Vec<UnitRun>,
    },
    /// See [`Kind::Switch`].
    Switch {
        /// The last round; 0 if there was none.
        round: u64,
        /// Units missing in all.
        missing: u64,
    },
    /// See [`Kind::Ready`].
    Ready {
        /// Units that are missing still.
        missing: u64,
    },
    /// See [`Kind::Run`].
    Run,
    /// See [`Kind::Running`].
    Running,
    /// See [`Kind::Cancel`].
    Cancel(Refusal),
    /// See [`Kind::Cancelled`].
    Cancelled,
    /// See [`Kind::Resume`].
    Resume(Belief),
    /// See [`Kind::Dropped`].
    Dropped,
    /// See [`Kind::Have`].
    Have {
        /// The region.
        region: u16,
        /// Whole granules, ascending: 1 to [`MAX_RUNS`](super::MAX_RUNS).
        runs: Vec<UnitRun>,
    },
    /// See [`Kind::HaveEnd`].
    HaveEnd {
        /// Units present in all.
        present: u64,
        /// Units of those that can never come.
        poisoned: u64,
    },
}

impl Frame {
    /// The image begun is given up, for `reason`, which is cut to what the wire takes.
    #[must_use]
    pub fn abort(reason: &str) -> Self {
        Self::ImageAbort { reason: clean_text(reason) }
    }

    /// The frame's kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Regions(_) => Kind::Regions,
            Self::Request { .. } => Kind::Request,
            Self::Expedite { .. } => Kind::Expedite,
            Self::Data(_) => Kind::Data,
            Self::Zero { .. } => Kind::Zero,
            Self::Poison { .. } => Kind::Poison,
            Self::Complete(_) => Kind::Complete,
            Self::CompleteAck(_) => Kind::CompleteAck,
            Self::Error(_) => Kind::Error,
            Self::Bye => Kind::Bye,
            Self::Ping { .. } => Kind::Ping,
            Self::Pong { .. } => Kind::Pong,
            Self::ImageBegin(_) => Kind::ImageBegin,
            Self::ImageMetadata { .. } => Kind::ImageMetadata,
            Self::ImageMappings { .. } => Kind::ImageMappings,
            Self::Gone { .. } => Kind::Gone,
            Self::ImageEnd(_) => Kind::ImageEnd,
            Self::ImageAbort { .. } => Kind::ImageAbort,
            Self::ImageStored(_) => Kind::ImageStored,
            Self::Accept(_) => Kind::Accept,
            Self::RoundBegin { .. } => Kind::RoundBegin,
            Self::RoundEnd { .. } => Kind::RoundEnd,
            Self::RoundAck { .. } => Kind::RoundAck,
            Self::Packed(_) => Kind::Packed,
            Self::StateBegin(_) => Kind::StateBegin,
            Self::State { .. } => Kind::State,
            Self::Missing { .. } => Kind::Missing,
            Self::Switch { .. } => Kind::Switch,
            Self::Ready { .. } => Kind::Ready,
            Self::Run => Kind::Run,
            Self::Running => Kind::Running,
            Self::Cancel(_) => Kind::Cancel,
            Self::Cancelled => Kind::Cancelled,
            Self::Resume(_) => Kind::Resume,
            Self::Dropped => Kind::Dropped,
            Self::Have { .. } => Kind::Have,
            Self::HaveEnd { .. } => Kind::HaveEnd,
        }
    }
}
