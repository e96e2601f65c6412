//! KVM's dirty log and dirty ring: KVM_GET_DIRTY_LOG with KVM_CLEAR_DIRTY_LOG, and the ring's entries
//! with KVM_RESET_DIRTY_RINGS.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, ensure};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_enable_cap, kvm_userspace_memory_region,
};

use super::super::{
    case::{Contender, Found},
    guest::Guest,
};
use crate::bench::case::PAGE;

/// `_IOW(KVMIO, 0x42, struct kvm_dirty_log)`, `_IOW(KVMIO, 0x46, struct
/// kvm_userspace_memory_region)`, `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`, `_IO(KVMIO, 0xc7)`.
const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_CLEAR_DIRTY_LOG: u32 = 0xc018_aec0;
const KVM_RESET_DIRTY_RINGS: u32 = 0xaec7;

/// # Safety
/// `argument` is what `request` takes, or null where it takes nothing.
unsafe fn ioctl<T>(fd: RawFd, request: u32, argument: *const T) -> io::Result<u32> {
    // SAFETY: as the caller promises.
    let answer = unsafe { libc::ioctl(fd, request as _, argument) };
    u32::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// The machine, and the slot that is tracked.
struct Slot {
    vm: OwnedFd,
    region: kvm_userspace_memory_region,
}

impl Slot {
    fn new(guest: &Guest) -> anyhow::Result<Self> {
        // SAFETY: the guest has it open, and is borrowed.
        let vm = unsafe { BorrowedFd::borrow_raw(guest.vm().as_raw_fd()) };
        let vm = vm.try_clone_to_owned().context("duplicating the machine's descriptor")?;
        Ok(Self { vm, region: guest.slot() })
    }

    fn track(&mut self, on: bool) -> anyhow::Result<()> {
        self.region.flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        // SAFETY: it takes a `kvm_userspace_memory_region`; of the slot that the machine has, only a
        // flag changes.
        unsafe { ioctl(self.vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, &raw const self.region) }
            .context("KVM_SET_USER_MEMORY_REGION")?;
        Ok(())
    }

    fn pages(&self) -> u64 {
        self.region.memory_size / PAGE as u64
    }
}

/// The log: a bit for each page.
pub(in super::super) struct Log {
    slot: Slot,
    bits: Vec<u64>,
    /// Whether what was read is armed by a call of its own.
    clears: bool,
}

impl Log {
    pub(in super::super) fn new(guest: &Guest) -> anyhow::Result<Self> {
        let slot = Slot::new(guest)?;
        let clears = guest.clears_log();
        if clears {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(), 0, 0, 0],
                ..Default::default()
            };
            guest.vm().enable_cap(&cap).context("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")?;
        }
        let bits = vec![0; slot.pages().div_ceil(64) as usize];
        Ok(Self { slot, bits, clears })
    }
}

impl Contender for Log {
    fn arm(&mut self) -> anyhow::Result<()> {
        self.slot.track(true)
    }

    fn harvest(&mut self, found: &mut Found) -> anyhow::Result<()> {
        let (vm, slot) = (self.slot.vm.as_raw_fd(), self.slot.region.slot);
        let dirty_bitmap = self.bits.as_mut_ptr().cast();
        let get = kvm_dirty_log {
            slot,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap },
            ..Default::default()
        };
        // SAFETY: it takes a `kvm_dirty_log`, and writes a bit for each page.
        unsafe { ioctl(vm, KVM_GET_DIRTY_LOG, &raw const get) }.context("KVM_GET_DIRTY_LOG")?;
        if self.clears {
            let clear = kvm_clear_dirty_log {
                slot,
                num_pages: u32::try_from(self.slot.pages())?,
                first_page: 0,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap },
            };
            // SAFETY: it takes a `kvm_clear_dirty_log`, and reads a bit for each page.
            unsafe { ioctl(vm, KVM_CLEAR_DIRTY_LOG, &raw const clear) }
                .context("KVM_CLEAR_DIRTY_LOG")?;
        }
        for (first, word) in (0..).step_by(64).zip(&self.bits) {
            let mut left = *word;
            while left != 0 {
                found.mark(first + u64::from(left.trailing_zeros()), 1);
                left &= left - 1;
            }
        }
        Ok(())
    }

    fn disarm(&mut self) -> anyhow::Result<()> {
        self.slot.track(false)
    }
}

/// The ring: an entry for each page that is written first.
pub(in super::super) struct Ring {
    slot: Slot,
    entries: *mut kvm_dirty_gfn,
    /// How many; a power of two.
    len: u32,
    next: u32,
    /// Pages of rings that were full.
    collected: Vec<u64>,
}

const DIRTY: u32 = 1;
const RESET: u32 = 2;

impl Ring {
    pub(in super::super) fn new(guest: &Guest) -> anyhow::Result<Self> {
        let (slot, bytes) = (Slot::new(guest)?, guest.ring_size()?.bytes());
        // SAFETY: a new mapping, wherever there is room.
        let entries = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                guest.vcpu().as_raw_fd(),
                libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as libc::off_t,
            )
        };
        if entries == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("mapping the ring");
        }
        let len = bytes / size_of::<kvm_dirty_gfn>() as u32;
        Ok(Self { slot, entries: entries.cast(), len, next: 0, collected: Vec::new() })
    }

    fn take(&mut self, mut page: impl FnMut(u64)) -> anyhow::Result<()> {
        let first = self.next;
        loop {
            // SAFETY: of `len` entries, which are mapped as long as this lives.
            let entry = unsafe { self.entries.add((self.next & (self.len - 1)) as usize) };
            // SAFETY: KVM, too, accesses it atomically.
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            // SAFETY: KVM does not write to it before it is reset.
            page(unsafe { (*entry).offset });
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
        let taken = self.next.wrapping_sub(first);
        if taken > 0 {
            // SAFETY: it takes nothing.
            let reset = unsafe {
                ioctl(self.slot.vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, ptr::null::<u8>())
            }
            .context("KVM_RESET_DIRTY_RINGS")?;
            ensure!(reset == taken, "{taken} entries were collected, and {reset} reset");
        }
        Ok(())
    }
}

impl Contender for Ring {
    fn arm(&mut self) -> anyhow::Result<()> {
        self.slot.track(true)
    }

    fn collect(&mut self) -> anyhow::Result<()> {
        let mut collected = std::mem::take(&mut self.collected);
        let taken = self.take(|page| collected.push(page));
        self.collected = collected;
        taken
    }

    fn harvest(&mut self, found: &mut Found) -> anyhow::Result<()> {
        for page in self.collected.drain(..) {
            found.mark(page, 1);
        }
        self.take(|page| found.mark(page, 1))
    }

    fn disarm(&mut self) -> anyhow::Result<()> {
        self.slot.track(false)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.len as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: nobody uses the mapping any more.
        let result = unsafe { libc::munmap(self.entries.cast(), bytes) };
        debug_assert_eq!(result, 0, "unmapping a ring");
    }
}
