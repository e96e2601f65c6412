//! Delivery by SIGBUS: the faulting thread installs its page in its own handler.

use std::{
    os::fd::RawFd,
    ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI32, AtomicIsize, AtomicPtr, AtomicU64, Ordering},
    },
};

use anyhow::bail;

use super::{Install as _, Installer, Loop, sys::Range};
use crate::bench::case::{Measurement, PAGE};

/// What the handler works on: a signal handler has no argument of its own.
struct Target {
    uffd: AtomicI32,
    start: AtomicU64,
    len: AtomicU64,
    page: AtomicPtr<u8>,
    /// 0 for none: the alias is never the guest's view itself.
    to_alias: AtomicIsize,
}

static TARGET: Target = Target {
    uffd: AtomicI32::new(-1),
    start: AtomicU64::new(0),
    len: AtomicU64::new(0),
    page: AtomicPtr::new(ptr::null_mut()),
    to_alias: AtomicIsize::new(0),
};

/// There is one handler in a process, so one loop at a time.
static ALONE: Mutex<()> = Mutex::new(());

extern "C" fn on_sigbus(
    number: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler, and SIGBUS has si_addr.
    let address = unsafe { (*info).si_addr() } as u64 & !(PAGE as u64 - 1);
    let (start, len) = (TARGET.start.load(Ordering::Relaxed), TARGET.len.load(Ordering::Relaxed));
    if address.wrapping_sub(start) >= len {
        return die(number);
    }
    let to_alias = match TARGET.to_alias.load(Ordering::Relaxed) {
        0 => None,
        distance => Some(distance),
    };
    let installer = Installer { page: TARGET.page.load(Ordering::Relaxed), to_alias };
    // SAFETY: errno is this thread's own. The address is a page of the memory that `serve` was
    // given, which outlives the guest threads, one of which is here. Nobody waits on a
    // userfaultfd that delivers by signal, so nobody is woken.
    let errno = unsafe {
        let saved = *libc::__errno_location();
        let errno = installer.install(TARGET.uffd.load(Ordering::Relaxed), address, false);
        *libc::__errno_location() = saved;
        errno
    };
    if errno != 0 {
        die(number);
    }
}

/// Lets the access that is repeated next end the process: a page that does not come would
/// otherwise raise this signal for ever.
fn die(number: libc::c_int) {
    // SAFETY: signal(2) is async-signal-safe.
    unsafe { libc::signal(number, libc::SIG_DFL) };
}

/// Serves `uffd`, which has UFFD_FEATURE_SIGBUS, by a SIGBUS handler while `guest` runs.
pub(super) fn serve(
    shared: &Loop<Installer>,
    memory: Range,
    uffd: RawFd,
    guest: impl FnOnce() -> anyhow::Result<Measurement>,
) -> anyhow::Result<Measurement> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    TARGET.uffd.store(uffd, Ordering::Relaxed);
    TARGET.start.store(memory.start, Ordering::Relaxed);
    TARGET.len.store(memory.len, Ordering::Relaxed);
    TARGET.page.store(shared.installer.page.cast_mut(), Ordering::Relaxed);
    TARGET.to_alias.store(shared.installer.to_alias.unwrap_or(0), Ordering::Relaxed);
    // SAFETY: an all-zero sigaction is a valid value of that type.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: both are valid, and the handler does only what is async-signal-safe: atomics,
    // memory copies and ioctl(2).
    if unsafe { libc::sigaction(libc::SIGBUS, &action, &mut before) } != 0 {
        bail!("installing a SIGBUS handler: {}", std::io::Error::last_os_error());
    }
    let measured = guest();
    TARGET.len.store(0, Ordering::Relaxed);
    // SAFETY: `before` is what the kernel reported.
    if unsafe { libc::sigaction(libc::SIGBUS, &before, ptr::null_mut()) } != 0 {
        bail!("restoring the SIGBUS handler: {}", std::io::Error::last_os_error());
    }
    measured
}
