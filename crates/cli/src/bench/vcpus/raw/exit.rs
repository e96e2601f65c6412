//! Delivery by exit: KVM_RUN ends for a marker, and the vCPU's thread installs the page.

use std::{
    mem::MaybeUninit,
    os::fd::{AsRawFd as _, RawFd},
    ptr,
};

use kvm_ioctls::{Error, VcpuExit, VcpuFd};
use pageferry_kvm::{Exit, RunError};
use pageferry_vmm::VcpuRunner;

use super::Pages;
use crate::bench::{
    case::PAGE,
    reference::{Install as _, Loop},
};

/// A signal set as the kernel has it: signal n is bit n - 1.
type Set = u64;
const SIGBUS: Set = 1 << (libc::SIGBUS - 1);

/// What KVM_SET_SIGNAL_MASK takes: the length of the set in bytes, and the set.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    set: Set,
}

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`, which is declared without the set.
const KVM_SET_SIGNAL_MASK: u32 = 0x4004_ae8b;

/// One vCPU's loop.
pub(super) struct ExitLoop<'r> {
    shared: &'r Loop<Pages>,
    uffd: RawFd,
    /// SIGBUS is blocked in the thread, and is not in KVM_RUN.
    prepared: bool,
}

impl<'r> ExitLoop<'r> {
    pub(super) fn new(shared: &'r Loop<Pages>, uffd: RawFd) -> Self {
        Self { shared, uffd, prepared: false }
    }

    /// Installs the page of `address`, which is in KVM's view.
    fn resolve(&self, address: u64) -> Result<(), RunError> {
        let page = address & !(PAGE as u64 - 1);
        // SAFETY: the installer refuses what is not its memory, which outlives the vCPUs' threads,
        // as the userfaultfd does. Nobody waits in the kernel for it.
        match unsafe { self.shared.installer().install(self.uffd, page, false) } {
            0 => Ok(()),
            errno => {
                self.shared.fail(self.uffd, errno);
                Err(failed(errno))
            }
        }
    }
}

fn failed(errno: i32) -> RunError {
    RunError::Kvm(Error::new(errno))
}

impl VcpuRunner for ExitLoop<'_> {
    fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        if !self.prepared {
            let set = block_sigbus() & !SIGBUS;
            set_signal_mask(vcpu, set)?;
            self.prepared = true;
        }
        let vcpu: *mut VcpuFd = vcpu;
        loop {
            // SAFETY: the reference is exclusive for 'a, and each round's result is gone before the
            // next round, or returned.
            match unsafe { &mut *vcpu }.run() {
                Err(error) if error.errno() == libc::EINTR => match take_sigbus() {
                    Some(address) => self.resolve(address)?,
                    None => return Err(RunError::Kvm(error)),
                },
                // An instruction that KVM emulates, as PVM does those of ring 0.
                Ok(VcpuExit::MmioRead(guest, data)) => {
                    let Some(address) = self.shared.installer().of_guest(guest) else {
                        return Ok(Exit::Kvm(VcpuExit::MmioRead(guest, data)));
                    };
                    self.resolve(address)?;
                    // SAFETY: the bytes are in a page that is present now, one part of an access
                    // does not go beyond it, and there is no reference to guest memory.
                    unsafe {
                        ptr::copy_nonoverlapping(
                            address as *const u8,
                            data.as_mut_ptr(),
                            data.len(),
                        );
                    }
                }
                other => return other.map(Exit::Kvm).map_err(RunError::Kvm),
            }
        }
    }
}

/// Blocks SIGBUS in the calling thread, and returns what was blocked before.
fn block_sigbus() -> Set {
    let mut before: Set = 0;
    // SAFETY: both sets have the size stated. It fails only for bad addresses and sizes.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            &raw const SIGBUS_SET,
            &raw mut before,
            size_of::<Set>(),
        );
    }
    before
}

static SIGBUS_SET: Set = SIGBUS;

/// What is blocked inside KVM_RUN.
fn set_signal_mask(vcpu: &VcpuFd, set: Set) -> Result<(), RunError> {
    let mask = SignalMask { len: size_of::<Set>() as u32, set };
    // SAFETY: the structure says how long the set is that it ends with.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK as _, &raw const mask) } {
        -1 => Err(RunError::Kvm(Error::last())),
        _ => Ok(()),
    }
}

/// Takes a SIGBUS that waits, and returns its address.
fn take_sigbus() -> Option<u64> {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
    // SAFETY: the set has the size stated, and the others are what the kernel expects.
    let signal = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const SIGBUS_SET,
            info.as_mut_ptr(),
            &raw const now,
            size_of::<Set>(),
        )
    };
    // SAFETY: the kernel has filled it in, and a SIGBUS has an address.
    (signal == libc::c_long::from(libc::SIGBUS))
        .then(|| unsafe { info.assume_init().si_addr() } as u64)
}
