//! `pageferry dirty`: where a running process writes.

mod sample;
mod screen;
mod view;

use std::{
    cmp::Reverse,
    io::IsTerminal as _,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use pageferry::{
    dirty::{self, AttachOptions, DirtyError, ProcessTrackError, ProcessTracker},
    process::{self, MappingName, Pid, Process, ProcessError},
    uffd::HostRange,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::{
    sample::{Mapping, Sample, Samples},
    screen::Screen,
    view::Heading,
};
use crate::{
    Context,
    exit::{self, Exit, Failure},
    output::{self, Align, Table},
    signals::Signal,
    size,
};

const EXAMPLES: &str = "\
Examples:
  pageferry dirty --pid 4711
  pageferry dirty --pid 4711 --interval 100ms --for 10s
  pageferry dirty --pid 4711 --json --for 1m > writes.jsonl

In a terminal, a live view: for each mapping what was written in the last interval, the dirty set
(different pages since the beginning), its rate over time, and where in the mapping it is; `q` ends
it. Otherwise a table at the end; with --json a line for each sample.

Nothing is prepared in the process. Its writes are noticed by write protection with a userfaultfd that
it is made to open (ptrace, one short stop), or by soft-dirty bits, for which it stands still at each
sample. When this ends, however it ends, the process goes on as it was. It takes the right to trace it.
What the kernel or other processes write to shared memory is not seen, nor what is written to memory
that the method cannot track; how much that is, and which mappings, is said.";

/// Show where a running process writes, and how much
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help_of_watcher(EXAMPLES))]
pub(crate) struct Args {
    /// The process
    #[arg(long, value_name = "PID")]
    pid: NonZeroU32,
    /// Time between samples
    #[arg(long, default_value = "1s", value_name = "TIME", value_parser = parse_interval)]
    interval: Duration,
    /// For how long [default: until the process ends, or Ctrl-C]
    #[arg(long = "for", value_name = "TIME", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// How its writes are noticed
    #[arg(long, value_enum, default_value = "auto")]
    method: Method,
}

/// Too short, and there would be samples and nothing else.
fn parse_interval(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(interval) if interval < Duration::from_millis(1) => Err("at least 1ms".into()),
        Ok(interval) if interval > Duration::from_secs(86_400) => Err("at most 1day".into()),
        Ok(interval) => Ok(interval),
        Err(error) => Err(error.to_string()),
    }
}

/// How writes are noticed.
#[derive(Copy, Clone, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Method {
    /// Whatever fits best: says why
    Auto,
    /// Soft-dirty bits
    SoftDirty,
    /// Write protection: each first write waits until it is noted
    WpBlocking,
    /// Write protection that the kernel lifts by itself
    WpAsync,
}

impl Method {
    /// `None` for whatever fits best.
    pub(crate) fn chosen(self) -> Option<dirty::Method> {
        match self {
            Self::Auto => None,
            Self::SoftDirty => Some(dirty::Method::SoftDirty),
            Self::WpBlocking => Some(dirty::Method::WpBlocking),
            Self::WpAsync => Some(dirty::Method::WpAsync),
        }
    }
}

/// Holds the process with this number.
pub(crate) fn open(pid: NonZeroU32) -> anyhow::Result<Process> {
    let number = i32::try_from(pid.get()).ok().and_then(Pid::from_raw);
    let number = number.ok_or_else(|| Failure::usage(format!("--pid {pid}: no process has it")))?;
    Process::open(number).map_err(|error| match error {
        ProcessError::NotPermitted { .. } => Failure::missing(error.to_string()).into(),
        error => error.into(),
    })
}

/// Whether an error is of something that the host, or the permission to use it, lacks.
pub(crate) fn is_missing(error: &ProcessTrackError) -> bool {
    matches!(
        error,
        ProcessTrackError::NoMethod(_)
            | ProcessTrackError::Process(ProcessError::NotPermitted { .. })
            | ProcessTrackError::Dirty(DirtyError::Missing { .. } | DirtyError::Open { .. })
    )
}

/// Whether no system call could be made in the name of a process, which only the way to a userfaultfd
/// takes.
pub(crate) fn is_untouchable(error: &ProcessTrackError) -> bool {
    matches!(
        error,
        ProcessTrackError::Process(
            ProcessError::Confined { .. }
                | ProcessError::Bits32 { .. }
                | ProcessError::Dispatches { .. }
                | ProcessError::NoInstruction { .. }
        )
    )
}

/// The signal that interrupted the wait for a process that does not stop, if that is what failed.
pub(crate) fn interrupted(error: &ProcessError, context: &Context) -> Option<Signal> {
    match error {
        ProcessError::Unstoppable { .. } | ProcessError::Frozen { .. } => context.signals.caught(),
        _ => None,
    }
}

/// The same of what a tracker does.
pub(crate) fn interrupted_tracking(error: &ProcessTrackError, context: &Context) -> Option<Signal> {
    match error {
        ProcessTrackError::Process(error) => interrupted(error, context),
        _ => None,
    }
}

