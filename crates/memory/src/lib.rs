//! Memory whose contents arrive on demand: its addresses and sizes as types, its mappings, and the
//! state of every part of it.
//!
//! * [`GuestAddress`], [`HostAddress`], [`ImageOffset`], [`GranuleIndex`] and [`PageSize`] are
//!   different types with checked arithmetic.
//! * A [`Mapping`] owns one mapping of memory; a [`MemoryFile`] is what two mappings can share.
//! * A [`Region`] is one contiguous range of guest memory: its guest view, where faults happen;
//!   where its backing allows one, its fill view, through which bytes are written without faulting;
//!   and its [`PageMap`]. A [`Layout`] is the set of all regions of a guest.
//! * The [`PageMap`] holds the state of every granule, decides in one atomic step who brings it,
//!   and lets everybody else wait for it. It is the heart of Pageferry: see there.
//! * A [`DirtyBitmap`] has one bit for every granule.
//!
//! The crate does no input or output; it starts no threads.
//!
//! # Feature flags
//!
//! `vm-memory` adds the module `adapter`, which makes regions of the memory of a
//! VMM that uses the `vm-memory` crate, and such a memory of regions.
#![deny(unsafe_code)]

#[cfg(feature = "vm-memory")]
#[allow(unsafe_code)]
pub mod adapter;
mod addr;
mod dirty;
mod huge_pages;
mod layout;
#[allow(unsafe_code)]
mod mapping;
mod memory_file;
mod page_map;
#[allow(unsafe_code)]
mod racy;
mod region;
#[allow(unsafe_code)]
mod sync;

pub use addr::{GranuleIndex, GranuleRange, GuestAddress, ImageOffset, PageSize};
pub use dirty::DirtyBitmap;
pub use huge_pages::HugePagePool;
pub use layout::{Layout, LayoutError, RegionId};
pub use mapping::{Advice, Mapping, MappingError, OutOfRange};
pub use memory_file::{MemoryFile, MemoryFileError, MemoryFileKind};
pub use page_map::{Claim, PageMap, State, TimedOut, WaitPolicy};
pub use pageferry_uffd::{HostAddress, HostRange, Mapped};
pub use region::{Backing, Region, RegionConfig, RegionError, Thp};
