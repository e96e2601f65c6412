//! The two processes, as the command sees them.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
};
use serde::de::DeserializeOwned;

use super::end::{Job, Listening};
use crate::Context;

/// For a whole run: more than 4 GiB take, on a machine however busy.
const LIMIT: Duration = Duration::from_secs(600);

/// A process that has one side. Dropping it ends it.
struct Process {
    side: &'static str,
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    fn start(side: &'static str, job: &Job) -> anyhow::Result<Self> {
        let myself = std::env::current_exe().context("finding this program to start it again")?;
        let mut child = Command::new(&myself)
            .args(["bench", "migrate-end", &std::process::id().to_string()])
            .arg(serde_json::to_string(job)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} as the {side}", myself.display()))?;
        let out = child.stdout.take().context("it has a standard output")?;
        Ok(Self { side, child, out: BufReader::new(out) })
    }

    /// The line that is there, which was written at once.
    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let side = self.side;
        self.out.read_line(&mut line).with_context(|| format!("hearing the {side}"))?;
        if line.ends_with('\n') {
            return Ok(line);
        }
        // It has said on standard error why.
        let status = self.child.wait().with_context(|| format!("waiting for the {side}"))?;
        bail!("the {side} failed ({status})")
    }

    /// It has told all it had to.
    fn end(mut self) -> anyhow::Result<()> {
        let side = self.side;
        let status = self.child.wait().with_context(|| format!("waiting for the {side}"))?;
        ensure!(status.success(), "the {side} failed ({status})");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a line of each process, of whichever comes first first: one that fails leaves the other
/// waiting.
fn hear<const N: usize>(
    processes: [&mut Process; N],
    deadline: Instant,
    context: &Context,
) -> anyhow::Result<[String; N]> {
    let mut lines = [const { None }; N];
    while lines.iter().any(Option::is_none) {
        let awaited: Vec<usize> = (0..N).filter(|&number| lines[number].is_none()).collect();
        let mut fds: Vec<PollFd<'_>> = awaited
            .iter()
            .map(|&number| PollFd::new(processes[number].out.get_ref(), PollFlags::IN))
            .collect();
        fds.push(PollFd::new(&context.signals, PollFlags::IN));
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let ready = retry_on_intr(|| poll(&mut fds, Some(&left)))
            .context("waiting for the two processes")?;
        context.stop_if_asked()?;
        ensure!(ready > 0, "the two processes are not done after {LIMIT:?}");
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (number, ready) in awaited.into_iter().zip(ready) {
            if ready {
                lines[number] = Some(processes[number].line()?);
            }
        }
    }
    Ok(lines.map(|line| line.expect("the loop goes on until there are all")))
}

/// Has two processes do their parts, and answers with what they have to tell, the source first.
pub(super) fn run<S: DeserializeOwned, D: DeserializeOwned>(
    source: impl FnOnce(String) -> Job,
    destination: &Job,
    context: &Context,
) -> anyhow::Result<(S, D)> {
    let deadline = Instant::now() + LIMIT;
    let mut destination = Process::start("destination", destination)?;
    let [line] = hear([&mut destination], deadline, context)?;
    let Listening { at } = serde_json::from_str(&line).context("where the destination listens")?;
    let mut source = Process::start("source", &source(at))?;
    let [sent, received] = hear([&mut source, &mut destination], deadline, context)?;
    source.end()?;
    destination.end()?;
    let sent = serde_json::from_str(&sent).context("what the source tells")?;
    let received = serde_json::from_str(&received).context("what the destination tells")?;
    Ok((sent, received))
}
