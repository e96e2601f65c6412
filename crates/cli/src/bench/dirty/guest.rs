//! A guest that has the memory, and writes one word to each page of a list.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0x1000 | the programs; 0x2000: PML4; 0x3000: PDPT; 0x4000: GDT; 0x5000: TSS |
//! | 0x6000 | page directories, one for each GiB that is mapped, 1:1, by 2 MiB |
//! | behind | the list, four bytes a page |
//! | 4 GiB | the memory |
//!
//! It runs in ring 3, where also a host that emulates a guest's ring 0 runs it at speed. It has no
//! interrupt table: whatever goes wrong in it shuts it down.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pageferry::memory::{Advice, GuestAddress, Mapping};
use pageferry_kvm::{
    dirty::{DirtyLog, DirtyRing, KvmTracker, LogMode, RingCollector, RingSize, TrackedSlot},
    probe,
};

use super::case::Memory;
use crate::bench::case::PAGE;

/// A guest without CPUID has addresses of 36 bits, and the memory begins at 4 GiB.
pub(super) const MOST: u64 = 60 << 30;

const MEMORY: u64 = 4 << 30;
const GIB: u64 = 1 << 30;

const PROGRAM: u64 = 0x1000;
const TOUCHING: u64 = 0x1100;
const ROOT: u64 = 0x2000;
const POINTERS: u64 = 0x3000;
const DESCRIPTORS: u64 = 0x4000;
const TASK: u64 = 0x5000;
const DIRECTORIES: u64 = 0x6000;

/// Writes rax to the second word of rcx pages from rdi on, whose numbers are at rsi.
const CODE: [u8; 23] = [
    0x8b, 0x16, // next: mov edx, [rsi]
    0x48, 0xc1, 0xe2, 0x0c, // shl rdx, 12
    0x48, 0x89, 0x44, 0x17, 0x08, // mov [rdi + rdx + 8], rax
    0x48, 0x83, 0xc6, 0x04, // add rsi, 4
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xec, // jnz next
    0xe6, DONE as u8, // out DONE, al
    0xf4,       // hlt, which ring 3 may not
];

/// Reads the first byte of rcx pages from rdi on.
const TOUCH: [u8; 17] = [
    0x8a, 0x17, // next: mov dl, [rdi]
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 0x1000
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf2, // jnz next
    0xe6, DONE as u8, // out DONE, al
    0xf4,       // hlt
];
const DONE: u16 = 0x10;

/// Selectors, and what they select.
const CODE_3: u16 = 0x0b;
const DATA_3: u16 = 0x13;
const TASK_STATE: u16 = 0x18;
const SEGMENTS: [u64; 3] = [0, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];

const BOOT_SLOT: u32 = 1;
const MEMORY_SLOT: u32 = 0;

/// KVM_EXIT_DIRTY_RING_FULL.
const RING_FULL: u32 = 31;

/// The largest rings that are used: what a VMM would take, and enough for 65,472 pages.
const RING_BYTES: u32 = 1 << 20;

/// A machine of one vCPU. Its memory outlives it.
pub(super) struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    ring: Option<RingSize>,
    _boot: Mapping,
    memory: Arc<Mapping>,
    /// Where the list is, and of how many pages.
    list: (u64, u64),
    /// The first page that is written, and the last.
    ends: [u64; 2],
}

impl Guest {
    /// A guest that has this memory and writes these pages; with a dirty ring or without.
    pub(super) fn new(memory: &Memory, written: &[u64], ring: bool) -> anyhow::Result<Self> {
        ensure!(memory.bytes <= MOST, "{} bytes of memory for a guest", memory.bytes);
        let (&first, &last) = written.first().zip(written.last()).context("no page to write")?;
        let vm = Kvm::new().context("/dev/kvm")?.create_vm().context("KVM_CREATE_VM")?;
        vm.set_tss_address(0xfffb_d000).context("KVM_SET_TSS_ADDR")?;
        let ring = ring.then(|| ring_size(&vm)).transpose()?;

        let mapped: Vec<u64> =
            [0].into_iter().chain(MEMORY / GIB..(MEMORY + memory.bytes).div_ceil(GIB)).collect();
        let list = DIRECTORIES + mapped.len() as u64 * PAGE as u64;
        let len = (list + written.len() as u64 * 4).next_multiple_of(PAGE as u64);
        let boot = Mapping::anonymous(len).context("the guest's own memory")?;
        boot.advise(boot.range(), Advice::PopulateWrite).context("the guest's own memory")?;
        fill(&boot, &mapped)?;
        for (at, page) in (list..).step_by(4).zip(written) {
            boot.write_at(at, &u32::try_from(*page)?.to_le_bytes())?;
        }

        for (slot, guest, mapping) in
            [(BOOT_SLOT, 0, &boot), (MEMORY_SLOT, MEMORY, &*memory.mapping)]
        {
            // SAFETY: both mappings live longer than the machine.
            unsafe { vm.set_user_memory_region(memslot(slot, guest, mapping)) }
                .context("KVM_SET_USER_MEMORY_REGION")?;
        }
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        prepare(&vcpu)?;
        let memory = Arc::clone(&memory.mapping);
        let list = (list, written.len() as u64);
        let mut guest = Self { vcpu, vm, ring, _boot: boot, memory, list, ends: [first, last] };
        // KVM maps it, as it has a running guest's memory: what is not mapped costs nothing to track.
        let pages = guest.memory.range().len() / PAGE as u64;
        guest.run(TOUCHING, 0, (0, pages), &mut || bail!("a dirty ring is full"))?;
        Ok(guest)
    }

