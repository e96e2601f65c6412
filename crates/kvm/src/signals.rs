//! The calling thread's signals: blocked for a while, taken from the queue, passed on.
//!
//! The system calls are made directly, since KVM and the kernel know sets of 64 signals, not those
//! of the C library. Source: `rt_sigprocmask(2)`, `sigtimedwait(2)`, `rt_tgsigqueueinfo(2)`.

use std::{fmt, marker::PhantomData, mem::MaybeUninit, ptr};

use pageferry_memory::HostAddress;

/// Signals 1 to 64, signal `n` as bit `n - 1`.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Default)]
pub struct SignalSet(u64);

impl SignalSet {
    /// No signal.
    pub const EMPTY: Self = Self(0);

    /// All that a thread may block without harm: neither those that the C library uses itself (32
    /// and 33), nor those that say what the thread's own code has just done, whose handlers would
    /// not be called.
    const ALL: Self = Self(!(0b11 << 31))
        .without(libc::SIGILL)
        .without(libc::SIGTRAP)
        .without(libc::SIGFPE)
        .without(libc::SIGSEGV)
        .without(libc::SIGSYS);

    /// The set with these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits of the set.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The set and this signal.
    ///
    /// # Panics
    /// When there is no signal of this number.
    pub const fn with(self, signal: i32) -> Self {
        Self(self.0 | Self::bit(signal))
    }

    /// The set without this signal.
    ///
    /// # Panics
    /// When there is no signal of this number.
    pub const fn without(self, signal: i32) -> Self {
        Self(self.0 & !Self::bit(signal))
    }

    /// Whether the signal is one of them.
    ///
    /// # Panics
    /// When there is no signal of this number.
    pub const fn contains(self, signal: i32) -> bool {
        self.0 & Self::bit(signal) != 0
    }

    /// Those that the calling thread blocks now.
    pub fn blocked() -> Self {
        change(libc::SIG_BLOCK, None)
    }

    const fn bit(signal: i32) -> u64 {
        assert!(signal >= 1 && signal <= 64, "signals are numbered from 1 to 64");
        1 << (signal - 1)
    }
}

impl fmt::Debug for SignalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((1..=64).filter(|signal| self.contains(*signal))).finish()
    }
}

/// Bytes of the kernel's signal set.
const SET_SIZE: usize = size_of::<SignalSet>();

/// Changes the calling thread's mask, and returns what it was.
fn change(how: libc::c_int, set: Option<SignalSet>) -> SignalSet {
    let mut old = SignalSet::EMPTY;
    let new = set.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: both sets have the size stated, or are absent. It fails only for bad addresses and
    // bad sizes.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, new, &raw mut old, SET_SIZE) };
    debug_assert_eq!(result, 0, "rt_sigprocmask cannot fail");
    old
}

/// A SIGBUS taken from the queue.
pub(crate) struct Sigbus(libc::siginfo_t);

impl Sigbus {
    /// Where, if it says that the kernel could not give this thread a page.
    pub(crate) fn page(&self) -> Option<HostAddress> {
        const BUS_ADRERR: i32 = 2;
        const BUS_MCEERR_AR: i32 = 4;
        if !matches!(self.0.si_code, BUS_ADRERR | BUS_MCEERR_AR) {
            return None;
        }
        // SAFETY: with these codes the kernel has filled in the address.
        Some(HostAddress::from_ptr(unsafe { self.0.si_addr() }))
    }

    /// How it came about, for a message.
    pub(crate) fn code(&self) -> i32 {
        self.0.si_code
    }
}

/// Takes a SIGBUS that waits for the calling thread, which blocks it.
pub(crate) fn take_sigbus() -> Option<Sigbus> {
    let set = SignalSet::EMPTY.with(libc::SIGBUS);
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the set has the size stated, and the others are what the kernel expects.
    let signal = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const set,
            info.as_mut_ptr(),
            &raw const zero,
            SET_SIZE,
        )
    };
    // SAFETY: the kernel has filled it in; it was zero before, which is valid, too.
    (signal == libc::SIGBUS.into()).then(|| Sigbus(unsafe { info.assume_init() }))
}

/// The calling thread with all its signals blocked. On drop its mask is what it was, and what was
/// put back is delivered.
pub(crate) struct Blocked {
    before: SignalSet,
    /// Put back on drop.
    kept: Option<Sigbus>,
    /// It is this thread's mask.
    _not_send: PhantomData<*const ()>,
}

