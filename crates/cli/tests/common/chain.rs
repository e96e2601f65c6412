//! What the commands say of a process, and of the images that were made of it.
#![allow(dead_code, reason = "each test program uses a part")]

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{ChildStdout, Command, Output},
};

use serde_json::Value;

use super::{
    common::{Running, expect_code, json, pageferry, run, words},
    writer::Writer,
};

/// A command on this process.
pub(crate) fn of(writer: &Writer, args: &str) -> Command {
    let mut command = pageferry(words(args));
    command.arg("--pid").arg(writer.pid().to_string());
    command
}

/// One JSON value for each line.
#[track_caller]
pub(crate) fn lines(output: &Output) -> Vec<Value> {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    out.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

pub(crate) fn of_event<'a>(lines: &'a [Value], event: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["event"] == event).collect()
}

/// A command that says what happens while it runs, one JSON value for each line.
pub(crate) struct Saying {
    pub(crate) running: Running,
    out: BufReader<ChildStdout>,
}

impl Saying {
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut running = Running::start_unread(command);
        let out = BufReader::new(running.take_stdout());
        Self { running, out }
    }

    /// What it says next.
    #[track_caller]
    pub(crate) fn next(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.out.read_line(&mut line).expect("a line"), 0, "it says no more");
        serde_json::from_str(&line).expect(&line)
    }

    /// Reads on up to what is meant.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, meant: impl Fn(&Value) -> bool) {
        while !meant(&self.next()) {}
    }

    /// It, with nobody who reads what it says any more.
    pub(crate) fn unread(self) -> Running {
        self.running
    }

    /// What became of it, but for what it says on standard output.
    pub(crate) fn end(mut self) -> Output {
        // Read on, or it waits for somebody who does.
        std::thread::spawn(move || std::io::copy(&mut self.out, &mut std::io::sink()));
        self.running.end()
    }
}

/// A receiver, and where it listens.
pub(crate) fn receiver(options: &str, to: &Path) -> (Saying, String) {
    let args = format!("--json receive --listen 127.0.0.1:0 {options} --to");
    let mut receiver = Saying::start(pageferry(words(&args)).arg(to));
    let address = receiver.next()["address"].as_str().expect("an address").to_owned();
    (receiver, address)
}

pub(crate) fn is_stored(line: &Value) -> bool {
    line["event"] == "stored"
}

pub(crate) fn images(directory: &Path) -> Vec<String> {
    let output = run(pageferry(["--json", "image", "ls"]).arg(directory));
    expect_code(&output, 0);
    let report = json(&output);
    let rows = report["images"].as_array().expect("images");
    rows.iter().map(|row| row["path"].as_str().expect("a path").to_owned()).collect()
}

#[track_caller]
pub(crate) fn verify(directory: &Path) {
    let output = run(pageferry(["--json", "image", "verify"]).arg(directory));
    expect_code(&output, 0);
    assert_eq!(json(&output)["intact"], true);
}

/// What the checkpoint that failed names as the last complete image: a path, or an identity
/// and a peer.
#[track_caller]
pub(crate) fn named(output: &Output) -> Option<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("no image was completed") {
        return None;
    }
    let (_, name) = said.split_once("the last complete image is ").expect(&said);
    let end = ["; ", ": ", "\n"].iter().filter_map(|end| name.find(end)).min();
    Some(name[..end.unwrap_or(name.len())].to_owned())
}

/// The chain is intact, and its newest image is the one that was named.
#[track_caller]
pub(crate) fn assert_last_is(directory: &Path, named: Option<&str>) {
    let images = images(directory);
    assert_eq!(images.last().map(String::as_str), named);
    if named.is_some() {
        verify(directory);
    }
}
