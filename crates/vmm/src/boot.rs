//! The guest's boot memory: a small region at guest-physical 0 that is never paged, with all that
//! the processor reads by itself. It is loaded through the guest memory, as a boot loader does.
//!
//! | address | what |
//! |---|---|
//! | 0x1000 | GDT: code and data of both rings, a TSS for each vCPU |
//! | 0x2000 | IDT: the payload's handlers |
//! | 0x3000 | the payload |
//! | 0x5000 | PML4; 0x6000: PDPT, one entry for each GiB |
//! | 0x10000 | for each vCPU: parameters and TSS, report, stack, a page each |
//! | 0x200000 | page directories, if pages are 2 MiB: one page for each GiB |
//! | behind | tables of the order Zipf |
//!
//! Everything is mapped 1:1, and user code may access it all. Page tables that are always there are
//! what lets a host with shadow paging, where KVM itself reads them, deliver faults as exits.

pub(crate) mod saved;

use std::sync::Arc;

use pageferry_memory::{Backing, GuestAddress, Region, RegionConfig, Thp};
use vm_memory::Bytes;

use crate::{
    GuestMemory, Operation, Order, Ring, VmConfig, VmError,
    pattern::WRITTEN,
    payload::{self, PORT_EXCEPTION, Parameters, REPORT_WORDS, ReportPage, TIME_BUCKETS},
    plan::{self, HIGH_BASE, LOW_BASE, Plan, VcpuPlan},
};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const CODE: u64 = 0x3000;
const CODE_END: u64 = PML4;
const PML4: u64 = 0x5000;
const PDPT: u64 = 0x6000;
const VCPUS: u64 = 0x1_0000;
const PAGES_PER_VCPU: u64 = 3;
const DIRECTORIES: u64 = 0x20_0000;

/// Entries of the PDPT, of a GiB each, less what is below the high part.
pub(crate) const MAX_MEMORY: u64 = 512 * GIB - HIGH_BASE;
/// Up to here the guest's pages are 2 MiB; with more memory, 1 GiB.
const MAX_DIRECTORIES: u64 = 64;

const PRESENT_WRITABLE_USER: u64 = 0b111;
const LARGE: u64 = 1 << 7;

/// Selectors in the GDT. The order is that of `descriptors`.
pub(crate) const CODE_0: u16 = 0x08;
pub(crate) const DATA_0: u16 = 0x10;
pub(crate) const DATA_3: u16 = 0x18 | 3;
pub(crate) const CODE_3: u16 = 0x20 | 3;
const TSS: u16 = 0x30;
/// Behind the TSS proper, a bit for each I/O port, clear up to the payload's, and a byte of ones.
const IO_BITMAP: u64 = 104;
const TSS_BYTES: u64 = IO_BITMAP + PORT_EXCEPTION as u64 / 8 + 2;
/// In the page of parameters.
const TSS_OFFSET: u64 = 0x800;

/// Where a vCPU begins.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) instruction: u64,
    pub(crate) parameters: u64,
    pub(crate) stack: u64,
    pub(crate) ring: Ring,
    pub(crate) page_tables: u64,
    pub(crate) gdt: (u64, u16),
    pub(crate) idt: (u64, u16),
    pub(crate) task: Task,
}

/// The TSS of a vCPU.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Task {
    pub(crate) selector: u16,
    pub(crate) base: u64,
    pub(crate) limit: u32,
}

/// What there is in the boot memory besides what always is.
#[derive(Copy, Clone, Debug)]
struct Extent {
    /// GiB that the guest has mapped.
    gibs: u64,
    large_gib: bool,
    /// Where the tables of the order Zipf begin.
    tables: u64,
    end: u64,
}

impl Extent {
    fn of(config: &VmConfig, plan: &Plan) -> Result<Self, VmError> {
        let end = if plan.split.high > 0 { HIGH_BASE + plan.split.high } else { HIGH_BASE };
        let gibs = end.div_ceil(GIB);
        let large_gib = gibs > MAX_DIRECTORIES;
        let tables = DIRECTORIES + if large_gib { 0 } else { gibs * PAGE };
        let all_tables: u64 = (0..config.vcpus).map(|vcpu| table_bytes(plan, vcpu)).sum();
        if tables + all_tables > LOW_BASE {
            return Err(VmError::Config {
                why: format!("tables of {all_tables:#x} bytes do not fit the boot memory"),
            });
        }
        Ok(Self { gibs, large_gib, tables, end: tables + all_tables })
    }
}

