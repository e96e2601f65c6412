//! ptrace(2): one function a request, for 64-bit x86.
//!
//! A request is made by the thread that attached, of a thread that is in a ptrace stop; to any
//! other caller or thread the kernel answers ESRCH. None of them can touch memory of this process
//! but what is passed for the answer, since a process cannot trace itself.

use std::mem::{offset_of, size_of};

use libc::{iovec, user_regs_struct};
use linux_raw_sys::ptrace as raw;
use rustix::{
    io::Errno,
    process::{Pid, WaitId, WaitIdOptions, WaitIdStatus},
};

use super::last_errno;

/// The general registers of a 64-bit thread (`NT_PRSTATUS`).
pub(crate) type Registers = user_regs_struct;

const _: () = {
    assert!(size_of::<Registers>() == 216);
    assert!(offset_of!(Registers, rax) == 80);
    assert!(offset_of!(Registers, orig_rax) == 120);
    assert!(offset_of!(Registers, rsp) == 152);
    assert!(size_of::<raw::ptrace_rseq_configuration>() == 24);
    assert!(size_of::<raw::ptrace_sud_config>() == 32);
};

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

/// More than any processor's extended state.
const XSTATE_MAX: usize = 64 << 10;

/// Why a traced thread stopped.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// Because it was interrupted, is new, or takes part in a stop of its whole process.
    Interrupt,
    /// It enters or leaves a system call.
    Syscall,
    /// It is about to take the signal with this number.
    Signal(i32),
    /// It made a thread, or a process that its maker does not wait for as for a child.
    Clone,
    /// It runs another program now.
    Exec,
}

/// What can be found out of a thread that is traced.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// It runs, or sleeps.
    None,
    /// It has stopped.
    Stopped(Stop),
    /// It has ended, or is not traced by this process.
    Gone,
}

/// How a stopped thread goes on.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Go {
    /// Freely.
    Freely,
    /// Until it enters or leaves a system call.
    ToSyscall,
}

/// One request.
///
/// # Safety
///
/// `address` and `data` are what the request takes there; what the request writes to is writable
/// for as long as it may write.
unsafe fn request(
    request: u32,
    thread: Pid,
    address: usize,
    data: usize,
) -> Result<libc::c_long, Errno> {
    let thread: libc::pid_t = thread.as_raw_pid();
    // SAFETY: as the caller promises.
    let answer = unsafe { libc::ptrace(request as _, thread, address, data) };
    if answer == -1 { Err(last_errno()) } else { Ok(answer) }
}

/// Attaches to a thread, without stopping it. New threads it makes are attached to as they are
/// born; stops of system calls are told from signals.
pub(crate) fn seize(thread: Pid) -> Result<(), Errno> {
    let options = raw::PTRACE_O_TRACESYSGOOD | raw::PTRACE_O_TRACECLONE | raw::PTRACE_O_TRACEEXEC;
    // SAFETY: the request takes numbers only.
    unsafe { request(raw::PTRACE_SEIZE, thread, 0, options as usize) }.map(drop)
}

/// Makes a thread stop before it next executes an instruction.
pub(crate) fn interrupt(thread: Pid) -> Result<(), Errno> {
    // SAFETY: the request takes nothing.
    unsafe { request(raw::PTRACE_INTERRUPT, thread, 0, 0) }.map(drop)
}

/// Lets a stopped thread go on; `signal` is the one it was about to take, or 0.
pub(crate) fn go(thread: Pid, go: Go, signal: i32) -> Result<(), Errno> {
    let what = match go {
        Go::Freely => raw::PTRACE_CONT,
        Go::ToSyscall => raw::PTRACE_SYSCALL,
    };
    // SAFETY: the request takes numbers only.
    unsafe { request(what, thread, 0, signal as usize) }.map(drop)
}

