//! The catalog: what was mapped, and what else is known.

use std::collections::BTreeMap;

use bitflags::bitflags;
use pageferry_memory::{ImageOffset, PageSize};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::MAX_PIECE;
use crate::ImageRange;

bitflags! {
    /// What kind of mapping it was. Bits without a name are kept as they are.
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct MappingFlags: u32 {
        /// Could be read.
        const READ = 1 << 0;
        /// Could be written.
        const WRITE = 1 << 1;
        /// Could be executed.
        const EXECUTE = 1 << 2;
        /// `MAP_SHARED`.
        const SHARED = 1 << 3;
        /// No file behind it.
        const ANONYMOUS = 1 << 4;
        /// The heap of brk(2).
        const HEAP = 1 << 5;
        /// The stack of the first thread.
        const STACK = 1 << 6;
        /// Huge pages of hugetlbfs.
        const HUGETLB = 1 << 7;
        /// The kernel's own: vdso, vvar, vsyscall.
        const KERNEL = 1 << 8;
        /// Locked: mlock(2).
        const LOCKED = 1 << 9;
        /// Excluded from core dumps: `MADV_DONTDUMP`.
        const NO_DUMP = 1 << 10;
        /// Grows downwards: `MAP_GROWSDOWN`.
        const GROWS_DOWN = 1 << 11;
        const _ = !0;
    }
}

/// One mapping of the memory that an image was made of; for a process, a line of
/// `/proc/PID/maps` (proc_pid_maps(5)).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageMapping {
    /// Where it was.
    pub range: ImageRange,
    /// What kind it was.
    pub flags: MappingFlags,
    /// Size of its pages.
    pub page_size: PageSize,
    /// Offset in the file, in bytes.
    pub file_offset: u64,
    /// Device of the file, major and minor number.
    pub device: (u32, u32),
    /// Inode of the file.
    pub inode: u64,
    /// Its name, as the kernel has it: a path, or something like `[heap]`. Any bytes, at most
    /// 65535; not necessarily UTF-8.
    pub name: Vec<u8>,
}

/// The longest key, in bytes.
pub(crate) const MAX_KEY: usize = 255;
/// The largest value, in bytes.
pub(crate) const MAX_VALUE: usize = 1 << 20;
/// The most keys.
pub(crate) const MAX_KEYS: usize = 4096;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    mappings: U32,
    metadata: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MappingRecord {
    start: U64,
    len: U64,
    file_offset: U64,
    inode: U64,
    major: U32,
    minor: U32,
    flags: U32,
    name_len: U16,
    page_shift: u8,
    reserved: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PairRecord {
    value_len: U32,
    key_len: u8,
    reserved: [u8; 3],
}

const _: () = assert!(
    size_of::<Head>() == 8 && size_of::<MappingRecord>() == 48 && size_of::<PairRecord>() == 8
);

/// Mappings ascending and apart, and metadata by key.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Catalog {
    pub(crate) mappings: Vec<ImageMapping>,
    pub(crate) metadata: BTreeMap<String, Vec<u8>>,
}

