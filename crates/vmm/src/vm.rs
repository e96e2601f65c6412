//! The machine: built, run, paused, changed, verified.

#[deny(unsafe_code)]
mod run;
#[deny(unsafe_code)]
mod saved;
mod writes;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use pageferry_kvm::{
    Slot, VmPager,
    dirty::{DirtyRing, RingCollector, RingSize},
};
use pageferry_memory::{
    GuestAddress, HostRange, Layout, PageSize, Region, RegionId,
    adapter::{self, View},
};
use pageferry_paging::{Builder, Delivery, Events, InstallMethod, Pager};

pub use self::{run::RunOptions, writes::WriteTracking};
pub(crate) use self::{saved::device, writes::Marks};
use crate::{
    GuestMemory, Operation, Setup, VmConfig, VmError,
    boot::{self, Boot},
    control::Control,
    memory::{self, Expectation, Verified},
    plan::Plan,
    signal,
    vcpu::Vcpu,
};

/// Three pages for KVM's own use on some processors of Intel's, in the hole where devices are.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Of the boot memory. A region has the next after its own number.
const BOOT_SLOT: u32 = 0;

/// A machine with a guest that checks its memory.
///
/// Its methods may be called from any thread; all but [`run`](Self::run) and
/// [`verify`](Self::verify) are meant to be called while it runs.
// Dropped in this order: the vCPUs and the machine let go of the memory first.
#[derive(Debug)]
pub struct Vm {
    vcpus: Vec<Vcpu>,
    /// Until its tracker is made.
    ring: Mutex<Option<DirtyRing>>,
    rings: Option<RingCollector>,
    fd: VmFd,
    kvm: Kvm,
    boot: Boot,
    /// Those that are paged.
    regions: Vec<Arc<Region>>,
    /// All regions, in their guest views.
    memory: GuestMemory,
    /// Those that are paged, in a view in which what is present can be accessed without waiting.
    contents: GuestMemory,
    plan: Plan,
    config: VmConfig,
    control: Control,
    running: Mutex<()>,
    marks: Marks,
    /// It has run, or has a state that another had: there is something to be saved.
    started: AtomicBool,
    /// It has another's state: the next run goes on from there.
    restored: AtomicBool,
    /// A memslot has been moved, and the guest's page tables with it.
    moved: AtomicBool,
}

impl Vm {
    /// Builds the machine. Its paged memory is absent: start a pager for [`layout`](Self::layout),
    /// or [`fill`](Self::fill) it, before it runs.
    ///
    /// # Errors
    /// When the configuration makes no sense, there is no KVM here or no permission to use it, or
    /// memory (huge pages, say) is short.
    pub fn new(config: VmConfig) -> Result<Self, VmError> {
        config.check()?;
        let plan = Plan::new(&config);
        let regions = memory::regions(&config, &plan)?;
        Self::build(config, plan, regions)
    }

    /// Builds the machine around memory that there is already: regions as [`new`](Self::new) would
    /// make them, at the same guest addresses, and with the views that the set-up needs.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when the regions are not those of this machine.
    pub fn with_regions(config: VmConfig, regions: Vec<Arc<Region>>) -> Result<Self, VmError> {
        config.check()?;
        let plan = Plan::new(&config);
        memory::check_regions(&config, &plan, &regions)?;
        Self::build(config, plan, regions)
    }

