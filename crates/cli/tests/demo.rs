//! `pageferry demo` as a script sees it: what it prints, how it ends, and what it leaves. Where it
//! matters what the guest is, it is threads here.

mod common;
#[path = "common/nobody.rs"]
mod nobody;

use std::{
    fs,
    os::unix::process::CommandExt as _,
    process::{Command, Output},
};

use common::{
    Process, Running, expect_code,
    host::{
        HUGE_PAGES, has_userfaultfd, huge_pages, huge_pages_are_idle, huge_pages_available,
        huge_pages_total, is_root,
    },
    json, pageferry, run, text, wait_for, words,
};
use nobody::{ForNobody, deprived, nobody_can_open};
use rustix::process::Signal;

const DELIVERIES: [&str; 7] =
    ["auto", "queue", "queue-n", "by-thread", "by-cpu", "sharded", "signal"];
const PREFETCHES: [&str; 3] = ["none", "sweep", "around:64KiB"];
/// A guest that is not done for a long time, as every page takes a fifth of a second, and nobody
/// brings pages but the guest.
const LONG: &str = "demo --json --guest threads --prefetch none --delay-us 200000";

fn demo(args: &str) -> Command {
    pageferry(["--json", "demo"].into_iter().chain(words(args)))
}

/// Checks the report of a run that moved `bytes`; returns the install it used.
#[track_caller]
fn check(output: &Output, bytes: u64) -> serde_json::Value {
    expect_code(output, 0);
    assert_eq!(text(output), "", "nothing but the report, with --json");
    let report = json(output);
    let number =
        |field: &str| report[field].as_f64().unwrap_or_else(|| panic!("{field}: {report}"));
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(report["pages"], bytes / 4096);
    assert_eq!(report["bytes"], bytes);
    assert!(number("seconds") > 0.0);
    assert!(report["faults"].is_u64());
    assert!(number("p50_us") <= number("p99_us") && number("p99_us") <= number("max_us"));
    assert_eq!(report["wrong_pages"], 0);
    assert_eq!(report["guest_wrong_reads"], 0);
    report
}

/// Every delivery with every prefetch, on one backing.
fn matrix(backing: &str, install: &str) {
    for delivery in DELIVERIES {
        for prefetch in PREFETCHES {
            let args = format!(
                "--guest threads --memory 16MiB --delivery {delivery} --backing {backing} --prefetch {prefetch}"
            );
            let report = check(&run(&mut demo(&args)), 16 << 20);
            let chosen = report["delivery"].as_str().expect("a delivery");
            match delivery {
                "auto" => assert!(!chosen.starts_with("auto"), "{args}: {chosen}"),
                _ => assert!(chosen.starts_with(delivery), "{args}: {chosen}"),
            }
            assert_eq!(report["install"], install, "{args}");
            if prefetch == "none" {
                // Nobody else can have brought the first page.
                assert!(report["faults"].as_u64() > Some(0), "{args}");
                assert!(report["max_us"].as_f64() > Some(0.0), "{args}");
                assert_eq!(report["counts"]["prefetched"], 0, "{args}");
            }
        }
    }
}

#[test]
fn every_delivery_and_prefetch_on_anonymous_memory() {
    if has_userfaultfd() {
        matrix("anon", "copy");
    }
}

#[test]
fn every_delivery_and_prefetch_on_a_memfd() {
    if has_userfaultfd() {
        matrix("memfd", "continue");
    }
}

#[test]
fn every_delivery_and_prefetch_on_huge_pages() {
    let _alone = HUGE_PAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if has_userfaultfd() && huge_pages(8) {
        matrix("hugetlb-2m", "continue");
    }
}

#[test]
fn every_install_that_a_backing_takes() {
    if !has_userfaultfd() {
        return;
    }
    for (backing, install) in
        [("anon", "copy"), ("anon", "move"), ("memfd", "copy"), ("memfd", "continue")]
    {
        for delivery in ["queue", "signal"] {
            let args = format!(
                "--guest threads --memory 16MiB --backing {backing} --install {install} --delivery {delivery}"
            );
            let report = check(&run(&mut demo(&args)), 16 << 20);
            assert_eq!(report["install"], install, "{args}");
        }
    }
}

