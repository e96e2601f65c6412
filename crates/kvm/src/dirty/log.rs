//! KVM's dirty log: a bit for each page.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use kvm_ioctls::VmFd;
use pageferry_memory::{GranuleIndex, GranuleRange};

use super::{Harvested, TrackedSlot, pages::Runs, slots::Tracked, sys};
use crate::KvmError;

/// How pages are armed again.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum LogMode {
    /// Reading the log arms the whole slot again, in one step during which vCPUs that fault wait.
    /// Every kernel has it.
    Automatic,
    /// What was read is armed again in ranges (KVM_CLEAR_DIRTY_LOG), between which vCPUs go on.
    Manual,
    /// The same; and nothing is armed at first, so that arming takes no time: the first harvest
    /// reports every page, and arms it. For a transfer whose first round sends everything.
    InitiallySet,
}

impl LogMode {
    fn argument(self) -> u32 {
        match self {
            Self::Automatic => 0,
            Self::Manual => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            Self::InitiallySet => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
        }
    }
}

/// Pages that are armed again in one call: 256 MiB, which takes some milliseconds of the vCPUs' time
/// when all of them were written. A multiple of 64, as KVM wants it.
const CHUNK: u64 = 64 << 10;

/// Tracks writes of vCPUs by KVM's dirty log.
///
/// The slots have to stay as they are, and nobody else may read their log, while it is armed.
/// It is disarmed on drop.
#[derive(Debug)]
pub struct DirtyLog {
    tracked: Tracked,
    mode: LogMode,
    chunk: u64,
    /// For the largest of the slots.
    bits: Box<[u64]>,
}

impl DirtyLog {
    /// The best mode that this machine has: [`LogMode::Manual`] if it can, else
    /// [`LogMode::Automatic`].
    pub fn mode_of(vm: &VmFd) -> LogMode {
        let known = sys::extension(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        if known & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            LogMode::Manual
        } else {
            LogMode::Automatic
        }
    }

