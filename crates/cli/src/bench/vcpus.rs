//! `pageferry bench vcpus`: what a KVM guest's page faults cost, for every delivery, beside two
//! references measured in the same run.

mod case;
mod engine;
mod machine;
#[allow(unsafe_code)]
mod raw;
mod report;
mod start;
mod times;

use std::{
    num::{NonZeroU64, NonZeroUsize},
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum as _;
use indicatif::{ProgressBar, ProgressStyle};
use kvm_ioctls::Kvm;
use pageferry_kvm::{KvmError, probe};
use pageferry_vmm::VmConfig;

use self::{
    case::{Case, Delivery, Measurement, Ring, Setup},
    report::{Auto, LeftOut, Report, Row},
    times::Times,
};
use super::{
    case::{Kind, Order},
    median::median,
    reference::sys,
};
use crate::{
    Context,
    exit::{self, Exit, Failure},
    signals::Signals,
};

const EXAMPLES: &str = "\
Examples:
  pageferry bench vcpus
  pageferry bench vcpus --vcpus 1,8 --delivery queue,exit,auto --rounds 9
  pageferry bench vcpus --vcpus 32 --delay-us 30 --json > vcpus.json
  pageferry bench vcpus --setup no-queue,minor-own-view --kind minor
  pageferry bench vcpus --ring 0 --pages 64 --vcpus 1

The guest is a machine of its own for every run, whose vCPUs start together; each reads every page of
its slice once and checks what it reads. After every run all of the memory is compared with what it
should be, and the engine's counts with the number of pages: a wrong page fails the benchmark.
In every round all contenders of a group (same vCPUs and kind) run one after another, in an order that
turns from round to round; the first round warms up and is not counted. Every figure is the median over
the rounds, and a ratio is the median of the ratios within each round. Percentiles are of the guest's
own clock, over the touches of all counted rounds, true to within a factor of two.
References: `raw` is the smallest loop around KVM_RUN and the same system calls with the same
delivery; `reader` is the loop of userfaultfd(2): one thread, one poll, one message and one page at a
time. With --delay-us each of their threads sleeps for every page. Where other programs run, `cpu/raw`,
raw's processor time to this contender's, says more than `/raw`, which is of pages per second.
`auto` is measured as what the library picks on this host, and compared with the best of the others.";

/// Pages per second that a KVM guest gets by every fault delivery
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// Numbers of vCPUs, 1 to 64
    #[arg(
        long, value_delimiter = ',', default_value = "1,2,4,8,16,32", value_name = "N,...",
        value_parser = clap::value_parser!(u16).range(1..=VmConfig::MAX_VCPUS as i64)
    )]
    vcpus: Vec<u16>,
    /// Kinds of fault to measure [default: all]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    kind: Vec<Kind>,
    /// Deliveries to measure [default: all that this host has]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    delivery: Vec<Delivery>,
    /// Memory to measure [default: missing, minor, and minor-own-view for hybrid]
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    setup: Vec<Setup>,
    /// Pages of 4 KiB touched in each run, by all vCPUs together
    #[arg(long, default_value = "8192", value_name = "N")]
    pages: NonZeroU64,
    /// Rounds that count
    #[arg(long, default_value = "5", value_name = "N")]
    rounds: NonZeroUsize,
    /// Time from asking for a page to having it, as a network would take
    #[arg(long, default_value = "0", value_name = "N")]
    delay_us: u32,
    /// Order in which each vCPU touches its pages
    #[arg(long, value_enum, default_value = "random")]
    order: Order,
    /// Privilege level at which the guest runs
    #[arg(long, value_enum, default_value = "3")]
    ring: Ring,
    /// Readers or shards of the deliveries that have several [default: CPUs, at least 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
    /// Most messages taken from a userfaultfd at once (the `reader` reference takes one)
    #[arg(long, default_value = "64", value_name = "N")]
    batch: NonZeroUsize,
    /// Seed of the random order
    #[arg(long, default_value = "1", value_name = "N")]
    seed: u64,
}

/// Cases that share vCPUs and kind, and so the `reader` reference.
struct Group {
    reader: Case,
    cases: Vec<Case>,
}

