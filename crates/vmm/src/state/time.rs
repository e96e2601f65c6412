//! The time stamp counters.

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{
    StateError, VcpuPart, ioctl,
    msrs::{self, TSC},
    parts::TSC_BYTES,
};

/// What is saved of a vCPU's time stamp counter.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
struct Tsc {
    /// 0 if KVM does not say.
    khz: u32,
    value: u64,
    offset: Option<u64>,
}

const OFFSET_KNOWN: u32 = 1;

impl Tsc {
    fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        let value = msrs::one(vcpu, TSC)?.ok_or(io::ErrorKind::Unsupported)?;
        let offset = ioctl::get_tsc_offset(ioctl::fd(vcpu))?;
        Ok(Self { khz: vcpu.get_tsc_khz().unwrap_or(0), value, offset })
    }

    fn encode(self) -> Vec<u8> {
        let flags = if self.offset.is_some() { OFFSET_KNOWN } else { 0 };
        let mut bytes = Vec::with_capacity(TSC_BYTES);
        bytes.extend(self.khz.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(self.offset.unwrap_or(0).to_le_bytes());
        bytes
    }

    /// Of bytes whose length has been checked.
    fn decode(bytes: &[u8]) -> Self {
        let half =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let whole = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        let offset = (half(4) & OFFSET_KNOWN != 0).then(|| whole(16));
        Self { khz: half(0), value: whole(8), offset }
    }
}

pub(super) fn save(vcpu: &VcpuFd) -> Result<Vec<u8>, StateError> {
    Tsc::of(vcpu).map(Tsc::encode).map_err(StateError::save(VcpuPart::Tsc))
}

/// How the counters are restored: the first vCPU's goes on from what it was, and the others keep
/// their distance to it.
#[derive(Debug, Default)]
pub(super) struct Times {
    /// What is added to every offset, modulo 2^64.
    shift: Option<u64>,
}

impl Times {
    pub(super) fn restore(&mut self, vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), StateError> {
        let refused = |source| StateError::Refused { part: VcpuPart::Tsc.name(), source };
        let saved = Tsc::decode(bytes);
        let khz = vcpu.get_tsc_khz().ok();
        if saved.khz != 0 && khz != Some(saved.khz) {
            vcpu.set_tsc_khz(saved.khz).map_err(|error| StateError::TscFrequency {
                wanted: saved.khz,
                here: khz,
                source: error.into(),
            })?;
        }
        let here = Tsc::of(vcpu).map_err(refused)?;
        let (Some(offset_then), Some(offset_here)) = (saved.offset, here.offset) else {
            // KVM takes values that are less than a second apart for one time, so that the counters
            // of a machine's vCPUs stay synchronized.
            let entry = kvm_msr_entry { index: TSC, data: saved.value, ..Default::default() };
            let msrs = Msrs::from_entries(&[entry]).expect("one entry");
            return match vcpu.set_msrs(&msrs) {
                Ok(1) => Ok(()),
                Ok(_) => Err(StateError::Register {
                    index: TSC,
                    wanted: saved.value,
                    here: Some(here.value),
                }),
                Err(error) => Err(refused(error.into())),
            };
        };
        // Time passes until the offset is set, by which the guest's is later, and never earlier.
        let shift = *self.shift.get_or_insert_with(|| {
            let wanted = offset_here.wrapping_add(saved.value.wrapping_sub(here.value));
            wanted.wrapping_sub(offset_then)
        });
        ioctl::set_tsc_offset(ioctl::fd(vcpu), offset_then.wrapping_add(shift)).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read() {
        for offset in [None, Some(0), Some(u64::MAX - 5)] {
            let tsc = Tsc { khz: 2_400_000, value: 0x1234_5678_9abc_def0, offset };
            let bytes = tsc.encode();
            assert_eq!(bytes.len(), TSC_BYTES);
            assert_eq!(Tsc::decode(&bytes), tsc);
        }
    }
}
