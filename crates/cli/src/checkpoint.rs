//! `pageferry checkpoint`: the memory of a running process, as a chain of images.

use std::{io::IsTerminal as _, num::NonZeroU32, path::PathBuf, time::Duration};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use pageferry::{
    checkpoint::{self, Destination, Directory, Event, Options, Remote, Round, SendingError, Why},
    migrate::{Endpoint, SenderOptions},
    process::{Process, ProcessError, StopMethod, StopOptions, Stopped},
};
use serde::Serialize;

use crate::{
    Context, dirty,
    exit::{self, Exit, Failure},
    signals::Signal,
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry checkpoint --pid 4711 --to checkpoints/
  pageferry checkpoint --pid 4711 --to 192.0.2.7:7777
  pageferry checkpoint --pid 4711 --to checkpoints/ --downtime 5ms --rounds 20
  pageferry checkpoint --pid 4711 --to checkpoints/ --leave-stopped --json

The first image has everything and is made while the process runs. Each round after it stops the
process, asks what was written since, lets it go on, and makes an image of just that. When what is
left can be copied within --downtime, by the speed of the rounds before, or after --rounds, the last
image is made while the process stands still: with it the chain is the memory of that moment. Then the
process goes on, untracked. `pageferry image` works with the images, `pageferry receive` takes them
from the network. Memory only: no registers, no open files.

Nothing is prepared in the process. Its writes are noticed by write protection with a userfaultfd that
it is made to open (ptrace, one short stop), or by soft-dirty bits. It takes the right to trace it.";

/// Save the memory of a running process as a chain of images, stopping it as little as possible
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(crate) struct Args {
    /// The process
    #[arg(long, value_name = "PID")]
    pid: NonZeroU32,
    /// A directory, or the address of a `pageferry receive`: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "DIR|ADDR")]
    to: String,
    /// Rounds while it runs, at most; with 0 it stands still for all of it
    #[arg(long, default_value = "8", value_name = "N")]
    rounds: u32,
    /// For how long it may stand still for the last round
    #[arg(long, default_value = "50ms", value_name = "TIME", value_parser = humantime::parse_duration)]
    downtime: Duration,
    /// How its writes are noticed
    #[arg(long, value_enum, default_value = "auto")]
    method: dirty::Method,
    /// How it is stopped
    #[arg(long, value_enum, default_value = "auto")]
    stop: Stop,
    /// Leave it stopped after the last round
    #[arg(long)]
    leave_stopped: bool,
    /// Take all shared memory again in the last round, because others write to it too
    #[arg(long)]
    retake_shared: bool,
}

/// How a process is stopped.
#[derive(Copy, Clone, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Stop {
    /// By its control group if it has one of its own, else by ptrace
    Auto,
    /// By interrupting each thread
    Ptrace,
    /// By the freezer of its control group
    Cgroup,
}

impl Stop {
    fn options(self) -> StopOptions {
        StopOptions::default().method(match self {
            Self::Auto => StopMethod::Auto,
            Self::Ptrace => StopMethod::Ptrace,
            Self::Cgroup => StopMethod::ControlGroup,
        })
    }
}

/// What `--json` prints, a line each.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line<'a> {
    Attached {
        pid: u32,
        method: &'a str,
        reason: &'a str,
        stopped_ms: f64,
    },
    Round(RoundLine),
    Complete {
        rounds: usize,
        stopped_ms: f64,
        downtime_ms: f64,
        took_ms: f64,
        data_bytes: u64,
        stored_bytes: u64,
        image: &'a str,
        left_stopped: Option<&'static str>,
    },
}

#[derive(Serialize)]
struct RoundLine {
    round: u32,
    last: bool,
    stopped_ms: f64,
    stopped_by: Option<&'static str>,
    changed_bytes: u64,
    wholesale_bytes: u64,
    read_bytes: u64,
    broken_bytes: u64,
    zero_bytes: u64,
    stored_bytes: u64,
    took_ms: f64,
    id: String,
    image: String,
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn name(method: StopMethod) -> &'static str {
    match method {
        StopMethod::ControlGroup => "cgroup",
        StopMethod::Ptrace | StopMethod::Auto => "ptrace",
    }
}

