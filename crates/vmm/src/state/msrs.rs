//! Model-specific registers.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{StateError, VcpuPart};

/// The time stamp counter: `time.rs` has it.
pub(super) const TSC: u32 = 0x10;
/// Setting one of these writes the time of day to guest memory.
const WALL_CLOCKS: [u32; 2] = [0x11, 0x4b56_4d00];
/// Of Hyper-V's interface: a time since the machine was made, which cannot be set.
const REFERENCE_COUNT: u32 = 0x4000_0020;
/// The deadline of the APIC's timer.
const DEADLINE: u32 = 0x6e0;
const MACHINE_CHECK_CAPABILITIES: u32 = 0x179;
/// Four for each bank.
const MACHINE_CHECK_BANKS: u32 = 0x400;

/// KVM takes this many in one call (MAX_IO_MSRS).
const AT_ONCE: usize = 256;

/// Which to save, of those that KVM names: in the order of restoring.
pub(super) fn indices(named: &[u32]) -> Vec<u32> {
    let left_out = |index: &u32| {
        WALL_CLOCKS.contains(index) || [TSC, REFERENCE_COUNT, DEADLINE].contains(index)
    };
    let mut indices: Vec<u32> = named.iter().copied().filter(|index| !left_out(index)).collect();
    indices.extend(named.iter().find(|index| **index == DEADLINE));
    indices
}

/// One register; `None` when the vCPU does not have it.
pub(super) fn one(vcpu: &VcpuFd, index: u32) -> io::Result<Option<u64>> {
    Ok(read(vcpu, &[index])?.first().map(|(_, data)| *data))
}

/// Registers with their values, without those that the vCPU does not have.
fn read(vcpu: &VcpuFd, mut indices: &[u32]) -> io::Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(indices.len());
    while !indices.is_empty() {
        let some = &indices[..indices.len().min(AT_ONCE)];
        let entries: Vec<_> =
            some.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = from_entries(&entries)?;
        // It stops at the first that it cannot read.
        let got = vcpu.get_msrs(&mut msrs)?;
        values.extend(msrs.as_slice()[..got].iter().map(|entry| (entry.index, entry.data)));
        indices = &indices[(got + usize::from(got < some.len()))..];
    }
    Ok(values)
}

fn from_entries(entries: &[kvm_msr_entry]) -> io::Result<Msrs> {
    Msrs::from_entries(entries).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}

pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u8>, StateError> {
    save_registers(vcpu, indices).map_err(StateError::save(VcpuPart::Msrs))
}

fn save_registers(vcpu: &VcpuFd, indices: &[u32]) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    if let Some(capabilities) = one(vcpu, MACHINE_CHECK_CAPABILITIES)? {
        all.push(MACHINE_CHECK_CAPABILITIES);
        let banks = (capabilities & 0xff) as u32;
        all.extend(MACHINE_CHECK_BANKS..MACHINE_CHECK_BANKS + 4 * banks);
    }
    all.extend(indices);
    let values = read(vcpu, &all)?;
    Ok(values.into_iter().flat_map(|(index, data)| encode(index, data)).collect())
}

fn encode(index: u32, data: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&index.to_le_bytes());
    bytes[8..].copy_from_slice(&data.to_le_bytes());
    bytes
}

/// Sets those that have another value here. Most have the same in every machine, some cannot be
/// set, and setting others does something: what needs not be set is left alone.
pub(super) fn restore(vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), StateError> {
    let refused = |source| StateError::Refused { part: VcpuPart::Msrs.name(), source };
    let wanted: Vec<(u32, u64)> = bytes
        .chunks_exact(16)
        .map(|entry| {
            let index = u32::from_le_bytes(entry[..4].try_into().expect("four bytes"));
            (index, u64::from_le_bytes(entry[8..].try_into().expect("eight bytes")))
        })
        .collect();
    let indices: Vec<u32> = wanted.iter().map(|(index, _)| *index).collect();
    let here = read(vcpu, &indices).map_err(refused)?;
    let mut here = here.into_iter().peekable();
    for (index, wanted) in wanted {
        // They come in the same order, without those that are not there.
        let here = here.next_if(|(here, _)| *here == index).map(|(_, data)| data);
        if here == Some(wanted) || WALL_CLOCKS.contains(&index) {
            continue;
        }
        let entry = kvm_msr_entry { index, data: wanted, ..Default::default() };
        let set = vcpu.set_msrs(&from_entries(&[entry]).map_err(refused)?);
        if set.map_err(|error| refused(error.into()))? != 1 {
            return Err(StateError::Register { index, wanted, here });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_last_and_times_are_left_out() {
        let named = [0x10, 0x6e0, 0x11, 0x174, 0x4b56_4d00, 0x4000_0020, 0x277];
        assert_eq!(indices(&named), [0x174, 0x277, 0x6e0]);
        assert_eq!(indices(&[0x277]), [0x277]);
    }

    #[test]
    fn an_entry_is_kvms() {
        let bytes = encode(0x4b56_4d01, 0x1122_3344_5566_7788);
        assert_eq!(bytes.len(), size_of::<kvm_msr_entry>());
        assert_eq!(bytes[..8], [1, 0x4d, 0x56, 0x4b, 0, 0, 0, 0]);
        assert_eq!(bytes[8..], 0x1122_3344_5566_7788_u64.to_le_bytes());
    }
}
