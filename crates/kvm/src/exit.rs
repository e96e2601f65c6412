//! Which exits are about paging. This is where a kernel's own paging exits plug in.

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{Error, VcpuExit};
use pageferry_memory::GuestAddress;

use crate::{
    registers::Write,
    slots::{Place, Snapshot},
};

/// What an end of KVM_RUN is about.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum ExitKind {
    /// A signal waits: perhaps the SIGBUS of a marker.
    Signal,
    /// Another exit, which is the embedder's, overtook the end for a signal.
    PerhapsSignal,
    /// KVM could not access guest memory on behalf of an instruction that it emulates.
    Access { guest: GuestAddress, write: bool },
    /// The guest sets a register that names an area which KVM writes by itself.
    RegisterWrite(Write),
    /// KVM could not emulate an instruction: perhaps not fetch it.
    InternalError,
    /// KVM says that it could not use the memory at this guest address.
    MemoryFault { place: Place, guest: GuestAddress },
    /// The vCPU's dirty ring is full.
    RingFull,
    /// Nothing that concerns paging.
    Other,
}

impl ExitKind {
    /// `registers`: whether such registers are seen to.
    pub(crate) fn of(
        result: &Result<VcpuExit<'_>, Error>,
        slots: &Snapshot,
        registers: bool,
    ) -> Self {
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
            Ok(VcpuExit::X86Wrmsr(exit)) if registers => {
                Write::of(exit).map_or(Self::Other, Self::RegisterWrite)
            }
            Ok(VcpuExit::InternalError) => Self::InternalError,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Self::RingFull,
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

    use kvm_ioctls::{MsrExitReason, WriteMsrExit};
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
            ExitKind::of(&result, slots, true)
        }
        let access = |guest, write| ExitKind::Access { guest: GuestAddress::new(guest), write };

        assert_eq!(of(Err(Error::new(libc::EINTR)), &slots), ExitKind::Signal);
        assert_eq!(of(Err(Error::new(libc::EFAULT)), &slots), ExitKind::Other);
        assert_eq!(of(Ok(VcpuExit::IrqWindowOpen), &slots), ExitKind::PerhapsSignal);
        assert_eq!(of(Ok(VcpuExit::InternalError), &slots), ExitKind::InternalError);
        assert_eq!(of(Ok(VcpuExit::Hlt), &slots), ExitKind::Other);
        let full = Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL));
        assert_eq!(of(full, &slots), ExitKind::RingFull);
        assert_eq!(of(Ok(VcpuExit::Unsupported(0)), &slots), ExitKind::Other);
        for (index, reason, ours) in [
            (0x4b56_4d01, MsrExitReason::Filter, true),
            (0x4b56_4d01, MsrExitReason::Inval, false),
            (0x277, MsrExitReason::Filter, false),
        ] {
            for followed in [true, false] {
                let exit = WriteMsrExit { error: &mut 0, reason, index, data: 1 };
                let kind = ExitKind::of(&Ok(VcpuExit::X86Wrmsr(exit)), &slots, followed);
                let taken = matches!(kind, ExitKind::RegisterWrite(_));
                assert_eq!(taken, ours && followed, "{index:#x} {reason:?}");
            }
        }
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
