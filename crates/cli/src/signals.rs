//! SIGINT and SIGTERM as a flag and a descriptor, so that every command can stop cleanly.
//!
//! The first signal only asks; a second one of the same kind finds the default action restored
//! and ends the process, so that a command that fails to stop can still be stopped.

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicI32, Ordering},
};

use rustix::event::{EventfdFlags, eventfd};

/// A signal that asks a command to stop.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Signal {
    /// SIGINT.
    Interrupt,
    /// SIGTERM.
    Terminate,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Signal::Interrupt => "SIGINT",
            Signal::Terminate => "SIGTERM",
        })
    }
}

/// The first signal caught, or 0.
static CAUGHT: AtomicI32 = AtomicI32::new(0);
/// The eventfd that the handler writes to, or -1.
static EVENT: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(number: libc::c_int) {
    let _ = CAUGHT.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst);
    let fd = EVENT.load(Ordering::SeqCst);
    let one = 1u64.to_ne_bytes();
    // SAFETY: errno is this thread's own; write(2) is async-signal-safe and `one` lives through
    // it. A failure means that the counter is full, so the descriptor is readable already.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(fd, one.as_ptr().cast(), one.len());
        *libc::__errno_location() = errno;
    }
}

/// The process's handlers. Made once, by `main`.
#[derive(Debug)]
pub(crate) struct Signals {
    /// Stays open to the end of the process: the handler may run at any time.
    event: OwnedFd,
}

impl Signals {
    /// Installs the handlers for SIGINT and SIGTERM (sigaction(2), with SA_RESETHAND).
    pub(crate) fn install() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        EVENT.store(event.as_raw_fd(), Ordering::SeqCst);
        for number in [libc::SIGINT, libc::SIGTERM] {
            // SAFETY: an all-zero sigaction is a valid value of that type.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART | libc::SA_RESETHAND;
            // SAFETY: `action` is initialised, and `on_signal` only does what is
            // async-signal-safe: atomics and write(2).
            if unsafe { libc::sigaction(number, &action, ptr::null_mut()) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self { event })
    }

    /// The signal that asked to stop, if one has.
    pub(crate) fn caught(&self) -> Option<Signal> {
        match CAUGHT.load(Ordering::SeqCst) {
            0 => None,
            libc::SIGTERM => Some(Signal::Terminate),
            _ => Some(Signal::Interrupt),
        }
    }
}

impl AsFd for Signals {
    /// Readable from the first signal on; nobody reads it, so that every poller sees it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        EVENT.store(-1, Ordering::SeqCst);
    }
}
