//! The smallest guest: it adds two numbers, stores the sum, sends it through a port and halts.

use std::{ffi::c_void, io, ptr, sync::mpsc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const PAGE: usize = 4096;
/// One page of code and, after one that is never touched, one of data.
const PAGES: usize = 3;
const CODE: u64 = 0x1000;
const DATA_PAGE: usize = 2;
const PORT: u16 = 0x3f8;

/// Real mode, at [`CODE`]: page 0 of the slot.
const PROGRAM: [u8; 13] = [
    0xba, 0xf8, 0x03, // mov dx, PORT
    0x00, 0xd8, // add al, bl
    0xa2, 0x00, 0x30, // mov [0x3000], al: page 2 of the slot
    0xee, // out dx, al
    0xf4, // hlt
    0x90, 0x90, 0x90,
];

/// No answer within this time counts as hanging: even an emulated guest needs microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// The guest's memory, unmapped on drop.
struct Memory(*mut c_void);

// SAFETY: only an address; the memory is touched by raw accesses, never through a reference.
unsafe impl Send for Memory {}

impl Memory {
    fn new() -> io::Result<Self> {
        let (len, protection) = (PAGES * PAGE, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a null hint makes a mapping of its own, which overlaps nothing.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE)? };
        // SAFETY: the program fits the first page, and nothing else uses the memory yet.
        unsafe { ptr::copy_nonoverlapping(PROGRAM.as_ptr(), start.cast(), PROGRAM.len()) };
        Ok(Self(start))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the machine that used the memory is gone: `Machine` drops its fields in order.
        if let Err(error) = unsafe { munmap(self.0, PAGES * PAGE) } {
            eprintln!("pageferry: unmapping a guest's memory: {error}");
        }
    }
}

/// Dropped in this order: the vCPU and the machine let go of the memory first.
struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Memory,
}

/// Runs the guest, and returns what was seen. A guest that hangs is left behind, on its thread,
/// to the end of the process.
pub(super) fn run(kvm: &Kvm) -> anyhow::Result<String> {
    let mut machine = build(kvm)?;
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("doctor-vcpu".into());
    thread
        .spawn(move || {
            // The receiver may have lost patience.
            let _ = sender.send(execute(&mut machine));
        })
        .context("starting a vCPU thread")?;
    match receiver.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => bail!("no exit within {PATIENCE:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the vCPU thread panicked"),
    }
}

fn build(kvm: &Kvm) -> anyhow::Result<Machine> {
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    // Intel processors without unrestricted guest mode need three pages for real mode; others
    // do not care.
    vm.set_tss_address(0xfffb_d000).context("KVM_SET_TSS_ADDR")?;
    let memory = Memory::new().context("mapping three pages")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: CODE,
        memory_size: (PAGES * PAGE) as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the memory is as long as the slot, and outlives the machine.
    unsafe { vm.set_user_memory_region(slot) }.context("KVM_SET_USER_MEMORY_REGION")?;
    let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let mut system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    (system.cs.base, system.cs.selector) = (0, 0);
    (system.ds.base, system.ds.selector) = (0, 0);
    vcpu.set_sregs(&system).context("KVM_SET_SREGS")?;
    let mut registers = vcpu.get_regs().context("KVM_GET_REGS")?;
    (registers.rip, registers.rax, registers.rbx, registers.rflags) = (CODE, 2, 3, 2);
    vcpu.set_regs(&registers).context("KVM_SET_REGS")?;
    Ok(Machine { vcpu, vm, memory })
}

fn execute(machine: &mut Machine) -> anyhow::Result<String> {
    match machine.vcpu.run().context("KVM_RUN")? {
        VcpuExit::IoOut(PORT, [5]) => {}
        other => bail!("expected 5 at port {PORT:#x}, got {other:?}"),
    }
    match machine.vcpu.run().context("KVM_RUN")? {
        VcpuExit::Hlt => {}
        other => bail!("expected a halt, got {other:?}"),
    }
    // SAFETY: the data page lies in the memory, and the vCPU has halted.
    let stored = unsafe { machine.memory.0.cast::<u8>().add(DATA_PAGE * PAGE).read_volatile() };
    ensure!(stored == 5, "the guest's store is not in memory: {stored}");
    let dirty = machine.vm.get_dirty_log(0, PAGES * PAGE).context("KVM_GET_DIRTY_LOG")?;
    let map = dirty.first().copied().unwrap_or(0);
    ensure!(map & (1 << DATA_PAGE) != 0, "the page written is not in the dirty log: {map:#b}");
    ensure!(map & 0b10 == 0, "a page nobody touched is in the dirty log: {map:#b}");
    Ok("I/O exit, halt, store and dirty log as they should be".to_owned())
}
