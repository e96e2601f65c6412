//! What the library's own probe finds, with what each thing missing costs.

use pageferry::uffd::{
    OpenWay,
    probe::{self, Status},
};

use super::finding::{Finding, Group};

const GROUP: Group = Group::Userfaultfd;

pub(super) fn findings() -> Vec<Finding> {
    let probe = probe::probe();
    let mut findings = vec![opened(&probe)];
    findings.extend(probe.findings.iter().map(|found| {
        let finding = match &found.status {
            Status::Works => return Finding::works(GROUP, found.id, found.what),
            Status::Untested { reason } => {
                return Finding::untested(GROUP, found.id, found.what, reason);
            }
            Status::Missing { reason } => Finding::missing(GROUP, found.id, found.what, reason),
        };
        match advice(found.id) {
            Some((costs, remedy)) => finding.costs(costs).remedy(remedy),
            None => finding,
        }
    }));
    findings
}

/// By which way a userfaultfd opens, and what the kernel then offers.
fn opened(probe: &probe::Probe) -> Finding {
    let (id, what) = ("userfaultfd", "userfaultfd");
    let (Some(way), Some(features)) = (probe.opened_by, probe.features) else {
        return Finding::missing(GROUP, id, what, "no way of opening one works")
            .costs("no memory can arrive on demand")
            .remedy(
                "a kernel with CONFIG_USERFAULTFD, and a sandbox (seccomp) that allows \
                 userfaultfd(2)",
            );
    };
    let way = match way {
        OpenWay::DeviceNode => "by /dev/userfaultfd",
        OpenWay::Syscall => "by userfaultfd(2)",
        OpenWay::SyscallUserModeOnly => "by userfaultfd(2), user-mode faults only",
    };
    Finding::works(GROUP, id, what).detail(format!("{way}, features {:#x}", features.bits()))
}

const ALL_FAULTS: &str = "as root: chmod or chgrp /dev/userfaultfd (Linux 6.1 and later), or \
                          sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE";

/// What it costs that the finding `id` is missing, and how to get it.
fn advice(id: &str) -> Option<(&'static str, &'static str)> {
    Some(match id {
        "open.device" => ("nothing, where one of the system calls works", ALL_FAULTS),
        "open.syscall" => ("nothing, where the device node works", ALL_FAULTS),
        "open.user-mode-only" => {
            ("nothing, where another way works", "Linux 5.11 or later, and no seccomp filter")
        }
        "kernel-faults" => (
            "no KVM guests by queue, and read(2) into absent memory fails: only a process's own \
             accesses are served",
            ALL_FAULTS,
        ),
        "missing.anonymous" => {
            ("no memory can arrive on demand", "a kernel with CONFIG_USERFAULTFD")
        }
        "missing.memfd" => ("memfd memory cannot be served", "Linux 4.11 or later"),
        "missing.hugetlb-2m" => ("hugetlb memory cannot be served", "Linux 4.11 or later"),
        "minor.memfd" => (
            "no installing by CONTINUE: bytes are copied once more for every page of a memfd",
            "Linux 5.14 or later",
        ),
        "minor.hugetlb-2m" => (
            "no installing by CONTINUE: bytes are copied once more for every huge page",
            "Linux 5.13 or later, with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
        ),
        "zeropage" => ("zero pages are copied like any other", "Linux 4.3 or later"),
        "dont-wake" => ("every install wakes, also where nobody waits", "Linux 4.3 or later"),
        "poison" => (
            "a page that cannot come stops the thread that touches it for good, instead of \
             failing it; no vCPU exits",
            "Linux 6.6 or later",
        ),
        "move" => ("installs of anonymous memory copy every page", "Linux 6.8 or later"),
        "sigbus" => ("no delivery by signal", "Linux 4.14 or later"),
        "thread-id" => ("no delivery by thread or by CPU", "Linux 4.14 or later"),
        "exact-address" => ("faults are known to the page only", "Linux 5.18 or later"),
        "wp.anonymous" => {
            ("no write tracking by userfaultfd", "Linux 5.7 or later, x86-64 or arm64")
        }
        "wp.memfd" => ("no write tracking of shared memory", "Linux 5.19 or later"),
        "wp.unpopulated" => {
            ("pages have to be present before their writes are tracked", "Linux 6.4 or later")
        }
        "wp.async" => (
            "every first write to a tracked page waits for the tracker; no PAGEMAP_SCAN",
            "Linux 6.7 or later",
        ),
        "pagemap" => ("no write tracking", "/proc mounted, and readable for this process"),
        "soft-dirty" => (
            "processes cannot be tracked without preparing them",
            "a kernel with CONFIG_MEM_SOFT_DIRTY",
        ),
        "event.remove" => (
            "memory that the guest discards (a balloon) would come back with its old contents",
            "Linux 4.11 or later",
        ),
        "event.remap" => ("memory that moves is no longer served", "Linux 4.11 or later"),
        "event.unmap" => ("unmapped memory is found out only on install", "Linux 4.11 or later"),
        "event.fork" => (
            "memory of a process that forks is not served in its child",
            "Linux 4.11 or later, and CAP_SYS_PTRACE",
        ),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_probed_has_advice() {
        let without: Vec<String> = findings()
            .into_iter()
            .skip(1)
            .map(|f| f.id)
            .filter(|id| advice(id).is_none())
            .collect();
        assert!(without.is_empty(), "no advice for {without:?}");
    }
}
