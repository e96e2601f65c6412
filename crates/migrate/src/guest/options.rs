//! What can be asked of a migration.

use std::{sync::Arc, time::Duration};

use super::{Compression, Event, OnNoConvergence};

/// When the guest moves, and when its memory does.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Mode {
    /// First the memory, in rounds; the guest when little is left.
    PreCopy,
    /// First the guest; its memory on demand and in the background.
    PostCopy,
    /// A round or more, then the guest, then the rest of its memory.
    #[default]
    Hybrid,
}

impl Mode {
    /// Its name: `pre`, `post` or `hybrid`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PreCopy => "pre",
            Self::PostCopy => "post",
            Self::Hybrid => "hybrid",
        }
    }
}

/// Called with everything that is worth telling. It must not block, nor call the migration.
pub type Observer = Arc<dyn Fn(&Event) + Send + Sync>;

/// Options of a migration's source.
#[derive(Clone)]
#[non_exhaustive]
pub struct MigrateOptions {
    /// When the guest moves. Default [`Mode::Hybrid`].
    pub mode: Mode,
    /// Connections that carry pages, 0 to 32; with 0, or where there is only one stream, the
    /// control connection carries everything. Default 1.
    pub connections: u16,
    /// Connections that carry what is waited for, 0 to 32; with 0 the control connection does.
    /// Default 1.
    pub demand_connections: u16,
    /// Compression of pages that nobody waits for. Default [`Compression::Auto`].
    pub compression: Compression,
    /// Memory for pages sent before, so that only what changed of them is sent: bytes, for all
    /// connections together. 0: always whole pages. Default 64 MiB.
    pub delta_cache: usize,
    /// The downtime to aim for. Default 300 ms.
    pub downtime: Duration,
    /// For all rounds of pre-copy together. Default 5 minutes.
    pub timeout: Duration,
    /// Most rounds of pre-copy. Default 30.
    pub rounds: u32,
    /// Rounds of [`Mode::Hybrid`] before the guest moves. Default 1.
    pub hybrid_rounds: u32,
    /// What to do when rounds do not help. Default [`OnNoConvergence::Switch`].
    pub on_no_convergence: OnNoConvergence,
    /// Cap for pre-copy, in bytes a second.
    pub precopy_bandwidth: Option<u64>,
    /// Cap for what post-copy brings in the background, in bytes a second.
    pub background_bandwidth: Option<u64>,
    /// For a connection and its handshake. Default 10 s.
    pub connect_timeout: Duration,
    /// For a write that makes no progress. Default 10 s.
    pub write_timeout: Duration,
    /// After this long without a byte the peer is asked whether it is there. Default 5 s.
    pub keepalive: Duration,
    /// After this long without a byte the peer counts as gone. Default 30 s.
    pub idle_timeout: Duration,
    /// The longest that the guest may stand still before it has been committed to the other side:
    /// then it goes on where it is. Default 30 s.
    pub switch_timeout: Duration,
    /// Between attempts to connect again after a loss in post-copy, to the same address. `None`
    /// waits to be told an address. Default `None`.
    pub reconnect: Option<Duration>,
    /// Longest device state taken, in bytes. Default 16 MiB.
    pub max_state: u64,
    /// Largest payload of one frame, in bytes.
    pub max_payload: u32,
    /// Who is told.
    pub observer: Option<Observer>,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            connections: 1,
            demand_connections: 1,
            compression: Compression::default(),
            delta_cache: 64 << 20,
            downtime: Duration::from_millis(300),
            timeout: Duration::from_secs(300),
            rounds: 30,
            hybrid_rounds: 1,
            on_no_convergence: OnNoConvergence::Switch,
            precopy_bandwidth: None,
            background_bandwidth: None,
            connect_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            switch_timeout: Duration::from_secs(30),
            reconnect: None,
            max_state: 16 << 20,
            max_payload: crate::core::DEFAULT_MAX_PAYLOAD,
            observer: None,
        }
    }
}

impl std::fmt::Debug for MigrateOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrateOptions")
            .field("mode", &self.mode)
            .field("connections", &self.connections)
            .field("compression", &self.compression)
            .field("downtime", &self.downtime)
            .finish_non_exhaustive()
    }
}

/// Options of a migration's destination.
#[derive(Clone)]
#[non_exhaustive]
pub struct ReceiveOptions {
    /// For a handshake, and for the other connections of a session. Default 10 s.
    pub connect_timeout: Duration,
    /// For a write that makes no progress. Default 10 s.
    pub write_timeout: Duration,
    /// After this long without a byte the peer is asked whether it is there. Default 5 s.
    pub keepalive: Duration,
    /// After this long without a byte the peer counts as gone. Default 30 s.
    pub idle_timeout: Duration,
    /// Most guest memory taken, in bytes. Default: no bound but what the guest says.
    pub max_memory: u64,
    /// Longest device state taken, in bytes. Default 16 MiB.
    pub max_state: u64,
    /// Largest payload of one frame accepted, in bytes.
    pub max_payload: u32,
    /// Who is told.
    pub observer: Option<Observer>,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            max_memory: u64::MAX,
            max_state: 16 << 20,
            max_payload: crate::core::DEFAULT_MAX_PAYLOAD,
            observer: None,
        }
    }
}

impl std::fmt::Debug for ReceiveOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceiveOptions")
            .field("max_memory", &self.max_memory)
            .field("max_state", &self.max_state)
            .finish_non_exhaustive()
    }
}
