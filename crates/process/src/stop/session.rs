//! Attaching to all threads of a process, until all stand still.

use std::{
    thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Pid, Signal},
};

use super::{precedence::Precedence, tracer::Seized};
use crate::{
    Process, ProcessError,
    status::{self, Status, is_dead},
    sys::ptrace::{self, Change, Go, Stop},
};

/// What is known of a thread.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum State {
    /// It was attached to.
    Seized,
    /// It was asked to stop.
    Interrupted,
    /// It has stopped for that, and stays so.
    Stopped,
}

#[derive(Copy, Clone, Debug)]
struct Tracee {
    thread: Pid,
    state: State,
    /// It was made by a thread that was attached to already, and may not be of the process.
    adopted: bool,
    /// It was stopped outside of system calls.
    computes: bool,
}

impl Tracee {
    fn new(thread: Pid, state: State, adopted: bool) -> Self {
        Self { thread, state, adopted, computes: false }
    }
}

/// A process that is being traced, in the hands of the thread that traces it.
#[derive(Debug)]
pub(crate) struct Session {
    process: Process,
    seized: Seized,
    precedence: Precedence,
    tracees: Vec<Tracee>,
    /// When the first thread may have stopped.
    since: Option<Instant>,
}

/// Waiting for what comes soon, mostly.
pub(crate) struct Patience {
    deadline: Instant,
    tries: u32,
}

impl Patience {
    pub(crate) fn new(deadline: Instant) -> Self {
        Self { deadline, tries: 0 }
    }

    /// Waits for a little; `false` when that would be too long.
    pub(crate) fn wait(&mut self) -> bool {
        self.tries += 1;
        match self.tries {
            // A thread that only has to be woken needs some microseconds, and this CPU perhaps.
            ..=64 => thread::yield_now(),
            65..=256 => thread::sleep(Duration::from_micros(50)),
            _ if Instant::now() > self.deadline => return false,
            _ => thread::sleep(Duration::from_millis(1)),
        }
        true
    }

    /// Something has happened: what is next may come soon, too.
    fn renew(&mut self) {
        self.tries = 0;
    }

    /// Whether it has become worth while to look at what is in the way.
    pub(crate) fn is_long(&self) -> bool {
        self.tries > 64 && self.tries.is_multiple_of(16)
    }
}

