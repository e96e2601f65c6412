//! vCPUs as Linux expects them: what they can do, and what is in their registers at first.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::{layout, load::Entry};
use crate::VmError;

/// In leaf 1.
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HYPER_THREADING: u32 = 1 << 28;

/// What this host's KVM can do for a guest, as one vCPU of so many is told. Each is a core of its own
/// in the one package. Source: the kernel's `Documentation/virt/kvm/api.rst`, KVM_GET_SUPPORTED_CPUID,
/// and AMD's and Intel's manuals for the leaves.
pub(crate) fn cpuid(kvm: &Kvm, number: u16, vcpus: u16) -> Result<CpuId, VmError> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let number = u32::from(number);
    let count = u32::from(vcpus);
    let bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                // The local interrupt controller's number, the processors of the package, and what
                // is there of the cache line size.
                entry.ebx = entry.ebx & 0xffff | 1 << bits << 16 | number << 24;
                entry.ecx |= ECX_HYPERVISOR;
                if deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
                if count > 1 {
                    entry.edx |= EDX_HYPER_THREADING;
                }
            }
            // Caches: the first and second shared by nobody, the third by all.
            4 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << bits) - 1) << 26;
            }
            // Levels of the topology: one thread to a core, all cores to the package.
            0xb | 0x1f => {
                (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                    0 => (0, 1, 1 << 8),
                    1 => (bits, count, 2 << 8 | 1),
                    other => (0, 0, other),
                };
                entry.edx = number;
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (number, number, 0),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// Registers that Linux expects firmware to have set, of every vCPU.
pub(crate) fn set_firmware_registers(fd: &VcpuFd) -> Result<(), VmError> {
    const MISC_ENABLE: (u32, u64) = (0x1a0, 1); // fast strings
    const MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6); // enabled, write-back
    for (index, data) in [MISC_ENABLE, MTRR_DEFAULT] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let entries = Msrs::from_entries(&[entry]).expect("one entry is not too many");
        let set = fd.set_msrs(&entries).map_err(VmError::kvm(format!("setting MSR {index:#x}")))?;
        if set == 0 {
            // Not every processor has them, and Linux lives without.
            tracing::debug!("this vCPU has no MSR {index:#x}");
        }
    }
    set_interrupt_inputs(fd)
}

/// As firmware leaves them: input 0 is the old interrupt controllers', input 1 non-maskable.
fn set_interrupt_inputs(fd: &VcpuFd) -> Result<(), VmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const NON_MASKABLE: u32 = 4 << 8;
    const EXTERNAL: u32 = 7 << 8;
    let mut local = fd.get_lapic().map_err(VmError::kvm("KVM_GET_LAPIC"))?;
    for (register, mode) in [(LVT_LINT0, EXTERNAL), (LVT_LINT1, NON_MASKABLE)] {
        let mut word = 0_u32;
        for (index, byte) in local.regs[register..register + 4].iter().enumerate() {
            word |= u32::from(*byte as u8) << (8 * index);
        }
        let word = word & !(7 << 8) | mode;
        for (byte, value) in local.regs[register..].iter_mut().zip(word.to_le_bytes()) {
            *byte = value as _;
        }
    }
    fd.set_lapic(&local).map_err(VmError::kvm("KVM_SET_LAPIC"))
}

/// The first vCPU at the kernel's 64-bit entry. The others wait for its call.
pub(crate) fn set_entry(fd: &VcpuFd, entry: Entry) -> Result<(), VmError> {
    const CR0: u64 = 1 << 31 | 1 << 5 | 1 << 4 | 1; // PG, NE, ET, PE
    const CR4: u64 = 1 << 5; // PAE
    const EFER: u64 = 1 << 10 | 1 << 8; // LMA, LME
    const ALWAYS_SET: u64 = 1 << 1;
    const CODE: u16 = 0x10;
    const DATA: u16 = 0x18;

    let mut system = fd.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    system.cs = kvm_segment { selector: CODE, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: DATA, type_: 0x3, db: 1, ..flat };
    [system.ds, system.es, system.ss, system.fs, system.gs] = [data; 5];
    (system.gdt.base, system.gdt.limit) = (layout::GDT, 4 * 8 - 1);
    (system.idt.base, system.idt.limit) = (0, 0);
    (system.cr0, system.cr3, system.cr4) = (CR0, layout::PAGE_TABLES, CR4);
    system.efer = EFER;
    fd.set_sregs(&system).map_err(VmError::kvm("KVM_SET_SREGS"))?;
    let registers = kvm_regs {
        rip: entry.instruction,
        rsi: layout::ZERO_PAGE,
        rsp: layout::STACK,
        rbp: layout::STACK,
        rflags: ALWAYS_SET,
        ..Default::default()
    };
    fd.set_regs(&registers).map_err(VmError::kvm("KVM_SET_REGS"))
}
