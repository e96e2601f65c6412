//! `pageferry bench vcpus`: the rows it promises, for every delivery and memory.

mod common;
#[allow(dead_code)] // Other tests use the rest.
#[path = "common/nobody.rs"]
mod nobody;

use std::collections::BTreeSet;

use common::{Running, expect_code, json, pageferry, run, text, words};
use nobody::{ForNobody, nobody_can_open};
use rustix::process::Signal;
use serde_json::Value;

const DELIVERIES: [&str; 7] = ["none", "queue", "queue-n", "sharded", "exit", "hybrid", "auto"];

/// Whether KVM's guests can be paged here: what doctor says of it.
fn can_page_guests() -> bool {
    let report = json(&run(&mut pageferry(["--json", "doctor"])));
    let findings = report["findings"].as_array().expect("findings");
    for needed in ["kvm-runs", "kernel-faults", "minor.memfd"] {
        if !findings.iter().any(|f| f["id"] == needed && f["status"] == "works") {
            println!("skipped: needs what doctor calls {needed}");
            return false;
        }
    }
    true
}

/// Whether faults can be exits here.
fn has_exits() -> bool {
    let least = "bench vcpus --vcpus 1 --pages 1 --rounds 1 --delivery exit --kind missing";
    let output = run(&mut pageferry(words(least)));
    let missing = output.status.code() == Some(3);
    if missing {
        println!("skipped: needs exits: {}", text(&output));
    }
    !missing
}

fn field<'a>(row: &'a Value, name: &str) -> &'a str {
    row[name].as_str().unwrap_or_else(|| panic!("{name}: {row}"))
}

fn rows<'a>(report: &'a Value, name: &str) -> &'a [Value] {
    report[name].as_array().unwrap_or_else(|| panic!("{name}: {report}"))
}

fn case(row: &Value) -> (String, String, u64, String, String) {
    let text = |name| field(row, name).to_owned();
    let vcpus = row["threads"].as_u64().expect("a number");
    (text("delivery"), text("setup"), vcpus, text("kind"), text("backing"))
}

#[test]
fn a_row_for_every_delivery_vcpus_and_setup() {
    if !can_page_guests() {
        return;
    }
    let args = "--json bench vcpus --vcpus 1,3 --pages 64 --rounds 1";
    let output = run(&mut pageferry(words(args)));
    expect_code(&output, 0);
    let report = json(&output);
    let ours = rows(&report, "rows");
    let left_out: Vec<&str> =
        rows(&report, "left_out").iter().map(|left| field(left, "delivery")).collect();
    let mut expected = BTreeSet::new();
    for vcpus in [1, 3] {
        for delivery in DELIVERIES.into_iter().filter(|delivery| !left_out.contains(delivery)) {
            let mut on = |setup: &str, kind: &str, backing: &str| {
                let [delivery, setup, kind, backing] =
                    [delivery, setup, kind, backing].map(str::to_owned);
                expected.insert((delivery, setup, vcpus, kind, backing));
            };
            on("missing", "missing", "anon");
            on("minor", "minor", "memfd");
            if delivery == "hybrid" {
                on("minor-own-view", "minor", "memfd");
            }
        }
    }
    let cases: BTreeSet<_> = ours.iter().map(case).collect();
    assert_eq!(cases, expected);
    assert_eq!(ours.len(), expected.len(), "each once");
    for row in ours {
        let number = |name: &str| {
            let number = row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
            assert!(number > 0.0 && number.is_finite(), "{name}: {row}");
            number
        };
        for name in
            ["cpu_us_per_page", "ratio_to_raw", "cpu_ratio_to_raw", "ratio_to_reader", "max_us"]
        {
            number(name);
        }
        assert!(number("p50_us") <= number("p99_us"), "{row}");
        assert!(number("p99_us") <= number("max_us"), "{row}");
        // Medians of one round: they are about the same run.
        let rate = number("pages_per_s");
        assert!((rate * number("us_per_page") - 1e6).abs() < 1.0, "{row}");
        let per_vcpu = rate / row["threads"].as_f64().expect("a number");
        assert!((number("pages_per_s_per_vcpu") - per_vcpu).abs() < 1.0, "{row}");
        assert_eq!((field(row, "contender"), &row["delay_us"]), ("pageferry", &0.into()));
        if field(row, "delivery") == "auto" {
            let auto = &row["auto"];
            assert!(!field(auto, "picked").is_empty() && !field(auto, "why").is_empty(), "{row}");
            assert!(DELIVERIES.contains(&field(auto, "best")), "{row}");
            assert!(auto["ratio_to_best"].as_f64().is_some_and(|ratio| ratio > 0.0), "{row}");
        } else {
            assert!(row.get("auto").is_none(), "{row}");
        }
    }
    // The references ran beside them: the reader once a group, raw once a row.
    let references = rows(&report, "references");
    let count = |name: &str| references.iter().filter(|row| row["contender"] == name).count();
    assert_eq!((count("reader"), count("raw")), (4, ours.len()));
    for name in ["kernel", "kvm", "kvm_paging", "order", "access", "ring"] {
        field(&report["setup"], name);
    }
}

