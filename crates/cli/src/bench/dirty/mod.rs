//! `pageferry bench dirty`: what it costs to know which pages were written, for every method, size
//! of memory and share of it written.

mod case;
#[allow(unsafe_code)]
mod guest;
mod model;
mod ours;
mod plot;
mod raw;
mod report;
mod writer;

use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use anyhow::Context as _;
use clap::ValueEnum as _;
use indicatif::{ProgressBar, ProgressStyle};

use self::{
    case::{Backing, Contender, Found, Measurement, Memory, Method},
    report::{Report, Row},
    writer::Writer,
};
use super::median::median;
use crate::{
    Context,
    exit::{self, Exit, Failure},
    room, size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry bench dirty
  pageferry bench dirty --bytes 1GiB --share 1 --method wp-async --rounds 9
  pageferry bench dirty --backing thp --json > dirty.json
  pageferry bench dirty --bytes 16MiB,64MiB,256MiB,1GiB,4GiB,8GiB --plot dirty.svg

Each round of a contender: arm, write the share (one word a page, pages spread at random over all the
memory), harvest, which makes writes noticed again, harvest once more with nothing written, disarm.
Contenders of a case run one after another, in an order that turns from round to round; the first
round warms up and is not counted. Every figure is the median over the rounds. `write us` is what a
first write takes beyond the same write untracked; a cycle is those writes and the harvest. `raw`
is the smallest loop around the same system calls, with the same method. The model is fitted to the
sizes without the second largest and the largest, and its error is that on those two; of three sizes
or fewer to all of them, and then its error is not known.

With kvm-log and kvm-ring the memory (60GiB at most) is a guest's, of one vCPU, which writes the pages;
it is a machine of its own for each run, and has touched all of its memory before. A ring has 1MiB at
most, 16 bytes a page; each time that it is full, it is emptied while the guest waits, in the time of
the writes. `peak` has nothing of what KVM itself allocates.";

/// Cost of knowing which pages were written
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// Sizes of the memory
    #[arg(long, value_delimiter = ',', value_name = "SIZE,...", value_parser = parse_bytes)]
    #[arg(default_value = "16MiB,64MiB,256MiB,1GiB")]
    bytes: Vec<u64>,
    /// Shares of the pages that are written, in percent
    #[arg(long, value_delimiter = ',', value_name = "PERCENT,...", value_parser = parse_share)]
    #[arg(default_value = "0.1,1,10,50")]
    share: Vec<f64>,
    /// Methods to measure [default: all that work here]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    method: Vec<Method>,
    /// What the memory is made of
    #[arg(long, value_enum, default_value = "anon")]
    backing: Backing,
    /// Rounds that count
    #[arg(long, default_value = "5", value_name = "N")]
    rounds: NonZeroUsize,
    /// Seed of the choice of pages
    #[arg(long, default_value = "1", value_name = "N")]
    seed: u64,
    /// Draw the cycles over the sizes
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Whole huge pages, so that no backing is special.
fn parse_bytes(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes == 0 || bytes % (2 << 20) != 0 => Err("a multiple of 2MiB".into()),
        bytes => Ok(bytes),
    }
}

