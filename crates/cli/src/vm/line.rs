//! What is told of a guest and its migration, on either side: a line each.

use std::time::Duration;

use pageferry::{
    migrate::{DestinationStatus, Event, RoundReport, SourceStatus, Stage},
    paging::Statistics,
};
use pageferry_vmm::Report;
use serde::{Deserialize, Serialize};

use crate::{output::Output, size};

/// Bytes of the units that migrations count in.
const UNIT: u64 = 4096;

/// What `--json` prints, a line each.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Line {
    /// A guest runs here, and can be asked for.
    Running {
        name: String,
        pid: u32,
        vcpus: u16,
        memory_bytes: u64,
        socket: String,
    },
    /// A guest is waited for.
    Listening {
        name: String,
        pid: u32,
        address: String,
        socket: String,
    },
    /// A migration has begun.
    Started {
        to: String,
        mode: String,
        memory_bytes: u64,
    },
    Stage {
        stage: String,
    },
    Round {
        round: u32,
        bytes: u64,
        ms: f64,
        mb_per_s: f64,
        dirty_bytes: u64,
        dirty_mb_per_s: f64,
        /// If the guest were stopped now.
        downtime_ms: f64,
        throttle_percent: u8,
    },
    Throttled {
        percent: u8,
    },
    Lost {
        why: String,
    },
    Resumed {
        missing_bytes: u64,
    },
    Progress(Progress),
    /// A migration has ended.
    Ended(Ended),
    /// The guest's process ends.
    Left {
        name: String,
        /// `stopped`, `moved`, `by-itself` or `lost`.
        why: String,
        touches: u64,
        mismatches: u64,
    },
}

/// Where a migration stands.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    stage: String,
    elapsed_ms: f64,
    bytes: u64,
    remaining_bytes: u64,
    mb_per_s: f64,
    /// Written by the guest during the last round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dirty_mb_per_s: Option<f64>,
    /// For how long the guest would have stood still if it had been stopped after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    downtime_ms: Option<f64>,
    faults: Faults,
}

/// Of the source: what was asked for. Of the destination: the faults, and how long they took.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Faults {
    faults: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    p50_us: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    p99_us: Option<f64>,
}

/// What a migration came to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// `completed`, `cancelled` or `failed`.
    pub(crate) outcome: String,
    /// Where the guest is, as seen from the one who tells: `there`, `here`, `stopped-here` or
    /// `lost`.
    pub(crate) guest: String,
    /// Whether it failed because the peer is gone, or was never there.
    pub(crate) peer_lost: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    pub(crate) total_ms: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) downtime_ms: Option<f64>,
    pub(crate) bytes: u64,
    pub(crate) rounds: u64,
    pub(crate) mb_per_s: f64,
    pub(crate) faults: Faults,
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// MB/s.
fn rate(bytes: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { bytes as f64 / time.as_secs_f64() / 1e6 }
}

