//! The machine: made, booted, started, paused, saved, restored.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use pageferry_kvm::{
    OnWrite, VmPager,
    dirty::{self, DirtyLog, KvmTracker, TrackedSlot, WriteMarks},
};
use pageferry_memory::{Layout, Region};
use pageferry_paging::{Builder, Pager};

use super::{
    ConsoleOut, LinuxConfig, LinuxEnd, LinuxError, acpi, cpu,
    devices::Devices,
    layout, load,
    memory::DeviceMemory,
    run::{Cpu, Runner, Shared},
};
use crate::{
    VmError, signal,
    state::{MachineState, Restorer, Saver},
    vm,
};

/// What has happened to a machine so far.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Phase {
    Made,
    Ready,
    Started,
}

/// A machine for Linux. Its methods may be called from any thread.
// Dropped in this order, after the threads have ended: the vCPUs and the machine let go of the memory
// before its regions do.
#[derive(Debug)]
pub struct LinuxVm {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    phase: Mutex<Phase>,
    kvm: Kvm,
    fd: VmFd,
    memory: DeviceMemory,
    regions: Vec<Arc<Region>>,
    config: LinuxConfig,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic cannot leave what is locked here half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LinuxVm {
    /// Makes the machine. Its memory is absent; what the guest prints goes to `console`. Then comes
    /// [`boot`](Self::boot) or [`restore`](Self::restore).
    ///
    /// # Errors
    /// When the configuration makes no sense, a disk cannot be opened, KVM cannot be used or lacks
    /// something, or memory is short.
    pub fn new(config: LinuxConfig, console: ConsoleOut) -> Result<Self, LinuxError> {
        config.check()?;
        let make = |region| Region::new(&region).map(Arc::new).map_err(VmError::from);
        let regions: Vec<_> =
            config.regions().into_iter().map(make).collect::<Result<_, VmError>>()?;
        Self::with_regions(config, regions, console)
    }

    /// As [`new`](Self::new), of memory that is there already: of the regions that such a machine has,
    /// in ascending order, with the views that its set-up needs. Whether they are present is theirs
    /// to say.
    ///
    /// # Errors
    /// As [`new`](Self::new), and when the regions are others.
    pub fn with_regions(
        config: LinuxConfig,
        regions: Vec<Arc<Region>>,
        console: ConsoleOut,
    ) -> Result<Self, LinuxError> {
        config.check()?;
        let places = regions.iter().map(|region| (region.guest_base().get(), region.len()));
        if !places.eq(layout::ram(config.memory)) {
            let why = format!("regions that {:#x} bytes of memory do not have", config.memory);
            return Err(LinuxError::Config { why });
        }
        let memory = DeviceMemory::new(&regions).map_err(VmError::from)?;
        let kvm = Kvm::new().map_err(VmError::kvm("opening /dev/kvm"))?;
        let fd = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        fd.set_tss_address(layout::TSS).map_err(VmError::kvm("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(layout::IDENTITY_MAP)
            .map_err(VmError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.create_irq_chip().map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(VmError::kvm("KVM_CREATE_PIT2"))?;
        for (slot, region) in (0..).zip(&regions) {
            set_slot(&fd, slot, region)?;
        }
        let cpus = (0..config.vcpus)
            .map(|number| {
                let vcpu = fd
                    .create_vcpu(number.into())
                    .map_err(VmError::kvm(format!("KVM_CREATE_VCPU {number}")))?;
                let cpuid = cpu::cpuid(&kvm, number, config.vcpus)?;
                vcpu.set_cpuid2(&cpuid).map_err(VmError::kvm("KVM_SET_CPUID2"))?;
                Ok(Cpu::new(vcpu))
            })
            .collect::<Result<_, VmError>>()?;
        let devices = Devices::new(&fd, &memory, &config.disks, console)?;
        signal::install().map_err(|source| VmError::Host { what: "a handler of kicks", source })?;
        Ok(Self {
            shared: Arc::new(Shared::new(cpus, devices)),
            thread: Mutex::default(),
            phase: Mutex::new(Phase::Made),
            kvm,
            fd,
            memory,
            regions,
            config,
        })
    }

    /// What the machine was made from.
    pub fn config(&self) -> &LinuxConfig {
        &self.config
    }

    /// KVM's machine, for trackers and the like.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The memory, for a pager. Each call puts the same regions together anew.
    pub fn layout(&self) -> Layout {
        Layout::new(self.regions.clone()).expect("regions on both sides of the hole")
    }

    /// A pager's builder for this machine: its memory, and what its set-up asks for.
    pub fn pager(&self) -> Builder {
        vm::for_setup(Pager::builder(self.layout()), self.config.setup, self.config.page_size)
    }

    /// The memslots, for a tracker of writes, with the marks of what devices write.
    pub fn tracked_slots(&self) -> Vec<TrackedSlot> {
        (0..)
            .zip(&self.regions)
            .map(|(slot, region)| {
                let base = region.guest_base();
                TrackedSlot::new(slot, base, region.kvm_view().range())
                    .marked(self.marks_of(region))
            })
            .collect()
    }

    /// A tracker of all writes to the memory, by KVM's dirty log: those of vCPUs, of devices, and of a
    /// pager that is told so ([`marks`](Self::marks)). For another method see
    /// [`tracked_slots`](Self::tracked_slots). There is one at a time.
    ///
    /// # Errors
    /// When KVM has no dirty log.
    pub fn tracker(&self) -> Result<KvmTracker, LinuxError> {
        let mode = DirtyLog::mode_of(&self.fd);
        // SAFETY: the slots are those that were set when the machine was made, and it changes none of
        // them. If it is dropped first there are no vCPUs any more, and nobody writes through a slot.
        let log = unsafe { DirtyLog::new(&self.fd, self.tracked_slots(), mode) };
        Ok(KvmTracker::from(log.map_err(VmError::from)?))
    }

    /// Where writes on behalf of vCPUs are to be marked that KVM does not see, for
    /// [`VmPagerOptions::on_write`](pageferry_kvm::VmPagerOptions).
    pub fn marks(&self) -> OnWrite {
        let slots = self.regions.iter().map(|region| (region.guest_base(), self.marks_of(region)));
        dirty::on_write(slots)
    }

    fn marks_of(&self, region: &Region) -> WriteMarks {
        self.memory.marks(region.guest_base()).expect("every region has marks")
    }

    fn set_phase(&self, from: Phase, to: Phase, why: &'static str) -> Result<(), LinuxError> {
        let mut phase = lock(&self.phase);
        if *phase != from {
            return Err(LinuxError::Sequence { why });
        }
        *phase = to;
        Ok(())
    }

    /// Loads the kernel and what it needs, and declares all of the memory present. It begins with
    /// [`start`](Self::start).
    ///
    /// # Errors
    /// When a file cannot be read, is no kernel, or does not fit; or the machine is not a new one.
    pub fn boot(&self) -> Result<(), LinuxError> {
        self.set_phase(Phase::Made, Phase::Ready, "has been booted or restored already")?;
        let memory = self.memory.marked();
        let entry = load::load(memory, &self.config)?;
        acpi::write(memory, self.config.vcpus, &self.shared.devices.places())?;
        for vcpu in &self.shared.cpus {
            cpu::set_firmware_registers(&vcpu.inside().fd)?;
        }
        cpu::set_entry(&self.shared.cpus[0].inside().fd, entry)?;
        for region in &self.regions {
            region.page_map().set_present(region.all_granules());
        }
        Ok(())
    }

    /// Makes a new machine what another one was. Guest memory is neither read nor written, and may be
    /// absent.
    ///
    /// # Errors
    /// When the state is not one of such a machine, or this host does not take it; or the machine is
    /// not a new one. Afterwards it is to be thrown away.
    pub fn restore(&self, state: &MachineState) -> Result<(), LinuxError> {
        let (here, there) = (self.shared.cpus.len(), state.vcpus.len());
        if here != there {
            return Err(LinuxError::state(
                "the vCPUs",
                format!("{there} of them, and here {here}"),
            ));
        }
        self.set_phase(Phase::Made, Phase::Ready, "has been booted or restored already")?;
        let mut restorer = Restorer::new(&self.kvm, &self.fd)?;
        for (cpu, state) in self.shared.cpus.iter().zip(&state.vcpus) {
            restorer.vcpu(&cpu.inside().fd, state)?;
        }
        restorer.platform(&self.fd, &state.platform)?;
        self.shared.devices.restore(state)
    }

    /// Starts the vCPUs, each on a thread of its own; with a pager if memory is to arrive while they
    /// run. To start paused, call [`pause`](Self::pause) before.
    ///
    /// # Errors
    /// When the machine was neither booted nor restored, or was started already; or when there can be
    /// no thread.
    pub fn start(&self, pager: Option<&VmPager>) -> Result<(), LinuxError> {
        self.set_phase(Phase::Ready, Phase::Started, "is not ready to be started")?;
        if let Some(pager) = pager {
            self.memory.set_pager(pager.pager());
            pager.filter_area_registers(&self.fd).map_err(VmError::from)?;
            for cpu in &self.shared.cpus {
                cpu.inside().runner = Runner::Pager(pager.vcpu());
            }
        }
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name("linux".to_owned())
            .spawn(move || shared.run())
            .map_err(|source| VmError::Host { what: "a thread for a machine", source })?;
        *lock(&self.thread) = Some(thread);
        Ok(())
    }

    /// Types on the console. Returns how many of the bytes there was room for: a guest that reads
    /// nothing leaves 64 KiB.
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.shared.devices.console().input(bytes)
    }

    /// Has vCPUs rest so many percent of their time, 99 at most.
    pub fn set_throttle(&self, percent: u8) {
        self.shared.set_throttle(percent);
    }

    /// Returns when no vCPU is in the guest and no device works. Pauses add up. Whoever waits for absent
    /// memory with a delivery by queue, or as a device, is waited for.
    pub fn pause(&self) {
        self.shared.pause();
    }

    /// Ends one pause.
    pub fn resume(&self) {
        self.shared.resume();
    }

    /// What the machine is besides its memory. It is paused meanwhile, and has to be paused before and
    /// stay so if the state is to fit to the memory: nothing is written from the one on to the other.
    ///
    /// # Errors
    /// What KVM does not give; or a vCPU waits for memory in the middle of an instruction
    /// ([`VmError::MidInstruction`]), and can be saved when that has come.
    pub fn save(&self) -> Result<MachineState, LinuxError> {
        self.pause();
        let state = self.save_paused();
        self.resume();
        state
    }

    fn save_paused(&self) -> Result<MachineState, LinuxError> {
        let saver = Saver::new(&self.kvm, &self.fd)?;
        let mut vcpus = Vec::new();
        for (vcpu, cpu) in (0..).zip(&self.shared.cpus) {
            let inside = cpu.inside();
            if inside.runner.is_mid_instruction() {
                return Err(VmError::MidInstruction { vcpu }.into());
            }
            vcpus.push(saver.vcpu(&inside.fd)?);
        }
        let platform = saver.platform(&self.fd)?;
        Ok(MachineState { vcpus, platform, devices: self.shared.devices.save() })
    }

    /// Waits for the machine's end.
    pub fn wait(&self, timeout: Duration) -> Option<LinuxEnd> {
        self.shared.wait(timeout)
    }

    /// Stops the vCPUs, and waits until they have, as [`pause`](Self::pause) does. It cannot be started
    /// again.
    pub fn stop(&self) {
        self.shared.finish(LinuxEnd::Stopped);
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            // It is the machine's end, too, and `wait` says so.
            tracing::error!("a thread of the machine panicked");
        }
    }
}

impl Drop for LinuxVm {
    fn drop(&mut self) {
        self.stop();
    }
}

fn set_slot(fd: &VmFd, slot: u32, region: &Region) -> Result<(), VmError> {
    let view = region.kvm_view().range();
    let range = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: region.guest_base().get(),
        memory_size: view.len(),
        userspace_addr: view.start().get(),
    };
    // SAFETY: the range is one of the region's mappings, of which no Rust reference exists, and which
    // the machine keeps until after KVM has let go of it.
    unsafe { fd.set_user_memory_region(range) }.map_err(VmError::kvm(format!(
        "KVM_SET_USER_MEMORY_REGION {slot}, {:#x} bytes",
        view.len()
    )))
}
