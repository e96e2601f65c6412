//! A machine for Linux that is moved by [`pageferry_migrate`].

use std::{
    fmt, fs, mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pageferry_dirty::{DirtySet, Tracked, Tracker};
use pageferry_kvm::{KvmAreas, VmPager, VmPagerOptions, dirty::KvmTracker};
use pageferry_memory::{GranuleIndex, GranuleRange, Layout, Region};
use pageferry_migrate::{
    DestinationGuest, DeviceState, DirtySink, GuestError, SourceGuest, core::RegionInfo,
};
use pageferry_paging::{Builder, Pager};

use super::{ConsoleOut, LinuxConfig, LinuxVm, layout};
use crate::{
    state::{self, MachineState},
    vm,
};

/// What the state of these machines is called in a migration.
const NAME: &str = "pageferry-linux";
/// Dirty memory is reported in units of so many bytes.
const UNIT: u64 = 4096;

fn failed<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> GuestError {
    move |why| GuestError::failed(what, why)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave what is locked here half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running machine that is to be moved away. All of its memory is there, and its writes are tracked
/// by KVM's dirty log.
#[derive(Debug)]
pub struct LinuxSource {
    vm: Arc<LinuxVm>,
    /// While writes are tracked, and nobody is asking for them.
    tracker: Mutex<Option<Box<(KvmTracker, DirtySet)>>>,
    paused: Mutex<bool>,
}

impl LinuxSource {
    /// Moves this machine.
    pub fn new(vm: Arc<LinuxVm>) -> Self {
        Self { vm, tracker: Mutex::default(), paused: Mutex::default() }
    }

    fn set_paused(&self, wanted: bool) {
        let before = mem::replace(&mut *lock(&self.paused), wanted);
        match (before, wanted) {
            (false, true) => self.vm.pause(),
            (true, false) => self.vm.resume(),
            _ => {}
        }
    }
}

impl SourceGuest for LinuxSource {
    fn layout(&self) -> Layout {
        self.vm.layout()
    }

    fn start_tracking(&self) -> Result<(), GuestError> {
        const WHAT: &str = "beginning to track writes";
        let slots = self.vm.tracked_slots();
        let views: Vec<_> = slots.iter().map(|slot| Tracked::base(slot.view)).collect();
        let mut tracker = self.vm.tracker().map_err(failed(WHAT))?;
        let dirty = DirtySet::new(&views).map_err(failed(WHAT))?;
        tracker.arm(&views).map_err(failed(WHAT))?;
        *lock(&self.tracker) = Some(Box::new((tracker, dirty)));
        Ok(())
    }

    fn harvest(&self, into: &mut DirtySink<'_>) -> Result<(), GuestError> {
        const WHAT: &str = "harvesting writes";
        let taken = lock(&self.tracker).take();
        let mut pair = taken.ok_or_else(|| GuestError::failed(WHAT, "none are tracked"))?;
        let (tracker, dirty) = &mut *pair;
        let result = tracker.harvest(dirty).map_err(failed(WHAT)).map(|harvested| {
            let slots = self.vm.tracked_slots();
            let layout = self.vm.layout();
            for run in dirty.take().into_iter().chain(harvested.whole) {
                for (slot, (id, _)) in slots.iter().zip(layout.iter()) {
                    let Some(part) = slot.view.intersection(run) else { continue };
                    let first = (part.start().get() - slot.view.start().get()) / UNIT;
                    into(id, GranuleRange::new(GranuleIndex::new(first), part.len() / UNIT));
                }
            }
        });
        *lock(&self.tracker) = Some(pair);
        result
    }

    fn stop_tracking(&self) -> Result<(), GuestError> {
        // Dropped, it would be disarmed as well, but without a word.
        match lock(&self.tracker).take() {
            Some(mut pair) => pair.0.disarm().map_err(failed("ending to track writes")),
            None => Ok(()),
        }
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.set_paused(true);
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.set_paused(false);
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, GuestError> {
        let bytes = self.vm.save().map_err(failed("saving the machine"))?.encode();
        Ok(DeviceState { name: NAME.to_owned(), version: state::VERSION, bytes })
    }

    fn throttle(&self, percent: u8) -> Result<(), GuestError> {
        self.vm.set_throttle(percent);
        Ok(())
    }

    fn release(&self) {
        *lock(&self.tracker) = None;
        self.vm.stop();
    }
}

/// A place where a machine for Linux can arrive.
pub struct LinuxDestination {
    config: LinuxConfig,
    come: Mutex<Come>,
}

/// What has come of it so far.
#[derive(Default)]
struct Come {
    console: Option<ConsoleOut>,
    regions: Vec<Arc<Region>>,
    vm: Option<Arc<LinuxVm>>,
    runs: bool,
}

impl LinuxDestination {
    /// For one machine, with these disks and its memory mapped so; how much memory and how many vCPUs
    /// it has comes with it, and there is nothing to boot.
    pub fn new(config: LinuxConfig, console: ConsoleOut) -> Self {
        let come = Come { console: Some(console), ..Come::default() };
        Self { config, come: Mutex::new(come) }
    }

    /// The machine, once it runs here.
    pub fn vm(&self) -> Option<Arc<LinuxVm>> {
        let come = lock(&self.come);
        come.vm.clone().filter(|_| come.runs)
    }
}

impl DestinationGuest for LinuxDestination {
    fn prepare(&self, regions: &[RegionInfo]) -> Result<Layout, GuestError> {
        const WHAT: &str = "making the memory of a machine for Linux";
        let memory = regions.iter().fold(0_u64, |sum, region| sum.saturating_add(region.length));
        let mut config = self.config.clone();
        config.memory = memory;
        config.check().map_err(failed(WHAT))?;
        if !regions.iter().map(|region| (region.guest_base, region.length)).eq(layout::ram(memory))
        {
            return Err(GuestError::failed(WHAT, "it lies where such a machine has none"));
        }
        let short = |why: String| GuestError::Memory { bytes: memory, why };
        // Huge pages are reserved as they are mapped, all others only when they are touched.
        let free = free_bytes().map_err(failed("finding out how much memory is free"))?;
        if config.page_size == pageferry_memory::PageSize::SIZE_4K && free < memory {
            return Err(short(format!("{free} bytes are free")));
        }
        let make = |region| Region::new(&region).map(Arc::new);
        let made = config.regions().into_iter().map(make).collect::<Result<Vec<_>, _>>();
        let regions = made.map_err(|error| short(error.to_string()))?;
        let layout = Layout::new(regions.clone()).map_err(failed(WHAT))?;
        lock(&self.come).regions = regions;
        Ok(layout)
    }

    fn deliver(&self, builder: Builder) -> Builder {
        vm::for_setup(builder, self.config.setup, self.config.page_size)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), GuestError> {
        let DeviceState { name, version, bytes } = state;
        let refused =
            |why: String| GuestError::State { name: name.clone(), version: *version, why };
        if name != NAME || *version != state::VERSION {
            return Err(refused(format!("only {NAME} {} can be read here", state::VERSION)));
        }
        let machine = MachineState::decode(bytes).map_err(|error| refused(error.to_string()))?;
        let mut config = self.config.clone();
        config.vcpus = machine.vcpus.len() as u16;
        let (regions, console) = {
            let mut come = lock(&self.come);
            (come.regions.clone(), come.console.take())
        };
        config.memory = regions.iter().map(|region| region.len()).sum();
        let console = console.ok_or_else(|| refused("another one has come before".to_owned()))?;
        let vm = LinuxVm::with_regions(config, regions, console);
        let vm = vm.map_err(|error| refused(error.to_string()))?;
        vm.restore(&machine).map_err(|error| refused(error.to_string()))?;
        lock(&self.come).vm = Some(Arc::new(vm));
        Ok(())
    }

    fn run(&self, pager: Option<Arc<Pager>>) -> Result<(), GuestError> {
        const WHAT: &str = "running the machine";
        let vm = lock(&self.come).vm.clone();
        let vm = vm.ok_or_else(|| GuestError::failed(WHAT, "it has no state"))?;
        let vm_pager = match pager {
            None => {
                for (_, region) in vm.layout().iter() {
                    region.page_map().set_present(region.all_granules());
                }
                None
            }
            Some(pager) => {
                let options = VmPagerOptions {
                    kvm_areas: KvmAreas::Follow,
                    on_write: Some(vm.marks()),
                    ..VmPagerOptions::default()
                };
                Some(VmPager::new(pager, options).map_err(failed(WHAT))?)
            }
        };
        vm.start(vm_pager.as_ref()).map_err(failed(WHAT))?;
        lock(&self.come).runs = true;
        Ok(())
    }

    fn drop_guest(&self) {
        let come = mem::take(&mut *lock(&self.come));
        // Not with the lock: its threads end first.
        drop(come);
    }
}

/// MemAvailable of proc_meminfo(5), which every kernel has that has userfaultfd.
fn free_bytes() -> std::io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let number = text.split_once("MemAvailable:").and_then(|(_, rest)| {
        let kib = rest.split_whitespace().next()?;
        kib.parse::<u64>().ok()
    });
    number.map(|kib| kib.saturating_mul(1024)).ok_or_else(|| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, "/proc/meminfo has no MemAvailable")
    })
}

impl fmt::Debug for LinuxDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinuxDestination").field("config", &self.config).finish_non_exhaustive()
    }
}
