//! The result of a demonstration, for people and for programs.

mod vcpus;

use std::{fmt::Write as _, time::Duration};

use pageferry::paging::{Chosen, Completion, Counts, Delivery, InstallMethod, Latency, Statistics};
use serde::Serialize;

use self::vcpus::Vcpus;
use super::{
    args::{Args, GuestKind},
    guest::Seen,
    pattern::PAGE,
    plan::{Kind, Plan},
    threads::Workload,
    verify::Verified,
};
use crate::{
    output::{Align, Table},
    size,
};

/// What a run came to.
pub(super) struct Run<'a> {
    pub(super) args: &'a Args,
    pub(super) plan: &'a Plan,
    pub(super) bytes: u64,
    pub(super) chosen: Chosen,
    /// When the guest had ended, before anything was verified.
    pub(super) by_guest: Statistics,
    pub(super) statistics: Statistics,
    pub(super) counts: Completion,
    pub(super) seen: &'a Seen,
    pub(super) guest_seconds: f64,
    pub(super) complete_seconds: Option<f64>,
    pub(super) verified: Verified,
    pub(super) verify_seconds: f64,
    pub(super) source_pid: u32,
}

/// Times in microseconds.
#[derive(Serialize)]
struct Micros {
    count: u64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

impl Micros {
    fn new(count: u64, quantile: impl Fn(f64) -> Option<Duration>, max: Duration) -> Self {
        let at = |q| quantile(q).map_or(0.0, micros);
        Self { count, p50_us: at(0.5), p99_us: at(0.99), max_us: micros(max) }
    }

    fn of(latency: &Latency) -> Self {
        Self::new(latency.count(), |q| latency.quantile(q), latency.max())
    }
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Report {
    /// Every page is what it must be, and the guest read nothing wrong.
    verified: bool,
    pages: u64,
    bytes: u64,
    /// From the guest's start until all memory was there; without a sweep, until the guest ended.
    seconds: f64,
    mb_per_s: f64,
    /// Accesses of the guest to pages that were not there.
    faults: u64,
    /// How long those took, as the guest saw them; with a KVM guest, which cannot tell them from
    /// others, as the engine saw them.
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
    delivery: String,
    delivery_why: String,
    install: InstallMethod,
    backing: String,
    threads: u16,
    guest: GuestKind,
    /// How the memory of a KVM guest is mapped.
    setup: Option<String>,
    /// Why that guest, and why that delivery.
    why: String,
    /// `exits`, `vcpus` and `touch`, of a KVM guest only.
    #[serde(flatten)]
    vcpus: Option<Vcpus>,
    /// Faults of the guest that came through a userfaultfd.
    queue_faults: u64,
    workload: Workload,
    opened_by: String,
    guest_seconds: f64,
    verify_seconds: f64,
    first_page_seconds: Option<f64>,
    wrong_pages: u64,
    first_wrong_page: Option<u64>,
    guest_accesses: u64,
    /// Accesses that wrote; of a KVM guest, pages written.
    guest_writes: u64,
    guest_wrong_reads: u64,
    granules_from_source: u64,
    source_pid: u32,
    #[serde(skip)]
    guest_why: String,
    counts: Counts,
    queueing: Micros,
    fetch: Micros,
    install_calls: Micros,
    total: Micros,
}

impl Report {
    pub(super) fn new(run: Run<'_>) -> Self {
        let Run { args, plan, bytes, chosen, by_guest, statistics, seen, verified, .. } = run;
        let seconds = run.complete_seconds.unwrap_or(run.guest_seconds);
        let pages = bytes / PAGE;
        let install = chosen.install[0];
        let vcpus = seen.vcpus.as_deref().map(Vcpus::of);
        let delivered = by_guest.counts.faults - by_guest.counts.stale;
        let (guest, setup) = match plan.kind {
            Kind::Threads => (GuestKind::Threads, None),
            Kind::Kvm(setup) => (GuestKind::Kvm, Some(setup.to_string())),
        };
        let faults = match &seen.latency {
            Some(latency) => {
                let quantile = |q| Some(latency.quantile(q));
                Micros::new(latency.count(), quantile, latency.max())
            }
            None => Micros { count: delivered, ..Micros::of(&by_guest.total) },
        };
        let delivery_why = plan.delivery_why.clone().unwrap_or(chosen.why);
        Self {
            verified: verified.wrong == 0 && seen.wrong == 0 && verified.pages == pages,
            pages,
            bytes,
            seconds,
            mb_per_s: bytes as f64 / 1e6 / seconds,
            faults: faults.count,
            p50_us: faults.p50_us,
            p99_us: faults.p99_us,
            max_us: faults.max_us,
            delivery: chosen.delivery.to_string(),
            why: format!(
                "guest {guest}: {}; delivery {}: {delivery_why}",
                plan.guest_why, chosen.delivery
            ),
            delivery_why,
            install,
            backing: plan.backing.backing().to_string(),
            threads: args.threads.get(),
            guest,
            setup,
            queue_faults: match chosen.delivery {
                Delivery::Exit | Delivery::Signal => 0,
                _ => delivered.saturating_sub(vcpus.as_ref().map_or(0, Vcpus::exits)),
            },
            vcpus,
            workload: args.workload,
            guest_why: plan.guest_why.clone(),
            opened_by: chosen.opened_by.to_string(),
            guest_seconds: run.guest_seconds,
            verify_seconds: run.verify_seconds,
            first_page_seconds: statistics.time_to_first_page.map(|time| time.as_secs_f64()),
            wrong_pages: verified.wrong,
            first_wrong_page: verified.first_wrong,
            guest_accesses: seen.accesses,
            guest_writes: seen.writes.unwrap_or(verified.written),
            guest_wrong_reads: seen.wrong,
            granules_from_source: run.counts.granules_from_source,
            source_pid: run.source_pid,
            counts: statistics.counts,
            queueing: Micros::of(&statistics.queueing),
            fetch: Micros::of(&statistics.fetch),
            install_calls: Micros::of(&statistics.install),
            total: Micros::of(&statistics.total),
        }
    }

