//! Faults on granules that need no source: stale ones, and those on removed memory.

use pageferry_memory::{GranuleIndex, GranuleRange, HostAddress, HostRange, State};
use pageferry_uffd::{CopyMode, FaultKind, Outcome, UffdError, Userfaultfd, Wake};

use crate::{
    core::Core,
    gate::Inside,
    install::{InstallMethod, Progress, Target},
    stats::{Counter, Stats},
};

/// Makes sure that the thread stopped on a present or discarded granule can go on: with the page
/// that is there, or with zeros if none is.
pub(crate) fn settle(core: &Core, target: &Target, at: GranuleIndex, kind: FaultKind) -> Progress {
    let run = GranuleRange::new(at, 1);
    let removed = target.region.page_map().state(at) == State::Discarded;
    match kind {
        // Nobody but a dirty tracker protects pages; here it means a stale message.
        FaultKind::WriteProtect => {
            each_page(core, &core.gate.install(), target, run, |uffd, host| {
                uffd.wake(host).map(|()| Outcome::Installed { bytes: host.len() })
            })
        }
        // Old bytes may lie behind a removed mapping of shared memory. They are cleared and
        // mapped, with everybody kept out: another thread may be at the same granule, and its
        // guest may have written to it once it is mapped.
        FaultKind::Minor if removed => clear_and_map(core, target, run),
        FaultKind::Minor => map_present(core, &core.gate.install(), target, run),
        FaultKind::Missing if target.zeropage => {
            let wake = target.wake;
            each_page(core, &core.gate.install(), target, run, |uffd, host| {
                uffd.zeropage(host, wake)
            })
        }
        FaultKind::Missing if target.method == InstallMethod::Continue => {
            clear_and_map(core, target, run)
        }
        FaultKind::Missing => copy_zeros(core, target, run),
    }
}

/// Runs `call` over the host range of `run`; a page that is there already is as good.
fn each_page(
    core: &Core,
    inside: &Inside<'_>,
    target: &Target,
    run: GranuleRange,
    call: impl Fn(&Userfaultfd, HostRange) -> Result<Outcome, UffdError>,
) -> Progress {
    let stats: &Stats = &core.stats;
    let map = target.region.page_map();
    let (uffd, _) = target.shard(run);
    let Some((host, _)) = inside.place(target.id, run) else { return Progress::Done };
    let page = target.region.page_size().bytes();
    let mut done = 0;
    while done < host.len() {
        let left = host.skip(done);
        match call(uffd, left) {
            Ok(Outcome::Installed { bytes }) => {
                stats.add(Counter::zero, 1);
                done += bytes;
            }
            Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
            Ok(Outcome::Retry { .. }) => {
                stats.add(Counter::eagain, 1);
                return Progress::Changing(run.first());
            }
            Ok(Outcome::AlreadyPresent { done: more }) => {
                done += more;
                if target.wake == Wake::Yes
                    && let Err(error) = uffd.wake(HostRange::new(host.skip(done).start(), page))
                {
                    return refused(run, &error);
                }
                done += page;
            }
            Ok(Outcome::RangeGone { .. }) if !matches!(inside, Inside::Open(_)) => {
                return Progress::Changing(run.first());
            }
            Ok(Outcome::RangeGone { .. } | Outcome::ProcessGone { .. }) => return Progress::Done,
            Ok(Outcome::Poisoned { .. }) => {
                return Progress::Refused { at: run.first(), why: "the page is poisoned".into() };
            }
            Err(error) => return refused(run, &error),
        }
    }
    map.publish_discarded(run.first());
    Progress::Done
}

fn refused(run: GranuleRange, error: &UffdError) -> Progress {
    Progress::Refused { at: run.first(), why: error.to_string() }
}

fn map_present(core: &Core, inside: &Inside<'_>, target: &Target, run: GranuleRange) -> Progress {
    let mode = CopyMode { wake: target.wake == Wake::Yes, write_protect: false };
    each_page(core, inside, target, run, |uffd, host| uffd.continue_range(host, mode))
}

fn clear_and_map(core: &Core, target: &Target, run: GranuleRange) -> Progress {
    let Some(inside) = core.gate.install_alone() else {
        // Without events nothing is ever removed behind our back: the message is stale.
        return map_present(core, &core.gate.install(), target, run);
    };
    if target.region.page_map().state(run.first()) == State::Discarded {
        let cleared: Result<(), std::convert::Infallible> = target.with_fill_bytes(run, |bytes| {
            bytes.fill(0);
            Ok(())
        });
        let Ok(()) = cleared;
    }
    map_present(core, &inside, target, run)
}

/// hugetlb has no zero page to map.
fn copy_zeros(core: &Core, target: &Target, run: GranuleRange) -> Progress {
    let mut staged = core.staging.take();
    let len = target.region.granule().bytes() as usize;
    let zeros = &mut staged.bytes()[..len];
    zeros.fill(0);
    let zeros = &*zeros;
    let mode = CopyMode { wake: target.wake == Wake::Yes, write_protect: false };
    each_page(core, &core.gate.install(), target, run, |uffd, host| {
        uffd.copy(host.start(), &zeros[len - host.len() as usize..], mode)
    })
}

/// Puts a zero page at an address in no region, through whichever userfaultfd it belongs to.
pub(crate) fn zero_stray(core: &Core, address: HostAddress) {
    let page = HostRange::new(address.align_down(4096), 4096);
    for uffd in core.targets.iter().flat_map(|target| target.shards.iter()) {
        match uffd.zeropage(page, Wake::Yes) {
            Ok(Outcome::Installed { .. }) => return,
            // Not this one's, or already there: its waiters go on either way.
            Ok(_) | Err(_) => {
                if let Err(error) = uffd.wake(page) {
                    tracing::debug!("stray fault at {address}: {error}");
                }
            }
        }
    }
}
