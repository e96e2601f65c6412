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

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal},
};

use crate::{
    Detail, Mapping, ProcessError, StopOptions, Stopped,
    inject::Landing,
    mappings, status,
    status::{Status, is_dead},
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
    /// kernel and zombies, [`NotPermitted`](ProcessError::NotPermitted).
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
        let path = match thread_with_memory(pid)? {
            Some(thread) => status::thread_path(pid, thread, "mem"),
            None => return Err(ProcessError::Memoryless { pid }),
        };
        let memory = match File::open(&path) {
            Ok(memory) => memory,
            Err(error) if status::is_gone(&error) => {
                let lives = thread_with_memory(pid)?.is_some();
                return Err(if lives {
                    ProcessError::Memoryless { pid }
                } else {
                    ProcessError::Ended { pid, doing: DOING }
                });
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(status::refusal(pid, DOING)?);
            }
            Err(source) => return Err(ProcessError::Proc { pid, path, source }),
        };
        let process =
            Self { held: Arc::new(Held { pid, pidfd, memory, landing: OnceLock::new() }) };
        // The number meant the process of the descriptor when the memory was opened, if that
        // process lives still.
        if !process.is_alive() {
            return Err(ProcessError::Ended { pid, doing: DOING });
        }
        if !process.has_its_memory()? {
            return Err(ProcessError::Memoryless { pid });
        }
        Ok(process)
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.held.pid
    }

    /// Whether it has not ended. One whose parent did not wait for it yet has ended.
    ///
    /// The [descriptor](Self::as_fd) can be polled for the same: it is readable from then on.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.held.pidfd, PollFlags::IN)];
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        // A poll that does not wait has no reason to fail but a lack of the kernel's memory, where
        // it says nothing.
        loop {
            match poll(&mut fds, Some(&timeout)) {
                Ok(ready) => return ready == 0,
                Err(Errno::INTR | Errno::NOMEM | Errno::AGAIN) => {}
                Err(_) => return true,
            }
        }
    }

    /// Finds out whether it lives, and runs the program that it ran when it was opened.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`], [`ProcessError::Replaced`].
    pub fn check(&self) -> Result<(), ProcessError> {
        let pid = self.pid();
        if !self.is_alive() {
            return Err(ProcessError::Ended { pid, doing: "looking after it" });
        }
        if self.has_its_memory()? {
            return Ok(());
        }
        // Memory goes before the process has ended.
        if self.is_alive() && thread_with_memory(pid)?.is_some() {
            return Err(ProcessError::Replaced { pid });
        }
        Err(ProcessError::Ended { pid, doing: "looking after it" })
    }

    /// Whether the memory that was opened is still somebody's.
    fn has_its_memory(&self) -> Result<bool, ProcessError> {
        // Where memory is gone the kernel reads nothing; where it is not, address 0 is mostly not
        // mapped.
        match rustix::io::retry_on_intr(|| rustix::io::pread(&self.held.memory, &mut [0_u8], 0)) {
            Ok(0) => Ok(false),
            Ok(_) | Err(Errno::IO | Errno::FAULT) => Ok(true),
            Err(errno) => {
                let doing = "look whether its memory is there";
                Err(ProcessError::Kernel { pid: self.pid(), doing, errno })
            }
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
        let ended = || ProcessError::Ended { pid, doing: "reading its mappings" };
        let file = match detail {
            Detail::Names => "maps",
            Detail::Full => "smaps",
        };
        let thread = thread_with_memory(pid)?.ok_or_else(ended)?;
        let path = status::thread_path(pid, thread, file);
        let bytes = status::read(pid, path.clone())?.ok_or_else(ended)?;
        self.check()?;
        if bytes.is_empty() {
            // Its memory is given up before it is gone.
            return Err(ended());
        }
        mappings::parse(&bytes).map_err(|text| ProcessError::NotUnderstood {
            pid,
            path,
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
        let pid = self.pid();
        self.check()?;
        let ended = || ProcessError::Ended { pid, doing: "reading its status" };
        let thread = thread_with_memory(pid)?.ok_or_else(ended)?;
        let status = Status::of(pid, thread)?.ok_or_else(ended)?;
        if let Some(by) = status.seccomp()? {
            return Err(ProcessError::Confined { pid, by });
        }
        let tracer = status.tracer()?;
        if tracer != 0 {
            return Err(ProcessError::AlreadyTraced { pid, tracer });
        }
        if self.is_32_bit(thread)? {
            return Err(ProcessError::Bits32 { pid });
        }
        self.landing().map(drop)
    }

    /// Whether the program is a 32-bit one, by the class of its file (`EI_CLASS`).
    fn is_32_bit(&self, thread: Pid) -> Result<bool, ProcessError> {
        const CLASS_32: u8 = 1;
        let pid = self.pid();
        let path = status::thread_path(pid, thread, "exe");
        let mut start = [0; 5];
        match File::open(&path).and_then(|file| file.read_exact_at(&mut start, 0)) {
            Ok(()) => Ok(start == [0x7f, b'E', b'L', b'F', CLASS_32]),
            Err(error) if status::is_gone(&error) => {
                Err(ProcessError::Ended { pid, doing: "reading the head of its program" })
            }
            Err(source) => Err(ProcessError::Proc { pid, path, source }),
        }
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

/// A thread that has not ended: the first one, or, where that has ended before the others, another.
/// `None` when all have.
fn thread_with_memory(pid: Pid) -> Result<Option<Pid>, ProcessError> {
    let lives = |thread| Ok(status::state(pid, thread)?.is_some_and(|state| !is_dead(state)));
    if lives(pid)? {
        return Ok(Some(pid));
    }
    for thread in status::threads(pid)? {
        if lives(thread)? {
            return Ok(Some(thread));
        }
    }
    Ok(None)
}
