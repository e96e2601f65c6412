//! The memory of a VMM that uses the `vm-memory` crate: [`regions`] of memory that it has mapped
//! itself, and the other way round [`guest_memory`] of regions that were made here.
//!
//! That crate's types change with its releases; nothing outside of this module names them.

use std::os::fd::AsFd;
use std::sync::Arc;

use linux_raw_sys::general::HUGETLBFS_MAGIC;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionCollectionError, GuestRegionMmap,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::{
    Backing, GuestAddress, HostAddress, HostRange, ImageOffset, Mapping, PageSize, Region,
    RegionError,
};

/// Why the memory of a VMM cannot be taken, or none can be made of regions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The file behind a region could not be asked for its page size.
    #[error(
        "finding the page size of the file behind guest address {guest_base}: fstatfs: {source}"
    )]
    PageSize {
        /// Where the guest has the region.
        guest_base: GuestAddress,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The region is known to be of huge pages, but of which size cannot be found out: it has no
    /// file that could be asked.
    #[error(
        "region at guest address {guest_base} is of huge pages of unknown size: state the page size"
    )]
    UnknownHugePages {
        /// Where the guest has the region.
        guest_base: GuestAddress,
    },
    /// The regions together are longer than an image can be.
    #[error(
        "the image of the region at guest address {guest_base} would lie beyond the highest offset"
    )]
    ImageTooLong {
        /// Where the guest has the region.
        guest_base: GuestAddress,
    },
    /// A region was refused.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The fill view was asked for, and the region has none.
    #[error("the region at guest address {guest_base} ({backing}) has no fill view")]
    NoFillView {
        /// Where the guest has the region.
        guest_base: GuestAddress,
        /// What the region's memory is.
        backing: Backing,
    },
    /// The regions together are no guest memory: there is none, or some overlap.
    #[error("{count} regions as one guest memory: {source}")]
    Regions {
        /// How many there are.
        count: usize,
        /// What `vm-memory` said.
        source: GuestRegionCollectionError,
    },
}

/// Makes a region of each region of `memory`, in ascending order of guest addresses. Their images
/// follow each other without gaps, as in Firecracker's memory files.
///
/// The memory is kept alive by the regions. It has no fill views, as `vm-memory` maps memory once.
///
/// `page_size`, if given, is that of all regions. Otherwise it is found out: that of the file
/// system for a file of huge pages, and the base page size for everything else. `granule` is the
/// unit of presence; if not given, the page size.
///
/// # Errors
///
/// See [`AdapterError`].
///
/// # Safety
///
/// No Rust reference to the bytes of the memory is used while one of the regions lives (what
/// `vm-memory` itself gives out are volatile slices, not references), and nobody unmaps or
/// replaces any of it behind `vm-memory`'s back.
pub unsafe fn regions<B>(
    memory: &Arc<GuestMemoryMmap<B>>,
    page_size: Option<PageSize>,
    granule: Option<PageSize>,
) -> Result<Vec<Region>, AdapterError>
where
    B: Bitmap + Send + Sync + 'static,
{
    let mut regions = Vec::new();
    let mut image_offset = ImageOffset::new(0);
    for theirs in memory.iter() {
        let guest_base = GuestAddress::new(theirs.start_addr().raw_value());
        let page_size = match page_size {
            Some(size) => size,
            None => page_size_of(theirs, guest_base)?,
        };
        let range = HostRange::new(HostAddress::from_ptr(theirs.as_ptr()), theirs.len());
        // SAFETY: the memory maps the range readable and writable until it is dropped, which the
        // regions prevent by sharing it; the rest is the caller's promise.
        let view = unsafe { Mapping::from_raw(range, memory.clone()) };
        let view = Arc::new(view);
        let ours = Region::external(view, None, page_size, granule, guest_base, image_offset)?;
        image_offset = image_offset
            .checked_add(ours.len())
            .ok_or(AdapterError::ImageTooLong { guest_base })?;
        regions.push(ours);
    }
    Ok(regions)
}

fn page_size_of<B: Bitmap>(
    region: &GuestRegionMmap<B>,
    guest_base: GuestAddress,
) -> Result<PageSize, AdapterError> {
    let Some(file) = GuestMemoryRegion::file_offset(region) else {
        return match GuestMemoryRegion::is_hugetlbfs(region) {
            Some(true) => Err(AdapterError::UnknownHugePages { guest_base }),
            _ => Ok(PageSize::base()),
        };
    };
    let file_system = rustix::fs::fstatfs(file.file().as_fd())
        .map_err(|errno| AdapterError::PageSize { guest_base, source: errno.into() })?;
    if file_system.f_type as u64 != u64::from(HUGETLBFS_MAGIC) {
        return Ok(PageSize::base());
    }
    PageSize::try_new(file_system.f_bsize as u64)
        .ok_or(AdapterError::UnknownHugePages { guest_base })
}

