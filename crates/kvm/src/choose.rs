//! Which delivery a guest's faults get, and why.

use std::num::NonZero;

use pageferry_paging::{Delivery, choose_delivery};

use crate::{
    KvmError,
    probe::{self, Measured, Paging, Probe},
};

/// How a guest's faults are to be delivered: all but [`Signal`](Delivery::Signal), as a vCPU takes no
/// signals where it waits for memory.
pub use pageferry_paging::Delivery as VcpuDelivery;

/// What an embedder knows about its guest.
#[derive(Copy, Clone, Debug, Default)]
pub struct Hints {
    /// How many vCPUs it has, if known.
    pub vcpus: Option<u16>,
    /// Its page tables are never missing.
    pub guest_page_tables_resident: bool,
    /// Nobody but the vCPUs touches missing memory without asking for it first
    /// ([`Pager::resolve`](pageferry_paging::Pager::resolve)): no vhost, no device thread.
    pub only_vcpus: bool,
    /// What faults cost here, if that has been measured; otherwise it is, when it is needed.
    pub measured: Option<Measured>,
}

/// What to give to [`Builder::delivery`](pageferry_paging::Builder::delivery), and the reason.
///
/// `Auto` is exits where they work, where nothing has to be resident for them (two-dimensional
/// paging) or is, and where a fault by exit costs no more than one by queue; it is a queue
/// otherwise. One vCPU is measured, whose fault wakes a reader and waits for it. With more vCPUs than
/// CPUs no CPU is idle meanwhile, so what counts is the fault that stays on one CPU; and the reader
/// takes many at once, so that exits have to cost at most three quarters of that. For the costs it measures, once in a process, some hundred faults in a tiny virtual
/// machine, which takes some ten milliseconds.
///
/// # Errors
/// [`KvmError::NotHere`] and [`KvmError::ShadowPaging`], when exits are asked for and cannot be had.
pub fn choose(
    wanted: VcpuDelivery,
    probe: &Probe,
    hints: &Hints,
) -> Result<(Delivery, String), KvmError> {
    if wanted == Delivery::Signal {
        let why = "KVM's accesses to absent memory would fail, and no signal say where".to_owned();
        return Err(KvmError::NotHere { delivery: wanted, why });
    }
    if wanted != Delivery::Auto {
        let delivery = wanted;
        if delivery.exits() {
            if let Some(why) = probe.why_not(probe::POISON_EXITS) {
                return Err(KvmError::NotHere { delivery, why });
            }
            if !tables_can_be_read(probe, hints) {
                let found = probe.describe(probe::TWO_DIMENSIONAL);
                return Err(KvmError::ShadowPaging { delivery, found });
            }
        }
        let (delivery, why) = choose_delivery(delivery, engine_hints(hints), false, false);
        return Ok((delivery, why));
    }
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    Ok(auto(probe, hints, cpus))
}

fn auto(probe: &Probe, hints: &Hints, cpus: usize) -> (Delivery, String) {
    match by_exits(probe, hints, cpus) {
        Ok(why) if hints.only_vcpus => (Delivery::Exit, why),
        Ok(why) => {
            let (delivery, _) =
                choose_delivery(Delivery::Hybrid(0), engine_hints(hints), false, false);
            (delivery, format!("{why}; readers of the queue serve everybody else"))
        }
        Err(why_not) => {
            let (delivery, why) =
                choose_delivery(Delivery::Auto, engine_hints(hints), false, false);
            (delivery, format!("no exits: {why_not}; {why}"))
        }
    }
}

fn engine_hints(hints: &Hints) -> pageferry_paging::Hints {
    pageferry_paging::Hints { guest_threads: hints.vcpus, user_mode_only: false }
}

fn tables_can_be_read(probe: &Probe, hints: &Hints) -> bool {
    hints.guest_page_tables_resident || probe.paging == Paging::TwoDimensional
}

