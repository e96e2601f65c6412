//! The names of everything a peer can do wrong.

use std::fmt;

use super::{
    frame::{Channel, Counts, Refusal, RefusalCode, WireSpan},
    images::{ImageCounts, ImageId, ImageTotals},
};

/// The kinds of frame, by the number they have on the wire.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Versions, role, features, session and channel: the first frame each way.
    Hello = 1,
    /// What the source holds.
    Regions = 2,
    /// A span is wanted.
    Request = 3,
    /// A span asked for in the background is now waited for.
    Expedite = 4,
    /// Bytes of a span.
    Data = 5,
    /// A span is all zero.
    Zero = 6,
    /// A span can never come.
    Poison = 7,
    /// The destination has everything; its counts.
    Complete = 8,
    /// The source agrees; its counts.
    CompleteAck = 9,
    /// The sender gives up, and says why.
    Error = 10,
    /// The sender leaves on purpose.
    Bye = 11,
    /// Are you there?
    Ping = 12,
    /// Yes.
    Pong = 13,
    /// An image begins: its identity, its parent, how much describes it.
    ImageBegin = 14,
    /// A part of what the sender's user says about the image.
    ImageMetadata = 15,
    /// A part of the table of mappings.
    ImageMappings = 16,
    /// Pages that are no longer memory.
    Gone = 17,
    /// The image ends: its counts and its digest.
    ImageEnd = 18,
    /// The image begun is given up.
    ImageAbort = 19,
    /// The image is stored for good; its counts.
    ImageStored = 20,
}

impl Kind {
    /// Every kind, in wire order.
    pub const ALL: [Self; 20] = [
        Self::Hello,
        Self::Regions,
        Self::Request,
        Self::Expedite,
        Self::Data,
        Self::Zero,
        Self::Poison,
        Self::Complete,
        Self::CompleteAck,
        Self::Error,
        Self::Bye,
        Self::Ping,
        Self::Pong,
        Self::ImageBegin,
        Self::ImageMetadata,
        Self::ImageMappings,
        Self::Gone,
        Self::ImageEnd,
        Self::ImageAbort,
        Self::ImageStored,
    ];

    /// The kind with this number.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Where one connection stands, on either side.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Phase {
    /// The peer's hello is awaited.
    Greeting,
    /// The source's regions are awaited (destination, demand channel only).
    Listing,
    /// Requests and answers; on the images channel, between two images.
    Active,
    /// An image has begun, and is being described.
    Describing,
    /// Pages of an image have come.
    Filling,
    /// An image has ended, and is being stored.
    Storing,
    /// The side that connected has sent its counts and awaits the other's.
    Completing,
    /// Both sides agreed on the counts.
    Completed,
    /// Nothing may come any more.
    Closed,
}

