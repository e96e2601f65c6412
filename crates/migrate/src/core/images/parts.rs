//! What the frames about images hold.

use std::fmt;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::core::{Kind, ProtocolError};

/// Bytes of an `ImageBegin` frame's payload.
pub(in crate::core) const IMAGE_BEGIN_LEN: usize = 64;
/// Bytes of an `ImageEnd` frame's payload.
pub(in crate::core) const IMAGE_END_LEN: usize = 96;
/// Bytes of an `ImageStored` frame's payload.
pub(in crate::core) const IMAGE_STORED_LEN: usize = 48;
/// Longest part of a description in one frame, in bytes.
pub const MAX_CHUNK: u32 = 64 << 10;

const MIN_PAGE: u64 = 4096;

/// The identity of an image, chosen by whoever makes it. All zero is no identity.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub [u8; 16]);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

/// How an image begins.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ImageBegin {
    /// Its identity.
    pub id: ImageId,
    /// The image that knows what this one does not say; `None`: this one says everything.
    pub parent: Option<ImageId>,
    /// Bytes of a page, the unit of everything said about the image: a power of two from 4 KiB
    /// on, and no more than one frame's payload.
    pub page_size: u64,
    /// Bytes of metadata that follow.
    pub metadata_len: u32,
    /// Bytes of the table of mappings that follow the metadata.
    pub mappings_len: u32,
}

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBegin {
    id: [u8; 16],
    parent: [u8; 16],
    page_size: U64,
    metadata_len: U32,
    mappings_len: U32,
    reserved: [u8; 16],
}

const _: () = assert!(size_of::<RawBegin>() == IMAGE_BEGIN_LEN);

/// Reads a payload whose length the header's check has compared with `T`'s.
pub(in crate::core) fn raw<T: FromBytes + KnownLayout + Immutable>(
    kind: Kind,
    payload: &[u8],
) -> Result<T, ProtocolError> {
    T::read_from_bytes(payload).map_err(|_| ProtocolError::PayloadLength {
        kind,
        got: payload.len() as u64,
        expected: format!("exactly {} needed", size_of::<T>()),
    })
}

impl ImageBegin {
    pub(in crate::core) fn to_bytes(self) -> [u8; IMAGE_BEGIN_LEN] {
        let raw = RawBegin {
            id: self.id.0,
            parent: self.parent.map_or([0; 16], |parent| parent.0),
            page_size: self.page_size.into(),
            metadata_len: self.metadata_len.into(),
            mappings_len: self.mappings_len.into(),
            reserved: [0; 16],
        };
        zerocopy::transmute!(raw)
    }

    pub(in crate::core) fn from_bytes(
        payload: &[u8],
        has_parent: bool,
    ) -> Result<Self, ProtocolError> {
        let kind = Kind::ImageBegin;
        let raw: RawBegin = raw(kind, payload)?;
        if raw.reserved != [0; 16] {
            return Err(ProtocolError::NotZero { kind, field: "the reserved field" });
        }
        if !has_parent && raw.parent != [0; 16] {
            return Err(ProtocolError::NotZero { kind, field: "the parent of an image without" });
        }
        Ok(Self {
            id: ImageId(raw.id),
            parent: has_parent.then_some(ImageId(raw.parent)),
            page_size: raw.page_size.get(),
            metadata_len: raw.metadata_len.get(),
            mappings_len: raw.mappings_len.get(),
        })
    }

    /// Checks what can be checked of it alone, on a connection whose frames carry at most
    /// `max_payload` bytes.
    pub(super) fn check(&self, max_payload: u32) -> Result<(), ProtocolError> {
        let why = if self.id.0 == [0; 16] {
            "it has no identity"
        } else if self.parent.is_some_and(|parent| parent.0 == [0; 16]) {
            "its parent has no identity"
        } else if self.parent == Some(self.id) {
            "it is its own parent"
        } else if !self.page_size.is_power_of_two() || self.page_size < MIN_PAGE {
            "its page size must be a power of two from 4 KiB on"
        } else if self.page_size > u64::from(max_payload) {
            "one of its pages does not fit into a frame"
        } else {
            return Ok(());
        };
        Err(ProtocolError::BadImage { image: self.id, why })
    }
}

