//! The embedder's signals, while its vCPU is being paged.
//!
//! Handlers are the process's, so each test has signals of its own, and what they record is the
//! thread's.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::{
    cell::Cell,
    mem, ptr,
    sync::{
        atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering::*},
        mpsc,
    },
    thread,
    time::Duration,
};

use common::*;
use pageferry_kvm::SignalSet;

thread_local! {
    /// How often the calling thread was interrupted.
    static HANDLED: Cell<u64> = const { Cell::new(0) };
    /// The `immediate_exit` of the calling thread's vCPU.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn count(_: i32) {
    HANDLED.set(HANDLED.get() + 1);
}

extern "C" fn count_and_leave(_: i32) {
    HANDLED.set(HANDLED.get() + 1);
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: the thread has said where its vCPU has it, and takes that back before it goes.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

fn install(signal: i32, handler: extern "C" fn(i32)) {
    // SAFETY: the handlers of this file may run at any time.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as usize;
        assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
    }
}

fn change(how: i32, signal: i32) {
    // SAFETY: the set is initialized.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        assert_eq!(libc::pthread_sigmask(how, &set, ptr::null_mut()), 0);
    }
}

/// Takes the signal if it waits.
fn take(signal: i32) -> bool {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set is initialized; nothing else is needed.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        libc::sigtimedwait(&set, ptr::null_mut(), &zero) == signal
    }
}

/// How a vCPU is made to leave.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Kick {
    /// A handler that sets `immediate_exit`.
    ImmediateExit,
    /// A handler that does nothing.
    Handler,
    /// A signal that is unblocked in KVM_RUN only, and then taken.
    Blocked,
}

impl Kick {
    const ALL: [Self; 3] = [Self::ImmediateExit, Self::Handler, Self::Blocked];

    fn signal(self) -> i32 {
        libc::SIGRTMIN() + self as i32
    }

    /// On the vCPU's thread, before the first run.
    fn prepare(self, vcpu: &mut Vcpu) {
        match self {
            Self::ImmediateExit => {
                IMMEDIATE_EXIT.set(&raw mut vcpu.fd.get_kvm_run().immediate_exit);
                install(self.signal(), count_and_leave);
            }
            Self::Handler => install(self.signal(), count),
            Self::Blocked => {
                change(libc::SIG_BLOCK, self.signal());
                let inside = SignalSet::blocked().without(self.signal());
                vcpu.pager.set_signal_mask(Some(inside));
            }
        }
    }

    /// After a run that was interrupted: whether it was by a kick.
    fn kicked(self, vcpu: &mut Vcpu) -> bool {
        match self {
            Self::Blocked => take(self.signal()),
            Self::ImmediateExit | Self::Handler => {
                vcpu.fd.set_kvm_immediate_exit(0);
                HANDLED.replace(0) > 0
            }
        }
    }

    /// On the vCPU's thread, which ends now: what it blocks stays blocked, as kicks may still come.
    fn finish(self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

fn kick(thread: libc::pthread_t, signal: i32) {
    // SAFETY: the caller has not joined the thread.
    assert_eq!(unsafe { libc::pthread_kill(thread, signal) }, 0);
}

/// Kicks, and waits until that has ended a run.
#[track_caller]
fn kick_out(how: Kick, thread: libc::pthread_t, reports: &mpsc::Receiver<()>) {
    kick(thread, how.signal());
    if how != Kick::Handler {
        reports.recv_timeout(PATIENCE).expect("a kick was lost");
        return;
    }
    // A handler that does nothing has no effect between two runs: who uses one has to go on
    // kicking.
    for _ in 0..3000 {
        match reports.recv_timeout(Duration::from_millis(20)) {
            Ok(()) => return while reports.try_recv().is_ok() {},
            Err(mpsc::RecvTimeoutError::Timeout) => kick(thread, how.signal()),
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("the vCPU is gone"),
        }
    }
    panic!("kicks without end, and none ends a run");
}

/// A vCPU on a thread of its own.
struct Running<'scope, T> {
    handle: thread::ScopedJoinHandle<'scope, T>,
    id: libc::pthread_t,
    /// One for each run that a kick has ended.
    reports: mpsc::Receiver<()>,
}

/// Lets a vCPU, which has its program, do this on a thread that can be kicked so. It is given what
/// reports kicks.
fn start<'scope, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    how: Kick,
    mut vcpu: Vcpu,
    action: impl FnOnce(&mut Vcpu, &mpsc::Sender<()>) -> T + Send + 'scope,
) -> Running<'scope, T> {
    let (report, reports) = mpsc::channel();
    let (send_id, id) = mpsc::channel();
    let handle = scope.spawn(move || {
        how.prepare(&mut vcpu);
        // SAFETY: it has no conditions.
        send_id.send(unsafe { libc::pthread_self() } as usize).unwrap();
        let result = action(&mut vcpu, &report);
        how.finish();
        result
    });
    let id = id.recv_timeout(PATIENCE).unwrap() as libc::pthread_t;
    Running { handle, id, reports }
}

