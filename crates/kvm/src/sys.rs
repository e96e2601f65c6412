//! What kvm-ioctls lacks. Source: `Documentation/virt/kvm/api.rst`.

use std::{
    os::fd::{AsRawFd, RawFd},
    ptr,
    sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::*},
};

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, Msrs, kvm_msr_entry, kvm_run, kvm_x86_mce};
use kvm_ioctls::{Error, VcpuFd};

use crate::SignalSet;

pub(crate) const KVMIO: u64 = 0xae;

/// `_IOW(KVMIO, number, size)`.
pub(crate) const fn iow(number: u64, size: usize) -> libc::c_ulong {
    1 << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

/// Its structure is declared without the set that follows it.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = iow(0x8b, size_of::<u32>());
const KVM_X86_SETUP_MCE: libc::c_ulong = iow(0x9c, size_of::<u64>());
const KVM_X86_SET_MCE: libc::c_ulong = iow(0x9e, size_of::<kvm_x86_mce>());

/// What KVM_SET_SIGNAL_MASK takes: the length of the set in bytes, and the set.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: SignalSet,
}

const _: () = assert!(size_of::<SignalMask>() == 12 && size_of::<kvm_x86_mce>() == 64);

/// # Safety
/// `argument` is what the ioctl takes: a pointer to readable memory of the size coded in `request`,
/// or null where that is allowed.
unsafe fn ioctl<T>(fd: RawFd, request: libc::c_ulong, argument: *const T) -> Result<(), Error> {
    // SAFETY: as the caller promises.
    match unsafe { libc::ioctl(fd, request, argument) } {
        -1 => Err(Error::last()),
        _ => Ok(()),
    }
}

/// What is blocked inside KVM_RUN, instead of what the thread blocks; `None`: the same as in the
/// thread.
pub(crate) fn set_signal_mask(vcpu: &VcpuFd, mask: Option<SignalSet>) -> Result<(), Error> {
    let mask = mask.map(|set| SignalMask { len: size_of::<SignalSet>() as u32, set });
    let argument = mask.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the structure says how long the set is that it ends with; null lifts the mask.
    unsafe { ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, argument) }
}

/// Gives the vCPU its machine-check banks: `capability` is its IA32_MCG_CAP.
pub(crate) fn setup_mce(vcpu: &VcpuFd, capability: u64) -> Result<(), Error> {
    // SAFETY: it takes a pointer to eight bytes.
    unsafe { ioctl(vcpu.as_raw_fd(), KVM_X86_SETUP_MCE, &raw const capability) }
}

/// Raises a machine check.
pub(crate) fn set_mce(vcpu: &VcpuFd, mce: &kvm_x86_mce) -> Result<(), Error> {
    // SAFETY: it takes a pointer to this structure.
    unsafe { ioctl(vcpu.as_raw_fd(), KVM_X86_SET_MCE, ptr::from_ref(mce)) }
}

/// A model-specific register; `None` when the vCPU does not have it.
pub(crate) fn msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let read = vcpu.get_msrs(&mut msrs).ok()?;
    (read == 1).then(|| msrs.as_slice()[0].data)
}

/// Sets a model-specific register; false when KVM refuses.
pub(crate) fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let Ok(msrs) = Msrs::from_entries(&[entry]) else { return false };
    vcpu.set_msrs(&msrs).is_ok_and(|set| set == 1)
}

/// How the instruction ends that the exit in `run` was about, which was KVM_EXIT_X86_WRMSR: as one
/// that has set the register, or with an exception.
pub(crate) fn complete_wrmsr(run: &mut kvm_run, set: bool) {
    run.__bindgen_anon_1.msr.error = u8::from(!set);
}

/// The data of the exit that `run` describes, which was KVM_EXIT_MMIO: to be filled if it is a read.
pub(crate) fn mmio(run: &mut kvm_run) -> &mut [u8] {
    // SAFETY: any bytes are valid for this member.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let len = (mmio.len as usize).min(mmio.data.len());
    &mut mmio.data[..len]
}

