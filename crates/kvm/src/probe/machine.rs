//! A virtual machine of a few pages, whose memory can be marked as missing.

use std::{
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::thread::JoinHandleExt as _,
    },
    sync::{Arc, mpsc},
    time::Duration,
};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pageferry_memory::{GuestAddress, HostAddress, HostRange, Mapping};
use pageferry_uffd::{
    CopyMode, Features, Options, Outcome, RegisterMode, Registration, Userfaultfd, Wake,
};

use super::doing;
use crate::{
    KvmError,
    dirty::{DirtyLog, DirtyRing, LogMode, RingSize, TrackedSlot},
    signals::{self, Blocked, SignalSet},
    sys,
};

pub(super) const PAGE: u64 = 4096;

const CODE: u64 = 1;
/// Three levels of page tables; the last maps 2 MiB as one page, of which the slot has the first
/// ones.
const ROOT: u64 = 2;
const MIDDLE: u64 = 3;
/// The page of the page tables that is marked to see who reads it.
pub(super) const TABLE: u64 = 4;
/// The first page that the guest touches.
pub(super) const DATA: u64 = 5;
/// The pages that one table of 2 MiB reaches.
const REACH: u64 = 512;

/// Where the guest reports.
pub(super) const PORT: u8 = 0x10;

/// 64-bit: reads the first byte of each of `rcx` pages from `rdi` on, sends the last through a port,
/// and goes on with the next page, and again.
const TOUCH: [u8; 18] = [
    0x8a, 0x07, // next: mov al, [rdi]
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, PAGE
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf2, // jnz next
    0xe6, PORT, // out PORT, al
    0xeb, 0xee, // jmp next
];

/// No answer within this time counts as hanging: even an emulated guest needs microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a run ended with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Ran {
    /// The guest sent this byte through the port.
    Out(u8),
    /// A SIGBUS that names this address.
    Marker(HostAddress),
    /// The guest wants to set this register to this, and its machine's filter says no.
    SetsRegister(u32, u64),
    /// The guest halted.
    Halt,
    /// The guest had an exception that it cannot handle.
    Shutdown,
    /// Something else.
    Other(String),
}

/// Dropped in this order: the vCPU and the machine let go of the memory first.
pub(super) struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Arc<Mapping>,
    last_code: i32,
}