#[test]
fn every_workload_and_any_number_of_threads() {
    if !has_userfaultfd() {
        return;
    }
    for workload in ["mixed", "random", "sequential", "zipf"] {
        for threads in [1, 33] {
            let args = format!(
                "--guest threads --memory 5MiB --workload {workload} --threads {threads} --seed 7"
            );
            let report = check(&run(&mut demo(&args)), 5 << 20);
            assert_eq!(report["workload"], workload);
            assert_eq!(report["threads"], threads);
        }
    }
}

#[test]
fn the_report_for_people_says_the_same() {
    if !has_userfaultfd() {
        return;
    }
    let output = run(&mut pageferry(words("demo --guest threads --memory 4MiB")));
    expect_code(&output, 0);
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(report.contains("all 1024 pages are right"), "{report}");
    for word in ["delivery", "install", "p50 us", "p99 us", "max us", "fault, seen by guest"] {
        assert!(report.contains(word), "{word}: {report}");
    }
}

#[test]
fn memory_is_rounded_up_to_whole_pages() {
    if !has_userfaultfd() {
        return;
    }
    check(&run(&mut demo("--memory 5000")), 8192);
    let output = run(&mut pageferry(words("demo --memory 5000")));
    expect_code(&output, 0);
    assert!(text(&output).contains("rounded up to 8 KiB"), "{}", text(&output));
}

#[test]
fn wrong_options_are_2_and_say_what_is_right() {
    // What the message must say for the user to get it right.
    let cases: [(&str, &[&str]); 11] = [
        ("--memory lots", &["--memory", "512MiB for example"]),
        ("--memory 4MB", &["no unit", "MiB"]),
        ("--memory 99999999TiB", &["too large"]),
        ("--threads 0", &["--threads"]),
        ("--delivery pigeon", &["--delivery", "queue", "by-thread", "signal"]),
        ("--install steal", &["--install", "copy", "continue", "move"]),
        ("--backing paper", &["--backing", "anon", "memfd", "hugetlb-2m"]),
        ("--prefetch some", &["none", "sweep", "around:SIZE"]),
        ("--prefetch around:5000", &["power of two"]),
        ("--workload hard", &["--workload", "zipf"]),
        ("--delay-us soon", &["--delay-us"]),
    ];
    for (args, expected) in cases {
        let output = run(&mut pageferry(["demo"].into_iter().chain(words(args))));
        expect_code(&output, 2);
        assert!(output.stdout.is_empty(), "{args}");
        for word in expected {
            assert!(text(&output).contains(word), "{args}: {word} is not in {}", text(&output));
        }
    }
}

#[test]
fn an_install_that_the_backing_does_not_take_is_2() {
    if !has_userfaultfd() {
        return;
    }
    let cases = [
        ("--install move --backing memfd", "MOVE moves pages of anonymous memory, not of memfd"),
        ("--install continue --backing anon", "CONTINUE"),
    ];
    for (args, expected) in cases {
        let output = run(&mut demo(&format!("--guest threads --memory 4MiB {args}")));
        expect_code(&output, 2);
        assert_eq!(json(&output)["exit_code"], 2, "{args}");
        let error = json(&output)["error"].as_str().expect("text").to_owned();
        assert!(error.contains(expected), "{args}: {error}");
        assert!(text(&output).contains(expected), "{args}: {}", text(&output));
    }
}

/// A run that goes on for long, once its guest waits for pages; and its source.
fn long_run(more: &str) -> (Running, Process) {
    long_run_of("16MiB", more)
}

fn long_run_of(memory: &str, more: &str) -> (Running, Process) {
    let args = words(LONG).chain(["--memory", memory]).chain(words(more));
    let mut command = pageferry(args);
    // A group of its own, as a shell gives every command.
    command.process_group(0);
    let mut running = Running::start(&mut command);
    let source = running.wait_child();
    running
        .wait_until("the guest", |pid| (Running::threads_named(pid, "guest-") > 0).then_some(()));
    (running, source)
}

/// A run whose guest is done, and that verifies: most pages are still absent then.
fn verifying_run(more: &str) -> (Running, Process) {
    let args = "demo --json --guest threads --memory 4MiB --threads 64 --workload zipf --prefetch none \
                --delay-us 50000";
    let mut command = pageferry(words(args).chain(words(more)));
    command.process_group(0);
    let mut running = Running::start(&mut command);
    let source = running.wait_child();
    running.wait_until("the verification to miss a page", |pid| {
        Running::waits_for_page(pid, "verification").then_some(())
    });
    (running, source)
}

