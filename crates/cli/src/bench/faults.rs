//! `pageferry bench faults`: what resolving a page fault costs, for every delivery, beside two
//! references measured in the same run.

mod report;

use std::{num::NonZeroUsize, time::Duration};

use anyhow::Context as _;
use clap::ValueEnum as _;
use indicatif::{ProgressBar, ProgressStyle};

use self::report::{Report, Row};
use super::{
    case::{Access, Backing, Case, Contender, Delivery, Kind, Measurement, Order, PAGE},
    engine::{Engine, Setup},
    histogram::Histogram,
    median::median,
    reference::{Raw, Reader},
};
use crate::{
    Context,
    exit::{self, Exit, Failure},
    room,
};

const EXAMPLES: &str = "\
Examples:
  pageferry bench faults
  pageferry bench faults --threads 8,32 --delivery signal,queue --rounds 9
  pageferry bench faults --backing memfd --kind minor --json > faults.json
  pageferry bench faults --engine single,around:64KiB --order sequential

Each case runs on fresh memory. In every round all contenders of a group (same threads, backing
and kind) run one after another, in an order that turns from round to round; the first round warms
up and is not counted. Every figure is the median over the rounds, and a ratio is the median of the
ratios within each round. Percentiles are taken over the touches of all counted rounds.
References: `raw` is the smallest loop around the same system calls with the same delivery;
`reader` is the loop of userfaultfd(2): one thread, one poll, one message and one page at a time.";

/// Pages per second and cost per page of every fault delivery
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// Numbers of guest threads
    #[arg(long, value_delimiter = ',', default_value = "1,2,8,32", value_name = "N,...")]
    threads: Vec<NonZeroUsize>,
    /// Rounds that count
    #[arg(long, default_value = "5", value_name = "N")]
    rounds: NonZeroUsize,
    /// Pages of 4 KiB touched in each run, by all threads together
    #[arg(long, default_value = "32768", value_name = "N", value_parser = parse_pages)]
    pages: usize,
    /// Deliveries to measure [default: all]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    delivery: Vec<Delivery>,
    /// Memory to measure [default: all]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    backing: Vec<Backing>,
    /// Kinds of fault to measure; minor faults need a memfd [default: all]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    kind: Vec<Kind>,
    /// Ways to set the engine up: single (one page a fault), defaults (merged installs, fault-around
    /// and streams as an embedder gets them, no sweep), around:SIZE (blocks around each fault)
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "single,defaults",
        value_name = "SETUP,..."
    )]
    engine: Vec<Setup>,
    /// Order in which each thread touches its pages
    #[arg(long, value_enum, default_value = "random")]
    order: Order,
    /// What a touch is
    #[arg(long, value_enum, default_value = "read")]
    access: Access,
    /// Readers, workers or shards of the deliveries that have several [default: CPUs, at least 2]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = parse_workers)]
    workers: Option<NonZeroUsize>,
    /// Most messages taken from a userfaultfd at once (the `reader` reference takes one)
    #[arg(long, default_value = "64", value_name = "N")]
    batch: NonZeroUsize,
    /// Seed of the random order
    #[arg(long, default_value = "1", value_name = "N")]
    seed: u64,
}

