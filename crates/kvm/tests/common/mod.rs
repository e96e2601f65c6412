//! A guest of a few instructions, whose memory arrives on demand.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test binary uses a part of it.

pub mod load;
mod source;
pub mod tracker;

use std::{ops::Deref, sync::Arc};

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use pageferry_dirty::PagedWrites;
use pageferry_kvm::{Exit, VcpuPager, VmPager, VmPagerOptions, probe};
use pageferry_memory::{Backing, GuestAddress, Layout, Mapping, Region, RegionConfig, RegionId};
use pageferry_paging::{Builder, Delivery, Events, Pager, Prefetch, WriteTracking};
pub use pageferry_testing::{HUGE, HugePages, PATIENCE, huge_pages, wait_for, watch, word};
pub use source::{Contents, Source};

pub const PAGE: u64 = 4096;
/// Where the guest has the paged memory, and how much of it by default.
pub const BASE: u64 = 2 << 20;
pub const PAGES: u64 = 64;
pub const REGION: RegionId = RegionId::new(0);

/// The resident memory, from guest address 0 on.
const BOOT_PAGES: u64 = 16;
pub const CODE: u64 = PAGE;
const ROOT: u64 = 2 * PAGE;
const MIDDLE: u64 = 3 * PAGE;
const TABLE: u64 = 4 * PAGE;
const DESCRIPTORS: u64 = 5 * PAGE;
const VECTORS: u64 = 6 * PAGE;
const TASK: u64 = 7 * PAGE;
const HANDLERS: u64 = 8 * PAGE;
/// Stacks grow down from here.
const STACK: u64 = 16 * PAGE;

/// Selectors.
const CODE_0: u16 = 0x08;
const DATA_0: u16 = 0x10;
const DATA_3: u16 = 0x1b;
const CODE_3: u16 = 0x23;
const TASK_STATE: u16 = 0x28;

/// Where a program reports that it is done, and a handler its vector.
pub const DONE: u16 = 0x10;
pub const VECTOR: u16 = 0x11;

/// Where the guest's code runs. In ring 0 some hosts emulate every instruction.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Ring {
    Zero,
    Three,
}

/// What a test needs; says so if it is not there.
pub fn exits() -> bool {
    let host = probe::host();
    if !host.works(probe::DEVICE) {
        println!("skipped: needs /dev/kvm");
    } else if !host.works(probe::POISON_EXITS) {
        println!("skipped: needs vCPU exits for markers");
    }
    host.works(probe::POISON_EXITS)
}

pub fn kvm() -> bool {
    let works = probe::host().works(probe::RUNS) && pageferry_testing::userfaultfd();
    if !works {
        println!("skipped: needs /dev/kvm and userfaultfd");
    }
    works
}

/// The ways to set memory up: one view, faults for missing pages; two views, KVM on the registered
/// one; three views, KVM on one of its own; two views, and nobody reads a queue.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Setup {
    Missing,
    Minor,
    MinorOwnView,
    NoQueue,
}

pub const SETUPS: [Setup; 4] = [Setup::Missing, Setup::Minor, Setup::MinorOwnView, Setup::NoQueue];

/// How a guest is to be.
pub struct Config {
    pub setup: Setup,
    pub delivery: Delivery,
    /// Whether removals are followed; by default as the set-up has it.
    pub events: Option<Events>,
    pub backing: Option<Backing>,
    pub len: u64,
    pub source: Source,
    pub options: VmPagerOptions,
    pub tracking: WriteTracking,
    /// Who is told of writes.
    pub writes: Option<Arc<PagedWrites>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            setup: Setup::Minor,
            delivery: Delivery::Exit,
            events: None,
            backing: None,
            len: PAGES * PAGE,
            source: Source::default(),
            options: VmPagerOptions {
                guest_page_tables_resident: true,
                ..VmPagerOptions::default()
            },
            tracking: WriteTracking::Off,
            writes: None,
        }
    }
}

impl Config {
    /// The memory, and what brings it, once it is given a source.
    pub fn pager(&self) -> (Arc<Region>, Builder) {
        let backing = self.backing.unwrap_or(match self.setup {
            Setup::Missing => Backing::Anonymous,
            _ => Backing::Memfd,
        });
        let region = RegionConfig {
            guest_base: GuestAddress::new(BASE),
            vcpu_view: self.setup == Setup::MinorOwnView,
            fill_view: self.setup != Setup::Missing,
            ..RegionConfig::new(self.len, backing)
        };
        let region = Arc::new(Region::new(&region).unwrap());
        let events = self.events.unwrap_or(match self.setup {
            Setup::NoQueue => Events::Ignore,
            _ => Events::Watch,
        });
        let mut builder = Pager::builder(Layout::new(vec![Arc::clone(&region)]).unwrap())
            .delivery(self.delivery)
            .prefetch(Prefetch::NONE)
            .events(events)
            .write_tracking(self.tracking);
        if let Some(writes) = &self.writes {
            builder = builder.write_observer(Arc::clone(writes) as _);
        }
        (region, builder)
    }
}

