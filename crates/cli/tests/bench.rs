//! `pageferry bench faults`: the rows it promises, for every delivery and memory.

mod common;
#[path = "common/nobody.rs"]
mod nobody;

use std::collections::BTreeSet;

use common::{expect_code, host::has_userfaultfd, json, pageferry, run, text, words};
use nobody::{ForNobody, deprived};
use serde_json::Value;

const DELIVERIES: [&str; 6] = ["queue", "queue-n", "by-thread", "by-cpu", "sharded", "signal"];
const MEMORY: [(&str, &str); 3] = [("anon", "missing"), ("memfd", "missing"), ("memfd", "minor")];
const SMALL: &str = "--json bench faults --rounds 1 --pages 64 --threads 1,2";

fn field<'a>(row: &'a Value, name: &str) -> &'a str {
    row[name].as_str().unwrap_or_else(|| panic!("{name}: {row}"))
}

#[test]
fn a_row_for_every_delivery_threads_and_memory() {
    if !has_userfaultfd() {
        return;
    }
    let output = run(&mut pageferry(words(SMALL)));
    expect_code(&output, 0);
    let report = json(&output);
    let rows = report["rows"].as_array().expect("rows");
    let mut cases = BTreeSet::new();
    for row in rows {
        let numbers = [
            "pages_per_s",
            "us_per_page",
            "cpu_us_per_page",
            "p50_us",
            "p99_us",
            "ratio_to_raw",
            "ratio_to_reader",
        ];
        for name in numbers {
            let number = row[name].as_f64().unwrap_or_else(|| panic!("{name}: {row}"));
            assert!(number > 0.0 && number.is_finite(), "{name}: {row}");
        }
        assert!(row["p50_us"].as_f64() <= row["p99_us"].as_f64(), "{row}");
        // Medians of one round: they are about the same run.
        let product =
            row["pages_per_s"].as_f64().and_then(|rate| Some(rate * row["us_per_page"].as_f64()?));
        assert!((product.expect("numbers") - 1e6).abs() < 1.0, "{row}");
        let case = (
            field(row, "contender").to_owned(),
            field(row, "delivery").to_owned(),
            row["threads"].as_u64().expect("a number"),
            field(row, "backing").to_owned(),
            field(row, "kind").to_owned(),
        );
        assert!(cases.insert(case), "twice: {row}");
    }
    let mut expected = BTreeSet::new();
    for contender in ["pageferry", "pageferry-defaults"] {
        for delivery in DELIVERIES {
            for threads in [1, 2] {
                for (backing, kind) in MEMORY {
                    let case = [contender, delivery, backing, kind].map(str::to_owned);
                    let [contender, delivery, backing, kind] = case;
                    expected.insert((contender, delivery, threads, backing, kind));
                }
            }
        }
    }
    assert_eq!(cases, expected);
    // The references ran beside them: the reader once a group, raw once a row.
    let references = report["references"].as_array().expect("references");
    let count = |name: &str| references.iter().filter(|row| row["contender"] == name).count();
    assert_eq!((count("reader"), count("raw")), (2 * MEMORY.len(), expected.len() / 2));
}

#[test]
fn options_choose_what_is_measured() {
    if !has_userfaultfd() {
        return;
    }
    /// Options, and the contender, delivery and kind of each row.
    type Case = (&'static str, &'static [(&'static str, &'static str, &'static str)]);
    let cases: [Case; 4] = [
        (
            "--delivery signal,queue --backing memfd --kind minor --engine single",
            &[("pageferry", "signal", "minor"), ("pageferry", "queue", "minor")],
        ),
        (
            "--delivery sharded --backing anon --engine around:64KiB --order sequential",
            &[("pageferry-around-64k", "sharded", "missing")],
        ),
        (
            "--delivery by-cpu --kind minor --engine single --access write --workers 3",
            &[("pageferry", "by-cpu", "minor")],
        ),
        (
            "--delivery queue --backing anon --engine single --batch 1 --seed 9",
            &[("pageferry", "queue", "missing")],
        ),
    ];
    for (more, expected) in cases {
        let args = format!("--json bench faults --rounds 2 --pages 256 --threads 2 {more}");
        let output = run(&mut pageferry(words(&args)));
        expect_code(&output, 0);
        let report = json(&output);
        let rows: Vec<_> = report["rows"]
            .as_array()
            .expect("rows")
            .iter()
            .map(|row| (field(row, "contender"), field(row, "delivery"), field(row, "kind")))
            .collect();
        assert_eq!(rows, expected, "{more}");
        let setup = &report["setup"];
        assert_eq!((&setup["pages"], &setup["rounds"]), (&256.into(), &2.into()));
        let order = if more.contains("sequential") { "sequential" } else { "random" };
        assert_eq!(setup["order"], order, "{more}");
        let access = if more.contains("write") { "write" } else { "read" };
        assert_eq!(setup["access"], access, "{more}");
        assert_eq!(setup["batch"], if more.contains("--batch") { 1 } else { 64 }, "{more}");
    }
}

#[test]
fn the_table_for_people_has_the_same_rows() {
    if !has_userfaultfd() {
        return;
    }
    let args =
        "bench faults --rounds 1 --pages 64 --threads 1 --delivery queue,signal --engine single";
    let output = run(&mut pageferry(words(args)));
    expect_code(&output, 0);
    let table = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = table.lines().collect();
    for column in ["pages/s", "us/page", "cpu us/page", "p50 us", "p99 us", "/raw", "/reader"] {
        assert!(lines[0].contains(column), "{column}: {}", lines[0]);
    }
    for (backing, kind) in MEMORY {
        let of = |contender: &str| {
            let row = |line: &&&str| {
                let cells: Vec<&str> = line.split_whitespace().collect();
                cells.len() > 4 && cells[..2] == [backing, kind] && cells[4] == contender
            };
            lines.iter().filter(row).count()
        };
        assert_eq!((of("reader"), of("raw"), of("pageferry")), (1, 2, 2), "{table}");
    }
}

#[test]
fn it_needs_no_root() {
    if !has_userfaultfd() {
        return;
    }
    let nobody = ForNobody::new();
    let args = format!("{SMALL} --engine single");
    let output = run(&mut nobody.command(words(&args)));
    expect_code(&output, 0);
    let rows = json(&output)["rows"].as_array().map(Vec::len);
    assert_eq!(rows, Some(DELIVERIES.len() * 2 * MEMORY.len()));
}

#[test]
fn without_any_userfaultfd_it_is_3_and_points_to_doctor() {
    let nobody = ForNobody::new();
    let Some(mut command) = deprived(&nobody, words(SMALL)) else { return };
    let output = run(&mut command);
    expect_code(&output, 3);
    assert_eq!(json(&output)["exit_code"], 3);
    assert!(text(&output).contains("pageferry doctor"), "{}", text(&output));
}
