//! What the library's own probe finds, with what each thing missing costs.

use std::{fs, path::Path};

use pageferry::uffd::{
    OpenWay,
    probe::{self, Status},
};

use super::finding::{Finding, Group};

const GROUP: Group = Group::Userfaultfd;

pub(super) fn findings() -> Vec<Finding> {
    let probe = probe::probe();
    let host = Host::of(&probe);
    let mut findings = vec![opened(&probe, &host)];
    findings.extend(probe.findings.iter().map(|found| {
        let finding = match &found.status {
            Status::Works => return Finding::works(GROUP, found.id, found.what),
            Status::Untested { reason } => {
                return Finding::untested(GROUP, found.id, found.what, reason);
            }
            Status::Missing { reason } => Finding::missing(GROUP, found.id, found.what, reason),
        };
        match advice(found.id) {
            Some(advice) => finding.costs(advice.costs).remedy(host.remedy(found.id, &advice)),
            None => finding,
        }
    }));
    findings
}

/// What decides how something missing can be had.
#[derive(Clone, Debug)]
struct Host {
    /// That no userfaultfd opens, and how one would.
    denied: Option<&'static str>,
    /// userfaultfd(2) is denied by a filter, whatever the privileges.
    filtered: bool,
    /// Major and minor, if known.
    version: Option<(u32, u32)>,
}

impl Host {
    fn of(probe: &probe::Probe) -> Self {
        // "Seccomp: 2" is a filter (proc_pid_status(5)).
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let filter = status
            .lines()
            .any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2"));
        // Linux 5.2 and 6.1 brought them, each only with CONFIG_USERFAULTFD.
        let known = ["/proc/sys/vm/unprivileged_userfaultfd", "/dev/userfaultfd"]
            .iter()
            .any(|path| Path::new(path).exists());
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        // The kernel itself lets everybody have one for faults in user mode.
        let filtered = known && filter && !probe.works("open.user-mode-only");
        let denied = probe.opened_by.is_none().then_some(match (known, filtered) {
            (false, _) => KERNEL,
            (true, true) => FILTER,
            (true, false) => ALL_FAULTS,
        });
        Self { denied, filtered, version: version(&release) }
    }

    fn remedy(&self, id: &str, advice: &Advice) -> String {
        let by_device = id == "open.device";
        let by_call = matches!(id, "open.syscall" | "open.user-mode-only");
        let other = matches!(id, "pagemap" | "pagemap-scan" | "soft-dirty");
        if by_call && self.filtered {
            return FILTER.to_owned();
        }
        if let Some(how) = self.denied
            && !(by_device || other)
        {
            return how.to_owned();
        }
        let since =
            advice.since.filter(|since| self.version.is_none_or(|version| version < *since));
        match (since, advice.needs) {
            (Some((major, minor)), "") => format!("Linux {major}.{minor} or later"),
            (Some((major, minor)), needs) => format!("Linux {major}.{minor} or later, and {needs}"),
            (None, "") => "a kernel built with it: by its version this one should have it".into(),
            (None, needs) => needs.to_owned(),
        }
    }
}

/// Of a release such as `6.18.44-generic`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// By which way a userfaultfd opens, and what the kernel then offers.
fn opened(probe: &probe::Probe, host: &Host) -> Finding {
    let (id, what) = ("userfaultfd", "userfaultfd");
    let (Some(way), Some(features)) = (probe.opened_by, probe.features) else {
        return Finding::missing(GROUP, id, what, "no way of opening one works")
            .costs("no memory can arrive on demand")
            .remedy(host.denied.unwrap_or(KERNEL));
    };
    let way = match way {
        OpenWay::DeviceNode => "by /dev/userfaultfd",
        OpenWay::Syscall => "by userfaultfd(2)",
        OpenWay::SyscallUserModeOnly => "by userfaultfd(2), user-mode faults only",
    };
    Finding::works(GROUP, id, what).detail(format!("{way}, features {:#x}", features.bits()))
}

const KERNEL: &str = "a kernel with CONFIG_USERFAULTFD";

const FILTER: &str = "a sandbox that allows userfaultfd(2): a seccomp filter denies it (for a \
                      container, give it a profile of its own); or as root: chmod or chgrp \
                      /dev/userfaultfd (Linux 6.1 and later)";

const ALL_FAULTS: &str = "as root: chmod or chgrp /dev/userfaultfd (Linux 6.1 and later), or \
                          sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE";

/// About something that is missing.
struct Advice {
    /// What that costs.
    costs: &'static str,
    /// The version of Linux that brought it.
    since: Option<(u32, u32)>,
    /// What it takes besides; may be empty.
    needs: &'static str,
}