/// Through which of its mappings a region's memory is accessed.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum View {
    /// The guest view, in which an access to what is absent is a fault, and waits. It is for
    /// everybody who acts as the guest's hardware does: devices, loaders, debuggers.
    ///
    /// Where faults are delivered as exits of vCPUs only, nobody hears of such a fault: what is
    /// absent is a memory error then (SIGBUS), and has to be asked for before it is touched.
    Guest,
    /// The fill view, in which nothing faults. It is for whoever brings memory, and for looking at
    /// what has arrived: what is absent reads as zero, and writing does not make it present.
    Fill,
}

/// A region as a region of `vm-memory`.
///
/// It keeps the region, and so the mapping, alive: a slice borrows from it, and cannot outlive it.
/// (`GuestRegionMmap` could not say so: it hands out its inner `MmapRegion`, which knows nothing of
/// whoever owns the memory.) A pointer from `get_host_address` is the caller's to look after.
#[derive(Debug)]
pub struct RegionMemory<B = ()> {
    region: Arc<Region>,
    view: View,
    mapping: Arc<Mapping>,
    bitmap: B,
}

impl<B: Bitmap> RegionMemory<B> {
    /// The memory of `region` in one of its views. What is written through it is marked in
    /// `bitmap`, at offsets from the region's beginning; `()` marks nothing.
    ///
    /// # Errors
    ///
    /// [`AdapterError::NoFillView`].
    pub fn new(region: &Arc<Region>, view: View, bitmap: B) -> Result<Self, AdapterError> {
        let mapping = match view {
            View::Guest => region.guest_view(),
            View::Fill => region.fill_view().ok_or(AdapterError::NoFillView {
                guest_base: region.guest_base(),
                backing: region.backing(),
            })?,
        };
        Ok(Self { region: Arc::clone(region), view, mapping: Arc::clone(mapping), bitmap })
    }

    /// The region.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The view.
    pub fn view(&self) -> View {
        self.view
    }
}

impl<B: Bitmap> GuestMemoryRegion for RegionMemory<B> {
    type B = B;

    fn len(&self) -> GuestUsize {
        self.region.len()
    }

    fn start_addr(&self) -> vm_memory::GuestAddress {
        self.region.guest_base().into()
    }

    fn bitmap(&self) -> BS<'_, B> {
        self.bitmap.slice_at(0)
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let address = self.check_address(address).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.as_ptr().wrapping_add(address.raw_value() as usize))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, B>>, GuestMemoryError> {
        let offset = offset.raw_value();
        if offset.checked_add(count as u64).is_none_or(|end| end > self.region.len()) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let offset = offset as usize;
        let start = self.mapping.as_ptr().wrapping_add(offset);
        // SAFETY: all of the bytes lie in the mapping, which `self` shares and from which the slice
        // borrows; of a mapping's bytes nobody has a Rust reference.
        Ok(unsafe { VolatileSlice::with_bitmap(start, count, self.bitmap.slice_at(offset), None) })
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        Some(self.region.page_size() != PageSize::base())
    }
}

impl<B: Bitmap> GuestMemoryRegionBytes for RegionMemory<B> {}

/// The memory of regions, as `vm-memory` and what builds on it (virtio, loaders) use it: a
/// [`GuestMemoryBackend`]. It keeps the regions alive.
///
/// `regions` may come in any order; those of a [`Layout`](crate::Layout) are
/// `layout.iter().map(|(_, region)| region)`.
///
/// # Errors
///
/// See [`AdapterError`].
pub fn guest_memory<'r>(
    regions: impl IntoIterator<Item = &'r Arc<Region>>,
    view: View,
) -> Result<GuestRegionCollection<RegionMemory>, AdapterError> {
    guest_memory_with(regions, view, |_| ())
}

/// As [`guest_memory`], with a bitmap for each region, in which whoever writes through this memory
/// marks it.
///
/// # Errors
///
/// See [`AdapterError`].
pub fn guest_memory_with<'r, B: Bitmap>(
    regions: impl IntoIterator<Item = &'r Arc<Region>>,
    view: View,
    mut bitmap: impl FnMut(&Arc<Region>) -> B,
) -> Result<GuestRegionCollection<RegionMemory<B>>, AdapterError> {
    let mut theirs = regions
        .into_iter()
        .map(|region| RegionMemory::new(region, view, bitmap(region)))
        .collect::<Result<Vec<_>, _>>()?;
    theirs.sort_by_key(GuestMemoryRegion::start_addr);
    let count = theirs.len();
    GuestRegionCollection::from_regions(theirs)
        .map_err(|source| AdapterError::Regions { count, source })
}

impl From<GuestAddress> for vm_memory::GuestAddress {
    fn from(address: GuestAddress) -> Self {
        Self(address.get())
    }
}

impl From<vm_memory::GuestAddress> for GuestAddress {
    fn from(address: vm_memory::GuestAddress) -> Self {
        Self::new(address.raw_value())
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