    /// A tracker for these slots of the machine, which is told to work in this mode: the mode is the
    /// whole machine's.
    ///
    /// # Errors
    /// [`KvmError::SlotTwice`], [`KvmError::TooFewMarks`]; [`KvmError::NoLogMode`] when the machine
    /// does not have the mode.
    ///
    /// # Safety
    /// The machine has the slots exactly as they are described, and keeps them so until the tracker
    /// is disarmed or dropped. (Turning tracking on sets them again. One that is described
    /// wrongly would be made, and let the guest write to whatever is there.)
    #[allow(unsafe_code)]
    pub unsafe fn new(vm: &VmFd, slots: Vec<TrackedSlot>, mode: LogMode) -> Result<Self, KvmError> {
        let tracked = Tracked::new(vm, slots)?;
        let known = sys::extension(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        if mode.argument() & !known != 0 {
            return Err(KvmError::NoLogMode { mode, known });
        }
        if known != 0 {
            let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
            sys::enable(tracked.vm().as_raw_fd(), cap, mode.argument().into())
                .map_err(KvmError::ioctl("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        }
        let most = tracked.slots().iter().map(TrackedSlot::pages).max().unwrap_or(0);
        let bits = vec![0; most.div_ceil(64) as usize].into();
        Ok(Self { tracked, mode, chunk: CHUNK, bits })
    }

    /// How many pages are armed again in one call, rounded up to a multiple of 64. Less makes vCPUs
    /// wait for a shorter time, more often.
    pub fn set_chunk(&mut self, pages: u64) {
        self.chunk = pages.clamp(1, 1 << 30).next_multiple_of(64);
    }

    /// How it works.
    pub fn mode(&self) -> LogMode {
        self.mode
    }

    /// The slots.
    pub fn slots(&self) -> &[TrackedSlot] {
        self.tracked.slots()
    }

    /// From now on writes are tracked. What marks say of earlier ones is forgotten.
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
        let missing = self.tracked.missing(wanted);
        let Some(&first) = missing.first() else { return Ok(()) };
        self.tracked.arm(&missing)?;
        // A machine with rings has no log, and says so only here.
        let log = get(&self.tracked, &self.tracked.slots()[first], &mut self.bits);
        if log.is_err() {
            self.tracked.disarm_or_warn(&missing);
        }
        log
    }

    pub(super) fn is_armed(&self) -> bool {
        self.tracked.is_armed()
    }

    /// Tells the pages that were written since the last harvest, slot by slot in ascending order,
    /// and arms them again before they are told.
    ///
    /// # Errors
    /// [`KvmError::NotArmed`]; [`KvmError::DirtyTracking`]. What has been told then was written, and
    /// what has not been told will be by the next harvest.
    pub fn harvest(
        &mut self,
        told: &mut dyn FnMut(u32, GranuleRange),
    ) -> Result<Harvested, KvmError> {
        let mut runs = Runs::new(told);
        let result = self.harvest_words(&mut |slot, first, bits| runs.word(slot, first, bits));
        // What came before a failure, too.
        runs.finish();
        result
    }

    /// The same as words: the slot, the page that the lowest bit is for, and the bits, never none.
    pub(super) fn harvest_words(
        &mut self,
        told: &mut dyn FnMut(u32, u64, u64),
    ) -> Result<Harvested, KvmError> {
        if !self.tracked.is_armed() {
            return Err(KvmError::NotArmed);
        }
        let mut harvested = Harvested::default();
        for slot in self.tracked.armed().map(|n| &self.tracked.slots()[n]) {
            let words = slot.pages().div_ceil(64) as usize;
            let bits = &mut self.bits[..words];
            get(&self.tracked, slot, bits)?;
            harvested.calls += 1;
            let cleared = if self.mode == LogMode::Automatic {
                Ok(0)
            } else {
                clear(&self.tracked, slot, bits, self.chunk)
            };
            // Also when some of it could not be armed again: nobody but us knows of it by now.
            if let Some(marks) = &slot.marks {
                marks.take(slot.pages(), &mut |run| set(bits, run));
            }
            for (n, word) in bits.iter().enumerate().filter(|(_, word)| **word != 0) {
                harvested.pages += u64::from(word.count_ones());
                told(slot.slot, n as u64 * 64, *word);
            }
            harvested.calls += cleared?;
        }
        Ok(harvested)
    }

    /// Writes are tracked no longer, until it is armed again. What has not been harvested is
    /// forgotten.
    ///
    /// # Errors
    /// [`KvmError::DirtyTracking`]: of one slot. The others are disarmed.
    pub fn disarm(&mut self) -> Result<(), KvmError> {
        self.tracked.disarm()
    }
}

fn get(tracked: &Tracked, slot: &TrackedSlot, bits: &mut [u64]) -> Result<(), KvmError> {
    sys::get_log(tracked.vm().as_raw_fd(), slot.slot, slot.pages(), bits)
        .map_err(slot.error("KVM_GET_DIRTY_LOG"))
}

/// Arms again what is set in `bits`, and answers with how many calls.
fn clear(tracked: &Tracked, slot: &TrackedSlot, bits: &[u64], chunk: u64) -> Result<u64, KvmError> {
    let mut calls = 0;
    for (n, words) in bits.chunks((chunk / 64) as usize).enumerate() {
        // From the first to the last that was written: what is not set is not looked at, but every
        // word is read.
        let Some(low) = words.iter().position(|word| *word != 0) else { continue };
        let high = words.iter().rposition(|word| *word != 0).unwrap_or(low);
        let first = n as u64 * chunk + low as u64 * 64;
        // Whole words, but for the last of the slot.
        let count = ((high - low + 1) as u64 * 64).min(slot.pages() - first);
        let fd = tracked.vm().as_raw_fd();
        sys::clear_log(fd, slot.slot, first, count, &words[low..=high])
            .map_err(slot.error("KVM_CLEAR_DIRTY_LOG"))?;
        calls += 1;
    }
    Ok(calls)
}

fn set(bits: &mut [u64], run: GranuleRange) {
    for page in run.iter().map(GranuleIndex::get) {
        bits[(page / 64) as usize] |= 1 << (page % 64);
    }
}
