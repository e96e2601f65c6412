//! The vCPUs' threads, and what becomes of their exits.

use std::{
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry_kvm::{Exit, RunError, VcpuPager};
use pageferry_memory::{GuestAddress, HostAddress};

use super::{devices::Devices, ports::Wish};
use crate::{
    control::{Active, Control, Next},
    immediate_exit::ImmediateExit,
    signal::Target,
};

/// How a machine came to its end.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LinuxEnd {
    /// The guest powered it off.
    PowerOff,
    /// The guest reset it.
    Reboot,
    /// A fault in the handler of a fault in the handler of a fault.
    TripleFault,
    /// The guest touched memory that can never come.
    MemoryError {
        /// Where, if the slots are known.
        guest: Option<GuestAddress>,
        /// The same in this process.
        host: HostAddress,
    },
    /// It was stopped from outside.
    Stopped,
    /// KVM or a vCPU's thread failed.
    Failed(String),
}

/// What enters the guest: KVM_RUN as it is, or with a pager around it.
#[derive(Debug)]
pub(crate) enum Runner {
    Kvm,
    Pager(VcpuPager),
}

impl Runner {
    fn run<'a>(&mut self, fd: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        match self {
            Self::Kvm => fd.run().map(Exit::Kvm).map_err(RunError::Kvm),
            Self::Pager(pager) => pager.run(fd),
        }
    }

    /// Whether an instruction has been done in part.
    pub(crate) fn is_mid_instruction(&self) -> bool {
        matches!(self, Self::Pager(pager) if pager.is_mid_instruction())
    }
}

/// What the thread in the guest works with, and whoever saves it meanwhile.
#[derive(Debug)]
pub(crate) struct Inside {
    pub(crate) fd: VcpuFd,
    pub(crate) runner: Runner,
}

/// A vCPU and what reaches its thread from outside.
#[derive(Debug)]
pub(crate) struct Cpu {
    /// Locked by its thread while it is not parked.
    inside: Mutex<Inside>,
    immediate_exit: ImmediateExit,
    thread: Target,
}

impl Cpu {
    pub(crate) fn new(mut fd: VcpuFd) -> Self {
        let immediate_exit = ImmediateExit::of(&mut fd);
        let inside = Mutex::new(Inside { fd, runner: Runner::Kvm });
        Self { inside, immediate_exit, thread: Target::default() }
    }

    /// For who knows that its thread is parked, or is that thread.
    pub(crate) fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        // One signal until the thread has noticed: they would queue up.
        if !self.immediate_exit.set(true) {
            self.thread.interrupt();
        }
    }
}

/// What the threads of a machine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) cpus: Vec<Cpu>,
    pub(crate) devices: Devices,
    control: Control,
    end: Mutex<Option<LinuxEnd>>,
    ended: Condvar,
}

/// Ends the machine if a vCPU's thread panics.
struct OnPanic<'a>(&'a Shared);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.finish(LinuxEnd::Failed("a vCPU's thread panicked".to_owned()));
        }
    }
}

