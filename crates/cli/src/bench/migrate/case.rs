//! What is measured: one way to move one guest.

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

use clap::ValueEnum;
use pageferry::{
    memory::{self, PageSize},
    migrate::{self, MigrateOptions},
};
use pageferry_vmm::{Behaviour, Setup, VmConfig};
use serde::{Deserialize, Serialize};

use crate::bench::case::display_as_value_name;

/// When the guest moves, and when its memory does.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Mode {
    /// Pre-copy: first the memory, in rounds
    Pre,
    /// Post-copy: first the guest, its memory on demand and in the background
    Post,
    /// One round, then the guest, then the rest of its memory
    Hybrid,
}

/// How pages are compressed.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Compression {
    /// By lz4 while that makes it faster
    Auto,
    /// Not at all
    None,
    /// By lz4
    Lz4,
    /// By zstd
    Zstd,
}

/// What the guest's memory is made of, on both sides.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Backing {
    /// Private anonymous memory
    Anon,
    /// A memfd, mapped shared
    Memfd,
    /// Huge pages of 2 MiB, mapped shared
    Hugetlb,
}

display_as_value_name!(Mode, Compression, Backing);

impl Backing {
    pub(super) fn page_size(self) -> PageSize {
        if self == Self::Hugetlb { PageSize::SIZE_2M } else { PageSize::SIZE_4K }
    }

    /// How a machine has it.
    pub(super) fn setup(self) -> Setup {
        if self == Self::Anon { Setup::Missing } else { Setup::Minor }
    }

    pub(super) fn memory(self) -> memory::Backing {
        match self {
            Self::Anon => memory::Backing::Anonymous,
            Self::Memfd => memory::Backing::Memfd,
            Self::Hugetlb => memory::Backing::Hugetlb(PageSize::SIZE_2M),
        }
    }
}

/// What the guest does meanwhile. As text: a name and, for one that writes, perhaps `:` and a rate
/// in MB/s.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(super) enum Workload {
    /// Stands still from before the migration to its end at the source.
    Stopped,
    /// Runs.
    Runs(Behaviour),
}

impl Workload {
    fn behaviour(self) -> Behaviour {
        match self {
            Self::Stopped => Behaviour::Idle,
            Self::Runs(behaviour) => behaviour,
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, rate) = match self {
            Self::Stopped => ("stopped", None),
            Self::Runs(Behaviour::Idle) => ("idle", None),
            Self::Runs(Behaviour::RandomRead) => ("random-read", None),
            Self::Runs(Behaviour::RandomWrite { rate }) => ("random-write", *rate),
            Self::Runs(Behaviour::LinearWrite { rate }) => ("linear-write", *rate),
        };
        match rate {
            Some(rate) => write!(f, "{name}:{}", rate / MEGA),
            None => f.write_str(name),
        }
    }
}

const MEGA: u64 = 1_000_000;

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rate) = match text.split_once(':') {
            None => (text, None),
            Some((name, rate)) => {
                let rate: u64 = rate.parse().map_err(|error| format!("{rate:?} MB/s: {error}"))?;
                let rate = rate.checked_mul(MEGA).filter(|rate| *rate > 0);
                (name, Some(rate.ok_or("a rate that is no number of bytes")?))
            }
        };
        let behaviour = match (name, rate) {
            ("stopped", None) => return Ok(Self::Stopped),
            ("idle", None) => Behaviour::Idle,
            ("random-read", None) => Behaviour::RandomRead,
            ("random-write", rate) => Behaviour::RandomWrite { rate },
            ("linear-write", rate) => Behaviour::LinearWrite { rate },
            _ => {
                return Err("one of stopped, idle, random-read, random-write[:MB/s] and \
                            linear-write[:MB/s]"
                    .to_owned());
            }
        };
        Ok(Self::Runs(behaviour))
    }
}

impl From<Workload> for String {
    fn from(workload: Workload) -> Self {
        workload.to_string()
    }
}

impl TryFrom<String> for Workload {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// One measurement to make.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Case {
    pub(super) mode: Mode,
    pub(super) workload: Workload,
    pub(super) backing: Backing,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u16,
    /// That carry pages, besides the control connection.
    pub(super) connections: u16,
    pub(super) compression: Compression,
    /// The downtime to aim for.
    pub(super) downtime: Duration,
    /// Most MB/s that post-copy brings unasked.
    pub(super) background: Option<NonZeroU32>,
}

impl Case {
    /// The machine that is moved.
    pub(super) fn machine(&self) -> VmConfig {
        let mut config = VmConfig::new(self.vcpus, self.memory_bytes);
        config.setup = self.backing.setup();
        config.page_size = self.backing.page_size();
        config.payload = self.workload.behaviour().into();
        config
    }

    pub(super) fn options(&self) -> MigrateOptions {
        let mut options = MigrateOptions::default();
        options.mode = match self.mode {
            Mode::Pre => migrate::Mode::PreCopy,
            Mode::Post => migrate::Mode::PostCopy,
            Mode::Hybrid => migrate::Mode::Hybrid,
        };
        options.compression = match self.compression {
            Compression::Auto => migrate::Compression::Auto,
            Compression::None => migrate::Compression::None,
            Compression::Lz4 => migrate::Compression::Lz4,
            Compression::Zstd => migrate::Compression::Zstd,
        };
        options.connections = self.connections;
        options.downtime = self.downtime;
        options.background_bandwidth = self.background.map(|rate| u64::from(rate.get()) * MEGA);
        options
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, workload, backing, connections, compression, .. } = self;
        write!(f, "{mode}, {workload}, {backing}, {connections} connections, {compression}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_what_they_say() {
        for text in
            ["stopped", "idle", "random-read", "random-write", "random-write:200", "linear-write:1"]
        {
            assert_eq!(text.parse::<Workload>().map(|w| w.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "idle:1", "stopped:5", "random-write:0", "linear-write:x", "sleep"] {
            assert!(text.parse::<Workload>().is_err(), "{text}");
        }
        assert!(format!("random-write:{}", u64::MAX).parse::<Workload>().is_err());
    }
}
