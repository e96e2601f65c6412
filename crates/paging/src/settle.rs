//! Faults on granules that need no source: stale ones, and those on removed memory.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use pageferry_memory::{GranuleIndex, GranuleRange, HostAddress, HostRange, State};
use pageferry_uffd::{CopyMode, Errno, FaultKind, Outcome, UffdError, Userfaultfd, Wake};

use crate::{
    core::Core,
    gate::Inside,
    install::{InstallMethod, NO_HUGE_PAGE, Progress, Target, ThoughAbsent},
    stats::Counter,
};

/// Makes sure that the thread stopped on a present or discarded granule can go on: with the page
/// that is there, or with zeros if none is.
pub(crate) fn settle(core: &Core, target: &Target, at: GranuleIndex, kind: FaultKind) -> Progress {
    let progress = settle_guest(core, target, at, kind);
    if matches!(progress, Progress::Done) && target.region.vcpu_view().is_some() {
        let inside = core.gate.install();
        // Not if it was removed meanwhile: then it is not there any more.
        if target.region.page_map().state(at) == State::Present {
            target.map_for_vcpus(&inside, GranuleRange::one(at), target.mapping_again());
        }
    }
    progress
}

fn settle_guest(core: &Core, target: &Target, at: GranuleIndex, kind: FaultKind) -> Progress {
    let run = GranuleRange::one(at);
    match kind {
        // Of a write that is tracked the fault path takes care; here it means a stale message.
        FaultKind::WriteProtect => {
            each_page(core, &core.gate.install(), target, run, None, |uffd, host| {
                uffd.wake(host).map(|()| Outcome::Installed { bytes: host.len() })
            })
        }
        // Which of the two it is does not matter: the message may be older than what is known
        // now, and with signals there is none.
        FaultKind::Missing | FaultKind::Minor if target.method == InstallMethod::Continue => {
            map(core, target, run)
        }
        FaultKind::Missing | FaultKind::Minor => {
            let (progress, inside) = zero(core, target, run);
            if matches!(progress, Progress::Done) {
                target.region.page_map().publish_discarded(at);
            }
            drop(inside);
            progress
        }
    }
}

/// Maps what is behind the guest view, once it is known to be no old bytes.
fn map(core: &Core, target: &Target, run: GranuleRange) -> Progress {
    let page_map = target.region.page_map();
    let removed = || page_map.state(run.first()) == State::Discarded;
    // The state is looked at inside the gate: outside, it could be removed right afterwards, and
    // old bytes be mapped.
    let mut inside = core.gate.install();
    if removed() && core.gate.events_watched() {
        // Old bytes may lie behind a removed mapping of shared memory. They are cleared and
        // mapped with everybody kept out: another thread may be at the same granule, and its
        // guest may have written to it once it is mapped.
        drop(inside);
        inside = core.gate.install_alone();
        if removed() {
            if let (_, Some(why)) = target.back(run) {
                return Progress::Refused { at: run.first(), why };
            }
            let cleared: Result<(), std::convert::Infallible> =
                target.with_fill_bytes(run, |bytes| {
                    bytes.fill(0);
                    Ok(())
                });
            let Ok(()) = cleared;
        }
    }
    let mode = target.mapping_again();
    let mut nothing_behind = false;
    let progress = each_page(core, &inside, target, run, None, |uffd, host| {
        let outcome = uffd.continue_range(host, mode);
        nothing_behind = matches!(&outcome, Err(UffdError::Ioctl { errno: Errno::FAULT, .. }));
        outcome
    });
    if matches!(progress, Progress::Done) {
        page_map.publish_discarded(run.first());
        target.map_around(&inside, run.first());
    }
    drop(inside);
    if nothing_behind {
        // Freed through the file, which no event tells. If somebody fills it meanwhile, the
        // thread is woken and faults again.
        return zero(core, target, run).0;
    }
    progress
}