/// The stage's name.
pub(crate) fn stage_name(stage: Stage) -> String {
    match stage {
        Stage::Connecting => "connecting".to_owned(),
        Stage::Copying { round } => format!("round-{round}"),
        Stage::Switching => "switching".to_owned(),
        Stage::PostCopy => "post-copy".to_owned(),
        Stage::Paused => "paused".to_owned(),
        Stage::Completed => "completed".to_owned(),
        Stage::Cancelled => "cancelled".to_owned(),
        Stage::Failed => "failed".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// Whether nothing comes after it.
pub(crate) fn is_last(stage: Stage) -> bool {
    matches!(stage, Stage::Completed | Stage::Cancelled | Stage::Failed)
}

impl Faults {
    /// Of those that the pager has seen.
    pub(crate) fn of(paging: &Statistics) -> Self {
        let us = |q| paging.total.quantile(q).map(|time| time.as_secs_f64() * 1e6);
        Self { faults: paging.total.count(), p50_us: us(0.5), p99_us: us(0.99) }
    }

    fn text(&self) -> String {
        let mut text = format!("{} faults", self.faults);
        if let (Some(p50), Some(p99)) = (self.p50_us, self.p99_us) {
            text += &format!(", p50 {p50:.0} us, p99 {p99:.0} us");
        }
        text
    }
}

impl Progress {
    pub(crate) fn of_source(status: &SourceStatus) -> Self {
        // What was, when the guest has moved, is of no use.
        let copying = matches!(status.stage, Stage::Copying { .. });
        let round = status.rounds.last().filter(|_| copying);
        Self {
            stage: stage_name(status.stage),
            elapsed_ms: ms(status.elapsed),
            bytes: status.counts.bytes,
            remaining_bytes: status.remaining * UNIT,
            mb_per_s: rate(status.counts.bytes, status.elapsed),
            dirty_mb_per_s: round.map(|round| round.dirty_rate / 1e6),
            downtime_ms: round.map(|round| ms(round.downtime)),
            faults: Faults { faults: status.counts.requests, ..Faults::default() },
        }
    }

    /// Of a guest that was `waited` for before it began to come.
    pub(crate) fn of_destination(status: &DestinationStatus, waited: Duration) -> Self {
        let elapsed = status.elapsed.saturating_sub(waited);
        Self {
            stage: stage_name(status.stage),
            elapsed_ms: ms(elapsed),
            bytes: status.counts.bytes,
            remaining_bytes: status.missing * UNIT,
            mb_per_s: rate(status.counts.bytes, elapsed),
            dirty_mb_per_s: None,
            downtime_ms: None,
            faults: status.paging.as_ref().map(Faults::of).unwrap_or_default(),
        }
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{}: {} moved, {:.0} MB/s, {} left",
            self.stage,
            size::display(self.bytes),
            self.mb_per_s,
            size::display(self.remaining_bytes),
        );
        if let (Some(dirty), Some(downtime)) = (self.dirty_mb_per_s, self.downtime_ms) {
            text += &format!(", {dirty:.0} MB/s written, downtime {downtime:.0} ms");
        }
        if self.faults != Faults::default() {
            text += &format!(", {}", self.faults.text());
        }
        text
    }
}

impl Ended {
    /// The numbers; what it came to is the caller's.
    pub(crate) fn of_source(status: &SourceStatus) -> Self {
        Self {
            downtime_ms: status.downtime.map(ms),
            rounds: status.rounds.len() as u64,
            ..Self::of(Progress::of_source(status))
        }
    }

    /// As above.
    pub(crate) fn of_destination(status: &DestinationStatus, waited: Duration) -> Self {
        Self {
            downtime_ms: status.downtime.map(ms),
            ..Self::of(Progress::of_destination(status, waited))
        }
    }

    fn of(progress: Progress) -> Self {
        Self {
            outcome: "failed".to_owned(),
            guest: "here".to_owned(),
            peer_lost: false,
            error: None,
            total_ms: progress.elapsed_ms,
            downtime_ms: None,
            bytes: progress.bytes,
            rounds: 0,
            mb_per_s: progress.mb_per_s,
            faults: progress.faults,
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{} in {:.0} ms", self.outcome, self.total_ms);
        if let Some(error) = &self.error {
            text += &format!(": {error}");
        }
        text += &format!("\n  moved     {}, {:.0} MB/s", size::display(self.bytes), self.mb_per_s);
        if self.rounds > 0 {
            text += &format!(", {} rounds", self.rounds);
        }
        if let Some(downtime) = self.downtime_ms {
            text += &format!("\n  downtime  {downtime:.1} ms");
        }
        text + &format!("\n  faults    {}", self.faults.text())
    }
}

impl Line {
    /// `None` for what is too much to tell.
    pub(crate) fn of(event: &Event) -> Option<Self> {
        Some(match event {
            // What it ended with is told with everything else of the end.
            Event::Stage(stage) if is_last(*stage) => return None,
            Event::Stage(stage) => Self::Stage { stage: stage_name(*stage) },
            Event::Round(report) => Self::of_round(report),
            Event::Throttled { percent } => Self::Throttled { percent: *percent },
            Event::Lost { why } => Self::Lost { why: why.clone() },
            Event::Resumed { missing } => Self::Resumed { missing_bytes: missing * UNIT },
            _ => return None,
        })
    }

    fn of_round(report: &RoundReport) -> Self {
        Self::Round {
            round: report.round,
            bytes: report.bytes,
            ms: ms(report.took),
            mb_per_s: report.rate / 1e6,
            dirty_bytes: report.dirty,
            dirty_mb_per_s: report.dirty_rate / 1e6,
            downtime_ms: ms(report.downtime),
            throttle_percent: report.throttle,
        }
    }

    /// That the guest's process ends.
    pub(crate) fn left(name: &str, why: &str, report: Option<&Report>) -> Self {
        Self::Left {
            name: name.to_owned(),
            why: why.to_owned(),
            touches: report.map_or(0, Report::touches),
            mismatches: report.map_or(0, Report::mismatches),
        }
    }

    /// Whether it says that the guest runs at the destination.
    pub(crate) fn is_moved(&self) -> bool {
        match self {
            Self::Stage { stage } => [Stage::PostCopy, Stage::Paused]
                .into_iter()
                .any(|moved| *stage == stage_name(moved)),
            _ => false,
        }
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Running { name, vcpus, memory_bytes, .. } => {
                let memory = size::display(*memory_bytes);
                format!("{name} runs: {vcpus} vCPUs, {memory}")
            }
            Self::Listening { name, address, .. } => {
                format!("listening on {address}: waiting for {name}")
            }
            Self::Started { to, mode, memory_bytes } => {
                format!("moving {} to {to}, {mode}", size::display(*memory_bytes))
            }
            Self::Stage { stage } => stage.clone(),
            Self::Round {
                round,
                bytes,
                ms,
                mb_per_s,
                dirty_bytes,
                dirty_mb_per_s,
                downtime_ms,
                ..
            } => format!(
                "round {round}: {} sent in {ms:.0} ms, {mb_per_s:.0} MB/s; {} written meanwhile, \
                 {dirty_mb_per_s:.0} MB/s; stopped now it would stand still for {downtime_ms:.0} \
                 ms",
                size::display(*bytes),
                size::display(*dirty_bytes),
            ),
            Self::Throttled { percent } => format!("vCPUs are slowed down by {percent} %"),
            Self::Lost { why } => format!(
                "connection lost, the guest waits: {why}\n(`pageferry migrate recover` on both \
                 sides)"
            ),
            Self::Resumed { missing_bytes } => {
                format!("found each other again; {} to come", size::display(*missing_bytes))
            }
            Self::Progress(progress) => progress.text(),
            Self::Ended(ended) => ended.text(),
            Self::Left { name, why, touches, mismatches } => {
                format!("{name}: {why}; {touches} pages touched here, {mismatches} wrong words")
            }
        }
    }

    /// Writes it to standard output: as JSON, or for people, who do not want to know all.
    pub(crate) fn write(&self, output: Output) -> std::io::Result<()> {
        if output.json() {
            output.write_json_line(self)
        } else if matches!(self, Self::Progress(_)) {
            Ok(())
        } else {
            output.write_text(&(self.text() + "\n"))
        }
    }
}