    /// Has the pages written, and says how long that took; `full` empties the ring when it is.
    pub(super) fn write(
        &mut self,
        value: u64,
        full: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let took = self.run(PROGRAM, value, self.list, full)?;
        for page in self.ends {
            let mut word = [0; 8];
            self.memory.read_at(page * PAGE as u64 + 8, &mut word)?;
            ensure!(u64::from_le_bytes(word) == value, "the guest did not write page {page}");
        }
        Ok(took)
    }

    /// Runs one of the programs, and says how long that took.
    fn run(
        &mut self,
        rip: u64,
        rax: u64,
        (rsi, rcx): (u64, u64),
        full: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let registers = kvm_regs {
            rip,
            rax,
            rcx,
            rsi,
            rdi: MEMORY,
            rflags: 3 << 12 | 2, // IOPL 3
            ..Default::default()
        };
        self.vcpu.set_regs(&registers).context("KVM_SET_REGS")?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(DONE, _)) => break,
                Ok(VcpuExit::Unsupported(RING_FULL)) => full()?,
                Ok(other) => bail!("the guest ended with {other:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
        Ok(start.elapsed())
    }

    pub(super) fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub(super) fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// The slot that is tracked, as it is untracked.
    pub(super) fn slot(&self) -> kvm_userspace_memory_region {
        memslot(MEMORY_SLOT, MEMORY, &self.memory)
    }

    /// The size of the vCPU's ring.
    pub(super) fn ring_size(&self) -> anyhow::Result<RingSize> {
        self.ring.context("a guest without a ring")
    }

    /// Whether the log can be cleared in ranges.
    pub(super) fn clears_log(&self) -> bool {
        DirtyLog::mode_of(&self.vm) != LogMode::Automatic
    }

    fn tracked(&self) -> Vec<TrackedSlot> {
        vec![TrackedSlot::new(MEMORY_SLOT, GuestAddress::new(MEMORY), self.memory.range())]
    }

    /// The library's tracker by the dirty log. It goes before the guest does.
    pub(super) fn log(&self) -> anyhow::Result<KvmTracker> {
        let mode = DirtyLog::mode_of(&self.vm);
        // SAFETY: the machine has the slot so, to its end.
        let log = unsafe { DirtyLog::new(&self.vm, self.tracked(), mode) }?;
        Ok(log.into())
    }

    /// The library's tracker by the dirty ring, and what empties it. It goes before the guest does.
    pub(super) fn ring(&self) -> anyhow::Result<(KvmTracker, RingCollector)> {
        let vcpus = [&self.vcpu];
        // SAFETY: as above, and nobody else collects while it is used.
        let ring = unsafe { DirtyRing::new(&self.vm, self.ring_size()?, self.tracked(), vcpus) }?;
        let collector = ring.collector();
        Ok((ring.into(), collector))
    }
}

fn ring_size(vm: &VmFd) -> anyhow::Result<RingSize> {
    let most = probe::host().dirty_ring_bytes.context("KVM has no dirty rings")?;
    Ok(RingSize::enable(vm, most.min(RING_BYTES))?)
}

fn memslot(slot: u32, guest: u64, mapping: &Mapping) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: guest,
        memory_size: mapping.range().len(),
        userspace_addr: mapping.range().start().get(),
    }
}

/// All but the list; `mapped` are the GiBs that the guest has.
fn fill(boot: &Mapping, mapped: &[u64]) -> anyhow::Result<()> {
    const USER_WRITABLE: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let word = |at: u64, word: u64| boot.write_at(at, &word.to_le_bytes());
    boot.write_at(PROGRAM, &CODE)?;
    boot.write_at(TOUCHING, &TOUCH)?;
    word(ROOT, POINTERS | USER_WRITABLE)?;
    for (directory, gib) in (DIRECTORIES..).step_by(PAGE).zip(mapped) {
        word(POINTERS + 8 * gib, directory | USER_WRITABLE)?;
        for entry in 0..512 {
            word(directory + 8 * entry, gib << 30 | entry << 21 | LARGE | USER_WRITABLE)?;
        }
    }
    for (at, segment) in (DESCRIPTORS..).step_by(8).zip(SEGMENTS) {
        word(at, segment)?;
    }
    word(DESCRIPTORS + u64::from(TASK_STATE), 0x67 | TASK << 16 | 0x8b << 40)?;
    word(DESCRIPTORS + u64::from(TASK_STATE) + 8, 0)?;
    Ok(())
}

/// 64-bit mode, ring 3.
fn prepare(vcpu: &VcpuFd) -> anyhow::Result<()> {
    let mut system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: DATA_3,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    (system.ds, system.es, system.ss, system.fs, system.gs) = (data, data, data, data, data);
    system.cs = kvm_segment { selector: CODE_3, type_: 11, l: 1, db: 0, ..data };
    system.tr = kvm_segment {
        base: TASK,
        limit: 0x67,
        selector: TASK_STATE,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (system.gdt.base, system.gdt.limit) = (DESCRIPTORS, 0x27);
    (system.idt.base, system.idt.limit) = (0, 0);
    system.cr3 = ROOT;
    system.cr4 |= 1 << 5; // PAE
    system.cr0 |= 1 << 31 | 1 << 5 | 1; // PG, NE, PE
    system.efer |= 1 << 10 | 1 << 8; // LMA, LME
    vcpu.set_sregs(&system).context("KVM_SET_SREGS")
}