fn fail(error: ProcessTrackError, context: &Context) -> anyhow::Error {
    if let Some(signal) = interrupted_tracking(&error, context) {
        Failure::interrupted(signal).into()
    } else if is_missing(&error) {
        Failure::missing(error.to_string()).into()
    } else if is_untouchable(&error) {
        anyhow::anyhow!(
            "{error}; where the kernel has soft-dirty bits, --method soft-dirty works without"
        )
    } else {
        error.into()
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let process = open(args.pid)?;
    let command = std::fs::read_to_string(format!("/proc/{}/comm", args.pid)).unwrap_or_default();
    let options = AttachOptions { method: args.method.chosen(), ..AttachOptions::default() };
    let mut tracker =
        ProcessTracker::attach(process.clone(), &options).map_err(|error| fail(error, context))?;
    let heading = Heading {
        pid: args.pid.get(),
        command: command.trim_end().to_owned(),
        method: tracker.choice().method.name().to_owned(),
        why: tracker.choice().reason.clone(),
    };
    let json = context.output.json();
    let live = !json && std::io::stdout().is_terminal();
    if !live {
        let stopped = tracker.stopped_to_attach().as_secs_f64() * 1e3;
        eprintln!("{}: {}; stopped {stopped:.1} ms to attach", heading.method, heading.why);
    }
    let mut screen = if live { Some(Screen::open()?) } else { None };
    let begun = Instant::now();
    // What is too long for a clock has no end.
    let end = args.duration.and_then(|duration| begun.checked_add(duration));
    let mut next = begun;
    let mut samples = Samples::default();
    let mut last: Option<Sample> = None;
    // The most that could not be tracked, of what was said.
    let mut said = 0;
    let why = loop {
        // At fixed times, not an interval after whatever the sample before took.
        next = (next + args.interval).max(Instant::now());
        let until = end.map_or(next, |end| end.min(next));
        if let Some(why) = wait(until, &process, screen.as_mut(), context)? {
            break why;
        }
        let sample = match take(&mut tracker, &process, begun, &mut samples) {
            Ok(sample) => sample,
            // It may end at any moment: that is not ours to complain about.
            Err(error) if has_ended(&error) => break Why::Ended,
            Err(error) if interrupted_tracking(&error, context).is_some() => break Why::Signal,
            Err(error) => return Err(fail(error, context)),
        };
        if !live && sample.untracked_bytes > said {
            said = sample.untracked_bytes;
            eprintln!("pageferry: {}", untracked(&sample, &heading.method));
        }
        if json {
            context.output.write_json_line(&sample)?;
        }
        if let Some(screen) = &mut screen {
            screen.draw(|frame| view::draw(frame, &heading, &samples, &sample))?;
        }
        last = Some(sample);
        if end.is_some_and(|end| Instant::now() >= end) {
            break Why::Time;
        }
    };
    drop(screen);
    match tracker.detach() {
        Err(error) if !has_ended(&error) => return Err(fail(error, context)),
        _ => {}
    }
    if !json && let Some(sample) = &last {
        context.output.write_text(&summary(sample))?;
        if live && sample.untracked_bytes > 0 {
            eprintln!("pageferry: {}", untracked(sample, &heading.method));
        }
    }
    match why {
        Why::Ended => eprintln!("process {} has ended", args.pid),
        // Whoever interrupts what has no end of its own has had what they wanted.
        Why::Signal if args.duration.is_some() => context.stop_if_asked()?,
        Why::Signal | Why::Key | Why::Time | Why::Unread => {}
    }
    Ok(Exit::Success)
}

/// Whether all that is wrong is that the process is no more. (Its memory goes first, so that for a
/// moment it still seems to be there.)
fn has_ended(error: &ProcessTrackError) -> bool {
    matches!(
        error,
        ProcessTrackError::TargetExited { .. }
            | ProcessTrackError::Process(ProcessError::Ended { .. })
    )
}

/// Why there are no more samples.
enum Why {
    Time,
    Ended,
    Signal,
    Key,
    /// Nobody reads what it says.
    Unread,
}

/// Waits until the next sample is due, or there is a reason to end.
fn wait(
    until: Instant,
    process: &Process,
    mut screen: Option<&mut Screen>,
    context: &Context,
) -> anyhow::Result<Option<Why>> {
    loop {
        if context.signals.caught().is_some() {
            return Ok(Some(Why::Signal));
        }
        if !process.is_alive() {
            return Ok(Some(Why::Ended));
        }
        if output::is_unread()? {
            return Ok(Some(Why::Unread));
        }
        if let Some(screen) = &mut screen
            && screen.asked_to_end()?
        {
            return Ok(Some(Why::Key));
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
        let mut fds = vec![
            PollFd::new(&context.signals, PollFlags::IN),
            PollFd::new(process, PollFlags::IN),
            output::unread(&stdout),
        ];
        if screen.is_some() {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for the next sample"),
        }
    }
}

fn take(
    tracker: &mut ProcessTracker,
    process: &Process,
    begun: Instant,
    samples: &mut Samples,
) -> Result<Sample, ProcessTrackError> {
    let mut stopped = Duration::ZERO;
    let harvest = if tracker.needs_stop() {
        let held = process.stop()?;
        let harvest = tracker.harvest(Some(&held))?;
        stopped = held.resume()?;
        harvest
    } else {
        tracker.harvest(None)?
    };
    // What is there only because it could not be told is not known to have been written.
    let told = without(&harvest.changed, &harvest.wholesale);
    let mappings = harvest.mappings.iter().filter(|mapping| mapping.permissions.write);
    let mappings = mappings.map(|mapping| described(mapping, &harvest.untracked)).collect();
    Ok(samples.add(begun.elapsed(), stopped, mappings, &told))
}

/// `untracked` are whole mappings, in ascending order.
fn described(mapping: &process::Mapping, untracked: &[HostRange]) -> Mapping {
    let start = mapping.range.start();
    let sharing = if mapping.shared { 's' } else { 'p' };
    Mapping {
        range: mapping.range.start().get()..mapping.range.end().get(),
        permissions: format!("{}{sharing}", mapping.permissions),
        name: name(&mapping.name),
        tracked: untracked.binary_search_by_key(&start, |range| range.start()).is_err(),
    }
}

fn name(name: &MappingName) -> String {
    match name {
        MappingName::Heap => "[heap]".to_owned(),
        MappingName::Stack => "[stack]".to_owned(),
        MappingName::Named(name) => format!("[anon:{}]", name.escape_ascii()),
        MappingName::File { path, .. } => path.escape_ascii().to_string(),
        MappingName::Kernel(name) => name.escape_ascii().to_string(),
        _ => String::new(),
    }
}

/// The parts of `ranges` outside of `others`; both are ascending.
fn without(ranges: &[HostRange], others: &[HostRange]) -> Vec<std::ops::Range<u64>> {
    let mut left = Vec::new();
    let mut others = others.iter().peekable();
    for range in ranges {
        let (mut at, end) = (range.start().get(), range.end().get());
        while at < end {
            while others.next_if(|other| other.end().get() <= at).is_some() {}
            let (from, to) = match others.peek() {
                Some(other) => (other.start().get().min(end), other.end().get()),
                None => (end, end),
            };
            if at < from {
                left.push(at..from);
            }
            at = from.max(if from < end { to } else { end });
        }
    }
    left
}

/// What is not seen of the writes of the process.
fn untracked(sample: &Sample, method: &str) -> String {
    let count = sample.mappings.iter().filter(|mapping| !mapping.tracked).count();
    format!(
        "{} of its memory, in {count} mappings, cannot be tracked with {method}: what is written \
         there is not seen (another userfaultfd may have it, of another tracker or of its own; or it \
         is of files that {method} is not for)",
        size::display(sample.untracked_bytes)
    )
}

/// All that was written, mapping by mapping, at the end; behind it what cannot be told.
fn summary(sample: &Sample) -> String {
    let mut table = Table::new(&[
        ("mapping", Align::Left),
        ("size", Align::Right),
        ("dirty set", Align::Right),
        ("written in the last interval", Align::Right),
    ]);
    let mut mappings: Vec<_> = sample
        .mappings
        .iter()
        .filter(|mapping| mapping.dirty_set_bytes > 0 || !mapping.tracked)
        .collect();
    mappings.sort_by_key(|mapping| (!mapping.tracked, Reverse(mapping.dirty_set_bytes)));
    for mapping in mappings {
        let written = mapping.written_pages * crate::bench::case::PAGE as u64;
        let (set, written) = if mapping.tracked {
            (size::display(mapping.dirty_set_bytes), size::display(written))
        } else {
            ("?".to_owned(), "not tracked".to_owned())
        };
        table.row(vec![
            format!("{:x} {} {}", mapping.start, mapping.permissions, mapping.name),
            size::display(mapping.end - mapping.start),
            set,
            written,
        ]);
    }
    let unknown = match sample.untracked_bytes {
        0 => String::new(),
        bytes => format!("; {} not tracked", size::display(bytes)),
    };
    format!(
        "{}{} written to in {:.1} s{unknown}\n",
        table.render(),
        size::display(sample.dirty_set_bytes),
        sample.t_s
    )
}

#[cfg(test)]
mod tests {
    use pageferry::uffd::HostAddress;

    use super::*;

    #[test]
    fn ranges_without_others() {
        let range = |start: u64, end: u64| HostRange::new(HostAddress::new(start), end - start);
        let ranges = [range(0, 10), range(20, 30), range(40, 50)];
        let others = [range(0, 2), range(4, 6), range(8, 25), range(50, 60)];
        assert_eq!(without(&ranges, &others), [2..4, 6..8, 25..30, 40..50]);
        assert_eq!(without(&ranges, &[]), [0..10, 20..30, 40..50]);
        assert_eq!(without(&ranges, &[range(0, 100)]), []);
        assert_eq!(without(&[], &others), []);
    }
}