/// A virtual machine with its resident memory. The vCPUs go before it does.
pub struct Machine {
    pub kvm: Kvm,
    pub vm: VmFd,
    boot: Mapping,
}

/// A virtual machine whose memory is paged.
pub struct Guest {
    machine: Machine,
    pub region: Arc<Region>,
    pub vm_pager: VmPager,
    pub source: Arc<Source>,
}

pub fn memslot(number: u32, guest: u64, view: &Mapping) -> kvm_userspace_memory_region {
    kvm_userspace_memory_region {
        slot: number,
        flags: 0,
        guest_phys_addr: guest,
        memory_size: view.range().len(),
        userspace_addr: view.range().start().get(),
    }
}

impl Guest {
    pub fn new(config: Config) -> Self {
        let (region, builder) = config.pager();
        let Config { source, options, .. } = config;
        let source = Arc::new(source);
        let pager = builder.start(Arc::clone(&source) as _).unwrap();
        let vm_pager = VmPager::new(Arc::new(pager), options).unwrap();
        let machine = Machine::new();
        machine.show(0, BASE, region.kvm_view());
        Self { machine, region, vm_pager, source }
    }

    pub fn pager(&self) -> &Arc<Pager> {
        self.vm_pager.pager()
    }

    pub fn vcpu(&self, number: u64) -> Vcpu {
        let fd = self.vm.create_vcpu(number).unwrap();
        Vcpu { fd, pager: self.vm_pager.vcpu() }
    }

    /// What the guest is to find at this offset of its paged memory.
    pub fn expected(offset: u64) -> u64 {
        word(REGION, offset)
    }

    /// What is in the paged memory at this offset, by the view that never faults; for one without,
    /// of a page that is there.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let view = self.region.fill_view().unwrap_or(self.region.guest_view());
        view.read_at(offset, &mut bytes).unwrap();
        bytes
    }

    /// What the paged memory is to contain from this offset on, when it has come.
    pub fn contents(offset: u64, len: usize) -> Vec<u8> {
        let first = offset & !7;
        let mut bytes = vec![0; (offset as usize - first as usize + len).next_multiple_of(8)];
        pageferry_testing::fill_pattern(REGION, first, &mut bytes);
        bytes[(offset - first) as usize..][..len].to_vec()
    }
}

impl Deref for Guest {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Machine {
    pub fn new() -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        let boot = Mapping::anonymous(BOOT_PAGES * PAGE).unwrap();
        let machine = Self { kvm, vm, boot };
        machine.show(100, 0, &machine.boot);
        machine.fill_boot_memory();
        machine
    }

    /// Gives the guest this memory, which has to live as long as the machine.
    pub fn show(&self, slot: u32, guest: u64, view: &Mapping) {
        // SAFETY: as the caller sees to.
        unsafe { self.vm.set_user_memory_region(memslot(slot, guest, view)) }.unwrap();
    }

    /// Writes to the resident memory.
    pub fn poke(&self, address: u64, bytes: &[u8]) {
        self.boot.write_at(address, bytes).unwrap();
    }

    /// Puts code where vCPUs enter, and behind it that it is done.
    pub fn load(&self, code: &[u8]) {
        // out DONE, al; jmp to itself
        self.poke(CODE, &[code, &[0xe6, DONE as u8, 0xeb, 0xfe]].concat());
    }

    fn poke_word(&self, address: u64, word: u64) {
        self.poke(address, &word.to_le_bytes());
    }

    fn fill_boot_memory(&self) {
        // 1 GiB one to one, for everybody.
        self.poke_word(ROOT, MIDDLE | 0b111);
        self.poke_word(MIDDLE, TABLE | 0b111);
        for entry in 0..512 {
            self.poke_word(TABLE + 8 * entry, entry << 21 | 1 << 7 | 0b111);
        }
        let task_low = 0x67 | (TASK & 0xff_ffff) << 16 | 0x8b << 40 | (TASK >> 24 & 0xff) << 56;
        for (selector, descriptor) in [
            (CODE_0, 0x00af_9b00_0000_ffff),
            (DATA_0, 0x00cf_9300_0000_ffff),
            (DATA_3, 0x00cf_f300_0000_ffff),
            (CODE_3, 0x00af_fb00_0000_ffff),
            (TASK_STATE, task_low),
            (TASK_STATE + 8, TASK >> 32),
        ] {
            self.poke_word(DESCRIPTORS + u64::from(selector & !7), descriptor);
        }
        // The stack that a handler gets when it interrupts ring 3.
        self.poke(TASK + 4, &STACK.to_le_bytes());
        for vector in 0..32 {
            let handler = HANDLERS + 16 * vector;
            let low = handler & 0xffff | u64::from(CODE_0) << 16 | 0x8e << 40 | handler >> 16 << 48;
            self.poke_word(VECTORS + 16 * vector, low);
            self.poke_word(VECTORS + 16 * vector + 8, handler >> 32);
            // mov al, vector; out VECTOR, al; hlt
            self.poke(handler, &[0xb0, vector as u8, 0xe6, VECTOR as u8, 0xf4]);
        }
    }
}

