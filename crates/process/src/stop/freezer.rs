//! Stopping a process by its control group.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    time::Timespec,
};

use super::group::Group;
use crate::{Process, ProcessError, status};

/// What the shell beside a frozen process does: when its input ends without a line, nobody is left
/// who would thaw the group. Signals from the terminal are not for it.
const SCRIPT: &str = "trap '' HUP INT QUIT TERM TSTP PIPE; echo ready; \
                      read -r line || echo 0 > \"$1\"";

/// A process, beside this one, that thaws a group when this one dies.
#[derive(Debug)]
struct Watcher {
    child: Child,
    input: ChildStdin,
}

impl Watcher {
    fn start(group: &Group) -> io::Result<Self> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "pageferry-thaw"])
            .arg(group.freezer())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(mut output)) = (input, output) else {
            unreachable!("both were asked for");
        };
        let mut watcher = Self { child, input };
        // From then on it survives what the terminal sends.
        let mut ready = [0; 6];
        if let Err(error) = io::Read::read_exact(&mut output, &mut ready) {
            watcher.child.wait()?;
            return Err(error);
        }
        Ok(watcher)
    }

    /// Ends it; it leaves the group as it is.
    fn dismiss(mut self) -> io::Result<()> {
        // One that has been killed needs not be told.
        match self.input.write_all(b"\n") {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
        self.child.wait().map(drop)
    }
}

/// A process whose control group is frozen.
#[derive(Debug)]
pub(super) struct Freezer {
    group: Group,
    /// `None` when that is settled.
    watcher: Option<Watcher>,
}

impl Freezer {
    /// Stops a process; answers with when its first thread may have stopped, too.
    pub(super) fn stop(
        process: &Process,
        patience: Duration,
    ) -> Result<(Self, Instant), ProcessError> {
        let pid = process.pid();
        let no = |why: String| ProcessError::NoOwnGroup { pid, why };
        let group = Group::of(pid)?;
        // That it may be written is known before anything is stopped.
        if let Err(error) = File::options().write(true).open(group.freezer()) {
            return Err(no(format!("{}: {error}", group.freezer().display())));
        }
        let events = group.events()?;
        let watcher = Watcher::start(&group)
            .map_err(|error| no(format!("a shell to thaw it if this process dies: {error}")))?;
        // From here on dropping it thaws.
        let freezer = Self { group, watcher: Some(watcher) };
        let since = Instant::now();
        freezer.group.set_frozen(true)?;
        freezer.wait(process, &events, since + patience, patience)?;
        // It may have made a child meanwhile.
        freezer.group.check_alone()?;
        Ok((freezer, since))
    }

    fn wait(
        &self,
        process: &Process,
        events: &File,
        deadline: Instant,
        patience: Duration,
    ) -> Result<(), ProcessError> {
        let pid = process.pid();
        while !self.group.is_frozen(events)? {
            if !process.is_alive() {
                return Err(ProcessError::Ended { pid, doing: "freezing it" });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(unstoppable(process, patience)?);
            }
            // Its end is no event of the group while it is a zombie.
            let left = left.min(Duration::from_millis(10));
            let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(events, PollFlags::PRI)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(self.group.failed("wait for its events")(errno.into())),
            }
        }
        Ok(())
    }

    /// Lets the process go on; answers with since when it may.
    pub(super) fn thaw(mut self) -> Result<Instant, ProcessError> {
        self.group.set_frozen(false)?;
        let until = Instant::now();
        self.dismiss()?;
        Ok(until)
    }

    /// Leaves it frozen.
    pub(super) fn leave(mut self) -> Result<(), ProcessError> {
        self.dismiss()
    }

    fn dismiss(&mut self) -> Result<(), ProcessError> {
        match self.watcher.take() {
            Some(watcher) => {
                watcher.dismiss().map_err(self.group.failed("end the shell that watches it"))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let Some(watcher) = self.watcher.take() else { return };
        if self.group.set_frozen(false).is_ok() {
            // It leaves the group as it is whatever becomes of it.
            let _ = watcher.dismiss();
        } else {
            // It tries itself once its input has ended, which it does here.
            let Watcher { mut child, input } = watcher;
            drop(input);
            let _ = child.wait();
        }
    }
}

/// The error that names a thread which is not frozen.
fn unstoppable(process: &Process, waited: Duration) -> Result<ProcessError, ProcessError> {
    let pid = process.pid();
    let mut culprit = (pid, 'X');
    for thread in status::threads(pid)? {
        if let Some(state) = status::state(pid, thread)? {
            culprit = (thread, state);
            // Frozen threads sleep as others do.
            if state == 'D' {
                break;
            }
        }
    }
    let (thread, state) = culprit;
    Ok(ProcessError::Unstoppable { pid, thread, state, waited })
}
