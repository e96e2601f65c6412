//! The hello: who speaks, which versions and features, which session and channel.

use std::fmt;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::{Channel, Kind, ProtocolError};

/// Begins every hello.
pub const HELLO_MAGIC: [u8; 8] = *b"PGFERRY\0";
/// Bytes of a hello of version 1. Later versions may append; what is beyond is ignored.
pub const HELLO_LEN: usize = 64;
/// Longest hello accepted, so that later versions can append.
pub(super) const HELLO_MAX: u32 = 4096;
/// The lowest version spoken.
pub const VERSION_MIN: u16 = 1;
/// The highest version spoken.
pub const VERSION_MAX: u16 = 3;
/// The first version that has images.
pub const VERSION_IMAGES: u16 = 2;
/// The first version that has migrations of guests.
pub const VERSION_GUESTS: u16 = 3;
/// Most pages connections of a guest's session, and most faults connections.
pub const MAX_LANES: u16 = 32;
/// Largest `Data` payload offered by default, in bytes.
pub const DEFAULT_MAX_PAYLOAD: u32 = 4 << 20;
/// The smallest bound on `Data` payloads that may be offered, in bytes.
pub const MIN_MAX_PAYLOAD: u32 = 64 << 10;

/// Optional features in the low 32 bits (both sides must have one for it to be used), required
/// ones in the high 32 bits (a side that does not know one refuses).
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Features(pub u64);

/// What this version has for pages and images: none yet.
pub const FEATURES: Features = Features(0);

impl Features {
    const REQUIRED: u64 = 0xffff_ffff_0000_0000;
    /// Guests: `Packed` frames by LZ4.
    pub const LZ4: Self = Self(1);
    /// Guests: `Packed` frames by Zstandard.
    pub const ZSTD: Self = Self(2);
    /// Guests: `Packed` frames that are differences.
    pub const DELTA: Self = Self(4);
    /// Everything that this version has for guests.
    pub const GUEST: Self = Self(7);

    /// Whether all of `other` are among these.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a side is in the session.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// Has the memory.
    Source,
    /// Takes the memory over: two channels, completion.
    Destination,
    /// Only reads (to verify, to copy): the demand channel alone, no completion.
    Reader,
    /// Sends images: the images channel alone.
    ImageSender,
    /// Takes images and stores them.
    ImageReceiver,
    /// Has a running guest, and gives it away.
    GuestSource,
    /// Takes a running guest over.
    GuestDestination,
}

impl Role {
    const NAMED: [(u8, Self); 7] = [
        (1, Self::Source),
        (2, Self::Destination),
        (3, Self::Reader),
        (4, Self::ImageSender),
        (5, Self::ImageReceiver),
        (6, Self::GuestSource),
        (7, Self::GuestDestination),
    ];

    /// Who answers somebody of this role who connects; `None` for those who do not connect.
    #[must_use]
    pub fn answered_by(self) -> Option<Self> {
        match self {
            Self::Destination | Self::Reader => Some(Self::Source),
            Self::ImageSender => Some(Self::ImageReceiver),
            Self::GuestSource => Some(Self::GuestDestination),
            Self::Source | Self::ImageReceiver | Self::GuestDestination => None,
        }
    }

    /// The first version of the protocol that has this role.
    #[must_use]
    pub fn since(self) -> u16 {
        match self {
            Self::Source | Self::Destination | Self::Reader => VERSION_MIN,
            Self::ImageSender | Self::ImageReceiver => VERSION_IMAGES,
            Self::GuestSource | Self::GuestDestination => VERSION_GUESTS,
        }
    }

    fn has_channel(self, channel: Channel) -> bool {
        match self {
            Self::Source | Self::Destination => {
                matches!(channel, Channel::Demand | Channel::Background)
            }
            Self::Reader => channel == Channel::Demand,
            Self::ImageSender | Self::ImageReceiver => channel == Channel::Images,
            Self::GuestSource | Self::GuestDestination => {
                matches!(channel, Channel::Control | Channel::Pages | Channel::Faults)
            }
        }
    }
}

/// What pairs the connections of one session: chosen at random by the side that connects.
#[derive(Copy, Clone, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

