//! Why a machine for Linux could not be made, booted, saved or restored.

use std::{io, path::PathBuf};

use vm_memory::GuestMemoryError;

use crate::{VmError, state::StateError};

/// Why a machine for Linux could not be made, booted, saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// The configuration makes no sense.
    #[error("configuration: {why}")]
    Config {
        /// Why not.
        why: String,
    },
    /// A file could not be used.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel could not be loaded.
    #[error("loading the kernel {}: {source}", path.display())]
    Kernel {
        /// The kernel's file.
        path: PathBuf,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The kernel is no bzImage that begins in 64-bit mode.
    #[error("the kernel {}: {why}", path.display())]
    NotSuch {
        /// The kernel's file.
        path: PathBuf,
        /// What is missing.
        why: &'static str,
    },
    /// The kernel's command line cannot be passed on.
    #[error("command line: {0}")]
    CommandLine(String),
    /// The memory is too small.
    #[error("{what} of {bytes:#x} bytes does not fit into memory below {limit:#x}")]
    NoRoom {
        /// What was to be loaded.
        what: &'static str,
        /// How long it is.
        bytes: u64,
        /// Where it has to end.
        limit: u64,
    },
    /// What is needed to boot could not be written into memory.
    #[error("writing {what} at {address:#x}: {source}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// Where to, guest-physical.
        address: u64,
        /// What vm-memory said.
        #[source]
        source: GuestMemoryError,
    },
    /// There are no more interrupts or addresses for devices.
    #[error("resources of device {device}: {source}")]
    Resources {
        /// Its number.
        device: usize,
        /// What the allocator said.
        #[source]
        source: vm_allocator::Error,
    },
    /// The state of a device is none, or not this device's.
    #[error("state of {device}: {why}")]
    State {
        /// Which device.
        device: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The machine has been started already, or was not.
    #[error("the machine {why}")]
    Sequence {
        /// In which state it is.
        why: &'static str,
    },
    /// KVM's part of the machine could not be saved or restored.
    #[error(transparent)]
    Machine(#[from] StateError),
    /// As with any machine: KVM, memory, threads.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl LinuxError {
    /// For `map_err`: a file could not be used.
    pub(crate) fn file(
        what: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }

    /// For `map_err`: memory could not be written.
    pub(crate) fn write(what: &'static str, address: u64) -> impl FnOnce(GuestMemoryError) -> Self {
        move |source| Self::Write { what, address, source }
    }

    pub(crate) fn state(device: &'static str, why: impl Into<String>) -> Self {
        Self::State { device, why: why.into() }
    }
}