/// Of the vCPU's table of units.
fn table_bytes(plan: &Plan, vcpu: u16) -> u64 {
    match plan.vcpu(vcpu).order {
        Order::Zipf => (4 * plan.vcpu(vcpu).touches).next_multiple_of(PAGE),
        Order::Sequential | Order::Random => 0,
    }
}

/// Makes the boot memory, all of it there.
pub(crate) fn region(config: &VmConfig, plan: &Plan) -> Result<Arc<Region>, VmError> {
    let mut shape = RegionConfig::new(Extent::of(config, plan)?.end, Backing::Anonymous);
    shape.thp = Thp::Default;
    let region = Region::new(&shape)?;
    region.page_map().set_present(region.all_granules());
    Ok(Arc::new(region))
}

/// What is in the boot memory.
#[derive(Debug)]
pub(crate) struct Boot {
    memory: GuestMemory,
    extent: Extent,
    ring: Ring,
    operation: u64,
}

impl Boot {
    /// Fills the boot memory, which is part of `memory`.
    pub(crate) fn load(
        config: &VmConfig,
        plan: &Plan,
        memory: GuestMemory,
    ) -> Result<Self, VmError> {
        let extent = Extent::of(config, plan)?;
        let operation = match config.payload.operation {
            Operation::ReadVerify => payload::OPERATION_READ,
            Operation::Write => payload::OPERATION_WRITE,
            Operation::ReadModifyWrite => payload::OPERATION_MODIFY,
            Operation::Count => payload::OPERATION_COUNT,
        };
        let boot = Self { memory, extent, ring: config.payload.ring, operation };
        boot.write_page_tables();
        boot.write_descriptors(config.vcpus);
        let code = payload::code();
        assert!(code.len() as u64 <= CODE_END - CODE, "the payload fits its pages");
        boot.write(CODE, code);
        let mut table = extent.tables;
        for vcpu in 0..config.vcpus {
            boot.write_parameters(config, plan, vcpu, table);
            if plan.vcpu(vcpu).order == Order::Zipf {
                let units: Vec<u8> =
                    plan.units(vcpu).flat_map(|unit| (unit as u32).to_le_bytes()).collect();
                boot.write(table, &units);
                table += table_bytes(plan, vcpu);
            }
        }
        Ok(boot)
    }

    /// All addresses here are this module's own.
    fn write(&self, address: u64, bytes: &[u8]) {
        let address = GuestAddress::new(address).into();
        self.memory.write_slice(bytes, address).expect("inside the boot memory");
    }

    fn write_words(&self, address: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write(address, &bytes);
    }

    fn write_page_tables(&self) {
        self.write_words(PML4, &[PDPT | PRESENT_WRITABLE_USER]);
        for gib in 0..self.extent.gibs {
            self.map_gib(gib, gib * GIB);
        }
    }

    /// Maps a GiB of the guest's linear addresses to what is at `physical`.
    fn map_gib(&self, gib: u64, physical: u64) {
        let entry = PDPT + 8 * gib;
        if self.extent.large_gib {
            self.write_words(entry, &[physical | LARGE | PRESENT_WRITABLE_USER]);
            return;
        }
        let directory = DIRECTORIES + gib * PAGE;
        let pages: Vec<u64> = (0..512)
            .map(|page| (physical + (page << 21)) | LARGE | PRESENT_WRITABLE_USER)
            .collect();
        self.write_words(directory, &pages);
        self.write_words(entry, &[directory | PRESENT_WRITABLE_USER]);
    }

    /// Maps the linear addresses from `linear` on to what is at `physical`; both, and the length
    /// once rounded up, are whole GiB.
    pub(crate) fn remap(&self, linear: GuestAddress, len: u64, physical: GuestAddress) {
        for gib in 0..len.div_ceil(GIB) {
            self.map_gib(linear.get() / GIB + gib, physical.get() + gib * GIB);
        }
    }

