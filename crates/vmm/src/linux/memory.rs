//! The guest's memory as its devices access it.

use std::{
    fmt, io,
    sync::{Arc, OnceLock},
};

use pageferry_kvm::dirty::WriteMarks;
use pageferry_memory::{
    GuestAddress, HostAddress, Region, State,
    adapter::{self, AdapterError, RegionMemory, View},
};
use pageferry_paging::Pager;
use vm_memory::{
    GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestRegionCollection,
    Permissions, bitmap::BS, guest_memory::GuestMemorySliceIterator,
};

use crate::memory::must_ask_first;

/// All of the memory, in its guest views. What is written through it is marked.
pub(crate) type MarkedMemory = GuestRegionCollection<RegionMemory<WriteMarks>>;

/// The memory, for devices: a slice of it is given out when all of it has come, or comes when it is
/// touched, and never if some of it can never come. Cheap to clone.
#[derive(Clone)]
pub(crate) struct DeviceMemory {
    memory: Arc<MarkedMemory>,
    /// Who brings it, once there is somebody.
    pager: Arc<OnceLock<Arc<Pager>>>,
}

impl DeviceMemory {
    pub(crate) fn new(regions: &[Arc<Region>]) -> Result<Self, AdapterError> {
        let marks = |region: &Arc<Region>| WriteMarks::new(region.len());
        let memory = adapter::guest_memory_with(regions, View::Guest, marks)?;
        Ok(Self { memory: Arc::new(memory), pager: Arc::default() })
    }

    /// The memory without asking, for who knows that it is there.
    pub(crate) fn marked(&self) -> &MarkedMemory {
        &self.memory
    }

    /// From now on this pager is asked, where asking is needed. There is one in a machine's life.
    pub(crate) fn set_pager(&self, pager: &Arc<Pager>) -> bool {
        self.pager.set(Arc::clone(pager)).is_ok()
    }

    /// The marks of the region that begins there.
    pub(crate) fn marks(&self, guest_base: GuestAddress) -> Option<WriteMarks> {
        let region = self.memory.find_region(guest_base.into())?;
        Some(region.bitmap())
    }

    fn bring(&self, start: vm_memory::GuestAddress, count: usize) -> Result<(), GuestMemoryError> {
        let mut address = start.0;
        let end = address
            .checked_add(count as u64)
            .ok_or(GuestMemoryError::InvalidGuestAddress(start))?;
        while address < end {
            let Some(theirs) = self.memory.find_region(vm_memory::GuestAddress(address)) else {
                return Err(GuestMemoryError::InvalidGuestAddress(vm_memory::GuestAddress(
                    address,
                )));
            };
            let region = theirs.region();
            self.bring_granule(region, GuestAddress::new(address))?;
            let granule = region.granule().bytes();
            let offset = address - region.guest_base().get();
            // The region ends at an address, and its granules divide it.
            address = region.guest_base().get() + (offset / granule + 1) * granule;
        }
        Ok(())
    }

    fn bring_granule(
        &self,
        region: &Region,
        address: GuestAddress,
    ) -> Result<(), GuestMemoryError> {
        let cannot_come = || {
            let why = format!("the memory at {address} can never come");
            GuestMemoryError::IOError(io::Error::other(why))
        };
        let granule = region.granule_at_guest(address).ok_or_else(cannot_come)?;
        match region.page_map().state(granule) {
            State::Present => return Ok(()),
            State::Poisoned => return Err(cannot_come()),
            _ => {}
        }
        if let Some(pager) = self.pager.get()
            && must_ask_first(region, pager.chosen().delivery)
        {
            let host = self.memory.get_host_address(address.into())?;
            if !pager.resolve(HostAddress::from_ptr(host)) {
                return Err(cannot_come());
            }
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl GuestMemory for DeviceMemory {
    type PhysicalMemory = MarkedMemory;
    type Bitmap = WriteMarks;

    fn check_range(
        &self,
        address: vm_memory::GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> bool {
        GuestMemoryBackend::check_range(&*self.memory, address, count)
    }

    fn get_slices<'a>(
        &'a self,
        address: vm_memory::GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, WriteMarks>>, GuestMemoryError> {
        self.bring(address, count)?;
        Ok(GuestMemoryBackend::get_slices(&*self.memory, address, count))
    }
}
