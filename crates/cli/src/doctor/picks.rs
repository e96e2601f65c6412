//! The deliveries that would be picked on this host.

use pageferry::paging::{Delivery, Hints, choose_delivery};
use serde::Serialize;

use super::finding::{Finding, Status};
use crate::output::{Align, Table};

/// A delivery, for one kind of guest.
#[derive(Debug, Serialize)]
pub(super) struct Pick {
    /// Whose faults.
    guest: &'static str,
    delivery: String,
    why: String,
}

/// What the engine's own choice would be; nothing where no fault can be served.
pub(super) fn picks(findings: &[Finding]) -> Vec<Pick> {
    let works = |id: &str| findings.iter().any(|f| f.id == id && f.status == Status::Works);
    if !works("missing.anonymous") {
        return Vec::new();
    }
    let pick = |guest, user_mode_only| {
        let hints = Hints { guest_threads: None, user_mode_only };
        let (delivery, why) = choose_delivery(Delivery::Auto, hints, true, works("sigbus"));
        Pick { guest, delivery: delivery.to_string(), why }
    };
    let mut picks = vec![pick("threads that touch the memory in user mode only", true)];
    if works("kernel-faults") {
        picks.push(pick("threads that also pass the memory to system calls", false));
        if works("kvm-runs") {
            picks.push(pick("KVM guests", false));
        }
    }
    picks
}

pub(super) fn render(picks: &[Pick]) -> String {
    if picks.is_empty() {
        return "\nNo delivery would work: no fault can be served on this host.\n".to_owned();
    }
    let mut table = Table::new(&[
        ("  Would be picked for", Align::Left),
        ("delivery", Align::Left),
        ("because", Align::Left),
    ]);
    for Pick { guest, delivery, why } in picks {
        table.row(vec![format!("  {guest}"), delivery.clone(), why.clone()]);
    }
    format!("\nDeliveries\n{}", table.render())
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Group, *};

    #[test]
    fn what_works_decides() {
        let found = |ids: &[&str]| -> Vec<Finding> {
            ids.iter().map(|id| Finding::works(Group::Userfaultfd, id, id)).collect()
        };
        // Whether each pick is by signal; which queue it is otherwise depends on the CPUs.
        let cases: [(&[&str], &[bool]); 5] = [
            (&[], &[]),
            (&["sigbus", "kernel-faults", "kvm-runs"], &[]),
            (&["missing.anonymous"], &[false]),
            (&["missing.anonymous", "sigbus"], &[true]),
            (&["missing.anonymous", "sigbus", "kernel-faults", "kvm-runs"], &[true, false, false]),
        ];
        for (ids, expected) in cases {
            let picks = picks(&found(ids));
            let got: Vec<bool> = picks.iter().map(|pick| pick.delivery == "signal").collect();
            assert_eq!(got, expected, "{ids:?}");
        }
    }
}
