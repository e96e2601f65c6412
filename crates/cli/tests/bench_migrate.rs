//! `pageferry bench migrate`: the rows it promises, the picture, and what it refuses.

mod common;

use common::{
    Process, Running, expect_code, host::has_userfaultfd, json, pageferry, run, text, words,
};
use rustix::{
    fs::{Access, access},
    process::{Pid, Signal},
};
use serde_json::Value;

/// Whether guests can be moved in every mode here; says so if not.
fn can_migrate() -> bool {
    let all = Access::READ_OK | Access::WRITE_OK;
    if let Err(error) = access("/dev/kvm", all) {
        println!("skipped: needs /dev/kvm: {error}");
        return false;
    }
    has_userfaultfd()
}

#[track_caller]
fn number(row: &Value, field: &str) -> f64 {
    let number = row[field].as_f64().unwrap_or_else(|| panic!("{field}: {row}"));
    assert!(number.is_finite() && number >= 0.0, "{field}: {row}");
    number
}

/// What every row has, and what one of a guest has.
#[track_caller]
fn check(row: &Value, bytes: f64) {
    assert_eq!(number(row, "memory_bytes"), bytes);
    // Medians of one round: they are about the same run.
    let rate = bytes / number(row, "total_ms") / 1e3;
    assert!((number(row, "mb_per_s") / rate - 1.0).abs() < 1e-6, "{row}");
    assert!(number(row, "ratio_to_plain") > 0.0, "{row}");
    let of_guest = ["downtime_ms", "sent_bytes", "rounds", "faults", "blocked_ms"];
    if row["engine"] == "plain-send" {
        assert_eq!(row["ratio_to_plain"], 1.0, "{row}");
        for field in of_guest.into_iter().chain(["mode", "workload", "compression", "p50_us"]) {
            assert!(row[field].is_null(), "{field}: {row}");
        }
        return;
    }
    assert_eq!(row["engine"], "pageferry");
    for field in of_guest {
        number(row, field);
    }
    let downtime = number(row, "downtime_ms");
    assert!(downtime > 0.0 && downtime <= number(row, "total_ms"), "{row}");
    let rounds = number(row, "rounds");
    match row["mode"].as_str().expect("a mode") {
        "pre" => assert!(rounds >= 1.0 && number(row, "faults") == 0.0, "{row}"),
        "hybrid" => assert!(rounds >= 1.0, "{row}"),
        "post" => {
            assert!(rounds == 0.0 && number(row, "faults") > 0.0, "{row}");
            let [p50, p99, max] = ["p50_us", "p99_us", "max_us"].map(|field| number(row, field));
            assert!(p50 > 0.0 && p50 <= p99 && p99 <= max, "{row}");
            // All waits together: no less than the longest, and no more than if all were it.
            let (blocked, faults) = (number(row, "blocked_ms") * 1e3, number(row, "faults"));
            assert!(blocked >= max * 0.99 && blocked <= faults * max * 1.01, "{row}");
        }
        mode => panic!("{mode}: {row}"),
    }
}

fn rows(report: &Value) -> &[Value] {
    report["rows"].as_array().expect("rows")
}

#[test]
fn rows_of_every_mode_and_a_picture() {
    if !can_migrate() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let picture = directory.path().join("migrate.svg");
    // Slow enough for the guest to fault.
    let small = "--json bench migrate --memory 16MiB --background 40 --rounds 1 --plot";
    let output = run(pageferry(words(small)).arg(&picture));
    expect_code(&output, 0);
    let report = json(&output);
    let all: Vec<_> = rows(&report).iter().map(|row| row["mode"].as_str()).collect();
    assert_eq!(all, [None, Some("pre"), Some("post"), Some("hybrid")]);
    for row in rows(&report) {
        check(row, f64::from(16 << 20));
        assert_eq!((&row["backing"], &row["connections"]), (&"anon".into(), &1.into()), "{row}");
        // All of it was sent, and hardly anything twice.
        if let Some(sent) = row["sent_bytes"].as_f64() {
            assert!((1.0..1.5).contains(&(sent / f64::from(16 << 20))), "{row}");
        }
    }
    let picture = std::fs::read_to_string(picture).expect("a picture");
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    for label in ["plain-send", "pageferry post random-read", "MB/s", "downtime, ms"] {
        assert!(picture.contains(label), "{label} is in the picture");
    }
}

