//! What the guest was told of the processor, and whether this host has it.

use std::io;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;

use super::{StateError, VcpuPart, parts::MAX_CPUID};

/// Words of an entry: function, index, flags, EAX, EBX, ECX, EDX, padding.
type Words = [u32; 10];

fn words(entry: &kvm_cpuid_entry2) -> Words {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding } = *entry;
    let [a, b, c] = padding;
    [function, index, flags, eax, ebx, ecx, edx, a, b, c]
}

fn entry(bytes: &[u8]) -> kvm_cpuid_entry2 {
    let mut words: Words = [0; 10];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    }
    let [function, index, flags, eax, ebx, ecx, edx, a, b, c] = words;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [a, b, c] }
}

fn read(vcpu: &VcpuFd) -> Result<CpuId, io::Error> {
    vcpu.get_cpuid2(MAX_CPUID).map_err(io::Error::from)
}

pub(super) fn save(vcpu: &VcpuFd) -> Result<Vec<u8>, StateError> {
    let cpuid = read(vcpu).map_err(StateError::save(VcpuPart::Cpuid))?;
    Ok(cpuid.as_slice().iter().flat_map(words).flat_map(u32::to_le_bytes).collect())
}

/// Tells the vCPU of the processor, unless it has been told the same: once it has run, KVM lets
/// nothing be changed.
pub(super) fn restore(vcpu: &VcpuFd, supported: &CpuId, bytes: &[u8]) -> Result<(), StateError> {
    let refused = |source| StateError::Refused { part: VcpuPart::Cpuid.name(), source };
    let entries: Vec<_> = bytes.chunks_exact(size_of::<Words>()).map(entry).collect();
    // A vCPU that has never been told anything has no entries, which KVM reports in several ways.
    // And where the guest finds out by itself (PVM), what KVM says of a vCPU is more than it says
    // it has.
    let here = read(vcpu).ok();
    let here = here.as_ref().map_or(&[][..], CpuId::as_slice);
    if here == entries {
        return Ok(());
    }
    for (leaf, index, register, bits) in CHECKED {
        let of = |entries| find(entries, leaf, index).map_or(0, register.of);
        let missing = bits & of(&entries) & !(of(supported.as_slice()) | of(here));
        if missing != 0 {
            return Err(StateError::Feature { leaf, index, register: register.name, missing });
        }
    }
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|_| refused(io::Error::from_raw_os_error(libc::E2BIG)))?;
    vcpu.set_cpuid2(&cpuid).map_err(|error| refused(error.into()))
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| (entry.function, entry.index) == (leaf, index))
}

#[derive(Copy, Clone)]
struct Register {
    name: &'static str,
    of: fn(&kvm_cpuid_entry2) -> u32,
}

const EAX: Register = Register { name: "EAX", of: |entry| entry.eax };
const EBX: Register = Register { name: "EBX", of: |entry| entry.ebx };
const ECX: Register = Register { name: "ECX", of: |entry| entry.ecx };
const EDX: Register = Register { name: "EDX", of: |entry| entry.edx };

/// Leaves of features: subleaf, register, and the bits that are features of the processor. Not such
/// are those that follow what the guest has turned on (OSXSAVE, OSPKE), that KVM makes itself
/// without saying so here (the deadline of the APIC's timer, MWAIT as a no-operation), that there
/// is a hypervisor, and that tell of the
/// machine's topology. Sources: Intel's manual, volume 2, "CPUID"; AMD's, volume 3, appendix E.
const CHECKED: [(u32, u32, Register, u32); 11] = [
    (1, 0, ECX, !(1 << 31 | 1 << 27 | 1 << 24 | 1 << 3)),
    (1, 0, EDX, !(1 << 28)),
    (7, 0, EBX, !0),
    (7, 0, ECX, !(1 << 4)),
    (7, 0, EDX, !0),
    (7, 1, EAX, !0),
    (0xd, 0, EAX, !0),
    (0xd, 0, EDX, !0),
    (0xd, 1, EAX, !0),
    (0x8000_0001, 0, ECX, !(1 << 22 | 1 << 1)),
    (0x8000_0001, 0, EDX, !0),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_the_same_afterwards() {
        let first = kvm_cpuid_entry2 {
            function: 0x8000_0001,
            index: 2,
            flags: 3,
            eax: 4,
            ebx: 5,
            ecx: 6,
            edx: 7,
            padding: [8, 9, 10],
        };
        let bytes: Vec<u8> = words(&first).into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!(bytes.len(), size_of::<kvm_cpuid_entry2>());
        assert_eq!(entry(&bytes), first);
    }
}
