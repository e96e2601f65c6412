//! The faulting thread resolves its own fault, in its SIGBUS handler.
//!
//! With UFFD_FEATURE_SIGBUS the kernel queues nothing: a user-mode access to an absent page raises
//! SIGBUS with the address, and the handler claims, fetches, installs and returns, upon which the
//! access is repeated. No other thread takes part (with a source that answers inline), so nothing
//! contends but the page map.
//!
//! SIGBUS is synchronous here: what it interrupts is an access to guest memory. The handler
//! therefore may take the engine's own locks, since no engine thread touches guest memory while it
//! holds one, but nothing that an embedder might hold: it does not allocate, log, or use stdio.

#![allow(unsafe_code)]

use std::{
    cell::{Cell, UnsafeCell},
    ffi::{c_int, c_void},
    io,
    mem::MaybeUninit,
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread,
};

use pageferry_memory::HostAddress;

use crate::core::Core;

/// How many pagers of one process can deliver by signal at once.
const SLOTS: usize = 64;

struct Slot {
    core: AtomicPtr<Core>,
    /// Handlers that may be using `core`.
    users: AtomicUsize,
}

static REGISTRY: [Slot; SLOTS] =
    [const { Slot { core: AtomicPtr::new(ptr::null_mut()), users: AtomicUsize::new(0) } }; SLOTS];

/// The action that SIGBUS had before ours. Written before ours is installed, never after.
struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);
// SAFETY: written once, under `INSTALL`, before `KNOWN` is set with release ordering; read only
// after `KNOWN` was seen set with acquire ordering.
unsafe impl Sync for Previous {}
static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::uninit()));
static KNOWN: AtomicBool = AtomicBool::new(false);
static INSTALL: Mutex<()> = Mutex::new(());
/// How many pagers have left the registry.
static LEFT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    // Constant initialiser and no destructor: usable in a signal handler.
    static IN_HANDLER: Cell<bool> = const { Cell::new(false) };
    // `LEFT` when this thread last repeated an access for its sake.
    static REPEATED_AT: Cell<u64> = const { Cell::new(0) };
}

/// Whether this thread is in the SIGBUS handler, where logging and allocating are out.
pub(crate) fn in_handler() -> bool {
    IN_HANDLER.get()
}

/// Keeps a pager's memory known to the handler.
pub(crate) struct Registered {
    slot: &'static Slot,
    core: Arc<Core>,
}

impl Registered {
    /// Installs the handler if it is not, and makes `core`'s memory known to it.
    pub(crate) fn new(core: Arc<Core>) -> io::Result<Self> {
        install_handler()?;
        let pointer = Arc::as_ptr(&core).cast_mut();
        for slot in &REGISTRY {
            if slot.core.compare_exchange(ptr::null_mut(), pointer, SeqCst, SeqCst).is_ok() {
                return Ok(Self { slot, core });
            }
        }
        Err(io::Error::other(format!("{SLOTS} pagers of this process deliver by signal already")))
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        debug_assert_eq!(self.slot.core.load(SeqCst).cast_const(), Arc::as_ptr(&self.core));
        // First: whoever finds the slot empty sees it counted.
        LEFT.fetch_add(1, SeqCst);
        self.slot.core.store(ptr::null_mut(), SeqCst);
        // Only now, with the slot empty, does the count stay at zero once it is.
        while self.slot.users.load(SeqCst) != 0 {
            thread::yield_now();
        }
    }
}

fn install_handler() -> io::Result<()> {
    let _installing = INSTALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if KNOWN.load(Acquire) {
        return Ok(());
    }
    // SAFETY: an all-zero sigaction is a valid value of the type (no handler, empty mask).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    // Not SA_ONSTACK: the alternate stacks that the standard library gives threads are too small.
    // SA_NODEFER: a previous handler that never returns (siglongjmp) must not leave it blocked.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: `action` is initialised, and PREVIOUS is written under INSTALL, before KNOWN is set.
    // The handler is async-signal-safe, see the module's comment; should it run before KNOWN is
    // set it returns, and the access is repeated.
    let result =
        unsafe { libc::sigaction(libc::SIGBUS, &action, (*PREVIOUS.0.get()).as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    KNOWN.store(true, Release);
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the errno location of this thread is always valid.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr()) };
    // Codes of 0 and below were sent by a process, without an address.
    let resolved = code > 0 && {
        let nested = IN_HANDLER.replace(true);
        let resolved = resolve(HostAddress::from_ptr(address.cast_const()));
        IN_HANDLER.set(nested);
        resolved
    };
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if resolved {
        return;
    }
    // Perhaps it was raised for memory of a pager that has left since: then the access is good now,
    // or fails again.
    let left = LEFT.load(SeqCst);
    if code > 0 && REPEATED_AT.replace(left) != left {
        return;
    }
    chain(signal, info, context);
}

/// Brings the page, if it is one of ours. False when the signal is somebody else's business: a
/// foreign address, or a page that can never come.
fn resolve(address: HostAddress) -> bool {
    for slot in &REGISTRY {
        if slot.core.load(Relaxed).is_null() {
            continue;
        }
        slot.users.fetch_add(1, SeqCst);
        let core = slot.core.load(SeqCst);
        // SAFETY: `Registered` keeps the Arc alive until the slot is null and `users` zero; we are
        // counted in `users` since before this load.
        let resolved = (!core.is_null()).then(|| unsafe { &*core }).and_then(|core| {
            core.gate.install().find(address)?;
            Some(core.resolve(address))
        });
        slot.users.fetch_sub(1, SeqCst);
        if let Some(resolved) = resolved {
            return resolved;
        }
    }
    false
}

/// Hands the signal to whoever had it before us.
fn chain(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    if !KNOWN.load(Acquire) {
        return;
    }
    // SAFETY: KNOWN is set, so PREVIOUS was written and does not change any more.
    let previous = unsafe { (*PREVIOUS.0.get()).assume_init_ref() };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let sent = unsafe { (*info).si_code } <= 0;
    match previous.sa_sigaction {
        // Only what a process sends can be ignored; an access cannot go on without its page.
        libc::SIG_IGN if sent => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: an all-zero sigaction with SIG_DFL is valid; sigaction is async-signal-safe.
            unsafe {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                // The access is repeated upon return and ends the process as it would have without
                // us, with the right address in the core dump.
                libc::sigaction(signal, &default, ptr::null_mut());
                if sent {
                    libc::raise(signal);
                }
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: registered with SA_SIGINFO, so it is a function of this type.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: registered without SA_SIGINFO, so it is a function of this type.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