impl Session {
    /// Of the calling thread, which was made for it.
    pub(super) fn new(process: &Process, seized: Seized) -> Self {
        let precedence = Precedence::take();
        Self { process: process.clone(), seized, precedence, tracees: Vec::new(), since: None }
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// A thread that is stopped, the first one if it lives.
    pub(crate) fn a_thread(&self) -> Result<Pid, ProcessError> {
        let first = self.tracees.iter().find(|tracee| tracee.thread == self.pid());
        let any = first.or(self.tracees.first()).map(|tracee| tracee.thread);
        any.ok_or(self.ended("choosing a thread of it"))
    }

    pub(crate) fn ended(&self, doing: &'static str) -> ProcessError {
        ProcessError::Ended { pid: self.pid(), doing }
    }

    /// An error of a request to a thread that was stopped: only SIGKILL can have changed that.
    pub(crate) fn failed(&self, doing: &'static str) -> impl Fn(Errno) -> ProcessError + use<> {
        let pid = self.pid();
        move |errno| match errno {
            Errno::SRCH => ProcessError::Ended { pid, doing },
            errno => ProcessError::Kernel { pid, doing, errno },
        }
    }

    /// Stops every thread, those included that are born meanwhile; answers with when the first may
    /// have stopped.
    pub(super) fn stop(&mut self, patience: Duration) -> Result<Instant, ProcessError> {
        let begin = Instant::now();
        let deadline = begin + patience;
        let mut wait = Patience::new(deadline);
        // A thread that nobody knows of can only have been made by one that was not stopped when
        // the list was read: when all in it are known, and were stopped before, it is complete.
        while !(self.seize()? && self.verify()?) {
            self.interrupt_all()?;
            self.settle(deadline, patience)?;
            if !wait.wait() {
                let (pid, thread) = (self.pid(), self.pid());
                let state = status::state(pid, thread)?.unwrap_or('X');
                return Err(ProcessError::Unstoppable { pid, thread, state, waited: patience });
            }
        }
        if self.tracees.is_empty() {
            return Err(self.ended("stopping it"));
        }
        let made = self.tracees.iter().any(|tracee| tracee.adopted);
        Ok(self.since.filter(|_| !made).unwrap_or(begin))
    }

    /// Attaches to the threads that are not known yet; answers with whether there were none.
    fn seize(&mut self) -> Result<bool, ProcessError> {
        let mut fresh = false;
        let mut dead = 0;
        for thread in status::threads(self.pid())? {
            if self.tracees.iter().any(|tracee| tracee.thread == thread) {
                continue;
            }
            match ptrace::seize(thread) {
                Ok(()) => {}
                Err(Errno::SRCH) => continue,
                Err(Errno::PERM) => {
                    if !self.is_ours(thread)? {
                        dead += 1;
                        continue;
                    }
                }
                Err(errno) => {
                    let doing = "attach to a thread of it";
                    return Err(ProcessError::Kernel { pid: self.pid(), doing, errno });
                }
            }
            fresh = true;
            self.seized.add(thread);
            self.tracees.push(Tracee::new(thread, State::Seized, false));
        }
        if fresh {
            return Ok(false);
        }
        // The list ends early where a thread in it has ended just then.
        let Some(status) = Status::of(self.pid(), self.pid())? else { return Ok(true) };
        Ok(status.threads()? <= self.tracees.len() + dead)
    }

    /// Whether a thread that cannot be attached to has been already, since its maker was. One that
    /// has ended is nobody's.
    fn is_ours(&self, thread: Pid) -> Result<bool, ProcessError> {
        const DOING: &str = "attaching to it";
        let pid = self.pid();
        if status::state(pid, thread)?.is_none_or(is_dead) {
            return Ok(false);
        }
        let Some(status) = Status::of(pid, thread)? else { return Ok(false) };
        let tracer = status.tracer()?;
        if tracer == rustix::thread::gettid().as_raw_pid() {
            return Ok(true);
        }
        if tracer != 0 {
            return Err(ProcessError::AlreadyTraced { pid, tracer });
        }
        // It may have ended just now, or its tracer may.
        match ptrace::seize(thread) {
            Err(Errno::PERM) => {}
            other => return Ok(other.is_ok()),
        }
        if status::state(pid, thread)?.is_none_or(is_dead) {
            return Ok(false);
        }
        Err(status::refusal(pid, DOING)?)
    }

    /// Whether all that are known are stopped, as is asked of each: a thread that starts another
    /// program takes over the number of the first one, which may have been stopped.
    fn verify(&mut self) -> Result<bool, ProcessError> {
        let mut verified = true;
        for index in 0..self.tracees.len() {
            let Some(&Tracee { thread, .. }) = self.tracees.get(index) else { return Ok(false) };
            let is_first = thread == self.pid();
            let change = if is_first { self.poll(thread)? } else { Change::None };
            if change != Change::None {
                self.note(thread, change)?;
                return Ok(false);
            }
            match self.let_restart(thread)? {
                Some(computes) => self.tracees[index].computes = computes,
                None => {
                    self.tracees[index].state = State::Seized;
                    verified = false;
                }
            }
        }
        Ok(verified)
    }

    fn poll(&self, thread: Pid) -> Result<Change, ProcessError> {
        ptrace::poll(thread, self.pid()).map_err(self.failed("wait for a thread of it"))
    }

    fn interrupt_all(&mut self) -> Result<(), ProcessError> {
        let seized = self.tracees.iter().filter(|tracee| tracee.state == State::Seized);
        let threads: Vec<_> = seized.map(|tracee| tracee.thread).collect();
        // Attaching alone stops none but those that make threads.
        self.since.get_or_insert_with(Instant::now);
        let results = self
            .precedence
            .first(|| threads.iter().map(|&thread| ptrace::interrupt(thread)).collect::<Vec<_>>());
        for (thread, result) in threads.into_iter().zip(results) {
            if self.is_interrupted(result)? {
                self.set_state(thread, State::Interrupted);
            } else {
                self.lose(thread)?;
            }
        }
        Ok(())
    }

    /// Interrupts a thread; answers with whether it is one that is traced, and lives.
    pub(crate) fn interrupt(&self, thread: Pid) -> Result<bool, ProcessError> {
        self.is_interrupted(ptrace::interrupt(thread))
    }

    fn is_interrupted(&self, result: Result<(), Errno>) -> Result<bool, ProcessError> {
        match result {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(errno) => {
                let doing = "interrupt a thread of it";
                Err(ProcessError::Kernel { pid: self.pid(), doing, errno })
            }
        }
    }

    fn set_state(&mut self, thread: Pid, state: State) {
        if let Some(tracee) = self.tracees.iter_mut().find(|tracee| tracee.thread == thread) {
            tracee.state = state;
        }
    }

    /// The number is of no thread that is traced any more: that has ended, or started another
    /// program, with which it takes over the number of the first thread. Whoever has the number now
    /// is found when the threads are listed again.
    fn lose(&mut self, thread: Pid) -> Result<(), ProcessError> {
        self.forget(thread);
        if thread != self.pid() {
            ptrace::reap(thread).map_err(self.failed("take note of the end of a thread of it"))?;
        }
        Ok(())
    }

    /// Waits until all threads that were attached to have stopped or ended.
    fn settle(&mut self, deadline: Instant, patience: Duration) -> Result<(), ProcessError> {
        let mut wait = Patience::new(deadline);
        loop {
            let mut pending = None;
            let mut index = 0;
            while let Some(&Tracee { thread, state, .. }) = self.tracees.get(index) {
                let change = match state {
                    State::Stopped => {
                        index += 1;
                        continue;
                    }
                    _ => self.poll(thread)?,
                };
                if change == Change::None {
                    pending.get_or_insert(thread);
                    // To look for the others takes time that they may need to stop. But where one
                    // does not stop, it may be waiting for what becomes of another.
                    if !wait.is_long() {
                        break;
                    }
                    if self.is_still_coming(thread)? {
                        index += 1;
                        continue;
                    }
                }
                wait.renew();
                self.note(thread, change)?;
                // The list may have changed.
                index = 0;
            }
            let Some(thread) = pending else { return Ok(()) };
            if !wait.wait() {
                let pid = self.pid();
                let state = status::state(pid, thread)?.unwrap_or('X');
                return Err(ProcessError::Unstoppable { pid, thread, state, waited: patience });
            }
        }
    }

    /// Whether it can be expected that a thread stops.
    fn is_still_coming(&self, thread: Pid) -> Result<bool, ProcessError> {
        // Once more does no harm, and tells whether it is traced.
        Ok(!self.has_died(thread)? && self.interrupt(thread)?)
    }

    /// Whether a thread has ended without its end being told: the first one's is told when all have.
    pub(crate) fn has_died(&self, thread: Pid) -> Result<bool, ProcessError> {
        Ok(status::state(self.pid(), thread)?.is_none_or(is_dead))
    }

    fn forget(&mut self, thread: Pid) {
        self.tracees.retain(|tracee| tracee.thread != thread);
    }

    /// Takes note of what has become of a thread that was not stopped.
    fn note(&mut self, thread: Pid, change: Change) -> Result<(), ProcessError> {
        let stop = match change {
            Change::Stopped(stop) => stop,
            Change::None | Change::Gone => return self.lose(thread),
        };
        let signal = match stop {
            Stop::Interrupt => {
                let Some(tracee) = self.tracees.iter_mut().find(|tracee| tracee.thread == thread)
                else {
                    return Ok(());
                };
                tracee.state = State::Stopped;
                if tracee.adopted && status::state(self.process.pid(), thread)?.is_none() {
                    // A process of its own.
                    self.forget(thread);
                    return self.ignore_end(ptrace::detach(thread));
                }
                return Ok(());
            }
            Stop::Clone => {
                self.adopt_child_of(thread)?;
                0
            }
            Stop::Exec => {
                // There is one thread now, which has the number of the process.
                self.tracees.clear();
                self.tracees.push(Tracee::new(thread, State::Interrupted, false));
                0
            }
            // The signal was on its way before: it is taken now, as far as that goes without
            // executing anything, and the thread stops at its handler.
            Stop::Signal(signal) => signal,
            Stop::Syscall => 0,
        };
        self.interrupt(thread)?;
        self.set_state(thread, State::Interrupted);
        self.ignore_end(ptrace::go(thread, Go::Freely, signal))
    }

    /// The thread has made another one, which is attached to already and will stop by itself.
    fn adopt_child_of(&mut self, maker: Pid) -> Result<(), ProcessError> {
        let Ok(message) = ptrace::event_message(maker) else { return Ok(()) };
        let Some(thread) = i32::try_from(message).ok().and_then(Pid::from_raw) else {
            return Ok(());
        };
        if self.tracees.iter().all(|tracee| tracee.thread != thread) {
            self.seized.add(thread);
            self.tracees.push(Tracee::new(thread, State::Interrupted, true));
        }
        Ok(())
    }

    fn ignore_end(&self, result: Result<(), Errno>) -> Result<(), ProcessError> {
        match result {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => {
                let doing = "let a thread of it go on";
                Err(ProcessError::Kernel { pid: self.pid(), doing, errno })
            }
        }
    }

    /// Lets a system call go on that was interrupted by the stop alone, and that the kernel would
    /// make fail for it. Answers with whether the thread is in none; `None` if it is not stopped.
    ///
    /// The kernel itself restarts the others, unless a signal's handler is to run; and it is told
    /// to do the same with these. Those with a timeout are not restarted, or they might never end.
    fn let_restart(&self, thread: Pid) -> Result<Option<bool>, ProcessError> {
        const EINTR: i64 = -4;
        const ERESTARTNOHAND: i64 = -514;
        let registers = match ptrace::registers(thread) {
            Ok(Some(registers)) => registers,
            // Of 32 bits, with other numbers.
            Ok(None) => return Ok(Some(false)),
            Err(Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(self.failed("read its registers")(errno)),
        };
        let computes = registers.orig_rax.cast_signed() < 0;
        if registers.rax.cast_signed() != EINTR || !waits_for_ever(&registers) {
            return Ok(Some(computes));
        }
        let registers = ptrace::Registers { rax: ERESTARTNOHAND.cast_unsigned(), ..registers };
        match ptrace::set_registers(thread, &registers) {
            Ok(()) => Ok(Some(computes)),
            Err(Errno::SRCH) => Ok(None),
            Err(errno) => Err(self.failed("set its registers")(errno)),
        }
    }

    /// Lets all go that are stopped; answers with when that was. Those that are not are let go when
    /// this thread ends.
    pub(super) fn detach(&mut self) -> Instant {
        let mut tracees = std::mem::take(&mut self.tracees);
        tracees.retain(|tracee| tracee.state == State::Stopped);
        // Those that compute last: where they cannot be overtaken, the others would wait for them.
        tracees.sort_by_key(|tracee| tracee.computes);
        self.precedence.first(|| {
            for tracee in tracees {
                // It fails only for a thread that has ended.
                let _ = ptrace::detach(tracee.thread);
            }
            // Afterwards they may take the CPU.
            Instant::now()
        })
    }

    /// Lets all go, into a stop as SIGSTOP makes it.
    pub(super) fn leave_stopped(&mut self) -> Result<(), ProcessError> {
        const WAIT: Duration = Duration::from_secs(1);
        let pid = self.pid();
        self.process.signal(Signal::STOP)?;
        let first = self.a_thread()?;
        self.forget(first);
        self.ignore_end(ptrace::detach(first))?;
        // It finds the signal before it executes anything. When it has stopped for it, the others
        // are bound to.
        let mut wait = Patience::new(Instant::now() + WAIT);
        loop {
            match status::state(pid, first)? {
                Some('T') => break,
                None => return Err(self.ended("leaving it stopped")),
                Some(state) if is_dead(state) => return Err(self.ended("leaving it stopped")),
                Some(_) if wait.wait() => {}
                Some(state) => {
                    // It takes the other signal back.
                    self.process.signal(Signal::CONT)?;
                    let waited = WAIT;
                    return Err(ProcessError::Unstoppable { pid, thread: first, state, waited });
                }
            }
        }
        self.detach();
        Ok(())
    }
}

/// Whether these are the registers of a system call without a timeout, of those that fail when they
/// are interrupted by a stop (signal(7)).
fn waits_for_ever(registers: &ptrace::Registers) -> bool {
    const SYS_EPOLL_PWAIT2: i64 = 441;
    match registers.orig_rax.cast_signed() {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (registers.r10 as u32).cast_signed() < 0,
        SYS_EPOLL_PWAIT2 | libc::SYS_semtimedop => registers.r10 == 0,
        libc::SYS_rt_sigtimedwait => registers.rdx == 0,
        libc::SYS_semop => true,
        _ => false,
    }
}
