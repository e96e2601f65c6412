//! Processes that are looked at, stopped or tracked: the test binary runs itself again, for one
//! test and one case of it, and talks with that by lines.
//!
//! As in [`child`], a test begins with `if let Some(case) = child::case()`: there it
//! is the child, which [`tell`]s and [`listen`]s. The rest is the parent, with a [`Target`].

use std::{
    io::{BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use crate::{PATIENCE, child};

/// The variable that tells a child which control group it is to be in.
const GROUP: &str = "PAGEFERRY_TEST_GROUP";
/// What tells the lines of a child from those of the test harness in it.
const MARK: &str = "child: ";

/// A command that runs `test` of this binary again, for `case`.
pub fn again(test: &str, case: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(child::CASE, case);
    command
}

/// A process that does what a case of a test says. It is killed when this is dropped.
#[derive(Debug)]
pub struct Target {
    child: Child,
    /// The process that is looked at, if that is a child of the child.
    alone: Option<Pid>,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Target {
    /// Runs `test` of this binary again, for `case`.
    #[track_caller]
    pub fn start(test: &str, case: &str) -> Self {
        Self::spawn(&mut again(test, case))
    }

    /// Runs a command, mostly what [`again`] made.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a child");
        let output = BufReader::new(child.stdout.take().unwrap());
        let (say, lines) = channel();
        thread::spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { return };
                // The harness does not end the line in which it names the test.
                if let Some((_, line)) = line.split_once(MARK) {
                    let _ = say.send(line.to_owned());
                }
            }
        });
        Self { input: child.stdin.take(), child, alone: None, lines }
    }

    /// The same as [`start`](Self::start), of a case that calls [`alone`] first.
    #[track_caller]
    pub fn start_alone(test: &str, case: &str) -> Self {
        Self::start_alone_in(None, test, case)
    }

    /// The same, in the control group with this directory.
    #[track_caller]
    pub fn start_alone_in(group: Option<&Path>, test: &str, case: &str) -> Self {
        let mut command = again(test, case);
        if let Some(group) = group {
            command.env(GROUP, group);
        }
        let mut target = Self::spawn(&mut command);
        let pid = target.hear_numbers()[0];
        target.alone = Pid::from_raw(pid as i32);
        target
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.alone.unwrap_or_else(|| Pid::from_child(&self.child))
    }

    /// The next line that it says.
    #[track_caller]
    pub fn hear(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line of the child")
    }

    /// The next line, in which there are only numbers.
    #[track_caller]
    pub fn hear_numbers(&self) -> Vec<u64> {
        self.hear().split(' ').map(|number| number.parse().unwrap()).collect()
    }

    /// Says a line to it.
    #[track_caller]
    pub fn say(&mut self, line: &str) {
        // In one piece, or a child that ends on it may be gone before the end of the line.
        self.input.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for its end: its status, or minus the number of the signal that ended it.
    #[track_caller]
    pub fn end(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| -status.signal().unwrap());
            }
            assert!(Instant::now() < deadline, "the child does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The state of its first thread, as in `/proc/PID/stat`.
    pub fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    }

    /// A line of its `/proc/PID/status`.
    #[track_caller]
    pub fn status(&self, key: &str) -> String {
        status_line(&format!("/proc/{}/status", self.pid()), key)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // It may have ended, and have been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line of this key in a `/proc/PID/status`.
#[track_caller]
pub fn status_line(path: &str, key: &str) -> String {
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
    line.unwrap_or_else(|| panic!("{key} in {path}")).trim().to_owned()
}

/// In a child: says a line to the parent.
pub fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{line}").unwrap();
    out.flush().unwrap();
}

/// In a child: waits for a line of the parent; without a parent it ends.
pub fn listen() -> String {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap() == 0 {
        std::process::exit(0);
    }
    line.trim().to_owned()
}

/// In a child: ends it as soon as its parent does.
pub fn end_with_parent() {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
}

/// In a child: goes on in a process that has no thread but the first, which the test harness keeps
/// for itself; and in the control group that was asked for.
///
/// Processes that exist already are not moved to a group, since that waits until each CPU has come
/// by the kernel, for which a busy machine can take a minute, and holds up all other groups.
pub fn alone() {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    // SAFETY: the structure consists of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    let group = std::env::var_os(GROUP).map(|path| std::fs::File::open(path).unwrap());
    if let Some(group) = &group {
        arguments.flags = CLONE_INTO_CGROUP;
        arguments.cgroup = group.as_raw_fd() as u64;
    }
    // SAFETY: it is a fork. No other thread of the child holds a lock now: there is only the
    // harness's, which waits for the end of this one.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>())
    };
    assert!(pid >= 0, "{}", std::io::Error::last_os_error());
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let options = rustix::process::WaitOptions::empty();
        let status = rustix::process::waitpid(Some(pid), options).unwrap().unwrap().1;
        std::process::exit(status.exit_status().unwrap_or(127));
    }
    end_with_parent();
    tell(&std::process::id().to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_hears_and_is_heard() {
        const ME: &str = "target::tests::a_target_hears_and_is_heard";
        if let Some(case) = child::case() {
            if case == "alone" {
                alone();
            }
            tell(&listen());
            // Without another line it ends.
            listen();
            std::process::exit(7);
        }
        for case in ["one of many threads", "alone"] {
            let start = if case == "alone" { Target::start_alone } else { Target::start };
            let mut target = start(ME, case);
            target.say("12 13");
            assert_eq!(target.hear_numbers(), [12, 13]);
            let threads = if case == "alone" { "1" } else { "2" };
            assert_eq!(target.status("Threads"), threads, "{case}");
            assert_ne!(target.state(), 'Z');
            target.say("enough");
            assert_eq!(target.end(), 7);
        }
        let mut target = Target::start(ME, "killed");
        target.kill();
        assert_eq!(target.end(), -9);
    }
}
