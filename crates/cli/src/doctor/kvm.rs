//! What the library's own probe of KVM finds, with what each thing missing costs.

use pageferry_kvm::probe::{self, Status};

use super::finding::{Finding, Group};

const GROUP: Group = Group::Kvm;

pub(super) fn findings() -> Vec<Finding> {
    probe::host().findings.iter().map(finding).collect()
}

fn finding(found: &probe::Finding) -> Finding {
    let probe::Finding { id, what, status, how } = found;
    match status {
        Status::Works if *id == probe::VENDOR && how.is_empty() => {
            Finding::untested(GROUP, id, what, "none of the known ones is in /sys/module")
        }
        Status::Works if *id == probe::VENDOR => Finding::fact(GROUP, id, what, how),
        Status::Works => Finding::works(GROUP, id, what).detail(how),
        Status::Untested { reason } => Finding::untested(GROUP, id, what, reason),
        Status::Missing { reason } => {
            let (costs, remedy) = advice(id);
            Finding::missing(GROUP, id, what, reason).costs(costs).remedy(remedy)
        }
    }
}

/// What it costs that the finding `id` is missing, and how to get it.
fn advice(id: &str) -> (&'static str, &'static str) {
    match id {
        probe::DEVICE => (
            "no KVM guests here; processes and their memory are served all the same",
            "for a missing device: load kvm_intel or kvm_amd, and in a virtual machine enable \
             nested virtualization; for a denied one: add the user to the device's group (often \
             `kvm`); for another API version than 12: a kernel since 2.6.22",
        ),
        probe::TWO_DIMENSIONAL => (
            "shadow paging: faults of guest page tables cannot leave through the vCPU, exits are \
             dear",
            "a host with EPT or NPT, or nested virtualization that passes it on",
        ),
        probe::RUNS => (
            "no KVM guests here",
            "see the kernel log; in a virtual machine, check nested virtualization",
        ),
        probe::POISON_EXITS => (
            "vCPUs wait for missing pages inside KVM_RUN: faults are delivered by queue only",
            "Linux 6.6 or later, for userfaultfd's POISON",
        ),
        probe::MEMORY_FAULT_INFO => {
            ("an access that KVM cannot resolve comes back without its address", "a newer kernel")
        }
        probe::REGISTER_EXITS => (
            "with exits, a clock or the like that a guest sets up while memory is absent may lose \
             an update; what it set up before it ran is brought first",
            "Linux 5.10 or later, for KVM_X86_SET_MSR_FILTER; or faults by queue",
        ),
        probe::DIRTY_RING => (
            "a harvest reads the whole bitmap however little was written",
            "a kernel with CONFIG_HAVE_KVM_DIRTY_RING (5.11 and later on x86-64)",
        ),
        probe::MANUAL_PROTECT => {
            ("every harvest protects the whole slot again", "a newer kernel (5.0 and later)")
        }
        probe::GUEST_MEMFD => (
            "guest memory is a memfd or anonymous; nothing that is here today needs more",
            "Linux 6.18 or later",
        ),
        _ => ("what needs it", "a newer kernel"),
    }
}
