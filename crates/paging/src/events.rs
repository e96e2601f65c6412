//! What the guest's process does to its address space: pages removed, ranges unmapped or moved,
//! the process forked.

use std::{
    os::fd::OwnedFd,
    sync::{RwLockWriteGuard, atomic::Ordering::*},
};

use pageferry_memory::GranuleRange;
use pageferry_uffd::{Event, EventBuffer, HostRange, UffdError, Userfaultfd, Wake};
use rustix::thread::futex;

use crate::{core::Core, fault::Arrived, stats::Counter, views::Views};

/// Reads what is pending in one queue: events are applied, in front of all faults of the same
/// read, and faults are appended to `faults`. Returns how many messages there were.
pub(crate) fn read_queue(
    core: &Core,
    uffd: &Userfaultfd,
    buffer: &mut EventBuffer,
    faults: &mut Vec<Arrived>,
    forked: &mut Vec<OwnedFd>,
) -> Result<usize, UffdError> {
    let mut wake = Vec::new();
    let messages = {
        let mut views = core.gate.read_events();
        let messages = uffd.read_events(buffer)?;
        if messages == 0 {
            return Ok(0);
        }
        let at = core.stats.now();
        for event in buffer.drain() {
            match event {
                Ok(Event::Fault(fault)) => {
                    faults.push(Arrived {
                        address: fault.address,
                        kind: fault.kind,
                        thread: fault.thread,
                        at,
                    });
                }
                Ok(Event::Fork { uffd }) => forked.push(uffd),
                Ok(other) => apply(core, views.as_mut(), other, &mut wake),
                Err(error) => tracing::error!("message not understood: {error}"),
            }
        }
        messages
    };
    core.stats.add(Counter::reads, 1);
    if core.gate.events_watched() {
        core.events_read.fetch_add(1, Release);
        let _ = futex::wake(&core.events_read, futex::Flags::PRIVATE, i32::MAX as u32);
    }
    // Threads that waited for a granule whose bytes are now to be dropped fault again and get zeros.
    for range in wake {
        uffd.wake(range)?;
    }
    Ok(messages)
}

fn apply(
    core: &Core,
    views: Option<&mut RwLockWriteGuard<'_, Views>>,
    event: Event,
    wake: &mut Vec<HostRange>,
) {
    let Some(views) = views else {
        tracing::error!("{event:?} though no events were asked for");
        return;
    };
    match event {
        Event::Remove(range) => {
            for (region, granules) in views.shown(range) {
                if discard(core, region, granules) > 0 {
                    wake.push(range);
                }
            }
        }
        Event::Unmap(range) => {
            for (region, granules) in views.unmap(range) {
                discard(core, region, granules);
            }
        }
        Event::Remap { from, to, len } => match HostRange::try_new(from, len) {
            Some(from) => {
                views.remap(from, to);
                // Threads stopped at the old addresses look again.
                wake.push(from);
            }
            None => tracing::error!("remap of an impossible range at {from}"),
        },
        other => tracing::error!("{other:?} cannot be applied"),
    }
}

fn discard(core: &Core, region: pageferry_memory::RegionId, granules: GranuleRange) -> u64 {
    core.stats.add(Counter::removed, granules.count());
    core.targets[usize::from(region.get())].region.page_map().discard(granules)
}

/// A child of the guest's process shares none of its page map, and its missing pages would come
/// from nowhere: they are poisoned, so that the child sees a memory error and never zeros.
pub(crate) fn poison_child(core: &Core, child: OwnedFd, parent: &Userfaultfd) {
    let negotiated = parent.negotiated();
    let child = match Userfaultfd::from_received_fd(child, negotiated.enabled, negotiated.opened_by)
    {
        Ok(child) => child,
        Err(error) => {
            tracing::error!("the userfaultfd of a forked child is unusable: {error}");
            return;
        }
    };
    let inside = core.gate.install();
    for host in inside.hosts() {
        let mut done = 0;
        while done < host.len() {
            use pageferry_uffd::Outcome::*;
            match child.poison(host.skip(done), Wake::Yes) {
                Ok(Installed { bytes }) => done += bytes,
                Ok(Retry { done: more }) => done += more,
                // Copied from the parent by the fork itself, or in a huge page: a step of 4 KiB
                // is right for every page size, only slower.
                Ok(AlreadyPresent { done: more } | Poisoned { done: more }) => done += more + 4096,
                Ok(RangeGone { .. } | ProcessGone { .. }) => break,
                Err(error) => {
                    tracing::error!("a forked child keeps waiting for pages: {error}");
                    // Closing its userfaultfd would show it zeros: it is left open for good.
                    std::mem::forget(child);
                    return;
                }
            }
        }
    }
}