impl Machine {
    /// `prepare` is what has to be done before there is a vCPU.
    fn new(
        kvm: &Kvm,
        pages: u64,
        flags: u32,
        prepare: impl FnOnce(&VmFd) -> Result<(), String>,
    ) -> Result<Self, String> {
        let vm = kvm.create_vm().map_err(doing("KVM_CREATE_VM"))?;
        prepare(&vm)?;
        // Intel processors without unrestricted guest mode need three pages for real mode; others
        // do not care.
        vm.set_tss_address(0xfffb_d000).map_err(doing("KVM_SET_TSS_ADDR"))?;
        let memory = Mapping::anonymous(pages * PAGE).map_err(|error| error.to_string())?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: 0,
            memory_size: pages * PAGE,
            userspace_addr: memory.range().start().get(),
        };
        // SAFETY: the memory is as long as the slot, and outlives the machine.
        unsafe { vm.set_user_memory_region(slot) }.map_err(doing("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(doing("KVM_CREATE_VCPU"))?;
        Ok(Self { vcpu, vm, memory: Arc::new(memory), last_code: 0 })
    }

    /// At the beginning of this program, in page 1, in real mode, with the dirty log on, and with
    /// these in AL and BL.
    pub(super) fn real_mode(
        kvm: &Kvm,
        pages: u64,
        program: &[u8],
        low: (u8, u8),
    ) -> Result<Self, String> {
        Self::new(kvm, pages, KVM_MEM_LOG_DIRTY_PAGES, |_| Ok(()))?.at(program, low)
    }

    /// The same without the dirty log, and with something done before there is a vCPU.
    pub(super) fn prepared(
        kvm: &Kvm,
        pages: u64,
        program: &[u8],
        prepare: impl FnOnce(&VmFd) -> Result<(), String>,
    ) -> Result<Self, String> {
        Self::new(kvm, pages, 0, prepare)?.at(program, (0, 0))
    }

    fn at(self, program: &[u8], (al, bl): (u8, u8)) -> Result<Self, String> {
        let machine = self;
        machine.write(CODE * PAGE, program)?;
        let mut system = machine.vcpu.get_sregs().map_err(doing("KVM_GET_SREGS"))?;
        (system.cs.base, system.cs.selector) = (0, 0);
        (system.ds.base, system.ds.selector) = (0, 0);
        machine.vcpu.set_sregs(&system).map_err(doing("KVM_SET_SREGS"))?;
        let mut registers = machine.vcpu.get_regs().map_err(doing("KVM_GET_REGS"))?;
        (registers.rip, registers.rflags) = (CODE * PAGE, 2);
        (registers.rax, registers.rbx) = (al.into(), bl.into());
        machine.vcpu.set_regs(&registers).map_err(doing("KVM_SET_REGS"))?;
        Ok(machine)
    }

    /// At the beginning of a program that touches pages, in 64-bit mode, in ring 3 with the right
    /// to use ports: there every host runs guests natively. It has this many pages to touch.
    pub(super) fn touching(kvm: &Kvm, pages: u64) -> Result<Self, String> {
        assert!(DATA + pages <= REACH, "the page tables reach {REACH} pages");
        let machine = Self::new(kvm, DATA + pages, 0, |_| Ok(()))?;
        machine.write(CODE * PAGE, &TOUCH)?;
        const PRESENT_WRITABLE_USER: u64 = 0b111;
        const LARGE: u64 = 1 << 7;
        for (table, entry) in [
            (ROOT, (MIDDLE * PAGE) | PRESENT_WRITABLE_USER),
            (MIDDLE, (TABLE * PAGE) | PRESENT_WRITABLE_USER),
            (TABLE, LARGE | PRESENT_WRITABLE_USER),
        ] {
            machine.write(table * PAGE, &entry.to_le_bytes())?;
        }
        let mut system = machine.vcpu.get_sregs().map_err(doing("KVM_GET_SREGS"))?;
        let data = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: 0x13,
            type_: 3,
            present: 1,
            dpl: 3,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        (system.ds, system.es, system.ss) = (data, data, data);
        (system.fs, system.gs) = (data, data);
        system.cs = kvm_segment { selector: 0x1b, type_: 11, l: 1, db: 0, ..data };
        system.cr3 = ROOT * PAGE;
        system.cr4 |= 1 << 5; // PAE
        system.cr0 |= 1 << 31 | 1 << 5 | 1; // PG, NE, PE
        system.efer |= 1 << 10 | 1 << 8; // LMA, LME
        machine.vcpu.set_sregs(&system).map_err(doing("KVM_SET_SREGS"))?;
        machine.start(DATA, 1)?;
        Ok(machine)
    }

    /// Puts the guest to the beginning of its program, to touch this many pages from this one on.
    pub(super) fn start(&self, page: u64, count: u64) -> Result<(), String> {
        let mut registers = self.vcpu.get_regs().map_err(doing("KVM_GET_REGS"))?;
        (registers.rip, registers.rdi, registers.rcx) = (CODE * PAGE, page * PAGE, count);
        registers.rflags = 3 << 12 | 2; // IOPL 3
        self.vcpu.set_regs(&registers).map_err(doing("KVM_SET_REGS"))
    }

    /// Runs until something happens. Only on a thread of [`on_a_thread`].
    pub(super) fn run(&mut self) -> Result<Ran, String> {
        Ok(match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, &[byte])) if port == u16::from(PORT) => Ran::Out(byte),
            Ok(VcpuExit::X86Wrmsr(exit)) => Ran::SetsRegister(exit.index, exit.data),
            Ok(VcpuExit::Hlt) => Ran::Halt,
            Ok(VcpuExit::Shutdown) => Ran::Shutdown,
            Ok(other) => Ran::Other(format!("{other:?}")),
            Err(error) if error.errno() == libc::EINTR => {
                // Nothing else ends it: all other signals are blocked, inside KVM_RUN, too.
                let Some(sigbus) = signals::take_sigbus() else {
                    return Ok(Ran::Other("EINTR without a signal".to_owned()));
                };
                self.last_code = sigbus.code();
                match sigbus.page() {
                    Some(address) => Ran::Marker(address),
                    None => return Err(format!("no exit within {PATIENCE:?}")),
                }
            }
            Err(error) => Ran::Other(format!("KVM_RUN: {error}")),
        })
    }

    /// The `si_code` of the last signal.
    pub(super) fn last_code(&self) -> i32 {
        self.last_code
    }

    /// Where the host has this page.
    pub(super) fn page(&self, page: u64) -> HostRange {
        self.pages(page, 1)
    }

    /// Where the host has these pages.
    pub(super) fn pages(&self, page: u64, count: u64) -> HostRange {
        self.memory.range().skip(page * PAGE).take(count * PAGE)
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    fn tracked(&self) -> Vec<TrackedSlot> {
        vec![TrackedSlot::new(0, GuestAddress::new(0), self.memory.range())]
    }

    /// Tracks all its memory by the dirty log.
    pub(super) fn log(&self, mode: LogMode) -> Result<DirtyLog, KvmError> {
        // SAFETY: the one slot is as it was made.
        unsafe { DirtyLog::new(&self.vm, self.tracked(), mode) }
    }

    /// Tracks all its memory by its vCPU's ring.
    pub(super) fn ring(&self, size: RingSize) -> Result<DirtyRing, KvmError> {
        // SAFETY: the one slot is as it was made, and the vCPU is this machine's.
        unsafe { DirtyRing::new(&self.vm, size, self.tracked(), [&self.vcpu]) }
    }

    /// Sets a register of the vCPU's, for a guest that has left for that.
    pub(super) fn set_register(&mut self, index: u32, value: u64) -> Result<(), String> {
        if !sys::set_msr(&self.vcpu, index, value) {
            return Err(format!("KVM refuses register {index:#x}"));
        }
        sys::complete_wrmsr(self.vcpu.get_kvm_run(), true);
        Ok(())
    }

    pub(super) fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String> {
        self.memory.write_at(address, bytes).map_err(|error| error.to_string())
    }

    /// The contents of a page, which is there.
    pub(super) fn read_page(&self, page: u64) -> [u8; PAGE as usize] {
        let mut bytes = [0; PAGE as usize];
        self.memory.read_at(page * PAGE, &mut bytes).expect("the page is one of the machine's");
        bytes
    }

    /// Puts a page where a marker is.
    pub(super) fn install(
        &self,
        uffd: &Userfaultfd,
        page: HostRange,
        bytes: &[u8; PAGE as usize],
    ) -> Result<(), String> {
        match uffd
            .copy(page.start(), bytes, CopyMode::NO_WAKE)
            .map_err(|error| error.to_string())?
        {
            Outcome::Installed { .. } => Ok(()),
            other => Err(format!("COPY over a marker: {other:?}")),
        }
    }

    /// The first word of the dirty log.
    pub(super) fn dirty_log(&self, bytes: usize) -> Result<u64, String> {
        let log = self.vm.get_dirty_log(0, bytes).map_err(doing("KVM_GET_DIRTY_LOG"))?;
        Ok(log.first().copied().unwrap_or(0))
    }
}

