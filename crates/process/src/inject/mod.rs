//! System calls in the name of a stopped process.
//!
//! A thread of it is made to execute a `syscall` instruction that it has anyway, with other
//! registers than its own, and stops again before it executes anything else. Then it gets its
//! registers back. Nothing is written to its code.
//!
//! Should this process be killed in the middle, the kernel lets the thread go on with whatever
//! registers it has then. So, wherever that can be done, they are chosen such that it finds the way
//! back alone: see [`frame`].

mod frame;
mod landing;

use std::time::{Duration, Instant};

use pageferry_uffd::HostAddress;
use rustix::{io::Errno, process::Pid};

use crate::{
    ProcessError,
    status::{self, Status},
    stop::{Patience, Session, group},
    sys::{
        ptrace::{self, Change, Go, Registers, Stop},
        vm,
    },
};
pub(crate) use frame::Frame;
pub(crate) use landing::Landing;

/// How long a system call may take. None that waits for something should be made.
const WAIT: Duration = Duration::from_secs(2);

/// The selector of the code segment of 64-bit programs.
const CODE_64: u64 = 0x33;

/// What of a thread is as it was when the system call was made.
struct Saved {
    registers: Registers,
    /// What the thread's memory contained where the way back was written.
    frame: Option<(HostAddress, Vec<u8>)>,
    /// Where it says in which restartable sequence it is, and what it said there.
    sequence: Option<(HostAddress, [u8; 8])>,
}

/// How a try to make a system call ended.
enum Tried {
    Done(Result<u64, Errno>),
    /// A signal came first; the thread is at the beginning of its handler now.
    Again,
}

impl Session {
    /// Makes a system call by one of the threads; answers with what it answers.
    pub(crate) fn syscall(
        &mut self,
        number: u64,
        arguments: [u64; 6],
    ) -> Result<Result<u64, Errno>, ProcessError> {
        let thread = self.a_thread()?;
        self.check_thread(thread)?;
        let landing = self.process().landing()?;
        landing.check(self.process())?;
        let mut wait = Patience::new(Instant::now() + WAIT);
        loop {
            match self.try_syscall(thread, landing, number, arguments)? {
                Tried::Done(result) => return Ok(result),
                Tried::Again if wait.wait() => {}
                Tried::Again => return Err(self.stuck(thread)?),
            }
        }
    }

    /// Finds out whether a system call by this thread could do harm.
    fn check_thread(&self, thread: Pid) -> Result<(), ProcessError> {
        let pid = self.pid();
        let status = Status::of(pid, thread)?.ok_or(self.ended("reading its status"))?;
        if let Some(by) = status.seccomp()? {
            return Err(ProcessError::Confined { pid, by });
        }
        let dispatches = ptrace::dispatches_syscalls(thread);
        if dispatches.map_err(self.failed("find out who handles its system calls"))? {
            return Err(ProcessError::Dispatches { pid });
        }
        Ok(())
    }

    fn registers(&self, thread: Pid) -> Result<Registers, ProcessError> {
        let registers = ptrace::registers(thread).map_err(self.failed("read its registers"))?;
        match registers {
            Some(registers) if registers.cs == CODE_64 => Ok(registers),
            _ => Err(ProcessError::Bits32 { pid: self.pid() }),
        }
    }

    fn set_registers(&self, thread: Pid, registers: &Registers) -> Result<(), ProcessError> {
        ptrace::set_registers(thread, registers).map_err(self.failed("set its registers"))
    }

    fn try_syscall(
        &mut self,
        thread: Pid,
        landing: Landing,
        number: u64,
        arguments: [u64; 6],
    ) -> Result<Tried, ProcessError> {
        let mut saved = Saved {
            registers: self.registers(thread)?,
            frame: None,
            sequence: self.save_sequence(thread)?,
        };
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let mut registers = Registers {
            rip: landing.instruction(),
            rax: number,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            // Not in a system call, so that the kernel does not set out to restart one.
            orig_rax: u64::MAX,
            ..saved.registers
        };
        if let Some(way_back) = landing.way_back() {
            saved.frame = self.write_frame(thread, &saved.registers, way_back)?;
            if let Some((at, _)) = saved.frame {
                registers.rsp = at.get();
            }
        }
        self.set_registers(thread, &registers)?;
        self.run(thread, &saved)
    }