/// Lets a stopped thread go on, untraced.
pub(crate) fn detach(thread: Pid) -> Result<(), Errno> {
    // SAFETY: the request takes numbers only.
    unsafe { request(raw::PTRACE_DETACH, thread, 0, 0) }.map(drop)
}

/// The number that belongs to the event a thread stopped for: of [`Stop::Clone`], the new thread.
pub(crate) fn event_message(thread: Pid) -> Result<u64, Errno> {
    let mut message: libc::c_ulong = 0;
    // SAFETY: the request writes one `unsigned long`.
    unsafe { request(raw::PTRACE_GETEVENTMSG, thread, 0, (&raw mut message).addr()) }?;
    Ok(message)
}

/// Reads a set of registers into `buffer`; answers with its length.
///
/// # Safety
///
/// `buffer` is writable for `length` bytes.
unsafe fn regset(thread: Pid, set: usize, buffer: *mut u8, length: usize) -> Result<usize, Errno> {
    let mut vector = iovec { iov_base: buffer.cast(), iov_len: length };
    // SAFETY: the request writes at most `iov_len` bytes to the buffer, and then `iov_len`.
    unsafe { request(raw::PTRACE_GETREGSET, thread, set, (&raw mut vector).addr()) }?;
    Ok(vector.iov_len)
}

/// The general registers; `None` of a thread that executes 32-bit code.
pub(crate) fn registers(thread: Pid) -> Result<Option<Registers>, Errno> {
    // SAFETY: the structure consists of integers.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let length = size_of::<Registers>();
    // SAFETY: the structure is writable for its length.
    let got = unsafe { regset(thread, NT_PRSTATUS, (&raw mut registers).cast(), length) }?;
    // The kernel has another, shorter structure for 32-bit code.
    Ok((got == length).then_some(registers))
}

/// Sets the general registers.
pub(crate) fn set_registers(thread: Pid, registers: &Registers) -> Result<(), Errno> {
    let mut vector = iovec {
        iov_base: std::ptr::from_ref(registers).cast_mut().cast(),
        iov_len: size_of::<Registers>(),
    };
    // SAFETY: the request reads so many bytes of the registers, and writes `iov_len`.
    unsafe { request(raw::PTRACE_SETREGSET, thread, NT_PRSTATUS, (&raw mut vector).addr()) }
        .map(drop)
}

/// The floating-point and vector registers, as XSAVE lays them out in its standard form.
pub(crate) fn extended_state(thread: Pid) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0_u8; XSTATE_MAX];
    // SAFETY: the vector is writable for its length.
    let length = unsafe { regset(thread, NT_X86_XSTATE, bytes.as_mut_ptr(), bytes.len()) }?;
    bytes.truncate(length);
    Ok(bytes)
}

/// Where in the extended state the tiles of matrix instructions (AMX) begin; after all else.
pub(crate) fn tile_data_offset() -> usize {
    const STATE_LEAF: u32 = 0xd;
    const TILE_DATA: u32 = 18;
    // A safe function since Rust 1.93.
    #[allow(unused_unsafe)]
    // SAFETY: every 64-bit processor has the instruction.
    let leaf = unsafe { std::arch::x86_64::__cpuid_count(STATE_LEAF, TILE_DATA) };
    leaf.ebx as usize
}

/// The signals that a thread blocks, those aside that a system call it is in blocks for itself.
pub(crate) fn signal_mask(thread: Pid) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    let length = size_of::<u64>();
    // SAFETY: the request writes `length` bytes.
    unsafe { request(raw::PTRACE_GETSIGMASK, thread, length, (&raw mut mask).addr()) }?;
    Ok(mask)
}

