//! The result of `bench faults`, as a table and as JSON.

use serde::Serialize;

use super::{
    super::case::{Backing, Delivery, Kind},
    Args,
};
use crate::output::{Align, Output, Table};

/// One contender in one case.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) contender: String,
    pub(super) delivery: Delivery,
    pub(super) threads: usize,
    pub(super) backing: Backing,
    pub(super) kind: Kind,
    pub(super) pages_per_s: f64,
    pub(super) us_per_page: f64,
    /// User and system time of the whole process, guest threads included.
    pub(super) cpu_us_per_page: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) max_us: f64,
    /// None for the reader, which has no delivery to compare.
    pub(super) ratio_to_raw: Option<f64>,
    pub(super) ratio_to_reader: f64,
}

/// How it was measured.
#[derive(Debug, Serialize)]
struct Setup {
    pages: usize,
    rounds: usize,
    order: String,
    access: String,
    batch: usize,
    cpus: usize,
    kernel: String,
}

/// The whole result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    setup: Setup,
    /// The engine's rows.
    pub(super) rows: Vec<Row>,
    /// The references' own rows, of the same shape.
    pub(super) references: Vec<Row>,
}

impl Report {
    pub(super) fn new(args: &Args, rounds: usize) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let setup = Setup {
            pages: args.pages,
            rounds,
            order: args.order.to_string(),
            access: args.access.to_string(),
            batch: args.batch.get(),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            kernel,
        };
        Self { setup, rows: Vec::new(), references: Vec::new() }
    }

    pub(super) fn write(&self, output: Output) -> std::io::Result<()> {
        if output.json() { output.write_json(self) } else { output.write_text(&self.render()) }
    }

    fn render(&self) -> String {
        use Align::{Left, Right};
        let mut table = Table::new(&[
            ("backing", Left),
            ("kind", Left),
            ("threads", Right),
            ("delivery", Left),
            ("contender", Left),
            ("pages/s", Right),
            ("us/page", Right),
            ("cpu us/page", Right),
            ("p50 us", Right),
            ("p99 us", Right),
            ("max us", Right),
            ("/raw", Right),
            ("/reader", Right),
        ]);
        let mut rows: Vec<&Row> = self.references.iter().chain(&self.rows).collect();
        // Stable: within a case the references stay first.
        rows.sort_by_key(|row| {
            let delivery = (row.contender != "reader").then_some(row.delivery as u8);
            (row.backing as u8, row.kind as u8, row.threads, delivery)
        });
        for row in rows {
            let delivery =
                if row.contender == "reader" { "-".into() } else { row.delivery.to_string() };
            let ratio = |r: f64| format!("{r:.2}");
            table.row(vec![
                row.backing.to_string(),
                row.kind.to_string(),
                row.threads.to_string(),
                delivery,
                row.contender.clone(),
                format!("{:.0}", row.pages_per_s),
                format!("{:.2}", row.us_per_page),
                format!("{:.2}", row.cpu_us_per_page),
                format!("{:.1}", row.p50_us),
                format!("{:.1}", row.p99_us),
                format!("{:.0}", row.max_us),
                row.ratio_to_raw.map_or_else(|| "-".into(), ratio),
                ratio(row.ratio_to_reader),
            ]);
        }
        let Setup { pages, rounds, order, access, batch, cpus, kernel } = &self.setup;
        format!(
            "{}\n{pages} pages, {order} {access}, batch {batch}, medians of {rounds} rounds, \
             {cpus} CPUs, Linux {kernel}\n",
            table.render()
        )
    }
}
