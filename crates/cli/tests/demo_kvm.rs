//! `pageferry demo` with a KVM guest, as a script sees it.

mod common;
#[allow(dead_code)] // This uses a part of it.
#[path = "common/nobody.rs"]
mod nobody;

use std::{os::unix::process::CommandExt as _, process::Command};

use common::{
    Process, Running, expect_code,
    host::{
        HUGE_PAGES, has_userfaultfd, huge_pages, huge_pages_are_idle, huge_pages_available,
        huge_pages_total, is_root,
    },
    json, pageferry, run, text, wait_for, words,
};
use nobody::{ForNobody, nobody_can_open};
use rustix::process::Signal;
use serde_json::Value;

const DELIVERIES: [&str; 8] =
    ["auto", "queue", "queue-n", "by-thread", "by-cpu", "sharded", "exit", "hybrid"];
const WORKLOADS: [&str; 4] = ["mixed", "random", "sequential", "zipf"];
/// A guest that is not done for a long time, as every page takes a fifth of a second, and nobody
/// brings pages but the guest.
const LONG: &str = "demo --json --guest kvm --prefetch none --delay-us 200000";

/// Whether this process can run KVM guests whose memory is paged.
fn has_kvm() -> bool {
    has("kvm-runs", "/dev/kvm") && has_userfaultfd()
}

/// Whether vCPUs leave KVM_RUN for missing pages.
fn has_exits() -> bool {
    has("kvm-poison-exits", "exits for missing pages")
}

fn has(finding: &str, what: &str) -> bool {
    let works = json(&run(&mut pageferry(["--json", "doctor"])))["findings"]
        .as_array()
        .expect("findings")
        .iter()
        .any(|f| f["id"] == finding && f["status"] == "works");
    if !works {
        println!("skipped: needs {what}");
    }
    works
}

fn is_by_exit(delivery: &str) -> bool {
    delivery.starts_with("exit") || delivery.starts_with("hybrid")
}

fn demo(args: &str) -> Command {
    pageferry(["--json", "demo"].into_iter().chain(words(args)))
}

/// Runs it and checks that `bytes` of memory were moved, that all is as it should be, and that every
/// fault is accounted for.
#[track_caller]
fn expect_good(command: &mut Command, bytes: u64) -> Value {
    let output = run(command);
    let args: Vec<_> = command.get_args().collect();
    expect_code(&output, 0);
    assert_eq!(text(&output), "", "nothing but the report, with --json");
    let report = json(&output);
    let number = |field: &Value| field.as_u64().unwrap_or_else(|| panic!("{args:?}: {report}"));
    assert_eq!(report["guest"], "kvm", "{args:?}: {report}");
    assert_eq!(report["verified"], true, "{args:?}: {report}");
    assert_eq!(report["pages"], bytes / 4096, "{args:?}");
    assert_eq!(report["bytes"], bytes, "{args:?}");
    assert_eq!(report["wrong_pages"], 0, "{args:?}");
    assert_eq!(report["guest_wrong_reads"], 0, "{args:?}");
    assert!(number(&report["guest_writes"]) > 0, "{args:?}: {report}");
    let why = report["why"].as_str().expect("text");
    for field in ["guest", "delivery"] {
        let chosen = report[field].as_str().expect("text");
        assert!(why.contains(&format!("{field} {chosen}: ")), "{args:?}: {why}");
    }

    let exits = &report["exits"];
    let kinds = ["poison", "mmio_reads", "mmio_writes", "fetches", "memory_faults"];
    let by_kind: u64 = kinds.iter().map(|kind| number(&exits[kind])).sum();
    assert_eq!(by_kind, number(&exits["total"]), "{args:?}: {exits}");
    let vcpus = report["vcpus"].as_array().expect("vCPUs");
    assert_eq!(vcpus.len() as u64, number(&report["threads"]), "{args:?}");
    let by_vcpu: u64 = vcpus.iter().map(|vcpu| number(&vcpu["exits"]["total"])).sum();
    assert_eq!(by_vcpu, by_kind, "{args:?}");
    let accesses: u64 = vcpus.iter().map(|vcpu| number(&vcpu["accesses"])).sum();
    assert_eq!(accesses, number(&report["guest_accesses"]), "{args:?}");

    let faults = number(&report["faults"]);
    if is_by_exit(report["delivery"].as_str().expect("text")) {
        assert_eq!(report["queue_faults"], 0, "{args:?}: {report}");
        assert!(by_kind >= faults, "{args:?}: {by_kind} exits, {faults} faults");
    } else {
        assert_eq!(by_kind, 0, "{args:?}: {exits}");
        assert_eq!(report["queue_faults"], faults, "{args:?}");
    }
    let micros = |field: &str| report[field].as_f64().expect("a number");
    assert!(micros("p50_us") <= micros("p99_us") && micros("p99_us") <= micros("max_us"));
    report
}

