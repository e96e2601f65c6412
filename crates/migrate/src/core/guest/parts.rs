//! What the frames about guests hold.

use std::fmt;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use crate::core::{Features, Kind, ProtocolError, WireSpan};

/// Bytes of one entry of an `Accept` frame.
pub(in crate::core) const ACCEPT_LEN: usize = 16;
/// Bytes of one entry of a `Missing` or `Have` frame.
pub(in crate::core) const RUN_LEN: usize = 16;
/// Bytes of a `StateBegin` frame's payload.
pub(in crate::core) const STATE_BEGIN_LEN: usize = 64;
/// Longest name of a device state, in bytes.
pub const STATE_NAME_LEN: usize = 16;
/// Most runs of one `Missing` or `Have` frame.
pub const MAX_RUNS: u32 = 4096;

/// A region that the destination has made room for.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct AcceptedRegion {
    /// The region.
    pub id: u16,
    /// Bytes of what the destination can only take whole once the guest has stopped: a power of
    /// two, and a multiple of the region's unit.
    pub granule: u64,
}

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAccepted {
    id: U16,
    reserved0: U16,
    reserved1: U32,
    granule: U64,
}

const _: () = assert!(size_of::<RawAccepted>() == ACCEPT_LEN);

impl AcceptedRegion {
    pub(in crate::core) fn to_bytes(self) -> [u8; ACCEPT_LEN] {
        let raw = RawAccepted {
            id: self.id.into(),
            reserved0: 0.into(),
            reserved1: 0.into(),
            granule: self.granule.into(),
        };
        zerocopy::transmute!(raw)
    }

    pub(in crate::core) fn from_bytes(bytes: &[u8; ACCEPT_LEN]) -> Result<Self, ProtocolError> {
        let raw: RawAccepted = zerocopy::transmute!(*bytes);
        if raw.reserved0.get() != 0 || raw.reserved1.get() != 0 {
            let field = "the reserved field of a region";
            return Err(ProtocolError::NotZero { kind: Kind::Accept, field });
        }
        Ok(Self { id: raw.id.get(), granule: raw.granule.get() })
    }
}

/// Consecutive units of a region.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct UnitRun {
    /// The first unit.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl UnitRun {
    pub(in crate::core) fn to_bytes(self) -> [u8; RUN_LEN] {
        let raw: [U64; 2] = [self.first.into(), self.count.into()];
        zerocopy::transmute!(raw)
    }

    pub(in crate::core) fn from_bytes(bytes: &[u8; RUN_LEN]) -> Self {
        let [first, count]: [U64; 2] = zerocopy::transmute!(*bytes);
        Self { first: first.get(), count: count.get() }
    }
}

/// How the bytes of a `Packed` frame became fewer.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Codec {
    /// One LZ4 block, without its length in front.
    Lz4,
    /// One Zstandard frame.
    Zstd,
    /// A difference to the bytes that the destination has.
    Delta,
    /// Such a difference as one LZ4 block.
    DeltaLz4,
}

impl Codec {
    /// Every codec, in wire order.
    pub const ALL: [Self; 4] = [Self::Lz4, Self::Zstd, Self::Delta, Self::DeltaLz4];

    pub(in crate::core) fn to_wire(self) -> u64 {
        self as u64 + 1
    }

    pub(in crate::core) fn from_wire(number: u64) -> Result<Self, ProtocolError> {
        let index = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
        let codec = index.and_then(|index| Self::ALL.get(index).copied());
        codec.ok_or(ProtocolError::UnknownCodec(number))
    }

    /// The features that both sides must have for it.
    #[must_use]
    pub const fn needs(self) -> Features {
        match self {
            Self::Lz4 => Features::LZ4,
            Self::Zstd => Features::ZSTD,
            Self::Delta => Features::DELTA,
            Self::DeltaLz4 => Features(Features::DELTA.0 | Features::LZ4.0),
        }
    }

    /// Whether it needs the bytes that the destination has.
    #[must_use]
    pub const fn is_delta(self) -> bool {
        matches!(self, Self::Delta | Self::DeltaLz4)
    }
}