#[test]
fn options_choose_what_is_measured() {
    if !can_page_guests() {
        return;
    }
    /// Options, and the delivery and set-up of each row.
    type Case = (&'static str, &'static [(&'static str, &'static str)]);
    let cases: [Case; 4] = [
        ("--delivery queue,none --kind minor --vcpus 5", &[("queue", "minor"), ("none", "minor")]),
        (
            "--setup missing,minor-own-view --delivery queue-n --workers 3 --order sequential",
            &[("queue-n", "missing"), ("queue-n", "minor-own-view")],
        ),
        ("--delivery sharded --kind missing --delay-us 40 --batch 1", &[("sharded", "missing")]),
        // Instructions of ring 0 are emulated by some hosts.
        ("--delivery queue --kind minor --ring 0 --seed 9", &[("queue", "minor")]),
    ];
    for (more, expected) in cases {
        let args = format!("--json bench vcpus --vcpus 2 --rounds 2 --pages 48 {more}");
        // The last of an option that is given twice would be an error.
        let args = if more.contains("--vcpus") { args.replace("--vcpus 2 ", "") } else { args };
        let output = run(&mut pageferry(words(&args)));
        expect_code(&output, 0);
        let report = json(&output);
        let got: Vec<_> = rows(&report, "rows")
            .iter()
            .map(|row| (field(row, "delivery"), field(row, "setup")))
            .collect();
        let sorted = |mut rows: Vec<_>| {
            rows.sort_unstable();
            rows
        };
        assert_eq!(sorted(got), sorted(expected.to_vec()), "{more}");
        let setup = &report["setup"];
        assert_eq!((&setup["pages"], &setup["rounds"]), (&48.into(), &2.into()));
        let or = |option: &str, value: &'static str, other| {
            if more.contains(option) { value } else { other }
        };
        assert_eq!(setup["order"], or("sequential", "sequential", "random"), "{more}");
        assert_eq!(setup["ring"], or("--ring 0", "0", "3"), "{more}");
        let delay: u64 = if more.contains("--delay-us") { 40 } else { 0 };
        assert_eq!(setup["delay_us"], delay, "{more}");
        for row in rows(&report, "rows") {
            assert_eq!(row["delay_us"], delay, "{more}");
            // One vCPU waits for every one of its pages, another meanwhile.
            let least = delay as f64 / row["threads"].as_f64().expect("a number");
            assert!(row["us_per_page"].as_f64().is_some_and(|us| us >= least), "{more}: {row}");
        }
    }
}

#[test]
fn exits_in_every_ring_and_setup() {
    if !can_page_guests() || !has_exits() {
        return;
    }
    for ring in ["0", "3"] {
        let args = format!(
            "--json bench vcpus --vcpus 2 --rounds 1 --pages 32 --ring {ring} --delivery exit \
             --setup missing,minor,minor-own-view,no-queue"
        );
        let output = run(&mut pageferry(words(&args)));
        expect_code(&output, 0);
        let report = json(&output);
        let setups: BTreeSet<_> =
            rows(&report, "rows").iter().map(|row| field(row, "setup")).collect();
        assert_eq!(setups, ["missing", "minor", "minor-own-view", "no-queue"].into());
    }
}