impl Catalog {
    /// The bytes, unless they are too many. Names, keys and values are short enough, and mappings
    /// in order.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, &'static str> {
        const MANY: &str = "mappings and metadata take more than 64 MiB";
        let head = Head {
            mappings: u32::try_from(self.mappings.len()).map_err(|_| MANY)?.into(),
            metadata: u32::try_from(self.metadata.len()).map_err(|_| MANY)?.into(),
        };
        let mut bytes = head.as_bytes().to_vec();
        for mapping in &self.mappings {
            let mut record = MappingRecord::new_zeroed();
            record.start = mapping.range.start().get().into();
            record.len = mapping.range.len().into();
            record.file_offset = mapping.file_offset.into();
            record.inode = mapping.inode.into();
            record.major = mapping.device.0.into();
            record.minor = mapping.device.1.into();
            record.flags = mapping.flags.bits().into();
            record.name_len =
                u16::try_from(mapping.name.len()).map_err(|_| "a name is too long")?.into();
            record.page_shift = mapping.page_size.shift() as u8;
            bytes.extend_from_slice(record.as_bytes());
            bytes.extend_from_slice(&mapping.name);
            if bytes.len() as u64 > MAX_PIECE {
                return Err(MANY);
            }
        }
        for (key, value) in &self.metadata {
            let record = PairRecord {
                value_len: u32::try_from(value.len()).map_err(|_| "a value is too long")?.into(),
                key_len: u8::try_from(key.len()).map_err(|_| "a key is too long")?,
                reserved: [0; 3],
            };
            bytes.extend_from_slice(record.as_bytes());
            bytes.extend_from_slice(key.as_bytes());
            bytes.extend_from_slice(value);
            if bytes.len() as u64 > MAX_PIECE {
                return Err(MANY);
            }
        }
        Ok(bytes)
    }

    /// What the bytes say. Allocates no more than a small multiple of what they are.
    pub(crate) fn decode(mut bytes: &[u8]) -> Result<Self, &'static str> {
        let head: Head = record(&mut bytes)?;
        let mut catalog = Self::default();
        let mut end = 0;
        for _ in 0..head.mappings.get() {
            let said: MappingRecord = record(&mut bytes)?;
            let range = ImageRange::try_new(ImageOffset::new(said.start.get()), said.len.get())
                .filter(|range| range.start().get() >= end && !range.is_empty())
                .ok_or("its mappings are not in order")?;
            end = range.end().get();
            let page_size = 1_u64
                .checked_shl(said.page_shift.into())
                .and_then(PageSize::try_new)
                .ok_or("there are no pages of that size")?;
            catalog.mappings.push(ImageMapping {
                range,
                flags: MappingFlags::from_bits_retain(said.flags.get()),
                page_size,
                file_offset: said.file_offset.get(),
                device: (said.major.get(), said.minor.get()),
                inode: said.inode.get(),
                name: take(&mut bytes, said.name_len.get().into())?.to_vec(),
            });
        }
        if head.metadata.get() as usize > MAX_KEYS {
            return Err("it has more keys than any may have");
        }
        for _ in 0..head.metadata.get() {
            let said: PairRecord = record(&mut bytes)?;
            let key = str::from_utf8(take(&mut bytes, said.key_len.into())?)
                .map_err(|_| "a key is not UTF-8")?;
            if catalog.metadata.last_key_value().is_some_and(|(last, _)| **last >= *key) {
                return Err("its keys are not in order");
            }
            let value = take(&mut bytes, said.value_len.get() as usize)?;
            catalog.metadata.insert(key.to_owned(), value.to_vec());
        }
        if bytes.is_empty() { Ok(catalog) } else { Err("it is longer than what it has") }
    }
}

const SHORT: &str = "it is shorter than what it has";

fn record<R: FromBytes>(bytes: &mut &[u8]) -> Result<R, &'static str> {
    let (record, rest) = R::read_from_prefix(bytes).map_err(|_| SHORT)?;
    *bytes = rest;
    Ok(record)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], &'static str> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or(SHORT)?;
    *bytes = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, len: u64, name: &[u8]) -> ImageMapping {
        ImageMapping {
            range: ImageRange::new(ImageOffset::new(start), len),
            flags: MappingFlags::READ | MappingFlags::from_bits_retain(1 << 31),
            page_size: PageSize::SIZE_2M,
            file_offset: 77,
            device: (8, 1),
            inode: 1 << 40,
            name: name.to_vec(),
        }
    }

    fn full() -> Catalog {
        Catalog {
            mappings: vec![mapping(4096, 4096, b"/a\xff (deleted)"), mapping(8192, 1, b"")],
            metadata: [("comm", b"a\0b".to_vec()), ("pid", Vec::new())]
                .map(|(key, value)| (key.to_owned(), value))
                .into(),
        }
    }

    #[test]
    fn comes_back() {
        for catalog in [Catalog::default(), full()] {
            let bytes = catalog.encode().unwrap();
            assert_eq!(Catalog::decode(&bytes), Ok(catalog));
        }
    }

    #[test]
    fn every_cut_and_every_addition_is_noticed() {
        let mut bytes = full().encode().unwrap();
        for length in 0..bytes.len() {
            assert_eq!(Catalog::decode(&bytes[..length]), Err(SHORT), "{length}");
        }
        bytes.push(0);
        assert!(Catalog::decode(&bytes).is_err());
    }

    #[test]
    fn lies_are_refused() {
        let bytes = full().encode().unwrap();
        // Where, a byte to put there, what is said of it.
        for (at, byte, why) in [
            (3, 0xff, SHORT),
            (4, 3, SHORT),
            (7, 0xff, "it has more keys than any may have"),
            (8 + 8 + 1, 0xf0, "its mappings are not in order"),
            (8 + 15, 0xff, "its mappings are not in order"),
            (8 + 46, 64, "there are no pages of that size"),
            (8 + 46, 11, "there are no pages of that size"),
            (bytes.len() - 3, 0xff, "a key is not UTF-8"),
            (bytes.len() - 3, b'a', "its keys are not in order"),
        ] {
            let mut lie = bytes.clone();
            lie[at] = byte;
            assert_eq!(Catalog::decode(&lie), Err(why), "{byte:#x} at {at}");
        }
    }
}
