//! One vCPU: made ready, and run until it ends.

use std::{
    io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use kvm_bindings::{CpuId, KVM_EXIT_DIRTY_RING_FULL, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry_kvm::{Exit, RunError, dirty::RingCollector};
use pageferry_memory::GuestAddress;

use crate::{
    Ring, VcpuRunner, VmError,
    boot::{self, Boot, Entry},
    control::{Active, Control, Next},
    immediate_exit::ImmediateExit,
    machine_check,
    payload::{PORT_END, PORT_EXCEPTION, PORT_PROGRESS},
    report::{End, Mismatch, TouchTimes, VcpuReport},
    signal::Target,
    state::{Restorer, Saver, VcpuState},
};

const MACHINE_CHECK: u64 = 18;
const INTERRUPTED: i32 = libc::EINTR;

/// A vCPU and what reaches its thread from outside.
#[derive(Debug)]
pub(crate) struct Vcpu {
    number: u16,
    /// Locked by the thread that runs it, while it does not park.
    fd: Mutex<VcpuFd>,
    immediate_exit: ImmediateExit,
    thread: Target,
    kicks: AtomicU64,
    /// It parked in the middle of an instruction that waits for memory.
    mid_instruction: AtomicBool,
}

/// What a vCPU's thread works with.
pub(crate) struct Run<'a> {
    pub(crate) boot: &'a Boot,
    pub(crate) control: &'a Control,
    pub(crate) runner: Box<dyn VcpuRunner + 'a>,
    pub(crate) active: Active<'a>,
    /// Whether it begins with the payload, and not from where it stands.
    pub(crate) from_the_beginning: bool,
    /// What empties the dirty rings, if there are any.
    pub(crate) rings: Option<&'a RingCollector>,
    /// How long it takes from one exit for progress to the next at the least.
    pub(crate) pace: Option<Duration>,
    /// Told of progress: vCPU and units touched.
    pub(crate) progress: Option<&'a (dyn Fn(u16, u64) + Sync)>,
}

impl Vcpu {
    pub(crate) fn new(number: u16, mut fd: VcpuFd, cpuid: &CpuId) -> Result<Self, VmError> {
        fd.set_cpuid2(cpuid).map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        machine_check::set_up(&fd)?;
        let immediate_exit = ImmediateExit::of(&mut fd);
        Ok(Self {
            number,
            fd: Mutex::new(fd),
            immediate_exit,
            thread: Target::default(),
            kicks: AtomicU64::new(0),
            mid_instruction: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        // Whoever had it before may have panicked; it starts anew.
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its state, if it is not in the guest.
    pub(crate) fn save(&self, saver: &Saver) -> Result<VcpuState, VmError> {
        let mut fd = self.lock();
        if self.mid_instruction.load(SeqCst) {
            return Err(VmError::MidInstruction { vcpu: self.number });
        }
        self.finish_instruction(&mut fd)?;
        Ok(saver.vcpu(&fd)?)
    }

    /// Takes another's state.
    pub(crate) fn restore(
        &self,
        restorer: &mut Restorer,
        state: &VcpuState,
    ) -> Result<(), VmError> {
        let mut fd = self.lock();
        self.finish_instruction(&mut fd)?;
        Ok(restorer.vcpu(&fd, state)?)
    }

    /// Gets it out of the guest, or makes its next entry return at once. It goes on by itself,
    /// unless something is wanted of it.
    pub(crate) fn kick(&self) {
        // One signal until the thread has noticed: they would queue up.
        if !self.immediate_exit.set(true) {
            self.thread.interrupt();
        }
    }

    /// Runs it on the calling thread, to its end.
    pub(crate) fn run(&self, mut run: Run<'_>) -> Result<VcpuReport, VmError> {
        let mut fd = self.lock();
        if run.from_the_beginning {
            self.finish_instruction(&mut fd)?;
            prepare(&fd, &run.boot.prepare(self.number))?;
        }
        self.mid_instruction.store(false, SeqCst);
        let ticks_per_ms = fd.get_tsc_khz().ok();
        self.kicks.store(0, Relaxed);
        let _inside = self.thread.enter();
        let started = Instant::now();
        let mut exits = 0;
        let end = self.enter_until_end(fd, &mut run, &mut exits);
        let (page, log2) = run.boot.report(self.number);
        let count: u64 = log2.iter().sum();
        Ok(VcpuReport {
            end,
            touches: page.touches,
            mismatches: page.mismatches,
            first_mismatch: (page.mismatches > 0).then_some(Mismatch {
                address: GuestAddress::new(page.bad_address),
                found: page.bad_found,
                expected: page.bad_expected,
            }),
            wall: started.elapsed(),
            times: TouchTimes {
                count,
                min: if count > 0 { page.time_min } else { 0 },
                max: page.time_max,
                sum: page.time_sum,
                log2,
                ticks_per_ms,
            },
            exits,
            kicks: self.kicks.load(Relaxed),
            pager: run.runner.stats(),
        })
    }

    /// An instruction whose exit ended the last run has not ended itself: KVM does that at the next
    /// KVM_RUN, and would then change registers that have been set meanwhile.
    fn finish_instruction(&self, fd: &mut VcpuFd) -> Result<(), VmError> {
        self.immediate_exit.set(true);
        loop {
            match fd.run() {
                // Another part of the instruction wants something: it gets whatever is there.
                Ok(_) => {}
                Err(error) if error.errno() == INTERRUPTED => return Ok(()),
                Err(error) => {
                    return Err(VmError::kvm("KVM_RUN without entering the guest")(error));
                }
            }
        }
    }

    fn enter_until_end<'s>(
        &'s self,
        mut fd: MutexGuard<'s, VcpuFd>,
        run: &mut Run<'_>,
        exits: &mut u64,
    ) -> End {
        let mut due = None;
        loop {
            // Before asking what is wanted: see `control`.
            self.immediate_exit.set(false);
            match run.control.next(due) {
                Next::Enter => {}
                Next::Stop => return End::Stopped,
                Next::Pause => {
                    if let Some(end) = self.settle(&mut fd, run, exits) {
                        return end;
                    }
                    // For whoever saves it.
                    drop(fd);
                    run.control.park(&run.active);
                    fd = self.lock();
                    continue;
                }
            }
            match self.enter(&mut fd, run, exits) {
                Entered::Handled => {}
                Entered::Progressed => due = run.pace.map(|pace| next_due(due, pace)),
                Entered::Interrupted => {
                    self.kicks.fetch_add(1, Relaxed);
                }
                Entered::Ended(end) => return end,
            }
        }
    }

    /// Finishes what the vCPU is in the middle of, as far as the memory for it is there: its
    /// registers are those of a whole instruction then. The guest is not entered.
    fn settle(&self, fd: &mut VcpuFd, run: &mut Run<'_>, exits: &mut u64) -> Option<End> {
        self.immediate_exit.set(true);
        loop {
            match self.enter(fd, run, exits) {
                Entered::Handled | Entered::Progressed => {}
                Entered::Interrupted => break,
                Entered::Ended(end) => return Some(end),
            }
        }
        self.mid_instruction.store(run.runner.is_mid_instruction(), SeqCst);
        None
    }

    fn enter(&self, fd: &mut VcpuFd, run: &mut Run<'_>, exits: &mut u64) -> Entered {
        match run.runner.run(fd) {
            Ok(Exit::Kvm(exit)) => {
                *exits += 1;
                self.handle(exit, run)
            }
            Ok(Exit::MemoryError { guest, host }) => {
                Entered::Ended(End::MemoryError { guest, host })
            }
            Err(RunError::Kvm(error)) if error.errno() == INTERRUPTED => Entered::Interrupted,
            Err(RunError::Kvm(error)) => {
                Entered::failed(format!("KVM_RUN: {}", io::Error::from(error)))
            }
            Err(error) => Entered::failed(error.to_string()),
        }
    }

    /// What an exit means.
    fn handle(&self, exit: VcpuExit<'_>, run: &Run<'_>) -> Entered {
        let no_memory = |address, write| {
            Entered::Ended(End::NoMemory { address: GuestAddress::new(address), write })
        };
        match exit {
            VcpuExit::IoOut(PORT_PROGRESS, _) => {
                if let Some(progress) = run.progress {
                    progress(self.number, run.boot.report(self.number).0.touches);
                }
                Entered::Progressed
            }
            VcpuExit::IoOut(PORT_END, _) => Entered::Ended(End::Finished),
            VcpuExit::IoOut(PORT_EXCEPTION, _) => Entered::Ended(exception(run.boot, self.number)),
            // What the handlers do after they have told; it was saved since.
            VcpuExit::Hlt => Entered::Ended(exception(run.boot, self.number)),
            VcpuExit::MmioRead(address, _) => no_memory(address, false),
            VcpuExit::MmioWrite(address, _) => no_memory(address, true),
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                match run.rings.map(RingCollector::collect) {
                    Some(Ok(())) => Entered::Handled,
                    Some(Err(error)) => Entered::failed(error.to_string()),
                    None => Entered::failed("a dirty ring is full that nobody empties".to_owned()),
                }
            }
            other => Entered::failed(format!("an exit that nobody expects: {other:?}")),
        }
    }
}

/// What came of calling the runner.
enum Entered {
    /// An exit has been seen to.
    Handled,
    /// The payload told of progress.
    Progressed,
    /// There was no exit.
    Interrupted,
    /// The vCPU is to run no more.
    Ended(End),
}

impl Entered {
    fn failed(why: String) -> Self {
        Self::Ended(End::Failed(why))
    }
}

/// When the vCPU may go on that was to go on at `due`. What it is late by it catches up with, up to
/// a tenth of a second.
fn next_due(due: Option<Instant>, pace: Duration) -> Instant {
    let now = Instant::now();
    let earliest = now.checked_sub(Duration::from_millis(100)).unwrap_or(now);
    due.unwrap_or(now).max(earliest) + pace
}

fn exception(boot: &Boot, vcpu: u16) -> End {
    let page = boot.report(vcpu).0;
    if page.vector == MACHINE_CHECK {
        return End::MachineCheck {
            bank: page.bank as u8,
            status: page.bank_status,
            address: GuestAddress::new(page.bank_address),
        };
    }
    End::Exception {
        vector: page.vector as u8,
        error_code: page.error_code,
        fault_address: page.fault_address,
        instruction: page.instruction,
    }
}

/// Long mode with everything mapped, as a boot loader leaves it. Sources: Intel's manual, volume 3,
/// sections 2.5 (control registers), 3.4.5 (descriptors) and 9.8.5 (IA-32e mode).
fn prepare(fd: &VcpuFd, entry: &Entry) -> Result<(), VmError> {
    const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1; // PG, WP, NE, ET, PE
    const CR4: u64 = 1 << 6 | 1 << 5; // MCE, PAE
    const EFER: u64 = 1 << 10 | 1 << 8; // LMA, LME
    const IOPL_3: u64 = 3 << 12;
    const ALWAYS_SET: u64 = 1 << 1;

    let mut system = fd.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
    let (privilege, code, data) = match entry.ring {
        Ring::Zero => (0, boot::CODE_0, boot::DATA_0),
        Ring::Three => (3, boot::CODE_3, boot::DATA_3),
    };
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        dpl: privilege,
        ..kvm_segment::default()
    };
    let (execute_read, read_write, busy_tss) = (0xb, 0x3, 0xb);
    system.cs = kvm_segment { selector: code, type_: execute_read, l: 1, ..flat };
    let data = kvm_segment { selector: data, type_: read_write, db: 1, ..flat };
    (system.ds, system.es, system.ss, system.fs) = (data, data, data, data);
    // The handlers find the report through it.
    system.gs = kvm_segment { base: entry.parameters, ..data };
    system.tr = kvm_segment {
        selector: entry.task.selector,
        base: entry.task.base,
        limit: entry.task.limit,
        type_: busy_tss,
        present: 1,
        ..kvm_segment::default()
    };
    system.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
    (system.gdt.base, system.gdt.limit) = entry.gdt;
    (system.idt.base, system.idt.limit) = entry.idt;
    (system.cr0, system.cr3, system.cr4, system.efer) = (CR0, entry.page_tables, CR4, EFER);
    (system.cr2, system.interrupt_bitmap) = (0, Default::default());
    fd.set_sregs(&system).map_err(VmError::kvm("KVM_SET_SREGS"))?;

    let registers = kvm_regs {
        rip: entry.instruction,
        rdi: entry.parameters,
        rsp: entry.stack,
        rflags: ALWAYS_SET | if entry.ring == Ring::Three { IOPL_3 } else { 0 },
        ..kvm_regs::default()
    };
    fd.set_regs(&registers).map_err(VmError::kvm("KVM_SET_REGS"))?;
    // An exception of the last run that was not delivered is not to be delivered to this one.
    let events = fd.get_vcpu_events().map_err(VmError::kvm("KVM_GET_VCPU_EVENTS"))?;
    let fresh = kvm_bindings::kvm_vcpu_events { exception: Default::default(), flags: 0, ..events };
    fd.set_vcpu_events(&fresh).map_err(VmError::kvm("KVM_SET_VCPU_EVENTS"))
}
