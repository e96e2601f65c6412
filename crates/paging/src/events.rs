//! What the guest's process does to its address space: pages removed, ranges unmapped or moved.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::{RwLockWriteGuard, atomic::Ordering::*},
};

use pageferry_memory::GranuleRange;
use pageferry_uffd::{Event, EventBuffer, HostRange, UffdError, Userfaultfd};
use rustix::thread::futex;

use crate::{core::Core, fault::Arrived, stats::Counter, views::Views};

/// Reads what is pending in one queue: events are applied, in front of all faults of the same
/// read, and faults are appended to `faults`. Returns how many messages there were. `wake` is for
/// its own use.
pub(crate) fn read_queue(
    core: &Core,
    uffd: &Userfaultfd,
    buffer: &mut EventBuffer,
    faults: &mut Vec<Arrived>,
    wake: &mut Vec<HostRange>,
) -> Result<usize, UffdError> {
    let queue = Some(uffd.as_fd().as_raw_fd());
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
                        queue,
                        at,
                    });
                }
                Ok(other) => apply(core, views.as_mut(), other, wake),
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
    // Threads that wait there, be it for bytes that are now to be dropped or for a source, fault
    // again: on removed memory they get zeros, on what is not mapped any more SIGSEGV.
    for range in wake.drain(..) {
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
                discard(core, region, granules);
                core.targets[usize::from(region.get())].open_removed(views, granules);
            }
            core.tracking.removed(range);
            wake.push(range);
        }
        Event::Unmap(range) => {
            for (region, granules) in views.unmap(range) {
                discard(core, region, granules);
            }
            wake.push(range);
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

fn discard(core: &Core, region: pageferry_memory::RegionId, granules: GranuleRange) {
    core.stats.add(Counter::removed, granules.count());
    core.targets[usize::from(region.get())].region.page_map().discard(granules);
}
