//! What the vCPUs of one virtual machine share.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering::*},
    },
};

use kvm_ioctls::VmFd;
use pageferry_memory::{GuestAddress, State};
use pageferry_paging::Pager;

use crate::{
    KvmError, Slots, VcpuPager, VcpuStats, areas,
    dirty::RingCollector,
    probe::{self, Paging},
    stats::Counters,
};

/// What becomes of a guest's access to memory that can never come: the source has a memory error
/// there, or the pager was told to give up.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum MemoryErrors {
    /// [`VcpuPager::run`] returns [`Exit::MemoryError`](crate::Exit::MemoryError).
    #[default]
    Exit,
    /// A machine check in the guest (KVM_X86_SET_MCE), as for a memory error of real hardware: an
    /// uncorrected error of a data load, to be recovered from by software (SRAR), with the
    /// guest-physical address, in bank 1.
    ///
    /// The vCPU needs banks with software recovery (IA32_MCG_CAP.MCG_SER_P). If the embedder has
    /// not given it such by KVM_X86_SETUP_MCE, the first [`run`](VcpuPager::run) does, with ten
    /// banks. Where the guest has machine checks turned off by IA32_MCG_CTL or IA32_MC1_CTL, and
    /// where the address is in no slot, it is [`Exit`](Self::Exit) instead. A guest without
    /// CR4.MCE shuts down, as on real hardware.
    ///
    /// Only the vCPU that touched the memory gets it, marked as local if the guest has turned local
    /// machine checks on. A guest of several vCPUs that expects every one of them to be told needs
    /// `Exit`, and an embedder that tells them.
    Mce,
    /// The process gets the SIGBUS that KVM sends. With a delivery by queue `run` is then KVM_RUN
    /// and nothing else from the beginning; with exits it is as `Exit`.
    Signal,
}

/// What is done about the areas of guest memory that KVM writes by itself: the clock, stolen time,
/// asynchronous page faults, end of interrupt, and those of Hyper-V. A write to a missing page would
/// fail without anybody noticing.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum KvmAreas {
    /// Those that the vCPU's registers name are brought by its first run. One that the guest names
    /// later, in memory that is absent then, is not written: right for a guest that is resumed, whose
    /// registers are set, and wrong for one that boots.
    #[default]
    BringFirst,
    /// Also those that the guest names later. Its WRMSR leaves KVM_RUN, [`VcpuPager::run`] brings the
    /// area, sets the register (KVM_SET_MSRS) and goes on; what KVM refuses is an exception in the
    /// guest, as is an area that can never come. The embedder sees none of it, but that
    /// [`MemoryErrors::Exit`] tells of the latter first.
    ///
    /// The machine has to let these writes out: [`VmPager::filter_area_registers`]. An embedder that
    /// has a filter of its own (KVM_X86_SET_MSR_FILTER) instead denies the guest to write
    /// [`AREA_REGISTERS`](crate::AREA_REGISTERS), and has KVM_MSR_EXIT_REASON_FILTER among the reasons
    /// of its KVM_CAP_X86_USER_SPACE_MSR; writes of other registers are still its own. As long as the
    /// filter stands the vCPUs have to be run by their pagers, also when all memory is there.
    ///
    /// To KVM the register is set by the host. That matters to a guest with the clock's old register
    /// (0x12) only, which then keeps the flag that its clock is stable; and a guest that may not use
    /// a feature at all (KVM_CAP_ENFORCE_PV_FEATURE_CPUID) may still set its register to 0.
    Follow,
    /// The embedder knows better, and perhaps calls [`VcpuPager::make_kvm_areas_present`] itself.
    Leave,
}

/// Told of every write that is made to guest memory on behalf of a vCPU, by which KVM's dirty log
/// does not see it: where, and how many bytes.
pub type OnWrite = Arc<dyn Fn(GuestAddress, u64) + Send + Sync>;

/// How a virtual machine's faults are handled.
#[derive(Clone, Default)]
pub struct VmPagerOptions {
    /// The guest's page tables are never missing. A host with shadow paging reads them without
    /// leaving KVM_RUN, and can have exits only so.
    pub guest_page_tables_resident: bool,
    /// What becomes of accesses to memory that can never come.
    pub memory_errors: MemoryErrors,
    /// What is done about areas that KVM writes by itself.
    pub kvm_areas: KvmAreas,
    /// For an embedder that tracks writes by KVM's dirty log or ring.
    pub on_write: Option<OnWrite>,
}

impl fmt::Debug for VmPagerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmPagerOptions")
            .field("guest_page_tables_resident", &self.guest_page_tables_resident)
            .field("memory_errors", &self.memory_errors)
            .field("kvm_areas", &self.kvm_areas)
            .field("on_write", &self.on_write.is_some())
            .finish()
    }
}

