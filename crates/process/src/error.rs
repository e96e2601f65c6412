//! What can go wrong with another process.

use std::{fmt, io, path::PathBuf, time::Duration};

use pageferry_uffd::{Attempt, HostAddress, UffdError};
use rustix::{io::Errno, process::Pid};

/// What is missing for the permission to trace a process.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Missing {
    /// It is another user's, and this process lacks `CAP_SYS_PTRACE`.
    OtherUser {
        /// The other user.
        theirs: u32,
        /// The user of this process.
        ours: u32,
    },
    /// It is the same user's, but has more rights than its user: it was started from a
    /// set-user-ID program, or has made itself undumpable (`PR_SET_DUMPABLE`).
    Undumpable,
    /// The Yama security module restricts tracing.
    Yama {
        /// `kernel.yama.ptrace_scope`.
        scope: u32,
    },
    /// This process has `CAP_SYS_PTRACE`, but not in the other's user namespace; or a security
    /// module denies it.
    Elsewhere,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherUser { theirs, ours } => write!(
                f,
                "it belongs to user {theirs} and this process to user {ours}: become that user, or \
                 grant CAP_SYS_PTRACE"
            ),
            Self::Undumpable => f.write_str(
                "it is protected (set-user-ID, or PR_SET_DUMPABLE 0): grant CAP_SYS_PTRACE",
            ),
            Self::Yama { scope } => write!(
                f,
                "kernel.yama.ptrace_scope is {scope}: set it to 0, or grant CAP_SYS_PTRACE (which \
                 does not help where it is 3)"
            ),
            Self::Elsewhere => f.write_str(
                "CAP_SYS_PTRACE is needed in its user namespace, or a security module denies it",
            ),
        }
    }
}

/// How seccomp(2) confines a thread.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Seccomp {
    /// To reading and writing what is open, and exiting.
    Strict,
    /// By a filter.
    Filter,
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict mode",
            Self::Filter => "a filter",
        })
    }
}

/// What to do with a process in whose name no system call can be made.
const WITHOUT: &str = "use what takes none (it can be stopped and read; soft-dirty bits tell what it \
                       writes, if the kernel has them)";

