//! What the vCPUs of one virtual machine share.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering::*},
    },
};

use pageferry_memory::{GuestAddress, State};
use pageferry_paging::Pager;

use crate::{
    KvmError, Slots, VcpuPager, VcpuStats,
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
    /// Those that the vCPU's registers name are brought by its first run.
    #[default]
    BringFirst,
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
