//! One contiguous range of guest memory: its views, its sizes, and the state of its granules.

mod config;

use std::io;
use std::sync::Arc;

pub use self::config::{Backing, RegionConfig, RegionError, Thp};
use crate::mapping::{Advice, Mapping};
use crate::memory_file::{MemoryFile, MemoryFileKind};
use crate::{
    GranuleIndex, GranuleRange, GuestAddress, HostAddress, HostRange, ImageOffset, PageMap,
    PageSize,
};

/// One contiguous range of guest memory.
///
/// Its *guest view* is the mapping in which the guest faults. Its *fill view*, if there is one,
/// shows the same pages and never faults: bytes are written there before the guest may see them.
/// Its *vCPU view*, if there is one, is a third mapping, for KVM's memory slot alone.
/// Page size (of the backing) and granule (the unit of presence) are not always the same.
#[derive(Debug)]
pub struct Region {
    guest_view: Arc<Mapping>,
    fill_view: Option<Arc<Mapping>>,
    vcpu_view: Option<Arc<Mapping>>,
    file: Option<MemoryFile>,
    backing: Backing,
    page_size: PageSize,
    granule: PageSize,
    guest_base: GuestAddress,
    image_offset: ImageOffset,
    page_map: PageMap,
}

/// The sizes and places of a region, checked.
struct Geometry {
    len: u64,
    page_size: PageSize,
    granule: PageSize,
    guest_base: GuestAddress,
    image_offset: ImageOffset,
}

impl Geometry {
    fn check(&self) -> Result<(), RegionError> {
        let &Self { len, page_size, granule, guest_base, image_offset } = self;
        if len == 0 || !page_size.is_multiple(len) || !granule.is_multiple(len) {
            return Err(RegionError::Length { guest_base, len, page_size, granule });
        }
        let guest_page = PageSize::base();
        if !guest_base.is_aligned(guest_page) || guest_base.checked_add(len).is_none() {
            return Err(RegionError::GuestBase { guest_base, len, page_size: guest_page });
        }
        if image_offset.checked_add(len).is_none() {
            return Err(RegionError::ImageOffset { image_offset, len });
        }
        Ok(())
    }

    fn region(
        self,
        backing: Backing,
        guest_view: Arc<Mapping>,
        fill_view: Option<Arc<Mapping>>,
        vcpu_view: Option<Arc<Mapping>>,
        file: Option<MemoryFile>,
    ) -> Region {
        Region {
            guest_view,
            fill_view,
            vcpu_view,
            file,
            backing,
            page_size: self.page_size,
            granule: self.granule,
            guest_base: self.guest_base,
            image_offset: self.image_offset,
            page_map: PageMap::new(self.len >> self.granule.shift()),
        }
    }
}

impl Region {
    /// Makes the memory: every granule is absent.
    ///
    /// # Errors
    ///
    /// See [`RegionError`]. When there are too few huge pages, it says how many are needed, how
    /// many are free, and how to reserve more.
    pub fn new(config: &RegionConfig) -> Result<Self, RegionError> {
        let guest_base = config.guest_base;
        let file_kind = match config.backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(MemoryFileKind::Normal),
            Backing::Hugetlb(size) => Some(MemoryFileKind::Hugetlb(size)),
            Backing::External => return Err(RegionError::ExternalBacking { guest_base }),
        };
        let page_size = file_kind.unwrap_or(MemoryFileKind::Normal).page_size();
        let geometry = Geometry {
            len: config.len,
            page_size,
            granule: config.granule.unwrap_or(page_size),
            guest_base,
            image_offset: config.image_offset,
        };
        geometry.check()?;

