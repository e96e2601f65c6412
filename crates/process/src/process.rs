//! A process, held so that its number cannot come to mean another one.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, OnceLock},
};

use pageferry_uffd::Pagemap;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal},
};

use crate::{
    Detail, Mapping, ProcessError, StopOptions, Stopped,
    inject::Landing,
    mappings, status,
    status::{Stat, Status},
};

/// Another process, and the memory that it had when it was opened.
///
/// It is held by a descriptor (`pidfd`), so that a process of the same number which comes later is
/// not taken for it; and by its memory, so that another program which the process starts (exec) is
/// not taken for the one that was meant: that is [`ProcessError::Replaced`].
///
/// Holding it does nothing to the process. Who may hold it may also trace it, which takes the same
/// user and an unprotected process, or `CAP_SYS_PTRACE` (see ptrace(2), *Ptrace access mode
/// checking*).
#[derive(Clone, Debug)]
pub struct Process {
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    pid: Pid,
    pidfd: OwnedFd,
    /// Of the memory that the process had when this was opened, whatever it has now.
    memory: File,
    landing: OnceLock<Landing>,
}

impl Process {
    /// Holds a process by its number.
    ///
    /// # Errors
    ///
    /// [`ProcessError::None`], [`NotProcess`](ProcessError::NotProcess) for the number of a thread,
    /// [`Own`](ProcessError::Own), [`Memoryless`](ProcessError::Memoryless) for threads of the
    /// kernel, [`Ended`](ProcessError::Ended) also for a zombie,
    /// [`NotPermitted`](ProcessError::NotPermitted).
    pub fn open(pid: Pid) -> Result<Self, ProcessError> {
        const DOING: &str = "opening its memory";
        if pid == rustix::process::getpid() {
            return Err(ProcessError::Own { pid });
        }
        let pidfd =
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| match errno {
                Errno::SRCH => ProcessError::None { pid },
                // Since Linux 6.9 ENOENT, before EINVAL.
                Errno::INVAL | Errno::NOENT => ProcessError::NotProcess { pid },
                errno => ProcessError::Kernel { pid, doing: "open a pidfd of it", errno },
            })?;
        let ended = ProcessError::Ended { pid, doing: DOING };
        // Again where it starts another program just then: that has memory of its own.
        for _ in 0..TRIES {
            let opened = status::read_by_thread(pid, "mem", |path| File::open(path));
            let memory = match opened {
                Ok(Some(memory)) => memory,
                Ok(None) => return Err(ended),
                Err(ProcessError::Proc { source, .. })
                    if source.kind() == io::ErrorKind::PermissionDenied =>
                {
                    return Err(status::refusal(pid, DOING)?);
                }
                // A thread of the kernel has none.
                Err(_) if Stat::of(pid, pid)?.is_some_and(Stat::is_kernel) => break,
                Err(error) => return Err(error),
            };
            // The number meant the process of the descriptor when the memory was opened, if that
            // process lives still.
            if !is_alive(&pidfd) {
                return Err(ended);
            }
            if is_somebodys(pid, &memory)? {
                let landing = OnceLock::new();
                return Ok(Self { held: Arc::new(Held { pid, pidfd, memory, landing }) });
            }
        }
        Err(ProcessError::Memoryless { pid })
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.held.pid
    }

    /// Whether it has not ended. One whose parent did not wait for it yet has ended.
    ///
    /// The [descriptor](Self::as_fd) can be polled for the same: it is readable from then on.
    pub fn is_alive(&self) -> bool {
        is_alive(&self.held.pidfd)
    }

    /// Finds out whether it lives, and runs the program that it ran when it was opened.
    ///
    /// One that is on its way out is gone as soon as it has given up its memory, which may be a
    /// while before it [has ended](Self::is_alive).
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`], [`ProcessError::Replaced`].
    pub fn check(&self) -> Result<(), ProcessError> {
        let pid = self.pid();
        let ended = ProcessError::Ended { pid, doing: "looking after it" };
        if !self.is_alive() {
            return Err(ended);
        }
        if is_somebodys(pid, self.memory())? {
            return Ok(());
        }
        // No thread has that memory: each is on its way out, or has that of another program.
        let has_other = status::a_thread(pid)?.is_some();
        // Whose thread that was is known only now.
        Err(if has_other && self.is_alive() { ProcessError::Replaced { pid } } else { ended })
    }

    /// What an error is of, if the process is gone.
    pub(crate) fn confirm(&self, error: ProcessError) -> ProcessError {
        match self.check() {
            Err(replaced @ ProcessError::Replaced { .. }) => replaced,
            Err(gone) if gone.is_gone() && !error.is_gone() => gone,
            _ => error,
        }
    }

    /// Its threads, in the order in which they were made. Of a running process: at some moment.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`], or `/proc` cannot be read.
    pub fn threads(&self) -> Result<Vec<Pid>, ProcessError> {
        let threads = status::threads(self.pid())?;
        if threads.is_empty() || !self.is_alive() {
            return Err(ProcessError::Ended { pid: self.pid(), doing: "listing its threads" });
        }
        Ok(threads)
    }

    /// Its page map: that of the memory it had when it was opened.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`], [`Replaced`](ProcessError::Replaced), or it cannot be opened.
    pub fn pagemap(&self) -> Result<Pagemap, ProcessError> {
        let pid = self.pid();
        let file = status::read_by_thread(pid, "pagemap", |path| File::open(path));
        // Only now is it known whose it is.
        self.check()?;
        let ended = ProcessError::Ended { pid, doing: "opening its page map" };
        Ok(Pagemap::from_fd(file?.ok_or(ended)?.into()))
    }

    /// Its mappings, in ascending order.
    ///
    /// A mapping that changes while they are read may be missing or appear as it was or is;
    /// of a stopped process they are exact.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`], [`Replaced`](ProcessError::Replaced), or `/proc` cannot be read.
    pub fn mappings(&self, detail: Detail) -> Result<Vec<Mapping>, ProcessError> {
        let pid = self.pid();
        let file = match detail {
            Detail::Names => "maps",
            Detail::Full => "smaps",
        };
        let bytes = status::read_by_thread(pid, file, |path| std::fs::read(path));
        // Before what may have been read of other memory is looked at.
        self.check()?;
        let ended = ProcessError::Ended { pid, doing: "reading its mappings" };
        let bytes = bytes?.ok_or(ended)?;
        mappings::parse(&bytes).map_err(|text| ProcessError::NotUnderstood {
            pid,
            path: status::path(pid, file),
            expected: "a mapping",
            text,
        })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`], [`Kernel`](ProcessError::Kernel).
    pub fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        let pid = self.pid();
        rustix::process::pidfd_send_signal(&self.held.pidfd, signal).map_err(|errno| match errno {
            Errno::SRCH => ProcessError::Ended { pid, doing: "sending a signal to it" },
            errno => ProcessError::Kernel { pid, doing: "send it a signal", errno },
        })
    }

    /// Finds out whether system calls could be made in its name, without stopping it; and where,
    /// which need not be looked for then while it is stopped.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Confined`], [`Bits32`](ProcessError::Bits32),
    /// [`AlreadyTraced`](ProcessError::AlreadyTraced), or what it takes cannot be read.
    pub fn check_syscalls(&self) -> Result<(), ProcessError> {
        self.check()?;
        self.look_for_syscalls().map_err(|error| self.confirm(error))
    }

    fn look_for_syscalls(&self) -> Result<(), ProcessError> {
        let pid = self.pid();
        let status = Status::of_any(pid)?;
        if let Some(by) = status.seccomp()? {
            return Err(ProcessError::Confined { pid, by });
        }
        let tracer = status.tracer()?;
        if tracer != 0 {
            return Err(ProcessError::AlreadyTraced { pid, tracer });
        }
        if self.is_32_bit()? {
            return Err(ProcessError::Bits32 { pid });
        }
        self.landing().map(drop)
    }

    /// Whether the program is a 32-bit one, by the class of its file (`EI_CLASS`).
    fn is_32_bit(&self) -> Result<bool, ProcessError> {
        const CLASS_32: u8 = 1;
        let pid = self.pid();
        let start = status::read_by_thread(pid, "exe", |path| {
            let mut start = [0; 5];
            File::open(path)?.read_exact_at(&mut start, 0)?;
            Ok(start)
        });
        let ended = ProcessError::Ended { pid, doing: "reading the head of its program" };
        Ok(start?.ok_or(ended)? == [0x7f, b'E', b'L', b'F', CLASS_32])
    }

    /// Stops it, in the way and time of [`StopOptions::default`].
    ///
    /// # Errors
    ///
    /// As [`stop_with`](Self::stop_with).
    pub fn stop(&self) -> Result<Stopped<'_>, ProcessError> {
        self.stop_with(StopOptions::default())
    }

    /// Stops it: when this returns, no thread of it executes an instruction of the program, until
    /// the answer is dropped.
    ///
    /// # Errors
    ///
    /// Everything has been undone then. [`ProcessError::Unstoppable`] when a thread did not stop in
    /// time; [`AlreadyTraced`](ProcessError::AlreadyTraced),
    /// [`NotPermitted`](ProcessError::NotPermitted), [`NoOwnGroup`](ProcessError::NoOwnGroup),
    /// [`Ended`](ProcessError::Ended), [`Replaced`](ProcessError::Replaced).
    pub fn stop_with(&self, options: StopOptions) -> Result<Stopped<'_>, ProcessError> {
        Stopped::new(self, options)
    }

    /// Its memory, as it was opened.
    pub(crate) fn memory(&self) -> &File {
        &self.held.memory
    }

    /// Where in its code a system call can be made.
    pub(crate) fn landing(&self) -> Result<Landing, ProcessError> {
        if let Some(&landing) = self.held.landing.get() {
            return Ok(landing);
        }
        let found = Landing::find(self)?;
        Ok(*self.held.landing.get_or_init(|| found))
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.pidfd.as_fd()
    }
}

/// How often is tried to open the memory of a process that starts one program after the other.
const TRIES: usize = 100;

fn is_alive(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    // A poll that does not wait has no reason to fail but a lack of the kernel's memory, where it
    // says nothing.
    loop {
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return ready == 0,
            Err(Errno::INTR | Errno::NOMEM | Errno::AGAIN) => {}
            Err(_) => return true,
        }
    }
}

/// Whether memory that was opened is still that of a process.
fn is_somebodys(pid: Pid, memory: &File) -> Result<bool, ProcessError> {
    // Where memory is gone the kernel reads nothing; where it is not, address 0 is mostly not
    // mapped.
    match rustix::io::retry_on_intr(|| rustix::io::pread(memory, &mut [0_u8], 0)) {
        Ok(0) => Ok(false),
        Ok(_) | Err(Errno::IO | Errno::FAULT) => Ok(true),
        Err(errno) => {
            let doing = "look whether its memory is there";
            Err(ProcessError::Kernel { pid, doing, errno })
        }
    }
}
