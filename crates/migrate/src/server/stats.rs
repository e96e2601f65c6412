//! What a server counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a server has done since it was bound.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct ServerStats {
    /// Sessions that are open.
    pub sessions: u64,
    /// Sessions opened so far.
    pub sessions_opened: u64,
    /// Connections refused for want of room.
    pub refused: u64,
    /// Sessions that ended otherwise than by agreement or goodbye.
    pub failed: u64,
    /// Requests that somebody waited for.
    pub requests_demand: u64,
    /// Requests that nobody waited for yet.
    pub requests_background: u64,
    /// Granules taken out of the background queue because somebody waited for them.
    pub expedited: u64,
    /// Granules answered by data.
    pub granules_data: u64,
    /// Granules answered as zero.
    pub granules_zero: u64,
    /// Granules answered as poisoned.
    pub granules_poisoned: u64,
    /// Payload bytes sent.
    pub bytes: u64,
}

impl ServerStats {
    /// Granules answered.
    #[must_use]
    pub fn granules(&self) -> u64 {
        self.granules_data + self.granules_zero + self.granules_poisoned
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) sessions_opened: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) requests_demand: AtomicU64,
    pub(super) requests_background: AtomicU64,
    pub(super) expedited: AtomicU64,
    pub(super) granules_data: AtomicU64,
    pub(super) granules_zero: AtomicU64,
    pub(super) granules_poisoned: AtomicU64,
    pub(super) bytes: AtomicU64,
}

/// Adds to a counter of which nobody reads more than one at a time.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

impl Counters {
    pub(super) fn refused(&self) {
        add(&self.refused, 1);
    }

    pub(super) fn snapshot(&self, sessions: u64) -> ServerStats {
        ServerStats {
            sessions,
            sessions_opened: self.sessions_opened.load(Relaxed),
            refused: self.refused.load(Relaxed),
            failed: self.failed.load(Relaxed),
            requests_demand: self.requests_demand.load(Relaxed),
            requests_background: self.requests_background.load(Relaxed),
            expedited: self.expedited.load(Relaxed),
            granules_data: self.granules_data.load(Relaxed),
            granules_zero: self.granules_zero.load(Relaxed),
            granules_poisoned: self.granules_poisoned.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        }
    }
}
