//! Which combinations are measured, and the arithmetic of rows.

use super::{case::Resolved, *};

fn args(options: &str) -> Args {
    let command = <Args as clap::Args>::augment_args(clap::Command::new("vcpus"));
    let words = std::iter::once("vcpus").chain(options.split_ascii_whitespace());
    let matches = command.try_get_matches_from(words).expect("valid options");
    <Args as clap::FromArgMatches>::from_arg_matches(&matches).expect("valid options")
}

fn combinations(options: &str, exits: bool) -> Vec<String> {
    let combinations = args(options).combinations(exits).expect("something to measure");
    combinations.iter().map(|(delivery, setup)| format!("{delivery} {setup}")).collect()
}

#[test]
fn what_is_measured_without_asking() {
    let with_exits = combinations("", true);
    let without = combinations("", false);
    assert_eq!(with_exits.len(), 2 * 7 + 1);
    assert_eq!(with_exits.iter().filter(|name| name.contains("own-view")).count(), 1);
    assert!(with_exits.contains(&"hybrid minor-own-view".to_owned()));
    assert_eq!(without.len(), 2 * 5);
    assert!(without.iter().all(|name| !name.contains("exit") && !name.contains("hybrid")));
}

#[test]
fn options_choose_what_is_measured() {
    // options, combinations
    let cases: [(&str, &[&str]); 5] = [
        ("--kind missing --delivery queue,exit", &["queue missing", "exit missing"]),
        ("--setup no-queue", &["none no-queue", "exit no-queue"]),
        ("--setup minor-own-view --delivery exit", &["exit minor-own-view"]),
        ("--setup missing,minor --kind minor --delivery hybrid", &["hybrid minor"]),
        ("--delivery auto", &["auto missing", "auto minor"]),
    ];
    for (options, expected) in cases {
        // What was asked for by name is not left out without a word.
        for exits in [true, false] {
            let asked = options.contains("--delivery");
            if exits || asked {
                assert_eq!(combinations(options, exits), expected, "{options}");
            }
        }
    }
    let refused =
        ["--setup missing --kind minor", "--setup no-queue --delivery queue", "--pages 1"];
    for options in refused {
        let error = args(options).combinations(true).expect_err(options);
        assert_eq!(exit::of_error(&error), Exit::Usage, "{options}: {error}");
    }
}

/// Two vCPUs and ten pages, minor faults.
pub(super) fn case(served: Option<pageferry::paging::Delivery>) -> Case {
    Case {
        delivery: Delivery::Queue,
        resolved: Resolved { served, why: None },
        setup: Setup::Minor,
        vcpus: 2,
        pages: 10,
        order: Order::Random,
        ring: Ring::Three,
        seed: 1,
        batch: 1,
        delay: Duration::ZERO,
    }
}

fn series(delivery: Delivery, walls_us: &[u64]) -> Series {
    let why = (delivery == Delivery::Auto).then(|| "a reason".to_owned());
    let served = Some(pageferry::paging::Delivery::Queue);
    let case = Case {
        delivery,
        resolved: Resolved { served, why },
        delay: Duration::from_micros(7),
        ..case(served)
    };
    let measured = |us: &u64| Measurement {
        pages: 10,
        wall: Duration::from_micros(*us),
        cpu: Duration::from_micros(2 * us),
        times: Times::default(),
    };
    Series {
        contender: Contender::Pageferry,
        case,
        rounds: walls_us.iter().map(measured).collect(),
    }
}

#[test]
fn ratios_are_within_rounds() {
    // Twice as fast in every round, while the machine slows down tenfold in between.
    let fast = series(Delivery::Auto, &[10, 100, 1000]);
    let slow = series(Delivery::Queue, &[20, 200, 2000]);
    let row = fast.row(Some(&slow), &fast, Some(&slow));
    assert_eq!((row.ratio_to_raw, row.ratio_to_reader), (Some(2.0), 1.0));
    assert_eq!(row.cpu_ratio_to_raw, Some(2.0));
    assert_eq!(row.pages_per_s.round(), 100_000.0);
    assert_eq!(row.pages_per_s_per_vcpu.round(), 50_000.0);
    assert_eq!((row.us_per_page.round(), row.cpu_us_per_page.round()), (10.0, 20.0));
    assert_eq!((row.threads, row.delay_us, row.p50_us), (2, 7, None));
    let auto = row.auto.expect("it was picked");
    assert_eq!((auto.best, auto.ratio_to_best), (Some(Delivery::Queue), Some(2.0)));
    assert_eq!((&*auto.picked, &*auto.why), ("queue", "a reason"));
    assert!(slow.row(None, &fast, Some(&fast)).auto.is_none(), "nobody picked it");
}