impl RoundLine {
    fn of(round: &Round) -> Self {
        Self {
            round: round.round,
            last: round.last,
            stopped_ms: millis(round.stopped),
            stopped_by: round.stopped_by.map(name),
            changed_bytes: round.changed,
            wholesale_bytes: round.wholesale,
            read_bytes: round.read,
            broken_bytes: round.broken,
            zero_bytes: round.stored.zero,
            stored_bytes: round.stored.stored,
            took_ms: millis(round.took),
            id: round.stored.id.to_string(),
            image: round.stored.place.clone(),
        }
    }

    fn text(&self) -> String {
        let Self { round, stopped_ms, took_ms, image, .. } = self;
        let changed = size::display(self.changed_bytes);
        let stored = size::display(self.stored_bytes);
        let stopped = match self.stopped_by {
            Some(_) => format!("stopped {stopped_ms:.1} ms"),
            None => "running".to_owned(),
        };
        // Everything is new to the first round.
        let whole = match self.wholesale_bytes {
            0 => String::new(),
            bytes => format!(" (of that {} new or not tracked, taken whole)", size::display(bytes)),
        };
        let broken = match self.broken_bytes {
            0 => String::new(),
            bytes => format!(", {} unreadable (memory errors)", size::display(bytes)),
        };
        format!(
            "round {round}: {changed} changed{whole}, {stored} stored, {stopped}, {took_ms:.0} ms{broken}: {image}"
        )
    }
}

/// Where a `--to` leads.
enum To {
    Directory(Box<Directory>),
    Peer(Remote),
}

impl To {
    /// What is written like an address is one, unless there is a directory of that name. One with a
    /// mistake in it is no directory to be made: the memory would be written to this disk.
    fn open(to: &str, context: &Context) -> anyhow::Result<Self> {
        let path = PathBuf::from(to);
        let local = path.exists() || (to.contains('/') && !to.starts_with("unix:"));
        match to.parse::<Endpoint>() {
            Ok(endpoint) if !local => {
                let mut options = SenderOptions::default();
                options.stop = Some(context.stop_signal()?);
                let remote = Remote::connect(&endpoint, options).map_err(|error| {
                    anyhow::Error::new(Failure::source_lost(format!("--to: {error}")))
                })?;
                Ok(Self::Peer(remote))
            }
            Err(error) if !local && to.contains(':') => {
                let why = format!("--to: {error}; a directory of that name is ./{to}");
                Err(Failure::usage(why).into())
            }
            _ => Ok(Self::Directory(Box::new(Directory::open(path)?))),
        }
    }

    fn as_destination(&mut self) -> &mut dyn Destination {
        match self {
            Self::Directory(directory) => directory.as_mut(),
            Self::Peer(remote) => remote,
        }
    }
}

/// Stops the process once, in the way that may not be possible, before anything is copied; for how
/// long.
fn try_stop(process: &Process, args: &Args, context: &Context) -> anyhow::Result<Duration> {
    if args.stop != Stop::Cgroup || args.rounds == 0 {
        return Ok(Duration::ZERO);
    }
    let stopped = process.stop_with(args.stop.options()).and_then(Stopped::resume);
    stopped.map_err(|error| match dirty::interrupted(&error, context) {
        Some(signal) => Failure::interrupted(signal).into(),
        None => error.into(),
    })
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let process = dirty::open(args.pid)?;
    let tried = try_stop(&process, args, context)?;
    let mut to = To::open(&args.to, context)?;
    let options = Options {
        rounds: args.rounds,
        downtime: args.downtime,
        method: args.method.chosen(),
        stop: args.stop.options(),
        leave_stopped: args.leave_stopped,
        retake_shared: args.retake_shared,
    };
    let bar =
        if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template(
        "{prefix} {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}",
    )?);
    let mut written = Ok(());
    let mut observe = |event: Event| {
        let said = say(&event, args, context, &bar);
        if let Err(error) = said {
            written = Err(error);
            return false;
        }
        context.signals.caught().is_none()
    };
    let made = checkpoint::checkpoint(&process, to.as_destination(), &options, &mut observe);
    bar.finish_and_clear();
    written.context("writing the report")?;
    let report = match made {
        Ok(report) => report,
        Err(error) => return Err(failure(error, context)),
    };
    let rounds = report.rounds.iter().map(|round| round.stopped);
    let stopped = rounds.sum::<Duration>() + report.attach + tried;
    let last = report.rounds.last().context("a checkpoint has a last round")?;
    if context.output.json() {
        context.output.write_json_line(&Line::Complete {
            rounds: report.rounds.len(),
            stopped_ms: millis(stopped),
            downtime_ms: millis(last.stopped),
            took_ms: millis(report.took),
            data_bytes: report.rounds.iter().map(|round| round.stored.data).sum(),
            stored_bytes: report.rounds.iter().map(|round| round.stored.stored).sum(),
            image: &last.stored.place,
            left_stopped: report.left_stopped.map(name),
        })?;
    } else {
        let mut text = format!(
            "complete: {}, {} rounds in {:.0} ms; stopped {:.1} ms for the last one, {:.1} ms in all\n",
            last.stored.place,
            report.rounds.len(),
            millis(report.took),
            millis(last.stopped),
            millis(stopped),
        );
        match report.left_stopped {
            Some(StopMethod::ControlGroup) => {
                text += "it is left stopped: write 0 to cgroup.freeze of its control group\n";
            }
            Some(_) => {
                text += &format!("it is left stopped: kill -CONT {} lets it go on\n", args.pid)
            }
            None => {}
        }
        context.output.write_text(&text)?;
    }
    Ok(Exit::Success)
}

