//! The signal that gets a vCPU's thread out of KVM_RUN, or out of a wait for a page.

use std::{
    io, mem, ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

/// The signal of kicks: a real-time one, which no library uses.
fn number() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn nothing(_: libc::c_int) {}

/// Gives the signal a handler that does nothing: that it arrives is enough to interrupt a system call.
pub(crate) fn install() -> io::Result<()> {
    static DONE: OnceLock<Option<i32>> = OnceLock::new();
    let error = DONE.get_or_init(|| {
        // SAFETY: all zero is a valid `sigaction`: no flags, and so no SA_RESTART, and nothing blocked.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: `action` is initialised, and its handler touches nothing.
        let answer = unsafe { libc::sigaction(number(), &action, ptr::null_mut()) };
        (answer != 0).then(|| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
    });
    error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
}

/// A thread that can be sent signals, as long as it runs.
#[derive(Debug, Default)]
pub(crate) struct Target(Mutex<Option<libc::pthread_t>>);

impl Target {
    fn lock(&self) -> MutexGuard<'_, Option<libc::pthread_t>> {
        // A panic cannot leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the calling thread the target, until the guard is dropped.
    pub(crate) fn enter(&self) -> Inside<'_> {
        // SAFETY: no argument, and it always succeeds.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Inside(self)
    }

    /// Sends the signal, if there is a thread.
    pub(crate) fn interrupt(&self) {
        let thread = self.lock();
        if let Some(thread) = *thread {
            // SAFETY: the thread has not ended: before it does, it takes itself away, for which it
            // needs the lock that is held here.
            let answer = unsafe { libc::pthread_kill(thread, number()) };
            if answer != 0 {
                // The queue is full, of signals that are not ours.
                tracing::error!("kicking a vCPU: {}", io::Error::from_raw_os_error(answer));
            }
        }
    }
}

/// While this lives, the thread that made it is the target.
pub(crate) struct Inside<'a>(&'a Target);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}
