//! The deliveries that would be picked on this host.

use serde::Serialize;

use super::finding::{Finding, Status};
use crate::output::{Align, Table};

/// A delivery, for one kind of guest.
#[derive(Debug, Serialize)]
pub(super) struct Pick {
    /// Whose faults.
    guest: &'static str,
    delivery: &'static str,
    why: &'static str,
}

/// What would be picked; nothing where no fault can be served.
pub(super) fn picks(findings: &[Finding]) -> Vec<Pick> {
    let works = |id: &str| findings.iter().any(|f| f.id == id && f.status == Status::Works);
    let mut picks = Vec::new();
    if !works("missing.anonymous") {
        return picks;
    }
    picks.push(if works("sigbus") {
        Pick {
            guest: "threads that touch the memory in user mode only",
            delivery: "signal",
            why: "each thread resolves its own faults; nothing is queued",
        }
    } else {
        Pick {
            guest: "threads that touch the memory in user mode only",
            delivery: "queue",
            why: "the kernel has no userfaultfd by SIGBUS",
        }
    });
    if works("kernel-faults") {
        picks.push(Pick {
            guest: "threads that also pass the memory to system calls",
            delivery: "queue",
            why: "faults inside the kernel wait only on the queue",
        });
        if works("kvm-runs") {
            picks.push(Pick {
                guest: "KVM guests",
                delivery: "queue",
                why: "faults inside KVM wait only on the queue",
            });
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
        table.row(vec![format!("  {guest}"), (*delivery).to_owned(), (*why).to_owned()]);
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
        let cases: [(&[&str], &[&str]); 5] = [
            (&[], &[]),
            (&["sigbus", "kernel-faults", "kvm-runs"], &[]),
            (&["missing.anonymous"], &["queue"]),
            (&["missing.anonymous", "sigbus"], &["signal"]),
            (
                &["missing.anonymous", "sigbus", "kernel-faults", "kvm-runs"],
                &["signal", "queue", "queue"],
            ),
        ];
        for (ids, expected) in cases {
            let got: Vec<&str> = picks(&found(ids)).iter().map(|pick| pick.delivery).collect();
            assert_eq!(got, expected, "{ids:?}");
        }
    }
}
