//! The calls for tracking, on descriptors that trackers have of their own, and mapped rings.

use std::{
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering::*},
};

use kvm_bindings::{
    KVM_DIRTY_LOG_PAGE_OFFSET, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_gfn, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};

use super::TRACKED_PAGE;
use crate::sys::{KVMIO, iow};

const KVM_GET_DIRTY_LOG: libc::c_ulong = iow(0x42, size_of::<kvm_dirty_log>());
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong =
    iow(0x46, size_of::<kvm_userspace_memory_region>());
const KVM_ENABLE_CAP: libc::c_ulong = iow(0xa3, size_of::<kvm_enable_cap>());
/// `_IOWR`.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 1 << 31 | iow(0xc0, size_of::<kvm_clear_dirty_log>());
/// `_IO`.
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = KVMIO << 8 | 0xc7;

const _: () = assert!(
    size_of::<kvm_dirty_gfn>() == 16
        && size_of::<kvm_clear_dirty_log>() == 24
        && size_of::<kvm_enable_cap>() == 104
);

/// The machine's descriptor, as long as the machine is borrowed.
pub(super) fn borrow(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: the machine has it open, and is borrowed as long.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

/// What the machine says of this capability; 0 when it does not know it.
pub(super) fn extension(vm: &VmFd, cap: u32) -> u32 {
    u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0)
}

/// # Safety
/// `argument` is what the ioctl takes: a pointer to what is coded in `request`, or null for one that
/// takes none.
unsafe fn ioctl<T>(fd: RawFd, request: libc::c_ulong, argument: *const T) -> Result<i32, Error> {
    // SAFETY: as the caller promises.
    match unsafe { libc::ioctl(fd, request, argument) } {
        -1 => Err(Error::last()),
        answer => Ok(answer),
    }
}

/// Enables a capability of the machine's.
pub(super) fn enable(vm: RawFd, cap: u32, argument: u64) -> Result<(), Error> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    // SAFETY: it takes a pointer to this structure.
    unsafe { ioctl(vm, KVM_ENABLE_CAP, &raw const cap) }.map(drop)
}

/// Sets a memslot. That it is one which the machine has, but for its flags, is promised by whoever
/// made the tracker.
pub(super) fn set_slot(vm: RawFd, slot: &kvm_userspace_memory_region) -> Result<(), Error> {
    // SAFETY: it takes a pointer to this structure; and only a flag of the slot's changes.
    unsafe { ioctl(vm, KVM_SET_USER_MEMORY_REGION, ptr::from_ref(slot)) }.map(drop)
}

/// Reads the log of a slot of this many pages.
///
/// # Panics
/// When `bits` is too short for them.
pub(super) fn get_log(vm: RawFd, slot: u32, pages: u64, bits: &mut [u64]) -> Result<(), Error> {
    assert!(pages <= bits.len() as u64 * 64, "{pages} pages in {} words", bits.len());
    let log = kvm_dirty_log {
        slot,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
        ..Default::default()
    };
    // SAFETY: it takes a pointer to this structure, and writes a bit for each page of the slot,
    // rounded up to whole words, for which there is room.
    unsafe { ioctl(vm, KVM_GET_DIRTY_LOG, &raw const log) }.map(drop)
}

/// Arms pages again, whose bit is set, of `count` from `first` on.
///
/// # Panics
/// When `bits` is too short for them.
pub(super) fn clear_log(
    vm: RawFd,
    slot: u32,
    first: u64,
    count: u64,
    bits: &[u64],
) -> Result<(), Error> {
    assert!(count <= bits.len() as u64 * 64, "{count} pages in {} words", bits.len());
    let clear = kvm_clear_dirty_log {
        slot,
        num_pages: count as u32,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: it takes a pointer to this structure, and reads a bit for each page.
    unsafe { ioctl(vm, KVM_CLEAR_DIRTY_LOG, &raw const clear) }.map(drop)
}

/// Arms again what has been collected from the machine's rings; answers how many entries it was.
pub(super) fn reset_rings(vm: RawFd) -> Result<u64, Error> {
    // SAFETY: it takes nothing.
    let entries = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS, ptr::null::<u8>()) }?;
    Ok(entries.unsigned_abs().into())
}

/// KVM has filled the entry in.
const DIRTY: u32 = 1;
/// The entry has been collected.
const RESET: u32 = 2;

/// A vCPU's ring, mapped.
#[derive(Debug)]
pub(super) struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    /// How many there are; a power of two.
    len: u32,
    /// The next to be collected. It counts on, and wraps.
    next: u32,
}

// SAFETY: the mapping is the process's; whatever thread has the ring may use it.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of this vCPU, which has `bytes`, a power of two.
    pub(super) fn map(vcpu: &VcpuFd, bytes: u32) -> Result<Self, Error> {
        assert!(bytes.is_power_of_two() && u64::from(bytes) >= TRACKED_PAGE);
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * TRACKED_PAGE;
        // SAFETY: a new mapping, wherever there is room.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Error::last());
        }
        let entries = NonNull::new(start.cast()).expect("nothing is mapped at 0");
        Ok(Self { entries, len: bytes / size_of::<kvm_dirty_gfn>() as u32, next: 0 })
    }

    /// Takes the next entry: the slot's number, and the page's in the slot. `None`: KVM has filled in
    /// no more yet.
    pub(super) fn take(&mut self) -> Option<(u32, u64)> {
        let index = (self.next & (self.len - 1)) as usize;
        // SAFETY: the index is less than the length, and the entries are mapped as long as the ring
        // lives.
        let entry = unsafe { self.entries.add(index) }.as_ptr();
        // SAFETY: it is aligned and mapped; KVM accesses it atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        // Acquire: what KVM has written to the entry before it set the flag is read below.
        if flags.load(Acquire) & DIRTY == 0 {
            return None;
        }
        // SAFETY: as above. KVM writes to it again only when it has been given back, and reset.
        let taken =
            unsafe { ((&raw const (*entry).slot).read(), (&raw const (*entry).offset).read()) };
        // Release: it is given back when it has been read.
        flags.store(RESET, Release);
        self.next = self.next.wrapping_add(1);
        Some(taken)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.len as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: it is this one's mapping, and nobody uses it any more.
        let result = unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes) };
        debug_assert_eq!(result, 0, "unmapping a ring");
    }
}
