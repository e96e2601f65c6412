//! What can go wrong between two peers.

use std::{io, time::Duration};

use pageferry_paging::SourceError;

use crate::{
    Endpoint, GuestError,
    core::{Counts, ProtocolError, WireSpan},
};

/// Why a connection to a peer failed, or never came to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// No connection can be made.
    #[error("connecting to {endpoint}: {error}")]
    Connect {
        /// Where to.
        endpoint: Endpoint,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The server cannot listen there.
    #[error("listening at {endpoint}: {error}")]
    Bind {
        /// Where.
        endpoint: Endpoint,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// A system call failed on an open connection.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The peer broke the protocol, or says that this side did.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The peer has sent nothing for so long that it counts as gone.
    #[error("nothing heard from the peer for {after:?}")]
    Silent {
        /// How long.
        after: Duration,
    },
    /// The peer took too long over something that has an end.
    #[error("{what} took longer than {after:?}")]
    TimedOut {
        /// Over what.
        what: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The connection ended without a goodbye.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer said goodbye while it still was needed.
    #[error("the peer left before the memory was complete")]
    Left,
    /// The peer's memory and this side's do not fit.
    #[error("the peer's memory does not fit: {0}")]
    Mismatch(String),
    /// The engine says it installed more than the peer ever answered.
    #[error("completion: {installed} claimed, but the peer answered only {answered}")]
    MoreThanAnswered {
        /// What the engine counted.
        installed: Counts,
        /// What came over the connections.
        answered: Counts,
    },
    /// The memory being filled refused an answer.
    #[error("answer refused by the memory: {0}")]
    Sink(String),
    /// The peer says that a granule can never come.
    #[error("{span}: granule {granule} is poisoned at the peer")]
    Poisoned {
        /// What was being read.
        span: WireSpan,
        /// The first such granule.
        granule: u64,
    },
    /// An image cannot be stored on this side.
    #[error("it cannot be stored: {0}")]
    Store(String),
    /// A second attach, or a use before the first.
    #[error("{0}")]
    Misuse(&'static str),
    /// This side is leaving.
    #[error("stopped")]
    Stopped,
    /// Bytes came packed that cannot be unpacked.
    #[error("unpacking pages: {0}")]
    Packed(String),
    /// The embedder's side of a guest failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The migration was called off; the guest is at the source.
    #[error("cancelled")]
    Cancelled,
    /// The guest writes faster than it can be sent; it is at the source.
    #[error("the guest would stand still for {downtime:?}, where {wanted:?} were asked for")]
    NotConverging {
        /// What it would be.
        downtime: Duration,
        /// What was asked for.
        wanted: Duration,
    },
    /// The migration failed, and then the guest could not be resumed: it stands still at the
    /// source, whole.
    #[error("the guest stands still, and could not be resumed: {0}")]
    NotResumed(#[source] GuestError),
    /// The destination had been given the guest, could not run it, and dropped it; the guest goes on
    /// at the source.
    #[error("the destination could not run the guest, which goes on at the source")]
    DroppedThere,
    /// The destination was said to be gone for good; the guest goes on at the source.
    #[error("the guest was taken back, on the word that the destination never runs it")]
    Reclaimed,
    /// The destination was given up, and the guest with it.
    #[error("the destination is gone, and the guest with it; {unsent} bytes had not been sent")]
    Gone {
        /// Bytes of guest memory that the destination did not have.
        unsent: u64,
    },
    /// The source was given up: what was missing is poisoned.
    #[error("the source is gone; {missing} bytes of the guest's memory never came")]
    Abandoned {
        /// Bytes of guest memory that are missing.
        missing: u64,
    },
    /// The source has called the migration off.
    #[error("called off by the source: {0}")]
    CalledOff(crate::core::Refusal),
    /// Guest memory was to be touched where there is none.
    #[error(transparent)]
    OutOfRange(#[from] pageferry_memory::OutOfRange),
    /// Memory cannot be delivered on demand here.
    #[error(transparent)]
    Pager(#[from] pageferry_paging::StartError),
    /// Memory that had come and is stale cannot be discarded.
    #[error("discarding stale memory: {0}")]
    Discard(io::Error),
}

impl MigrateError {
    /// The same, in the engine's terms.
    #[must_use]
    pub fn to_source_error(&self) -> SourceError {
        match self {
            Self::Protocol(_) | Self::Sink(_) | Self::MoreThanAnswered { .. } => {
                SourceError::Protocol(self.to_string())
            }
            Self::Mismatch(_) => SourceError::Mismatch(self.to_string()),
            _ => SourceError::Lost(self.to_string()),
        }
    }
}
