use clap::Parser;
use pageferry_kvm::probe::{Finding, Paging};

use super::*;
use crate::exit::{self, Exit};

#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    args: Args,
}

fn args(text: &str) -> Args {
    let words = std::iter::once("demo").chain(text.split_ascii_whitespace());
    Options::try_parse_from(words).unwrap_or_else(|error| panic!("{text}: {error}")).args
}

struct Fake {
    probe: Probe,
    kernel_faults: Result<bool, String>,
}

impl Host for Fake {
    fn kvm(&self) -> &Probe {
        &self.probe
    }

    fn kernel_faults(&self) -> Result<bool, String> {
        self.kernel_faults.clone()
    }
}

/// A host whose KVM can do what is named, and no more.
fn host(works: &[&'static str]) -> Fake {
    let finding = |id| {
        let status = if works.contains(&id) {
            Status::Works
        } else {
            Status::Missing { reason: "not on this host".to_owned() }
        };
        Finding { id, what: id, status, how: String::new() }
    };
    let findings = [probe::DEVICE, probe::RUNS, probe::POISON_EXITS, probe::TWO_DIMENSIONAL];
    let probe = Probe {
        findings: findings.into_iter().map(finding).collect(),
        paging: Paging::Unknown,
        dirty_ring_bytes: None,
        guest_memfd_flags: None,
    };
    Fake { probe, kernel_faults: Ok(true) }
}

const ALL: &[&str] = &[probe::DEVICE, probe::RUNS, probe::POISON_EXITS];

fn exit_of(failure: Failure) -> (Exit, String) {
    let text = failure.to_string();
    (exit::of_error(&failure.into()), text)
}

#[track_caller]
fn plan(text: &str, host: &Fake) -> Plan {
    let plan = Plan::new(&args(text), host);
    plan.unwrap_or_else(|failure| panic!("{text}: {failure}"))
}

#[track_caller]
fn refused(text: &str, host: &Fake, exit: Exit) -> String {
    let failure = Plan::new(&args(text), host).expect_err(text);
    let (found, why) = exit_of(failure);
    assert_eq!(found, exit, "{text}: {why}");
    why
}

#[test]
fn memory_and_set_up_follow_from_each_other() {
    use BackingName::*;
    use Setup::*;
    // Without --delivery auto: what that would be is measured.
    let cases = [
        ("--delivery queue", Anon, Missing),
        ("--delivery exit", Anon, Missing),
        ("--delivery hybrid", Memfd, MinorOwnView),
        ("--delivery hybrid --backing anon", Anon, Missing),
        ("--delivery hybrid --setup minor", Memfd, Minor),
        ("--delivery hybrid --backing hugetlb-1g", Hugetlb1g, MinorOwnView),
        ("--delivery queue --backing memfd", Memfd, Minor),
        ("--delivery queue --backing hugetlb-2m", Hugetlb2m, Minor),
        ("--delivery queue --backing hugetlb-2m --install copy", Hugetlb2m, Missing),
        ("--delivery queue --backing hugetlb-2m --setup missing", Hugetlb2m, Missing),
        ("--delivery queue --install move", Anon, Missing),
        ("--delivery queue --setup minor-own-view", Memfd, MinorOwnView),
        ("--setup no-queue", Memfd, NoQueue),
        ("--delivery exit --setup no-queue --backing hugetlb-2m", Hugetlb2m, NoQueue),
    ];
    for (options, backing, setup) in cases {
        for guest in ["", " --guest kvm"] {
            let plan = plan(&format!("{options}{guest}"), &host(ALL));
            assert_eq!((plan.backing, plan.kind), (backing, Kind::Kvm(setup)), "{options}");
        }
    }
}

#[test]
fn contradictions_are_refused_by_name() {
    let cases: [(&str, &[&str]); 12] = [
        ("--guest kvm --delivery signal", &["--delivery signal", "exit, hybrid"]),
        ("--guest threads --delivery exit", &["--delivery exit", "--guest kvm"]),
        ("--guest threads --delivery hybrid", &["--delivery hybrid", "--guest kvm"]),
        ("--guest threads --setup minor", &["--setup minor", "--guest kvm"]),
        ("--setup minor --backing anon", &["--setup minor", "memfd", "not anon"]),
        ("--setup no-queue --backing anon", &["--setup no-queue", "memfd"]),
        ("--setup missing --backing memfd", &["--setup missing", "memfd", "--setup minor"]),
        ("--setup no-queue --delivery queue", &["--setup no-queue", "--delivery exit"]),
        ("--setup no-queue --delivery hybrid", &["--setup no-queue", "--delivery hybrid"]),
        ("--setup minor --install copy", &["--install copy", "minor", "CONTINUE"]),
        ("--delivery exit --install move", &["--install move", "--delivery exit", "markers"]),
        ("--guest kvm --threads 65", &["--threads 65", "64 vCPUs"]),
    ];
    for (options, words) in cases {
        let why = refused(options, &host(ALL), Exit::Usage);
        for word in words {
            assert!(why.contains(word), "{options}: {word} is not in {why}");
        }
    }
}

#[test]
fn threads_are_the_guest_where_a_kvm_guest_cannot_be() {
    let no_device = host(&[]);
    // Options, host, and what the reason must say.
    let cases = [
        ("", &no_device, "not on this host"),
        ("--delivery queue --backing memfd", &no_device, "not on this host"),
        ("", &host(&[probe::DEVICE]), probe::RUNS),
        ("--delivery signal", &host(ALL), "SIGBUS"),
        ("--threads 100", &host(ALL), "64 vCPUs"),
        ("--backing memfd --install copy", &host(ALL), "CONTINUE"),
    ];
    for (options, host, word) in cases {
        let plan = plan(options, host);
        assert_eq!(plan.kind, Kind::Threads, "{options}");
        assert!(plan.guest_why.contains(word), "{options}: {}", plan.guest_why);
    }
    assert_eq!(plan("--guest threads", &host(ALL)).guest_why, "as asked");
    for options in ["--guest kvm", "--delivery exit", "--setup minor"] {
        let why = refused(options, &no_device, Exit::MissingCapability);
        assert!(why.contains("not on this host"), "{options}: {why}");
    }
}

#[test]
fn exits_need_poison() {
    let no_poison = host(&[probe::DEVICE, probe::RUNS]);
    for options in ["--delivery exit", "--delivery hybrid", "--setup no-queue"] {
        let why = refused(options, &no_poison, Exit::MissingCapability);
        assert!(why.contains(probe::POISON_EXITS), "{options}: {why}");
    }
    let plan = plan("--guest kvm", &no_poison);
    assert!(!plan.delivery.exits());
    let why = plan.delivery_why.expect("chosen here");
    assert!(why.contains(probe::POISON_EXITS), "{why}");
}

#[test]
fn exits_need_no_faults_of_the_kernel() {
    let user_only = Fake { kernel_faults: Ok(false), ..host(ALL) };
    let cases = [
        ("", Delivery::Exit),
        ("--setup minor", Delivery::Exit),
        ("--setup no-queue", Delivery::Exit),
        ("--delivery exit", Delivery::Exit),
    ];
    for (options, delivery) in cases {
        let plan = plan(options, &user_only);
        assert_eq!(plan.delivery, delivery, "{options}");
        assert!(matches!(plan.kind, Kind::Kvm(_)), "{options}");
    }
    for options in ["--setup minor-own-view", "--delivery hybrid"] {
        assert!(matches!(plan(options, &user_only).delivery, Delivery::Hybrid(_)), "{options}");
    }
    for delivery in ["queue", "queue-n", "by-thread", "by-cpu", "sharded"] {
        let options = format!("--guest kvm --delivery {delivery}");
        let why = refused(&options, &user_only, Exit::MissingCapability);
        assert!(why.contains("rules out queues"), "{why}");
        // Threads can have it.
        assert_eq!(plan(&format!("--delivery {delivery}"), &user_only).kind, Kind::Threads);
    }
    let neither = Fake { kernel_faults: Ok(false), ..host(&[probe::DEVICE, probe::RUNS]) };
    assert_eq!(plan("", &neither).kind, Kind::Threads);
}

#[test]
fn move_and_markers_do_not_go_together() {
    let plan = plan("--guest kvm --install move", &host(ALL));
    assert!(!plan.delivery.exits());
    assert!(plan.delivery_why.expect("chosen here").contains("markers"));
}
