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
pub const VERSION_MAX: u16 = 1;
/// Largest `Data` payload offered by default, in bytes.
pub const DEFAULT_MAX_PAYLOAD: u32 = 4 << 20;
/// The smallest bound on `Data` payloads that may be offered, in bytes.
pub const MIN_MAX_PAYLOAD: u32 = 64 << 10;

/// Optional features in the low 32 bits (both sides must have one for it to be used), required
/// ones in the high 32 bits (a side that does not know one refuses).
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Features(pub u64);

/// What this version has: none yet.
pub const FEATURES: Features = Features(0);

impl Features {
    const REQUIRED: u64 = 0xffff_ffff_0000_0000;
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
}

/// What pairs the connections of one session: chosen at random by the destination.
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
    reserved1: U32,
    reserved2: [u8; 16],
}

const _: () = assert!(size_of::<RawHello>() == HELLO_LEN);

impl Hello {
    pub(super) fn to_bytes(self) -> [u8; HELLO_LEN] {
        let raw = RawHello {
            magic: HELLO_MAGIC,
            version_min: self.version_min.into(),
            version_max: self.version_max.into(),
            role: match self.role {
                Role::Source => 1,
                Role::Destination => 2,
                Role::Reader => 3,
            },
            channel: match self.channel {
                Channel::Demand => 1,
                Channel::Background => 2,
            },
            reserved0: 0.into(),
            features: self.features.0.into(),
            session: self.session.0,
            max_payload: self.max_payload.into(),
            reserved1: 0.into(),
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
        Ok(Self {
            version_min,
            version_max,
            role: match raw.role {
                1 => Role::Source,
                2 => Role::Destination,
                3 => Role::Reader,
                _ => return Err(ProtocolError::BadHello("unknown role")),
            },
            channel: match raw.channel {
                1 => Channel::Demand,
                2 => Channel::Background,
                _ => return Err(ProtocolError::BadHello("unknown channel")),
            },
            features: Features(raw.features.get()),
            session: SessionId(raw.session),
            max_payload: raw.max_payload.get(),
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
    /// The hello of a destination or reader.
    #[must_use]
    pub fn offer(&self, role: Role, channel: Channel, session: SessionId) -> Hello {
        Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            role,
            channel,
            features: self.features,
            session,
            max_payload: self.max_payload,
        }
    }

    /// The source's answer to `offer`.
    ///
    /// # Errors
    /// What is wrong with the offer.
    pub fn answer(&self, offer: &Hello) -> Result<Hello, ProtocolError> {
        check_versions(VERSION_MIN, VERSION_MAX, offer.version_min, offer.version_max)?;
        match (offer.role, offer.channel) {
            (Role::Source, _) => return Err(ProtocolError::BadHello("two sources")),
            (Role::Reader, Channel::Background) => {
                return Err(ProtocolError::BadHello("a reader has no background channel"));
            }
            _ => {}
        }
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
            role: Role::Source,
            channel: offer.channel,
            features: Features(self.features.0 & offer.features.0),
            session: offer.session,
            max_payload: self.max_payload.min(offer.max_payload),
        })
    }

    /// Checks the source's `answer` to `offer`.
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
        } else if answer.role != Role::Source {
            "the peer is no source"
        } else if answer.channel != offer.channel {
            "the answer is for another channel"
        } else if answer.session != offer.session {
            "the answer is for another session"
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