#[test]
fn the_table_for_people_has_the_same_rows() {
    if !can_page_guests() {
        return;
    }
    let args = "bench vcpus --rounds 1 --pages 64 --vcpus 1 --delivery queue,auto --kind minor";
    let output = run(&mut pageferry(words(args)));
    expect_code(&output, 0);
    let table = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = table.lines().collect();
    for column in ["vCPUs", "delivery", "set-up", "pages/s", "per vCPU", "p50 us", "/raw"] {
        assert!(lines[0].contains(column), "{column}: {}", lines[0]);
    }
    let of = |contender: &str| {
        let row = |line: &&&str| {
            let cells: Vec<&str> = line.split_whitespace().collect();
            cells.len() == 15 && cells[..2] == ["minor", "1"] && cells[4] == contender
        };
        lines.iter().filter(row).count()
    };
    assert_eq!((of("reader"), of("raw"), of("pageferry")), (1, 2, 2), "{table}");
    let auto = lines.iter().find(|line| line.starts_with("auto, minor, 1 vCPUs: "));
    assert!(auto.is_some_and(|line| line.contains(" of the best (queue): ")), "{table}");
}

#[test]
fn wrong_options_are_2() {
    let cases = [
        ("--vcpus 0", "0"),
        ("--vcpus 65", "65"),
        ("--vcpus 2 --pages 1", "2 vCPUs cannot each have a page of 1"),
        ("--pages 0", "0"),
        ("--rounds 0", "0"),
        ("--workers 0", "0"),
        ("--ring 1", "1"),
        ("--delivery signal", "signal"),
        ("--setup no-queue --delivery queue", "nothing to measure"),
        ("--setup missing --kind minor", "nothing to measure"),
    ];
    for (options, said) in cases {
        let args = format!("bench vcpus {options}");
        let output = run(&mut pageferry(words(&args)));
        expect_code(&output, 2);
        assert!(text(&output).contains(said), "{options}: {}", text(&output));
    }
}

#[test]
fn without_permission_for_kvm_it_is_3_and_points_to_doctor() {
    if nobody_can_open("/dev/kvm") {
        println!("skipped: needs a user who may not open /dev/kvm");
        return;
    }
    let nobody = ForNobody::new();
    let output = run(&mut nobody.command(words("--json bench vcpus --pages 64")));
    expect_code(&output, 3);
    assert_eq!(json(&output)["exit_code"], 3);
    let said = text(&output);
    assert!(said.contains("/dev/kvm") && said.contains("pageferry doctor"), "{said}");
}

#[test]
fn a_signal_stops_it_in_the_middle_of_a_run() {
    if !can_page_guests() {
        return;
    }
    // Signal, exit code, delivery, and what the name of a thread of that contender's begins with;
    // the reader comes first, then raw.
    let cases = [
        (Signal::INT, 130, "queue", "vcpu"),
        (Signal::TERM, 143, "queue", "pf-"),
        (Signal::INT, 130, "exit", "pf-"),
    ];
    for (signal, code, delivery, name) in cases {
        if delivery == "exit" && !has_exits() {
            continue;
        }
        // Each run takes a second or so, and all of them hours.
        let args = format!(
            "bench vcpus --vcpus 2 --pages 800 --rounds 10000 --delay-us 1000 --kind missing \
             --delivery {delivery}"
        );
        let mut running = Running::start(&mut pageferry(words(&args)));
        running.wait_until("its vCPUs", |pid| {
            let threads = |prefix| Running::threads_named(pid, prefix);
            (threads("vcpu") == 2 && threads(name) > 0).then_some(())
        });
        running.signal(signal);
        let output = running.end();
        expect_code(&output, code);
        assert!(output.stdout.is_empty(), "{output:?}");
        assert!(text(&output).contains("stopped by"), "{}", text(&output));
    }
}

#[test]
fn help_has_examples() {
    let output = run(&mut pageferry(words("bench vcpus --help")));
    expect_code(&output, 0);
    let help = String::from_utf8_lossy(&output.stdout);
    let words: Vec<&str> = help.split_whitespace().collect();
    let help = words.join(" ");
    for part in ["Examples:", "bench vcpus --vcpus 32 --delay-us 30", "Exit codes:", "no-queue"] {
        assert!(help.contains(part), "{part}: {help}");
    }
}
