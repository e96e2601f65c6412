//! What `auto` picks, and why.

use std::num::NonZero;

use pageferry_memory::{Backing, PageSize, Region};
use pageferry_uffd::Features;

use crate::{WriteTracking, delivery::Delivery, install::InstallMethod};

/// What an embedder knows about its guest, for [`Delivery::Auto`].
#[derive(Copy, Clone, Debug, Default)]
pub struct Hints {
    /// How many threads will fault, if known.
    pub guest_threads: Option<u16>,
    /// Every access to the memory is made by this process's own threads in user mode: no KVM, no
    /// system call reading or writing it, no other process, while memory is absent. Only then can
    /// faults be delivered by signal.
    pub user_mode_only: bool,
}

/// What a pager would choose: a delivery with every number filled in, and the reason.
///
/// `signal_safe_source` is [`PageSource::signal_safe`](crate::PageSource::signal_safe) of the source,
/// `signal_available` whether the kernel offers UFFD_FEATURE_SIGBUS.
pub fn choose_delivery(
    wanted: Delivery,
    hints: Hints,
    signal_safe_source: bool,
    signal_available: bool,
) -> (Delivery, String) {
    choose_for(wanted, hints, signal_safe_source, signal_available, cpus())
}

/// [`choose_delivery`] on so many CPUs.
fn choose_for(
    wanted: Delivery,
    hints: Hints,
    signal_safe_source: bool,
    signal_available: bool,
    cpus: u16,
) -> (Delivery, String) {
    let counted = |n: u16| if n == 0 { cpus.min(8) } else { n };
    let asked = |delivery: Delivery| (delivery, "as asked".to_owned());
    match wanted {
        Delivery::Queue | Delivery::Signal | Delivery::Exit => asked(wanted),
        Delivery::QueueN(n) => asked(Delivery::QueueN(counted(n))),
        Delivery::ByThread(n) => asked(Delivery::ByThread(counted(n))),
        Delivery::ByCpu(n) => asked(Delivery::ByCpu(counted(n))),
        Delivery::Sharded(n) => asked(Delivery::Sharded(counted(n))),
        Delivery::Hybrid(n) => asked(Delivery::Hybrid(counted(n))),
        Delivery::Auto if hints.user_mode_only && signal_safe_source && signal_available => (
            Delivery::Signal,
            "all accesses are this process's own, in user mode, and the source can be asked from a \
             signal handler: a thread resolves its own faults, nothing is queued"
                .to_owned(),
        ),
        Delivery::Auto => {
            let threads = hints.guest_threads.unwrap_or(cpus);
            let why_no_signal = if !hints.user_mode_only {
                "the kernel may touch the memory (no signal)"
            } else if !signal_safe_source {
                "the source cannot be asked from a signal handler"
            } else {
                "no signal delivery here"
            };
            if threads >= 4 && cpus >= 4 {
                let shards = threads.min(cpus).min(8);
                let why = format!(
                    "{why_no_signal}; {threads} guest threads on {cpus} CPUs contend for one \
                     queue: split by address"
                );
                (Delivery::Sharded(shards), why)
            } else {
                let why = format!(
                    "{why_no_signal}; {threads} guest threads on {cpus} CPUs: more readers than \
                     one would only take their CPU time"
                );
                (Delivery::Queue, why)
            }
        }
    }
}

/// CPUs this process may use.
pub(crate) fn cpus() -> u16 {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(usize::from(u16::MAX)) as u16
}

/// Why a region's granules do not fit its pages.
pub(crate) fn granule(region: &Region, events_watched: bool) -> Result<(), String> {
    let (granule, page) = (region.granule(), region.page_size());
    if granule < page {
        return Err(format!(
            "granules of {granule} are parts of pages of {page}, which come whole"
        ));
    }
    if granule > page && events_watched {
        // The page map knows no granule of which a part was removed and the rest is to come.
        return Err(format!(
            "granules of {granule} are several pages of {page}, of which some may be removed: \
             ignore events, or use granules of {page}"
        ));
    }
    Ok(())
}