/// Registers part of the machine's memory, and marks all of it as missing.
pub(super) fn marked(
    machine: &Machine,
    range: HostRange,
) -> Result<Registration<Arc<Mapping>>, String> {
    let any = Options::new().open().map_err(|error| error.to_string())?;
    if !any.negotiated().available.contains(Features::POISON) {
        return Err("userfaultfd has no POISON here; Linux 6.6 has it".to_owned());
    }
    let uffd =
        Options::new().required(Features::POISON).open().map_err(|error| error.to_string())?;
    let registration = Arc::new(uffd)
        .register(Arc::clone(machine.memory()), range, RegisterMode::MISSING)
        .map_err(|error| error.to_string())?;
    mark(&registration, range)?;
    Ok(registration)
}

/// Makes the range missing, and marks it.
pub(super) fn mark(
    registration: &Registration<Arc<Mapping>>,
    range: HostRange,
) -> Result<(), String> {
    discard(registration, range)?;
    match registration.uffd().poison(range, Wake::No).map_err(|error| error.to_string())? {
        Outcome::Installed { .. } => Ok(()),
        other => Err(format!("POISON: {other:?}")),
    }
}

/// Makes the range missing.
pub(super) fn discard(
    registration: &Registration<Arc<Mapping>>,
    range: HostRange,
) -> Result<(), String> {
    let advice = pageferry_memory::Advice::DontNeed;
    registration.mapping().advise(range, advice).map_err(doing("discarding pages"))
}

/// Lets a machine run on a thread of its own, with all signals blocked; inside KVM_RUN all but
/// SIGBUS are. One that takes too long is made to leave KVM_RUN.
pub(super) fn on_a_thread<T: Send + 'static>(
    mut machine: Machine,
    action: impl FnOnce(&mut Machine) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("pf-probe-vcpu".into());
    let handle = thread
        .spawn(move || {
            // To its end: one that is told to give up may be told so too late.
            std::mem::forget(Blocked::new());
            let inside = SignalSet::from_bits(u64::MAX).without(libc::SIGBUS);
            let result = sys::set_signal_mask(&machine.vcpu, Some(inside))
                .map_err(doing("KVM_SET_SIGNAL_MASK"))
                .and_then(|()| action(&mut machine));
            // The machine is gone when the answer comes.
            drop(machine);
            // The receiver is there until the thread has been joined.
            let _ = sender.send(result);
        })
        .map_err(doing("starting a vCPU thread"))?;
    let result = match receiver.recv_timeout(PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => {
            // SAFETY: the thread has not been joined; it blocks the signal outside of KVM_RUN.
            unsafe { libc::pthread_kill(handle.as_pthread_t(), libc::SIGBUS) };
            receiver.recv_timeout(PATIENCE)
        }
        other => other,
    };
    match result {
        Ok(result) => {
            handle.join().map_err(|_| "the vCPU thread panicked".to_owned())?;
            result
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(format!("no exit within {PATIENCE:?}, and no end of KVM_RUN by a signal"))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err("the vCPU thread panicked".to_owned()),
    }
}

/// Maps a guest_memfd, takes it over, and writes to it.
pub(super) fn map_guest_memfd(fd: RawFd, size: u64) -> Result<(), String> {
    // SAFETY: the caller has just been given this descriptor, and hands it over.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mapping = Mapping::shared(&fd, 0, size, None).map_err(|error| error.to_string())?;
    // Populating reports what would be a SIGBUS.
    mapping
        .advise(mapping.range(), pageferry_memory::Advice::PopulateWrite)
        .map_err(doing("populating it"))?;
    mapping.write_at(0, &[1]).map_err(|error| error.to_string())
}
