//! The command as a script sees it: exit codes, standard output, signals.

mod common;

use std::process::Output;

use common::{Running, expect_code, host::has_userfaultfd, json, pageferry, words};
use rustix::process::Signal;

fn run(args: &[&str]) -> Output {
    common::run(&mut pageferry(args))
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
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
        let output = run(&[args, &["--json"]].concat());
        assert_eq!(code(&output), Some(2), "{args:?} --json");
        let report = json(&output);
        assert_eq!(report["exit_code"], 2, "{args:?}");
        assert!(!report["error"].as_str().expect("a text").is_empty(), "{args:?}: {report}");
    }
}

#[test]
fn every_command_has_help_with_examples_and_exit_codes() {
    let commands: [&[&str]; 6] =
        [&[], &["doctor"], &["demo"], &["serve"], &["bench"], &["bench", "faults"]];
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
    let output = run(&[&["--json"], &*words(args).collect::<Vec<_>>()].concat());
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

#[test]
fn signals_stop_it_with_their_own_code() {
    if !has_userfaultfd() {
        return;
    }
    for (signal, expected) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let args = "--json bench faults --rounds 1000000 --pages 4096 --threads 8 --backing anon";
        let mut running = Running::start(&mut pageferry(words(args)));
        running.wait_catches(signal);
        running.signal(signal);
        let output = running.end();
        expect_code(&output, expected);
        assert_eq!(json(&output)["exit_code"], expected);
    }
}