    pub(super) fn verified(&self) -> bool {
        self.verified
    }

    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<12} {value}");
        };
        let verdict = if self.verified {
            format!("all {} pages are right, and so was every read of the guest", self.pages)
        } else {
            format!(
                "WRONG: {} of {} pages (first: {}), {} reads of the guest",
                self.wrong_pages,
                self.pages,
                self.first_wrong_page.map_or("none".into(), |page| page.to_string()),
                self.guest_wrong_reads
            )
        };
        line("verified", verdict);
        line(
            "moved",
            format!(
                "{} in {:.3} s ({:.0} MB/s), first page after {:.1} ms",
                size::display(self.bytes),
                self.seconds,
                self.mb_per_s,
                1000.0 * self.first_page_seconds.unwrap_or(f64::NAN)
            ),
        );
        let who = match self.guest {
            GuestKind::Kvm => "vCPUs",
            GuestKind::Threads => "threads",
        };
        line("guest", format!("{} ({})", self.guest, self.guest_why));
        line(
            "",
            format!(
                "{} {who}, {} accesses, {} writes in {:.3} s on {}",
                self.threads,
                self.guest_accesses,
                self.guest_writes,
                self.guest_seconds,
                self.backing
            ),
        );
        if let Some(setup) = &self.setup {
            line("set-up", setup.clone());
        }
        line("delivery", format!("{} ({})", self.delivery, self.delivery_why));
        line("install", format!("{:?}, userfaultfd opened by {}", self.install, self.opened_by));
        if let Some(vcpus) = &self.vcpus {
            let exits = vcpus.exits();
            line("faults", format!("{} through a userfaultfd, {exits} by exit", self.queue_faults));
        }
        line(
            "granules",
            format!(
                "{} on demand, {} ahead of demand (of which {} were then waited for), {} zero",
                self.counts.demand,
                self.counts.prefetched,
                self.counts.prefetch_hits,
                self.counts.zero
            ),
        );
        text.push('\n');
        let mut table = Table::new(&[
            ("time", Align::Left),
            ("count", Align::Right),
            ("p50 us", Align::Right),
            ("p99 us", Align::Right),
            ("max us", Align::Right),
        ]);
        let mut row = |name: &str, times: &Micros| {
            let cell = |micros: f64| format!("{micros:.1}");
            let [p50, p99, max] = [times.p50_us, times.p99_us, times.max_us].map(cell);
            table.row(vec![name.into(), times.count.to_string(), p50, p99, max]);
        };
        let Self { faults, p50_us, p99_us, max_us, .. } = *self;
        let by_guest = Micros { count: faults, p50_us, p99_us, max_us };
        match &self.vcpus {
            None => row("fault, seen by guest", &by_guest),
            Some(vcpus) => vcpus.times().for_each(|(name, times)| row(name, times)),
        }
        for (name, times) in [
            ("fault, in engine", &self.total),
            ("  before its claim", &self.queueing),
            ("  fetch", &self.fetch),
            ("install of an answer", &self.install_calls),
        ] {
            row(name, times);
        }
        text.push_str(&table.render());
        if let Some(table) = self.vcpus.as_ref().and_then(Vcpus::table) {
            text.push('\n');
            text.push_str(&table);
        }
        text
    }
}