    /// Writes, below the stack, the way back to `registers`; answers with where it begins and what
    /// was there. `None` where there is no room for it.
    fn write_frame(
        &self,
        thread: Pid,
        registers: &Registers,
        way_back: u64,
    ) -> Result<Option<(HostAddress, Vec<u8>)>, ProcessError> {
        let state = ptrace::extended_state(thread);
        let state = state.map_err(self.failed("read its vector registers"))?;
        let mask = ptrace::signal_mask(thread);
        let mask = mask.map_err(self.failed("read the signals that it blocks"))?;
        let Some(frame) = Frame::new(registers, mask, &state, way_back) else { return Ok(None) };
        let mut before = vec![0; frame.bytes.len()];
        let there = self.process().read_memory(frame.at, &mut before);
        match there {
            Ok(length) if length == before.len() => {}
            Ok(_) | Err(ProcessError::Unreadable { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        match vm::write(thread, frame.at, &frame.bytes) {
            Ok(length) if length == before.len() => Ok(Some((frame.at, before))),
            Ok(length) => {
                self.write(frame.at, &before[..length])?;
                Ok(None)
            }
            Err(Errno::FAULT) => Ok(None),
            Err(errno) => Err(self.failed("write below its stack")(errno)),
        }
    }

    pub(crate) fn write(&self, at: HostAddress, bytes: &[u8]) -> Result<(), ProcessError> {
        let failed = self.failed("write to its memory");
        // By the number of the process it would not be found when the first thread has ended.
        match vm::write(self.a_thread()?, at, bytes).map_err(&failed)? {
            length if length == bytes.len() => Ok(()),
            _ => Err(failed(Errno::FAULT)),
        }
    }

    /// What the thread says of the restartable sequence that it is in: the kernel erases it as soon
    /// as the thread executes anything that is not in it.
    fn save_sequence(&self, thread: Pid) -> Result<Option<(HostAddress, [u8; 8])>, ProcessError> {
        /// Where in `struct rseq` it is.
        const RSEQ_CS: u64 = 8;
        let area = ptrace::rseq_area(thread);
        let Some(area) = area.map_err(self.failed("find its restartable sequences"))? else {
            return Ok(None);
        };
        let Some(at) = HostAddress::new(area).checked_add(RSEQ_CS) else { return Ok(None) };
        let mut pointer = [0; 8];
        self.process().read_memory_exact(at, &mut pointer)?;
        Ok((pointer != [0; 8]).then_some((at, pointer)))
    }

    /// Lets a thread that has the registers for it execute one system call. It stands still, with
    /// its own, when this returns.
    fn run(&self, thread: Pid, saved: &Saved) -> Result<Tried, ProcessError> {
        self.go(thread, Go::ToSyscall, 0)?;
        let entered = loop {
            match self.wait_or_give_up(thread, saved)? {
                Stop::Syscall => break true,
                // The kernel has taken it off its list, so it has to be taken now: with the
                // thread's own registers, as if it had come a little earlier.
                Stop::Signal(signal) => {
                    self.restore(thread, saved)?;
                    self.interrupt(thread)?;
                    self.go(thread, Go::Freely, signal)?;
                    break false;
                }
                Stop::Interrupt | Stop::Clone | Stop::Exec => self.go(thread, Go::ToSyscall, 0)?,
            }
        };
        if !entered {
            self.bring_back(thread, None)?;
            return Ok(Tried::Again);
        }
        self.go(thread, Go::ToSyscall, 0)?;
        while self.wait_or_give_up(thread, saved)? != Stop::Syscall {
            self.go(thread, Go::ToSyscall, 0)?;
        }
        let answer = self.registers(thread)?.rax.cast_signed();
        // Only where the thread looks for signals does the kernel restart, afterwards, the system
        // call that it was in; so it has to be there when it gets its registers back.
        self.interrupt(thread)?;
        self.go(thread, Go::Freely, 0)?;
        self.bring_back(thread, Some(saved))?;
        Ok(Tried::Done(result(answer)))
    }

    fn go(&self, thread: Pid, go: Go, signal: i32) -> Result<(), ProcessError> {
        ptrace::go(thread, go, signal).map_err(self.failed("let a thread of it go on"))
    }

    /// Waits for a thread to stop; `None` when that takes too long.
    fn wait(&self, thread: Pid) -> Result<Option<Stop>, ProcessError> {
        let mut wait = Patience::new(Instant::now() + WAIT);
        loop {
            match ptrace::poll(thread, self.pid())
                .map_err(self.failed("wait for a thread of it"))?
            {
                Change::Stopped(stop) => return Ok(Some(stop)),
                Change::Gone => return Err(self.ended("making a system call in its name")),
                Change::None if wait.is_long() && self.has_died(thread)? => {
                    return Err(self.ended("making a system call in its name"));
                }
                Change::None if wait.wait() => {}
                Change::None => return Ok(None),
            }
        }
    }

    /// Waits for a thread to stop. When that takes too long, it is interrupted and gets its
    /// registers back.
    fn wait_or_give_up(&self, thread: Pid, saved: &Saved) -> Result<Stop, ProcessError> {
        if let Some(stop) = self.wait(thread)? {
            return Ok(stop);
        }
        let stuck = self.stuck(thread)?;
        self.interrupt(thread)?;
        self.bring_back(thread, Some(saved))?;
        Err(stuck)
    }

    /// Why a thread takes too long.
    fn stuck(&self, thread: Pid) -> Result<ProcessError, ProcessError> {
        let pid = self.pid();
        if group::is_frozen(pid)? {
            return Ok(ProcessError::Frozen { pid });
        }
        let state = status::state(pid, thread)?.unwrap_or('X');
        Ok(ProcessError::Unstoppable { pid, thread, state, waited: WAIT })
    }

    /// Waits until a thread that runs and was interrupted stands still for that, with its own
    /// registers and memory, which are in `saved` unless it has them already.
    ///
    /// If it does not, nothing is given back, for it may still need the way back.
    fn bring_back(&self, thread: Pid, mut saved: Option<&Saved>) -> Result<(), ProcessError> {
        loop {
            let signal = match self.wait(thread)? {
                None => return Err(self.stuck(thread)?),
                Some(Stop::Interrupt) => {
                    return saved.map_or(Ok(()), |saved| self.restore(thread, saved));
                }
                Some(Stop::Signal(signal)) => {
                    // Its handler is to find what is the thread's own.
                    if let Some(saved) = saved.take() {
                        self.restore(thread, saved)?;
                    }
                    signal
                }
                Some(Stop::Syscall | Stop::Clone | Stop::Exec) => 0,
            };
            // To stop for whatever reason makes up for an interruption.
            self.interrupt(thread)?;
            self.go(thread, Go::Freely, signal)?;
        }
    }

    /// Gives a stopped thread back what is its own: the registers first, since as long as it has
    /// others it may need the way back.
    fn restore(&self, thread: Pid, saved: &Saved) -> Result<(), ProcessError> {
        self.set_registers(thread, &saved.registers)?;
        if let Some((at, bytes)) = &saved.frame {
            self.write(*at, bytes)?;
        }
        if let Some((at, bytes)) = &saved.sequence {
            self.write(*at, bytes)?;
        }
        Ok(())
    }
}

/// What a system call answered.
fn result(answer: i64) -> Result<u64, Errno> {
    match answer {
        // The kernel's own codes for restarts count as interrupted.
        -516..=-512 => Err(Errno::INTR),
        -4095..=-1 => Err(Errno::from_raw_os_error(answer.unsigned_abs() as i32)),
        answer => Ok(answer.cast_unsigned()),
    }
}

#[cfg(test)]
mod tests;
