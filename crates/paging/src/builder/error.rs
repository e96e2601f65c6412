//! Why a pager could not be started.

use std::io;

use pageferry_memory::MappingError;
use pageferry_uffd::{OpenError, RegisterError, UffdError};

use crate::SourceError;

/// Why a pager could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No userfaultfd to be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A range could not be registered.
    #[error("registering region {region}: {error}")]
    Register {
        /// The region's number.
        region: u16,
        /// What the kernel said.
        #[source]
        error: RegisterError,
    },
    /// The absent pages of a region could not be marked for vCPUs to leave KVM_RUN.
    #[error("marking the absent pages of region {region}: {error}")]
    Mark {
        /// The region's number.
        region: u16,
        /// What the kernel said.
        #[source]
        error: UffdError,
    },
    /// The install asked for does not fit a region.
    #[error("region {region}: {why}")]
    Install {
        /// The region's number.
        region: u16,
        /// Why not.
        why: String,
    },
    /// Writes cannot be noticed in this set-up.
    #[error("write tracking: {why}")]
    Tracking {
        /// Why not.
        why: String,
    },
    /// Memory for staging could not be had.
    #[error("staging memory: {0}")]
    Staging(#[from] MappingError),
    /// The source does not fit, or is not there.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A thread or descriptor could not be had.
    #[error("{what}: {error}")]
    Resources {
        /// What was being made.
        what: &'static str,
        /// Why not.
        #[source]
        error: io::Error,
    },
    /// Signal delivery needs a source that can be asked from a signal handler.
    #[error("delivery by signal needs a page source that can be asked from a signal handler")]
    SourceNotSignalSafe,
}
