//! Processes to be stopped: the test binary runs itself again, for one test and one case of it, and
//! talks with that by lines.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::{
    io::{BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, channel},
    },
    thread,
    time::{Duration, Instant},
};

use pageferry_process::{Pid, Process, Signal};
use pageferry_testing::{PATIENCE, wait_for};
use pageferry_uffd::HostAddress;

/// As `pageferry_testing::child` has it.
const CASE: &str = "PAGEFERRY_TEST_CASE";
/// The directory of the control group a child is to be in.
const GROUP: &str = "PAGEFERRY_TEST_GROUP";
/// What tells the lines of a child from those of the test harness in it.
const MARK: &str = "child: ";

/// A command that runs `test` of this binary again, for `case`.
pub fn again(test: &str, case: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CASE, case);
    command
}

/// A process that does what a case of a test says.
pub struct Target {
    child: Child,
    /// The process that is looked at, if that is a child of the child.
    alone: Option<Pid>,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Target {
    #[track_caller]
    pub fn start(test: &str, case: &str) -> Self {
        Self::spawn(&mut again(test, case))
    }

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

    /// A child that calls [`alone`] first.
    #[track_caller]
    pub fn start_alone(test: &str, case: &str) -> Self {
        Self::start_alone_in(None, test, case)
    }

    /// The same, in a control group.
    #[track_caller]
    pub fn start_alone_in(group: Option<&Group>, test: &str, case: &str) -> Self {
        let mut command = again(test, case);
        if let Some(group) = group {
            command.env(GROUP, &group.0);
        }
        let mut target = Self::spawn(&mut command);
        let pid = target.hear_numbers()[0];
        target.alone = Pid::from_raw(pid as i32);
        target
    }

    pub fn pid(&self) -> Pid {
        self.alone.unwrap_or_else(|| Pid::from_child(&self.child))
    }

    #[track_caller]
    pub fn process(&self) -> Process {
        Process::open(self.pid()).unwrap()
    }

    /// The next line that the child says.
    #[track_caller]
    pub fn hear(&self) -> String {
        self.lines.recv_timeout(PATIENCE).expect("a line of the child")
    }

    /// The next line, in which there are only numbers.
    #[track_caller]
    pub fn hear_numbers(&self) -> Vec<u64> {
        self.hear().split(' ').map(|number| number.parse().unwrap()).collect()
    }

    /// Says something to the child.
    #[track_caller]
    pub fn say(&mut self, line: &str) {
        // In one piece, or a child that ends on it may be gone before the end of the line.
        self.input.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

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

#[track_caller]
pub fn status_line(path: &str, key: &str) -> String {
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
    line.unwrap_or_else(|| panic!("{key} in {path}")).trim().to_owned()
}

impl Drop for Target {
    fn drop(&mut self) {
        // It may have ended, and have been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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

/// How often each thread of a child did something.
pub static COUNTERS: [AtomicU64; 128] = [const { AtomicU64::new(0) }; 128];
pub static STOP: AtomicBool = AtomicBool::new(false);

/// In a child: where its counters are.
pub fn counters_address() -> u64 {
    (&raw const COUNTERS).addr() as u64
}

/// In a child: a thread that counts without ever waiting for anything.
pub fn count(counter: usize) {
    thread::spawn(move || {
        loop {
            COUNTERS[counter].fetch_add(1, Ordering::Relaxed);
            std::hint::spin_loop();
        }
    });
}

/// In a child: a thread that counts, and mostly sleeps.
pub fn count_slowly(counter: usize) {
    thread::spawn(move || {
        loop {
            COUNTERS[counter].fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
    });
}

/// The counters of a child.
#[track_caller]
pub fn counters(process: &Process, address: u64) -> Vec<u64> {
    let mut bytes = vec![0; 128 * 8];
    process.read_memory_exact(HostAddress::new(address), &mut bytes).unwrap();
    bytes.chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Waits until the first `count` counters of a child have all changed.
#[track_caller]
pub fn expect_counting(process: &Process, address: u64, count: usize) {
    let before = counters(process, address);
    wait_for("all threads to count", || {
        let now = counters(process, address);
        (0..count).all(|counter| now[counter] != before[counter])
    });
}

/// Sees that no counter changes.
#[track_caller]
pub fn expect_still(process: &Process, address: u64) {
    let before = counters(process, address);
    // Enough for any thread that ran to be seen.
    thread::sleep(Duration::from_millis(20));
    assert_eq!(counters(process, address), before, "a stopped process counts");
}

/// A control group of version 2, for one process.
pub struct Group(PathBuf);

impl Group {
    /// `None`, having said so, where none can be made.
    pub fn new(name: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let (point, kind) = (fields.nth(1)?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(point))
        });
        let made = mount.ok_or_else(|| "none is mounted".to_owned()).and_then(|mount| {
            let path = mount.join(format!("pageferry-test-{name}-{}", std::process::id()));
            std::fs::create_dir(&path).map_err(|error| error.to_string())?;
            if path.join("cgroup.freeze").exists() {
                return Ok(Self(path));
            }
            std::fs::remove_dir(&path).map_err(|error| error.to_string())?;
            Err("the root group is all there is".to_owned())
        });
        match made {
            Ok(group) => Some(group),
            Err(why) => {
                println!("skipped: needs control groups of version 2 that can be frozen: {why}");
                None
            }
        }
    }

    pub fn is_frozen(&self) -> bool {
        let events = std::fs::read_to_string(self.0.join("cgroup.events")).unwrap();
        events.lines().any(|line| line == "frozen 1")
    }

    #[track_caller]
    pub fn set_frozen(&self, frozen: bool) {
        let value = if frozen { "1" } else { "0" };
        std::fs::write(self.0.join("cgroup.freeze"), value).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever is in it still is a process of a test that has failed.
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        let deadline = Instant::now() + PATIENCE;
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