/// Every delivery that the set-up can have, with every workload, half of them with a sweep.
fn matrix(setup: &str, backings: &[&str]) {
    let exits = has_exits();
    for backing in backings {
        for (n, delivery) in DELIVERIES.into_iter().enumerate() {
            let by_exit = is_by_exit(delivery);
            if by_exit && !exits || setup == "no-queue" && !matches!(delivery, "auto" | "exit") {
                continue;
            }
            for (m, workload) in WORKLOADS.into_iter().enumerate() {
                let prefetch = ["none", "sweep"][(n + m) % 2];
                let args = format!(
                    "--guest kvm --memory 16MiB --delivery {delivery} --setup {setup} \
                     --workload {workload} --backing {backing} --prefetch {prefetch}"
                );
                let report = expect_good(&mut demo(&args), 16 << 20);
                assert_eq!(report["setup"], setup, "{args}");
                assert_eq!(report["workload"], workload, "{args}");
                let chosen = report["delivery"].as_str().expect("text");
                match delivery {
                    "auto" => assert_ne!(chosen, "auto", "{args}"),
                    _ => assert!(chosen.starts_with(delivery), "{args}: {chosen}"),
                }
                let install = if setup == "missing" { "copy" } else { "continue" };
                assert_eq!(report["install"], install, "{args}");
                if prefetch == "none" {
                    // Nobody else can have brought what the guest touched.
                    assert!(report["faults"].as_u64() > Some(0), "{args}: {report}");
                    assert!(report["max_us"].as_f64() > Some(0.0), "{args}: {report}");
                    assert_eq!(report["counts"]["prefetched"], 0, "{args}");
                }
            }
        }
    }
}

#[test]
fn every_delivery_and_workload_with_one_view() {
    if has_kvm() {
        matrix("missing", &["anon"]);
    }
}

#[test]
fn every_delivery_and_workload_with_minor_faults() {
    if has_kvm() {
        matrix("minor", &["memfd"]);
    }
}

#[test]
fn every_delivery_and_workload_with_a_view_of_kvms_own() {
    if has_kvm() && has_exits() {
        matrix("minor-own-view", &["memfd"]);
    }
}

#[test]
fn every_workload_without_a_queue() {
    if has_kvm() && has_exits() {
        matrix("no-queue", &["memfd"]);
    }
}

#[test]
fn every_set_up_on_huge_pages() {
    let _alone = HUGE_PAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !has_kvm() || !has_exits() || !huge_pages(8) {
        return;
    }
    for setup in ["missing", "minor", "minor-own-view", "no-queue"] {
        matrix(setup, &["hugetlb-2m"]);
    }
}

#[test]
fn any_number_of_vcpus_and_pages() {
    if !has_kvm() {
        return;
    }
    for (threads, memory) in [(1, 4096), (1, 5 << 20), (3, 8192), (64, 4096), (33, 5 << 20)] {
        for workload in WORKLOADS {
            let args = format!(
                "--guest kvm --threads {threads} --memory {memory} --workload {workload} --seed 7"
            );
            let report = expect_good(&mut demo(&args), memory);
            assert_eq!(report["threads"], threads, "{args}");
        }
    }
}

#[test]
fn pages_are_moved_where_there_are_no_markers() {
    if !has_kvm() {
        return;
    }
    for delivery in ["auto", "queue"] {
        let args = format!("--guest kvm --memory 16MiB --install move --delivery {delivery}");
        let report = expect_good(&mut demo(&args), 16 << 20);
        assert_eq!(report["install"], "move", "{args}");
    }
}