impl Args {
    /// Every delivery on every set-up that was asked for, or goes without asking.
    fn combinations(&self, exits: bool) -> anyhow::Result<Vec<(Delivery, Setup)>> {
        let deliveries = match &*self.delivery {
            [] => Delivery::value_variants(),
            chosen => chosen,
        };
        let wanted = |delivery: Delivery, setup: Setup| match &*self.setup {
            // An own view is there for the sake of other threads.
            [] => match setup {
                Setup::Missing | Setup::Minor => true,
                Setup::MinorOwnView => delivery == Delivery::Hybrid,
                Setup::NoQueue => false,
            },
            chosen => chosen.contains(&setup),
        };
        let mut combinations = Vec::new();
        for delivery in deliveries {
            for setup in Setup::value_variants() {
                if wanted(*delivery, *setup)
                    && setup.takes(*delivery)
                    && (self.kind.is_empty() || self.kind.contains(&setup.kind()))
                    && (exits || !self.delivery.is_empty() || !delivery.exits())
                {
                    combinations.push((*delivery, *setup));
                }
            }
        }
        if combinations.is_empty() {
            let why = "nothing to measure: set-up missing is of missing faults, all others are of \
                       minor faults, and no-queue has exits only";
            return Err(Failure::usage(why).into());
        }
        if let Some(vcpus) = self.vcpus.iter().find(|vcpus| u64::from(**vcpus) > self.pages.get()) {
            let why = format!("{vcpus} vCPUs cannot each have a page of {}", self.pages);
            return Err(Failure::usage(why).into());
        }
        Ok(combinations)
    }

    fn groups(&self, combinations: &[(Delivery, Setup)]) -> anyhow::Result<Vec<Group>> {
        let cpus = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let workers = self.workers.unwrap_or(u16::try_from(cpus).unwrap_or(u16::MAX).max(2));
        let mut groups = Vec::new();
        for kind in [Kind::Missing, Kind::Minor] {
            for vcpus in &self.vcpus {
                let case = |delivery: Delivery, setup| {
                    let resolved =
                        delivery.resolve(*vcpus, workers).map_err(|error| {
                            match error.downcast::<KvmError>() {
                                Ok(error) => Failure::missing(error.to_string()).into(),
                                Err(error) => error,
                            }
                        })?;
                    Ok::<Case, anyhow::Error>(Case {
                        delivery,
                        resolved,
                        setup,
                        vcpus: *vcpus,
                        pages: self.pages.get(),
                        order: self.order,
                        ring: self.ring,
                        seed: self.seed,
                        batch: self.batch.get(),
                        delay: Duration::from_micros(self.delay_us.into()),
                    })
                };
                let of_kind = combinations.iter().filter(|(_, setup)| setup.kind() == kind);
                let cases = of_kind.map(|(delivery, setup)| case(*delivery, *setup));
                let cases = cases.collect::<anyhow::Result<Vec<_>>>()?;
                if !cases.is_empty() {
                    let setup = match kind {
                        Kind::Missing => Setup::Missing,
                        Kind::Minor => Setup::Minor,
                    };
                    groups.push(Group { reader: case(Delivery::Queue, setup)?, cases });
                }
            }
        }
        Ok(groups)
    }
}

/// One who serves a guest's faults.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Contender {
    Reader,
    Raw,
    Pageferry,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Reader => raw::READER,
            Self::Raw => raw::NAME,
            Self::Pageferry => engine::NAME,
        }
    }

    /// Serves `case` once, on a machine of its own.
    fn run(self, case: &Case, signals: &Signals) -> anyhow::Result<Measurement> {
        match self {
            Self::Reader => raw::reader(case, signals),
            Self::Raw => raw::run(case, signals),
            Self::Pageferry => engine::run(case, signals),
        }
    }
}

/// One contender's runs of one case.
struct Series {
    contender: Contender,
    case: Case,
    rounds: Vec<Measurement>,
}

impl Series {
    fn new(contender: Contender, case: &Case) -> Self {
        Self { contender, case: case.clone(), rounds: Vec::new() }
    }

