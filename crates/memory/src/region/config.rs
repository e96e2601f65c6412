//! What a region is to be, and why it cannot be made.

use std::{fmt, io};

use crate::mapping::{Advice, MappingError};
use crate::memory_file::MemoryFileError;
use crate::{GuestAddress, HostRange, ImageOffset, PageSize};

/// What a region's memory is.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Backing {
    /// Private anonymous memory. It has one view only.
    Anonymous,
    /// A memfd of ordinary pages.
    Memfd,
    /// A memfd of reserved huge pages of this size.
    Hugetlb(PageSize),
    /// A mapping handed in by an embedder.
    External,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("anonymous memory"),
            Self::Memfd => f.write_str("memfd"),
            Self::Hugetlb(size) => write!(f, "hugetlb {size}"),
            Self::External => f.write_str("embedder's memory"),
        }
    }
}

/// Whether the kernel may use transparent huge pages for a region. It concerns neither hugetlb
/// nor an embedder's memory.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub enum Thp {
    /// As the host is configured.
    Default,
    /// Wherever possible.
    Always,
    /// Nowhere. This is the default: with a fault on a missing page answered by a huge page, the
    /// guest could see the parts that have not arrived as zeros.
    #[default]
    Never,
}

/// How to make a [`Region`](super::Region).
#[derive(Clone, Debug)]
pub struct RegionConfig {
    /// Where the guest has it. A multiple of the base page size.
    pub guest_base: GuestAddress,
    /// Its length in bytes: a positive multiple of the backing's page size and of the granule.
    pub len: u64,
    /// What the memory is.
    pub backing: Backing,
    /// The unit of presence; if not given, the backing's page size.
    pub granule: Option<PageSize>,
    /// Transparent huge pages.
    pub thp: Thp,
    /// Whether to make a fill view: a second mapping that never faults, through which bytes are
    /// written. Only memfd and hugetlb can have one.
    pub fill_view: bool,
    /// Whether to make a vCPU view: a mapping of its own for KVM's memory slot, so that faults of
    /// vCPUs and of everybody else can be delivered in different ways. Only memfd and hugetlb can
    /// have one.
    pub vcpu_view: bool,
    /// Where the region's first byte is in the image.
    pub image_offset: ImageOffset,
}

impl RegionConfig {
    /// A region of `len` bytes of this backing at guest address 0 and image offset 0, with the
    /// default granule and no transparent huge pages, and with a fill view where the backing
    /// allows one.
    pub fn new(len: u64, backing: Backing) -> Self {
        Self {
            guest_base: GuestAddress::new(0),
            len,
            backing,
            granule: None,
            thp: Thp::default(),
            fill_view: matches!(backing, Backing::Memfd | Backing::Hugetlb(_)),
            vcpu_view: false,
            image_offset: ImageOffset::new(0),
        }
    }
}

/// Why a [`Region`](super::Region) could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The length does not fit the sizes of pages and granules.
    #[error(
        "region at guest address {guest_base}: its length {len:#x} is no positive multiple of both the page size {page_size} and the granule {granule}"
    )]
    Length {
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
        /// The length, in bytes.
        len: u64,
        /// The backing's page size.
        page_size: PageSize,
        /// The unit of presence.
        granule: PageSize,
    },
    /// The region does not begin on a page of the guest, or ends beyond its address space.
    #[error(
        "region of {len:#x} bytes cannot begin at guest address {guest_base}: it is no multiple of {page_size}, or too high"
    )]
    GuestBase {
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
        /// The length, in bytes.
        len: u64,
        /// What the address must be a multiple of.
        page_size: PageSize,
    },
    /// The region's image would end beyond the highest offset.
    #[error("region of {len:#x} bytes cannot begin at image offset {image_offset}: it is too high")]
    ImageOffset {
        /// Where the region was to begin in the image.
        image_offset: ImageOffset,
        /// The length, in bytes.
        len: u64,
    },
    /// This backing cannot have a second view.
    #[error(
        "region at guest address {guest_base}: {backing} cannot be mapped a second time, so there is no {view} view"
    )]
    NoSecondView {
        /// Which view was asked for.
        view: &'static str,
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
        /// The backing.
        backing: Backing,
    },
    /// The mapping of an embedder does not begin on a page of its backing.
    #[error("embedder's mapping {view} does not begin at a multiple of its page size {page_size}")]
    ViewAlignment {
        /// The mapping.
        view: HostRange,
        /// The page size stated for it.
        page_size: PageSize,
    },
    /// Two mappings of an embedder are not two views of the same memory.
    #[error("embedder's {name} view {view} and view {other} differ in length or overlap")]
    ViewMismatch {
        /// Which view.
        name: &'static str,
        /// Where it is.
        view: HostRange,
        /// The view that it does not go with.
        other: HostRange,
    },
    /// [`Region::new`](super::Region::new) was asked for memory that only an embedder has.
    #[error(
        "region at guest address {guest_base}: an embedder's memory is handed in with Region::external"
    )]
    ExternalBacking {
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
    },
    /// The memory file could not be made.
    #[error("region at guest address {guest_base}: {source}")]
    File {
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
        /// What went wrong.
        source: MemoryFileError,
    },
    /// A view could not be mapped.
    #[error("region at guest address {guest_base}: {view} view: {source}")]
    Mapping {
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
        /// Which view.
        view: &'static str,
        /// What went wrong.
        source: MappingError,
    },
    /// The kernel did not accept the setting for transparent huge pages.
    #[error("region at guest address {guest_base}: madvise({advice:?}) of {range}: {source}")]
    Thp {
        /// Where the guest was to have the region.
        guest_base: GuestAddress,
        /// The view.
        range: HostRange,
        /// What was asked for.
        advice: Advice,
        /// What the kernel answered.
        source: io::Error,
    },
}
