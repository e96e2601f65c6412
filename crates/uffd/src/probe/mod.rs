//! What this host can do, found by doing it on tiny private mappings.
//!
//! Versions and feature bits are claims; a claim can be withheld by a privilege, a seccomp filter,
//! a kernel configuration or a bug. So every finding here is a small run of the real thing. No
//! check waits longer than a few seconds, and none leaves anything behind.

#[allow(unsafe_code)]
mod area;
mod faults;
mod lab;
#[allow(unsafe_code)]
mod others;
mod tracking;

use std::fmt;

use crate::{Features, OpenWay, Options};

/// What came of trying something.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Status {
    /// It was done, and did what it should.
    Works,
    /// It was tried, and failed.
    Missing {
        /// With what.
        reason: String,
    },
    /// It was not tried.
    Untested {
        /// What was lacking for that.
        reason: String,
    },
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("works"),
            Self::Missing { reason } => write!(f, "missing: {reason}"),
            Self::Untested { reason } => write!(f, "untested: {reason}"),
        }
    }
}

/// One thing tried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// A stable name, such as `missing.anonymous`.
    pub id: &'static str,
    /// What was tried, for people.
    pub what: &'static str,
    /// What came of it.
    pub status: Status,
}

/// Everything that was tried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The features the kernel claims, by the first way that opened; `None` when none did.
    pub features: Option<Features>,
    /// The first way that opened.
    pub opened_by: Option<OpenWay>,
    /// What was tried, in the order it was tried.
    pub findings: Vec<Finding>,
}

impl Probe {
    /// The finding of this name.
    pub fn find(&self, id: &str) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.id == id)
    }

    /// Whether what has this name was tried and works.
    pub fn works(&self, id: &str) -> bool {
        self.find(id).is_some_and(|finding| finding.status == Status::Works)
    }
}

/// Why a check did not succeed.
#[derive(Debug)]
enum Shortfall {
    Missing(String),
    Untested(String),
}

/// Whatever goes wrong while something is tried is the reason it does not work.
impl<E: std::error::Error> From<E> for Shortfall {
    fn from(error: E) -> Self {
        Self::Missing(error.to_string())
    }
}

type Check = fn() -> Result<(), Shortfall>;

fn missing<T>(reason: impl Into<String>) -> Result<T, Shortfall> {
    Err(Shortfall::Missing(reason.into()))
}

const CHECKS: &[(&str, &str, Check)] = &[
    ("open.device", "open /dev/userfaultfd", others::open_device),
    ("open.syscall", "userfaultfd(2) for all faults", others::open_syscall),
    ("open.user-mode-only", "userfaultfd(2) for user-mode faults", others::open_user_mode_only),
    ("missing.anonymous", "missing faults on anonymous memory", faults::missing_anonymous),
    ("missing.memfd", "missing faults on a memfd", faults::missing_memfd),
    ("missing.hugetlb-2m", "missing faults on 2 MiB huge pages", faults::missing_hugetlb),
    ("minor.memfd", "minor faults on a memfd, and CONTINUE", faults::minor_memfd),
    ("minor.hugetlb-2m", "minor faults on 2 MiB huge pages", faults::minor_hugetlb),
    ("kernel-faults", "a fault inside the kernel waits for its page", faults::kernel_fault),
    ("zeropage", "ZEROPAGE", faults::zeropage),
    ("dont-wake", "COPY without waking, and WAKE", faults::dont_wake),
    ("poison", "POISON, and COPY over it", faults::poison),
    ("move", "MOVE", faults::move_pages),
    ("sigbus", "a fault as an error instead of an event", faults::sigbus),
    ("thread-id", "fault events name the thread", faults::thread_id),
    ("exact-address", "fault events carry the exact address", faults::exact_address),
    ("wp.anonymous", "write protection of anonymous memory", tracking::wp_anonymous),
    ("wp.memfd", "write protection of a memfd", tracking::wp_memfd),
    ("wp.hugetlb-2m", "write protection of 2 MiB huge pages", tracking::wp_hugetlb),
    ("wp.unpopulated", "write protection of pages not there yet", tracking::wp_unpopulated),
    ("wp.async", "asynchronous write protection, harvested", tracking::wp_async),
    ("pagemap", "read /proc/self/pagemap", tracking::pagemap),
    ("pagemap-scan", "PAGEMAP_SCAN", tracking::pagemap_scan),
    ("soft-dirty", "soft-dirty bits", tracking::soft_dirty),
    ("event.remove", "an event when pages are discarded", others::event_remove),
    ("event.remap", "an event when memory is moved", others::event_remap),
    ("event.unmap", "an event when memory is unmapped", others::event_unmap),
    ("event.fork", "an event when the process forks", others::event_fork),
];

/// Tries everything. Takes some milliseconds, and a few seconds for each thing that is broken so
/// that it never answers.
///
/// Nothing outside the mappings and descriptors made here is changed. The calling process should
/// not be short of file descriptors. It is forked once, for `event.fork`: the child ends at once and
/// is waited for. A process that should not be forked, because it is large, follows its forks by a
/// userfaultfd of its own or waits for children that it does not know, has another one probe.
pub fn probe() -> Probe {
    let opened = Options::new().open().map(|userfaultfd| userfaultfd.negotiated()).ok();
    let findings = CHECKS
        .iter()
        .map(|&(id, what, check)| {
            let status = match check() {
                Ok(()) => Status::Works,
                Err(Shortfall::Missing(reason)) => Status::Missing { reason },
                Err(Shortfall::Untested(reason)) => Status::Untested { reason },
            };
            Finding { id, what, status }
        })
        .collect();
    Probe {
        features: opened.map(|negotiated| negotiated.available),
        opened_by: opened.map(|negotiated| negotiated.opened_by),
        findings,
    }
}
