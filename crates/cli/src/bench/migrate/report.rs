//! The result of `bench migrate`, as a table and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use super::case::{Backing, Compression, Mode, Workload};
use crate::{
    output::{Align, Output, Table},
    size,
};

/// One contender. All figures are medians over the rounds.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    /// `pageferry` or `plain-send`.
    pub(super) engine: &'static str,
    /// None where no guest is moved, as everything that is a guest's.
    pub(super) mode: Option<Mode>,
    pub(super) workload: Option<Workload>,
    pub(super) backing: Backing,
    pub(super) memory_bytes: u64,
    pub(super) connections: u16,
    pub(super) compression: Option<Compression>,
    pub(super) total_ms: f64,
    pub(super) downtime_ms: Option<f64>,
    /// Of the memory, each byte counted once.
    pub(super) mb_per_s: f64,
    /// How many times as fast as plain-send in the same round.
    pub(super) ratio_to_plain: f64,
    /// However often each was sent.
    pub(super) sent_bytes: Option<f64>,
    /// Of pre-copy.
    pub(super) rounds: Option<f64>,
    pub(super) faults: Option<f64>,
    /// All waits of all vCPUs together.
    pub(super) blocked_ms: Option<f64>,
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) max_us: Option<f64>,
    /// By the guest's clock, of as many of its slowest touches as there were faults.
    pub(super) guest_p50_us: Option<f64>,
    pub(super) guest_p99_us: Option<f64>,
}

impl Row {
    /// What tells it from others.
    pub(super) fn label(&self) -> String {
        let mut label = self.engine.to_owned();
        for part in [self.mode.map(|m| m.to_string()), self.workload.map(|w| w.to_string())] {
            let _ = part.map(|part| write!(label, " {part}"));
        }
        let _ = write!(label, ", {}, {} conn.", self.backing, self.connections);
        let _ = self.compression.map(|compression| write!(label, ", {compression}"));
        label
    }
}

/// How it was measured.
#[derive(Debug, Serialize)]
struct Setup {
    vcpus: u16,
    rounds: usize,
    cpus: usize,
    kernel: String,
    /// Of the machine in the last minute before, as getloadavg(3) has it: of others too.
    load: Option<f64>,
}

/// The whole result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    setup: Setup,
    pub(super) rows: Vec<Row>,
}

impl Report {
    /// To be made before anything is measured.
    pub(super) fn new(vcpus: u16, rounds: usize) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let load = std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok());
        Self { setup: Setup { vcpus, rounds, cpus, kernel, load }, rows: Vec::new() }
    }

    pub(super) fn write(&self, output: Output) -> std::io::Result<()> {
        if output.json() { output.write_json(self) } else { output.write_text(&self.render()) }
    }

    fn render(&self) -> String {
        use Align::{Left, Right};
        let mut table = Table::new(&[
            ("engine", Left),
            ("mode", Left),
            ("workload", Left),
            ("memory", Left),
            ("conn.", Right),
            ("compr.", Left),
            ("total ms", Right),
            ("downtime ms", Right),
            ("MB/s", Right),
            ("/plain", Right),
            ("sent", Right),
            ("faults", Right),
            ("blocked ms", Right),
            ("p50 us", Right),
            ("p99 us", Right),
            ("max us", Right),
            ("guest p50", Right),
            ("p99", Right),
        ]);
        let number = |value: Option<f64>, places: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.places$}"))
        };
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        for row in &self.rows {
            table.row(vec![
                row.engine.to_owned(),
                text(row.mode.map(|mode| mode.to_string())),
                text(row.workload.map(|workload| workload.to_string())),
                format!("{} {}", size::display(row.memory_bytes), row.backing),
                row.connections.to_string(),
                text(row.compression.map(|compression| compression.to_string())),
                number(Some(row.total_ms), 0),
                number(row.downtime_ms, 1),
                number(Some(row.mb_per_s), 0),
                number(Some(row.ratio_to_plain), 2),
                text(row.sent_bytes.map(|bytes| size::display(bytes as u64))),
                number(row.faults, 0),
                number(row.blocked_ms, 1),
                number(row.p50_us, 0),
                number(row.p99_us, 0),
                number(row.max_us, 0),
                number(row.guest_p50_us, 0),
                number(row.guest_p99_us, 0),
            ]);
        }
        let mut text = table.render();
        let Setup { vcpus, rounds, cpus, kernel, load } = &self.setup;
        let _ = write!(
            text,
            "\n{vcpus} vCPUs, medians of {rounds} rounds, {cpus} CPUs, Linux {kernel}"
        );
        let _ = load.map(|load| write!(text, ", load before {load:.1}"));
        text.push('\n');
        text
    }
}