#[test]
fn it_is_what_the_demo_does_by_itself() {
    if !has_kvm() {
        return;
    }
    let report = expect_good(&mut demo("--memory 16MiB"), 16 << 20);
    assert_eq!(report["setup"], "missing");
    // What only threads can have makes the guest threads, and the report says so.
    for (options, word) in [("--delivery signal", "SIGBUS"), ("--threads 65", "64 vCPUs")] {
        let output = run(&mut demo(&format!("--memory 4MiB {options}")));
        expect_code(&output, 0);
        let report = json(&output);
        assert_eq!(report["verified"], true);
        assert_eq!(report["guest"], "threads", "{options}");
        assert!(report["exits"].is_null() && report["setup"].is_null(), "{report}");
        let why = report["why"].as_str().expect("text");
        assert!(why.contains("guest threads: ") && why.contains(word), "{options}: {why}");
    }
}

#[test]
fn the_report_for_people_says_the_same() {
    if !has_kvm() {
        return;
    }
    let output = run(&mut pageferry(words("demo --memory 4MiB --guest kvm --delivery queue")));
    expect_code(&output, 0);
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["all 1024 pages are right", "kvm (as asked)", "4 vCPUs", "missing", "by exit"] {
        assert!(report.contains(word), "{word}: {report}");
    }
    assert!(!report.contains("poison"), "no table of exits where there are none: {report}");
    if has_exits() {
        let args = "demo --memory 4MiB --delivery exit --prefetch none";
        let output = run(&mut pageferry(words(args)));
        expect_code(&output, 0);
        let report = String::from_utf8_lossy(&output.stdout).into_owned();
        for word in ["poison", "mmio", "fetch", "waited", "exit, in vCPU's thread"] {
            assert!(report.contains(word), "{word}: {report}");
        }
    }
}

