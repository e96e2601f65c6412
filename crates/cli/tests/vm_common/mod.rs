//! Guests' processes, and what they say.
#![allow(dead_code, unreachable_pub)] // Each test binary uses a part of it.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Command, Output},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{
    Running, expect_code, host::has_userfaultfd, json, pageferry, run, wait_for, words,
};

/// Whether guests can run and arrive here.
pub fn able() -> bool {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        println!("skipped: needs /dev/kvm");
        return false;
    }
    has_userfaultfd()
}

/// A place for control sockets of its own.
pub struct Here(TempDir);

impl Here {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    /// `pageferry --json` with these words.
    pub fn command(&self, args: &str) -> Command {
        let mut command = pageferry(["--json"]);
        command.args(words(args)).env("XDG_RUNTIME_DIR", self.0.path());
        command
    }

    #[track_caller]
    pub fn run(&self, args: &str, code: i32) -> Output {
        let output = run(&mut self.command(args));
        expect_code(&output, code);
        output
    }

    pub fn sockets(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.0.path().join("pageferry")) else { return Vec::new() };
        entries.map(|entry| entry.expect("an entry").path()).collect()
    }

    /// A guest that runs.
    #[track_caller]
    pub fn guest(&self, name: &str, more: &str) -> Process {
        self.start(name, &format!("vm run --name {name} --memory 16MiB {more}"), "running")
    }

    /// A process that waits for a guest.
    #[track_caller]
    pub fn receiver(&self, name: &str, more: &str) -> Process {
        let args = format!("vm receive --name {name} --listen 127.0.0.1:0 {more}");
        self.start(name, &args, "listening")
    }

    /// Starts a command, the first line of which must be of this event.
    #[track_caller]
    pub fn start(&self, name: &str, args: &str, event: &str) -> Process {
        Process::start(name, &mut self.command(args), event)
    }

    #[track_caller]
    pub fn status(&self, name: &str) -> Value {
        json(&self.run(&format!("vm status {name}"), 0))
    }

    /// Waits until the guest has got on.
    #[track_caller]
    pub fn goes_on(&self, name: &str) {
        let touches = |status: &Value| status["touches"].as_u64().expect("a number");
        let before = self.status(name);
        wait_for("the guest's progress", || {
            let now = self.status(name);
            assert_eq!(now["state"], "running", "{now}");
            (touches(&now) > touches(&before)).then_some(())
        });
    }

    /// Stops the guest, which must have seen nothing wrong.
    #[track_caller]
    pub fn stop(&self, process: Process) {
        self.run(&format!("vm stop {}", process.name), 0);
        process.left("stopped");
    }

    #[track_caller]
    pub fn migrate(&self, from: &str, to: &Process, more: &str) -> Process {
        let args = format!("migrate --from {from} --to {} {more}", to.address());
        self.start(from, &args, "started")
    }
}

/// A command that says lines of JSON.
pub struct Process {
    pub name: String,
    pub running: Running,
    lines: Arc<Mutex<Vec<Value>>>,
    reader: JoinHandle<()>,
}

impl Process {
    /// Starts it, and waits for its first line, which must be of this event.
    #[track_caller]
    fn start(name: &str, command: &mut Command, event: &str) -> Self {
        let mut running = Running::start_unread(command);
        let stdout = BufReader::new(running.take_stdout());
        let lines: Arc<Mutex<Vec<Value>>> = Arc::default();
        let said = Arc::clone(&lines);
        let reader = std::thread::spawn(move || {
            for line in stdout.lines() {
                let line = line.expect("its output");
                let line = serde_json::from_str(&line).expect("a line of JSON");
                said.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        let mut process = Self { name: name.to_owned(), running, lines, reader };
        let first = process.wait_for(event);
        assert_eq!(Some(&first), process.lines().first());
        process
    }

    pub fn lines(&self) -> Vec<Value> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn find(&self, event: &str) -> Option<Value> {
        self.lines().into_iter().find(|line| line["event"] == event)
    }

    /// Waits until it has said this.
    #[track_caller]
    pub fn wait_for(&mut self, event: &str) -> Value {
        let lines = Arc::clone(&self.lines);
        self.running.wait_until(event, |_| {
            let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.iter().find(|line| line["event"] == event).cloned()
        })
    }

    pub fn address(&self) -> String {
        let line = self.find("listening").expect("it listens");
        line["address"].as_str().expect("an address").to_owned()
    }

    /// Waits for its end; returns what it said.
    #[track_caller]
    pub fn end(self, code: i32) -> Vec<Value> {
        let output = self.running.end();
        self.reader.join().expect("its output is JSON");
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let codes = (output.status.code(), Some(code));
        assert_eq!(codes.0, codes.1, "{}: {lines:#?}\n{output:?}", self.name);
        lines
    }

    /// Waits for the end of a guest's process that has gone well.
    #[track_caller]
    pub fn left(self, why: &str) {
        let lines = self.end(0);
        let last = lines.last().expect("a line");
        assert_eq!((&last["event"], &last["why"]), (&"left".into(), &why.into()), "{last}");
        assert_eq!(last["mismatches"], 0, "{last}");
        assert!(last["touches"].as_u64() > Some(0), "{last}");
    }
}