impl Shared {
    pub(crate) fn new(cpus: Vec<Cpu>, devices: Devices) -> Self {
        Self {
            cpus,
            devices,
            control: Control::default(),
            end: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    fn kick_all(&self) {
        self.cpus.iter().for_each(Cpu::kick);
    }

    pub(crate) fn pause(&self) {
        self.control.pause(|| self.kick_all());
    }

    pub(crate) fn set_throttle(&self, percent: u8) {
        self.control.set_throttle(percent);
    }

    pub(crate) fn resume(&self) {
        self.control.resume();
    }

    /// The first end counts. All vCPUs stop.
    pub(crate) fn finish(&self, end: LinuxEnd) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        self.control.stop();
        self.kick_all();
        self.ended.notify_all();
    }

    pub(crate) fn wait(&self, timeout: Duration) -> Option<LinuxEnd> {
        let deadline = Instant::now() + timeout;
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if end.is_some() || left.is_zero() {
                return end.clone();
            }
            let waited = self.ended.wait_timeout(end, left);
            end = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Runs all vCPUs, each on a thread of its own, until the machine's end.
    pub(crate) fn run(&self) {
        let _on_panic = OnPanic(self);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            let active = self.control.begin(self.cpus.len() as u16);
            for (number, (cpu, active)) in self.cpus.iter().zip(active).enumerate() {
                let name = format!("vcpu {number}");
                let thread = thread::Builder::new().name(name);
                match thread.spawn_scoped(scope, move || self.run_one(cpu, &active)) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        let why = format!("a thread for vCPU {number}: {error}");
                        self.finish(LinuxEnd::Failed(why));
                    }
                }
            }
            scope.spawn(|| self.control.throttle(|| self.kick_all()));
            for thread in threads {
                // If it panicked, the machine's end says so.
                drop(thread.join());
            }
            self.control.vcpus_ended();
        });
    }

    fn run_one(&self, cpu: &Cpu, active: &Active<'_>) {
        let _on_panic = OnPanic(self);
        let _inside = cpu.thread.enter();
        loop {
            // Before asking what is wanted: see `control`.
            cpu.immediate_exit.set(false);
            match self.control.next(None) {
                Next::Enter => {}
                Next::Pause => {
                    if let Some(end) = self.complete_instruction(cpu) {
                        self.finish(end);
                        return;
                    }
                    self.control.park(active);
                    continue;
                }
                Next::Stop => return,
            }
            if self.devices.work() {
                // Whoever wants a pause does not wait for all that the guest asks for.
                continue;
            }
            let Inside { fd, runner } = &mut *cpu.inside();
            let end = match runner.run(fd) {
                Err(error) if error.is_interrupted() => None,
                result => self.handle(result),
            };
            match end {
                None => {}
                Some(LinuxEnd::Failed(why)) => {
                    // Where in the guest says most, if KVM still tells.
                    let at = fd.get_regs().map(|registers| format!(", at {:#x}", registers.rip));
                    self.finish(LinuxEnd::Failed(why + &at.unwrap_or_default()));
                    return;
                }
                Some(end) => {
                    self.finish(end);
                    return;
                }
            }
        }
    }

    /// What an end of KVM_RUN means; `None`: on with it.
    fn handle(&self, exit: Result<Exit<'_>, RunError>) -> Option<LinuxEnd> {
        let exit = match exit {
            Ok(Exit::Kvm(exit)) => exit,
            Ok(Exit::MemoryError { guest, host }) => {
                return Some(LinuxEnd::MemoryError { guest, host });
            }
            // A vCPU was called for the first time by another, and is to be entered again.
            Err(RunError::Kvm(error)) if error.errno() == libc::EAGAIN => return None,
            Err(RunError::Kvm(error)) => {
                return Some(LinuxEnd::Failed(format!("KVM_RUN: {}", io::Error::from(error))));
            }
            Err(error) => return Some(LinuxEnd::Failed(error.to_string())),
        };
        match exit {
            VcpuExit::IoIn(port, data) => self.devices.read_port(port, data),
            VcpuExit::IoOut(port, data) => {
                return self.devices.write_port(port, data).map(|wish| match wish {
                    Wish::PowerOff => LinuxEnd::PowerOff,
                    Wish::Reboot => LinuxEnd::Reboot,
                });
            }
            VcpuExit::MmioRead(address, data) => self.devices.read_memory(address, data),
            VcpuExit::MmioWrite(address, data) => self.devices.write_memory(address, data),
            VcpuExit::Shutdown => return Some(LinuxEnd::TripleFault),
            VcpuExit::InternalError => {
                let why = "KVM could not emulate an instruction, or failed otherwise";
                return Some(LinuxEnd::Failed(why.to_owned()));
            }
            // A signal that is nobody's here, or one that KVM itself ends for.
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            other => {
                return Some(LinuxEnd::Failed(format!("an exit that nobody expects: {other:?}")));
            }
        }
        None
    }

    /// Completes the instruction in the middle of which a vCPU may be that is to park: KVM does that when
    /// it is entered again, and with `immediate_exit` it does only that. It may write to guest memory,
    /// and so has to be done before whoever wanted the pause looks what was written.
    fn complete_instruction(&self, cpu: &Cpu) -> Option<LinuxEnd> {
        cpu.immediate_exit.set(true);
        let Inside { fd, runner } = &mut *cpu.inside();
        loop {
            match runner.run(fd) {
                // Perhaps because it waits for memory: then it cannot be saved.
                Err(error) if error.is_interrupted() => return None,
                // Another part of the instruction wants something.
                result => {
                    if let Some(end) = self.handle(result) {
                        return Some(end);
                    }
                }
            }
        }
    }
}
