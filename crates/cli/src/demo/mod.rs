//! `pageferry demo`: the main job. A guest's memory is moved between two processes while the
//! guest runs, and every page is verified.

mod args;
mod guest;
mod machine;
mod pattern;
mod plan;
mod report;
pub(crate) mod reserve;
pub(crate) mod source;
#[allow(unsafe_code)]
mod threads;
mod verify;

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use pageferry::{
    migrate::{PeerOptions, PeerSource},
    paging::{Events, Hints, Pager, StartError, Status},
};

pub(crate) use self::args::Args;
use self::{
    args::BackingName,
    guest::{Guest, Prepared},
    pattern::PAGE,
    plan::{Kind, Plan, ThisHost},
    report::Report,
    reserve::Reserved,
    source::Source,
    verify::Verified,
};
use crate::{
    Context,
    exit::{Exit, Failure},
    room, size,
};

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    migrate(args, context).or_else(|error| {
        // Ctrl-C in a terminal reaches the source too: a source that is lost then is no failure.
        context.stop_if_asked()?;
        Err(error)
    })
}

fn migrate(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let plan = Plan::new(args, &ThisHost)?;
    context.stop_if_asked()?;
    let page_size = plan.backing.page_size();
    let page = page_size.bytes();
    // A whole number of pages of whatever size the memory is made of.
    let bytes = args.memory.max(1).checked_next_multiple_of(page).ok_or_else(|| {
        Failure::usage(format!("--memory {} is more than there can be", args.memory))
    })?;
    if bytes != args.memory && !context.output.json() {
        eprintln!("--memory is rounded up to {}: whole pages of {page_size}", size::display(bytes));
    }
    let ordinary = matches!(plan.backing, BackingName::Anon | BackingName::Memfd);
    // The source holds it all, too.
    let needed = bytes.saturating_mul(if ordinary { 2 } else { 1 });
    room::check(needed, &format!("a guest of {} and its source", size::display(bytes)))?;
    let mut reserved = match plan.backing {
        BackingName::Anon | BackingName::Memfd => None,
        _ => Some(Reserved::new(page_size, bytes / page, context)?),
    };
    let prepared = Prepared::new(args, &plan, bytes)?;
    if let Some(reserved) = &mut reserved {
        reserved.mapped();
    }
    let progress = Progress::new(context)?;

    progress.phase("filling the source's memory");
    let delay = Duration::from_micros(args.delay_us);
    let source = Source::start(&prepared.layout()?, prepared.contents(), delay, context)?;
    context.stop_if_asked()?;
    let peer = PeerSource::connect(&source.endpoint, PeerOptions::default())
        .map_err(|error| Failure::source_lost(error.to_string()))?;

    let begun = Instant::now();
    let pager = prepared
        .pager(args)?
        .delivery(plan.delivery)
        .prefetch(args.prefetch)
        // The guest neither unmaps nor removes anything.
        .events(Events::Ignore)
        .hints(Hints {
            guest_threads: Some(args.threads.get()),
            user_mode_only: plan.kind == Kind::Threads,
        })
        .start(Arc::new(peer))
        .map_err(start_failure)?;
    let running = Running { pager: Some(Arc::new(pager)) };
    let pager = running.pager();
    let guest = prepared.start(args, pager)?;
    let complete = watch(&guest, pager, args, bytes, context, &progress)?;
    let guest_seconds = begun.elapsed();
    let seen = guest.join()?;
    let by_guest = pager.statistics();

    progress.phase("verifying every page");
    progress.bar.set_length(bytes / PAGE);
    let verifying = Instant::now();
    // On a thread of its own: without a sweep it touches pages that are absent still, and nobody
    // could end its wait for a page that does not come.
    let (bar, endpoint) = (progress.bar.clone(), source.endpoint.clone());
    let subject = prepared.subject(seen.left.clone(), pager)?;
    let verification = std::thread::Builder::new()
        .name("verification".into())
        .spawn(move || subject.verify(&endpoint, |pages| bar.set_position(pages)))
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
        plan: &plan,
        bytes,
        chosen: pager.chosen().clone(),
        by_guest,
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
        context.stop_if_asked()?;
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
    pager.remaining() * (source::granule_of(pager.layout()) / PAGE)
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
    pager: Option<Arc<Pager>>,
}

impl Running {
    fn pager(&self) -> &Arc<Pager> {
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
