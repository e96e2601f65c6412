//! The result of `bench dirty`, as a table, as JSON and as a model.

use std::fmt::Write as _;

use serde::Serialize;

use super::{
    Args,
    case::{Backing, Method},
    model::{Model, ModelError, Point},
};
use crate::{
    output::{Align, Output, Table},
    size,
};

const TIB: u64 = 1 << 40;

/// One contender in one case. All figures are medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) contender: &'static str,
    pub(super) method: Method,
    pub(super) bytes: u64,
    pub(super) dirty_share: f64,
    pub(super) written_pages: u64,
    pub(super) arm_ms: f64,
    /// Of one first write, beyond the same write untracked.
    pub(super) write_us: f64,
    pub(super) harvest_ms: f64,
    /// With nothing written since the harvest before.
    pub(super) idle_harvest_ms: f64,
    /// All the writes, and the harvest.
    pub(super) cycle_ms: f64,
    pub(super) peak_bytes: u64,
    /// Times as long as *raw* for a cycle.
    pub(super) ratio_to_raw: f64,
    pub(super) arm_ratio_to_raw: f64,
    pub(super) harvest_ratio_to_raw: f64,
}

impl Row {
    fn point(&self) -> Point {
        Point {
            bytes: self.bytes,
            written: self.written_pages,
            arm_ms: self.arm_ms,
            writes_ms: self.write_us * self.written_pages as f64 / 1e3,
            harvest_ms: self.harvest_ms,
        }
    }
}

/// How it was measured.
#[derive(Debug, Serialize)]
struct Setup {
    backing: Backing,
    rounds: usize,
    cpus: usize,
    kernel: String,
}

/// What a method costs in general.
#[derive(Debug, Serialize)]
struct Fitted {
    method: Method,
    model: Model,
    /// The sizes that it was not fitted to.
    held_out: Vec<u64>,
    /// None if there were too few sizes to hold any out.
    error: Option<ModelError>,
    terabyte: Vec<Terabyte>,
}

/// What the model says of 1 TiB.
#[derive(Debug, Serialize)]
struct Terabyte {
    dirty_share: f64,
    arm_ms: f64,
    cycle_ms: f64,
}

/// From this size on a method is cheaper than another, by the models.
#[derive(Debug, Serialize)]
struct Overtaking {
    dirty_share: f64,
    method: Method,
    overtakes: Method,
    bytes: u64,
}

/// The whole result.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    setup: Setup,
    /// The library's rows.
    pub(super) rows: Vec<Row>,
    /// Raw's own rows, of the same shape.
    pub(super) references: Vec<Row>,
    models: Vec<Fitted>,
    overtakings: Vec<Overtaking>,
}

