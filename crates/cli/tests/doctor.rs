//! `pageferry doctor`: that every line is there, and that it says what trying by hand says.

mod common;
#[path = "common/nobody.rs"]
mod nobody;

use std::{
    fs,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use common::{expect_code, json, pageferry, run};
use nobody::{ForNobody, deprived, nobody_can_open};
use serde_json::Value;

/// Lines that every host gets, whatever it can do.
const LINES: [&str; 35] = [
    "kernel",
    "cpus",
    "page-size",
    "memory",
    "thp-anon",
    "thp-shmem",
    "userfaultfd",
    "open.device",
    "open.syscall",
    "open.user-mode-only",
    "missing.anonymous",
    "missing.memfd",
    "missing.hugetlb-2m",
    "minor.memfd",
    "minor.hugetlb-2m",
    "kernel-faults",
    "zeropage",
    "dont-wake",
    "poison",
    "move",
    "sigbus",
    "thread-id",
    "exact-address",
    "wp.anonymous",
    "wp.memfd",
    "wp.hugetlb-2m",
    "wp.unpopulated",
    "wp.async",
    "pagemap",
    "pagemap-scan",
    "soft-dirty",
    "event.remove",
    "event.remap",
    "event.unmap",
    "event.fork",
];

/// And those of a host with /dev/kvm.
const KVM_LINES: [&str; 8] = [
    "kvm",
    "kvm-vendor",
    "kvm-two-dimensional",
    "kvm-runs",
    "kvm-memory-fault-info",
    "kvm-dirty-ring",
    "kvm-manual-protect",
    "kvm-guest-memfd",
];

#[track_caller]
/// One doctor at a time: it tries huge pages, and so changes what another one sees of their pool.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn finding<'a>(report: &'a Value, id: &str) -> &'a Value {
    let mut found = report["findings"]
        .as_array()
        .expect("findings")
        .iter()
        .filter(|finding| finding["id"] == id);
    let first = found.next().unwrap_or_else(|| panic!("{id} is not reported"));
    assert!(found.next().is_none(), "{id} is reported twice");
    first
}

#[track_caller]
fn status<'a>(report: &'a Value, id: &str) -> &'a str {
    finding(report, id)["status"].as_str().expect("a status")
}

#[track_caller]
fn detail<'a>(report: &'a Value, id: &str) -> &'a str {
    finding(report, id)["detail"].as_str().unwrap_or_default()
}

