//! The result of `bench vcpus`, as a table and as JSON.

use std::fmt::Write as _;

use pageferry_kvm::probe::{self, Paging};
use serde::Serialize;

use super::{
    super::case::{Backing, Kind},
    Args, Contender,
    case::{Delivery, Setup},
};
use crate::output::{Align, Output, Table};

/// One contender in one case.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) contender: &'static str,
    pub(super) delivery: Delivery,
    /// vCPUs.
    pub(super) threads: u16,
    pub(super) backing: Backing,
    pub(super) kind: Kind,
    pub(super) setup: Setup,
    pub(super) delay_us: u64,
    pub(super) pages_per_s: f64,
    pub(super) pages_per_s_per_vcpu: f64,
    pub(super) us_per_page: f64,
    /// User and system time of the whole process, vCPUs included.
    pub(super) cpu_us_per_page: f64,
    /// By the guest's clock; null where KVM does not know its frequency.
    pub(super) p50_us: Option<f64>,
    pub(super) p99_us: Option<f64>,
    pub(super) max_us: Option<f64>,
    /// None for the reader, which has no delivery to compare.
    pub(super) ratio_to_raw: Option<f64>,
    /// Raw's processor time to this one's.
    pub(super) cpu_ratio_to_raw: Option<f64>,
    pub(super) ratio_to_reader: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) auto: Option<Auto>,
}

/// What `auto` was, and whether that was right.
#[derive(Debug, Serialize)]
pub(super) struct Auto {
    pub(super) picked: String,
    pub(super) why: String,
    /// The best of the other deliveries; null when there were none.
    pub(super) best: Option<Delivery>,
    /// Pages a second beside the best's.
    pub(super) ratio_to_best: Option<f64>,
}

/// A delivery that was not measured.
#[derive(Debug, Serialize)]
pub(super) struct LeftOut {
    pub(super) delivery: Delivery,
    pub(super) why: String,
}

/// How it was measured.
#[derive(Debug, Serialize)]
struct How {
    pages: u64,
    rounds: usize,
    order: String,
    access: &'static str,
    ring: String,
    batch: usize,
    delay_us: u32,
    cpus: usize,
    kernel: String,
    kvm: String,
    kvm_paging: &'static str,
}

/// The whole result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    setup: How,
    /// The library's rows.
    pub(super) rows: Vec<Row>,
    /// The references' own rows, of the same shape.
    pub(super) references: Vec<Row>,
    pub(super) left_out: Vec<LeftOut>,
}

impl Report {
    pub(super) fn new(args: &Args) -> Self {
        let host = probe::host();
        let setup = How {
            pages: args.pages.get(),
            rounds: args.rounds.get(),
            order: args.order.to_string(),
            access: "read",
            ring: args.ring.to_string(),
            batch: args.batch.get(),
            delay_us: args.delay_us,
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            kvm: host.find(probe::VENDOR).map_or_else(String::new, |vendor| vendor.how.clone()),
            kvm_paging: match host.paging {
                Paging::TwoDimensional => "two-dimensional",
                Paging::Shadow => "shadow",
                Paging::Unknown => "unknown",
            },
        };
        Self { setup, rows: Vec::new(), references: Vec::new(), left_out: Vec::new() }
    }

    pub(super) fn write(&self, output: Output) -> std::io::Result<()> {
        if output.json() { output.write_json(self) } else { output.write_text(&self.render()) }
    }

    fn render(&self) -> String {
        use Align::{Left, Right};
        let mut table = Table::new(&[
            ("kind", Left),
            ("vCPUs", Right),
            ("delivery", Left),
            ("set-up", Left),
            ("contender", Left),
            ("pages/s", Right),
            ("per vCPU", Right),
            ("us/page", Right),
            ("cpu us/page", Right),
            ("p50 us", Right),
            ("p99 us", Right),
            ("max us", Right),
            ("/raw", Right),
            ("cpu/raw", Right),
            ("/reader", Right),
        ]);
        let is_reader = |row: &Row| row.contender == Contender::Reader.name();
        let mut rows: Vec<&Row> = self.references.iter().chain(&self.rows).collect();
        // Stable: within a case the references stay first.
        rows.sort_by_key(|row| {
            let case = (!is_reader(row)).then_some((row.delivery as u8, row.setup as u8));
            (row.kind as u8, row.threads, case)
        });
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        for row in &rows {
            let delivery = if is_reader(row) { "-".to_owned() } else { row.delivery.to_string() };
            table.row(vec![
                row.kind.to_string(),
                row.threads.to_string(),
                delivery,
                row.setup.to_string(),
                row.contender.to_owned(),
                number(Some(row.pages_per_s), 0),
                number(Some(row.pages_per_s_per_vcpu), 0),
                number(Some(row.us_per_page), 2),
                number(Some(row.cpu_us_per_page), 2),
                number(row.p50_us, 1),
                number(row.p99_us, 1),
                number(row.max_us, 0),
                number(row.ratio_to_raw, 2),
                number(row.cpu_ratio_to_raw, 2),
                number(Some(row.ratio_to_reader), 2),
            ]);
        }
        let mut text = table.render();
        text.push('\n');
        // Writing to a string cannot fail.
        for row in rows {
            let Some(Auto { picked, why, best, ratio_to_best }) = &row.auto else { continue };
            if row.contender != Contender::Pageferry.name() {
                continue;
            }
            let Row { kind, threads, .. } = row;
            _ = write!(text, "auto, {kind}, {threads} vCPUs: {picked}");
            if let (Some(best), Some(ratio)) = (best, ratio_to_best) {
                _ = write!(text, ", {ratio:.2} of the best ({best})");
            }
            _ = writeln!(text, ": {why}");
        }
        for LeftOut { delivery, why } in &self.left_out {
            _ = writeln!(text, "{delivery} is not here: {why}");
        }
        let How { pages, rounds, order, access, ring, batch, delay_us, .. } = &self.setup;
        let How { cpus, kernel, kvm, kvm_paging, .. } = &self.setup;
        _ = writeln!(
            text,
            "{pages} pages, {order} {access} in ring {ring}, delay {delay_us} us, batch {batch}, \
             medians of {rounds} rounds, {cpus} CPUs, Linux {kernel}, KVM {kvm} with {kvm_paging} \
             paging"
        );
        text
    }
}
