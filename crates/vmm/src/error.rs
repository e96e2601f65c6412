//! Why a machine could not be made or run.

use std::io;

use pageferry_memory::{GuestAddress, LayoutError, RegionError, RegionId, adapter::AdapterError};
use vm_memory::GuestMemoryError;

use crate::state::StateError;

/// Why a machine could not be made or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The configuration makes no sense.
    #[error("configuration: {why}")]
    Config {
        /// Why not.
        why: String,
    },
    /// KVM refused something.
    #[error("{what}: {source}")]
    Kvm {
        /// What was being done.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A region of the boot memory or of the paged memory could not be made.
    #[error("guest memory: {0}")]
    Region(#[from] RegionError),
    /// The regions do not go together.
    #[error("paged memory: {0}")]
    Layout(#[from] LayoutError),
    /// The regions make no guest memory.
    #[error("guest memory: {0}")]
    GuestMemory(#[from] AdapterError),
    /// There is no such region.
    #[error("there is no region {0}")]
    NoRegion(RegionId),
    /// A memslot cannot be moved there.
    #[error("moving region {region} to {to}: {why}")]
    Move {
        /// The region.
        region: RegionId,
        /// Where it was to go.
        to: GuestAddress,
        /// Why not.
        why: &'static str,
    },
    /// The pager does not take a memslot.
    #[error(transparent)]
    Pager(#[from] pageferry_kvm::KvmError),
    /// The machine is running already.
    #[error("the machine is running already")]
    Running,
    /// The machine has never run: there is nothing to be saved.
    #[error("the machine has not been started")]
    NotStarted,
    /// A vCPU is in the middle of an instruction that waits for memory. Resume the machine, and
    /// save it when the memory has come.
    #[error("vCPU {vcpu} is in the middle of an instruction, which waits for memory")]
    MidInstruction {
        /// The vCPU's number.
        vcpu: u16,
    },
    /// The state could not be saved or restored.
    #[error(transparent)]
    State(#[from] StateError),
    /// Writes could not be tracked.
    #[error("tracking writes: {0}")]
    Tracking(#[from] pageferry_dirty::DirtyError),
    /// A signal handler or a thread could not be had.
    #[error("{what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Guest memory was accessed where there is none.
    #[error("accessing guest memory: {0}")]
    Access(#[from] GuestMemoryError),
}

impl VmError {
    /// For `map_err`: KVM refused `what`.
    pub(crate) fn kvm(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { what: what.into(), source: error.into() }
    }
}