/// What holds of any report; what is missing says what that costs and how to get it.
fn check(report: &Value) {
    for id in LINES {
        finding(report, id);
    }
    if status(report, "kvm") == "works" {
        for id in KVM_LINES {
            finding(report, id);
        }
    }
    for finding in report["findings"].as_array().expect("findings") {
        let text = |field: &str| finding[field].as_str().unwrap_or_default();
        match text("status") {
            "missing" => {
                for field in ["detail", "costs", "remedy"] {
                    assert!(!text(field).is_empty(), "{field}: {finding}");
                }
            }
            "untested" | "fact" => assert!(!text("detail").is_empty(), "{finding}"),
            "works" => {}
            other => panic!("{other}: {finding}"),
        }
    }
    for pick in report["picks"].as_array().expect("picks") {
        for field in ["guest", "delivery", "why"] {
            assert!(pick[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {pick}");
        }
    }
}

fn huge_pages(size: &str) -> Option<(u64, u64, u64)> {
    let number = |file: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}/{file}_hugepages");
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    Some((number("nr")?, number("free")?, number("resv")?))
}

#[test]
fn it_says_what_the_host_says() {
    let _alone = alone();
    let pools = || ["2048kB", "1048576kB"].map(huge_pages);
    let before = pools();
    let output = run(&mut pageferry(["doctor", "--json"]));
    let after = pools();
    let report = json(&output);
    check(&report);

    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    assert!(detail(&report, "kernel").contains(release.trim()), "{}", detail(&report, "kernel"));
    let cpus = std::thread::available_parallelism().expect("a number").to_string();
    assert_eq!(detail(&report, "cpus"), cpus);
    let page = format!("{} KiB", rustix::param::page_size() / 1024);
    assert_eq!(detail(&report, "page-size"), page);
    for (id, file) in [("thp-anon", "enabled"), ("thp-shmem", "shmem_enabled")] {
        let path = Path::new("/sys/kernel/mm/transparent_hugepage").join(file);
        let setting = fs::read_to_string(path).unwrap_or_default();
        let chosen = setting.split(['[', ']']).nth(1).unwrap_or("No such file");
        assert!(detail(&report, id).contains(chosen), "{id}: {}", detail(&report, id));
        assert_ne!(status(&report, id), "fact", "{id} is tried");
    }

    for ((id, before), after) in ["hugetlb-2m", "hugetlb-1g"].iter().zip(before).zip(after) {
        let Some((total, free, promised)) = before else { continue };
        if Some((total, free, promised)) != after {
            println!("skipped: needs a pool of huge pages that nobody else uses");
            continue;
        }
        let counts = format!("{total} reserved, {free} free, {promised} promised");
        assert!(detail(&report, id).contains(&counts), "{id}: {}", detail(&report, id));
        assert_eq!(status(&report, id) == "works", free > promised, "{id}");
    }

    let opens = |path| fs::OpenOptions::new().read(true).write(true).open(path).is_ok();
    assert_eq!(status(&report, "open.device") == "works", opens("/dev/userfaultfd"));
    assert_eq!(status(&report, "kvm") == "works", opens("/dev/kvm"));
    if status(&report, "kvm") == "works" {
        let loaded: Vec<&str> = ["kvm_intel", "kvm_amd", "kvm_pvm"]
            .into_iter()
            .filter(|module| Path::new("/sys/module").join(module).is_dir())
            .collect();
        if !loaded.is_empty() {
            assert_eq!(detail(&report, "kvm-vendor"), loaded.join(", "));
        }
        let parameters = ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"];
        let two = parameters.iter().any(|parameter| {
            let value = fs::read_to_string(Path::new("/sys/module").join(parameter));
            value.is_ok_and(|value| ["Y", "1"].contains(&value.trim()))
        });
        assert_eq!(status(&report, "kvm-two-dimensional") == "works", two);
    }
    // A pick for every kind of guest that can be served, and none for others.
    let picks = report["picks"].as_array().expect("picks");
    let works = |id| status(&report, id) == "works";
    let kvm = works("kvm") && works("kvm-runs");
    let expected = match (works("missing.anonymous"), works("kernel-faults")) {
        (false, _) => 0,
        (true, false) => 1,
        (true, true) => 2 + usize::from(kvm),
    };
    assert_eq!(picks.len(), expected, "{picks:?}");
    expect_code(&output, if expected == 0 { 3 } else { 0 });
}

#[test]
fn it_leaves_nothing_behind() {
    let _alone = alone();
    let pools = || ["2048kB", "1048576kB"].map(huge_pages);
    let settings = || {
        ["/sys/kernel/mm/transparent_hugepage/enabled", "/proc/sys/vm/unprivileged_userfaultfd"]
            .map(|path| fs::read_to_string(path).ok())
    };
    let before = (pools(), settings());
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = pageferry(["doctor"]);
    run(command.current_dir(folder.path()));
    assert_eq!(fs::read_dir(folder.path()).expect("the folder").count(), 0);
    if before.0 != pools() {
        println!("skipped: needs a pool of huge pages that nobody else uses");
        return;
    }
    assert_eq!(before.1, settings());
}

#[test]
fn without_privileges_it_says_what_they_would_bring() {
    let _alone = alone();
    let nobody = ForNobody::new();
    let output = run(&mut nobody.command(["doctor", "--json"]));
    let report = json(&output);
    check(&report);
    for (path, id) in [("/dev/userfaultfd", "open.device"), ("/dev/kvm", "kvm")] {
        assert_eq!(status(&report, id) == "works", nobody_can_open(path), "{id}");
    }
    let anybody = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let denied = anybody.is_ok_and(|value| value.trim() == "0");
    if nobody_can_open("/dev/userfaultfd") || !denied {
        println!("skipped: needs a host that denies unprivileged users userfaultfd(2)");
        return;
    }
    assert_eq!(status(&report, "open.syscall"), "missing");
    assert_eq!(status(&report, "kernel-faults"), "missing");
    let remedy = finding(&report, "kernel-faults")["remedy"].as_str().expect("text");
    for way in ["/dev/userfaultfd", "vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE"] {
        assert!(remedy.contains(way), "{way} is not in {remedy}");
    }
    if status(&report, "open.user-mode-only") == "works" {
        expect_code(&output, 0);
        assert!(detail(&report, "userfaultfd").contains("user-mode faults only"));
        // What does not need the kernel's own faults works all the same.
        for id in ["missing.anonymous", "zeropage", "dont-wake"] {
            assert_eq!(status(&report, id), "works", "{id}");
        }
        assert_eq!(report["picks"].as_array().map(Vec::len), Some(1), "{}", report["picks"]);
    }
}

#[test]
fn without_any_userfaultfd_it_is_3_and_says_so() {
    let _alone = alone();
    let nobody = ForNobody::new();
    let Some(mut command) = deprived(&nobody, ["doctor", "--json"]) else { return };
    let output = run(&mut command);
    expect_code(&output, 3);
    let report = json(&output);
    check(&report);
    assert_eq!(report["picks"].as_array().map(Vec::len), Some(0));
    assert_eq!(status(&report, "userfaultfd"), "missing");
    let remedy = finding(&report, "userfaultfd")["remedy"].as_str().expect("text");
    assert!(remedy.contains("seccomp"), "{remedy}");
    // What needs no userfaultfd is found out all the same.
    assert_eq!(status(&report, "pagemap"), "works");
    let privileged = json(&run(&mut pageferry(["doctor", "--json"])));
    for id in ["pagemap-scan", "soft-dirty"] {
        assert_eq!(status(&report, id), status(&privileged, id), "{id}");
    }
    // For everything else the remedy is for the filter, not for an old kernel.
    for finding in report["findings"].as_array().expect("findings") {
        let text = |field: &str| finding[field].as_str().unwrap_or_default();
        let other = ["open.device", "pagemap", "pagemap-scan", "soft-dirty"];
        if text("group") != "userfaultfd"
            || text("status") != "missing"
            || other.contains(&text("id"))
        {
            continue;
        }
        assert!(text("remedy").contains("a seccomp filter denies it"), "{finding}");
        assert!(!text("costs").contains("PAGEMAP_SCAN"), "{finding}");
    }

    let Some(mut command) = deprived(&nobody, ["doctor"]) else { return };
    let output = run(&mut command);
    expect_code(&output, 3);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("No delivery would work"), "{text}");
}