/// One virtual machine's memory, arriving on demand. Cheap to clone.
#[derive(Clone)]
pub struct VmPager {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) pager: Arc<Pager>,
    pub(crate) options: VmPagerOptions,
    pub(crate) slots: Slots,
    /// Whether the pager was made with exits.
    pub(crate) by_exits: bool,
    /// [`UNKNOWN`], [`POISON`] or [`NONE`]: what is known about poisoned granules, of which there
    /// will be no more once nothing remains to come.
    poisoned: AtomicU8,
    vcpus: Mutex<Vec<Arc<Counters>>>,
    collector: Mutex<Option<RingCollector>>,
}

const UNKNOWN: u8 = 0;
const POISON: u8 = 1;
const NONE: u8 = 2;

impl VmPager {
    /// For the virtual machine whose memslots show the memory of this pager, each
    /// [`Region::kvm_view`](pageferry_memory::Region::kvm_view) at the region's guest address, or
    /// as [`slots`](Self::slots) is told. Memory of other slots is none of its business.
    ///
    /// # Errors
    /// When the pager delivers by exits, and the host has shadow paging, and the guest's page tables
    /// are not said to be resident; or when KVM does not make such exits here.
    pub fn new(pager: Arc<Pager>, options: VmPagerOptions) -> Result<Self, KvmError> {
        let delivery = pager.chosen().delivery;
        if delivery.exits() {
            let host = probe::host();
            if let Some(why) = host.why_not(probe::POISON_EXITS) {
                return Err(KvmError::NotHere { delivery, why });
            }
            if !options.guest_page_tables_resident && host.paging != Paging::TwoDimensional {
                let found = host.describe(probe::TWO_DIMENSIONAL);
                return Err(KvmError::ShadowPaging { delivery, found });
            }
        }
        let slots = Slots::new(pager.layout());
        let shared = Shared {
            by_exits: delivery.exits(),
            pager,
            options,
            slots,
            poisoned: AtomicU8::new(UNKNOWN),
            vcpus: Mutex::default(),
            collector: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// One for each vCPU, from its first run to its last.
    pub fn vcpu(&self) -> VcpuPager {
        let counters = Arc::new(Counters::default());
        let mut vcpus = self.shared.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.push(Arc::clone(&counters));
        drop(vcpus);
        VcpuPager::new(Arc::clone(&self.shared), counters)
    }

    /// Makes the machine let out what [`KvmAreas::Follow`] needs: enables KVM_CAP_X86_USER_SPACE_MSR for
    /// KVM_MSR_EXIT_REASON_FILTER, and sets a filter (KVM_X86_SET_MSR_FILTER) that denies writes of
    /// [`AREA_REGISTERS`](crate::AREA_REGISTERS) and nothing else. Any filter that is there is replaced,
    /// so this is not for an embedder that has one. Call it once, before a vCPU runs.
    ///
    /// It does nothing where areas are not followed, and with delivery by queue, where KVM waits for
    /// them.
    ///
    /// # Errors
    /// [`KvmError::NoRegisterExits`] when KVM has no such filters ([`probe::REGISTER_EXITS`] says so,
    /// too); or what KVM says.
    pub fn filter_area_registers(&self, vm: &VmFd) -> Result<(), KvmError> {
        if !self.shared.by_exits || !self.shared.follows_areas() {
            return Ok(());
        }
        areas::filter(vm)
    }

    /// From now on a vCPU whose dirty ring is full empties the rings in
    /// [`run`](VcpuPager::run) and goes on; with `None` the exit is the embedder's again.
    ///
    /// The collector keeps the machine open until it is replaced, or this is dropped.
    pub fn collect_full_rings(&self, collector: Option<RingCollector>) {
        *self.shared.collector.lock().unwrap_or_else(PoisonError::into_inner) = collector;
    }

    /// The memslots.
    pub fn slots(&self) -> &Slots {
        &self.shared.slots
    }

    /// Who brings the memory.
    pub fn pager(&self) -> &Arc<Pager> {
        &self.shared.pager
    }

    /// What each vCPU's paging exits were, in the order of the calls of [`vcpu`](Self::vcpu).
    pub fn stats(&self) -> Vec<VcpuStats> {
        let vcpus = self.shared.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.iter().map(|counters| counters.snapshot()).collect()
    }
}

impl fmt::Debug for VmPager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmPager")
            .field("delivery", &self.shared.pager.chosen().delivery)
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// What empties full dirty rings.
    pub(crate) fn collector(&self) -> Option<RingCollector> {
        self.collector.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the guest's writes of registers that name areas of KVM's are seen to.
    pub(crate) fn follows_areas(&self) -> bool {
        self.options.kvm_areas == KvmAreas::Follow
    }

    /// Whether KVM_RUN may still end for paging. Once false it stays so.
    pub(crate) fn may_exit(&self) -> bool {
        if self.by_exits {
            return self.pager.delivers_exits();
        }
        if self.options.memory_errors == MemoryErrors::Signal {
            return false;
        }
        match self.poisoned.load(Relaxed) {
            POISON => return true,
            NONE => return false,
            _ => {}
        }
        if self.pager.remaining() > 0 {
            return true;
        }
        let layout = self.pager.layout();
        let any = layout.iter().any(|(_, region)| region.page_map().count(State::Poisoned) > 0);
        self.poisoned.store(if any { POISON } else { NONE }, Relaxed);
        any
    }
}
