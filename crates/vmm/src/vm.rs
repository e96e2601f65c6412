//! The machine: built, run, paused, changed, verified.

use std::{
    any::Any,
    panic,
    sync::{Arc, Mutex, TryLockError},
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use pageferry_kvm::{Slot, VmPager};
use pageferry_memory::{
    GuestAddress, HostRange, Layout, PageSize, Region, RegionId,
    adapter::{self, View},
};
use pageferry_paging::{Builder, Delivery, Events, InstallMethod, Pager};

use crate::{
    GuestMemory, KvmRun, Setup, VcpuRunner, VmConfig, VmError,
    boot::{self, Boot},
    control::Control,
    device::Device,
    memory::{self, Expectation, Verified},
    plan::Plan,
    report::{DeviceReport, End, Report, TouchTimes, VcpuReport},
    signal,
    vcpu::{Run, Vcpu},
};

/// Three pages for KVM's own use on some processors of Intel's, in the hole where devices are.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Of the boot memory. A region has the next after its own number.
const BOOT_SLOT: u32 = 0;

/// What a run has besides its vCPUs.
#[derive(Default)]
pub struct RunOptions<'a> {
    /// How many device threads go once through all the memory meanwhile, through the guest view.
    /// Where faults are exits, they ask the pager for each page before they touch it.
    pub devices: u16,
    /// Called on a vCPU's thread whenever the vCPU tells of progress, with its number and the units
    /// it has touched. If it panics, that vCPU has [`End::Panicked`].
    pub progress: Option<&'a (dyn Fn(u16, u64) + Sync)>,
}

/// A machine with a guest that checks its memory.
///
/// Its methods may be called from any thread; all but [`run`](Self::run) and
/// [`verify`](Self::verify) are meant to be called while it runs.
// Dropped in this order: the vCPUs and the machine let go of the memory first.
#[derive(Debug)]
pub struct Vm {
    vcpus: Vec<Vcpu>,
    fd: VmFd,
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
}

impl Vm {
    /// Builds the machine. Its paged memory is absent: start a pager for [`layout`](Self::layout), or
    /// [`fill`](Self::fill) it, before it runs.
    ///
    /// # Errors
    /// When the configuration makes no sense, there is no KVM here or no permission to use it, or
    /// memory (huge pages, say) is short.
    pub fn new(config: VmConfig) -> Result<Self, VmError> {
        config.check()?;
        let plan = Plan::new(&config);
        let regions = memory::regions(&config, &plan)?;
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
        let vcpus = (0..config.vcpus)
            .map(|number| {
                let vcpu = fd
                    .create_vcpu(number.into())
                    .map_err(VmError::kvm(format!("KVM_CREATE_VCPU {number}")))?;
                Vcpu::new(number, vcpu, &cpuid)
            })
            .collect::<Result<_, _>>()?;
        signal::install().map_err(|source| VmError::Host { what: "a handler of kicks", source })?;
        let vm = Self {
            vcpus,
            fd,
            boot,
            regions,
            memory,
            contents,
            plan,
            config,
            control: Control::default(),
            running: Mutex::new(()),
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

    /// A pager's builder for this machine: its memory, and what its set-up asks for. With set-up (d)
    /// that is delivery by exit only, and no events.
    pub fn pager(&self) -> Builder {
        let builder = Pager::builder(self.layout());
        match self.config.setup {
            Setup::Missing => builder.install(
                (self.config.page_size != PageSize::SIZE_4K).then_some(InstallMethod::Copy),
            ),
            Setup::Minor | Setup::MinorOwnView => builder.install(Some(InstallMethod::Continue)),
            Setup::NoQueue => builder
                .install(Some(InstallMethod::Continue))
                .delivery(Delivery::Exit)
                .events(Events::Ignore),
        }
    }

    /// Writes the first contents into all of the paged memory and declares it present: for a machine
    /// without a pager.
    ///
    /// # Errors
    /// Never, short of a bug.
    pub fn fill(&self) -> Result<(), VmError> {
        memory::fill(&self.contents, self.config.payload.pattern)
    }

    /// Runs all vCPUs from the beginning of the payload, each on a thread of its own, until each has
    /// come to an end. Without `pager`, KVM_RUN is called as it is: for memory that is all there, or
    /// whose faults a pager takes from a queue.
    ///
    /// # Errors
    /// When the machine runs already, or a vCPU could not be made ready. What happens to a vCPU in
    /// the guest is in the report.
    pub fn run(
        &self,
        pager: Option<&VmPager>,
        options: &RunOptions<'_>,
    ) -> Result<Report, VmError> {
        let runner = |_| match pager {
            Some(pager) => Box::new(pager.vcpu()) as Box<dyn VcpuRunner>,
            None => Box::new(KvmRun),
        };
        self.run_with(&runner, pager.map(|pager| &**pager.pager()), options)
    }

    /// As [`run`](Self::run), with whatever `runner` makes for each vCPU's number entering the guest.
    /// All are made on the calling thread before the first vCPU runs, and each is dropped on its
    /// vCPU's thread, or on this one if that thread cannot be had. `pager` is for device threads.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_with<'r>(
        &self,
        runner: &dyn Fn(u16) -> Box<dyn VcpuRunner + 'r>,
        pager: Option<&Pager>,
        options: &RunOptions<'_>,
    ) -> Result<Report, VmError> {
        let _running = match self.running.try_lock() {
            Ok(running) => running,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(VmError::Running),
        };
        let runners: Vec<_> = (0..self.config.vcpus).map(runner).collect();
        let started = Instant::now();
        let result = thread::scope(|scope| {
            let mut vcpus = Vec::new();
            for ((number, vcpu), runner) in self.vcpus.iter().enumerate().zip(runners) {
                let run = Run {
                    boot: &self.boot,
                    control: &self.control,
                    runner,
                    progress: options.progress,
                };
                vcpus.push(self.spawn(scope, format!("vcpu {number}"), || vcpu.run(run))?);
            }
            let mut devices = Vec::new();
            for number in 0..options.devices {
                let device = Device {
                    memory: &self.memory,
                    plan: &self.plan,
                    pattern: self.config.payload.pattern,
                    pager,
                    control: &self.control,
                    seed: self.config.payload.seed.wrapping_add(number.into()),
                };
                let work = move || device.run();
                devices.push(self.spawn(scope, format!("device {number}"), work)?);
            }
            // All are waited for, whatever became of any.
            let vcpus: Vec<Result<VcpuReport, VmError>> = (0..)
                .zip(vcpus)
                .map(|(number, thread)| {
                    thread.join().unwrap_or_else(|panic| Ok(self.panicked(number, panic)))
                })
                .collect();
            let wall = started.elapsed();
            let devices: Vec<DeviceReport> = devices
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
                .collect();
            Ok(Report { vcpus: vcpus.into_iter().collect::<Result<_, _>>()?, devices, wall })
        });
        self.control.run_ended();
        result
    }

    /// Starts a thread of a run. If that fails, the others are stopped.
    fn spawn<'scope, T: Send + 'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        name: String,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> Result<ScopedJoinHandle<'scope, T>, VmError> {
        thread::Builder::new().name(name).spawn_scoped(scope, work).map_err(|source| {
            self.stop();
            VmError::Host { what: "starting a thread", source }
        })
    }

