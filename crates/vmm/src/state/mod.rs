//! The state of a machine besides its memory: what KVM keeps of its vCPUs, interrupt controllers,
//! timer and clock, and what its devices say of themselves. It is saved while no vCPU is in the
//! guest, encoded, and restored into a machine that was made alike, in this process or another.
//!
//! # What is saved
//! Every part is what one ioctl of KVM's gives, byte for byte, under a name: see [`VcpuPart`] and
//! [`PlatformPart`]. What the host has not is absent: a machine without interrupt controllers in
//! the kernel has no `lapic`, no `ioapic`. On the way back a part that is there and that the host
//! does not take is refused by its name ([`StateError::Refused`]), and so are features of the
//! processor that the host has not ([`StateError::Feature`]).
//!
//! # Order of restoring
//! The order of the enumerations: vCPU by vCPU in the order of [`VcpuPart`], then [`PlatformPart`].
//!
//! | first | then | because |
//! |---|---|---|
//! | `cpuid` | everything | KVM checks registers, features and sizes against it |
//! | `tsc` | `lapic`, `msrs` | a deadline is a time of this counter |
//! | `sregs` | `lapic` | the APIC's base and mode are among them |
//! | `sregs` | `msrs` | some depend on the mode of the processor |
//! | `lapic` | `msrs` | the deadline (IA32_TSC_DEADLINE) needs the timer's mode, and is set last of them |
//! | `regs` | `events` | setting registers drops a pending exception |
//! | all the others | `mp_state` | the vCPU is waked as what it is now |
//! | all vCPUs | `ioapic` | it hands over interrupts that wait, to an APIC that must not be set afterwards |
//! | `pic`s, `ioapic` | `pit` | its timer starts, and may raise an interrupt at once |
//! | all the others | `clock` | it goes on from this moment |
//!
//! # Time
//! A guest's time stands still from the moment that it is saved until it is restored, and goes on
//! from there, never backwards: the clock (KVM_SET_CLOCK) from what it was, the time stamp counters
//! from what that of the first vCPU was, with the same distances between the vCPUs', which stay
//! synchronized (KVM_VCPU_TSC_OFFSET; where the kernel lacks it, IA32_TSC is set).
//!
//! # Memory
//! Nothing here reads or writes guest memory, which may all be absent while a state is restored.
//! For that reason the registers by which a guest asks for the time of day once
//! (MSR_KVM_WALL_CLOCK) are not restored: setting one writes to memory. The areas that KVM writes
//! when a vCPU runs are brought by its pager first.
//!
//! A vCPU that stopped in the middle of an instruction has registers of neither before nor after
//! it: whoever saves one calls KVM_RUN with `immediate_exit` set before, until it returns EINTR.
//!
//! # Encoding
//! [`MachineState::encode`] has the bytes. The decoder refuses whatever is not exactly what the
//! encoder makes of a state.
//!
//! Sources: `Documentation/virt/kvm/api.rst`, `Documentation/virt/kvm/devices/vcpu.rst` (section
//! 4.1, on migrating the time stamp counter).

mod cpuid;
mod error;
mod format;
#[allow(unsafe_code)]
mod ioctl;
mod msrs;
mod parts;
mod restore;
mod save;
mod time;

use std::collections::BTreeMap;

pub use error::{FormatError, StateError};
pub use format::{MAX_BYTES, MAX_VCPUS, VERSION};
pub use parts::{PlatformPart, VcpuPart};
pub use restore::Restorer;
pub use save::Saver;

/// What KVM keeps of one vCPU: [`Saver::vcpu`] makes it, [`Restorer::vcpu`] takes it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VcpuState {
    parts: BTreeMap<VcpuPart, Vec<u8>>,
}

impl VcpuState {
    /// A part as KVM gives it, if the host has it.
    pub fn part(&self, part: VcpuPart) -> Option<&[u8]> {
        self.parts.get(&part).map(Vec::as_slice)
    }

    /// Those that there are, in the order of restoring.
    pub fn parts(&self) -> impl Iterator<Item = (VcpuPart, &[u8])> {
        self.parts.iter().map(|(part, bytes)| (*part, bytes.as_slice()))
    }
}

/// What KVM keeps of the machine besides its vCPUs: [`Saver::platform`] makes it,
/// [`Restorer::platform`] takes it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PlatformState {
    parts: BTreeMap<PlatformPart, Vec<u8>>,
}

impl PlatformState {
    /// A part as KVM gives it, if the machine has it.
    pub fn part(&self, part: PlatformPart) -> Option<&[u8]> {
        self.parts.get(&part).map(Vec::as_slice)
    }

    /// Those that there are, in the order of restoring.
    pub fn parts(&self) -> impl Iterator<Item = (PlatformPart, &[u8])> {
        self.parts.iter().map(|(part, bytes)| (*part, bytes.as_slice()))
    }
}

/// What a device says of itself. Nobody else looks into it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DeviceBlob {
    /// Which device: 1 to 20 characters of ASCII without blanks, each device of a machine another.
    pub name: String,
    /// Version of what is in it, the device's own.
    pub version: u16,
    /// What the device needs to go on.
    pub bytes: Vec<u8>,
}

/// All of a machine's state but its memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MachineState {
    /// By the numbers of the vCPUs.
    pub vcpus: Vec<VcpuState>,
    /// What the vCPUs share.
    pub platform: PlatformState,
    /// In the order in which the embedder restores them.
    pub devices: Vec<DeviceBlob>,
}

impl MachineState {
    /// What the device of this name says.
    pub fn device(&self, name: &str) -> Option<&DeviceBlob> {
        self.devices.iter().find(|device| device.name == name)
    }
}