/// Where in its memory a thread keeps its restartable sequences (rseq(2)), if it does.
pub(crate) fn rseq_area(thread: Pid) -> Result<Option<u64>, Errno> {
    let mut config = raw::ptrace_rseq_configuration {
        rseq_abi_pointer: 0,
        rseq_abi_size: 0,
        signature: 0,
        flags: 0,
        pad: 0,
    };
    let length = size_of::<raw::ptrace_rseq_configuration>();
    let what = raw::PTRACE_GET_RSEQ_CONFIGURATION;
    // SAFETY: the request writes at most `length` bytes.
    match unsafe { request(what, thread, length, (&raw mut config).addr()) } {
        Ok(_) => Ok((config.rseq_abi_pointer != 0).then_some(config.rseq_abi_pointer)),
        // Kernels before 5.13, and those built without rseq.
        Err(Errno::IO | Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Whether a thread has its system calls handed to itself as signals (`PR_SET_SYSCALL_USER_DISPATCH`).
pub(crate) fn dispatches_syscalls(thread: Pid) -> Result<bool, Errno> {
    let mut config = raw::ptrace_sud_config { mode: 0, selector: 0, offset: 0, len: 0 };
    let length = size_of::<raw::ptrace_sud_config>();
    let what = raw::PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG;
    // SAFETY: the request writes at most `length` bytes.
    match unsafe { request(what, thread, length, (&raw mut config).addr()) } {
        Ok(_) => Ok(config.mode != 0),
        // Kernels before 6.4 do not tell.
        Err(Errno::IO | Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

const TRAPPED: i32 = 4;

/// The news of a thread; `None` while there is none.
///
/// The news of a stop is given, and taken, whether or not it is asked for, of threads that are
/// traced.
fn wait(thread: Pid, options: WaitIdOptions) -> Result<Option<WaitIdStatus>, Errno> {
    const WALL: WaitIdOptions = WaitIdOptions::from_bits_retain(libc::__WALL as u32);
    let options = WALL | WaitIdOptions::NOHANG | options;
    rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::Pid(thread), options))
}

/// What has become of a thread, taking the news of it.
///
/// That the `process` as a whole has ended is left for its parent to take, which may be this
/// process.
pub(crate) fn poll(thread: Pid, process: Pid) -> Result<Change, Errno> {
    let any = WaitIdOptions::STOPPED | WaitIdOptions::EXITED;
    let mut news = if thread == process {
        wait(thread, any | WaitIdOptions::NOWAIT)
    } else {
        wait(thread, any)
    };
    if let (true, Ok(Some(status))) = (thread == process, &news)
        && status.raw_code() == TRAPPED
    {
        news = wait(thread, WaitIdOptions::STOPPED);
    }
    match news {
        Ok(None) => Ok(Change::None),
        Ok(Some(status)) if status.raw_code() == TRAPPED => {
            let status = status.trapping_signal().expect("a trap has its signal");
            Ok(Change::Stopped(classify(status)))
        }
        Ok(Some(_)) | Err(Errno::CHILD) => Ok(Change::Gone),
        Err(errno) => Err(errno),
    }
}

/// Takes the news that a thread has ended, if it has.
pub(crate) fn reap(thread: Pid) -> Result<Change, Errno> {
    let ended = WaitIdOptions::EXITED;
    let result = match wait(thread, ended | WaitIdOptions::NOWAIT) {
        Ok(Some(status)) if status.raw_code() != TRAPPED => wait(thread, ended),
        other => other.map(|_| None),
    };
    match result {
        Ok(None) => Ok(Change::None),
        Ok(Some(_)) | Err(Errno::CHILD) => Ok(Change::Gone),
        Err(errno) => Err(errno),
    }
}

fn classify(status: i32) -> Stop {
    const AT_SYSCALL: i32 = libc::SIGTRAP | 0x80;
    match ((status >> 8) as u32, status & 0xff) {
        (0, AT_SYSCALL) => Stop::Syscall,
        (0, signal) => Stop::Signal(signal),
        (raw::PTRACE_EVENT_CLONE, _) => Stop::Clone,
        (raw::PTRACE_EVENT_EXEC, _) => Stop::Exec,
        // No other event was asked for.
        _ => Stop::Interrupt,
    }
}