/// What a `Packed` frame's header says of the payload that follows it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct PackedHeader {
    /// The units whose bytes these are, unpacked.
    pub span: WireSpan,
    /// How they are packed.
    pub codec: Codec,
    /// Payload bytes: fewer than the units have.
    pub length: u32,
}

/// What a device state is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct StateInfo {
    /// The format's name.
    pub name: StateName,
    /// The format's version.
    pub version: u32,
    /// Bytes of the state.
    pub length: u64,
    /// BLAKE3 of the state.
    pub digest: [u8; 32],
}

impl StateInfo {
    /// What `bytes` are.
    #[must_use]
    pub fn of(name: StateName, version: u32, bytes: &[u8]) -> Self {
        let digest = *blake3::hash(bytes).as_bytes();
        Self { name, version, length: bytes.len() as u64, digest }
    }

    /// Checks a part of the state, of which `due` bytes have passed; returns how many have then.
    pub(super) fn part(&self, offset: u64, bytes: &[u8], due: u64) -> Result<u64, ProtocolError> {
        let length = bytes.len() as u64;
        if offset != due {
            return Err(ProtocolError::BadState("its parts are out of order"));
        }
        if length == 0 || length > self.length - due {
            return Err(ProtocolError::BadState("more of it came than was announced"));
        }
        Ok(due + length)
    }
}

/// The name of a device state's format: 1 to [`STATE_NAME_LEN`] printable ASCII characters.
#[derive(Copy, Clone, PartialEq, Eq, Hash)]
pub struct StateName([u8; STATE_NAME_LEN]);

impl StateName {
    /// `name`, if it can be one.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; STATE_NAME_LEN];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Self::from_bytes(bytes)
    }

    fn from_bytes(bytes: [u8; STATE_NAME_LEN]) -> Option<Self> {
        let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(STATE_NAME_LEN);
        let (name, rest) = bytes.split_at(length);
        let printable = name.iter().all(|byte| byte.is_ascii_graphic());
        (length > 0 && printable && rest.iter().all(|byte| *byte == 0)).then_some(Self(bytes))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let length = self.0.iter().position(|byte| *byte == 0).unwrap_or(STATE_NAME_LEN);
        str::from_utf8(&self.0[..length]).expect("the name is ASCII")
    }
}

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StateName({self})")
    }
}

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawState {
    name: [u8; STATE_NAME_LEN],
    version: U32,
    reserved: U32,
    length: U64,
    digest: [u8; 32],
}

const _: () = assert!(size_of::<RawState>() == STATE_BEGIN_LEN);

impl StateInfo {
    pub(in crate::core) fn to_bytes(self) -> [u8; STATE_BEGIN_LEN] {
        let raw = RawState {
            name: self.name.0,
            version: self.version.into(),
            reserved: 0.into(),
            length: self.length.into(),
            digest: self.digest,
        };
        zerocopy::transmute!(raw)
    }

    pub(in crate::core) fn from_bytes(payload: &[u8]) -> Result<Self, ProtocolError> {
        let kind = Kind::StateBegin;
        let raw: RawState = crate::core::images::raw(kind, payload)?;
        if raw.reserved.get() != 0 {
            return Err(ProtocolError::NotZero { kind, field: "the reserved field" });
        }
        let name = StateName::from_bytes(raw.name)
            .ok_or(ProtocolError::BadState("its name is not printable ASCII"))?;
        let (version, length) = (raw.version.get(), raw.length.get());
        Ok(Self { name, version, length, digest: raw.digest })
    }
}

/// What a source believes that comes back after a loss. One that still has the guest has nothing
/// to resume.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Belief {
    /// It gave the guest away, and has heard nothing since.
    Given,
    /// It has heard that the guest runs.
    Running,
}

impl Belief {
    pub(in crate::core) fn to_wire(self) -> u64 {
        self as u64 + 1
    }

    pub(in crate::core) fn from_wire(number: u64) -> Result<Self, ProtocolError> {
        match number {
            1 => Ok(Self::Given),
            2 => Ok(Self::Running),
            _ => Err(ProtocolError::Contradiction {
                kind: Kind::Resume,
                why: "what the source believes has no such number",
            }),
        }
    }
}
