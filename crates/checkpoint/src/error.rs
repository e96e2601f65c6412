//! Why a checkpoint failed, and what is left of it.

use pageferry_dirty::ProcessTrackError;
use pageferry_process::ProcessError;
use pageferry_uffd::{HostRange, PagemapError};

use crate::destination::DestinationError;

/// Why a checkpoint failed. The images completed before stay as they are.
#[derive(Debug, thiserror::Error)]
#[error("round {round}: {why}{}", last(.last_complete))]
pub struct CheckpointError {
    /// The round, from 0 on.
    pub round: u32,
    /// Where the last image is that was completed, if one was.
    pub last_complete: Option<String>,
    /// What happened.
    #[source]
    pub why: Why,
}

fn last(place: &Option<String>) -> String {
    match place {
        Some(place) => format!("; the last complete image is {place}"),
        None => "; no image was completed".to_owned(),
    }
}

/// What can happen in a round.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// The process ended, cannot be stopped, or cannot be read.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// Its writes cannot be tracked.
    #[error(transparent)]
    Tracking(#[from] ProcessTrackError),
    /// Its page map cannot be read.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The image cannot be written or sent.
    #[error("{0}")]
    Destination(#[source] DestinationError),
    /// Somebody brings pages of the process when it touches them.
    #[error(
        "another userfaultfd serves {range} of the process: pages that did not come yet cannot \
         be had; wait until its memory is complete"
    )]
    Served {
        /// Pages that are absent.
        range: HostRange,
    },
    /// It was asked to stop.
    #[error("stopped on request")]
    Stopped,
}
