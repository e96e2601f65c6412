//! The names of everything a peer can do wrong.

use super::{
    Kind, Phase,
    frame::{Channel, Counts, Refusal, RefusalCode, WireSpan},
    images::{ImageCounts, ImageId, ImageTotals},
};

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
    /// The destination's answer to the regions does not fit them.
    #[error("region {id} accepted: {why}")]
    BadAccept {
        /// The region.
        id: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A connection of a guest's session that was not planned, or that is there already.
    #[error("{channel} connection {index} of {of}: {why}")]
    BadLane {
        /// The channel.
        channel: Channel,
        /// Which of its connections.
        index: u16,
        /// How many the peer says there are.
        of: u16,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A round of pre-copy out of turn.
    #[error("{kind} frame of round {got}, where round {due} is due")]
    Round {
        /// The frame.
        kind: Kind,
        /// The round it names.
        got: u64,
        /// The round that would have been right.
        due: u64,
    },
    /// The two sides counted units of a guest's memory differently.
    #[error("{kind} frame: {theirs} units by the peer's count, {ours} by this side's")]
    Units {
        /// The frame.
        kind: Kind,
        /// This side's count.
        ours: u64,
        /// The peer's.
        theirs: u64,
    },
    /// A list of runs that cannot be.
    #[error("{kind} frame of region {region}, run {first}+{count}: {why}")]
    BadRun {
        /// The frame.
        kind: Kind,
        /// The region.
        region: u16,
        /// The run's first unit.
        first: u64,
        /// The run's units.
        count: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Something other than whole granules of the destination, where only those can be taken.
    #[error("{kind} frame: {span} is not whole granules of {granule} units")]
    NotWhole {
        /// The frame.
        kind: Kind,
        /// The span.
        span: WireSpan,
        /// Units of a granule.
        granule: u64,
    },
    /// Bytes packed in a way that cannot be unpacked here and now.
    #[error("Packed frame for {span}: {why}")]
    BadPacking {
        /// The span.
        span: WireSpan,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A codec without a name.
    #[error("unknown codec {0}")]
    UnknownCodec(u64),
    /// The device state is not what was announced.
    #[error("device state: {0}")]
    BadState(&'static str),
    /// A unit of a guest's memory never came, and was not called missing either.
    #[error("region {region}: unit {unit} neither came nor is missing")]
    NeverSent {
        /// The region.
        region: u16,
        /// The first such unit of it.
        unit: u64,
    },
    /// What the peer says of where the guest runs cannot be.
    #[error("{kind} frame: {why}")]
    Contradiction {
        /// The frame.
        kind: Kind,
        /// Why not.
        why: &'static str,
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
            Self::BadHello(_)
            | Self::HelloMagic
            | Self::RequiredFeatures(_)
            | Self::BadLane { .. } => RefusalCode::Hello,
            Self::CompletionMismatch { .. }
            | Self::ImageMismatch { .. }
            | Self::ImageDigest { .. }
            | Self::ImagesMismatch { .. }
            | Self::Units { .. }
            | Self::NeverSent { .. } => RefusalCode::Counts,
            Self::Limit { .. } => RefusalCode::Limit,
            _ => RefusalCode::Protocol,
        }
    }
}