fn advice(id: &str) -> Option<Advice> {
    let advice = |costs, since, needs| Some(Advice { costs, since, needs });
    let since = |major, minor| Some((major, minor));
    match id {
        "open.device" => advice("nothing, where one of the system calls works", None, ALL_FAULTS),
        "open.syscall" => advice("nothing, where the device node works", None, ALL_FAULTS),
        "open.user-mode-only" => {
            advice("nothing, where another way works", since(5, 11), "no seccomp filter")
        }
        "kernel-faults" => advice(
            "no KVM guests by queue, and read(2) into absent memory fails: only a process's own \
             accesses are served",
            None,
            ALL_FAULTS,
        ),
        "missing.anonymous" => advice("no memory can arrive on demand", None, KERNEL),
        "missing.memfd" => advice("memfd memory cannot be served", since(4, 11), ""),
        "missing.hugetlb-2m" => advice("hugetlb memory cannot be served", since(4, 11), ""),
        "minor.memfd" => advice(
            "no installing by CONTINUE: bytes are copied once more for every page of a memfd",
            since(5, 14),
            MINOR,
        ),
        "minor.hugetlb-2m" => advice(
            "no installing by CONTINUE: bytes are copied once more for every huge page",
            since(5, 13),
            MINOR,
        ),
        "zeropage" => advice("zero pages are copied like any other", since(4, 3), ""),
        "dont-wake" => advice("every install wakes, also where nobody waits", since(4, 3), ""),
        "poison" => advice(
            "a page that cannot come stops the thread that touches it for good, instead of \
             failing it; no vCPU exits",
            since(6, 6),
            "",
        ),
        "move" => advice("installs of anonymous memory copy every page", since(6, 8), ""),
        "sigbus" => advice("no delivery by signal", since(4, 14), ""),
        "thread-id" => advice("no delivery by thread or by CPU", since(4, 14), ""),
        "exact-address" => advice("faults are known to the page only", since(5, 18), ""),
        "wp.anonymous" => advice("no write tracking by userfaultfd", since(5, 7), PROTECTION),
        "wp.memfd" => advice("no write tracking of shared memory", since(5, 19), MARKERS),
        "wp.hugetlb-2m" => advice("no write tracking of huge pages", since(5, 19), MARKERS),
        "wp.unpopulated" => {
            advice("pages have to be present before their writes are tracked", since(6, 4), MARKERS)
        }
        "wp.async" => advice(
            "every first write to a tracked page waits for the tracker",
            since(6, 7),
            MARKERS,
        ),
        "pagemap" => advice("no write tracking", None, PROC),
        "pagemap-scan" => advice(
            "written pages cannot be collected and protected again in one step: no tracking by \
             asynchronous write protection",
            since(6, 7),
            PROC,
        ),
        "soft-dirty" => advice(
            "processes cannot be tracked without preparing them",
            None,
            "a kernel with CONFIG_MEM_SOFT_DIRTY",
        ),
        "event.remove" => advice(
            "memory that the guest discards (a balloon) would come back with its old contents",
            since(4, 11),
            "",
        ),
        "event.remap" => advice("memory that moves is no longer served", since(4, 11), ""),
        "event.unmap" => advice("unmapped memory is found out only on install", since(4, 11), ""),
        "event.fork" => advice(
            "memory of a process that forks is not served in its child",
            since(4, 11),
            "CAP_SYS_PTRACE",
        ),
        _ => None,
    }
}

const MINOR: &str = "a kernel with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR (x86-64 or arm64)";
const PROTECTION: &str = "a kernel with CONFIG_HAVE_ARCH_USERFAULTFD_WP (x86-64 or arm64)";
const MARKERS: &str = "a kernel with CONFIG_PTE_MARKER_UFFD_WP (x86-64 or arm64)";
const PROC: &str = "/proc mounted, and readable for this process";

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

    #[test]
    fn a_remedy_is_for_the_reason() {
        let open = Host { denied: None, filtered: false, version: Some((5, 10)) };
        let new = Host { version: Some((6, 18)), ..open.clone() };
        let unknown = Host { version: None, ..open.clone() };
        let filtered = Host { denied: Some(FILTER), filtered: true, ..new.clone() };
        // Only the device node opens.
        let device = Host { filtered: true, ..new.clone() };
        let sysctl = Host { denied: Some(ALL_FAULTS), ..open.clone() };
        let without = Host { denied: Some(KERNEL), ..new.clone() };
        for (host, id, remedy) in [
            (&open, "poison", "Linux 6.6 or later"),
            (&open, "sigbus", "a kernel built with it: by its version this one should have it"),
            (&open, "event.fork", "CAP_SYS_PTRACE"),
            (&open, "open.user-mode-only", "Linux 5.11 or later, and no seccomp filter"),
            (&new, "poison", "a kernel built with it: by its version this one should have it"),
            (&new, "minor.memfd", MINOR),
            (&new, "kernel-faults", ALL_FAULTS),
            (&unknown, "poison", "Linux 6.6 or later"),
            (&filtered, "poison", FILTER),
            (&filtered, "missing.anonymous", FILTER),
            (&filtered, "event.fork", FILTER),
            (&filtered, "open.syscall", FILTER),
            (&filtered, "open.device", ALL_FAULTS),
            (&filtered, "pagemap", PROC),
            (&filtered, "soft-dirty", "a kernel with CONFIG_MEM_SOFT_DIRTY"),
            (&device, "open.user-mode-only", FILTER),
            (&device, "poison", "a kernel built with it: by its version this one should have it"),
            (&sysctl, "poison", ALL_FAULTS),
            (
                &sysctl,
                "pagemap-scan",
                "Linux 6.7 or later, and /proc mounted, and readable for \
                                       this process",
            ),
            (&without, "zeropage", KERNEL),
        ] {
            let found = host.remedy(id, &advice(id).expect("advice"));
            assert_eq!(found, remedy, "{id} on {host:?}");
        }
    }

    #[test]
    fn versions_of_releases() {
        for (release, expected) in [
            ("6.18.44-fc-v669", Some((6, 18))),
            ("5.10", Some((5, 10))),
            ("7.0-rc1", Some((7, 0))),
            ("next", None),
            ("", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