impl Report {
    pub(super) fn new(args: &Args, rounds: usize) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let setup = Setup { backing: args.backing, rounds, cpus, kernel };
        Self {
            setup,
            rows: Vec::new(),
            references: Vec::new(),
            models: Vec::new(),
            overtakings: Vec::new(),
        }
    }

    pub(super) fn methods(&self) -> Vec<Method> {
        let mut methods: Vec<Method> = self.rows.iter().map(|row| row.method).collect();
        methods.sort_unstable();
        methods.dedup();
        methods
    }

    pub(super) fn shares(&self) -> Vec<f64> {
        let mut shares: Vec<f64> = self.rows.iter().map(|row| row.dirty_share).collect();
        shares.sort_by(f64::total_cmp);
        shares.dedup();
        shares
    }

    /// Fits the models to the rows. Of four sizes or more, the two largest are held out.
    pub(super) fn fit(&mut self) {
        let mut sizes: Vec<u64> = self.rows.iter().map(|row| row.bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let held_out = if sizes.len() >= 4 { sizes.split_off(sizes.len() - 2) } else { Vec::new() };
        let shares = self.shares();
        for method in self.methods() {
            let (fitted, others): (Vec<&Row>, Vec<&Row>) = self
                .rows
                .iter()
                .filter(|row| row.method == method)
                .partition(|row| !held_out.contains(&row.bytes));
            let points = |rows: &[&Row]| rows.iter().map(|row| row.point()).collect::<Vec<_>>();
            let Some(model) = Model::fit(&points(&fitted)) else { continue };
            let terabyte = |share: &f64| Terabyte {
                dirty_share: *share,
                arm_ms: model.arm(TIB),
                cycle_ms: model.cycle(TIB, (TIB as f64 / 4096.0 * share) as u64),
            };
            self.models.push(Fitted {
                method,
                model,
                held_out: held_out.clone(),
                error: model.error(&points(&others)),
                terabyte: shares.iter().map(terabyte).collect(),
            });
        }
        for share in shares {
            for one in &self.models {
                for other in &self.models {
                    if let Some(bytes) = one.model.overtakes(&other.model, share) {
                        self.overtakings.push(Overtaking {
                            dirty_share: share,
                            method: one.method,
                            overtakes: other.method,
                            bytes,
                        });
                    }
                }
            }
        }
    }

    pub(super) fn write(&self, output: Output) -> std::io::Result<()> {
        if output.json() { output.write_json(self) } else { output.write_text(&self.render()) }
    }

    fn render(&self) -> String {
        use Align::{Left, Right};
        let mut table = Table::new(&[
            ("memory", Right),
            ("written", Right),
            ("method", Left),
            ("contender", Left),
            ("arm ms", Right),
            ("write us", Right),
            ("harvest ms", Right),
            ("idle ms", Right),
            ("cycle ms", Right),
            ("peak", Right),
            ("arm /raw", Right),
            ("harvest /raw", Right),
            ("cycle /raw", Right),
        ]);
        for row in self.references.iter().zip(&self.rows).flat_map(|(raw, ours)| [raw, ours]) {
            table.row(vec![
                size::display(row.bytes),
                percent(row.dirty_share),
                row.method.to_string(),
                row.contender.to_owned(),
                format!("{:.3}", row.arm_ms),
                format!("{:.2}", row.write_us),
                format!("{:.3}", row.harvest_ms),
                format!("{:.3}", row.idle_harvest_ms),
                format!("{:.3}", row.cycle_ms),
                size::display(row.peak_bytes),
                format!("{:.2}", row.arm_ratio_to_raw),
                format!("{:.2}", row.harvest_ratio_to_raw),
                format!("{:.2}", row.ratio_to_raw),
            ]);
        }
        let mut text = table.render();
        for fitted in &self.models {
            fitted.render(&mut text);
        }
        for Overtaking { dirty_share, method, overtakes, bytes } in &self.overtakings {
            let (share, bytes) = (percent(*dirty_share), size::display(*bytes));
            let _ = writeln!(
                text,
                "with {share} written {method} is cheaper than {overtakes} from {bytes} on"
            );
        }
        let Setup { backing, rounds, cpus, kernel } = &self.setup;
        let _ = writeln!(
            text,
            "\n{backing} memory, medians of {rounds} rounds, {cpus} CPUs, Linux {kernel}"
        );
        text
    }
}

impl Fitted {
    fn render(&self, text: &mut String) {
        let Model {
            arm_ms,
            arm_ms_per_gib,
            write_us_per_page,
            harvest_ms,
            harvest_ms_per_gib,
            harvest_us_per_page,
        } = self.model;
        let _ = writeln!(
            text,
            "\n{}: arm = {arm_ms:.3} ms + {arm_ms_per_gib:.2} ms/GiB; \
             write = {write_us_per_page:.2} us; harvest = {harvest_ms:.3} ms + \
             {harvest_ms_per_gib:.2} ms/GiB + {harvest_us_per_page:.3} us a written page",
            self.method
        );
        if let Some(error) = self.error {
            let sizes: Vec<String> =
                self.held_out.iter().map(|size| size::display(*size)).collect();
            let _ = writeln!(
                text,
                "  error at {} (not fitted to): cycle {} (median; {} at most), arm {} ({})",
                sizes.join(" and "),
                percent(error.cycle_median),
                percent(error.cycle_max),
                percent(error.arm_median),
                percent(error.arm_max),
            );
        } else {
            let _ = writeln!(
                text,
                "  its error is not known: it is fitted to all sizes, which are fewer than four"
            );
        }
        for Terabyte { dirty_share, arm_ms, cycle_ms } in &self.terabyte {
            let _ = writeln!(
                text,
                "  1 TiB with {} written: arm {:.1} s, cycle {:.1} s",
                percent(*dirty_share),
                arm_ms / 1e3,
                cycle_ms / 1e3
            );
        }
    }
}

/// A fraction, with two digits that matter.
pub(super) fn percent(share: f64) -> String {
    let value = share * 100.0;
    if value >= 10.0 {
        format!("{value:.0}%")
    } else {
        format!("{}%", (value * 100.0).round() / 100.0)
    }
}