const CONTINUE_UNPROTECTED: &str = "CONTINUE leaves pages unprotected on this kernel, so that writes to them would be missed: \
     install by COPY, into the guest view only";

/// Why a region cannot be installed into as asked.
pub(crate) fn method(
    wanted: Option<InstallMethod>,
    region: &Region,
    available: Features,
    exits: bool,
    tracking: WriteTracking,
) -> Result<InstallMethod, String> {
    let minor = match region.backing() {
        Backing::Hugetlb(_) => Features::MINOR_HUGETLBFS,
        _ => Features::MINOR_SHMEM,
    };
    if region.vcpu_view().is_some() && !available.contains(minor) {
        return Err("a vCPU view of its own needs minor faults, which this kernel does not offer \
                    here: let KVM use the guest view"
            .into());
    }
    // No feature tells of CONTINUE that protects (Linux 6.4); what has POISON (6.6) has it, too.
    let protecting = tracking == WriteTracking::Off || available.contains(Features::POISON);
    if region.vcpu_view().is_some() && !protecting {
        return Err(CONTINUE_UNPROTECTED.into());
    }
    let can_continue = region.fill_view().is_some() && available.contains(minor) && protecting;
    match wanted {
        None if can_continue => Ok(InstallMethod::Continue),
        None | Some(InstallMethod::Copy) => Ok(InstallMethod::Copy),
        Some(InstallMethod::Continue) if region.fill_view().is_none() => Err(format!(
            "CONTINUE needs a fill view, and {} has none: use memfd or hugetlb with a fill view",
            region.backing()
        )),
        Some(InstallMethod::Continue) if !protecting => Err(CONTINUE_UNPROTECTED.into()),
        Some(InstallMethod::Continue) if !can_continue => {
            Err("CONTINUE needs minor faults, which this kernel does not offer here".into())
        }
        Some(InstallMethod::Continue) => Ok(InstallMethod::Continue),
        Some(InstallMethod::Move) if exits => {
            Err("MOVE does not replace the markers that vCPUs leave KVM_RUN for".into())
        }
        Some(InstallMethod::Move) if tracking != WriteTracking::Off => {
            Err("what MOVE brings is not write-protected, so that it would count as written".into())
        }
        Some(InstallMethod::Move) if !available.contains(Features::MOVE) => {
            Err("MOVE needs Linux 6.8 or newer".into())
        }
        Some(InstallMethod::Move)
            if region.page_size() != PageSize::SIZE_4K
                || !matches!(region.backing(), Backing::Anonymous | Backing::External) =>
        {
            Err(format!("MOVE moves pages of anonymous memory, not of {}", region.backing()))
        }
        Some(InstallMethod::Move) => Ok(InstallMethod::Move),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str = "the kernel may touch the memory (no signal)";
    const SOURCE: &str = "the source cannot be asked from a signal handler";
    const NOT_HERE: &str = "no signal delivery here";

    #[test]
    fn auto_picks_by_the_guest_the_source_and_the_cpus() {
        use Delivery::{Queue, Sharded, Signal};

        // (user mode only, signal-safe source, signals available), guest threads, CPUs.
        let own = "all accesses are this process's own, in user mode, and the source can be asked \
                   from a signal handler: a thread resolves its own faults, nothing is queued";
        let few = |why: &str, threads: u16, cpus: u16| {
            format!(
                "{why}; {threads} guest threads on {cpus} CPUs: more readers than one would only \
                 take their CPU time"
            )
        };
        let many = |why: &str, threads: u16, cpus: u16| {
            format!(
                "{why}; {threads} guest threads on {cpus} CPUs contend for one queue: split by \
                 address"
            )
        };
        let cases = [
            // Signals are used only where they are sound, and then whatever the CPUs.
            ((true, true, true), Some(2), 2, Signal, own.to_owned()),
            ((true, true, true), Some(64), 64, Signal, own.to_owned()),
            ((true, true, true), None, 1, Signal, own.to_owned()),
            ((false, true, true), Some(2), 16, Queue, few(KERNEL, 2, 16)),
            ((true, false, true), Some(2), 16, Queue, few(SOURCE, 2, 16)),
            ((true, true, false), Some(2), 16, Queue, few(NOT_HERE, 2, 16)),
            // The first of several reasons.
            ((false, false, false), Some(2), 16, Queue, few(KERNEL, 2, 16)),
            ((true, false, false), Some(2), 16, Queue, few(SOURCE, 2, 16)),
            // Four threads on four CPUs contend; fewer of either do not.
            ((false, false, false), Some(3), 4, Queue, few(KERNEL, 3, 4)),
            ((false, false, false), Some(4), 3, Queue, few(KERNEL, 4, 3)),
            ((false, false, false), Some(4), 4, Sharded(4), many(KERNEL, 4, 4)),
            ((true, false, true), Some(6), 16, Sharded(6), many(SOURCE, 6, 16)),
            ((true, true, false), Some(16), 6, Sharded(6), many(NOT_HERE, 16, 6)),
            ((false, true, true), Some(255), 64, Sharded(8), many(KERNEL, 255, 64)),
            // As many threads as CPUs, if nobody said.
            ((false, true, true), None, 3, Queue, few(KERNEL, 3, 3)),
            ((false, true, true), None, 5, Sharded(5), many(KERNEL, 5, 5)),
            ((false, true, true), None, u16::MAX, Sharded(8), many(KERNEL, u16::MAX, u16::MAX)),
        ];
        for ((user_mode_only, safe, available), guest_threads, cpus, delivery, why) in cases {
            let hints = Hints { guest_threads, user_mode_only };
            let chosen = choose_for(Delivery::Auto, hints, safe, available, cpus);
            assert_eq!(chosen, (delivery, why), "{hints:?} {safe} {available} {cpus}");
        }
    }

    #[test]
    fn what_is_asked_for_is_kept_and_its_number_filled_in() {
        let wanted = |n: u16| {
            [
                (Delivery::QueueN(n), Delivery::QueueN as fn(u16) -> Delivery),
                (Delivery::ByThread(n), Delivery::ByThread),
                (Delivery::ByCpu(n), Delivery::ByCpu),
                (Delivery::Sharded(n), Delivery::Sharded),
                (Delivery::Hybrid(n), Delivery::Hybrid),
            ]
        };
        // Neither hints nor what is available change it: what does not fit is refused elsewhere.
        let hints = [Hints::default(), Hints { guest_threads: Some(64), user_mode_only: true }];
        for (hints, able) in hints.into_iter().zip([false, true]) {
            let choose = |delivery, cpus| {
                let (chosen, why) = choose_for(delivery, hints, able, able, cpus);
                assert_eq!(why, "as asked");
                chosen
            };
            for same in [Delivery::Queue, Delivery::Signal, Delivery::Exit] {
                assert_eq!(choose(same, 4), same);
            }
            for (delivery, of) in wanted(3) {
                assert_eq!(choose(delivery, 16), of(3));
            }
            for (cpus, filled) in [(1, 1), (5, 5), (8, 8), (64, 8)] {
                for (delivery, of) in wanted(0) {
                    assert_eq!(choose(delivery, cpus), of(filled), "{cpus} CPUs");
                }
            }
        }
    }

    #[test]
    fn the_cpus_are_those_of_this_host() {
        let here = choose_delivery(Delivery::QueueN(0), Hints::default(), false, true);
        assert!(cpus() >= 1);
        assert_eq!(here, (Delivery::QueueN(cpus().min(8)), "as asked".to_owned()));
    }
}
