//! `pageferry bench migrate`: guests that are moved while they run, from one process to another, and
//! the same bytes sent plainly.

mod case;
pub(in crate::bench) mod end;
#[allow(unsafe_code)]
mod plain;
mod plot;
mod process;
mod report;
mod times;

use std::{
    fs::File,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use kvm_ioctls::Kvm;
use pageferry::memory::HugePagePool;
use pageferry_vmm::VmConfig;

use self::{
    case::{Backing, Case, Compression, Mode, Workload},
    end::{Job, Received, Sent},
    plain::{Plain, PlainReceived, PlainSent},
    report::{Report, Row},
};
use super::{median::median, reference::sys};
use crate::{
    Context,
    exit::{self, Exit, Failure},
    room, size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry bench migrate
  pageferry bench migrate --memory 1GiB --mode post --workload random-read
  pageferry bench migrate --mode hybrid --workload random-write:200 --connections 1,2 --json
  pageferry bench migrate --mode pre --workload stopped --backing anon,memfd,hugetlb --plot pre.svg

A guest of vCPUs that check all they read is moved from one process to another, over TCP on the
loopback interface. Each run has a guest of its own, in processes of its own, and is verified: what
the guest saw on both sides, and every word of its memory afterwards; a wrong one fails the
benchmark. Before the cases of a kind of memory and number of connections, `plain-send` sends as
many bytes between two processes from and to memory of that kind, over as many connections. Rounds
are interleaved, in an order that turns; the first warms up and is not counted. Figures are medians
over the rounds; `/plain` is how many times as fast as plain-send in the same round.

Workloads: stopped (from before the migration on), idle (100 pages a second are read), random-read,
random-write and linear-write, the last two as fast as it goes or, as in random-write:200, so many
MB/s. The memory is filled with what does not compress well. `MB/s` are those of the guest's memory,
each byte counted once however often it was sent. Pre-copy and hybrid stop the guest and send what is
left as soon as that fits the downtime; hybrid leaves what does not to post-copy. Faults are those that somebody waited for; their
times are the pager's, from the fault's arrival to the page's presence. `guest p50` and `p99` are by
the guest's own clock, of as many of its slowest touches, and true to within a factor of two.";

/// How fast guests move, and what they feel of it
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(super) struct Args {
    /// When the guest moves, and when its memory does
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    #[arg(default_value = "pre,post,hybrid")]
    mode: Vec<Mode>,
    /// What the guest does meanwhile
    #[arg(long, value_delimiter = ',', value_name = "NAME[:MB/s],...")]
    #[arg(default_value = "random-read")]
    workload: Vec<Workload>,
    /// What its memory is made of, on both sides
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    #[arg(default_value = "anon")]
    backing: Vec<Backing>,
    /// Connections that carry pages, besides the control connection, 0 to 32
    #[arg(
        long, value_delimiter = ',', default_value = "1", value_name = "N,...",
        value_parser = clap::value_parser!(u16).range(0..=32)
    )]
    connections: Vec<u16>,
    /// How pages are compressed
    #[arg(long, value_delimiter = ',', value_enum, value_name = "NAME,...")]
    #[arg(default_value = "auto")]
    compression: Vec<Compression>,
    /// The guest's memory
    #[arg(long, default_value = "256MiB", value_name = "SIZE", value_parser = parse_memory)]
    memory: u64,
    /// The guest's vCPUs, 1 to 64
    #[arg(
        long, default_value = "1", value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=VmConfig::MAX_VCPUS as i64)
    )]
    vcpus: u16,
    /// The downtime that pre-copy aims for
    #[arg(long, default_value = "300ms", value_name = "TIME", value_parser = humantime::parse_duration)]
    downtime: Duration,
    /// Cap, in MB/s, for what post-copy brings unasked
    #[arg(long, value_name = "MB/s")]
    background: Option<NonZeroU32>,
    /// Rounds that count
    #[arg(long, default_value = "5", value_name = "N")]
    rounds: NonZeroUsize,
    /// Draw throughput and fault latency
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// Whole huge pages, so that every kind can be had.
fn parse_memory(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes == 0 || bytes % (2 << 20) != 0 => Err("a multiple of 2MiB".into()),
        bytes => Ok(bytes),
    }
}

