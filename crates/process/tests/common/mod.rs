//! Processes to be stopped, which count as long as they run, and their control groups.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test uses a part of it")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use pageferry_process::Process;
pub use pageferry_testing::target::{
    Target, again, alone, end_with_parent, listen, status_line, tell,
};
use pageferry_testing::{PATIENCE, wait_for};
use pageferry_uffd::HostAddress;

/// A command that does nothing but end: this binary, which says nothing for want of tests.
pub fn nothing() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "no test has this name"]).stdout(Stdio::null());
    command
}

/// A target that is held.
pub trait Held {
    fn process(&self) -> Process;
}

impl Held for Target {
    #[track_caller]
    fn process(&self) -> Process {
        Process::open(self.pid()).unwrap()
    }
}

/// Runs a test again, [`alone`], in a control group if there is one.
#[track_caller]
pub fn start_alone_in(group: Option<&Group>, test: &str, case: &str) -> Target {
    Target::start_alone_in(group.map(|group| group.0.as_path()), test, case)
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
        // What waits beside a frozen process, to thaw it.
        if !Path::new("/bin/sh").exists() {
            println!("skipped: needs /bin/sh, which thaws control groups");
            return None;
        }
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
