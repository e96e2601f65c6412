//! The command as a script sees it: exit codes, standard output, signals.

use std::{
    io::Read as _,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

fn pageferry(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    pageferry(args).output().expect("the command starts")
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        let text = String::from_utf8_lossy(&output.stdout);
        panic!("{error}: {text}");
    })
}

/// Whether this process can have a userfaultfd: what doctor says of it.
fn has_userfaultfd() -> bool {
    let has = json(&run(&["--json", "doctor"]))["findings"]
        .as_array()
        .expect("findings")
        .iter()
        .any(|f| f["id"] == "missing.anonymous" && f["status"] == "works");
    if !has {
        println!("skipped: needs userfaultfd");
    }
    has
}

#[test]
fn wrong_usage_is_2() {
    let cases: [&[&str]; 6] = [
        &[],
        &["no-such-command"],
        &["doctor", "--no-such-option"],
        &["bench", "faults", "--pages", "0"],
        &["bench", "faults", "--backing", "anon", "--kind", "minor"],
        &["bench", "faults", "--pages", "4", "--threads", "8"],
    ];
    for args in cases {
        let output = run(args);
        assert_eq!(code(&output), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?} says why");
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn every_command_has_help_with_examples_and_exit_codes() {
    let commands: [&[&str]; 4] = [&[], &["doctor"], &["bench"], &["bench", "faults"]];
    for command in commands {
        let output = run(&[command, &["--help"]].concat());
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(code(&output), Some(0), "{command:?}");
        assert!(text.contains("Exit codes:"), "{command:?}: {text}");
        assert!(text.contains("Examples:"), "{command:?}: {text}");
    }
}

#[test]
fn doctor_reports_findings_with_stable_fields() {
    let output = run(&["doctor", "--json"]);
    let report = json(&output);
    let findings = report["findings"].as_array().expect("findings");
    let mut ids: Vec<&str> = Vec::new();
    for finding in findings {
        let id = finding["id"].as_str().expect("an id");
        let status = finding["status"].as_str().expect("a status");
        assert!(["works", "missing", "untested", "fact"].contains(&status), "{finding}");
        if status == "missing" {
            for field in ["detail", "costs", "remedy"] {
                assert!(finding[field].is_string(), "{id} is missing, without {field}");
            }
        }
        ids.push(id);
    }
    for id in ["kernel", "page-size", "userfaultfd", "missing.anonymous", "soft-dirty", "kvm"] {
        assert_eq!(ids.iter().filter(|found| **found == id).count(), 1, "{id} is reported once");
    }
    let any_pick = !report["picks"].as_array().expect("picks").is_empty();
    assert_eq!(code(&output), Some(if any_pick { 0 } else { 3 }));
}

#[test]
fn doctor_agrees_with_itself_as_text() {
    let (text, report) = (run(&["doctor"]), json(&run(&["doctor", "--json"])));
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for finding in report["findings"].as_array().expect("findings") {
        let what = finding["what"].as_str().expect("what");
        assert!(text.contains(what), "{what} is not in the text");
    }
}

#[test]
fn bench_faults_reports_both_references() {
    if !has_userfaultfd() {
        return;
    }
    let args = "bench faults --threads 2 --rounds 1 --pages 256 --delivery queue --backing anon";
    let output = run(&[&["--json"], &*args.split(' ').collect::<Vec<_>>()].concat());
    assert_eq!(code(&output), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report = json(&output);
    let references = report["references"].as_array().expect("references");
    let names: Vec<&str> = references.iter().filter_map(|r| r["contender"].as_str()).collect();
    assert_eq!(names, ["reader", "raw"]);
    for row in references {
        assert_eq!((&row["threads"], &row["backing"]), (&2.into(), &"anon".into()));
        for field in ["pages_per_s", "us_per_page", "cpu_us_per_page", "p50_us", "p99_us"] {
            assert!(row[field].as_f64().expect(field) > 0.0, "{field} of {row}");
        }
        assert!(row["ratio_to_reader"].as_f64().expect("a ratio") > 0.0);
    }
    assert_eq!(references[0]["ratio_to_reader"], 1.0);
    assert_eq!(references[1]["ratio_to_raw"], 1.0);
}

/// A benchmark that would run for hours, once it catches `signal`.
fn long_benchmark(signal: rustix::process::Signal) -> Child {
    let args = "--json bench faults --rounds 1000000 --pages 4096 --threads 8 --backing anon";
    let mut child = pageferry(&args.split(' ').collect::<Vec<_>>())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let path = format!("/proc/{}/status", child.id());
    loop {
        let status = std::fs::read_to_string(&path).expect("the command's status");
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let mask = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        if mask.expect("a mask of signals") & (1 << (signal.as_raw() - 1)) != 0 {
            return child;
        }
        let ended = child.try_wait().expect("waiting for the command");
        assert!(ended.is_none(), "the command ended by itself: {ended:?}");
        std::thread::yield_now();
    }
}

fn wait(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().expect("waiting for the command") {
            return status.code();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().expect("killing the command");
    panic!("the command did not stop within a minute of being asked to");
}

#[test]
fn signals_stop_it_with_their_own_code() {
    if !has_userfaultfd() {
        return;
    }
    for (signal, expected) in
        [(rustix::process::Signal::INT, 130), (rustix::process::Signal::TERM, 143)]
    {
        let mut child = long_benchmark(signal);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).expect("signalling the command");
        assert_eq!(wait(&mut child), Some(expected), "{signal:?}");
        let mut text = String::new();
        child.stdout.take().expect("piped").read_to_string(&mut text).expect("its output");
        let report: Value = serde_json::from_str(&text).expect("one JSON document");
        assert_eq!(report["exit_code"], expected);
    }
}