    fn write_descriptors(&self, vcpus: u16) {
        // Intel's manual, volume 3, section 3.4.5: present, code or data, accessed.
        let flat = |access: u64, long: u64| 0xffff | 0xf << 48 | access << 40 | long << 52;
        let (read_write, execute_read) = (0x93, 0x9b);
        let user = 3 << 5;
        let (wide, long) = (0xc, 0xa);
        self.write_words(
            GDT,
            &[
                0,
                flat(execute_read, long),
                flat(read_write, wide),
                flat(read_write | user, wide),
                flat(execute_read | user, long),
            ],
        );
        for vcpu in 0..vcpus {
            let Task { selector, base, limit } = task(vcpu);
            let busy_tss = 0x8b;
            let low = u64::from(limit) & 0xffff
                | (base & 0xff_ffff) << 16
                | busy_tss << 40
                | (base >> 24 & 0xff) << 56;
            self.write_words(GDT + u64::from(selector), &[low, base >> 32]);
            // RSP0, where an exception in ring 3 finds its stack.
            self.write_words(base + 4, &[stack(vcpu)]);
            // Besides IOPL 3: on PVM, `out` in ring 3 is #GP with that alone if KVM_SET_REGS set
            // it.
            self.write(base + 102, &(IO_BITMAP as u16).to_le_bytes());
            self.write(base + TSS_BYTES - 1, &[0xff]);
        }
        for (index, vector) in payload::VECTORS.into_iter().enumerate() {
            let handler = CODE + payload::handler_offset(index) as u64;
            let interrupt_gate = 0x8e;
            let low = handler & 0xffff
                | u64::from(CODE_0) << 16
                | interrupt_gate << 40
                | (handler >> 16 & 0xffff) << 48;
            self.write_words(IDT + 16 * u64::from(vector), &[low, handler >> 32]);
        }
    }

    fn write_parameters(&self, config: &VmConfig, plan: &Plan, vcpu: u16, table: u64) {
        let payload = &config.payload;
        let VcpuPlan { order, first, touches, permutation } = *plan.vcpu(vcpu);
        let parameters = Parameters {
            own_address: parameters(vcpu),
            report_address: report(vcpu),
            operation: self.operation,
            order: match order {
                Order::Sequential => payload::ORDER_SEQUENTIAL,
                Order::Random => payload::ORDER_RANDOM,
                Order::Zipf => payload::ORDER_TABLE,
            },
            // A table has the numbers as they are.
            first: if order == Order::Zipf { 0 } else { first },
            touches,
            rounds: payload.rounds,
            progress_every: payload.units_between_exits(config.vcpus),
            unit_shift: plan.unit.shift().into(),
            stride: plan.unit.bytes() / plan::SPREAD_WORDS,
            last: plan.unit.bytes() - 8,
            low_units: plan.split.low / plan.unit.bytes(),
            low_base: LOW_BASE,
            high_base: HIGH_BASE.wrapping_sub(plan.split.low),
            zero_mask: payload.pattern.zero_mask(),
            written: WRITTEN,
            accepted: if plan::revisits(config) { WRITTEN } else { 0 },
            permutation_count: permutation.count,
            permutation_mask: permutation.mask,
            permutation_factor: permutation.factor,
            permutation_addend: permutation.addend,
            permutation_shift: permutation.shift,
            permutation_mixer: permutation.mixer,
            permutation_start: permutation.start,
            table,
            stray: payload.stray.map_or(0, GuestAddress::get),
        };
        self.write_words(self::parameters(vcpu), &<[u64; _]>::from(parameters));
    }

    /// Clears what the vCPU reported, and says where it begins.
    pub(crate) fn prepare(&self, vcpu: u16) -> Entry {
        self.write(report(vcpu), &[0; PAGE as usize]);
        Entry {
            instruction: CODE,
            parameters: parameters(vcpu),
            stack: stack(vcpu),
            ring: self.ring,
            page_tables: PML4,
            gdt: (GDT, PAGE as u16 - 1),
            idt: (IDT, PAGE as u16 - 1),
            task: task(vcpu),
        }
    }

    /// What the vCPU reported so far, with the histogram of its times.
    pub(crate) fn report(&self, vcpu: u16) -> (ReportPage, Vec<u64>) {
        let mut bytes = [0; 8 * (REPORT_WORDS + TIME_BUCKETS)];
        let address = GuestAddress::new(report(vcpu)).into();
        self.memory.read_slice(&mut bytes, address).expect("inside the boot memory");
        let mut words = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        let page: [u64; REPORT_WORDS] =
            std::array::from_fn(|_| words.next().expect("as many words as were read"));
        (page.into(), words.collect())
    }
}

fn vcpu_page(vcpu: u16, page: u64) -> u64 {
    VCPUS + (u64::from(vcpu) * PAGES_PER_VCPU + page) * PAGE
}

fn parameters(vcpu: u16) -> u64 {
    vcpu_page(vcpu, 0)
}

fn report(vcpu: u16) -> u64 {
    vcpu_page(vcpu, 1)
}

/// The end of the stack's page: it grows downwards.
fn stack(vcpu: u16) -> u64 {
    vcpu_page(vcpu, 3)
}

fn task(vcpu: u16) -> Task {
    Task {
        selector: TSS + 16 * vcpu,
        base: parameters(vcpu) + TSS_OFFSET,
        limit: TSS_BYTES as u32 - 1,
    }
}
