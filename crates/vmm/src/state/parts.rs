//! The parts of a state: their names, their sizes, and the ioctls that read and write them.

use std::{fmt, mem};

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};

use super::ioctl::Request;

/// A part of a vCPU's state, in the order of restoring.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum VcpuPart {
    /// KVM_GET_CPUID2: entries of 40 bytes.
    Cpuid,
    /// The time stamp counter: kHz and flags (bit 0: the offset is known), 32 bits each, the value,
    /// and KVM_VCPU_TSC_OFFSET, 64 bits each.
    Tsc,
    /// KVM_GET_SREGS2.
    Sregs2,
    /// KVM_GET_SREGS, where there is no KVM_GET_SREGS2.
    Sregs,
    /// KVM_GET_REGS.
    Regs,
    /// KVM_GET_XCRS, if the processor has XSAVE.
    Xcrs,
    /// KVM_GET_XSAVE2, or KVM_GET_XSAVE where there is none.
    Xsave,
    /// KVM_GET_FPU, where there is neither.
    Fpu,
    /// KVM_GET_DEBUGREGS.
    DebugRegs,
    /// KVM_GET_LAPIC, if KVM has the machine's interrupt controllers.
    Lapic,
    /// KVM_GET_MSRS of what KVM_GET_MSR_INDEX_LIST names and of the machine-check banks: entries of
    /// 16 bytes.
    Msrs,
    /// KVM_GET_VCPU_EVENTS.
    Events,
    /// KVM_GET_MP_STATE.
    MpState,
}

/// A part of the state of what vCPUs share, in the order of restoring.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum PlatformPart {
    /// KVM_GET_IRQCHIP of the first PIC, if KVM has the machine's interrupt controllers.
    Pic0,
    /// The same of the second.
    Pic1,
    /// The same of the IOAPIC.
    Ioapic,
    /// KVM_GET_PIT2, if KVM has the machine's timer.
    Pit,
    /// KVM_GET_CLOCK.
    Clock,
}

/// How long a part may be, in bytes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) enum Length {
    Exactly(usize),
    Between(usize, usize),
    /// So many bytes each, at least one, at most so many.
    Entries(usize, usize),
}

impl Length {
    pub(super) fn allows(self, len: usize) -> bool {
        match self {
            Self::Exactly(bytes) => len == bytes,
            Self::Between(least, most) => (least..=most).contains(&len) && len.is_multiple_of(4),
            Self::Entries(bytes, most) => {
                len > 0 && len.is_multiple_of(bytes) && len / bytes <= most
            }
        }
    }
}

/// What KVM_GET_CPUID2 gives at most.
pub(super) const MAX_CPUID: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
/// Far more registers than KVM knows.
const MAX_MSRS: usize = 4096;
/// The largest XSAVE area by far: with AMX it has 11 KiB.
const MAX_XSAVE: usize = 64 << 10;

/// Bytes of [`VcpuPart::Tsc`].
pub(super) const TSC_BYTES: usize = 24;

