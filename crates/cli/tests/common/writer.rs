//! A process that writes all the time, and does what it is told to: this test binary, run again. It
//! has to have a test named `writer` that calls [`run`].
#![allow(dead_code, reason = "each test program uses a part")]

use std::{
    hint::black_box,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal};

use super::common::{host::is_root, wait_for};

const CASE: &str = "PAGEFERRY_WRITER";
const READY: &str = "the writer is ready";
const DONE: &str = "the writer obeys";

/// Pages that are written again and again, at the start of [`PAGES`].
pub(crate) const HOT: usize = 256;
pub(crate) const PAGES: usize = 8192;

/// What the process does: in a test of its name.
pub(crate) fn run() {
    if std::env::var_os(CASE).is_none() {
        return;
    }
    let mut memory = vec![0_u8; PAGES * 4096];
    for page in 0..PAGES {
        memory[page * 4096] = (page % 251) as u8 + 1;
    }
    println!("{READY}");
    thread::spawn(obey);
    for turn in 0_usize.. {
        let page = turn * 7 % HOT;
        memory[page * 4096 + 8 + turn % 4000] ^= 1;
        black_box(&mut memory);
        if turn % 64 == 0 {
            thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Does what is said on standard input, a line each; ends with whoever says it.
fn obey() {
    for line in std::io::stdin().lines() {
        match line.expect("a line").as_str() {
            "exit" => std::process::exit(0),
            "exec" => panic!("{}", again().exec()),
            "fork" => {
                thread::spawn(|| {
                    loop {
                        fork_once();
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            other => panic!("{other} is not known"),
        }
        println!("{DONE}");
    }
    std::process::exit(0);
}

/// A child that only ends.
fn fork_once() {
    // SAFETY: the child makes one system call, which does not return; the parent waits for it.
    unsafe {
        match libc::fork() {
            0 => libc::_exit(0),
            -1 => panic!("{}", std::io::Error::last_os_error()),
            child => assert_eq!(libc::waitpid(child, std::ptr::null_mut(), 0), child),
        }
    }
}

/// This program, as the writer.
fn again() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["writer", "--exact", "--nocapture", "--test-threads=1"]).env(CASE, "1");
    command
}

/// It, as long as this lives.
pub(crate) struct Writer {
    child: Child,
    orders: ChildStdin,
    out: BufReader<ChildStdout>,
}

impl Writer {
    pub(crate) fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// Starts it in another way.
    pub(crate) fn start_with(change: impl FnOnce(&mut Command)) -> Self {
        let mut command = again();
        change(&mut command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the writer starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let mut writer = Self { orders: child.stdin.take().expect("piped"), child, out };
        writer.hear(READY);
        writer
    }

    fn hear(&mut self, what: &str) {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            assert_ne!(self.out.read_line(&mut line).expect("its output"), 0, "the writer ended");
        }
    }

    fn order(&mut self, what: &str) {
        self.orders.write_all(format!("{what}\n").as_bytes()).expect("it listens");
    }

    /// Lets it end by itself.
    pub(crate) fn exit(&mut self) {
        self.order("exit");
        assert!(self.child.wait().expect("it ends").success());
    }

    /// Lets it start another program: itself once more.
    pub(crate) fn exec(&mut self) {
        self.order("exec");
        self.hear(READY);
    }

    /// Lets it fork all the time from now on.
    pub(crate) fn fork(&mut self) {
        self.order("fork");
        self.hear(DONE);
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("it runs");
    }

    /// Kills it.
    pub(crate) fn end(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }

    /// One letter: `T` stopped, `t` stopped by a tracer, `R` and `S` running and waiting.
    pub(crate) fn state(&self) -> char {
        self.stat().0
    }

    fn stat(&self) -> (char, u64) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("its stat");
        let (_, fields) = stat.rsplit_once(") ").expect("a name");
        let time = fields.split(' ').nth(11).and_then(|text| text.parse().ok());
        (fields.chars().next().expect("a state"), time.expect("its time"))
    }

    /// Whether a userfaultfd has any of its memory.
    pub(crate) fn is_registered(&self) -> bool {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).expect("it");
        let mut flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
        flags.any(|flags| flags.split(' ').any(|flag| matches!(flag, "uw" | "um")))
    }

    /// It goes on writing, and nothing tracks it any more.
    #[track_caller]
    pub(crate) fn assert_untouched(&self) {
        let (_, before) = self.stat();
        wait_for("the writer gets on", || (self.stat().1 > before).then_some(()));
        wait_for("its memory is not registered", || (!self.is_registered()).then_some(()));
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it");
        assert!(status.contains("TracerPid:\t0"), "{status}");
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether something works here, by the doctor.
pub(crate) fn works(id: &str) -> bool {
    let report = super::common::json(&super::common::run(&mut super::common::pageferry([
        "--json", "doctor",
    ])));
    let findings = report["findings"].as_array().expect("findings");
    findings.iter().any(|finding| finding["id"] == id && finding["status"] == "works")
}

/// Whether processes can be tracked here.
pub(crate) fn can_track() -> bool {
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let may_trace = is_root() || scope.trim().is_empty() || scope.trim() == "0";
    let can = may_trace && ["wp.async", "wp.anonymous", "soft-dirty"].into_iter().any(works);
    if !can {
        println!("skipped: needs the right to trace a process, and a way to track its writes");
    }
    can
}

/// Whether they can with the method that most tests of one method are of.
pub(crate) fn can_track_asynchronously() -> bool {
    let can = can_track() && works("wp.async");
    if !can {
        println!("skipped: needs asynchronous write protection");
    }
    can
}