        let len = config.len;
        let mapping_failed = |view| move |source| RegionError::Mapping { guest_base, view, source };
        let (guest, fill, vcpu, file) = match file_kind {
            None if config.fill_view || config.vcpu_view => {
                let view = if config.fill_view { "fill" } else { "vCPU" };
                let backing = config.backing;
                return Err(RegionError::NoSecondView { view, guest_base, backing });
            }
            None => (Mapping::anonymous(len).map_err(mapping_failed("guest"))?, None, None, None),
            Some(kind) => {
                let hugetlb = match kind {
                    MemoryFileKind::Normal => None,
                    MemoryFileKind::Hugetlb(size) => Some(size),
                };
                let file = MemoryFile::create("pageferry", len, kind)
                    .map_err(|source| RegionError::File { guest_base, source })?;
                let map =
                    |view| Mapping::shared(&file, 0, len, hugetlb).map_err(mapping_failed(view));
                let guest = map("guest")?;
                let fill = config.fill_view.then(|| map("fill")).transpose()?;
                let vcpu = config.vcpu_view.then(|| map("vCPU")).transpose()?;
                (guest, fill, vcpu, Some(file))
            }
        };
        if !matches!(config.backing, Backing::Hugetlb(_)) {
            for view in std::iter::once(&guest).chain(&fill).chain(&vcpu) {
                set_thp(view, config.thp, guest_base)?;
            }
        }
        let [fill, vcpu] = [fill, vcpu].map(|view| view.map(Arc::new));
        Ok(geometry.region(config.backing, Arc::new(guest), fill, vcpu, file))
    }

    /// Takes memory that an embedder has mapped: every granule is absent.
    ///
    /// `page_size` is that of the memory behind the mappings; `granule`, if not given, is the
    /// same. Both views must show the same memory from their first byte on; that they do cannot
    /// be checked here.
    ///
    /// # Errors
    ///
    /// See [`RegionError`].
    pub fn external(
        guest_view: Arc<Mapping>,
        fill_view: Option<Arc<Mapping>>,
        page_size: PageSize,
        granule: Option<PageSize>,
        guest_base: GuestAddress,
        image_offset: ImageOffset,
    ) -> Result<Self, RegionError> {
        let guest = guest_view.range();
        let geometry = Geometry {
            len: guest.len(),
            page_size,
            granule: granule.unwrap_or(page_size),
            guest_base,
            image_offset,
        };
        geometry.check()?;
        check_aligned(guest, page_size)?;
        if let Some(fill) = fill_view.as_ref().map(|view| view.range()) {
            check_aligned(fill, page_size)?;
            check_views("fill", fill, guest)?;
        }
        Ok(geometry.region(Backing::External, guest_view, fill_view, None, None))
    }

    /// Adds a vCPU view that an embedder has mapped: the same memory as the guest view from its
    /// first byte on, which cannot be checked here.
    ///
    /// # Errors
    ///
    /// [`RegionError::ViewAlignment`] or [`RegionError::ViewMismatch`].
    pub fn with_vcpu_view(self, view: Arc<Mapping>) -> Result<Self, RegionError> {
        let range = view.range();
        check_aligned(range, self.page_size)?;
        for other in std::iter::once(&self.guest_view).chain(&self.fill_view) {
            check_views("vCPU", range, other.range())?;
        }
        Ok(Self { vcpu_view: Some(view), ..self })
    }

    /// The mapping in which the guest faults.
    #[inline]
    pub fn guest_view(&self) -> &Arc<Mapping> {
        &self.guest_view
    }

    /// The mapping through which bytes are written without faulting.
    #[inline]
    pub fn fill_view(&self) -> Option<&Arc<Mapping>> {
        self.fill_view.as_ref()
    }

    /// The mapping that only KVM's memory slot uses, if it has one of its own.
    #[inline]
    pub fn vcpu_view(&self) -> Option<&Arc<Mapping>> {
        self.vcpu_view.as_ref()
    }

    /// What KVM's memory slot is made of: the vCPU view or, without one, the guest view.
    #[inline]
    pub fn kvm_view(&self) -> &Arc<Mapping> {
        self.vcpu_view.as_ref().unwrap_or(&self.guest_view)
    }

    /// The memory file behind the views, if the region made one.
    #[inline]
    pub fn file(&self) -> Option<&MemoryFile> {
        self.file.as_ref()
    }

    /// What the memory is.
    #[inline]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The size of the backing's pages.
    #[inline]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The unit of presence.
    #[inline]
    pub fn granule(&self) -> PageSize {
        self.granule
    }

    /// How many granules it has.
    #[inline]
    pub fn granules(&self) -> u64 {
        self.page_map.len()
    }

    /// All of its granules.
    #[inline]
    pub fn all_granules(&self) -> GranuleRange {
        GranuleRange::new(GranuleIndex::new(0), self.granules())
    }

    /// Its length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> u64 {
        self.guest_view.range().len()
    }

    /// Where the guest has its first byte.
    #[inline]
    pub fn guest_base(&self) -> GuestAddress {
        self.guest_base
    }

    /// Where its first byte is in the image.
    #[inline]
    pub fn image_offset(&self) -> ImageOffset {
        self.image_offset
    }

    /// The state of its granules.
    #[inline]
    pub fn page_map(&self) -> &PageMap {
        &self.page_map
    }

    /// The granule that holds this address of the guest view.
    #[inline]
    pub fn granule_at(&self, address: HostAddress) -> Option<GranuleIndex> {
        self.granule_at_offset(address.offset_from(self.guest_view.range().start())?)
    }

    /// The granule that holds this guest address.
    #[inline]
    pub fn granule_at_guest(&self, address: GuestAddress) -> Option<GranuleIndex> {
        self.granule_at_offset(address.offset_from(self.guest_base)?)
    }

    /// The granule whose bytes the image has at this offset.
    #[inline]
    pub fn granule_at_image(&self, offset: ImageOffset) -> Option<GranuleIndex> {
        self.granule_at_offset(offset.offset_from(self.image_offset)?)
    }

    #[inline]
    fn granule_at_offset(&self, offset: u64) -> Option<GranuleIndex> {
        (offset < self.len()).then(|| GranuleIndex::new(offset >> self.granule.shift()))
    }

    /// The granules of which at least one byte lies in `range` of the guest view; empty when there
    /// is none.
    pub fn granules_touching(&self, range: HostRange) -> GranuleRange {
        let Some((start, end)) = self.offsets_within(range) else {
            return GranuleRange::default();
        };
        let first = start >> self.granule.shift();
        let last = (end - 1) >> self.granule.shift();
        GranuleRange::new(GranuleIndex::new(first), last - first + 1)
    }

    /// The granules that lie in `range` of the guest view with all their bytes; empty when there
    /// is none.
    pub fn granules_inside(&self, range: HostRange) -> GranuleRange {
        let Some((start, end)) = self.offsets_within(range) else {
            return GranuleRange::default();
        };
        let first = start.div_ceil(self.granule.bytes());
        let end = end >> self.granule.shift();
        GranuleRange::new(GranuleIndex::new(first), end.saturating_sub(first))
    }

    /// The part of `range` inside the guest view as offsets from its beginning, not empty.
    fn offsets_within(&self, range: HostRange) -> Option<(u64, u64)> {
        let view = self.guest_view.range();
        let common = view.intersection(range)?;
        let start = common.start().offset_from(view.start())?;
        Some((start, start + common.len()))
    }

    /// Where the granules are in the guest view; `None` when not all are in the region.
    #[inline]
    pub fn try_host_range(&self, granules: GranuleRange) -> Option<HostRange> {
        self.part_of(self.guest_view.range(), granules)
    }

    /// Where the granules are in the guest view.
    ///
    /// # Panics
    ///
    /// When not all of them are in the region. For numbers that come from elsewhere use
    /// [`try_host_range`](Self::try_host_range).
    #[inline]
    pub fn host_range(&self, granules: GranuleRange) -> HostRange {
        self.try_host_range(granules).unwrap_or_else(|| self.out_of_region(granules))
    }

    /// Where the granules are in the fill view; `None` when there is no such view.
    ///
    /// # Panics
    ///
    /// When not all granules are in the region.
    #[inline]
    pub fn fill_range(&self, granules: GranuleRange) -> Option<HostRange> {
        let view = self.fill_view.as_ref()?.range();
        Some(self.part_of(view, granules).unwrap_or_else(|| self.out_of_region(granules)))
    }

    /// Where the bytes of the granules are in the image, and how many.
    ///
    /// # Panics
    ///
    /// When not all granules are in the region.
    #[inline]
    pub fn image_range(&self, granules: GranuleRange) -> (ImageOffset, u64) {
        let Some((offset, len)) = self.bytes_of(granules) else { self.out_of_region(granules) };
        // Cannot wrap: the image of the whole region fits.
        (ImageOffset::new(self.image_offset.get() + offset), len)
    }

    /// Where the guest has the granule; `None` when it is not in the region.
    #[inline]
    pub fn try_guest_address(&self, granule: GranuleIndex) -> Option<GuestAddress> {
        (granule.get() < self.granules()).then(|| {
            // Cannot wrap: the whole region fits into the guest's address space.
            GuestAddress::new(self.guest_base.get() + (granule.get() << self.granule.shift()))
        })
    }

    /// Where the guest has the granule.
    ///
    /// # Panics
    ///
    /// When it is not in the region.
    #[inline]
    pub fn guest_address(&self, granule: GranuleIndex) -> GuestAddress {
        let Some(address) = self.try_guest_address(granule) else {
            panic!("granule {granule} is not in a region of {}", self.granules())
        };
        address
    }

    #[inline]
    fn part_of(&self, view: HostRange, granules: GranuleRange) -> Option<HostRange> {
        let (offset, len) = self.bytes_of(granules)?;
        Some(view.split_at(offset).1.split_at(len).0)
    }

    /// Offset from the region's beginning, and length, in bytes.
    #[inline]
    fn bytes_of(&self, granules: GranuleRange) -> Option<(u64, u64)> {
        let shift = self.granule.shift();
        (granules.end().get() <= self.granules())
            .then(|| (granules.first().get() << shift, granules.count() << shift))
    }

    #[cold]
    #[track_caller]
    fn out_of_region(&self, granules: GranuleRange) -> ! {
        panic!("{granules} are not all in a region of {} granules", self.granules())
    }
}

fn check_aligned(view: HostRange, page_size: PageSize) -> Result<(), RegionError> {
    if view.start().is_aligned(page_size.bytes()) {
        return Ok(());
    }
    Err(RegionError::ViewAlignment { view, page_size })
}

/// Two views of the same memory are as long as each other, and two.
fn check_views(name: &'static str, view: HostRange, other: HostRange) -> Result<(), RegionError> {
    if view.len() == other.len() && !view.overlaps(other) {
        return Ok(());
    }
    Err(RegionError::ViewMismatch { name, view, other })
}

fn set_thp(view: &Mapping, thp: Thp, guest_base: GuestAddress) -> Result<(), RegionError> {
    let advice = match thp {
        Thp::Default => return Ok(()),
        Thp::Always => Advice::HugePage,
        Thp::Never => Advice::NoHugePage,
    };
    match view.advise(view.range(), advice) {
        // A kernel without transparent huge pages does not know the advice, and never uses them.
        Err(error) if thp == Thp::Never && error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        Err(source) => Err(RegionError::Thp { guest_base, range: view.range(), advice, source }),
        Ok(()) => Ok(()),
    }
}