/// Kicks while the vCPU waits for a page: each ends the run, none is lost or taken for something
/// else, and the access is made in the end, in either kind of exit.
#[test]
fn a_kick_ends_the_wait_for_a_page() {
    if !exits() {
        return;
    }
    let _watch = watch(60);
    for how in Kick::ALL {
        for ring in [Ring::Three, Ring::Zero] {
            const KICKS: u64 = 20;
            let guest = Guest::new(Config { source: Source::holding(), ..Config::default() });
            thread::scope(|scope| {
                let guest = &guest;
                let vcpu = guest.vcpu(0);
                let registers = Registers { rdi: at(5 * PAGE), ..Registers::default() };
                // mov rax, [rdi]
                vcpu.prepare(guest, ring, &[0x48, 0x8b, 0x07], registers);
                let Running { handle, id, reports } = start(scope, how, vcpu, |vcpu, report| {
                    let before = SignalSet::blocked();
                    loop {
                        let result = vcpu.pager.run(&mut vcpu.fd).map(|exit| format!("{exit:?}"));
                        assert_eq!(SignalSet::blocked(), before, "the mask is not as it was");
                        match result {
                            Ok(_) => break,
                            Err(error) if error.is_interrupted() => {
                                assert!(how.kicked(vcpu), "interrupted without a kick");
                                report.send(()).unwrap();
                            }
                            Err(error) => panic!("{error}"),
                        }
                    }
                    (vcpu.fd.get_regs().unwrap().rax, vcpu.pager.stats())
                });
                wait_for("the vCPU to ask", || guest.source.asked() > 0);
                for _ in 0..KICKS {
                    kick_out(how, id, &reports);
                }
                guest.source.release();
                let (read, stats) = handle.join().unwrap();
                assert_eq!(read, Guest::expected(5 * PAGE), "{how:?} {ring:?}");
                assert!(stats.interrupted >= 1, "{stats:?}");
            });
            assert_eq!(guest.source.asked(), 1, "{how:?} {ring:?}: asked for once");
        }
    }
}