/// Who moves the memory. There is room for another engine's migration of the same guest.
enum Contender {
    Plain(Plain),
    Pageferry(Case),
}

/// What one run came to.
struct Measurement {
    total: Duration,
    /// Of a guest.
    guest: Option<(Sent, Received)>,
}

/// One contender's runs.
struct Series {
    contender: Contender,
    rounds: Vec<Measurement>,
}

impl Series {
    fn new(contender: Contender) -> Self {
        Self { contender, rounds: Vec::new() }
    }

    fn name(&self) -> String {
        match &self.contender {
            Contender::Plain(Plain { backing, connections, .. }) => {
                format!("plain-send, {backing}, {connections} connections")
            }
            Contender::Pageferry(case) => format!("pageferry, {case}"),
        }
    }

    fn run(&mut self, context: &Context, warm_up: bool) -> anyhow::Result<()> {
        let measured = match &self.contender {
            Contender::Plain(plain) => {
                let source = |to| Job::PlainSource { plain: plain.clone(), to };
                let destination = Job::PlainDestination { plain: plain.clone() };
                let (sent, _) =
                    process::run::<PlainSent, PlainReceived>(source, &destination, context)?;
                Measurement { total: sent.total, guest: None }
            }
            Contender::Pageferry(case) => {
                let source = |to| Job::Source { case: case.clone(), to };
                let destination = Job::Destination { case: case.clone() };
                let (sent, received): (Sent, Received) =
                    process::run(source, &destination, context)?;
                Measurement { total: sent.total, guest: Some((sent, received)) }
            }
        };
        if !warm_up {
            self.rounds.push(measured);
        }
        Ok(())
    }

    /// The median of what is known; `None` if nothing is.
    fn median(&self, of: impl Fn(&Measurement) -> Option<f64>) -> Option<f64> {
        let known: Vec<f64> = self.rounds.iter().filter_map(of).collect();
        (!known.is_empty()).then(|| median(known))
    }

    /// Of what a guest's migration measured.
    fn median_of_guest(&self, of: impl Fn(&Sent, &Received) -> Option<f64>) -> Option<f64> {
        self.median(|round| round.guest.as_ref().and_then(|(sent, received)| of(sent, received)))
    }

    fn row(&self, plain: &Self) -> Row {
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let micros = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1e6);
        let guest_us = |share| {
            self.median_of_guest(|sent, received| {
                let here = received.times.since(&sent.times);
                here.quantile_of_slowest_us(received.waits.faults, share)
            })
        };
        let case = match &self.contender {
            Contender::Plain(_) => None,
            Contender::Pageferry(case) => Some(case),
        };
        let (backing, memory_bytes, connections) = match &self.contender {
            Contender::Plain(plain) => (plain.backing, plain.memory_bytes, plain.connections),
            Contender::Pageferry(case) => (case.backing, case.memory_bytes, case.connections),
        };
        let pairs = self.rounds.iter().zip(&plain.rounds);
        let ratios = pairs.map(|(own, plain)| plain.total.div_duration_f64(own.total)).collect();
        let rate = |round: &Measurement| memory_bytes as f64 / round.total.as_secs_f64() / 1e6;
        Row {
            engine: if case.is_some() { "pageferry" } else { "plain-send" },
            mode: case.map(|case| case.mode),
            workload: case.map(|case| case.workload),
            backing,
            memory_bytes,
            connections,
            compression: case.map(|case| case.compression),
            total_ms: self.median(|round| Some(millis(round.total))).unwrap_or(f64::NAN),
            downtime_ms: self.median_of_guest(|sent, _| sent.downtime.map(millis)),
            mb_per_s: self.median(|round| Some(rate(round))).unwrap_or(f64::NAN),
            ratio_to_plain: median(ratios),
            sent_bytes: self.median_of_guest(|sent, _| Some(sent.bytes as f64)),
            rounds: self.median_of_guest(|sent, _| Some(sent.rounds as f64)),
            faults: self.median_of_guest(|_, received| Some(received.waits.faults as f64)),
            blocked_ms: self.median_of_guest(|_, received| Some(millis(received.waits.blocked))),
            p50_us: self.median_of_guest(|_, received| micros(received.waits.p50)),
            p99_us: self.median_of_guest(|_, received| micros(received.waits.p99)),
            max_us: self.median_of_guest(|_, received| micros(received.waits.max)),
            guest_p50_us: guest_us(0.5),
            guest_p99_us: guest_us(0.99),
        }
    }
}

