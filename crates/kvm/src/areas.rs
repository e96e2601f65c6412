//! Areas of guest memory that KVM writes by itself, from outside any fault.
//! Source: `Documentation/virt/kvm/x86/msr.rst`; Hyper-V top-level functional specification.

use kvm_bindings::{KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{
    MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use pageferry_memory::{GuestAddress, HostAddress};
use pageferry_paging::Resolved;

use crate::{KvmError, VcpuPager, slots::Snapshot, sys, vcpu::Thread};

/// A register that names an area.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Register {
    pub(crate) msr: u32,
    area: &'static str,
    /// The bit that turns it on; 0: it is on when there is an address.
    enabled: u64,
    /// The bits that are the address.
    address: u64,
    len: u64,
}

const fn register(
    msr: u32,
    area: &'static str,
    (enabled, low_bits): (u64, u64),
    len: u64,
) -> Register {
    Register { msr, area, enabled, address: !low_bits, len }
}

const REGISTERS: [Register; 12] = [
    register(0x4b56_4d01, "kvmclock", (1, 1), 32),
    register(0x12, "kvmclock (old)", (1, 1), 32),
    register(0x4b56_4d00, "wall clock", (0, 0), 12),
    register(0x11, "wall clock (old)", (0, 0), 12),
    register(0x4b56_4d02, "asynchronous page faults", (1, 0x3f), 64),
    register(0x4b56_4d03, "stolen time", (1, 0x3f), 64),
    register(0x4b56_4d04, "end of interrupt", (1, 0b11), 4),
    register(0x4000_0001, "Hyper-V hypercall page", (1, 0xfff), 4096),
    register(0x4000_0021, "Hyper-V reference time", (1, 0xfff), 4096),
    register(0x4000_0073, "Hyper-V virtual processor assist", (1, 0xfff), 4096),
    register(0x4000_0082, "Hyper-V event flags", (1, 0xfff), 4096),
    register(0x4000_0083, "Hyper-V messages", (1, 0xfff), 4096),
];

/// The registers (MSR numbers) that name areas of guest memory which KVM writes by itself: the
/// clock, the wall clock, asynchronous page faults, stolen time, end of interrupt, and those of
/// Hyper-V. With [`KvmAreas::Follow`](crate::KvmAreas::Follow), a filter of the embedder's own has
/// to deny the guest to write them.
pub const AREA_REGISTERS: [u32; REGISTERS.len()] = {
    let mut numbers = [0; REGISTERS.len()];
    let mut n = 0;
    while n < numbers.len() {
        numbers[n] = REGISTERS[n].msr;
        n += 1;
    }
    numbers
};

/// A guest's pages are at least this large, whatever a granule is.
const PAGE: u64 = 4096;

/// Why an area is not there.
pub(crate) enum Missed {
    Poisoned { guest: GuestAddress, host: HostAddress },
    Interrupted { guest: GuestAddress },
}

impl Register {
    pub(crate) fn of(msr: u32) -> Option<&'static Self> {
        REGISTERS.iter().find(|register| register.msr == msr)
    }

    /// Brings what the area has of the paged memory, if the register has this value. What is
    /// elsewhere is the embedder's.
    pub(crate) fn bring(
        &self,
        value: u64,
        slots: &Snapshot,
        resolve: &mut dyn FnMut(HostAddress) -> Resolved,
    ) -> Result<(), Missed> {
        if value == 0 || value & self.enabled != self.enabled {
            return Ok(());
        }
        let mut at = GuestAddress::new(value & self.address);
        let Some(end) = at.checked_add(self.len) else { return Ok(()) };
        while at < end {
            let place = slots.find(at);
            match place.map(|place| (resolve(place.host), place.host)) {
                None | Some((Resolved::Present | Resolved::NotOurs, _)) => {}
                Some((Resolved::Poisoned, host)) => {
                    return Err(Missed::Poisoned { guest: at, host });
                }
                Some((Resolved::Interrupted, _)) => return Err(Missed::Interrupted { guest: at }),
            }
            let step = place.map_or(PAGE - at.get() % PAGE, |place| place.len);
            let Some(next) = at.checked_add(step) else { break };
            at = next;
        }
        Ok(())
    }
}

/// Brings them, unless it is interrupted.
pub(crate) fn bring(
    pager: &VcpuPager,
    vcpu: &VcpuFd,
    thread: &mut Thread<'_>,
) -> Result<(), KvmError> {
    each(pager, vcpu, &mut || thread.interrupted())
}

/// Brings them, however long it takes.
pub(crate) fn bring_all(pager: &VcpuPager, vcpu: &VcpuFd) -> Result<(), KvmError> {
    each(pager, vcpu, &mut || false)
}

fn each(
    pager: &VcpuPager,
    vcpu: &VcpuFd,
    interrupted: &mut dyn FnMut() -> bool,
) -> Result<(), KvmError> {
    let slots = pager.vm.slots.snapshot();
    for register in &REGISTERS {
        // A vCPU without the feature has no such register.
        let Some(value) = sys::msr(vcpu, register.msr) else { continue };
        let area = register.area;
        register
            .bring(value, &slots, &mut |host| pager.vm.pager.resolve_exit(host, interrupted))
            .map_err(|missed| match missed {
            Missed::Poisoned { guest, .. } => KvmError::AreaPoisoned { area, guest },
            Missed::Interrupted { guest } => KvmError::Interrupted { area, guest },
        })?;
    }
    Ok(())
}

/// Makes the guest's writes of these registers leave KVM_RUN (KVM_EXIT_X86_WRMSR), and no other
/// access of any register.
pub(crate) fn filter(vm: &VmFd) -> Result<(), KvmError> {
    for (cap, name) in [
        (KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR"),
        (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER"),
    ] {
        if vm.check_extension_raw(cap.into()) <= 0 {
            return Err(KvmError::NoRegisterExits { missing: name });
        }
    }
    // One range each: few are neighbours, and there is room for sixteen.
    let ranges = AREA_REGISTERS.map(|base| MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base,
        msr_count: 1,
        bitmap: &[0],
    });
    // In this order: what is denied without leaving is an exception in the guest.
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(MsrExitReason::Filter.bits()), 0, 0, 0],
        ..Default::default()
    })
    .map_err(KvmError::ioctl("KVM_CAP_X86_USER_SPACE_MSR"))?;
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(KvmError::ioctl("KVM_X86_SET_MSR_FILTER"))
}