impl Hello {
    /// Checks that there can be such a connection.
    pub(super) fn check_lane(&self) -> Result<(), ProtocolError> {
        let Lane { index, of } = self.lane;
        let why = match self.channel {
            Channel::Control if index > MAX_LANES || of > MAX_LANES => "too many connections",
            Channel::Pages | Channel::Faults if of > MAX_LANES => "too many connections",
            Channel::Pages | Channel::Faults if index >= of => "no such connection",
            _ => return Ok(()),
        };
        Err(ProtocolError::BadLane { channel: self.channel, index, of, why })
    }
}

/// The first frame each way on every connection.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Lowest version spoken; in the answer, the version chosen.
    pub version_min: u16,
    /// Highest version spoken; in the answer, the version chosen.
    pub version_max: u16,
    /// The sender's role.
    pub role: Role,
    /// Which of the session's connections this is.
    pub channel: Channel,
    /// Features of the sender; in the answer, those agreed.
    pub features: Features,
    /// The session.
    pub session: SessionId,
    /// Largest `Data` payload the sender takes, in bytes; in the answer, the bound agreed.
    pub max_payload: u32,
    /// Which connection of a guest's session; all zero on the channels of pages and images.
    pub lane: Lane,
}

/// The connections of a guest's session beside control, or one of them.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Lane {
    /// On control, how many pages connections there will be; on those of pages and faults, which
    /// of them this is, from 0.
    pub index: u16,
    /// On control, how many faults connections there will be; on those of pages and faults, how
    /// many there are of this channel.
    pub of: u16,
}

/// The hello as it lies on the wire.
#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHello {
    magic: [u8; 8],
    version_min: U16,
    version_max: U16,
    role: u8,
    channel: u8,
    reserved0: U16,
    features: U64,
    session: [u8; 16],
    max_payload: U32,
    index: U16,
    of: U16,
    reserved2: [u8; 16],
}

const _: () = assert!(size_of::<RawHello>() == HELLO_LEN);

impl Hello {
    pub(super) fn to_bytes(self) -> [u8; HELLO_LEN] {
        let raw = RawHello {
            magic: HELLO_MAGIC,
            version_min: self.version_min.into(),
            version_max: self.version_max.into(),
            role: Role::NAMED.iter().find(|(_, role)| *role == self.role).map_or(0, |(n, _)| *n),
            channel: self.channel.to_wire(),
            reserved0: 0.into(),
            features: self.features.0.into(),
            session: self.session.0,
            max_payload: self.max_payload.into(),
            index: self.lane.index.into(),
            of: self.lane.of.into(),
            reserved2: [0; 16],
        };
        zerocopy::transmute!(raw)
    }

    /// Reads a payload. The magic and the versions come first: with them wrong, nothing else in
    /// it may be what this version believes it to be.
    pub(super) fn from_bytes(payload: &[u8]) -> Result<Self, ProtocolError> {
        let Ok((raw, _later_versions)) = RawHello::read_from_prefix(payload) else {
            return Err(ProtocolError::PayloadLength {
                kind: Kind::Hello,
                got: payload.len() as u64,
                expected: format!("at least {HELLO_LEN} needed"),
            });
        };
        if raw.magic != HELLO_MAGIC {
            return Err(ProtocolError::HelloMagic);
        }
        let (version_min, version_max) = (raw.version_min.get(), raw.version_max.get());
        check_versions(VERSION_MIN, VERSION_MAX, version_min, version_max)?;
        let channel =
            Channel::from_wire(raw.channel).ok_or(ProtocolError::BadHello("unknown channel"))?;
        Ok(Self {
            version_min,
            version_max,
            role: Role::NAMED
                .iter()
                .find(|(number, _)| *number == raw.role)
                .map(|(_, role)| *role)
                .ok_or(ProtocolError::BadHello("unknown role"))?,
            channel,
            features: Features(raw.features.get()),
            session: SessionId(raw.session),
            max_payload: raw.max_payload.get(),
            // Of other channels these bytes are reserved, and ignored.
            lane: match channel {
                Channel::Demand | Channel::Background | Channel::Images => Lane::default(),
                Channel::Control | Channel::Pages | Channel::Faults => {
                    Lane { index: raw.index.get(), of: raw.of.get() }
                }
            },
        })
    }
}