#[test]
fn whatever_the_guest_does_and_however_it_is_sent() {
    if !can_migrate() {
        return;
    }
    for options in [
        "--mode pre --workload stopped,linear-write:20 --connections 0,3 --backing memfd",
        "--mode hybrid --workload random-write:20 --compression none,lz4,zstd --vcpus 2",
        "--mode post --workload linear-write,random-write --backing anon,memfd --background 20",
    ] {
        let small = "--json bench migrate --memory 8MiB --rounds 1";
        let output = run(pageferry(words(small)).args(words(options)));
        expect_code(&output, 0);
        let report = json(&output);
        // plain-send of each kind of memory and number of connections, and the cases.
        assert!(rows(&report).len() >= 4, "{options}: {report}");
        rows(&report).iter().for_each(|row| check(row, f64::from(8 << 20)));
    }
}

#[test]
fn the_table_says_what_it_is_of() {
    if !can_migrate() {
        return;
    }
    let small = "bench migrate --memory 4MiB --rounds 2 --mode pre --workload stopped";
    let output = run(&mut pageferry(words(small)));
    expect_code(&output, 0);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in ["plain-send", "4 MiB anon", "stopped", "medians of 2 rounds", "1 vCPUs"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (options, code) in [
        ("--memory 5000", 2),
        ("--memory 0", 2),
        ("--mode sideways", 2),
        ("--workload random-read:5", 2),
        ("--workload random-write:0", 2),
        ("--connections 33", 2),
        ("--vcpus 0", 2),
        ("--downtime soon", 2),
        ("--background 0", 2),
        ("--memory 1000TiB", 3),
    ] {
        let output = run(pageferry(words("bench migrate")).args(words(options)));
        expect_code(&output, code);
        assert!(!text(&output).is_empty(), "{options} says why");
    }
}

/// Before anything is measured, which would take long here.
#[test]
fn a_picture_that_cannot_be_drawn_is_known_before() {
    if !can_migrate() {
        return;
    }
    let huge = "bench migrate --memory 1GiB --rounds 1000 --plot /nowhere/at/all.svg";
    let output = run(&mut pageferry(words(huge)));
    expect_code(&output, 1);
    assert!(text(&output).contains("/nowhere/at/all.svg"), "{}", text(&output));
}

/// The benchmark while it moves a guest, which takes long, and its two processes: the destination is
/// started first.
fn while_a_guest_moves() -> (Running, [Process; 2]) {
    let slow = "bench migrate --mode post --memory 64MiB --background 1 --rounds 100";
    let mut bench = Running::start(&mut pageferry(words(slow)));
    let processes = bench.wait_until("the two processes of a migration", |pid| {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        let pids = children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().ok()?));
        let pids: Vec<Pid> = pids.collect::<Option<_>>()?;
        let moves = |pid: &Pid| {
            let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.windows(6).any(|part| part == b"\"case\"")
        };
        let [destination, source] = pids.iter().all(moves).then_some(pids)?.try_into().ok()?;
        Some([Process::open(destination)?, Process::open(source)?])
    });
    (bench, processes)
}

#[test]
fn interrupted_it_ends_with_its_processes() {
    if !can_migrate() {
        return;
    }
    let (bench, processes) = while_a_guest_moves();
    bench.signal(Signal::INT);
    expect_code(&bench.end(), 130);
    processes.iter().for_each(Process::wait_ended);
}

#[test]
fn a_side_that_is_killed_fails_it() {
    if !can_migrate() {
        return;
    }
    for (number, side) in ["destination", "source"].into_iter().enumerate() {
        let (bench, processes) = while_a_guest_moves();
        processes[number].signal(Signal::KILL);
        let output = bench.end();
        expect_code(&output, 1);
        let said = text(&output);
        assert!(said.contains("failed (signal: 9 (SIGKILL))") && said.contains(side), "{said}");
        processes.iter().for_each(Process::wait_ended);
    }
}

#[test]
fn killed_it_leaves_no_process() {
    if !can_migrate() {
        return;
    }
    let (bench, processes) = while_a_guest_moves();
    bench.signal(Signal::KILL);
    let _ = bench.end();
    processes.iter().for_each(Process::wait_ended);
}