/// Whether the exit that `run` describes, which was KVM_EXIT_INTERNAL_ERROR, is about an
/// instruction that could not be emulated.
pub(crate) fn emulation_failed(run: &kvm_run) -> bool {
    // SAFETY: any bytes are valid for this member.
    unsafe { run.__bindgen_anon_1.internal }.suberror == KVM_INTERNAL_ERROR_EMULATION
}

/// Where a vCPU has its `immediate_exit`.
#[derive(Copy, Clone)]
pub(crate) struct ImmediateExit(*const u8);

impl ImmediateExit {
    pub(crate) fn of(vcpu: &mut VcpuFd) -> Self {
        Self(&raw const vcpu.get_kvm_run().immediate_exit)
    }

    /// Whether it is set.
    ///
    /// # Safety
    /// The vCPU that it was made from still exists.
    pub(crate) unsafe fn is_set(self) -> bool {
        // SAFETY: it is part of the vCPU's shared page. Signal handlers and other threads set it.
        unsafe { self.0.read_volatile() != 0 }
    }
}

macro_rules! whole {
    ($atomic:ty, $address:expr, $access:expr) => {{
        // SAFETY: the caller of the function around it vouches for the bytes; they are aligned, as
        // the arm that this is in has found out.
        $access(unsafe { <$atomic>::from_ptr($address.cast()) })
    }};
}

/// Reads guest memory as a vCPU does: an aligned access of 1, 2, 4 or 8 bytes is one access.
///
/// # Safety
/// The bytes are mapped readable, and there is no Rust reference to them.
pub(crate) unsafe fn read_racy(address: *mut u8, bytes: &mut [u8]) {
    let aligned = bytes.len().is_power_of_two() && address.addr().is_multiple_of(bytes.len());
    match bytes.len() {
        2 if aligned => {
            let value = whole!(AtomicU16, address, |a: &AtomicU16| a.load(Acquire));
            bytes.copy_from_slice(&value.to_ne_bytes());
        }
        4 if aligned => {
            let value = whole!(AtomicU32, address, |a: &AtomicU32| a.load(Acquire));
            bytes.copy_from_slice(&value.to_ne_bytes());
        }
        8 if aligned => {
            let value = whole!(AtomicU64, address, |a: &AtomicU64| a.load(Acquire));
            bytes.copy_from_slice(&value.to_ne_bytes());
        }
        _ => {
            for (n, byte) in bytes.iter_mut().enumerate() {
                *byte = whole!(AtomicU8, address.wrapping_add(n), |a: &AtomicU8| a.load(Acquire));
            }
        }
    }
}

/// Writes guest memory as a vCPU does: an aligned access of 1, 2, 4 or 8 bytes is one access.
///
/// # Safety
/// The bytes are mapped writable, and there is no Rust reference to them.
pub(crate) unsafe fn write_racy(address: *mut u8, bytes: &[u8]) {
    let aligned = bytes.len().is_power_of_two() && address.addr().is_multiple_of(bytes.len());
    match *bytes {
        [a, b] if aligned => {
            let value = u16::from_ne_bytes([a, b]);
            whole!(AtomicU16, address, |a: &AtomicU16| a.store(value, Release));
        }
        [a, b, c, d] if aligned => {
            let value = u32::from_ne_bytes([a, b, c, d]);
            whole!(AtomicU32, address, |a: &AtomicU32| a.store(value, Release));
        }
        [a, b, c, d, e, f, g, h] if aligned => {
            let value = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
            whole!(AtomicU64, address, |a: &AtomicU64| a.store(value, Release));
        }
        _ => {
            for (n, byte) in bytes.iter().enumerate() {
                whole!(AtomicU8, address.wrapping_add(n), |a: &AtomicU8| a.store(*byte, Release));
            }
        }
    }
}
