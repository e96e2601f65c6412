//! Regions of the memory of a VMM that uses the `vm-memory` crate.
//!
//! That crate's types change with its releases; nothing outside of this module names them.

use std::os::fd::AsFd;
use std::sync::Arc;

use linux_raw_sys::general::HUGETLBFS_MAGIC;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::{
    GuestAddress, HostAddress, HostRange, ImageOffset, Mapping, PageSize, Region, RegionError,
};

/// Why the memory of a VMM cannot be taken.
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

#[cfg(all(test, not(loom)))]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use vm_memory::{Bytes, FileOffset, GuestAddress as TheirAddress};

    use super::*;
    use crate::{GranuleIndex, HugePagePool, Layout, MemoryFile, MemoryFileKind, RegionId, State};

    const MIB: usize = 1 << 20;

    fn regions_of(memory: &Arc<GuestMemoryMmap>) -> Result<Vec<Region>, AdapterError> {
        // SAFETY: the tests hold no references to the memory, and leave it mapped.
        unsafe { regions(memory, None, None) }
    }

    #[test]
    fn regions_on_both_sides_of_a_hole() {
        let ranges = [(TheirAddress(0), 4 * MIB), (TheirAddress(4 << 30), 2 * MIB)];
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
        let ours = regions_of(&memory).unwrap();
        assert_eq!(ours.iter().map(Region::len).collect::<Vec<_>>(), [4 << 20, 2 << 20]);
        assert_eq!(ours[1].guest_base(), GuestAddress::new(4 << 30));
        assert_eq!(ours[1].image_offset(), ImageOffset::new(4 << 20));
        assert_eq!(ours[1].granules(), 512);
        assert_eq!(ours[0].page_map().count(State::Absent), 1024);

        memory.write_slice(b"pageferry", TheirAddress((4 << 30) + 8190)).unwrap();
        let layout = Layout::new(ours.into_iter().map(Arc::new).collect()).unwrap();
        let found = layout.find_guest(GuestAddress::new((4 << 30) + 8190)).unwrap();
        assert_eq!(found, (RegionId::new(1), GranuleIndex::new(1)));
        // The regions keep the memory alive.
        drop(memory);
        let mut read = [0; 9];
        layout.get(found.0).unwrap().guest_view().read_at(8190, &mut read).unwrap();
        assert_eq!(&read, b"pageferry");
    }

    fn memory_on(kind: MemoryFileKind, len: usize) -> Arc<GuestMemoryMmap> {
        let file = MemoryFile::create("vm-memory", len as u64, kind).unwrap();
        let fd: OwnedFd = file.fd().try_clone_to_owned().unwrap();
        let file = FileOffset::new(File::from(fd), 0);
        let ranges = [(TheirAddress(0), len, Some(file))];
        Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
    }

    #[test]
    fn a_memfd_has_base_pages() {
        let memory = memory_on(MemoryFileKind::Normal, MIB);
        let ours = regions_of(&memory).unwrap();
        assert_eq!(ours[0].page_size(), PageSize::base());
        assert_eq!(ours[0].granules(), 256);
    }

    #[test]
    fn huge_pages_are_recognized() {
        let size = PageSize::SIZE_2M;
        if HugePagePool::read(size).map_or(0, |pool| pool.available()) < 2 {
            println!("skipped: needs 2 free huge pages of {size}");
            return;
        }
        let ours = regions_of(&memory_on(MemoryFileKind::Hugetlb(size), 4 * MIB)).unwrap();
        assert_eq!(ours[0].page_size(), size);
        assert_eq!(ours[0].granules(), 2);
    }
}