/// More threads than this measure nothing but the scheduler.
fn parse_workers(text: &str) -> Result<NonZeroUsize, String> {
    match text.parse::<NonZeroUsize>() {
        Ok(workers) if workers.get() <= 1024 => Ok(workers),
        Ok(_) => Err("1024 at most".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// 16 TiB: page numbers are kept in 32 bits.
fn parse_pages(text: &str) -> Result<usize, String> {
    match text.parse::<u32>() {
        Ok(0) => Err("at least one page".into()),
        Ok(pages) => Ok(pages as usize),
        Err(error) => Err(error.to_string()),
    }
}

/// Cases that share threads, backing and kind, and so the `reader` reference.
struct Group {
    cases: Vec<Case>,
}

impl Args {
    fn groups(&self) -> anyhow::Result<Vec<Group>> {
        let all = |chosen: &[Delivery]| match chosen {
            [] => Delivery::value_variants().to_vec(),
            chosen => chosen.to_vec(),
        };
        let has = |kind: Kind, backing: Backing| {
            (self.kind.is_empty() || self.kind.contains(&kind))
                && (self.backing.is_empty() || self.backing.contains(&backing))
        };
        let workers = match self.workers {
            Some(workers) => workers.get(),
            None => std::thread::available_parallelism().map_or(2, |cpus| cpus.get().max(2)),
        };
        let mut groups = Vec::new();
        for (backing, kind) in [
            (Backing::Anon, Kind::Missing),
            (Backing::Memfd, Kind::Missing),
            (Backing::Memfd, Kind::Minor),
        ] {
            if !has(kind, backing) {
                continue;
            }
            for threads in &self.threads {
                let case = |delivery| Case {
                    delivery,
                    backing,
                    kind,
                    threads: threads.get(),
                    pages: self.pages,
                    order: self.order,
                    access: self.access,
                    seed: self.seed,
                    workers,
                    batch: self.batch.get(),
                };
                if threads.get() > self.pages {
                    let pages = self.pages;
                    let why = format!("{threads} threads cannot each have a page of {pages}");
                    return Err(Failure::usage(why).into());
                }
                groups.push(Group { cases: all(&self.delivery).into_iter().map(case).collect() });
            }
        }
        if groups.is_empty() {
            return Err(Failure::usage("nothing to measure: minor faults need a memfd").into());
        }
        Ok(groups)
    }
}

/// One contender's runs of one case.
struct Series {
    case: Case,
    rounds: Vec<Measurement>,
}

impl Series {
    fn new(case: &Case) -> Self {
        Self { case: case.clone(), rounds: Vec::new() }
    }

    /// Runs the case once, and keeps the result unless it is to warm up.
    fn run(&mut self, who: &mut dyn Contender, warm_up: bool) -> anyhow::Result<()> {
        let case = &self.case;
        let measured = who.run(case).with_context(|| {
            let Case { delivery, backing, kind, threads, .. } = case;
            format!("{}: {delivery}, {threads} threads, {kind} faults of {backing}", who.name())
        })?;
        if !warm_up {
            self.rounds.push(measured);
        }
        Ok(())
    }

    fn median(&self, of: impl Fn(&Measurement) -> f64) -> f64 {
        median(self.rounds.iter().map(of).collect())
    }

    /// How many times as many pages a second as `other` had in the same round.
    fn ratio_to(&self, other: &Series) -> f64 {
        let ratios = self.rounds.iter().zip(&other.rounds);
        median(ratios.map(|(mine, theirs)| rate(mine) / rate(theirs)).collect())
    }

    fn row(&self, contender: &str, raw: Option<&Series>, reader: &Series) -> Row {
        let mut latency = Histogram::new();
        for round in &self.rounds {
            latency.merge(&round.latency);
        }
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        Row {
            contender: contender.to_owned(),
            delivery: self.case.delivery,
            threads: self.case.threads,
            backing: self.case.backing,
            kind: self.case.kind,
            pages_per_s: self.median(rate),
            us_per_page: self.median(|m| micros(m.wall) / m.pages as f64),
            cpu_us_per_page: self.median(|m| micros(m.cpu) / m.pages as f64),
            p50_us: micros(latency.quantile(0.5)),
            p99_us: micros(latency.quantile(0.99)),
            max_us: micros(latency.max()),
            ratio_to_raw: raw.map(|raw| self.ratio_to(raw)),
            ratio_to_reader: self.ratio_to(reader),
        }
    }
}

fn rate(measured: &Measurement) -> f64 {
    measured.pages as f64 / measured.wall.as_secs_f64()
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let mut engines: Vec<Box<dyn Contender>> = Vec::new();
    for setup in &args.engine {
        engines.push(Box::new(Engine::new(*setup)));
    }
    room::check((args.pages as u64).saturating_mul(PAGE as u64), "the memory of one measurement")?;
    let groups = args.groups()?;
    let rounds = args.rounds.get();
    let cases: usize = groups.iter().map(|group| group.cases.len()).sum();
    let runs = (cases * (1 + engines.len()) + groups.len()) * (rounds + 1);
    let progress = ProgressBar::new(runs as u64);
    let style = "{bar:30} {pos}/{len} runs, {eta} left  {msg}";
    progress.set_style(ProgressStyle::with_template(style)?);
    let mut report = Report::new(args, rounds);
    for group in &groups {
        measure(group, rounds, &mut engines, context, &progress, &mut report)?;
    }
    progress.finish_and_clear();
    report.write(context.output)?;
    Ok(Exit::Success)
}

/// Runs all contenders of `group`, interleaved, and adds their rows.
fn measure(
    group: &Group,
    rounds: usize,
    engines: &mut [Box<dyn Contender>],
    context: &Context,
    progress: &ProgressBar,
    report: &mut Report,
) -> anyhow::Result<()> {
    let first = &group.cases[0];
    progress.set_message(format!("{} {} x{}", first.backing, first.kind, first.threads));
    let mut reader = Series::new(&Case { delivery: Delivery::Queue, batch: 1, ..first.clone() });
    let mut raw: Vec<Series> = group.cases.iter().map(Series::new).collect();
    let mut ours: Vec<Vec<Series>> =
        engines.iter().map(|_| group.cases.iter().map(Series::new).collect()).collect();
    let cases = group.cases.len();
    let turns = 1 + cases * (1 + engines.len());
    for round in 0..=rounds {
        let warm_up = round == 0;
        for turn in 0..turns {
            if let Some(signal) = context.signals.caught() {
                return Err(Failure::interrupted(signal).into());
            }
            // Raw and engine of a case stand next to each other, and who comes first turns.
            let place = if round % 2 == 0 { turn } else { turns - 1 - turn };
            match place.checked_sub(1) {
                None => reader.run(&mut Reader, warm_up)?,
                Some(place) => {
                    let (case, who) = (place / (1 + engines.len()), place % (1 + engines.len()));
                    match who.checked_sub(1) {
                        None => raw[case].run(&mut Raw, warm_up)?,
                        Some(e) => ours[e][case].run(engines[e].as_mut(), warm_up)?,
                    }
                }
            }
            progress.inc(1);
        }
    }
    report.references.push(reader.row("reader", None, &reader));
    for (index, raw) in raw.iter().enumerate() {
        report.references.push(raw.row("raw", Some(raw), &reader));
        for (engine, series) in engines.iter().zip(&ours) {
            report.rows.push(series[index].row(engine.name(), Some(raw), &reader));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