/// Why exits are right here, or why not.
fn by_exits(probe: &Probe, hints: &Hints, cpus: usize) -> Result<String, String> {
    if let Some(why) = probe.why_not(probe::POISON_EXITS) {
        return Err(why);
    }
    if !tables_can_be_read(probe, hints) {
        let found = probe.describe(probe::TWO_DIMENSIONAL);
        return Err(format!("guest page tables would have to be resident ({found})"));
    }
    let measured = match hints.measured {
        Some(measured) => measured,
        None => probe::measured()
            .as_ref()
            .copied()
            .map_err(|why| format!("what they cost could not be measured: {why}"))?,
    };
    let Measured { queue, queue_on_one_cpu, exit, faults } = measured;
    let crowded = hints.vcpus.is_some_and(|vcpus| usize::from(vcpus) > cpus);
    let (queue, place) = if crowded { (queue_on_one_cpu, " on one CPU") } else { (queue, "") };
    let numbers = format!(
        "measured here, a fault by exit takes {:.1} us and one by queue{place} {:.1} us (the best \
         of {faults} faults each)",
        exit.as_secs_f64() * 1e6,
        queue.as_secs_f64() * 1e6,
    );
    match crowded {
        false if exit <= queue => Ok(numbers),
        false => Err(numbers),
        true if exit * 4 <= queue * 3 => Ok(numbers),
        true => Err(format!("{numbers}: not clearly less, with more vCPUs than CPUs")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::probe::{Finding, Status};

    fn probe(poison: bool, paging: Paging) -> Probe {
        let status = |works| match works {
            true => Status::Works,
            false => Status::Missing { reason: "not in this kernel".into() },
        };
        let finding = |id, status| Finding { id, what: "", status, how: "tried".into() };
        Probe {
            findings: vec![
                finding(probe::POISON_EXITS, status(poison)),
                finding(probe::TWO_DIMENSIONAL, status(paging == Paging::TwoDimensional)),
            ],
            paging,
            dirty_ring_bytes: None,
            guest_memfd_flags: None,
        }
    }

    fn hints(exit: u64, queue: u64) -> Hints {
        let micros = Duration::from_micros;
        let [queue, exit] = [queue, exit].map(micros);
        let measured = Measured { queue, queue_on_one_cpu: queue, exit, faults: 1 };
        Hints { vcpus: Some(2), measured: Some(measured), ..Hints::default() }
    }

    #[test]
    fn auto_takes_exits_where_they_work_and_are_cheap() {
        use Paging::*;
        // poison, paging, resident, exit us, queue us, CPUs for 2 vCPUs: by exits, and a word of
        // the reason
        let cases = [
            (true, TwoDimensional, false, 5, 9, 2, true, "5.0 us"),
            (true, TwoDimensional, false, 9, 9, 2, true, "9.0 us"),
            (true, TwoDimensional, false, 10, 9, 2, false, "10.0 us"),
            (true, TwoDimensional, false, 6, 8, 1, true, "8.0 us"),
            (true, TwoDimensional, false, 7, 9, 1, false, "more vCPUs than CPUs"),
            (true, Shadow, false, 5, 9, 2, false, "resident"),
            (true, Shadow, true, 5, 9, 2, true, "5.0 us"),
            (true, Unknown, false, 5, 9, 2, false, "resident"),
            (false, TwoDimensional, false, 5, 9, 2, false, "not in this kernel"),
        ];
        for (poison, paging, resident, exit, queue, cpus, expected, word) in cases {
            for only_vcpus in [false, true] {
                let hints = Hints {
                    guest_page_tables_resident: resident,
                    only_vcpus,
                    ..hints(exit, queue)
                };
                let case = (poison, paging, resident, exit, queue, cpus);
                let (delivery, why) = auto(&probe(poison, paging), &hints, cpus);
                assert_eq!(delivery.exits(), expected, "{case:?}: {why}");
                assert!(why.contains(word), "{case:?}: {why}");
                if expected {
                    assert_eq!(delivery == Delivery::Exit, only_vcpus, "{case:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_asked_for_is_had_or_refused_with_a_reason() {
        use Paging::*;
        let none = Hints::default();
        for (wanted, expected) in [
            (VcpuDelivery::Queue, Delivery::Queue),
            (VcpuDelivery::QueueN(3), Delivery::QueueN(3)),
            (VcpuDelivery::Sharded(2), Delivery::Sharded(2)),
        ] {
            assert_eq!(choose(wanted, &probe(false, Shadow), &none).unwrap().0, expected);
        }
        let refused =
            choose(VcpuDelivery::Signal, &probe(true, TwoDimensional), &none).unwrap_err();
        assert!(matches!(refused, KvmError::NotHere { .. }), "{refused}");
        for wanted in [VcpuDelivery::Exit, VcpuDelivery::Hybrid(1)] {
            let refused = choose(wanted, &probe(false, TwoDimensional), &none).unwrap_err();
            assert!(refused.to_string().contains("not in this kernel"), "{refused}");
            let refused = choose(wanted, &probe(true, Shadow), &none).unwrap_err();
            assert!(matches!(refused, KvmError::ShadowPaging { .. }), "{refused}");
            let resident = Hints { guest_page_tables_resident: true, ..none };
            assert!(choose(wanted, &probe(true, Shadow), &resident).unwrap().0.exits());
            assert!(choose(wanted, &probe(true, TwoDimensional), &none).unwrap().0.exits());
        }
    }
}