fn check_versions(
    our_min: u16,
    our_max: u16,
    their_min: u16,
    their_max: u16,
) -> Result<(), ProtocolError> {
    if their_min > their_max || their_max < our_min || their_min > our_max {
        return Err(ProtocolError::Version { our_min, our_max, their_min, their_max });
    }
    Ok(())
}

/// What one side brings into the negotiation.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Terms {
    /// Largest `Data` payload, in bytes.
    pub max_payload: u32,
    /// Features.
    pub features: Features,
}

impl Default for Terms {
    fn default() -> Self {
        Self { max_payload: DEFAULT_MAX_PAYLOAD, features: FEATURES }
    }
}

impl Terms {
    /// What a side brings into the migration of a guest, if nothing is held back.
    #[must_use]
    pub fn guest() -> Self {
        Self { features: Features::GUEST, ..Self::default() }
    }

    /// The hello of whoever connects: a destination, a reader, an image sender or a guest's source.
    #[must_use]
    pub fn offer(&self, role: Role, channel: Channel, session: SessionId) -> Hello {
        Hello {
            version_min: role.since(),
            version_max: VERSION_MAX,
            role,
            channel,
            features: self.features,
            session,
            max_payload: self.max_payload,
            lane: Lane::default(),
        }
    }

    /// The source's answer to `offer`.
    ///
    /// # Errors
    /// What is wrong with the offer.
    pub fn answer(&self, offer: &Hello) -> Result<Hello, ProtocolError> {
        self.answer_as(Role::Source, offer)
    }

    /// The answer to `offer` of a side whose role is `role`.
    ///
    /// # Errors
    /// What is wrong with the offer.
    pub fn answer_as(&self, role: Role, offer: &Hello) -> Result<Hello, ProtocolError> {
        check_versions(VERSION_MIN, VERSION_MAX, offer.version_min, offer.version_max)?;
        if offer.role.answered_by() != Some(role) {
            return Err(ProtocolError::BadHello(match role {
                Role::Source => "pages are served here, to a destination or a reader",
                Role::ImageReceiver => "images are taken here, from an image sender",
                Role::GuestDestination => "guests are taken here, from a guest's source",
                _ => "this side connects to others",
            }));
        }
        if !offer.role.has_channel(offer.channel) {
            return Err(ProtocolError::BadHello("the role has no such channel"));
        }
        if offer.version_max < offer.role.since() {
            return Err(ProtocolError::BadHello("the role is of a later version"));
        }
        offer.check_lane()?;
        let unknown = offer.features.0 & Features::REQUIRED & !self.features.0;
        if unknown != 0 {
            return Err(ProtocolError::RequiredFeatures(unknown));
        }
        if offer.max_payload < MIN_MAX_PAYLOAD {
            return Err(ProtocolError::BadHello("payload bound below the minimum"));
        }
        let version = VERSION_MAX.min(offer.version_max);
        Ok(Hello {
            version_min: version,
            version_max: version,
            role,
            channel: offer.channel,
            features: Features(self.features.0 & offer.features.0),
            session: offer.session,
            max_payload: self.max_payload.min(offer.max_payload),
            lane: offer.lane,
        })
    }

    /// Checks the peer's `answer` to `offer`.
    ///
    /// # Errors
    /// What in the answer was not offered.
    pub fn accept(&self, offer: &Hello, answer: &Hello) -> Result<(), ProtocolError> {
        check_versions(
            offer.version_min,
            offer.version_max,
            answer.version_min,
            answer.version_max,
        )?;
        let unknown = answer.features.0 & !offer.features.0;
        let why = if answer.version_min != answer.version_max {
            "the answer chooses no version"
        } else if Some(answer.role) != offer.role.answered_by() {
            "the peer has another role than was asked for"
        } else if answer.channel != offer.channel {
            "the answer is for another channel"
        } else if answer.session != offer.session {
            "the answer is for another session"
        } else if answer.lane != offer.lane {
            "the answer is for another connection of the session"
        } else if answer.max_payload < MIN_MAX_PAYLOAD || answer.max_payload > offer.max_payload {
            "payload bound outside what was offered"
        } else if unknown & Features::REQUIRED != 0 {
            return Err(ProtocolError::RequiredFeatures(unknown & Features::REQUIRED));
        } else if unknown != 0 {
            "features agreed that were not offered"
        } else {
            return Ok(());
        };
        Err(ProtocolError::BadHello(why))
    }
}