fn say(event: &Event, args: &Args, context: &Context, bar: &ProgressBar) -> std::io::Result<()> {
    let json = context.output.json();
    match event {
        Event::Attached { method, reason, stopped } => {
            let stopped_ms = millis(*stopped);
            if json {
                let (pid, method) = (args.pid.get(), method.name());
                return context.output.write_json_line(&Line::Attached {
                    pid,
                    method,
                    reason,
                    stopped_ms,
                });
            }
            bar.suspend(|| eprintln!("{method}: {reason}; stopped {stopped_ms:.1} ms to attach"));
        }
        Event::Copying { round, bytes, last } => {
            bar.set_prefix(format!("round {round}{}", if *last { ", last" } else { "" }));
            bar.set_length(*bytes);
            bar.set_position(0);
        }
        Event::Copied { bytes } => bar.inc(*bytes),
        Event::Completed(round) => {
            let line = RoundLine::of(round);
            if json {
                return context.output.write_json_line(&Line::Round(line));
            }
            bar.suspend(|| context.output.write_text(&(line.text() + "\n")))?;
        }
        _ => {}
    }
    Ok(())
}

/// Whether it is of something that the host, or the permission to use it, lacks.
fn is_missing(why: &Why) -> bool {
    match why {
        Why::Tracking(error) => dirty::is_missing(error),
        Why::Process(error) => matches!(error, ProcessError::NotPermitted { .. }),
        _ => false,
    }
}

/// The signal that it was given up for, if it was.
fn interrupted(why: &Why, context: &Context) -> Option<Signal> {
    match why {
        Why::Stopped => context.signals.caught(),
        Why::Process(error) => dirty::interrupted(error, context),
        Why::Tracking(error) => dirty::interrupted_tracking(error, context),
        _ => None,
    }
}

/// The exit code that belongs to what happened.
fn failure(error: checkpoint::CheckpointError, context: &Context) -> anyhow::Error {
    match (&error.why, interrupted(&error.why, context)) {
        (_, Some(signal)) => {
            let last = match &error.last_complete {
                Some(image) => format!("the last complete image is {image}"),
                None => "no image was completed".to_owned(),
            };
            anyhow::Error::new(Failure::interrupted(signal)).context(last)
        }
        (Why::Destination(why), _) if why.is::<SendingError>() => {
            Failure::source_lost(error.to_string()).into()
        }
        (Why::Tracking(why), _) if dirty::is_untouchable(why) => anyhow::anyhow!(
            "{error}; with --rounds 0 it is not tracked, and stands still for all of it"
        ),
        (why, _) if is_missing(why) => Failure::missing(error.to_string()).into(),
        // It says its cause in its middle, where it would not be seen that it has been said.
        _ => anyhow::Error::msg(error.to_string()),
    }
}
