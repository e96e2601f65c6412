//! Why a state could not be saved, restored or read.

use std::io;

use super::{PlatformPart, VcpuPart};

/// Why a state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// KVM did not say what the host can do.
    #[error("asking KVM for {what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM did not give a part.
    #[error("saving {part}: {source}")]
    Save {
        /// Its name.
        part: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM did not take a part: it is damaged, or the host lacks what it is about.
    #[error("restoring {part}: {source}")]
    Refused {
        /// Its name.
        part: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A register has a value that this host does not take.
    #[error("restoring MSR {index:#x}: this host does not take {wanted:#x}{}", shown(*here))]
    Register {
        /// Which.
        index: u32,
        /// The value it had.
        wanted: u64,
        /// What it has here, if it is there.
        here: Option<u64>,
    },
    /// The guest was told that the processor has something that this host's has not, or KVM not.
    #[error(
        "restoring CPUID: this host lacks bits {missing:#x} of {register} in leaf {leaf:#x}.{index}"
    )]
    Feature {
        /// The leaf (EAX).
        leaf: u32,
        /// The subleaf (ECX).
        index: u32,
        /// Register that the bits are in.
        register: &'static str,
        /// The bits.
        missing: u32,
    },
    /// The time stamp counter of the guest cannot be had here.
    #[error("restoring tsc: {wanted} kHz cannot be had on this host, which has {here:?} kHz")]
    TscFrequency {
        /// The guest's kHz.
        wanted: u32,
        /// The host's kHz, if KVM says.
        here: Option<u32>,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The area of the processor's extended state is larger than this host's.
    #[error("restoring xsave: it has {bytes} bytes, this host's {here}")]
    XsaveTooLarge {
        /// Bytes up to the last that is not zero.
        bytes: usize,
        /// Bytes of this host's.
        here: usize,
    },
    /// The guest is a hypervisor itself: what KVM keeps of its guests is not saved.
    #[error("saving {part}: the guest uses nested virtualization, whose state is not saved")]
    Nested {
        /// Where it is seen.
        part: VcpuPart,
    },
    /// The machine has something that the state says nothing about.
    #[error("the machine has a {0}, the state has none")]
    Lacking(&'static str),
    /// The state is of another machine.
    #[error("the state does not belong to this machine: {why}")]
    OtherMachine {
        /// In what they differ.
        why: String,
    },
    /// A device refused what it was given.
    #[error("device {name}: {why}")]
    Device {
        /// The device.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The state could not be read.
    #[error(transparent)]
    Format(#[from] FormatError),
}

fn shown(here: Option<u64>) -> String {
    here.map_or_else(
        || " and has no such register".to_owned(),
        |here| format!(" instead of {here:#x}"),
    )
}

impl StateError {
    pub(super) fn save(part: VcpuPart) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Save { part: part.name(), source }
    }

    pub(super) fn save_platform(part: PlatformPart) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Save { part: part.name(), source }
    }

    pub(super) fn refused(part: VcpuPart) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Refused { part: part.name(), source }
    }

    /// A device refuses what it was given.
    pub fn device(name: &str, why: impl Into<String>) -> Self {
        Self::Device { name: name.to_owned(), why: why.into() }
    }
}

/// Why bytes are no state.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// They do not begin as a state does.
    #[error("not a machine's state: it does not begin with its magic number")]
    Magic,
    /// They have a version that is not known here.
    #[error("a machine's state of version {found}; known here is version {known}")]
    Version {
        /// Theirs.
        found: u32,
        /// The one that is known.
        known: u32,
    },
    /// They are more or fewer than they should be.
    #[error("a machine's state of {found} bytes that should have {expected}")]
    Length {
        /// How many there are.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
    /// There are more than any machine's state has.
    #[error("a machine's state of {bytes} bytes: there are {most} at most")]
    TooLong {
        /// How many there are.
        bytes: u64,
        /// How many there may be.
        most: u64,
    },
    /// The digest is another: something was changed on the way.
    #[error("a machine's state whose digest is wrong: it was damaged")]
    Digest,
    /// Bytes that must be zero are not.
    #[error("a machine's state with bytes set that are reserved, at {at}")]
    Reserved {
        /// Where.
        at: usize,
    },
    /// A section reaches beyond the end.
    #[error("a machine's state that ends within the section at {at}")]
    Cut {
        /// Where the section begins.
        at: usize,
    },
    /// The name of a section is not known, or no name.
    #[error("a machine's state with an unknown section {name:?} at {at}")]
    Name {
        /// What is there.
        name: String,
        /// Where.
        at: usize,
    },
    /// A section has a version that is not known here.
    #[error("section {name} has version {found}, known here is version {known}")]
    SectionVersion {
        /// The section.
        name: String,
        /// Its version.
        found: u16,
        /// The one that is known.
        known: u16,
    },
    /// A section comes twice, too late or too early.
    #[error("section {name} at {at} is out of order")]
    Order {
        /// The section.
        name: String,
        /// Where it begins.
        at: usize,
    },
    /// A section cannot have so many bytes.
    #[error("section {name} cannot have {bytes} bytes")]
    SectionLength {
        /// The section.
        name: String,
        /// Its bytes.
        bytes: u64,
    },
    /// A section is missing.
    #[error("vCPU {vcpu:?} has no {name}")]
    Missing {
        /// The vCPU, if it is one that lacks it.
        vcpu: Option<u16>,
        /// What is missing.
        name: &'static str,
    },
}