    /// Runs the case once, and keeps the result unless it is to warm up.
    fn run(&mut self, context: &Context, warm_up: bool) -> anyhow::Result<()> {
        context.stop_if_asked()?;
        let measured = self.contender.run(&self.case, &context.signals).or_else(|error| {
            context.stop_if_asked()?;
            Err(error).with_context(|| format!("{}: {}", self.contender.name(), self.case))
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
    fn ratio_to(&self, other: &Self) -> f64 {
        let ratios = self.rounds.iter().zip(&other.rounds);
        median(ratios.map(|(mine, theirs)| rate(mine) / rate(theirs)).collect())
    }

    /// The same of processor time: whatever else the machine does has little part in it.
    fn cpu_ratio_to(&self, other: &Self) -> f64 {
        let ratios = self.rounds.iter().zip(&other.rounds);
        median(ratios.map(|(mine, theirs)| cpu(theirs) / cpu(mine)).collect())
    }

    fn row(&self, raw: Option<&Self>, reader: &Self, best: Option<&Self>) -> Row {
        let mut times = Times::default();
        for round in &self.rounds {
            times.merge(&round.times);
        }
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        let Case { delivery, setup, vcpus, ref resolved, delay, .. } = self.case;
        let auto = resolved.why.as_ref().map(|why| Auto {
            picked: resolved.served.map_or_else(String::new, |served| served.to_string()),
            why: why.clone(),
            best: best.map(|best| best.case.delivery),
            ratio_to_best: best.map(|best| self.ratio_to(best)),
        });
        let pages_per_s = self.median(rate);
        Row {
            contender: self.contender.name(),
            delivery,
            threads: vcpus,
            backing: setup.backing(),
            kind: setup.kind(),
            setup,
            delay_us: delay.as_micros() as u64,
            pages_per_s,
            pages_per_s_per_vcpu: pages_per_s / f64::from(vcpus),
            us_per_page: self.median(|m| micros(m.wall) / m.pages as f64),
            cpu_us_per_page: self.median(cpu) * 1e6,
            p50_us: times.quantile_us(0.5),
            p99_us: times.quantile_us(0.99),
            max_us: times.max_us(),
            ratio_to_raw: raw.map(|raw| self.ratio_to(raw)),
            cpu_ratio_to_raw: raw.map(|raw| self.cpu_ratio_to(raw)),
            ratio_to_reader: self.ratio_to(reader),
            auto,
        }
    }
}

/// Pages in a second.
fn rate(measured: &Measurement) -> f64 {
    measured.pages as f64 / measured.wall.as_secs_f64()
}

/// Seconds of processor time for a page.
fn cpu(measured: &Measurement) -> f64 {
    measured.cpu.as_secs_f64() / measured.pages as f64
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    // What is wrong with the options is said first, whatever the host has.
    args.combinations(true)?;
    let exits = needs()?;
    let combinations = args.combinations(exits.is_ok())?;
    if args.delay_us > 0 {
        // A delay should be as long as it says, not up to 50 us longer: prctl(2). Threads have
        // their makers' slack.
        rustix::thread::set_current_timer_slack(Some(NonZeroU64::MIN))
            .context("setting the timer slack")?;
    }
    let groups = args.groups(&combinations)?;
    let rounds = args.rounds.get();
    let runs: usize = groups.iter().map(|group| 1 + 2 * group.cases.len()).sum();
    let progress = ProgressBar::new((runs * (rounds + 1)) as u64);
    progress
        .set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} runs, {eta} left  {msg}")?);
    let mut report = Report::new(args);
    if let (Err(why), true) = (exits, args.delivery.is_empty()) {
        report.left_out = [Delivery::Exit, Delivery::Hybrid]
            .map(|delivery| LeftOut { delivery, why: why.clone() })
            .into();
    }
    for group in &groups {
        measure(group, rounds, context, &progress, &mut report)?;
    }
    progress.finish_and_clear();
    report.write(context.output)?;
    Ok(Exit::Success)
}

/// An error if the host lacks what every delivery needs. Otherwise whether it has exits, or why not.
fn needs() -> anyhow::Result<Result<(), String>> {
    let missing = |what: String| Failure::missing(format!("{what} (`pageferry doctor` says more)"));
    Kvm::new().map_err(|error| missing(format!("no KVM: /dev/kvm: {error}")))?;
    sys::open_for_kernel(0).map_err(|error| {
        missing(format!("no userfaultfd that serves KVM, whose faults are the kernel's: {error}"))
    })?;
    let host = probe::host();
    let said = |id| match host.find(id) {
        Some(finding) if host.works(id) => Ok(finding),
        Some(finding) => Err(finding.to_string()),
        None => Err(format!("{id} was not looked for")),
    };
    said(probe::RUNS).map_err(missing)?;
    Ok(said(probe::POISON_EXITS).map(|_| ()))
}

/// Runs all contenders of `group`, interleaved, and adds their rows.
fn measure(
    group: &Group,
    rounds: usize,
    context: &Context,
    progress: &ProgressBar,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut series = vec![Series::new(Contender::Reader, &group.reader)];
    for case in &group.cases {
        // Next to each other, so that the machine is in the same state for both.
        series.push(Series::new(Contender::Raw, case));
        series.push(Series::new(Contender::Pageferry, case));
    }
    let turns = series.len();
    for round in 0..=rounds {
        for turn in 0..turns {
            // Who comes first turns.
            let place = if round % 2 == 0 { turn } else { turns - 1 - turn };
            let Series { contender, ref case, .. } = series[place];
            progress.set_message(format!("{}: {case}", contender.name()));
            series[place].run(context, round == 0)?;
            progress.inc(1);
        }
    }
    let (reader, rest) = series.split_first().context("a reader")?;
    report.references.push(reader.row(None, reader, None));
    let paged = rest
        .iter()
        .skip(1)
        .step_by(2)
        .filter(|ours| !matches!(ours.case.delivery, Delivery::None | Delivery::Auto));
    let best = paged.max_by(|a, b| a.median(rate).total_cmp(&b.median(rate)));
    for pair in rest.chunks_exact(2) {
        let [raw, ours] = pair else { continue };
        report.references.push(raw.row(Some(raw), reader, None));
        report.rows.push(ours.row(Some(raw), reader, best));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
