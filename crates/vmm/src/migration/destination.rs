//! The machine that comes.

use std::{
    fs, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pageferry_kvm::{VmPager, VmPagerOptions};
use pageferry_memory::{Layout, PageSize, Region};
use pageferry_migrate::{DestinationGuest, DeviceState, GuestError, core::RegionInfo};
use pageferry_paging::{Builder, Delivery, Pager};

use super::{NAME, failed};
use crate::{
    Machine, Setup, Vm, VmConfig, memory,
    state::{self, MachineState},
    vm,
};

/// What the machine that comes is to be here: all that the guest cannot tell.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// How its memory is mapped.
    pub setup: Setup,
    /// The size of its memory's pages.
    pub page_size: PageSize,
    /// How faults are delivered while memory is absent; `None`: as the pager chooses.
    pub delivery: Option<Delivery>,
    /// Bytes of a dirty ring for each vCPU, for when it is moved again.
    pub dirty_ring: Option<u32>,
}

/// Set-up (b) with pages of 4 KiB.
impl Default for Arrival {
    fn default() -> Self {
        Self { setup: Setup::Minor, page_size: PageSize::SIZE_4K, delivery: None, dirty_ring: None }
    }
}

/// A place where a [`Machine`] can arrive.
#[derive(Debug, Default)]
pub struct MachineDestination {
    arrival: Arrival,
    come: Mutex<Come>,
}

/// What has come of it so far.
#[derive(Debug, Default)]
struct Come {
    regions: Vec<Arc<Region>>,
    vm: Option<Arc<Vm>>,
    machine: Option<Arc<Machine>>,
}

impl MachineDestination {
    /// For one machine.
    pub fn new(arrival: Arrival) -> Self {
        Self { arrival, come: Mutex::default() }
    }

    /// The machine, once it runs here.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        self.lock().machine.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Come> {
        // A panic cannot leave it half changed.
        self.come.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the memory is made by. All but the views and their backing is as the source says.
    fn config(&self) -> VmConfig {
        let Arrival { setup, page_size, dirty_ring, .. } = self.arrival;
        VmConfig { setup, page_size, dirty_ring, ..VmConfig::new(1, page_size.bytes()) }
    }

    fn region(&self, info: &RegionInfo, total: u64) -> Result<Arc<Region>, GuestError> {
        let config = memory::region(&self.config(), info.guest_base, info.length);
        let region = Region::new(&config)
            .map_err(|error| GuestError::Memory { bytes: total, why: error.to_string() })?;
        Ok(Arc::new(region))
    }
}

impl DestinationGuest for MachineDestination {
    fn prepare(&self, regions: &[RegionInfo]) -> Result<Layout, GuestError> {
        let what = "making the guest's memory";
        let total = regions
            .iter()
            .try_fold(0_u64, |sum, region| sum.checked_add(region.length))
            .ok_or_else(|| GuestError::failed(what, "more bytes than there are numbers"))?;
        // Huge pages are reserved when they are mapped; ordinary memory has to be looked for.
        if self.arrival.page_size == PageSize::SIZE_4K
            && let Some(free) =
                available().map_err(failed("finding out how much memory is free"))?
            && free < total
        {
            return Err(GuestError::Memory { bytes: total, why: format!("{free} bytes are free") });
        }
        let regions =
            regions.iter().map(|info| self.region(info, total)).collect::<Result<Vec<_>, _>>()?;
        let layout = Layout::new(regions.clone()).map_err(failed(what))?;
        self.lock().regions = regions;
        Ok(layout)
    }

    fn deliver(&self, builder: Builder) -> Builder {
        let builder = vm::for_setup(builder, self.arrival.setup, self.arrival.page_size);
        match self.arrival.delivery {
            Some(delivery) => builder.delivery(delivery),
            None => builder,
        }
    }

    fn restore(&self, state: &DeviceState) -> Result<(), GuestError> {
        let refused = |why: String| GuestError::State {
            name: state.name.clone(),
            version: state.version,
            why,
        };
        if (state.name.as_str(), state.version) != (NAME, state::VERSION) {
            return Err(refused(format!("known here is {NAME:?} version {}", state::VERSION)));
        }
        let machine = MachineState::decode(&state.bytes).map_err(|why| refused(why.to_string()))?;
        let config = VmConfig::of_state(&machine).map_err(|why| refused(why.to_string()))?;
        let Arrival { setup, page_size, dirty_ring, .. } = self.arrival;
        let config = VmConfig { setup, page_size, dirty_ring, ..config };
        let regions = self.lock().regions.clone();
        let vm = Vm::with_regions(config, regions).map_err(|why| refused(why.to_string()))?;
        vm.restore(&machine).map_err(|why| refused(why.to_string()))?;
        self.lock().vm = Some(Arc::new(vm));
        Ok(())
    }

    fn run(&self, pager: Option<Arc<Pager>>) -> Result<(), GuestError> {
        let what = "running the machine";
        let vm = self.lock().vm.take();
        let vm = vm.ok_or_else(|| GuestError::failed(what, "it has no state"))?;
        let pager = match pager {
            Some(pager) => {
                let options = VmPagerOptions {
                    guest_page_tables_resident: true,
                    on_write: Some(vm.on_write()),
                    ..VmPagerOptions::default()
                };
                Some(VmPager::new(pager, options).map_err(failed(what))?)
            }
            None => {
                for (_, region) in vm.layout().iter() {
                    region.page_map().set_present(region.all_granules());
                }
                None
            }
        };
        let machine = Arc::new(Machine::new(vm, pager));
        machine.start().map_err(failed(what))?;
        self.lock().machine = Some(machine);
        Ok(())
    }

    fn drop_guest(&self) {
        let come = std::mem::take(&mut *self.lock());
        drop(come);
    }
}

/// Bytes of memory that can be had without swapping, as the kernel estimates it; `None` if it does
/// not. Source: proc_meminfo(5).
fn available() -> io::Result<Option<u64>> {
    let text = match fs::read_to_string("/proc/meminfo") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.and_then(|kib| kib.checked_mul(1024)))
}
