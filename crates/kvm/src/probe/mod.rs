//! What this host's KVM can do, found by running tiny virtual machines.
//!
//! Capabilities and module parameters are claims. What can be done in a few milliseconds is done;
//! each finding says how it was found, and why something is missing. Everything runs on a thread of
//! its own, with memory of its own; nothing of it is left behind, and nobody's signals are touched.

mod capabilities;
mod dirty;
#[allow(unsafe_code)]
mod machine;
mod measure;
mod paging;
mod poison;
mod registers;
mod runs;

use std::{fmt, io, sync::OnceLock};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

pub use pageferry_uffd::probe::Status;

pub use measure::{Measured, measure};
pub use paging::Paging;

/// The finding that /dev/kvm opens, and speaks a language that is known here.
pub const DEVICE: &str = "kvm";
/// The finding which module drives the processor.
pub const VENDOR: &str = "kvm-vendor";
/// The finding that stage 2 is a translation of its own (EPT, NPT).
pub const TWO_DIMENSIONAL: &str = "kvm-two-dimensional";
/// The finding that a guest runs.
pub const RUNS: &str = "kvm-runs";
/// The finding that a vCPU leaves KVM_RUN for a page with a marker.
pub const POISON_EXITS: &str = "kvm-poison-exits";
/// The finding that a guest's write of a register leaves KVM_RUN, and is completed when the register
/// has been set.
pub const REGISTER_EXITS: &str = "kvm-register-exits";
/// The finding that KVM says what it could not access.
pub const MEMORY_FAULT_INFO: &str = "kvm-memory-fault-info";
/// The finding that written pages come in a ring.
pub const DIRTY_RING: &str = "kvm-dirty-ring";
/// The finding that the dirty log can be cleared in ranges.
pub const MANUAL_PROTECT: &str = "kvm-manual-protect";
/// The finding that guest_memfd can be mapped.
pub const GUEST_MEMFD: &str = "kvm-guest-memfd";

/// One thing tried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// A stable name, such as `kvm-poison-exits`.
    pub id: &'static str,
    /// What was tried, for people.
    pub what: &'static str,
    /// What came of it.
    pub status: Status,
    /// How it was found, and the numbers that belong to it.
    pub how: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, status, how, .. } = self;
        write!(f, "{what}: {status}")?;
        if how.is_empty() { Ok(()) } else { write!(f, " ({how})") }
    }
}

/// Everything that was tried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// What was tried, in the order of trying.
    pub findings: Vec<Finding>,
    /// How the host translates guest-physical addresses.
    pub paging: Paging,
    /// The largest dirty ring of a vCPU, in bytes; `None` when there is none.
    pub dirty_ring_bytes: Option<u32>,
    /// The flags of guest_memfd that this kernel knows; `None` when it does not say.
    pub guest_memfd_flags: Option<u64>,
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

    /// Why what has this name does not work; `None` when it does.
    pub(crate) fn why_not(&self, id: &str) -> Option<String> {
        match self.find(id) {
            Some(Finding { status: Status::Works, .. }) => None,
            Some(finding) => Some(finding.to_string()),
            // Nothing else is tried without a device.
            None => Some(match self.findings.first() {
                Some(device) => device.to_string(),
                None => format!("{id} was not looked for"),
            }),
        }
    }

    /// The finding of this name in words.
    pub(crate) fn describe(&self, id: &str) -> String {
        self.find(id).map_or_else(|| format!("{id} was not looked for"), Finding::to_string)
    }
}

/// Why something does not work.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Shortfall {
    Missing(String),
    Untested(String),
}

impl From<String> for Shortfall {
    fn from(reason: String) -> Self {
        Self::Missing(reason)
    }
}

/// What a check found out beyond that it works, in words.
type Answer = Result<String, Shortfall>;

fn finding(id: &'static str, what: &'static str, answer: Answer) -> Finding {
    let (status, how) = match answer {
        Ok(how) => (Status::Works, how),
        Err(Shortfall::Missing(reason)) => (Status::Missing { reason }, String::new()),
        Err(Shortfall::Untested(reason)) => (Status::Untested { reason }, String::new()),
    };
    Finding { id, what, status, how }
}

/// Puts what was being done before an error's words.
fn doing<E: fmt::Display>(what: &str) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// What was found when it was first asked for, in this process.
pub fn host() -> &'static Probe {
    static HOST: OnceLock<Probe> = OnceLock::new();
    HOST.get_or_init(probe)
}

/// What [`measure`] said when it was first asked, in this process.
pub fn measured() -> &'static Result<Measured, String> {
    static MEASURED: OnceLock<Result<Measured, String>> = OnceLock::new();
    MEASURED.get_or_init(measure)
}

/// Tries everything. It takes some ten milliseconds, and ten seconds more for a guest that hangs.
pub fn probe() -> Probe {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(error) => return no_device(&error),
    };
    let vendor =
        Finding { how: paging::vendors(), ..finding(VENDOR, "vendor module", Ok(String::new())) };
    let (paging, two_dimensional) = paging::find(&kvm);
    let (ring, dirty_ring_bytes) = dirty::ring(&kvm);
    let (memfd, guest_memfd_flags) = capabilities::guest_memfd(&kvm);
    let findings = vec![
        finding(DEVICE, "/dev/kvm", version(&kvm)),
        vendor,
        finding(TWO_DIMENSIONAL, "two-dimensional paging", two_dimensional),
        finding(RUNS, "a guest runs, its writes are in the dirty log", runs::check(&kvm)),
        finding(POISON_EXITS, "a vCPU leaves KVM_RUN for a missing page", poison::check(&kvm)),
        finding(
            REGISTER_EXITS,
            "a guest's write of a register that names memory leaves KVM_RUN",
            registers::check(&kvm),
        ),
        finding(
            MEMORY_FAULT_INFO,
            "memory-fault information",
            capabilities::memory_fault_info(&kvm),
        ),
        finding(DIRTY_RING, "dirty ring", ring),
        finding(MANUAL_PROTECT, "dirty log cleared in ranges", dirty::manual_protect(&kvm)),
        finding(GUEST_MEMFD, "guest_memfd that the host can map", memfd),
    ];
    Probe { findings, paging, dirty_ring_bytes, guest_memfd_flags }
}

fn open() -> io::Result<Kvm> {
    Kvm::new().map_err(io::Error::from)
}

fn no_device(error: &io::Error) -> Probe {
    let answer = Err(Shortfall::Missing(error.to_string()));
    Probe {
        findings: vec![finding(DEVICE, "/dev/kvm", answer)],
        paging: Paging::Unknown,
        dirty_ring_bytes: None,
        guest_memfd_flags: None,
    }
}

fn version(kvm: &Kvm) -> Answer {
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(format!("API version {version}")),
        version => Err(Shortfall::Missing(format!("API version {version}"))),
    }
}
