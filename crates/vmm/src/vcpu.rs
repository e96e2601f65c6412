//! One vCPU: made ready, and run until it ends.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use kvm_bindings::{CpuId, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use pageferry_kvm::{Exit, RunError};
use pageferry_memory::GuestAddress;

use crate::{
    Ring, VcpuRunner, VmError,
    boot::{self, Boot, Entry},
    control::Control,
    immediate_exit::ImmediateExit,
    machine_check,
    payload::{PORT_END, PORT_EXCEPTION, PORT_PROGRESS},
    report::{End, Mismatch, TouchTimes, VcpuReport},
    signal::Target,
};

const MACHINE_CHECK: u64 = 18;
const INTERRUPTED: i32 = libc::EINTR;

/// A vCPU and what reaches its thread from outside.
#[derive(Debug)]
pub(crate) struct Vcpu {
    number: u16,
    /// Locked by the thread that runs it.
    fd: Mutex<VcpuFd>,
    immediate_exit: ImmediateExit,
    thread: Target,
    kicks: AtomicU64,
}

/// What a vCPU's thread works with.
pub(crate) struct Run<'a> {
    pub(crate) boot: &'a Boot,
    pub(crate) control: &'a Control,
    pub(crate) runner: Box<dyn VcpuRunner + 'a>,
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
        })
    }

    /// Gets it out of the guest, or makes its next entry return at once. It goes on by itself, unless
    /// something is wanted of it.
    pub(crate) fn kick(&self) {
        // One signal until the thread has noticed: they would queue up.
        if !self.immediate_exit.set(true) {
            self.thread.interrupt();
        }
    }

    /// Runs it from the beginning of the payload, on the calling thread, to its end.
    pub(crate) fn run(&self, mut run: Run<'_>) -> Result<VcpuReport, VmError> {
        // Whoever had it before may have panicked; it starts anew.
        let mut fd = self.fd.lock().unwrap_or_else(PoisonError::into_inner);
        self.finish_instruction(&mut fd)?;
        prepare(&fd, &run.boot.prepare(self.number))?;
        let ticks_per_ms = fd.get_tsc_khz().ok();
        self.kicks.store(0, Relaxed);
        let _inside = self.thread.enter();
        let started = Instant::now();
        let mut exits = 0;
        let end = self.enter_until_end(&mut fd, &mut run, &mut exits);
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

    fn enter_until_end(&self, fd: &mut VcpuFd, run: &mut Run<'_>, exits: &mut u64) -> End {
        let active = run.control.enter();
        loop {
            // Before the checkpoint: see `control`.
            self.immediate_exit.set(false);
            if !run.control.checkpoint(&active) {
                return End::Stopped;
            }
            match run.runner.run(fd) {
                Ok(Exit::Kvm(exit)) => {
                    *exits += 1;
                    if let Some(end) = self.handle(exit, run) {
                        return end;
                    }
                }
                Ok(Exit::MemoryError { guest, host }) => return End::MemoryError { guest, host },
                Err(RunError::Kvm(error)) if error.errno() == INTERRUPTED => {
                    self.kicks.fetch_add(1, Relaxed);
                }
                Err(RunError::Kvm(error)) => {
                    return End::Failed(format!("KVM_RUN: {}", io::Error::from(error)));
                }
                Err(error) => return End::Failed(error.to_string()),
            }
        }
    }

    /// What an exit means; `None`: on with it.
    fn handle(&self, exit: VcpuExit<'_>, run: &Run<'_>) -> Option<End> {
        let no_memory =
            |address, write| End::NoMemory { address: GuestAddress::new(address), write };
        match exit {
            VcpuExit::IoOut(PORT_PROGRESS, _) => {
                if let Some(progress) = run.progress {
                    progress(self.number, run.boot.report(self.number).0.touches);
                }
                None
            }
            VcpuExit::IoOut(PORT_END, _) => Some(End::Finished),
            VcpuExit::IoOut(PORT_EXCEPTION, _) => Some(exception(run.boot, self.number)),
            VcpuExit::MmioRead(address, _) => Some(no_memory(address, false)),
            VcpuExit::MmioWrite(address, _) => Some(no_memory(address, true)),
            other => Some(End::Failed(format!("an exit that nobody expects: {other:?}"))),
        }
    }
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
