//! The thread that faulted resolves its own fault, outside of any handler: a vCPU that left
//! KVM_RUN, or whoever knows that it is about to touch absent memory.

use std::{sync::atomic::Ordering::*, time::Duration};

use pageferry_memory::{Advice, GranuleIndex, HostAddress, HostRange, RegionId, State, WaitPolicy};
use pageferry_uffd::FaultKind;
use rustix::thread::futex;

use crate::{
    core::{Core, WaitForReader},
    fault::{Arrived, Handled},
    stats::Counter,
};

/// What became of a granule that a thread asked for.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Resolved {
    /// It is there, and the access can be repeated. In the vCPU view, or where vCPUs have none of
    /// their own, it is mapped; in the guest view beside one, the access may have to be answered
    /// once more, by a reader of the queue or the kernel itself.
    Present,
    /// It can never come, or the memory itself is in error: the access never succeeds
    /// ([`PageSink::poison`](crate::PageSink::poison) says how it ends).
    Poisoned,
    /// The address is in no region.
    NotOurs,
    /// It has not come yet; the caller was interrupted. The access may be repeated at any time.
    Interrupted,
}

/// How long a wait that can be interrupted goes on without asking whether it is.
const SLICE: Duration = Duration::from_millis(5);
/// How long any other wait goes on without looking at the granule again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Core {
    /// Brings the granule at `address` for the calling thread, which waits. True when the access
    /// can be repeated, false when it can never succeed.
    pub(crate) fn resolve(&self, address: HostAddress) -> bool {
        self.bring(address, LOOK_AGAIN, &mut || false) != Resolved::Poisoned
    }

    /// [`Pager::resolve_exit`](crate::Pager::resolve_exit).
    pub(crate) fn resolve_exit(
        &self,
        address: HostAddress,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Resolved {
        let Some((region, granule)) = self.find(address) else { return Resolved::NotOurs };
        let was_present = self.state(region, granule) == State::Present;
        let resolved = self.bring(address, SLICE, interrupted);
        if resolved == Resolved::Present && was_present {
            // It was there all the time, but not mapped: swapped out, reclaimed, being migrated.
            return self.map_again(region, address);
        }
        resolved
    }

    fn state(&self, region: RegionId, granule: GranuleIndex) -> State {
        self.targets[usize::from(region.get())].region.page_map().state(granule)
    }

    /// Claims, asks, waits. `interrupted` is asked every `slice` of waiting.
    fn bring(
        &self,
        address: HostAddress,
        slice: Duration,
        interrupted: &mut dyn FnMut() -> bool,
    ) -> Resolved {
        let fault = Arrived {
            address,
            kind: FaultKind::Missing,
            thread: None,
            queue: None,
            at: self.stats.now(),
        };
        self.stats.add(Counter::faults, 1);
        let policy = WaitPolicy { spins: 100, timeout: Some(slice) };
        loop {
            let changed = self.source_changed.load(SeqCst);
            match self.fault(fault, &WaitForReader(self)) {
                Handled::There => return Resolved::Present,
                Handled::Poisoned => return Resolved::Poisoned,
                // Moved or unmapped while we looked: the repeated access will tell.
                Handled::NotOurs => return Resolved::NotOurs,
                Handled::NoSource => {
                    let slice = futex::Timespec {
                        tv_sec: slice.as_secs() as i64,
                        tv_nsec: slice.subsec_nanos().into(),
                    };
                    // Woken, timed out, interrupted or changed: look again.
                    let _ = futex::wait(
                        &self.source_changed,
                        futex::Flags::PRIVATE,
                        changed,
                        Some(&slice),
                    );
                }
                // While it stays on its way this is one fault, however often is looked.
                Handled::OnItsWay => loop {
                    let Some((region, granule)) = self.find(address) else {
                        return Resolved::NotOurs;
                    };
                    let map = self.targets[usize::from(region.get())].region.page_map();
                    match map.wait(granule, policy) {
                        Ok(State::Present) => return Resolved::Present,
                        Ok(State::Poisoned) => return Resolved::Poisoned,
                        // Given back, or removed.
                        Ok(State::Absent | State::Discarded) => break,
                        Ok(State::Requested) | Err(_) if interrupted() => {
                            return Resolved::Interrupted;
                        }
                        Ok(State::Requested) | Err(_) => {}
                    }
                },
            }
            if interrupted() {
                return Resolved::Interrupted;
            }
        }
    }

    /// Maps the page at `address`, which is there. Outside the gate: it is a fault like any other,
    /// which may have to wait for a reader.
    fn map_again(&self, region: RegionId, address: HostAddress) -> Resolved {
        let region = &self.targets[usize::from(region.get())].region;
        let page = region.page_size().bytes();
        let range = HostRange::new(address.align_down(page), page);
        let views = [Some(region.guest_view()), region.vcpu_view()];
        // In neither if it was moved: the repeated access will tell.
        let Some(view) = views.into_iter().flatten().find(|view| view.range().contains(address))
        else {
            return Resolved::Present;
        };
        match view.advise(range, Advice::PopulateWrite).map_err(|error| error.raw_os_error()) {
            Err(Some(libc::EHWPOISON | libc::EFAULT)) => Resolved::Poisoned,
            // Mapped; or the repeated access will tell.
            _ => Resolved::Present,
        }
    }
}