/// As a fraction.
fn parse_share(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        Ok(_) => Err("more than 0, and 100 at most".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// The two sides of a comparison.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Who {
    Raw,
    Ours,
}

fn contender(
    who: Who,
    method: Method,
    memory: &Memory,
    writer: &Writer<'_>,
) -> anyhow::Result<Box<dyn Contender>> {
    Ok(match (who, method) {
        (Who::Raw, Method::SoftDirty) => Box::new(raw::SoftDirty::new(memory)?),
        (Who::Raw, Method::WpBlocking) => Box::new(raw::Blocking::new(memory)?),
        (Who::Raw, Method::WpAsync) => Box::new(raw::Asynchronous::new(memory)?),
        (Who::Raw, Method::KvmLog) => Box::new(raw::Log::new(writer.guest()?)?),
        (Who::Raw, Method::KvmRing) => Box::new(raw::Ring::new(writer.guest()?)?),
        (Who::Ours, method) => Box::new(ours::Ours::new(method, memory, writer)?),
    })
}

/// One contender's rounds of one case.
struct Series {
    method: Method,
    who: Who,
    rounds: Vec<Measurement>,
}

impl Series {
    fn median_ms(&self, of: impl Fn(&Measurement) -> Duration) -> f64 {
        median(self.rounds.iter().map(|round| of(round).as_secs_f64() * 1e3).collect())
    }

    /// How many times the time of `other` in the same round.
    fn ratio_to(&self, other: &Series, of: impl Fn(&Measurement) -> Duration) -> f64 {
        let pairs = self.rounds.iter().zip(&other.rounds);
        median(pairs.map(|(a, b)| of(a).as_secs_f64() / of(b).as_secs_f64()).collect())
    }

    fn row(&self, bytes: u64, share: f64, raw: &Series) -> Row {
        let written = self.rounds.first().map_or(0, |round| round.written);
        Row {
            contender: if self.who == Who::Raw { "raw" } else { "pageferry" },
            method: self.method,
            bytes,
            dirty_share: share,
            written_pages: written,
            arm_ms: self.median_ms(|m| m.arm),
            write_us: self.median_ms(|m| m.writes) * 1e3 / written.max(1) as f64,
            harvest_ms: self.median_ms(|m| m.harvest),
            idle_harvest_ms: self.median_ms(|m| m.idle_harvest),
            cycle_ms: self.median_ms(Measurement::cycle),
            peak_bytes: median(self.rounds.iter().map(|m| m.peak_bytes as f64).collect()) as u64,
            ratio_to_raw: self.ratio_to(raw, Measurement::cycle),
            arm_ratio_to_raw: self.ratio_to(raw, |m| m.arm),
            harvest_ratio_to_raw: self.ratio_to(raw, |m| m.harvest),
        }
    }
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let largest = args.bytes.iter().copied().max().unwrap_or(0);
    let methods = methods(args, largest)?;
    if let Some(path) = &args.plot {
        plot::try_path(path)?;
    }
    // Its page tables, and what the trackers keep, are a hundredth of it.
    room::check(largest + largest / 50, "the memory of the largest case")?;
    let mut sizes = args.bytes.clone();
    sizes.sort_unstable();
    sizes.dedup();
    let rounds = args.rounds.get();
    let runs = sizes.len() * args.share.len() * methods.len() * 2 * (rounds + 1);
    let progress = ProgressBar::new(runs as u64);
    let style = "{bar:30} {pos}/{len} runs, {eta} left  {msg}";
    progress.set_style(ProgressStyle::with_template(style)?);
    let mut report = Report::new(args, rounds);
    for bytes in sizes {
        progress.set_message(format!("making {} of memory", size::display(bytes)));
        let memory = Memory::new(bytes, args.backing)?;
        for share in &args.share {
            progress.set_message(format!("{}, {}% written", size::display(bytes), share * 100.0));
            let series = measure(args, &methods, &memory, *share, context, &progress)?;
            for pair in series.chunks(2) {
                report.references.push(pair[0].row(bytes, *share, &pair[0]));
                report.rows.push(pair[1].row(bytes, *share, &pair[0]));
            }
        }
    }
    progress.finish_and_clear();
    report.fit();
    // First what cannot be had again.
    report.write(context.output)?;
    if let Some(path) = &args.plot {
        plot::draw(&report, path).with_context(|| format!("drawing {}", path.display()))?;
    }
    Ok(Exit::Success)
}

/// What was asked for, or everything that works on this host, with memory of this size.
fn methods(args: &Args, largest: u64) -> anyhow::Result<Vec<Method>> {
    let all = Method::value_variants();
    let asked = if args.method.is_empty() { all } else { &args.method };
    let mut working = Vec::new();
    for method in asked {
        match ours::obstacle(*method) {
            None if method.is_kvm() && largest > guest::MOST => {
                let (most, asked) = (size::display(guest::MOST), size::display(largest));
                let why = format!("{method}: a guest has {most} at most, not {asked}");
                if !args.method.is_empty() {
                    return Err(Failure::usage(why).into());
                }
                eprintln!("pageferry: no {why}");
            }
            None => working.push(*method),
            Some(why) if args.method.is_empty() => eprintln!("pageferry: no {method}: {why}"),
            Some(why) => return Err(Failure::missing(format!("{method}: {why}")).into()),
        }
    }
    if working.is_empty() {
        return Err(Failure::missing("no method works on this host").into());
    }
    working.sort_unstable();
    working.dedup();
    Ok(working)
}

/// Raw and ours of each method, one pair after the other.
fn measure(
    args: &Args,
    methods: &[Method],
    memory: &Memory,
    share: f64,
    context: &Context,
    progress: &ProgressBar,
) -> anyhow::Result<Vec<Series>> {
    let written = case::written(memory.pages(), share, args.seed);
    let mut series: Vec<Series> = methods
        .iter()
        .flat_map(|&method| {
            [Who::Raw, Who::Ours].map(|who| Series { method, who, rounds: Vec::new() })
        })
        .collect();
    let rounds = args.rounds.get();
    let mut turn = 0;
    for round in 0..=rounds {
        let count = series.len();
        for place in 0..count {
            context.stop_if_asked()?;
            let place = if round % 2 == 0 { place } else { count - 1 - place };
            let one = &mut series[place];
            turn += 1;
            let measured =
                once(one.who, one.method, memory, &written, turn).with_context(|| {
                    let who = if one.who == Who::Raw { "raw" } else { "pageferry" };
                    let (bytes, percent) = (size::display(memory.bytes), share * 100.0);
                    format!("{who}: {}, {bytes}, {percent}% written", one.method)
                })?;
            if round > 0 {
                one.rounds.push(measured);
            }
            progress.inc(1);
        }
    }
    Ok(series)
}

fn once(
    who: Who,
    method: Method,
    memory: &Memory,
    written: &[u64],
    turn: u64,
) -> anyhow::Result<Measurement> {
    let timed = |work: &mut dyn FnMut() -> anyhow::Result<()>| {
        let start = std::time::Instant::now();
        work().map(|()| start.elapsed())
    };
    // Untracked first, which also brings the pages into the same state for everybody.
    let mut writer = Writer::new(method, memory, written)?;
    let untracked = writer.write_untracked(turn)?;
    let before = case::resident()?;
    // As untouched as the library's own bitmap, which is what it is for *raw*.
    let found = &mut Found::new(memory.pages());
    let mut contender = contender(who, method, memory, &writer)?;
    let arm = timed(&mut || contender.arm())?;
    let tracked = writer.write(turn + 1, &mut || contender.collect())?;
    let harvest = timed(&mut || contender.harvest(found))?;
    contender.report(found);
    check(memory, method, written, found)?;
    found.clear();
    let idle_harvest = timed(&mut || contender.harvest(found))?;
    contender.report(found);
    anyhow::ensure!(found.count() == 0, "{} pages written by nobody", found.count());
    let peak = case::peak()?;
    contender.disarm()?;
    Ok(Measurement {
        arm,
        writes: tracked.saturating_sub(untracked),
        harvest,
        idle_harvest,
        peak_bytes: peak.saturating_sub(before),
        written: written.len() as u64,
    })
}

/// Every page that was written was found, and no more than the method's unit makes of it.
fn check(memory: &Memory, method: Method, written: &[u64], found: &Found) -> anyhow::Result<()> {
    if let Some(lost) = written.iter().find(|page| !found.has(**page)) {
        anyhow::bail!("page {lost} was written, and {method} did not report it");
    }
    let huge = memory.may_be_huge && !method.is_kvm();
    let most = if huge { memory.pages() } else { written.len() as u64 };
    anyhow::ensure!(
        found.count() <= most,
        "{} pages were written, and {method} reported {}",
        written.len(),
        found.count()
    );
    Ok(())
}
