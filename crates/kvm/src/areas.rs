//! Areas of guest memory that KVM writes by itself, from outside any fault.
//! Source: `Documentation/virt/kvm/x86/msr.rst`; Hyper-V top-level functional specification.

use kvm_ioctls::VcpuFd;
use pageferry_memory::GuestAddress;
use pageferry_paging::Resolved;

use crate::{KvmError, VcpuPager, sys, vcpu::Thread};

/// A register that names an area.
struct Register {
    msr: u32,
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

const REGISTERS: [Register; 11] = [
    register(0x4b56_4d01, "kvmclock", (1, 1), 32),
    register(0x12, "kvmclock (old)", (1, 1), 32),
    register(0x4b56_4d00, "wall clock", (0, 0), 12),
    register(0x11, "wall clock (old)", (0, 0), 12),
    register(0x4b56_4d02, "asynchronous page faults", (1, 0x3f), 64),
    register(0x4b56_4d03, "stolen time", (1, 0x3f), 64),
    register(0x4b56_4d04, "end of interrupt", (1, 0b11), 4),
    register(0x4000_0021, "Hyper-V reference time", (1, 0xfff), 4096),
    register(0x4000_0073, "Hyper-V virtual processor assist", (1, 0xfff), 4096),
    register(0x4000_0082, "Hyper-V event flags", (1, 0xfff), 4096),
    register(0x4000_0083, "Hyper-V messages", (1, 0xfff), 4096),
];

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
    for Register { msr, area, enabled, address, len } in REGISTERS {
        // A vCPU without the feature has no such register.
        let Some(value) = sys::msr(vcpu, msr) else { continue };
        if value == 0 || value & enabled != enabled {
            continue;
        }
        let mut at = GuestAddress::new(value & address);
        let Some(end) = at.checked_add(len) else { continue };
        while at < end {
            // Outside of the paged memory it is the embedder's.
            let Some(place) = slots.find(at) else { break };
            match pager.vm.pager.resolve_exit(place.host, interrupted) {
                Resolved::Present | Resolved::NotOurs => {}
                Resolved::Poisoned => return Err(KvmError::AreaPoisoned { area, guest: at }),
                Resolved::Interrupted => return Err(KvmError::Interrupted { area, guest: at }),
            }
            let Some(next) = at.checked_add(place.len) else { break };
            at = next;
        }
    }
    Ok(())
}
