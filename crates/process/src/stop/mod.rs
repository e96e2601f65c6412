//! Stopping a process, and letting it go on.

mod freezer;
pub(crate) mod group;
mod precedence;
mod session;
mod tracer;

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::{Process, ProcessError};
use freezer::Freezer;
pub(crate) use session::{Patience, Session};
use tracer::Tracer;

/// How a process is stopped.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum StopMethod {
    /// By its control group, if it has one of its own that can be frozen; else by ptrace.
    #[default]
    Auto,
    /// By ptrace(2): each thread is interrupted. Should this process die, the kernel lets the other
    /// one go on at that moment. System calls can be made in its name.
    ///
    /// That is done by a thread of its own. Where this process may (`CAP_SYS_NICE`,
    /// `RLIMIT_RTPRIO`), that thread is scheduled as a real-time one, before those that it is about
    /// to interrupt or to let go, for as long as it waits for none of them. No other thread of
    /// either process is ever scheduled in another way than it was.
    Ptrace,
    /// By the freezer of version 2 of control groups, for which the process must be alone in its
    /// group. The group stays frozen when this process dies, so a shell waits beside it, as a
    /// process of its own, and thaws the group then. It cannot when it is killed too, at the same
    /// time: then `echo 0 > /sys/fs/cgroup/…/cgroup.freeze` does.
    ControlGroup,
}

/// How, and for how long at most, is tried to stop a process.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct StopOptions {
    method: StopMethod,
    patience: Duration,
}

impl Default for StopOptions {
    /// [`StopMethod::Auto`], one second.
    fn default() -> Self {
        Self { method: StopMethod::default(), patience: Duration::from_secs(1) }
    }
}

impl StopOptions {
    /// In this way.
    pub fn method(self, method: StopMethod) -> Self {
        Self { method, ..self }
    }

    /// For how long is waited for threads that do not stop. The others stand still meanwhile.
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }
}

#[derive(Debug)]
enum Hold {
    Traced(Tracer),
    Frozen(Freezer),
}

/// The proof that a process is stopped: as long as this lives, none of its threads executes an
/// instruction of the program.
///
/// Dropping it lets the process go on as it was, and so does the kernel should this process die
/// (see [`StopMethod`]). Signals sent meanwhile are delivered then. A process that job control had
/// stopped (SIGSTOP) stays so. System calls that threads were waiting in go on: a sleep is not cut
/// short, a read does not fail. The exceptions are those that signal(7) names under *Interruption of
/// system calls and library functions by stop signals*: those with a timeout, such as epoll_wait(2), semtimedop(2),
/// sigtimedwait(2) or a recv(2) from a socket with `SO_RCVTIMEO`, may fail with EINTR, as after
/// SIGSTOP and SIGCONT. Without a timeout epoll_wait(2), semop(2) and sigwaitinfo(2) go on, where
/// the process is stopped by ptrace.
///
/// A process can be killed while it is stopped; what is asked of it then fails with
/// [`ProcessError::Ended`].
///
/// With ptrace the threads of the other process count as children of this one: this process must
/// not wait for just any child (`waitpid(-1)`) meanwhile, or it takes their news away.
#[derive(Debug)]
#[must_use = "dropping it lets the process go on"]
pub struct Stopped<'a> {
    process: &'a Process,
    hold: Hold,
    since: Instant,
}

impl<'a> Stopped<'a> {
    pub(crate) fn new(process: &'a Process, options: StopOptions) -> Result<Self, ProcessError> {
        process.check()?;
        let traced = || {
            let (tracer, since) = Tracer::stop(process, options.patience)?;
            Ok((Hold::Traced(tracer), since))
        };
        let frozen = || {
            let (freezer, since) = Freezer::stop(process, options.patience)?;
            Ok((Hold::Frozen(freezer), since))
        };
        let (hold, since) = match options.method {
            StopMethod::Ptrace => traced(),
            StopMethod::ControlGroup => frozen(),
            StopMethod::Auto => match frozen() {
                Err(ProcessError::NoOwnGroup { .. }) => traced(),
                other => other,
            },
        }
        .map_err(|error| process.confirm(error))?;
        let stopped = Self { process, hold, since };
        // It may have started another program when it was about to be stopped.
        process.check()?;
        Ok(stopped)
    }

