//! Memory that can never come, on a kernel that cannot poison it (before Linux 6.6, or where POISON
//! is refused): it is made inaccessible.
//!
//! `mprotect(PROT_NONE)` on just those granules, in every view where faults happen. The range stays
//! registered, no event is raised by it, and what is there is not lost. Whoever waits is woken,
//! repeats the access, and gets SIGSEGV (SEGV_ACCERR); a system call gets EFAULT, and so does
//! KVM_RUN. A mapping of an empty file in its place would give SIGBUS, as POISON does; but mapping
//! over raises an UNMAP event, for which the thread that is to read it would wait, and ends the
//! registration.
//!
//! Each stretch costs up to two more mappings, of which a process has 65,530 (`vm.max_map_count`),
//! its allocator's included. A region that takes too many, or the kernel's ENOMEM, has all of the
//! region closed: what is there is lost to the guest, but nobody waits for ever, and nobody sees
//! zeros.
//!
//! Memory that is removed while it is closed is opened again, and reads as zero, as if it had been
//! poisoned; but only a moment after `madvise` returned, which waits for its event to be read and
//! not for what is done about it. Older kernels refuse MADV_REMOVE for closed memory (EACCES).

#![allow(unsafe_code)]

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::*},
};

use pageferry_memory::{GranuleRange, HostRange};
use pageferry_uffd::{Outcome, Userfaultfd, Wake};

use crate::{
    delivery::signal::in_handler,
    gate::Inside,
    install::{Progress, Target},
    stats::{Counter, Stats},
    views::{View, Views},
};

/// How many stretches of one region are closed at most before all of it is.
const MOST: u64 = 8192;

/// What of a region is inaccessible.
pub(crate) struct Closed {
    /// POISON is offered by the kernel: only what it refuses is closed.
    pub(crate) poisons: bool,
    stretches: AtomicU64,
    /// All of the region.
    whole: AtomicBool,
}

impl Closed {
    pub(crate) fn new(poisons: bool) -> Self {
        Self { poisons, stretches: AtomicU64::new(0), whole: AtomicBool::new(false) }
    }
}

fn set_access(range: HostRange, access: libc::c_int) -> io::Result<()> {
    // SAFETY: the range shows pages of a region, by the views of which the caller is inside the
    // gate; nobody has references to that memory (`Mapping`). What an access there comes to is for
    // the engine to say.
    let result =
        unsafe { libc::mprotect(range.start().as_ptr().cast(), range.len() as usize, access) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether all of the range is mapped: mprotect answers ENOMEM also where it is not.
fn is_mapped(range: HostRange) -> bool {
    // SAFETY: MS_ASYNC does nothing but look whether there are mappings (msync(2)).
    let result =
        unsafe { libc::msync(range.start().as_ptr().cast(), range.len() as usize, libc::MS_ASYNC) };
    result == 0
}

impl Target {
    /// Makes `part`, which is mapped at `host`, inaccessible, since it cannot be poisoned for this
    /// reason, and wakes whoever waits for it.
    pub(crate) fn close(
        &self,
        inside: &Inside<'_>,
        uffd: &Userfaultfd,
        host: HostRange,
        part: GranuleRange,
        why: &str,
        stats: &Stats,
    ) -> Progress {
        // mprotect does not ask whether an event is unread, by which memory was moved away from
        // here. Any operation of the userfaultfd does, before it looks at the range.
        if !matches!(inside, Inside::Open(_))
            && let Ok(Outcome::Retry { .. }) = uffd.write_protect(host, false, Wake::No)
        {
            return Progress::Changing(part.first());
        }
        let closed = if self.closed.stretches.load(Relaxed) < MOST {
            set_access(host, libc::PROT_NONE)
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        };
        let closed = match closed {
            Ok(()) => {
                self.closed.stretches.fetch_add(1, Relaxed);
                uffd.wake(host).map_err(|error| error.to_string())
            }
            // Unmapped, with nobody to tell us: nobody can touch it.
            Err(_) if !is_mapped(host) => uffd.wake(host).map_err(|error| error.to_string()),
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                self.close_all(inside, uffd, why)
            }
            Err(error) => Err(error.to_string()),
        };
        match closed {
            Ok(()) => {
                stats.add(Counter::closed, part.count());
                if !in_handler() {
                    tracing::warn!(
                        "{} cannot be poisoned (SIGBUS): {why}; it is made inaccessible (SIGSEGV, \
                         EFAULT)",
                        self.span(part)
                    );
                }
                Progress::Done
            }
            Err(error) => Progress::Refused {
                at: part.first(),
                why: format!("neither poisoned ({why}) nor made inaccessible ({error})"),
            },
        }
    }

    fn close_all(&self, inside: &Inside<'_>, first: &Userfaultfd, why: &str) -> Result<(), String> {
        if !self.closed.whole.swap(true, Relaxed) && !in_handler() {
            tracing::error!(
                "region {} has too many stretches that cannot be poisoned ({why}): all of it is \
                 made inaccessible",
                self.id.get()
            );
        }
        for place in inside.places(self.id) {
            set_access(place, libc::PROT_NONE).map_err(|error| format!("{place}: {error}"))?;
            for uffd in std::iter::once(first).chain(self.shards.iter().map(|shard| &**shard)) {
                uffd.wake(place).map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// Lets memory that is being removed be accessed again, since it reads as zero from now on.
    /// While nobody is inside the gate.
    pub(crate) fn open_removed(&self, views: &Views, granules: GranuleRange) {
        if self.closed.stretches.load(Relaxed) == 0 || self.closed.whole.load(Relaxed) {
            return;
        }
        for view in [View::Guest, View::Vcpu] {
            let mut rest = granules;
            while !rest.is_empty() {
                let Some((host, part)) = views.place_in(view, self.id, rest) else {
                    rest = rest.split_at(1).1;
                    continue;
                };
                if let Err(error) = set_access(host, libc::PROT_READ | libc::PROT_WRITE) {
                    tracing::error!("removed memory at {host} stays inaccessible: {error}");
                }
                rest = rest.split_at(part.count()).1;
            }
        }
    }
}