    fn build(config: VmConfig, plan: Plan, regions: Vec<Arc<Region>>) -> Result<Self, VmError> {
        let contents = memory::contents(&config, &regions)?;
        let boot_region = boot::region(&config, &plan)?;
        let all = std::iter::once(&boot_region).chain(&regions);
        let memory = adapter::guest_memory(all, View::Guest)?;
        let boot = Boot::load(&config, &plan, memory.clone())?;
        let kvm = Kvm::new().map_err(VmError::kvm("opening /dev/kvm"))?;
        let fd = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(VmError::kvm("KVM_SET_TSS_ADDR"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let ring_size = config.dirty_ring.map(|bytes| RingSize::enable(&fd, bytes)).transpose()?;
        let fds = (0..config.vcpus)
            .map(|number| {
                fd.create_vcpu(number.into())
                    .map_err(VmError::kvm(format!("KVM_CREATE_VCPU {number}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let marks = Marks::new(&regions);
        let ring = ring_size.map(|size| writes::ring(&fd, size, &marks, &fds)).transpose()?;
        let vcpus = (0..)
            .zip(fds)
            .map(|(number, vcpu)| Vcpu::new(number, vcpu, &cpuid))
            .collect::<Result<_, _>>()?;
        signal::install().map_err(|source| VmError::Host { what: "a handler of kicks", source })?;
        let vm = Self {
            vcpus,
            rings: ring.as_ref().map(DirtyRing::collector),
            ring: Mutex::new(ring),
            fd,
            kvm,
            boot,
            regions,
            memory,
            contents,
            plan,
            config,
            control: Control::default(),
            running: Mutex::new(()),
            marks,
            started: AtomicBool::new(false),
            restored: AtomicBool::new(false),
            moved: AtomicBool::new(false),
        };
        vm.set_slot(BOOT_SLOT, boot_region.guest_base(), boot_region.kvm_view().range())?;
        for (id, region) in vm.regions() {
            vm.set_slot(slot(id), region.guest_base(), region.kvm_view().range())?;
        }
        Ok(vm)
    }

    /// What the machine was made from.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The paged memory, for a pager. Each call puts the same regions together anew.
    pub fn layout(&self) -> Layout {
        Layout::new(self.regions.clone()).expect("regions on both sides of the hole")
    }

    /// The machine's memory by guest address, that to boot from included, in the guest views: what
    /// the emulation of a device works with. An access to paged memory that is absent faults as the
    /// guest's do; where faults are exits, ask [`Pager::resolve`] first (see [`View::Guest`]).
    ///
    /// It keeps the memory alive, and does not follow memslots that are moved.
    pub fn guest_memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// A pager's builder for this machine: its memory, and what its set-up asks for. With set-up
    /// (d) that is delivery by exit only, and no events.
    pub fn pager(&self) -> Builder {
        for_setup(Pager::builder(self.layout()), self.config.setup, self.config.page_size)
    }

    /// Writes the first contents into all of the paged memory and declares it present: for a
    /// machine without a pager.
    ///
    /// # Errors
    /// Never, short of a bug.
    pub fn fill(&self) -> Result<(), VmError> {
        memory::fill(&self.contents, self.config.payload.pattern)
    }

    /// Units that each vCPU has touched so far, in this run and in those that it goes on from.
    pub fn touches(&self) -> Vec<u64> {
        (0..self.config.vcpus).map(|vcpu| self.boot.report(vcpu).0.touches).collect()
    }

    /// Gets every vCPU out of the guest once; they go on by themselves.
    pub fn kick(&self) {
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
    }

    /// Stops the vCPUs where they are, and returns when none is in the guest. One that waits for a
    /// page leaves at once if it waits outside of KVM_RUN; if it waits in it, as soon as the kernel
    /// lets it: where KVM's stage 2 waits, at once (Linux 6.2 and later), where KVM reads the page
    /// itself, when the page comes. A vCPU that is in the middle of an instruction ends it before,
    /// unless that waits for memory. Every pause needs a [`resume`](Self::resume) of its own.
    pub fn pause(&self) {
        self.control.pause(|| self.kick());
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Has the vCPUs rest so many percent of their time, 99 at most, until it is set anew: 0 lets
    /// them run freely. It is the same for runs that follow.
    pub fn throttle(&self, percent: u8) {
        self.control.set_throttle(percent);
    }

    /// Ends the run in progress, or the next one if there is none, with
    /// [`End::Stopped`](crate::End::Stopped).
    pub fn stop(&self) {
        self.control.stop();
        self.kick();
    }

    /// What has been stopped has ended, and the next run is not to be.
    pub(crate) fn forget_stop(&self) {
        self.control.run_ended();
    }

    /// Takes a region's memslot away. Its guest addresses have no memory then: a vCPU that touches
    /// one ends with [`End::NoMemory`](crate::End::NoMemory), so do it in a pause and [put it
    /// back](Self::restore_slot) in the same.
    ///
    /// # Errors
    /// When there is no such region, or KVM refuses.
    pub fn remove_slot(&self, region: RegionId, pager: Option<&VmPager>) -> Result<(), VmError> {
        let base = self.region(region)?.guest_base();
        self.set_slot(slot(region), base, HostRange::default())?;
        if let Some(pager) = pager {
            pager.slots().remove(region.get().into());
        }
        Ok(())
    }

    /// Puts a region's memslot back where it was made.
    ///
    /// # Errors
    /// When there is no such region, or KVM refuses.
    pub fn restore_slot(&self, region: RegionId, pager: Option<&VmPager>) -> Result<(), VmError> {
        let base = self.region(region)?.guest_base();
        self.place_slot(region, base, pager)
    }

    /// Moves a region's memslot to another guest-physical address, and the guest's page tables with
    /// it: the guest finds the same memory where it was. To be done in a pause, in which KVM
    /// forgets what it has cached of the page tables.
    ///
    /// # Errors
    /// When there is no such region, `to` is not a multiple of 1 GiB, or KVM refuses.
    pub fn move_slot(
        &self,
        region: RegionId,
        to: GuestAddress,
        pager: Option<&VmPager>,
    ) -> Result<(), VmError> {
        let moved = self.region(region)?;
        if !to.is_aligned(PageSize::SIZE_1G) {
            return Err(VmError::Move { region, to, why: "not a multiple of 1 GiB" });
        }
        self.moved.store(true, SeqCst);
        self.place_slot(region, to, pager)?;
        self.boot.remap(moved.guest_base(), moved.len(), to);
        Ok(())
    }

    /// Compares all words of all granules that are present with what they should be after a run
    /// that every vCPU and every device thread came to the end of. `devices` says whether there
    /// were device threads. With a payload that only reads, or [counts](crate::Operation::Count),
    /// the run may have been stopped, or be paused.
    ///
    /// # Errors
    /// Never, short of a bug.
    pub fn verify(&self, devices: bool) -> Result<Verified, VmError> {
        let payload = &self.config.payload;
        let expectation = Expectation {
            plan: &self.plan,
            operation: payload.operation,
            pattern: payload.pattern,
            devices,
            counted: (payload.operation == Operation::Count)
                .then(|| self.plan.counted(&self.touches())),
        };
        expectation.compare(&self.contents)
    }

    /// The granules that the payload touches, of all regions together: how many a pager without
    /// prefetch installs.
    pub fn granules_touched(&self) -> u64 {
        let granule = self.config.page_size.bytes();
        let unit = self.plan.unit.bytes();
        let touched = self.plan.touched();
        if unit >= granule {
            // Several granules of a unit: those with a word that is accessed.
            let accessed = (0..unit / granule).filter(|part| {
                let (start, end) = (part * granule, (part + 1) * granule);
                (start..end).step_by(8).any(|offset| self.plan.is_accessed(offset))
            });
            return accessed.count() as u64
                * touched.iter().filter(|touched| **touched).count() as u64;
        }
        touched.chunks((granule / unit) as usize).filter(|units| units.contains(&true)).count()
            as u64
    }

    fn regions(&self) -> impl Iterator<Item = (RegionId, &Arc<Region>)> {
        (0..).map(RegionId::new).zip(&self.regions)
    }

    fn region(&self, id: RegionId) -> Result<&Arc<Region>, VmError> {
        self.regions.get(usize::from(id.get())).ok_or(VmError::NoRegion(id))
    }

    fn place_slot(
        &self,
        id: RegionId,
        guest: GuestAddress,
        pager: Option<&VmPager>,
    ) -> Result<(), VmError> {
        let region = self.region(id)?;
        if let Some(pager) = pager {
            let shown = Slot { guest, len: region.len(), region: id, offset: 0, read_only: false };
            pager.slots().set(id.get().into(), shown)?;
        }
        self.set_slot(slot(id), guest, region.kvm_view().range())
    }

    /// An empty range takes the slot away.
    fn set_slot(&self, slot: u32, guest: GuestAddress, host: HostRange) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest.get(),
            memory_size: host.len(),
            userspace_addr: host.start().get(),
        };
        // SAFETY: the range is one of the machine's mappings, of which no Rust reference exists,
        // and which `self.memory` keeps until after the machine is dropped.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(VmError::kvm(format!(
            "KVM_SET_USER_MEMORY_REGION {slot}, {:#x} bytes at {guest}",
            host.len()
        )))
    }
}

/// What a set-up asks of a pager.
pub(crate) fn for_setup(builder: Builder, setup: Setup, page_size: PageSize) -> Builder {
    match setup {
        Setup::Missing => {
            builder.install((page_size != PageSize::SIZE_4K).then_some(InstallMethod::Copy))
        }
        Setup::Minor | Setup::MinorOwnView => builder.install(Some(InstallMethod::Continue)),
        Setup::NoQueue => builder
            .install(Some(InstallMethod::Continue))
            .delivery(Delivery::Exit)
            .events(Events::Ignore),
    }
}

fn slot(region: RegionId) -> u32 {
    BOOT_SLOT + 1 + u32::from(region.get())
}
