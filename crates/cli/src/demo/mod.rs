//! `pageferry demo`: the main job. A guest's memory is moved between two processes while the
//! guest runs, and every page is verified.

#[allow(unsafe_code)]
mod guest;
mod pattern;
mod report;
mod reserve;
pub(crate) mod source;
mod verify;

use std::{
    num::NonZeroU16,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use pageferry::{
    memory::{Backing, Layout, PageSize, Region, RegionConfig},
    migrate::{PeerOptions, PeerSource},
    paging::{self, Events, Hints, InstallMethod, Pager, Prefetch, StartError, Status},
};

use self::{
    guest::{Guest, Workload},
    pattern::{PAGE, Pattern},
    report::Report,
    reserve::Reserved,
    source::Source,
    verify::{Verified, verify},
};
use crate::{
    Context,
    exit::{self, Exit, Failure},
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry demo
  pageferry demo --memory 2GiB --threads 8 --delivery sharded --prefetch none
  pageferry demo --backing memfd --workload sequential --prefetch around:64KiB --json
  pageferry demo --delay-us 500 --workload zipf

Two processes on this host: one holds the memory and serves it over TCP; in the other a guest runs
on that memory, none of which is there at first. Each page it touches is fetched and installed, the
guest goes on, and the rest follows in the background. At the end every page is fetched once more
and compared byte by byte.";

/// Move a running guest's memory between two processes, and verify every page
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(crate) struct Args {
    /// Memory of the guest
    #[arg(long, default_value = "512MiB", value_parser = size::parse, value_name = "SIZE")]
    memory: u64,
    /// Threads of the guest
    #[arg(long, default_value = "4", value_name = "N")]
    threads: NonZeroU16,
    /// What the guest is
    #[arg(long, value_enum, default_value = "threads")]
    guest: GuestKind,
    /// How faults reach the engine
    #[arg(long, value_enum, default_value = "auto")]
    delivery: DeliveryName,
    /// How pages are installed
    #[arg(long, value_enum, default_value = "auto")]
    install: InstallName,
    /// What the guest's memory is made of
    #[arg(long, value_enum, default_value = "anon")]
    backing: BackingName,
    /// What is fetched beyond what is touched: none, sweep, or around:SIZE
    #[arg(long, default_value = "sweep", value_parser = parse_prefetch, value_name = "POLICY")]
    prefetch: Prefetch,
    /// What the guest does
    #[arg(long, value_enum, default_value = "mixed")]
    workload: Workload,
    /// Delay each answer of the source by this many microseconds
    #[arg(long, default_value = "0", value_name = "N")]
    delay_us: u64,
    /// Seed of the memory's contents
    #[arg(long, default_value = "1", value_name = "N")]
    seed: u64,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum GuestKind {
    /// Threads of this process
    Threads,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum DeliveryName {
    Auto,
    Queue,
    QueueN,
    ByThread,
    ByCpu,
    Sharded,
    Signal,
}

impl DeliveryName {
    fn delivery(self) -> paging::Delivery {
        match self {
            Self::Auto => paging::Delivery::Auto,
            Self::Queue => paging::Delivery::Queue,
            Self::QueueN => paging::Delivery::QueueN(0),
            Self::ByThread => paging::Delivery::ByThread(0),
            Self::ByCpu => paging::Delivery::ByCpu(0),
            Self::Sharded => paging::Delivery::Sharded(0),
            Self::Signal => paging::Delivery::Signal,
        }
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum InstallName {
    Auto,
    Copy,
    Continue,
    Move,
}

impl InstallName {
    fn method(self) -> Option<InstallMethod> {
        match self {
            Self::Auto => None,
            Self::Copy => Some(InstallMethod::Copy),
            Self::Continue => Some(InstallMethod::Continue),
            Self::Move => Some(InstallMethod::Move),
        }
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum BackingName {
    /// Private anonymous memory
    Anon,
    /// A memfd, mapped twice
    Memfd,
    /// Huge pages of 2 MiB; reserved for the run if need be (root)
    #[value(name = "hugetlb-2m")]
    Hugetlb2m,
    /// Huge pages of 1 GiB; reserved for the run if need be (root)
    #[value(name = "hugetlb-1g")]
    Hugetlb1g,
}

impl BackingName {
    fn backing(self) -> Backing {
        match self {
            Self::Anon => Backing::Anonymous,
            Self::Memfd => Backing::Memfd,
            Self::Hugetlb2m => Backing::Hugetlb(PageSize::SIZE_2M),
            Self::Hugetlb1g => Backing::Hugetlb(PageSize::SIZE_1G),
        }
    }

    fn page_size(self) -> PageSize {
        match self {
            Self::Anon | Self::Memfd => PageSize::SIZE_4K,
            Self::Hugetlb2m => PageSize::SIZE_2M,
            Self::Hugetlb1g => PageSize::SIZE_1G,
        }
    }
}

fn parse_prefetch(text: &str) -> Result<Prefetch, String> {
    match text {
        "none" => Ok(Prefetch::NONE),
        "sweep" => Ok(Prefetch::SWEEP),
        _ => {
            let bytes = text
                .strip_prefix("around:")
                .ok_or_else(|| format!("{text:?} is not none, sweep or around:SIZE"))?;
            let bytes = size::parse(bytes)?;
            if !(bytes.is_power_of_two() && (PAGE..=1 << 30).contains(&bytes)) {
                return Err(format!("{text}: a power of two from 4KiB to 1GiB"));
            }
            Ok(Prefetch::around(bytes))
        }
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    migrate(args, context).or_else(|error| {
        // Ctrl-C in a terminal reaches the source too: a source that is lost then is no failure.
        context.stop_if_asked()?;
        Err(error)
    })
}

fn migrate(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let page_size = args.backing.page_size();
    let page = page_size.bytes();
    // A whole number of pages of whatever size the memory is made of.
    let bytes = args.memory.max(1).checked_next_multiple_of(page).ok_or_else(|| {
        Failure::usage(format!("--memory {} is more than there can be", args.memory))
    })?;
    if bytes != args.memory && !context.output.json() {
        eprintln!("--memory is rounded up to {}: whole pages of {page_size}", size::display(bytes));
    }
    let mut reserved = match args.backing {
        BackingName::Anon | BackingName::Memfd => None,
        _ => Some(Reserved::new(page_size, bytes / page)?),
    };
    let layout = Layout::new(vec![Arc::new(Region::new(&RegionConfig::new(
        bytes,
        args.backing.backing(),
    ))?)])?;
    if let Some(reserved) = &mut reserved {
        reserved.mapped();
    }
    let progress = Progress::new(context)?;

    progress.phase("filling the source's memory");
    let pattern = Pattern { seed: args.seed };
    let delay = Duration::from_micros(args.delay_us);
    let source = Source::start(bytes, page, pattern, delay, context)?;
    context.stop_if_asked()?;
    let region = Arc::clone(layout.get(pageferry::memory::RegionId::new(0)).context("one region")?);
    let peer = PeerSource::connect(&source.endpoint, PeerOptions::default())
        .map_err(|error| Failure::source_lost(error.to_string()))?;

    let begun = Instant::now();
    let pager = Pager::builder(layout)
        .delivery(args.delivery.delivery())
        .install(args.install.method())
        .prefetch(args.prefetch)
        // The guest neither unmaps nor removes anything.
        .events(Events::Ignore)
        .hints(Hints { guest_threads: Some(args.threads.get()), user_mode_only: true })
        .start(Arc::new(peer))
        .map_err(start_failure)?;
    let running = Running { pager: Some(pager) };
    let pager = running.pager();
    // Twice as many accesses as there are pages, by all threads together.
    let threads = u64::from(args.threads.get());
    let touches = (2 * bytes / PAGE).div_ceil(threads);
    let guest = Guest::start(&region, pattern, args.workload, threads, touches)
        .context("starting the guest's threads")?;
    let complete = watch(&guest, pager, args, bytes, context, &progress)?;
    let guest_seconds = begun.elapsed();
    let (seen, increments) = guest.join()?;

    progress.phase("verifying every page");
    progress.bar.set_length(bytes / PAGE);
    let verifying = Instant::now();
    // On a thread of its own: without a sweep it touches pages that are absent still, and nobody
    // could end its wait for a page that does not come.
    let (bar, endpoint) = (progress.bar.clone(), source.endpoint.clone());
    let verification = std::thread::Builder::new()
        .name("verification".into())
        .spawn(move || verify(&region, &increments, &endpoint, |pages| bar.set_position(pages)))
        .context("starting to verify")?;
    let verified = watch_verification(verification, pager, bytes, context)?;
    let verify_seconds = verifying.elapsed();
    // Without a sweep, only now has everything been touched.
    let status = pager.wait_complete(Duration::from_secs(30));
    let Status::Complete(counts) = status else {
        return Err(
            Failure::source_lost(format!("the migration did not complete: {status:?}")).into()
        );
    };
    progress.bar.finish_and_clear();
    let report = Report::new(report::Run {
        args,
        bytes,
        chosen: pager.chosen().clone(),
        statistics: pager.statistics(),
        counts,
        seen: &seen,
        guest_seconds: guest_seconds.as_secs_f64(),
        complete_seconds: complete.map(|time| time.as_secs_f64()),
        verified,
        verify_seconds: verify_seconds.as_secs_f64(),
        source_pid: source.pid(),
    });
    if context.output.json() {
        context.output.write_json(&report)?;
    } else {
        context.output.write_text(&report.render())?;
    }
    Ok(if report.verified() { Exit::Success } else { Exit::Failed })
}

/// Shows progress until the guest has finished and, with a sweep, all memory is there. Returns
/// when the latter was, if it was.
fn watch(
    guest: &Guest,
    pager: &Pager,
    args: &Args,
    bytes: u64,
    context: &Context,
    progress: &Progress,
) -> anyhow::Result<Option<Duration>> {
    progress.phase("the guest runs");
    progress.bar.set_length(bytes / PAGE);
    loop {
        let status = pager.wait_complete(Duration::from_millis(30));
        let present = bytes / PAGE - absent_pages(pager);
        progress.bar.set_position(present);
        progress.bar.set_message(format!("{} accesses", guest.touches()));
        let complete = matches!(status, Status::Complete(_));
        if guest.is_finished() && (complete || !args.prefetch.sweep) {
            return Ok(pager.statistics().time_to_complete);
        }
        expect_source(&status, present, bytes)?;
        if complete {
            // Nothing is left but the guest's own work.
            std::thread::park_timeout(Duration::from_millis(10));
        }
        if let Err(stopped) = context.stop_if_asked() {
            guest.stop();
            return Err(stopped);
        }
    }
}

/// Waits for the verification, a signal, or the loss of the source.
fn watch_verification(
    verification: JoinHandle<anyhow::Result<Verified>>,
    pager: &Pager,
    bytes: u64,
    context: &Context,
) -> anyhow::Result<Verified> {
    while !verification.is_finished() {
        let status = pager.wait_complete(Duration::from_millis(10));
        expect_source(&status, bytes / PAGE - absent_pages(pager), bytes)?;
        if matches!(status, Status::Complete(_)) {
            // Nothing is left but the comparison.
            std::thread::park_timeout(Duration::from_millis(10));
        }
        context.stop_if_asked()?;
    }
    match verification.join() {
        Ok(result) => result,
        Err(_) => anyhow::bail!("the verification panicked"),
    }
}

fn absent_pages(pager: &Pager) -> u64 {
    let granules = pager.layout().iter().map(|(_, region)| region.granule().bytes()).max();
    pager.remaining() * (granules.unwrap_or(PAGE) / PAGE)
}

/// An error if the source is lost.
fn expect_source(status: &Status, present: u64, bytes: u64) -> anyhow::Result<()> {
    let Status::Stalled { why } = status else { return Ok(()) };
    let pages = bytes / PAGE;
    Err(Failure::source_lost(format!("the source is lost after {present} of {pages} pages: {why}"))
        .into())
}

/// A pager whose guest may still be stopped on a page when an error ends the command.
///
/// Dropping a pager poisons what is missing, and a guest thread stopped on it would get a SIGBUS
/// that ends the process before it has cleaned up. Left alone the thread waits until the process
/// ends, which is about to happen.
struct Running {
    pager: Option<Pager>,
}

impl Running {
    fn pager(&self) -> &Pager {
        self.pager.as_ref().expect("taken only on drop")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pager) = self.pager.take()
            && pager.remaining() > 0
        {
            std::mem::forget(pager);
        }
    }
}

fn start_failure(error: StartError) -> anyhow::Error {
    match error {
        StartError::Open(_) => Failure::missing(error.to_string()).into(),
        StartError::Install { .. } => Failure::usage(error.to_string()).into(),
        StartError::Source(_) => Failure::source_lost(error.to_string()).into(),
        other => other.into(),
    }
}

struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(context: &Context) -> anyhow::Result<Self> {
        let bar = if context.output.json() { ProgressBar::hidden() } else { ProgressBar::new(1) };
        let style = "{prefix:<28} {bar:30} {percent:>3}%  {msg}";
        bar.set_style(ProgressStyle::with_template(style)?);
        Ok(Self { bar })
    }

    fn phase(&self, name: &'static str) {
        self.bar.set_prefix(name);
        self.bar.set_message("");
        self.bar.set_position(0);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