/// Installs zeros where there is nothing.
fn zero<'a>(core: &'a Core, target: &Target, run: GranuleRange) -> (Progress, Inside<'a>) {
    if target.zeropage {
        let inside = core.gate.install();
        let wake = target.wake;
        let progress = each_page(core, &inside, target, run, Some(Counter::zero), |uffd, host| {
            uffd.zeropage(host, wake)
        });
        return (progress, inside);
    }
    // hugetlb has no zero page to map. The buffer is taken first: its holders may need the gate.
    let mut staged = core.staging.take();
    let len = target.region.granule().bytes() as usize;
    let zeros = &mut staged.bytes()[..len];
    zeros.fill(0);
    let zeros = &*zeros;
    let mode = target.mapping_again();
    let inside = core.gate.install();
    let progress = each_page(core, &inside, target, run, Some(Counter::zero), |uffd, host| {
        uffd.copy(host.start(), &zeros[len - host.len() as usize..], mode)
    });
    (progress, inside)
}

/// Runs `call` over the host range of `run`, counting the pages it installs as `counted`; a page
/// that is there already is as good.
fn each_page(
    core: &Core,
    inside: &Inside<'_>,
    target: &Target,
    run: GranuleRange,
    counted: Option<Counter>,
    mut call: impl FnMut(&Userfaultfd, HostRange) -> Result<Outcome, UffdError>,
) -> Progress {
    let stats = &core.stats;
    let (uffd, _) = target.shard(run);
    let Some((host, _)) = inside.place(target.id, run) else { return Progress::Done };
    let page = target.region.page_size().bytes();
    let mut done = 0;
    let mut absent = ThoughAbsent::default();
    while done < host.len() {
        let left = host.skip(done);
        match call(uffd, left) {
            Ok(Outcome::Installed { bytes }) => {
                if let Some(counter) = counted {
                    stats.add(counter, bytes / page);
                }
                done += bytes;
            }
            Ok(Outcome::Retry { done: more }) if more > 0 => done += more,
            Ok(Outcome::Retry { .. }) => {
                stats.add(Counter::eagain, 1);
                return Progress::Changing(run.first());
            }
            Ok(Outcome::AlreadyPresent { done: more })
                if counted.is_some()
                    && !target.is_present(uffd, HostRange::new(left.skip(more).start(), page)) =>
            {
                done += more;
                if absent.again() {
                    continue;
                }
                return Progress::Refused { at: run.first(), why: NO_HUGE_PAGE.into() };
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
            // Whoever waits finds out for itself.
            Ok(Outcome::RangeGone { .. } | Outcome::ProcessGone { .. }) => {
                return match uffd.wake(host) {
                    Ok(()) => Progress::Done,
                    Err(error) => refused(run, &error),
                };
            }
            Ok(Outcome::Poisoned { .. }) => {
                return Progress::Refused { at: run.first(), why: "the page is poisoned".into() };
            }
            Err(error) => return refused(run, &error),
        }
    }
    Progress::Done
}

fn refused(run: GranuleRange, error: &UffdError) -> Progress {
    Progress::Refused { at: run.first(), why: error.to_string() }
}

/// For COPY, which replaces the markers that protect absent pages; ZEROPAGE does not.
static ZEROS: [u8; 4096] = [0; 4096];

/// A thread of the userfaultfd `queue` is stopped at an address that was in no region. Puts a zero
/// page there, unless the address space is changing, and lets the thread look again.
pub(crate) fn zero_stray(core: &Core, queue: RawFd, address: HostAddress) {
    let page = HostRange::new(address.align_down(4096), 4096);
    let mut uffds = core.targets.iter().flat_map(|target| target.shards.iter());
    let Some(uffd) = uffds.find(|uffd| uffd.as_fd().as_raw_fd() == queue) else { return };
    // That the address is in no region may only mean that the event which moved one there was not
    // read yet. While we are inside the gate it stays unread, and as long as it is unread this
    // userfaultfd, and no other, refuses to install anything.
    let inside = core.gate.install();
    let zeroed = inside.find(address).is_none()
        && matches!(uffd.copy(page.start(), &ZEROS, CopyMode::WAKE), Ok(Outcome::Installed { .. }));
    if !zeroed && let Err(error) = uffd.wake(page) {
        tracing::debug!("stray fault at {address}: {error}");
    }
}
