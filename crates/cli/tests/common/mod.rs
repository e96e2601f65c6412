//! Running the command, looking at its processes, and stopping it.
#![allow(dead_code, unreachable_pub)] // Each test binary uses a part of it.

pub mod host;

use std::{
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, ChildStderr, ChildStdout, Command, Output, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    process::{Pid, PidfdFlags, Signal, pidfd_open},
};
use serde_json::Value;

/// Longer than anything takes here that works, on a machine however busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_pageferry"))
}

pub fn pageferry<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    command(binary(), args)
}

pub fn command<S: AsRef<OsStr>>(program: &Path, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

/// `args` as a shell would split them.
pub fn words(args: &str) -> impl Iterator<Item = &str> {
    args.split_ascii_whitespace()
}

/// Runs it to its end, which has to come.
#[track_caller]
pub fn run(command: &mut Command) -> Output {
    Running::start(command).end()
}

#[track_caller]
pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// What it wrote for people.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `found` finds something; a failure when nothing comes.
#[track_caller]
pub fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A process that is not waited for here, without the danger of its id being given out again.
pub struct Process {
    pub pid: Pid,
    handle: OwnedFd,
}

impl Process {
    /// `None` if there is no such process (any more).
    pub fn open(pid: Pid) -> Option<Self> {
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Self { pid, handle })
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.handle, signal).expect("the process is there");
    }

    /// Waits until it has ended. A process that its parent has not asked for counts as ended.
    #[track_caller]
    pub fn wait_ended(&self) {
        let most = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&most))).expect("poll");
        assert_eq!(ready, 1, "process {} does not end: {}", self.pid, stat(self.pid));
    }

    /// Bytes of address space in use, by the 23rd field of proc_pid_stat(5).
    pub fn mapped_bytes(&self) -> u64 {
        field(&stat(self.pid), 23).and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// Whether it has ended by now.
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll") == 1
    }
}

fn stat(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default()
}

/// Field `number` of proc_pid_stat(5), from the third on.
fn field(stat: &str, number: usize) -> Option<&str> {
    // The second, the name in parentheses, may itself hold spaces and parentheses.
    stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(number - 3)
}

/// The children of a process.
fn children(of: Pid) -> Vec<Process> {
    let parent = of.to_string();
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(Pid::from_raw)
        .filter_map(Process::open)
        // Looked at with the process held, so that it is this one's parent.
        .filter(|process| field(&stat(process.pid), 4) == Some(&parent))
        .collect()
}

/// The command while it runs. It is killed when dropped.
pub struct Running {
    child: Option<Child>,
    out: Option<JoinHandle<Vec<u8>>>,
    err: Option<JoinHandle<Vec<u8>>>,
    pub pid: Pid,
    args: String,
}

impl Running {
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let mut running = Self::start_unread(command);
        running.read_output();
        running
    }

    /// Starts it with its output left to [`take_stdout`](Self::take_stdout).
    #[track_caller]
    pub fn start_unread(command: &mut Command) -> Self {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let pid = Pid::from_child(&child);
        let args = format!("{:?}", command.get_args().collect::<Vec<_>>());
        Self { child: Some(child), out: None, err: None, pid, args }
    }

    pub fn take_stdout(&mut self) -> ChildStdout {
        self.child().stdout.take().expect("piped, not taken")
    }

    fn read_output(&mut self) {
        let out = self.child().stdout.take();
        self.out = out.map(|out: ChildStdout| thread::spawn(move || read_all(out)));
        let err = self.child().stderr.take();
        self.err = err.map(|err: ChildStderr| thread::spawn(move || read_all(err)));
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("not ended")
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid, signal).expect("the command runs");
    }

    /// As a terminal does on Ctrl-C. The command must lead a process group of its own.
    pub fn signal_group(&self, signal: Signal) {
        rustix::process::kill_process_group(self.pid, signal).expect("the command runs");
    }

    #[track_caller]
    fn still_runs(&mut self) {
        if let Some(status) = self.child().try_wait().expect("waiting") {
            let args = std::mem::take(&mut self.args);
            let output = self.collect(status);
            panic!("{args} ended by itself: {output:?}");
        }
    }

    /// Waits until the command has come so far that `found` finds something.
    #[track_caller]
    pub fn wait_until<T>(&mut self, what: &str, mut found: impl FnMut(Pid) -> Option<T>) -> T {
        wait_for(what, || {
            self.still_runs();
            found(self.pid)
        })
    }

    /// Waits until the handler of SIGINT and SIGTERM is there.
    #[track_caller]
    pub fn wait_catches(&mut self, signal: Signal) {
        self.wait_until("its signal handlers", |pid| catches(pid, signal).then_some(()));
    }

    /// Its source process, once it handles signals.
    #[track_caller]
    pub fn wait_child(&mut self) -> Process {
        self.wait_until("its child process", |pid| {
            let is_source = |child: &Process| {
                let path = format!("/proc/{}/cmdline", child.pid.as_raw_nonzero());
                fs::read(path)
                    .is_ok_and(|line| line.split(|b| *b == 0).any(|w| w == b"demo-source"))
            };
            children(pid)
                .into_iter()
                .find(|child| is_source(child) && catches(child.pid, Signal::TERM))
        })
    }

    /// How many of its threads have a name that begins so.
    pub fn threads_named(pid: Pid, prefix: &str) -> usize {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
        tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.starts_with(prefix))
            .count()
    }

    /// Whether a thread of this name is stopped on a page: in the kernel outside of any system
    /// call, or on a futex in its SIGBUS handler (proc_pid_syscall(5)).
    pub fn waits_for_page(pid: Pid, name: &str) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
        let futex = libc::SYS_futex.to_string();
        tasks.filter_map(|task| Some(task.ok()?.path())).any(|task| {
            let read = |file| fs::read_to_string(task.join(file)).unwrap_or_default();
            let call = read("syscall");
            let call = call.split_ascii_whitespace().next();
            read("comm").trim_end() == name && (call == Some("-1") || call == Some(&*futex))
        })
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Output {
        if self.out.is_none() {
            self.read_output();
        }
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child().try_wait().expect("waiting") {
                break status;
            }
            assert!(Instant::now() < deadline, "{} does not end", self.args);
            thread::sleep(Duration::from_millis(1));
        };
        self.collect(status)
    }

    fn collect(&mut self, status: std::process::ExitStatus) -> Output {
        self.child = None;
        let read = |thread: Option<JoinHandle<Vec<u8>>>| {
            thread.map_or_else(Vec::new, |thread| thread.join().expect("reading its output"))
        };
        Output { status, stdout: read(self.out.take()), stderr: read(self.err.take()) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended meanwhile.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn read_all(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).expect("reading its output");
    bytes
}

fn catches(pid: Pid, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal.as_raw() - 1)) != 0
}

/// The exit code, or how else it ended.
#[track_caller]
pub fn expect_code(output: &Output, code: i32) {
    let signal = output.status.signal();
    assert_eq!((output.status.code(), signal), (Some(code), None), "{output:?}");
}
