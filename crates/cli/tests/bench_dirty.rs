//! `pageferry bench dirty`: the rows it promises, the model, and the picture.

mod common;

use std::collections::BTreeSet;

use common::{expect_code, json, pageferry, run, words};
use serde_json::Value;

/// The methods that work here, by the doctor.
fn methods() -> BTreeSet<String> {
    let report = json(&run(&mut pageferry(["--json", "doctor"])));
    let works = |id: &str| {
        report["findings"]
            .as_array()
            .expect("findings")
            .iter()
            .any(|finding| finding["id"] == id && finding["status"] == "works")
    };
    [
        ("soft-dirty", "soft-dirty"),
        ("wp.anonymous", "wp-blocking"),
        ("wp.async", "wp-async"),
        // Every KVM has the log.
        ("kvm-runs", "kvm-log"),
        ("kvm-dirty-ring", "kvm-ring"),
    ]
    .into_iter()
    .filter(|(id, _)| works(id))
    .map(|(_, method)| method.to_owned())
    .collect()
}

fn number(row: &Value, field: &str) -> f64 {
    let number = row[field].as_f64().unwrap_or_else(|| panic!("{field}: {row}"));
    assert!(number.is_finite() && number >= 0.0, "{field}: {row}");
    number
}

#[test]
fn rows_model_and_picture() {
    let methods = methods();
    if methods.is_empty() {
        println!("skipped: needs a way to track writes");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let picture = directory.path().join("dirty.svg");
    let small = "--json bench dirty --bytes 2MiB,4MiB,8MiB,16MiB --share 1,50 --rounds 1 --plot";
    let output = run(pageferry(words(small)).arg(&picture));
    expect_code(&output, 0);
    let report = json(&output);

    let mut cases = BTreeSet::new();
    for row in report["rows"].as_array().expect("rows") {
        for field in ["arm_ms", "write_us", "harvest_ms", "idle_harvest_ms", "cycle_ms"] {
            number(row, field);
        }
        assert!(number(row, "ratio_to_raw") > 0.0 && number(row, "harvest_ms") > 0.0, "{row}");
        // Medians of one round: they are about the same run.
        let writes = number(row, "write_us") * number(row, "written_pages") / 1e3;
        let sum = writes + number(row, "harvest_ms");
        assert!((number(row, "cycle_ms") - sum).abs() < 1e-6 * sum, "{row}");
        let pages = number(row, "bytes") / 4096.0 * number(row, "dirty_share");
        assert_eq!(number(row, "written_pages"), pages.round(), "{row}");
        let method = row["method"].as_str().expect("a method").to_owned();
        let case =
            (method, number(row, "bytes") as u64, (number(row, "dirty_share") * 100.0) as u64);
        assert!(cases.insert(case), "twice: {row}");
    }
    let sizes = [2u64 << 20, 4 << 20, 8 << 20, 16 << 20];
    let expected: BTreeSet<_> = methods
        .iter()
        .flat_map(|method| sizes.map(|size| [1, 50].map(|share| (method.clone(), size, share))))
        .flatten()
        .collect();
    assert_eq!(cases, expected);
    let references = report["references"].as_array().expect("references");
    assert_eq!(references.len(), expected.len());
    assert!(references.iter().all(|row| row["ratio_to_raw"] == 1.0 && row["contender"] == "raw"));

    let models = report["models"].as_array().expect("models");
    assert_eq!(models.len(), methods.len());
    for model in models {
        assert_eq!(model["held_out"], serde_json::json!([8 << 20, 16 << 20]));
        assert_eq!(model["error"]["points"], 4, "two sizes with two shares: {model}");
        number(&model["error"], "cycle_median");
        for terabyte in model["terabyte"].as_array().expect("predictions") {
            assert!(number(terabyte, "cycle_ms") > 0.0, "{model}");
        }
    }

    let picture = std::fs::read_to_string(picture).expect("a picture");
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    for method in &methods {
        assert!(picture.contains(method), "{method} has a label");
    }
}

/// What a model of few sizes is worth is said, and what is measured is told whatever becomes of the
/// picture.
#[test]
fn few_sizes_and_a_picture_that_cannot_be() {
    if methods().is_empty() {
        println!("skipped: needs a way to track writes");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let small = "bench dirty --bytes 2MiB,4MiB --share 1,50 --rounds 1 --plot";
    let nowhere = directory.path().join("nowhere/dirty.svg");
    let output = run(pageferry(words(small)).arg(&nowhere));
    expect_code(&output, 1);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--plot") && said.contains("nowhere/dirty.svg"), "{said}");
    assert!(output.stdout.is_empty(), "nothing was measured for it: {output:?}");

    let picture = directory.path().join("dirty.svg");
    let output = run(pageferry(words(small)).arg(&picture));
    expect_code(&output, 0);
    assert!(picture.exists());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let models = said.matches("1 TiB with 50% written").count();
    assert!(models > 0, "{said}");
    assert_eq!(said.matches("its error is not known").count(), models, "{said}");

    // A place that has room for nothing.
    let full = std::path::Path::new("/dev/full");
    if full.exists() {
        let output = run(pageferry(words(small)).arg(full));
        expect_code(&output, 1);
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 TiB with"), "{output:?}");
    }
}

#[test]
fn every_kind_of_memory() {
    if methods().is_empty() {
        println!("skipped: needs a way to track writes");
        return;
    }
    for backing in ["anon", "thp", "memfd"] {
        let small = "bench dirty --bytes 4MiB --share 10 --rounds 1 --backing";
        let output = run(pageferry(words(small)).arg(backing));
        expect_code(&output, 0);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(&format!("{backing} memory")), "{said}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (options, code) in [
        ("--bytes 5000", 2),
        ("--share 0", 2),
        ("--share 101", 2),
        ("--method none", 2),
        ("--bytes 1000TiB", 3),
    ] {
        let output = run(pageferry(words("bench dirty")).args(words(options)));
        expect_code(&output, code);
        assert!(!output.stderr.is_empty(), "{options} says why");
    }
}

/// A ring that is smaller than what is written, and memory that no guest of the benchmark has.
#[test]
fn guests_with_full_rings_and_with_too_much_memory() {
    let methods = methods();
    for method in ["kvm-log", "kvm-ring"] {
        let output = run(pageferry(words("bench dirty --bytes 62GiB --method")).arg(method));
        if !methods.contains(method) {
            expect_code(&output, 3);
            println!("skipped: needs {method}");
            continue;
        }
        expect_code(&output, 2);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("60 GiB at most"), "{said}");
    }
    if !methods.contains("kvm-ring") {
        return;
    }
    // Rings have 1 MiB at most, for 65,536 pages.
    let large = "--json bench dirty --bytes 288MiB --share 100 --rounds 1 --method kvm-ring";
    let output = run(&mut pageferry(words(large)));
    expect_code(&output, 0);
    assert_eq!(json(&output)["rows"][0]["written_pages"], 288 << 8);
}