/// Kicks at any moment of a guest that pages all the time. As many as are sent one after the other
/// are seen.
#[test]
fn no_kick_is_lost_whenever_it_comes() {
    if !exits() {
        return;
    }
    let _watch = watch(60);
    for how in Kick::ALL {
        const KICKS: u64 = 300;
        let guest = Guest::new(Config { len: 512 * PAGE, ..Config::default() });
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| {
            let guest = &guest;
            let vcpu = guest.vcpu(0);
            // next: mov al, [rdi]; add rdi, PAGE; dec rcx; jnz next; jmp to itself
            let code = [
                0x8a, 0x07, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0x48, 0xff, 0xc9, 0x75, 0xf2, 0xeb,
                0xfe,
            ];
            let registers = Registers { rdi: at(0), rcx: 512, ..Registers::default() };
            vcpu.prepare(guest, Ring::Three, &code, registers);
            let Running { handle, id, reports } = start(scope, how, vcpu, move |vcpu, report| {
                while !stop.load(SeqCst) {
                    match vcpu.pager.run(&mut vcpu.fd) {
                        Err(error) if error.is_interrupted() => {}
                        other => panic!("{other:?}"),
                    }
                    assert!(how.kicked(vcpu), "interrupted without a kick");
                    report.send(()).unwrap();
                }
                vcpu.pager.stats()
            });
            for number in 0..KICKS {
                // At another moment of a fault every time.
                let until = std::time::Instant::now() + Duration::from_micros(number % 97);
                while std::time::Instant::now() < until {}
                kick_out(how, id, &reports);
            }
            stop.store(true, SeqCst);
            while !handle.is_finished() {
                kick(id, how.signal());
                thread::sleep(Duration::from_millis(1));
            }
            let stats = handle.join().unwrap();
            assert!(stats.poison > 0, "{stats:?}");
            assert_eq!(stats.foreign_signals, 0, "{stats:?}");
        });
        // All that the guest got to has been asked for once.
        let absent = guest.region.page_map().remaining();
        assert_eq!(guest.source.asked(), 512 - absent, "{how:?}");
    }
}

static SIGBUS_CODE: AtomicI32 = AtomicI32::new(0);
static SIGBUS_ADDRESS: AtomicUsize = AtomicUsize::new(0);
static SIGBUS_COUNT: AtomicU64 = AtomicU64::new(0);

extern "C" fn record(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel has filled it in. For a code without an address it is whatever is there.
    unsafe {
        SIGBUS_CODE.store((*info).si_code, SeqCst);
        SIGBUS_ADDRESS.store((*info).si_addr() as usize, SeqCst);
    }
    SIGBUS_COUNT.fetch_add(1, SeqCst);
}

/// What the source sends, on the vCPU's thread, when it is asked for a page: as the kernel may send
/// it there at any moment of a run. (A thread can send such signals to itself only.)
static CODE_TO_SEND: AtomicI32 = AtomicI32::new(0);
static ADDRESS_TO_SEND: AtomicUsize = AtomicUsize::new(0);

fn send_sigbus(region: pageferry_memory::RegionId, offset: u64, bytes: &mut [u8]) {
    // SAFETY: the fields are those of a SIGBUS that the kernel sends, and a thread may send itself
    // anything.
    unsafe {
        let mut info: libc::siginfo_t = mem::zeroed();
        (info.si_signo, info.si_code) = (libc::SIGBUS, CODE_TO_SEND.load(SeqCst));
        ptr::from_mut(&mut info).cast::<usize>().add(2).write(ADDRESS_TO_SEND.load(SeqCst));
        let (process, thread) = (libc::getpid(), libc::gettid());
        let info = &raw const info;
        let sent = libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, info);
        assert_eq!(sent, 0);
    }
    pageferry_testing::fill_pattern(region, offset, bytes);
}

const BUS_MCEERR_AR: i32 = 4;
const BUS_MCEERR_AO: i32 = 5;
const ELSEWHERE: usize = 0x1234_5000;