#[test]
fn options_that_contradict_each_other_are_2_and_say_what_is_right() {
    // What the message must say for the user to get it right.
    let cases: [(&str, &[&str]); 8] = [
        ("--guest threads --delivery exit", &["--delivery exit", "--guest kvm"]),
        ("--guest threads --delivery hybrid", &["--delivery hybrid", "--guest kvm"]),
        ("--guest threads --setup minor", &["--setup minor", "--guest kvm"]),
        ("--guest kvm --delivery signal", &["--delivery signal", "exit, hybrid"]),
        ("--guest kvm --threads 65", &["--threads 65", "64 vCPUs"]),
        ("--setup minor --backing anon", &["--setup minor", "memfd"]),
        ("--setup no-queue --delivery queue", &["--setup no-queue", "--delivery exit"]),
        ("--setup some", &["missing", "minor", "minor-own-view", "no-queue"]),
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

/// A run that goes on for long, once its vCPUs run; and its source.
fn long_run(more: &str) -> (Running, Process) {
    let mut command = pageferry(words(LONG).chain(words(more)));
    // A group of its own, as a shell gives every command.
    command.process_group(0);
    let mut running = Running::start(&mut command);
    let source = running.wait_child();
    running.wait_until("the vCPUs", |pid| (Running::threads_named(pid, "vcpu ") > 0).then_some(()));
    (running, source)
}

/// A run whose guest is done, and that verifies: many pages are still absent then.
fn verifying_run(more: &str) -> (Running, Process) {
    let args = "demo --json --guest kvm --memory 4MiB --threads 64 --workload zipf \
                --prefetch none --delay-us 50000";
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
fn starting_run(more: &str) -> (Running, Process) {
    let args = words("demo --json --guest kvm --memory 1GiB").chain(words(more));
    let mut running = Running::start(pageferry(args).process_group(0));
    let source = running.wait_child();
    // All that it prepares for its end is in place once it has mapped the memory.
    wait_for("the source's memory", || (source.mapped_bytes() >= 1 << 30).then_some(()));
    source.signal(Signal::STOP);
    (running, source)
}

/// The deliveries that differ in where a vCPU waits.
fn deliveries() -> impl Iterator<Item = &'static str> {
    let exits = has_exits();
    ["queue", "sharded", "exit", "hybrid"].into_iter().filter(move |d| exits || !is_by_exit(d))
}

/// The set-ups with such a delivery.
fn set_ups(delivery: &str) -> impl Iterator<Item = &'static str> {
    let exit = delivery == "exit";
    ["missing", "minor", "minor-own-view", "no-queue"]
        .into_iter()
        .filter(move |setup| exit || *setup != "no-queue")
}

#[track_caller]
fn expect_source_lost(running: Running, expected: &str) {
    let output = running.end();
    expect_code(&output, 4);
    let report = json(&output);
    assert_eq!(report["exit_code"], 4);
    let error = report["error"].as_str().expect("text");
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_source_that_is_killed_is_4() {
    if !has_kvm() {
        return;
    }
    for delivery in deliveries() {
        for setup in set_ups(delivery) {
            let more = format!("--memory 16MiB --delivery {delivery} --setup {setup}");
            let (running, source) = long_run(&more);
            source.signal(Signal::KILL);
            expect_source_lost(running, "the source is lost after ");
            assert!(source.has_ended());
        }
        let (running, source) = verifying_run(&format!("--delivery {delivery}"));
        source.signal(Signal::KILL);
        expect_source_lost(running, "");
    }
    let (running, source) = starting_run("");
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
fn a_signal_stops_the_vcpus_and_the_source() {
    if !has_kvm() {
        return;
    }
    for (signal, code) in SIGNALS {
        for delivery in deliveries() {
            for setup in set_ups(delivery) {
                let more = format!("--memory 16MiB --delivery {delivery} --setup {setup}");
                let (running, source) = long_run(&more);
                running.signal(signal);
                expect_stopped(running, &source, code);
            }
        }
    }
}

#[test]
fn a_signal_stops_every_phase_also_when_the_source_hangs_or_gets_it_too() {
    if !has_kvm() {
        return;
    }
    type Start = fn(&str) -> (Running, Process);
    let phases: [Start; 3] = [
        |more| long_run(&format!("--memory 16MiB {more}")),
        verifying_run,
        |more| {
            let (running, source) = starting_run(more);
            source.signal(Signal::CONT);
            (running, source)
        },
    ];
    for delivery in deliveries() {
        let more = format!("--delivery {delivery}");
        for phase in phases {
            // As Ctrl-C in a terminal: to both, and which ends first must not matter.
            let (running, source) = phase(&more);
            running.signal_group(Signal::INT);
            expect_stopped(running, &source, 130);
            let (running, source) = phase(&more);
            source.signal(Signal::STOP);
            running.signal(Signal::TERM);
            expect_stopped(running, &source, 143);
        }
    }
}

#[test]
fn reserved_huge_pages_are_given_back_however_it_ends() {
    let _alone = HUGE_PAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // More than there are, so that it has to reserve some.
    let pages = huge_pages_available() + 8;
    if !has_kvm() || !huge_pages(pages) || !huge_pages_are_idle() {
        return;
    }
    let before = huge_pages_total();
    let given_back = |how: &str| wait_for(how, || (huge_pages_total() == before).then_some(()));
    for delivery in deliveries() {
        let more = format!("--memory {}MiB --backing hugetlb-2m --delivery {delivery}", 2 * pages);
        let (running, source) = long_run(&more);
        assert!(huge_pages_total() > before, "it reserved some");
        running.signal(Signal::TERM);
        expect_stopped(running, &source, 143);
        given_back("the huge pages after a signal");
        let (running, source) = long_run(&more);
        source.signal(Signal::KILL);
        expect_source_lost(running, "the source is lost after ");
        given_back("the huge pages after the source was lost");
        expect_good(&mut demo(&format!("--guest kvm {more}")), pages << 21);
        assert_eq!(huge_pages_total(), before);
    }
}

/// Somebody else is about to reserve huge pages: it waits for its turn, but not against the user's
/// will.
#[test]
fn a_signal_stops_the_wait_for_huge_pages() {
    let _alone = HUGE_PAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Ok(pool) = std::fs::File::open("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    else {
        println!("skipped: needs huge pages of 2 MiB");
        return;
    };
    rustix::fs::flock(&pool, rustix::fs::FlockOperation::LockExclusive).expect("a lock");
    for (signal, code) in SIGNALS {
        let mut running = Running::start(&mut demo("--backing hugetlb-2m --memory 2MiB"));
        running.wait_until("the pool", |pid| {
            let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
            files
                .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
                .find(|path| path.ends_with("nr_hugepages"))
        });
        running.signal(signal);
        let output = running.end();
        expect_code(&output, code);
    }
}

#[test]
fn without_kvm_the_guest_is_threads() {
    if !has_userfaultfd() {
        return;
    }
    if nobody_can_open("/dev/kvm") {
        println!("skipped: needs a user who may not open /dev/kvm");
        return;
    }
    let nobody = ForNobody::new();
    let output = run(&mut nobody.command(words("--json demo --memory 4MiB")));
    expect_code(&output, 0);
    let report = json(&output);
    assert_eq!((&report["guest"], &report["verified"]), (&"threads".into(), &true.into()));
    let why = report["why"].as_str().expect("text");
    assert!(why.contains("/dev/kvm"), "{why}");
    for options in ["--guest kvm", "--delivery exit", "--setup minor"] {
        let output =
            run(&mut nobody.command(words("--json demo --memory 4MiB").chain(words(options))));
        expect_code(&output, 3);
        let error = json(&output)["error"].as_str().expect("text").to_owned();
        assert!(error.contains("/dev/kvm"), "{options}: {error}");
    }
}

/// A shell that gives a user without privileges a /dev/kvm of their own, in a mount namespace of its
/// own, and runs its arguments as that user.
const WITH_KVM: &str = "mknod -m 666 \"$0\" c 10 232 && mount --bind \"$0\" /dev/kvm && \
     exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";

/// `program` with these arguments, run by [`WITH_KVM`].
fn with_kvm(folder: &tempfile::TempDir, program: &ForNobody, args: &str) -> Command {
    let unprivileged = program.command(words(args));
    let node = folder.path().join("kvm");
    // What is there of the last run.
    let _ = std::fs::remove_file(&node);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", WITH_KVM]).arg(node);
    command.arg(unprivileged.get_program()).args(unprivileged.get_args());
    command.current_dir("/").stdin(std::process::Stdio::null());
    command
}

/// A user who may use KVM, but whose userfaultfd sees no faults of the kernel.
#[test]
fn markers_need_no_faults_of_the_kernel() {
    if !has_kvm() || !has_exits() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let nobody = ForNobody::new();
    let doctor = run(&mut with_kvm(&folder, &nobody, "--json doctor"));
    let able = serde_json::from_slice::<Value>(&doctor.stdout).is_ok_and(|report| {
        let findings = report["findings"].as_array().cloned().unwrap_or_default();
        let is = |id: &str, status: &str| {
            findings.iter().any(|found| found["id"] == id && found["status"] == status)
        };
        is("kvm-runs", "works") && !is("kernel-faults", "works") && is("missing.anonymous", "works")
    });
    if !is_root() || !able {
        println!(
            "skipped: needs root, device nodes in temporary folders, and a host that gives \
             users no userfaultfd for kernel faults"
        );
        return;
    }
    let cases = [
        ("", "missing", "exit"),
        ("--setup minor", "minor", "exit"),
        ("--setup no-queue", "no-queue", "exit"),
        ("--setup minor-own-view", "minor-own-view", "hybrid"),
        ("--delivery hybrid", "minor-own-view", "hybrid"),
    ];
    for (options, setup, delivery) in cases {
        let args = format!("--json demo --memory 16MiB {options}");
        let report = expect_good(&mut with_kvm(&folder, &nobody, &args), 16 << 20);
        assert_eq!(report["setup"], setup, "{options}");
        let chosen = report["delivery"].as_str().expect("text");
        assert!(chosen.starts_with(delivery), "{options}: {chosen}");
        assert_eq!(report["opened_by"], "userfaultfd(2) for user-mode faults only");
    }
    let args = "--json demo --memory 4MiB --delivery queue";
    let report = json(&run(&mut with_kvm(&folder, &nobody, args)));
    assert_eq!(report["guest"], "threads", "{report}");
    let why = report["why"].as_str().expect("text");
    assert!(why.contains("rules out queues"), "{why}");
    let output = run(&mut with_kvm(&folder, &nobody, &format!("{args} --guest kvm")));
    expect_code(&output, 3);
}
