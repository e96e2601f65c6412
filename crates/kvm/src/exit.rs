//! Which exits are about paging. This is where a kernel's own paging exits plug in.

use kvm_ioctls::{Error, VcpuExit};
use pageferry_memory::GuestAddress;

use crate::slots::{Place, Snapshot};

/// What an end of KVM_RUN is about.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum ExitKind {
    /// A signal waits: perhaps the SIGBUS of a marker.
    Signal,
    /// Another exit overtook the end for a signal.
    PerhapsSignal,
    /// KVM could not access guest memory on behalf of an instruction that it emulates.
    Access { guest: GuestAddress, write: bool },
    /// KVM could not emulate an instruction: perhaps not fetch it.
    InternalError,
    /// KVM says that it could not use the memory at this guest address.
    MemoryFault { place: Place, guest: GuestAddress },
    /// Nothing that concerns paging.
    Other,
}

impl ExitKind {
    pub(crate) fn of(result: &Result<VcpuExit<'_>, Error>, slots: &Snapshot) -> Self {
        let find = |guest: u64| slots.find(GuestAddress::new(guest));
        match result {
            Err(error) if error.errno() == libc::EINTR => Self::Signal,
            // With an interrupt controller in user space this one is looked for before signals are.
            Ok(VcpuExit::IrqWindowOpen) => Self::PerhapsSignal,
            &Ok(VcpuExit::MmioRead(guest, _)) if find(guest).is_some() => {
                Self::Access { guest: GuestAddress::new(guest), write: false }
            }
            &Ok(VcpuExit::MmioWrite(guest, _)) if find(guest).is_some_and(|at| !at.read_only) => {
                Self::Access { guest: GuestAddress::new(guest), write: true }
            }
            Ok(VcpuExit::InternalError) => Self::InternalError,
            &Ok(VcpuExit::MemoryFault { gpa, .. }) => match find(gpa) {
                Some(place) => Self::MemoryFault { place, guest: GuestAddress::new(gpa) },
                None => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pageferry_memory::{Backing, Layout, Region, RegionConfig, RegionId};

    use super::*;
    use crate::{Slot, Slots};

    #[test]
    fn only_what_concerns_our_memory_is_taken() {
        let region = Arc::new(Region::new(&RegionConfig::new(0x3000, Backing::Anonymous)).unwrap());
        let slots = Slots::new(&Layout::new(vec![region]).unwrap());
        let slot = |guest, offset, read_only| Slot {
            guest: GuestAddress::new(guest),
            len: 0x1000,
            region: RegionId::new(0),
            offset,
            read_only,
        };
        slots.set(0, slot(0x1_0000, 0, false)).unwrap();
        slots.set(1, slot(0x2_0000, 0x2000, true)).unwrap();
        let slots = slots.snapshot();
        fn of(result: Result<VcpuExit<'_>, Error>, slots: &Snapshot) -> ExitKind {
            ExitKind::of(&result, slots)
        }
        let access = |guest, write| ExitKind::Access { guest: GuestAddress::new(guest), write };

        assert_eq!(of(Err(Error::new(libc::EINTR)), &slots), ExitKind::Signal);
        assert_eq!(of(Err(Error::new(libc::EFAULT)), &slots), ExitKind::Other);
        assert_eq!(of(Ok(VcpuExit::IrqWindowOpen), &slots), ExitKind::PerhapsSignal);
        assert_eq!(of(Ok(VcpuExit::InternalError), &slots), ExitKind::InternalError);
        assert_eq!(of(Ok(VcpuExit::Hlt), &slots), ExitKind::Other);
        for (guest, reads, writes) in [
            (0xffff, false, false),
            (0x1_0000, true, true),
            (0x1_0fff, true, true),
            (0x1_1000, false, false),
            // What the guest may not write is written by the embedder.
            (0x2_0008, true, false),
        ] {
            let expected = |ours, write| if ours { access(guest, write) } else { ExitKind::Other };
            let read = of(Ok(VcpuExit::MmioRead(guest, &mut [0; 8])), &slots);
            assert_eq!(read, expected(reads, false), "{guest:#x}");
            let write = of(Ok(VcpuExit::MmioWrite(guest, &[0; 8])), &slots);
            assert_eq!(write, expected(writes, true), "{guest:#x}");
            let fault =
                of(Ok(VcpuExit::MemoryFault { flags: 0, gpa: guest, size: 0x1000 }), &slots);
            assert_eq!(matches!(fault, ExitKind::MemoryFault { .. }), reads, "{guest:#x}");
        }
    }
}