    /// The process.
    pub fn process(&self) -> &'a Process {
        self.process
    }

    /// How it is stopped; never [`StopMethod::Auto`].
    pub fn method(&self) -> StopMethod {
        match self.hold {
            Hold::Traced(_) => StopMethod::Ptrace,
            Hold::Frozen(_) => StopMethod::ControlGroup,
        }
    }

    /// When the first thread may have been stopped.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Lets the process go on; answers with how long a thread of it may have been stopped: from
    /// when the first was about to be until the last was let go, be it given a CPU then or not.
    ///
    /// # Errors
    ///
    /// Its control group cannot be thawed. What ptrace has stopped goes on in any case.
    pub fn resume(self) -> Result<Duration, ProcessError> {
        let until = match self.hold {
            Hold::Traced(tracer) => tracer.release(),
            Hold::Frozen(freezer) => freezer.thaw()?,
        };
        Ok(until.duration_since(self.since))
    }

    /// Gives the process up without letting it go on: it stays stopped, after the end of this
    /// process too. No thread executes an instruction in between.
    ///
    /// What ptrace has stopped goes on when it is sent SIGCONT; what its control group has stopped,
    /// when 0 is written to its `cgroup.freeze`. Answers with which of the two it is.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Ended`]; [`Unstoppable`](ProcessError::Unstoppable) when it does not take
    /// the SIGSTOP, and goes on.
    pub fn leave_stopped(self) -> Result<StopMethod, ProcessError> {
        let method = self.method();
        match self.hold {
            Hold::Traced(tracer) => {
                let result = tracer.call(Session::leave_stopped);
                tracer.release();
                result?;
            }
            Hold::Frozen(freezer) => freezer.leave()?,
        }
        Ok(method)
    }

    /// Makes a system call in the name of the process, by one of its threads, and answers with what
    /// it returns.
    ///
    /// `number` is of 64-bit x86; addresses among `arguments` are of the other process. The thread
    /// goes on afterwards as if nothing had happened: its registers, the signals it blocks and the
    /// system call it may be waiting in are as they were. What the system call does to the process
    /// stays, of course. It should be one that does not wait: the process as a whole is given up
    /// after some seconds. One that is restarted by the kernel after an interruption
    /// (`restart_syscall(2)`: nanosleep, poll, futex) would make the one that the thread waits in
    /// fail with EINTR.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Syscall`] with the reason the system call gave;
    /// [`Frozen`](ProcessError::Frozen) for a process that is stopped by its control group, or that
    /// is in one that somebody else has frozen; [`Confined`](ProcessError::Confined),
    /// [`Bits32`](ProcessError::Bits32), [`Dispatches`](ProcessError::Dispatches) or
    /// [`NoInstruction`](ProcessError::NoInstruction) when nothing was tried;
    /// [`Ended`](ProcessError::Ended).
    pub fn syscall(&mut self, number: u64, arguments: [u64; 6]) -> Result<u64, ProcessError> {
        let pid = self.process.pid();
        self.try_syscall(number, arguments)?.map_err(|errno| ProcessError::Syscall {
            pid,
            number,
            errno,
        })
    }

    /// [`syscall`](Self::syscall), telling what it answered from what was in its way.
    pub(crate) fn try_syscall(
        &mut self,
        number: u64,
        arguments: [u64; 6],
    ) -> Result<Result<u64, Errno>, ProcessError> {
        let answer = self.session(move |session| session.syscall(number, arguments))?;
        answer.map_err(|error| self.process.confirm(error))
    }

    /// Does something by the thread that traces the process.
    pub(crate) fn session<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Session) -> R + Send + 'static,
    ) -> Result<R, ProcessError> {
        match &self.hold {
            Hold::Traced(tracer) => Ok(tracer.call(work)),
            Hold::Frozen(_) => Err(ProcessError::Frozen { pid: self.process.pid() }),
        }
    }
}