    fn panicked(&self, vcpu: u16, panic: Box<dyn Any + Send>) -> VcpuReport {
        let why = match panic.downcast::<String>() {
            Ok(why) => *why,
            Err(panic) => match panic.downcast::<&'static str>() {
                Ok(why) => (*why).to_owned(),
                Err(_) => "no message".to_owned(),
            },
        };
        let (page, log2) = self.boot.report(vcpu);
        VcpuReport {
            end: End::Panicked(why),
            touches: page.touches,
            mismatches: page.mismatches,
            first_mismatch: None,
            wall: Duration::ZERO,
            times: TouchTimes { log2, ..TouchTimes::default() },
            exits: 0,
            kicks: 0,
            pager: None,
        }
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
    /// itself, when the page comes. Every pause needs a [`resume`](Self::resume) of its own.
    pub fn pause(&self) {
        self.control.pause(|| self.kick());
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Ends the run in progress, or the next one if there is none, with [`End::Stopped`].
    pub fn stop(&self) {
        self.control.stop();
        self.kick();
    }

    /// Takes a region's memslot away. Its guest addresses have no memory then: a vCPU that touches
    /// one ends with [`End::NoMemory`], so do it in a pause and [put it back](Self::restore_slot) in
    /// the same.
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
    /// it: the guest finds the same memory where it was. To be done in a pause, in which KVM forgets
    /// what it has cached of the page tables.
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
        self.place_slot(region, to, pager)?;
        self.boot.remap(moved.guest_base(), moved.len(), to);
        Ok(())
    }

    /// Compares all words of all granules that are present with what they should be after a run that
    /// every vCPU and every device thread came to the end of. `devices` says whether there were
    /// device threads.
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
        // SAFETY: the range is one of the machine's mappings, of which no Rust reference exists, and
        // which `self.memory` keeps until after the machine is dropped.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(VmError::kvm(format!(
            "KVM_SET_USER_MEMORY_REGION {slot}, {:#x} bytes at {guest}",
            host.len()
        )))
    }
}

fn slot(region: RegionId) -> u32 {
    BOOT_SLOT + 1 + u32::from(region.get())
}