/// How many pages an image says something about, by what it says.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct ImageCounts {
    /// With their bytes.
    pub data: u64,
    /// All zero.
    pub zero: u64,
    /// Could not be read where they were.
    pub poisoned: u64,
    /// No longer memory, whatever the image's ancestors say.
    pub gone: u64,
}

impl fmt::Display for ImageCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, zero, poisoned, gone } = self;
        write!(f, "{data} data, {zero} zero, {poisoned} poisoned and {gone} gone")
    }
}

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawCounts {
    data: U64,
    zero: U64,
    poisoned: U64,
    gone: U64,
}

impl From<ImageCounts> for RawCounts {
    fn from(counts: ImageCounts) -> Self {
        Self {
            data: counts.data.into(),
            zero: counts.zero.into(),
            poisoned: counts.poisoned.into(),
            gone: counts.gone.into(),
        }
    }
}

impl From<RawCounts> for ImageCounts {
    fn from(raw: RawCounts) -> Self {
        Self {
            data: raw.data.get(),
            zero: raw.zero.get(),
            poisoned: raw.poisoned.get(),
            gone: raw.gone.get(),
        }
    }
}

/// How an image ends.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ImageEnd {
    /// Pages sent.
    pub counts: ImageCounts,
    /// BLAKE3 of all frames of the image before this one, in order, without the payloads of
    /// `Data` frames. What the connection itself needs (pings, pongs) is left out.
    pub frames: [u8; 32],
    /// BLAKE3 of the payloads of all `Data` frames of the image, in order.
    pub pages: [u8; 32],
}

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEnd {
    counts: RawCounts,
    frames: [u8; 32],
    pages: [u8; 32],
}

const _: () = assert!(size_of::<RawEnd>() == IMAGE_END_LEN);

impl ImageEnd {
    pub(in crate::core) fn to_bytes(self) -> [u8; IMAGE_END_LEN] {
        let raw = RawEnd { counts: self.counts.into(), frames: self.frames, pages: self.pages };
        zerocopy::transmute!(raw)
    }

    pub(in crate::core) fn from_bytes(payload: &[u8]) -> Result<Self, ProtocolError> {
        let raw: RawEnd = raw(Kind::ImageEnd, payload)?;
        Ok(Self { counts: raw.counts.into(), frames: raw.frames, pages: raw.pages })
    }
}

/// An image that its receiver has stored for good.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct ImageStored {
    /// Which.
    pub id: ImageId,
    /// Pages stored.
    pub counts: ImageCounts,
}

#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawStored {
    id: [u8; 16],
    counts: RawCounts,
}

const _: () = assert!(size_of::<RawStored>() == IMAGE_STORED_LEN);

impl ImageStored {
    pub(in crate::core) fn to_bytes(self) -> [u8; IMAGE_STORED_LEN] {
        let raw = RawStored { id: self.id.0, counts: self.counts.into() };
        zerocopy::transmute!(raw)
    }

    pub(in crate::core) fn from_bytes(payload: &[u8]) -> Result<Self, ProtocolError> {
        let raw: RawStored = raw(Kind::ImageStored, payload)?;
        Ok(Self { id: ImageId(raw.id), counts: raw.counts.into() })
    }
}

/// How many images a session had, and how they ended. Both sides count, and compare when it
/// completes.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub struct ImageTotals {
    /// Stored and acknowledged.
    pub stored: u64,
    /// Begun and given up.
    pub aborted: u64,
}

impl fmt::Display for ImageTotals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} images stored and {} given up", self.stored, self.aborted)
    }
}

impl From<ImageTotals> for crate::core::Counts {
    fn from(totals: ImageTotals) -> Self {
        Self { filled: totals.stored, poisoned: totals.aborted }
    }
}

impl From<crate::core::Counts> for ImageTotals {
    fn from(counts: crate::core::Counts) -> Self {
        Self { stored: counts.filled, aborted: counts.poisoned }
    }
}
