//! What `auto` picks, and why.

use std::num::NonZero;

use pageferry_memory::{Backing, PageSize, Region};
use pageferry_uffd::Features;

use crate::{delivery::Delivery, install::InstallMethod};

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
    let cpus = cpus();
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

/// Why a region cannot be installed into as asked.
pub(crate) fn method(
    wanted: Option<InstallMethod>,
    region: &Region,
    available: Features,
    exits: bool,
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
    let can_continue = region.fill_view().is_some() && available.contains(minor);
    match wanted {
        None if can_continue => Ok(InstallMethod::Continue),
        None | Some(InstallMethod::Copy) => Ok(InstallMethod::Copy),
        Some(InstallMethod::Continue) if region.fill_view().is_none() => Err(format!(
            "CONTINUE needs a fill view, and {} has none: use memfd or hugetlb with a fill view",
            region.backing()
        )),
        Some(InstallMethod::Continue) if !can_continue => {
            Err("CONTINUE needs minor faults, which this kernel does not offer here".into())
        }
        Some(InstallMethod::Continue) => Ok(InstallMethod::Continue),
        Some(InstallMethod::Move) if exits => {
            Err("MOVE does not replace the markers that vCPUs leave KVM_RUN for".into())
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

    #[test]
    fn auto_uses_signals_only_where_they_are_sound() {
        let all = Hints { guest_threads: Some(2), user_mode_only: true };
        assert_eq!(choose_delivery(Delivery::Auto, all, true, true).0, Delivery::Signal);
        assert_ne!(choose_delivery(Delivery::Auto, all, false, true).0, Delivery::Signal);
        assert_ne!(choose_delivery(Delivery::Auto, all, true, false).0, Delivery::Signal);
        let kernel = Hints { user_mode_only: false, ..all };
        assert_ne!(choose_delivery(Delivery::Auto, kernel, true, true).0, Delivery::Signal);
    }

    #[test]
    fn counts_are_filled_in_and_kept() {
        let none = Hints::default();
        assert_eq!(
            choose_delivery(Delivery::Sharded(3), none, false, true).0,
            Delivery::Sharded(3)
        );
        let Delivery::QueueN(n) = choose_delivery(Delivery::QueueN(0), none, false, true).0 else {
            panic!("the kind of delivery changed")
        };
        assert!(n >= 1);
    }
}