impl Args {
    /// For each kind of memory and number of connections: plain-send, then all cases.
    fn groups(&self) -> Vec<Vec<Series>> {
        let mut groups = Vec::new();
        for &backing in &self.backing {
            for &connections in &self.connections {
                let plain = Plain { memory_bytes: self.memory, backing, connections };
                let mut group = vec![Series::new(Contender::Plain(plain))];
                for &workload in &self.workload {
                    for &mode in &self.mode {
                        for &compression in &self.compression {
                            group.push(Series::new(Contender::Pageferry(Case {
                                mode,
                                workload,
                                backing,
                                memory_bytes: self.memory,
                                vcpus: self.vcpus,
                                connections,
                                compression,
                                downtime: self.downtime,
                                background: self.background,
                            })));
                        }
                    }
                }
                groups.push(group);
            }
        }
        groups
    }

    /// An error if the host lacks what is needed.
    fn check_host(&self) -> anyhow::Result<()> {
        let missing = |what: &str, why: &dyn std::fmt::Display| {
            Failure::missing(format!("{what}: {why} (`pageferry doctor` says more)"))
        };
        Kvm::new().map_err(|error| missing("no KVM: /dev/kvm", &error))?;
        if self.mode.iter().any(|mode| *mode != Mode::Pre) {
            let what = "no userfaultfd for the faults of KVM";
            sys::open_for_kernel(0).map_err(|error| missing(what, &error))?;
        }
        if self.backing.iter().any(|backing| *backing != Backing::Hugetlb) {
            // Both sides, and what they keep of it.
            let bytes = self.memory.saturating_mul(2);
            room::check(bytes.saturating_add(bytes / 50), "the guest's memory on both sides")?;
        }
        if self.backing.contains(&Backing::Hugetlb) {
            let size = Backing::Hugetlb.page_size();
            let needed = self.memory.div_ceil(size.bytes()).saturating_mul(2);
            let pool = HugePagePool::read(size).map_err(|error| missing("huge pages", &error))?;
            if pool.available() < needed {
                return Err(Failure::missing(format!(
                    "{needed} huge pages of {size} are needed, {} are free; as root: echo N > {}",
                    pool.available(),
                    HugePagePool::control_file(size)
                ))
                .into());
            }
        }
        Ok(())
    }
}

pub(super) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    args.check_host()?;
    // What cannot be written is better known before all the runs than after.
    let plot = match &args.plot {
        Some(path) => {
            let what = || format!("opening {} to draw in it", path.display());
            Some((path, File::create(path).with_context(what)?))
        }
        None => None,
    };
    let rounds = args.rounds.get();
    let groups = args.groups();
    let runs: usize = groups.iter().map(Vec::len).sum();
    let progress = ProgressBar::new((runs * (rounds + 1)) as u64);
    progress
        .set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} runs, {eta} left  {msg}")?);
    let mut report = Report::new(args.vcpus, rounds);
    for mut group in groups {
        measure(&mut group, rounds, context, &progress)?;
        report.rows.extend(group.iter().map(|series| series.row(&group[0])));
    }
    progress.finish_and_clear();
    if let Some((path, file)) = plot {
        plot::draw(&report, file).with_context(|| format!("drawing {}", path.display()))?;
    }
    report.write(context.output)?;
    Ok(Exit::Success)
}

/// Runs all contenders of a group, interleaved.
fn measure(
    group: &mut [Series],
    rounds: usize,
    context: &Context,
    progress: &ProgressBar,
) -> anyhow::Result<()> {
    let turns = group.len();
    for round in 0..=rounds {
        for turn in 0..turns {
            context.stop_if_asked()?;
            // Who comes first turns.
            let place = if round % 2 == 0 { turn } else { turns - 1 - turn };
            let series = &mut group[place];
            let name = series.name();
            progress.set_message(name.clone());
            series.run(context, round == 0).context(name)?;
            progress.inc(1);
        }
    }
    Ok(())
}