impl VcpuPart {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Cpuid,
        Self::Tsc,
        Self::Sregs2,
        Self::Sregs,
        Self::Regs,
        Self::Xcrs,
        Self::Xsave,
        Self::Fpu,
        Self::DebugRegs,
        Self::Lapic,
        Self::Msrs,
        Self::Events,
        Self::MpState,
    ];

    /// Those of which a vCPU has one.
    pub(super) const ONE_OF: [&'static [Self]; 9] = [
        &[Self::Cpuid],
        &[Self::Tsc],
        &[Self::Sregs2, Self::Sregs],
        &[Self::Regs],
        &[Self::Xsave, Self::Fpu],
        &[Self::DebugRegs],
        &[Self::Msrs],
        &[Self::Events],
        &[Self::MpState],
    ];

    /// Its name in an encoded state.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpuid => "cpuid",
            Self::Tsc => "tsc",
            Self::Sregs2 => "sregs2",
            Self::Sregs => "sregs",
            Self::Regs => "regs",
            Self::Xcrs => "xcrs",
            Self::Xsave => "xsave",
            Self::Fpu => "fpu",
            Self::DebugRegs => "debugregs",
            Self::Lapic => "lapic",
            Self::Msrs => "msrs",
            Self::Events => "events",
            Self::MpState => "mp_state",
        }
    }

    pub(super) const fn length(self) -> Length {
        match self {
            Self::Cpuid => Length::Entries(size_of::<kvm_cpuid_entry2>(), MAX_CPUID),
            Self::Tsc => Length::Exactly(TSC_BYTES),
            Self::Sregs2 => Length::Exactly(size_of::<kvm_sregs2>()),
            Self::Sregs => Length::Exactly(size_of::<kvm_sregs>()),
            Self::Regs => Length::Exactly(size_of::<kvm_regs>()),
            Self::Xcrs => Length::Exactly(size_of::<kvm_xcrs>()),
            Self::Xsave => Length::Between(size_of::<kvm_xsave>(), MAX_XSAVE),
            Self::Fpu => Length::Exactly(size_of::<kvm_fpu>()),
            Self::DebugRegs => Length::Exactly(size_of::<kvm_debugregs>()),
            Self::Lapic => Length::Exactly(size_of::<kvm_lapic_state>()),
            Self::Msrs => Length::Entries(size_of::<kvm_msr_entry>(), MAX_MSRS),
            Self::Events => Length::Exactly(size_of::<kvm_vcpu_events>()),
            Self::MpState => Length::Exactly(size_of::<kvm_mp_state>()),
        }
    }

    /// The ioctls that read and write it; `None`: it takes more than one.
    pub(super) const fn requests(self) -> Option<(Request, Request)> {
        let (get, set, bytes) = match self {
            Self::Cpuid | Self::Tsc | Self::Xsave | Self::Msrs => return None,
            Self::Sregs2 => (0xcc, 0xcd, size_of::<kvm_sregs2>()),
            Self::Sregs => (0x83, 0x84, size_of::<kvm_sregs>()),
            Self::Regs => (0x81, 0x82, size_of::<kvm_regs>()),
            Self::Xcrs => (0xa6, 0xa7, size_of::<kvm_xcrs>()),
            Self::Fpu => (0x8c, 0x8d, size_of::<kvm_fpu>()),
            Self::DebugRegs => (0xa1, 0xa2, size_of::<kvm_debugregs>()),
            Self::Lapic => (0x8e, 0x8f, size_of::<kvm_lapic_state>()),
            Self::Events => (0x9f, 0xa0, size_of::<kvm_vcpu_events>()),
            Self::MpState => (0x98, 0x99, size_of::<kvm_mp_state>()),
        };
        Some((Request::read(get, bytes), Request::write(set, bytes)))
    }

    /// What KVM says of a host or a machine that does not have it; 0: every one has.
    pub(super) const fn absent(self) -> i32 {
        match self {
            Self::Sregs2 => libc::ENOTTY,
            Self::Xcrs | Self::Lapic => libc::EINVAL,
            _ => 0,
        }
    }
}

impl PlatformPart {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Pic0, Self::Pic1, Self::Ioapic, Self::Pit, Self::Clock];

    /// Its name in an encoded state.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pic0 => "pic0",
            Self::Pic1 => "pic1",
            Self::Ioapic => "ioapic",
            Self::Pit => "pit",
            Self::Clock => "clock",
        }
    }

    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::Pic0 | Self::Pic1 | Self::Ioapic => size_of::<kvm_irqchip>(),
            Self::Pit => size_of::<kvm_pit_state2>(),
            Self::Clock => size_of::<kvm_clock_data>(),
        }
    }

    /// The number that KVM has for this controller (KVM_IRQCHIP_PIC_MASTER and so on).
    pub(super) const fn chip(self) -> Option<u32> {
        match self {
            Self::Pic0 => Some(kvm_bindings::KVM_IRQCHIP_PIC_MASTER),
            Self::Pic1 => Some(kvm_bindings::KVM_IRQCHIP_PIC_SLAVE),
            Self::Ioapic => Some(kvm_bindings::KVM_IRQCHIP_IOAPIC),
            Self::Pit | Self::Clock => None,
        }
    }

    pub(super) const fn requests(self) -> (Request, Request) {
        match self {
            // KVM_SET_IRQCHIP is declared as if it read: both are `_IOWR` and `_IOR`.
            Self::Pic0 | Self::Pic1 | Self::Ioapic => (
                Request::both(0x62, self.bytes()),
                Request::write_declared_read(0x63, self.bytes()),
            ),
            Self::Pit => (Request::read(0x9f, self.bytes()), Request::write(0xa0, self.bytes())),
            Self::Clock => (Request::read(0x7c, self.bytes()), Request::write(0x7b, self.bytes())),
        }
    }

    /// What KVM says of a machine that does not have it; 0: every one has.
    pub(super) const fn absent(self) -> i32 {
        match self {
            Self::Clock => 0,
            _ => libc::ENXIO,
        }
    }
}

impl fmt::Display for VcpuPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for PlatformPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where in KVM_GET_SREGS, and at the same place in KVM_GET_SREGS2, what is looked at is.
pub(super) const CR4: usize = mem::offset_of!(kvm_sregs2, cr4);
pub(super) const EFER: usize = mem::offset_of!(kvm_sregs2, efer);

const _: () = assert!(CR4 == mem::offset_of!(kvm_sregs, cr4));
const _: () = assert!(EFER == mem::offset_of!(kvm_sregs, efer));