/// Where the guest has this offset of its paged memory.
pub fn at(offset: u64) -> u64 {
    BASE + offset
}

/// Sets a register of the vCPU's; false when KVM refuses.
pub fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).is_ok_and(|count| count == 1)
}

pub fn msr(vcpu: &VcpuFd, index: u32) -> u64 {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1, "{index:#x}");
    msrs.as_slice()[0].data
}

pub struct Vcpu {
    pub fd: VcpuFd,
    pub pager: VcpuPager,
}

/// Registers at the beginning of a program, all others being zero.
#[derive(Copy, Clone, Default)]
pub struct Registers {
    pub rax: u64,
    pub rcx: u64,
    pub rsi: u64,
    pub rdi: u64,
}

/// A vCPU whose memory nobody pages.
pub struct Bare(pub VcpuFd);

impl Bare {
    /// Runs this code, which ends by saying that it is done.
    #[track_caller]
    pub fn execute(&mut self, machine: &Machine, ring: Ring, code: &[u8], registers: Registers) {
        machine.load(code);
        enter(&self.0, ring, CODE, registers);
        self.finish(&mut || panic!("its ring is full"));
    }

    /// Runs until the program says that it is done; `full` empties the ring.
    #[track_caller]
    pub fn finish(&mut self, full: &mut dyn FnMut()) {
        loop {
            match self.0.run() {
                Ok(VcpuExit::IoOut(DONE, _)) => return,
                Ok(VcpuExit::Unsupported(tracker::RING_FULL)) => full(),
                other => panic!("the program did not end: {other:?}"),
            }
        }
    }
}

/// Puts the vCPU to this address in 64-bit mode.
pub fn enter(fd: &VcpuFd, ring: Ring, rip: u64, registers: Registers) {
    let mut system = fd.get_sregs().unwrap();
    let (code, data, level) = match ring {
        Ring::Zero => (CODE_0, DATA_0, 0),
        Ring::Three => (CODE_3, DATA_3, 3),
    };
    let data = kvm_segment {
        limit: u32::MAX,
        selector: data,
        type_: 3,
        present: 1,
        dpl: level,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    (system.ds, system.es, system.ss, system.fs, system.gs) = (data, data, data, data, data);
    system.cs = kvm_segment { selector: code, type_: 11, l: 1, db: 0, ..data };
    system.tr = kvm_segment {
        base: TASK,
        limit: 0x67,
        selector: TASK_STATE,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (system.gdt.base, system.gdt.limit) = (DESCRIPTORS, 0x37);
    (system.idt.base, system.idt.limit) = (VECTORS, 32 * 16 - 1);
    system.cr3 = ROOT;
    system.cr4 |= 1 << 6 | 1 << 5; // MCE, PAE
    system.cr0 |= 1 << 31 | 1 << 5 | 1; // PG, NE, PE
    system.efer |= 1 << 10 | 1 << 8; // LMA, LME
    fd.set_sregs(&system).unwrap();
    let Registers { rax, rcx, rsi, rdi } = registers;
    let registers = kvm_regs {
        rip,
        rax,
        rcx,
        rsi,
        rdi,
        rsp: STACK - 512,
        rflags: 3 << 12 | 2, // IOPL 3
        ..Default::default()
    };
    fd.set_regs(&registers).unwrap();
}

impl Vcpu {
    /// Puts the vCPU to this address in 64-bit mode.
    pub fn enter(&self, ring: Ring, rip: u64, registers: Registers) {
        enter(&self.fd, ring, rip, registers);
    }

    /// Prepares this code, which ends by itself or by saying that it is done.
    pub fn prepare(&self, guest: &Guest, ring: Ring, code: &[u8], registers: Registers) {
        guest.load(code);
        self.enter(ring, CODE, registers);
    }

    /// Runs until the program says that it is done, which it must, and returns its registers.
    #[track_caller]
    pub fn finish(&mut self) -> kvm_regs {
        match self.pager.run(&mut self.fd) {
            Ok(Exit::Kvm(VcpuExit::IoOut(DONE, _))) => self.fd.get_regs().unwrap(),
            other => panic!("the program did not end: {other:?}"),
        }
    }

    /// [`prepare`](Self::prepare) and [`finish`](Self::finish).
    #[track_caller]
    pub fn execute(
        &mut self,
        guest: &Guest,
        ring: Ring,
        code: &[u8],
        registers: Registers,
    ) -> kvm_regs {
        self.prepare(guest, ring, code, registers);
        self.finish()
    }

    /// Reads the word at this offset of the paged memory.
    #[track_caller]
    pub fn read(&mut self, guest: &Guest, ring: Ring, offset: u64) -> u64 {
        let registers = Registers { rdi: at(offset), ..Registers::default() };
        // mov rax, [rdi]
        self.execute(guest, ring, &[0x48, 0x8b, 0x07], registers).rax
    }
}
