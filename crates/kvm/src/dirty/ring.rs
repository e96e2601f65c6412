//! KVM's dirty rings: an entry for each page that a vCPU writes first.

use std::{
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use pageferry_memory::{GranuleIndex, GranuleRange};

use super::{
    Harvested, TRACKED_PAGE, TrackedSlot,
    pages::{Pages, Runs},
    slots::Tracked,
    sys::{self, Ring},
};
use crate::{KvmError, signals::undisturbed};

/// How large the rings of a machine's vCPUs are: they have been enabled.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct RingSize(u32);

impl RingSize {
    /// Gives each vCPU of the machine a ring of this many bytes, 16 for each entry: a power of two,
    /// at least a page, and at most what [`Probe::dirty_ring_bytes`](crate::probe::Probe) says. KVM
    /// keeps some entries back (64, and more with Intel's page-modification logging), and refuses a
    /// ring that has no more than these.
    ///
    /// A machine with rings has them to its end, and no dirty log.
    ///
    /// # Errors
    /// [`KvmError::NoDirtyRing`] when KVM has no rings, or not of this size, or when the machine has a
    /// vCPU already.
    pub fn enable(vm: &VmFd, bytes: u32) -> Result<Self, KvmError> {
        let mut why = "KVM has none".to_owned();
        for cap in [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING] {
            let largest = sys::extension(vm, cap);
            if largest == 0 {
                continue;
            }
            // With the log's pages initially set nothing would be armed when tracking begins; and what
            // is not armed is in no ring.
            if sys::extension(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) != 0 {
                sys::enable(vm.as_raw_fd(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0)
                    .map_err(KvmError::ioctl("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
            }
            let fits = bytes.is_power_of_two() && u64::from(bytes) >= TRACKED_PAGE;
            match sys::enable(vm.as_raw_fd(), cap, bytes.into()) {
                Ok(()) if fits => return Ok(Self(bytes)),
                Ok(()) => why = "KVM took it, but it is no power of two".to_owned(),
                Err(error) => why = format!("{error}, the largest has {largest} bytes"),
            }
        }
        Err(KvmError::NoDirtyRing { bytes, why })
    }

    /// The size in bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }
}

/// Tracks writes of vCPUs by their dirty rings.
///
/// Rings are collected by whoever harvests, on any thread, while the vCPUs run. A vCPU whose ring is
/// full leaves KVM_RUN with KVM_EXIT_DIRTY_RING_FULL until it has been collected:
/// [`VmPager::collect_full_rings`](crate::VmPager::collect_full_rings) has
/// [`VcpuPager::run`](crate::VcpuPager::run) see to it, and an embedder without one calls
/// [`RingCollector::collect`] and runs on.
///
/// With Intel's page-modification logging, the last writes of a vCPU may be known to its processor
/// only: they are in its ring when it has left KVM_RUN once. A harvest that has to be complete (the
/// last one, say) comes after all vCPUs have been kicked; any other reports these pages later.
///
/// Linux 6.18 (and some before and after it) may lose writes when KVM_RESET_DIRTY_RINGS is interrupted.
/// Signals are blocked meanwhile, which leaves stops: a process that is stopped by SIGSTOP, a debugger
/// or the freezer of cgroups just while rings are collected. Who has to be safe from that takes the
/// log.
///
/// The slots have to stay as they are while it is armed. It is disarmed on drop.
#[derive(Debug)]
pub struct DirtyRing {
    collector: RingCollector,
    /// What is about to be told, slot by slot as they are collected.
    telling: Box<[(u32, Pages)]>,
}

/// Empties the rings of a [`DirtyRing`], on any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RingCollector {
    shared: Arc<Mutex<Rings>>,
}

#[derive(Debug)]
struct Rings {
    tracked: Tracked,
    rings: Vec<Ring>,
    /// What has been collected and armed again, slot by slot, and not harvested yet.
    collected: Box<[Pages]>,
    /// Entries that have been collected, and not been reset yet.
    outstanding: u64,
    /// Of the kernel's, since the last harvest.
    calls: u64,
    /// Whether everything that is armed was taken for written since the last harvest.
    whole: bool,
}

/// How often KVM may reset nothing of what has been collected.
const RESETS_IN_VAIN: u32 = 100;

impl DirtyRing {
    /// A tracker for these slots and vCPUs of the machine. Writes of a vCPU that is not among them
    /// are not seen, and stop it when its ring is full.
    ///
    /// # Errors
    /// [`KvmError::SlotTwice`], [`KvmError::TooFewMarks`]; what KVM says when a ring is mapped.
    ///
    /// # Safety
    /// As of [`DirtyLog::new`](super::DirtyLog::new). The vCPUs are this machine's, and nobody else
    /// collects their rings.
    #[allow(unsafe_code)]
    pub unsafe fn new<'a>(
        vm: &VmFd,
        size: RingSize,
        slots: Vec<TrackedSlot>,
        vcpus: impl IntoIterator<Item = &'a VcpuFd>,
    ) -> Result<Self, KvmError> {
        let tracked = Tracked::new(vm, slots)?;
        let rings = vcpus
            .into_iter()
            .map(|vcpu| Ring::map(vcpu, size.0))
            .collect::<Result<_, _>>()
            .map_err(KvmError::ioctl("mapping a vCPU's dirty ring"))?;
        let collected = tracked.slots().iter().map(|slot| Pages::new(slot.pages())).collect();
        let telling = tracked.slots().iter().map(|slot| (slot.slot, Pages::new(slot.pages())));
        let telling = telling.collect();
        let rings = Rings { tracked, rings, collected, outstanding: 0, calls: 0, whole: false };
        let collector = RingCollector { shared: Arc::new(Mutex::new(rings)) };
        Ok(Self { collector, telling })
    }

    /// What empties the rings when one is full.
    pub fn collector(&self) -> RingCollector {
        self.collector.clone()
    }

    /// The slots.
    pub fn slots(&self) -> Vec<TrackedSlot> {
        self.collector.lock().tracked.slots().to_vec()
    }

    /// From now on writes are tracked. What rings and marks have of earlier ones is forgotten.
    ///
    /// # Errors
    /// [`KvmError::DirtyTracking`]; nothing is armed then.
    pub fn arm(&mut self) -> Result<(), KvmError> {
        self.arm_slots(&|_| true)
    }

    /// Arms those slots that are wanted, beside those that are armed; or none of them.
    pub(super) fn arm_slots(
        &mut self,
        wanted: &dyn Fn(&TrackedSlot) -> bool,
    ) -> Result<(), KvmError> {
        let mut rings = self.collector.lock();
        let missing = rings.tracked.missing(wanted);
        if missing.is_empty() {
            return Ok(());
        }
        rings.collect()?;
        for &n in &missing {
            rings.collected[n].take(&mut |_, _| {});
        }
        rings.tracked.arm(&missing)
    }

    pub(super) fn is_armed(&self) -> bool {
        self.collector.lock().tracked.is_armed()
    }

    /// Tells the pages that were written since the last harvest, slot by slot in ascending order.
    /// They have been armed again before they are told.
    ///
    /// # Errors
    /// [`KvmError::NotArmed`]; or KVM_RESET_DIRTY_RINGS, and nothing has been told: the next harvest
    /// will.
    pub fn harvest(
        &mut self,
        told: &mut dyn FnMut(u32, GranuleRange),
    ) -> Result<Harvested, KvmError> {
        let mut runs = Runs::new(told);
        let harvested =
            self.harvest_words(&mut |slot, first, bits| runs.word(slot, first, bits))?;
        runs.finish();
        Ok(harvested)
    }

    /// The same as words: the slot, the page that the lowest bit is for, and the bits, never none.
    pub(super) fn harvest_words(
        &mut self,
        told: &mut dyn FnMut(u32, u64, u64),
    ) -> Result<Harvested, KvmError> {
        let mut guard = self.collector.lock();
        let rings = &mut *guard;
        if !rings.tracked.is_armed() {
            return Err(KvmError::NotArmed);
        }
        rings.collect()?;
        let (calls, whole) = (std::mem::take(&mut rings.calls), std::mem::take(&mut rings.whole));
        for n in rings.tracked.armed() {
            let (slot, collected) = (&rings.tracked.slots()[n], &mut rings.collected[n]);
            if let Some(marks) = &slot.marks {
                marks.take(slot.pages(), &mut |run| collected.add_all(run));
            }
            let telling = &mut self.telling[n].1;
            if telling.is_empty() {
                std::mem::swap(telling, collected);
            } else {
                // Whoever was told by the last harvest has panicked.
                collected.take(&mut |first, bits| telling.add_word(first, bits));
            }
        }
        // A vCPU whose ring is full meanwhile need not wait until all has been told.
        drop(guard);
        let telling = self.telling.iter_mut();
        let pages =
            telling.map(|(slot, pages)| pages.take(&mut |first, bits| told(*slot, first, bits)));
        Ok(Harvested { pages: pages.sum(), calls, whole })
    }

    /// Writes are tracked no longer, until it is armed again. What has not been harvested is
    /// forgotten.
    ///
    /// # Errors
    /// [`KvmError::DirtyTracking`]: of one slot. The others are disarmed.
    pub fn disarm(&mut self) -> Result<(), KvmError> {
        self.collector.lock().tracked.disarm()
    }
}

impl Drop for DirtyRing {
    fn drop(&mut self) {
        // Somebody may still have a collector.
        if let Err(error) = self.collector.lock().tracked.disarm() {
            tracing::warn!("turning tracking off: {error}");
        }
    }
}

impl Rings {
    /// Takes what is in the rings, and has KVM arm it again.
    fn collect(&mut self) -> Result<(), KvmError> {
        let slots = self.tracked.slots();
        let mut last = 0;
        for ring in &mut self.rings {
            // It ends: what is taken can be filled in again only after the reset.
            while let Some((slot, page)) = ring.take() {
                self.outstanding += 1;
                if slots.get(last).is_none_or(|tracked| tracked.slot != slot) {
                    // A slot that is not ours is somebody else's to look after.
                    let Some(n) = slots.iter().position(|tracked| tracked.slot == slot) else {
                        continue;
                    };
                    last = n;
                }
                let known = self.collected[last].add(page);
                debug_assert!(known, "page {page} of slot {slot}");
            }
        }
        self.reset()
    }

    /// Linux (6.18, for one) ends the reset early when a signal is pending, and then has taken some
    /// entries back without having armed their pages. So no signal may come; what cannot be kept from
    /// coming (SIGSTOP, say) is noticed if it left entries behind, and everything is armed anew.
    fn reset(&mut self) -> Result<(), KvmError> {
        let (mut resets, mut in_vain) = (0, 0);
        while self.outstanding > 0 {
            self.calls += 1;
            resets += 1;
            let entries = undisturbed(|| sys::reset_rings(self.tracked.vm().as_raw_fd()))
                .map_err(KvmError::ioctl("KVM_RESET_DIRTY_RINGS"))?;
            self.outstanding = self.outstanding.saturating_sub(entries);
            in_vain = if entries == 0 { in_vain + 1 } else { 0 };
            if in_vain == RESETS_IN_VAIN {
                return Err(KvmError::NotReset { entries: self.outstanding });
            }
        }
        if resets > 1 && self.tracked.is_armed() {
            tracing::warn!("KVM_RESET_DIRTY_RINGS was interrupted: all pages count as written");
            self.tracked.arm_anew()?;
            self.whole = true;
            for n in self.tracked.armed() {
                let pages = self.tracked.slots()[n].pages();
                self.collected[n].add_all(GranuleRange::new(GranuleIndex::new(0), pages));
            }
        }
        Ok(())
    }
}

impl RingCollector {
    /// Empties all rings, so that vCPUs whose ring was full can go on. What was in them is told by the
    /// next harvest.
    ///
    /// # Errors
    /// KVM_RESET_DIRTY_RINGS.
    pub fn collect(&self) -> Result<(), KvmError> {
        self.lock().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        // What a panic interrupts leaves pages collected or not, and both are right.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