impl Blocked {
    pub(crate) fn new() -> Self {
        let before = change(libc::SIG_SETMASK, Some(SignalSet::ALL));
        Self { before, kept: None, _not_send: PhantomData }
    }

    /// What was blocked before.
    pub(crate) fn before(&self) -> SignalSet {
        self.before
    }

    /// Takes a SIGBUS that waits.
    pub(crate) fn take_sigbus(&self) -> Option<Sigbus> {
        take_sigbus()
    }

    /// Whether a signal waits that `mask` does not block.
    pub(crate) fn waits_beyond(&self, mask: SignalSet) -> bool {
        let mut pending = SignalSet::EMPTY;
        // SAFETY: the set has the size stated.
        unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut pending, SET_SIZE) };
        pending.0 & !mask.0 != 0
    }

    /// Gives the signal back to the thread, on drop. With several the first is kept: as for any
    /// signal of its number that is sent while one waits.
    pub(crate) fn put_back(&mut self, sigbus: Sigbus) {
        self.kept.get_or_insert(sigbus);
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if let Some(Sigbus(info)) = self.kept.take() {
            // SAFETY: it is the calling thread of this process, which may be sent any information.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_rt_tgsigqueueinfo,
                    libc::getpid(),
                    libc::gettid(),
                    libc::SIGBUS,
                    &raw const info,
                )
            };
            if result != 0 {
                let error = std::io::Error::last_os_error();
                tracing::error!("passing on a SIGBUS with code {}: {error}", info.si_code);
            }
        }
        change(libc::SIG_SETMASK, Some(self.before));
    }
}

/// Does something that signals are not to interrupt in the kernel, with every one blocked that can be:
/// also those that [`Blocked`] leaves alone, since nothing here raises them.
pub(crate) fn undisturbed<T>(something: impl FnOnce() -> T) -> T {
    struct Restore(SignalSet);
    impl Drop for Restore {
        fn drop(&mut self) {
            change(libc::SIG_SETMASK, Some(self.0));
        }
    }
    let _restore = Restore(change(libc::SIG_SETMASK, Some(SignalSet(u64::MAX))));
    something()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_bits() {
        let set = SignalSet::EMPTY.with(libc::SIGBUS).with(1).with(64);
        assert_eq!(set.bits(), 1 << 63 | 1 << 6 | 1);
        assert!(set.contains(libc::SIGBUS) && !set.contains(libc::SIGTERM));
        assert_eq!(set.without(64), SignalSet::from_bits(1 << 6 | 1));
        assert_eq!(format!("{set:?}"), "{1, 7, 64}");
    }

    #[test]
    fn the_mask_comes_back_also_after_a_panic() {
        let before = SignalSet::blocked();
        let result = std::panic::catch_unwind(|| {
            let blocked = Blocked::new();
            assert_eq!(blocked.before(), before);
            let now = SignalSet::blocked();
            assert!(now.contains(libc::SIGTERM) && now.contains(libc::SIGBUS));
            // The kernel lets nobody block SIGKILL, nor do we block those that are not to be.
            for signal in [libc::SIGKILL, 32, 33, libc::SIGSEGV, libc::SIGSYS] {
                assert!(!now.contains(signal), "{signal}");
            }
            panic!("on purpose");
        });
        assert!(result.is_err());
        assert_eq!(SignalSet::blocked(), before);
    }

    #[test]
    fn what_is_put_back_comes_again() {
        let outer = Blocked::new();
        assert!(outer.take_sigbus().is_none());
        // SAFETY: it is sent to the calling thread, which blocks it.
        unsafe { libc::raise(libc::SIGBUS) };
        assert!(outer.waits_beyond(SignalSet::EMPTY));
        assert!(!outer.waits_beyond(SignalSet::EMPTY.with(libc::SIGBUS)));
        let mut inner = Blocked::new();
        let sigbus = inner.take_sigbus().expect("it was sent");
        assert_eq!((sigbus.code(), sigbus.page()), (libc::SI_TKILL, None));
        assert!(inner.take_sigbus().is_none());
        inner.put_back(sigbus);
        drop(inner);
        assert_eq!(outer.take_sigbus().expect("put back").code(), libc::SI_TKILL);
    }
}