/// Why a process could not be looked at, stopped, or made to do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// There is no process of that number.
    #[error("process {pid}: there is none")]
    None {
        /// The number.
        pid: Pid,
    },
    /// The number is of a thread that is not the first of its process.
    #[error("{pid} is a thread and not a process")]
    NotProcess {
        /// The number.
        pid: Pid,
    },
    /// The process is this one, which cannot trace itself.
    #[error("process {pid} is this process itself")]
    Own {
        /// The number.
        pid: Pid,
    },
    /// The process has no memory of its own: it is a thread of the kernel.
    #[error("process {pid} has no memory: it is a thread of the kernel")]
    Memoryless {
        /// The number.
        pid: Pid,
    },
    /// The process has ended, whether or not its parent has waited for it; or is about to, and has
    /// no memory any more.
    #[error("process {pid} has ended, {doing}")]
    Ended {
        /// The number it had.
        pid: Pid,
        /// What was being done.
        doing: &'static str,
    },
    /// The process has started another program: the memory that was looked at is no more.
    #[error("process {pid} has started another program (exec): its former memory is gone")]
    Replaced {
        /// The number.
        pid: Pid,
    },
    /// This process may not trace it.
    #[error("process {pid}: not permitted, {doing}: {missing}")]
    NotPermitted {
        /// The number.
        pid: Pid,
        /// What was being done.
        doing: &'static str,
        /// What is missing.
        missing: Missing,
    },
    /// Somebody traces it already; a thread can have one tracer.
    #[error("process {pid} is already traced, by {tracer} (a debugger, strace, another tracker)")]
    AlreadyTraced {
        /// The number.
        pid: Pid,
        /// Who traces it.
        tracer: i32,
    },
    /// A thread did not stop in time. All has been undone.
    #[error(
        "process {pid}: thread {thread} did not stop within {waited:?}; its state is {state}{}",
        if *.state == 'D' { " (in the kernel, where nothing interrupts it: a disk or network file \
                             system that does not answer, or a vfork)" } else { "" }
    )]
    Unstoppable {
        /// The number.
        pid: Pid,
        /// The thread.
        thread: Pid,
        /// Its state, as in `/proc/PID/stat`.
        state: char,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It is stopped by its control group, where no system call can be made in its name.
    #[error(
        "process {pid}: no system call can be made in its name while its control group is frozen; \
         stop it by ptrace, with the group thawed"
    )]
    Frozen {
        /// The number.
        pid: Pid,
    },
    /// It is confined by seccomp: a system call in its name could kill it.
    #[error(
        "process {pid} is confined by seccomp ({by}), which may kill it for a system call made in \
         its name, so none is made: {WITHOUT}, or start it without seccomp"
    )]
    Confined {
        /// The number.
        pid: Pid,
        /// What confines it.
        by: Seccomp,
    },
    /// It handles its own system calls (syscall user dispatch), so one in its name would be a
    /// signal.
    #[error(
        "process {pid} dispatches its system calls to itself (PR_SET_SYSCALL_USER_DISPATCH), so \
         none can be made in its name: {WITHOUT}"
    )]
    Dispatches {
        /// The number.
        pid: Pid,
    },
    /// It is a 32-bit program.
    #[error(
        "process {pid} is a 32-bit program, and system calls are made in the name of 64-bit ones \
         only: {WITHOUT}"
    )]
    Bits32 {
        /// The number.
        pid: Pid,
    },
    /// It has no `syscall` instruction that could be used.
    #[error(
        "process {pid} has no system call instruction in its executable memory, so none can be \
         made in its name: {WITHOUT}"
    )]
    NoInstruction {
        /// The number.
        pid: Pid,
    },
    /// A system call made in its name was refused.
    #[error("process {pid}: system call {number} in its name: {errno}")]
    Syscall {
        /// The process.
        pid: Pid,
        /// The number of the system call.
        number: u64,
        /// The kernel's reason.
        errno: Errno,
    },
    /// It could not get a userfaultfd, or not one as required.
    #[error("process {pid}: no way to a userfaultfd of its memory: {}", list(.attempts))]
    NoUserfaultfd {
        /// The process.
        pid: Pid,
        /// Every way, and what was in it. The rights that are asked for are the other process's.
        attempts: Vec<Attempt>,
    },
    /// What it handed over is not a userfaultfd.
    #[error("process {pid}: its userfaultfd: {source}")]
    Userfaultfd {
        /// The process.
        pid: Pid,
        /// The reason.
        source: UffdError,
    },
    /// Its memory cannot be read there.
    #[error("process {pid}: cannot read its memory at {address}: {errno}")]
    Unreadable {
        /// The process.
        pid: Pid,
        /// The first byte that cannot be read.
        address: HostAddress,
        /// The kernel's reason.
        errno: Errno,
    },
    /// A file in `/proc` could not be read.
    #[error("process {pid}: cannot read {}: {source}", .path.display())]
    Proc {
        /// The process.
        pid: Pid,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file in `/proc` contains what is not understood.
    #[error("process {pid}: {} contains {text:?}, which is not {expected}", .path.display())]
    NotUnderstood {
        /// The process.
        pid: Pid,
        /// The file.
        path: PathBuf,
        /// What was expected.
        expected: &'static str,
        /// What it contains.
        text: String,
    },
    /// It has no control group that could be frozen for it alone.
    #[error("process {pid} cannot be stopped by its control group: {why}")]
    NoOwnGroup {
        /// The process.
        pid: Pid,
        /// The reason.
        why: String,
    },
    /// Something failed with its control group.
    #[error("process {pid}: control group {}: cannot {doing}: {source}", .group.display())]
    Group {
        /// The process.
        pid: Pid,
        /// The group's directory.
        group: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("process {pid}: cannot {doing}: {errno}")]
    Kernel {
        /// The process.
        pid: Pid,
        /// What was being done.
        doing: &'static str,
        /// The kernel's reason.
        errno: Errno,
    },
}

impl ProcessError {
    /// Whether the process is no more, or no more the program that it was: it needs no tracking.
    pub const fn is_gone(&self) -> bool {
        matches!(self, Self::None { .. } | Self::Ended { .. } | Self::Replaced { .. })
    }
}

fn list(attempts: &[Attempt]) -> String {
    if attempts.is_empty() {
        return "none was to be tried".to_owned();
    }
    attempts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ")
}
