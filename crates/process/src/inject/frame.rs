//! The way back from a system call that a thread was made to make.
//!
//! It is what the kernel writes to the stack of a thread before it calls the handler of a signal
//! (`struct rt_sigframe`): an address to return to, which calls rt_sigreturn(2), and all registers,
//! which that restores. It lies where the kernel would write it, below the stack and the 128 bytes
//! under it that are in use (System V ABI, *The stack frame*). A thread that uses it is back where
//! it was, and the system call that it waited in begins again.
//!
//! Only the bytes that it overwrites are lost to a thread that had to use it. They are nobody's,
//! except for stacks that are so small that their owners handle signals elsewhere (Go).
//!
//! Source: `arch/x86/include/uapi/asm/sigcontext.h` and `ucontext.h`.

use pageferry_uffd::HostAddress;

use crate::sys::ptrace::{Registers, tile_data_offset};

/// What a function may use below the stack without saying so.
const RED_ZONE: u64 = 128;
/// XRSTOR insists on it.
const STATE_ALIGNMENT: u64 = 64;

/// The return address, `struct ucontext`, and `siginfo_t`, of which nothing is read.
const HEAD: u64 = 8 + 304 + 128;

/// Where in the extended state the kernel writes which parts it may have (XCR0), and where it
/// expects a description of the whole (`struct _fpx_sw_bytes`).
const DESCRIPTION: usize = 464;
/// Where it says which of its parts are not as after a reset (XSTATE_BV).
const IN_USE: usize = 512;
/// The least of it: the legacy part and the header.
const STATE_MIN: usize = 576;
const TILE_DATA: u64 = 1 << 18;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;

/// Extended state; the stack segment is saved, and to be restored as it is.
const UC_FLAGS: u64 = 1 | 2 | 4;
/// Flags of an alternate signal stack that the kernel refuses, and so leaves the thread's as it is.
const SS_INVALID: u64 = 0xffff;

/// What is written below the stack of a thread.
pub(crate) struct Frame {
    /// Where; also what the stack pointer has to be when the system call returns.
    pub(crate) at: HostAddress,
    /// What.
    pub(crate) bytes: Vec<u8>,
}

impl Frame {
    /// The way back to `registers`, with these signals blocked and this extended state, by
    /// returning to `sigreturn`. `None` where no stack can be, or the state is not understood.
    pub(crate) fn new(
        registers: &Registers,
        blocked: u64,
        state: &[u8],
        sigreturn: u64,
    ) -> Option<Self> {
        let state = described(state)?;
        let top = registers.rsp.checked_sub(RED_ZONE)?;
        let state_at = align_down(top.checked_sub(state.len() as u64)?, STATE_ALIGNMENT);
        let at = align_down(state_at.checked_sub(HEAD)?, 16);

        let mut bytes = vec![0; (state_at - at) as usize];
        let mut put = |offset: usize, value: u64| {
            bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        };
        let r = restarting(registers);
        put(0, sigreturn);
        // struct ucontext
        put(8, UC_FLAGS);
        put(8 + 24, SS_INVALID);
        // struct sigcontext
        let in_order = [
            r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx,
            r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags,
        ];
        for (index, value) in in_order.into_iter().enumerate() {
            put(8 + 40 + 8 * index, value);
        }
        put(8 + 184, (r.cs & 0xffff) | (r.ss & 0xffff) << 48);
        put(8 + 224, state_at);
        put(8 + 296, blocked);
        bytes.extend_from_slice(&state);
        Some(Self { at: HostAddress::new(at), bytes })
    }
}

fn align_down(address: u64, alignment: u64) -> u64 {
    address & !(alignment - 1)
}

/// The registers with which a thread begins the system call again that it waits in.
///
/// For those that the kernel would go on with where they were, such as nanosleep(2), it forgets how
/// far they were when it restores registers from a stack; they begin anew, and sleep longer.
fn restarting(registers: &Registers) -> Registers {
    const LENGTH_OF_SYSCALL: u64 = 2;
    let interrupted = registers.orig_rax.cast_signed() >= 0
        && matches!(registers.rax.cast_signed(), -516 | -514..=-512);
    if !interrupted {
        return *registers;
    }
    Registers {
        rax: registers.orig_rax,
        rip: registers.rip.wrapping_sub(LENGTH_OF_SYSCALL),
        ..*registers
    }
}

/// Extended state with the description that the kernel insists on.
fn described(state: &[u8]) -> Option<Vec<u8>> {
    if state.len() < STATE_MIN {
        return None;
    }
    let word = |at: usize| {
        let bytes = state[at..at + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let mut parts = word(DESCRIPTION);
    let mut size = state.len();
    // A thread that has no tiles has no room for them either, and the kernel would not take it.
    if parts & TILE_DATA != 0 && word(IN_USE) & TILE_DATA == 0 {
        parts &= !TILE_DATA;
        size = tile_data_offset().min(size);
    }
    let mut state = state[..size].to_vec();
    let with_magic = size as u32 + 4;
    state[DESCRIPTION..DESCRIPTION + 4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    state[DESCRIPTION + 4..DESCRIPTION + 8].copy_from_slice(&with_magic.to_le_bytes());
    state[DESCRIPTION + 8..DESCRIPTION + 16].copy_from_slice(&parts.to_le_bytes());
    state[DESCRIPTION + 16..DESCRIPTION + 20].copy_from_slice(&(size as u32).to_le_bytes());
    state[DESCRIPTION + 20..DESCRIPTION + 48].fill(0);
    state.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    Some(state)
}