impl Phase {
    /// Every phase, in the order in which a connection can pass through them.
    pub const ALL: [Self; 9] = [
        Self::Greeting,
        Self::Listing,
        Self::Active,
        Self::Describing,
        Self::Filling,
        Self::Storing,
        Self::Completing,
        Self::Completed,
        Self::Closed,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the peer did that the protocol forbids. The connection is of no use afterwards.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A frame does not begin with the frame magic: the stream is garbage or out of step.
    #[error("frame begins with {got:#06x}, not with the frame magic")]
    BadMagic {
        /// The two bytes found.
        got: u16,
    },
    /// No frame has this number.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// A field that this kind does not use is not zero.
    #[error("{kind} frame: {field} must be zero")]
    NotZero {
        /// The frame.
        kind: Kind,
        /// The field.
        field: &'static str,
    },
    /// The payload is longer or shorter than the frame allows.
    #[error("{kind} frame: payload of {got} bytes, {expected}")]
    PayloadLength {
        /// The frame.
        kind: Kind,
        /// Bytes announced.
        got: u64,
        /// What would have been right.
        expected: String,
    },
    /// The hello's magic is wrong: the peer speaks another protocol.
    #[error("hello does not begin with the protocol's magic")]
    HelloMagic,
    /// No version in common.
    #[error("peer speaks versions {their_min} to {their_max}, this side {our_min} to {our_max}")]
    Version {
        /// Lowest version this side speaks.
        our_min: u16,
        /// Highest version this side speaks.
        our_max: u16,
        /// Lowest version the peer states.
        their_min: u16,
        /// Highest version the peer states.
        their_max: u16,
    },
    /// The peer states a role or channel that does not go with this side's.
    #[error("hello: {0}")]
    BadHello(&'static str),
    /// The peer needs features that this side does not have.
    #[error("peer requires unknown features {0:#x}")]
    RequiredFeatures(u64),
    /// The regions stated cannot be.
    #[error("region {id}: {why}")]
    BadRegion {
        /// The region.
        id: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// More regions than allowed.
    #[error("{0} regions stated, at most {max} are allowed", max = super::frame::MAX_REGIONS)]
    TooManyRegions(u32),
    /// This frame may not come now.
    #[error("{kind} frame on the {channel} channel while {phase}")]
    Unexpected {
        /// The frame.
        kind: Kind,
        /// Where it came.
        channel: Channel,
        /// When.
        phase: Phase,
    },
    /// A request's urgency is not that of the channel it came on.
    #[error("request of the other urgency on the {0} channel")]
    WrongChannel(Channel),
    /// No region has this id.
    #[error("region {0} does not exist")]
    UnknownRegion(u16),
    /// A span of nothing.
    #[error("{0} frame with an empty span")]
    EmptySpan(Kind),
    /// A span beyond its region's end.
    #[error("{kind} frame: {span} lies outside the region's {granules} granules")]
    OutOfRange {
        /// The frame.
        kind: Kind,
        /// The span.
        span: WireSpan,
        /// What the region has.
        granules: u64,
    },
    /// A granule was answered that nobody asked for, or that had been answered before.
    #[error("{span}: granule {granule} is not owed: never requested, or answered before")]
    Unsolicited {
        /// The answer.
        span: WireSpan,
        /// The first such granule of it.
        granule: u64,
    },
    /// A granule is in the queue already.
    #[error("{0} overlaps a request that is still queued")]
    DuplicateRequest(WireSpan),
    /// The parts of a large granule came out of order, or something came between them.
    #[error("{what} where the part at {expected} of granule {granule} of region {region} is due")]
    Fragment {
        /// The region.
        region: u16,
        /// The granule being sent in parts.
        granule: u64,
        /// The offset in bytes that comes next.
        expected: u64,
        /// What came.
        what: &'static str,
    },
    /// The two sides counted differently.
    #[error("completion: this side counted {ours}, the peer {theirs}")]
    CompletionMismatch {
        /// This side's counts.
        ours: Counts,
        /// The peer's counts.
        theirs: Counts,
    },
    /// An image that cannot be.
    #[error("image {image}: {why}")]
    BadImage {
        /// The image.
        image: ImageId,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The description of an image came in the wrong order, or with more than was announced.
    #[error(
        "{kind} frame of {length} bytes at {offset}, where {due} bytes of {announced} have come"
    )]
    Description {
        /// The frame.
        kind: Kind,
        /// Where it says that its bytes belong.
        offset: u64,
        /// Its bytes.
        length: u64,
        /// Bytes that have come before.
        due: u64,
        /// Bytes announced in all.
        announced: u64,
    },
    /// Pages came, or the end, before all of the description had.
    #[error("{kind} frame, where {missing} bytes of the image's description have not come")]
    Undescribed {
        /// What came.
        kind: Kind,
        /// What is missing, in bytes.
        missing: u64,
    },
    /// Pages that cannot be in an image.
    #[error("{kind} frame for pages {first}+{count}: {why}")]
    BadPages {
        /// The frame.
        kind: Kind,
        /// The first page's number: its address divided by the page size.
        first: u64,
        /// Number of pages.
        count: u32,
        /// What is wrong with them.
        why: &'static str,
    },
    /// Pages came out of order, or twice.
    #[error("{kind} frame for pages {first}+{count}: all below page {due} have passed")]
    PageOrder {
        /// The frame.
        kind: Kind,
        /// The first page's number.
        first: u64,
        /// Number of pages.
        count: u32,
        /// The lowest page that may still come.
        due: u64,
    },
    /// More than the receiver takes.
    #[error("{what}: {wanted}, but at most {limit} are taken")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How much or many it would be.
        wanted: u64,
        /// How much or many there may be.
        limit: u64,
    },
    /// The two sides counted the pages of an image differently.
    #[error("image {image}: this side counted {ours}, the peer {theirs}")]
    ImageMismatch {
        /// The image.
        image: ImageId,
        /// This side's counts.
        ours: ImageCounts,
        /// The peer's counts.
        theirs: ImageCounts,
    },
    /// What came of an image is not what was sent.
    #[error("image {image}: the digest of its {of} is not that of what came")]
    ImageDigest {
        /// The image.
        image: ImageId,
        /// Of what of it.
        of: &'static str,
    },
    /// Another image was acknowledged than was sent.
    #[error("image {theirs} acknowledged, where image {ours} was sent")]
    WrongImage {
        /// The image sent.
        ours: ImageId,
        /// The image acknowledged.
        theirs: ImageId,
    },
    /// The two sides counted the images differently.
    #[error("completion: this side counted {ours}, the peer {theirs}")]
    ImagesMismatch {
        /// This side's counts.
        ours: ImageTotals,
        /// The peer's counts.
        theirs: ImageTotals,
    },
    /// The stream ended within a frame, or before its goodbye.
    #[error("the connection ended {0}")]
    Truncated(&'static str),
    /// The peer refused, and said why.
    #[error("refused by the peer: {0}")]
    Refused(Refusal),
}

impl ProtocolError {
    /// The code of the `Error` frame that tells the peer of this.
    #[must_use]
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Version { .. } => RefusalCode::Version,
            Self::BadHello(_) | Self::HelloMagic | Self::RequiredFeatures(_) => RefusalCode::Hello,
            Self::CompletionMismatch { .. }
            | Self::ImageMismatch { .. }
            | Self::ImageDigest { .. }
            | Self::ImagesMismatch { .. } => RefusalCode::Counts,
            Self::Limit { .. } => RefusalCode::Limit,
            _ => RefusalCode::Protocol,
        }
    }
}