/// A SIGBUS that is not ours goes to the handler that is there, as it was sent; one that is blocked
/// stays, and ends one run only. The handler is the process's, so this is one test.
#[test]
fn somebody_elses_sigbus_is_passed_on() {
    if !exits() {
        return;
    }
    let _watch = watch(60);
    // SAFETY: the handler may run at any time.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = record as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()), 0);
    }
    let source = Source { contents: send_sigbus, ..Source::default() };
    let guest = Guest::new(Config { source, ..Config::default() });
    let ours = guest.region.kvm_view().range().start().get() as usize;
    let mut vcpu = guest.vcpu(0);
    let before = SignalSet::blocked();
    let cases = [
        (BUS_MCEERR_AR, ELSEWHERE),
        // An error that nobody has touched is nothing to be resolved, even in our memory.
        (BUS_MCEERR_AO, ours),
        (libc::SI_QUEUE, ours),
        (libc::SI_TKILL, 0),
        (libc::SI_USER, 0),
    ];
    for (number, (code, address)) in (0..).zip(cases) {
        CODE_TO_SEND.store(code, SeqCst);
        ADDRESS_TO_SEND.store(address, SeqCst);
        let registers = Registers { rdi: at(number * PAGE), ..Registers::default() };
        vcpu.prepare(&guest, Ring::Three, &[0x48, 0x8b, 0x07], registers);
        let error = vcpu.pager.run(&mut vcpu.fd).unwrap_err();
        assert!(error.is_interrupted(), "{error}");
        assert_eq!(SignalSet::blocked(), before, "the mask is not as it was");
        assert_eq!(SIGBUS_COUNT.load(SeqCst), number + 1);
        assert_eq!(SIGBUS_CODE.load(SeqCst), code);
        assert_eq!(SIGBUS_ADDRESS.load(SeqCst), address);
        assert_eq!(vcpu.finish().rax, Guest::expected(number * PAGE));
    }
    let foreign = cases.len() as u64;
    assert_eq!(vcpu.pager.stats().foreign_signals, foreign);

    // The guest goes on although nobody takes the signal that has ended a run already.
    change(libc::SIG_BLOCK, libc::SIGBUS);
    let registers = Registers { rdi: at(20 * PAGE), ..Registers::default() };
    vcpu.prepare(&guest, Ring::Three, &[0x48, 0x8b, 0x07], registers);
    let error = vcpu.pager.run(&mut vcpu.fd).unwrap_err();
    assert!(error.is_interrupted(), "{error}");
    assert_eq!(vcpu.finish().rax, Guest::expected(20 * PAGE));
    assert_eq!(vcpu.read(&guest, Ring::Three, 21 * PAGE), Guest::expected(21 * PAGE));
    assert!(take(libc::SIGBUS), "a blocked signal was lost");
    change(libc::SIG_UNBLOCK, libc::SIGBUS);
    assert_eq!(SIGBUS_COUNT.load(SeqCst), foreign, "it was blocked");
}

/// `immediate_exit` that is set before a run ends it, whatever it finds missing.
#[test]
fn immediate_exit_comes_first() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let guest = Guest::new(Config::default());
    let mut vcpu = guest.vcpu(0);
    let registers = Registers { rdi: at(0), ..Registers::default() };
    vcpu.prepare(&guest, Ring::Three, &[0x48, 0x8b, 0x07], registers);
    vcpu.fd.set_kvm_immediate_exit(1);
    for _ in 0..2 {
        let error = vcpu.pager.run(&mut vcpu.fd).unwrap_err();
        assert!(error.is_interrupted(), "{error}");
    }
    assert_eq!(guest.source.asked(), 0);
    vcpu.fd.set_kvm_immediate_exit(0);
    assert_eq!(vcpu.finish().rax, Guest::expected(0));
}

/// A source that panics on the vCPU's thread leaves its signals as they were, and what the guest
/// was about to do is done later.
#[test]
fn a_panic_gives_the_mask_back() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    static PANIC: AtomicBool = AtomicBool::new(true);
    fn contents(region: pageferry_memory::RegionId, offset: u64, bytes: &mut [u8]) {
        assert!(!PANIC.load(SeqCst), "on purpose");
        pageferry_testing::fill_pattern(region, offset, bytes);
    }
    for ring in [Ring::Three, Ring::Zero] {
        PANIC.store(true, SeqCst);
        let source = Source { contents, ..Source::default() };
        let guest = Guest::new(Config { source, ..Config::default() });
        let mut vcpu = guest.vcpu(0);
        let before = SignalSet::blocked();
        let registers = Registers { rdi: at(0), ..Registers::default() };
        vcpu.prepare(&guest, ring, &[0x48, 0x8b, 0x07], registers);
        for _ in 0..3 {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                drop(vcpu.pager.run(&mut vcpu.fd).map(drop));
            }));
            assert!(result.is_err(), "the source's panic is the thread's");
            assert_eq!(SignalSet::blocked(), before);
        }
        // The claim was given back: another try succeeds.
        PANIC.store(false, SeqCst);
        assert_eq!(vcpu.finish().rax, Guest::expected(0), "{ring:?}");
    }
}