/// A run whose source is stopped before it serves; and that source.
fn starting_run() -> (Running, Process) {
    starting(pageferry(words("demo --json --memory 1GiB")).process_group(0))
}

fn starting(command: &mut Command) -> (Running, Process) {
    let mut running = Running::start(command);
    let source = running.wait_child();
    // All that it prepares for its end is in place once it has mapped the memory.
    wait_for("the source's memory", || (source.mapped_bytes() >= 1 << 30).then_some(()));
    source.signal(Signal::STOP);
    (running, source)
}

#[track_caller]
fn expect_source_lost(running: Running, expected: &str) {
    let output = running.end();
    expect_code(&output, 4);
    let report = json(&output);
    assert_eq!(report["exit_code"], 4);
    let error = report["error"].as_str().expect("text");
    assert!(error.contains(expected), "{error}");
    assert!(text(&output).contains(error), "{}", text(&output));
}

#[test]
fn a_source_that_is_killed_is_4() {
    if !has_userfaultfd() {
        return;
    }
    for delivery in DELIVERIES {
        for backing in ["anon", "memfd"] {
            let (running, source) = long_run(&format!("--delivery {delivery} --backing {backing}"));
            source.signal(Signal::KILL);
            expect_source_lost(running, "the source is lost after ");
            assert!(source.has_ended());
        }
    }
}

#[test]
fn a_source_that_is_told_to_stop_is_4() {
    if !has_userfaultfd() {
        return;
    }
    let (running, source) = long_run("");
    source.signal(Signal::TERM);
    expect_source_lost(running, "the source is lost after ");
    source.wait_ended();
}

#[test]
fn a_source_killed_while_pages_are_verified_is_4() {
    if !has_userfaultfd() {
        return;
    }
    for delivery in ["queue", "signal"] {
        let (running, source) = verifying_run(&format!("--delivery {delivery}"));
        source.signal(Signal::KILL);
        expect_source_lost(running, "");
    }
}

#[test]
fn a_source_killed_before_it_serves_is_4() {
    let (running, source) = starting_run();
    source.signal(Signal::KILL);
    expect_source_lost(running, "the source process ended before it served anything");
}

const SIGNALS: [(Signal, i32); 2] = [(Signal::INT, 130), (Signal::TERM, 143)];

#[track_caller]
fn expect_stopped(running: Running, source: &Process, code: i32) {
    let output = running.end();
    expect_code(&output, code);
    assert_eq!(json(&output)["exit_code"], code);
    assert!(source.has_ended(), "the source outlived the command");
}

#[test]
fn a_signal_stops_the_guest_and_the_source() {
    if !has_userfaultfd() {
        return;
    }
    for (signal, code) in SIGNALS {
        for delivery in ["queue", "signal"] {
            let (running, source) = long_run(&format!("--delivery {delivery}"));
            running.signal(signal);
            expect_stopped(running, &source, code);
        }
    }
}

/// Ctrl-C in a terminal reaches both processes: which of them ends first must not matter.
#[test]
fn a_signal_to_the_whole_process_group_is_no_lost_source() {
    if !has_userfaultfd() {
        return;
    }
    for (signal, code) in SIGNALS {
        let runs: [fn() -> (Running, Process); 3] = [
            || long_run(""),
            || verifying_run(""),
            || {
                let (running, source) = starting_run();
                source.signal(Signal::CONT);
                (running, source)
            },
        ];
        for start in runs {
            let (running, source) = start();
            running.signal_group(signal);
            expect_stopped(running, &source, code);
        }
    }
}

/// A source that does not answer, and does not end when it is told to.
#[test]
fn a_signal_stops_the_command_while_its_source_hangs() {
    let (running, source) = starting_run();
    running.signal(Signal::INT);
    expect_stopped(running, &source, 130);
    if !has_userfaultfd() {
        return;
    }
    for start in [long_run, verifying_run] {
        let (running, source) = start("");
        source.signal(Signal::STOP);
        running.signal(Signal::TERM);
        expect_stopped(running, &source, 143);
    }
}

#[test]
fn reserved_huge_pages_are_given_back_however_it_ends() {
    let _alone = HUGE_PAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // More than there are, so that it has to reserve some.
    let pages = huge_pages_available() + 8;
    if !has_userfaultfd() || !huge_pages(pages) || !huge_pages_are_idle() {
        return;
    }
    let before = huge_pages_total();
    let (memory, more) = (format!("{}MiB", 2 * pages), "--backing hugetlb-2m");
    let given_back = |how: &str| {
        wait_for(how, || (huge_pages_total() == before).then_some(()));
    };
    for (signal, code) in SIGNALS {
        let (running, source) = long_run_of(&memory, more);
        assert!(huge_pages_total() > before, "it reserved some");
        running.signal(signal);
        expect_stopped(running, &source, code);
        given_back("the huge pages after a signal");
    }
    let (running, source) = long_run_of(&memory, more);
    source.signal(Signal::KILL);
    expect_source_lost(running, "the source is lost after ");
    given_back("the huge pages after the source was lost");
    expect_code(&run(&mut demo(&format!("{more} --memory {memory}"))), 0);
    assert_eq!(huge_pages_total(), before);
}

#[test]
fn the_source_ends_with_a_command_that_is_killed() {
    // In this process's group: the kernel sends a hangup to stopped processes of a group that is
    // left behind, but this one is not.
    let (running, source) = starting(&mut pageferry(words("demo --json --memory 1GiB")));
    running.signal(Signal::KILL);
    source.wait_ended();
    if !has_userfaultfd() {
        return;
    }
    let (running, source) = long_run("");
    running.signal(Signal::KILL);
    source.wait_ended();
}

#[test]
fn it_needs_no_root() {
    if !has_userfaultfd() {
        return;
    }
    let nobody = ForNobody::new();
    for delivery in DELIVERIES {
        for backing in ["anon", "memfd"] {
            let args = format!("--memory 16MiB --delivery {delivery} --backing {backing}");
            let args = format!("--json demo {args}");
            let report = check(&run(&mut nobody.command(words(&args))), 16 << 20);
            let privileged = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
                .is_ok_and(|text| text.trim() == "0");
            if is_root() && privileged && !nobody_can_open("/dev/userfaultfd") {
                let way = "userfaultfd(2) for user-mode faults only";
                assert_eq!(report["opened_by"], way, "{args}");
            }
        }
    }
}

#[test]
fn without_any_userfaultfd_it_is_3_and_says_what_to_do() {
    let nobody = ForNobody::new();
    let args = words("--json demo --memory 16MiB");
    let Some(mut command) = deprived(&nobody, args) else { return };
    let output = run(&mut command);
    expect_code(&output, 3);
    let error = json(&output)["error"].as_str().expect("text").to_owned();
    for word in ["vm.unprivileged_userfaultfd", "seccomp", "/dev/userfaultfd"] {
        assert!(error.contains(word), "{word} is not in {error}");
    }
    assert!(text(&output).contains(&error));
}

#[test]
fn huge_pages_that_cannot_be_had_are_3_and_the_text_says_how_to_get_them() {
    // More than tests reserve, so that who changes the pool meanwhile makes no difference.
    let nobody = ForNobody::new();
    let args = words("--json demo --backing hugetlb-2m --memory 2GiB");
    let output = run(&mut nobody.command(args));
    expect_code(&output, 3);
    let error = json(&output)["error"].as_str().expect("text").to_owned();
    assert!(error.contains("as root: echo N > /sys/kernel/mm/hugepages/"), "{error}");
}

#[test]
fn more_memory_than_the_host_has_is_refused_before_anything_is_done() {
    for args in ["--memory 16TiB", "--memory 16TiB --backing hugetlb-2m", "--memory 4096TiB"] {
        let output = run(&mut pageferry(words(&format!("--json demo {args}"))));
        expect_code(&output, 3);
        let error = json(&output)["error"].as_str().expect("text").to_owned();
        assert!(error.contains("this host has"), "{error}");
    }
    for args in ["--memory 0", "--threads 65535", "--threads 0"] {
        expect_code(&run(&mut pageferry(words(&format!("demo {args}")))), 2);
    }
}
