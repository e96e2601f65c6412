//! Writes noticed while memory arrives: a page that comes is write-protected, so that it is not
//! dirty before somebody writes to it.
//!
//! One mapping is registered with one userfaultfd, so whoever pages memory has to register it for
//! write protection, too. The pager does that, and keeps the protection right through installs and
//! removals; who tracks (a tracker) decides when pages are protected again, and collects.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::*},
    },
    thread,
};

use pageferry_memory::{HostRange, Layout};
use pageferry_uffd::{Features, Outcome, UffdError, Userfaultfd, Wake};

use crate::{
    Delivery,
    core::{AddressSpaceChanging, Core, WaitForReader},
    fault::Arrived,
    stats::Counter,
};

/// Whether writes are noticed while memory arrives, and how.
///
/// | delivery | asynchronous | blocking |
/// |---|---|---|
/// | `Queue`, `QueueN`, `ByThread`, `ByCpu`, `Sharded` | yes | yes |
/// | `Signal` | yes | no: a SIGBUS does not tell a write from an absent page |
/// | `Hybrid`, vCPUs on a view of their own | the guest view | the guest view |
/// | `Exit`, vCPUs on a view of their own | the guest view | no: nobody reads faults |
/// | `Hybrid`, `Exit`, vCPUs on the guest view | no | no |
///
/// Where vCPUs leave KVM_RUN for absent pages, what they write is noticed by KVM's dirty log or
/// dirty ring and not here: their pages carry POISON markers, and `PAGEMAP_SCAN` calls a marker
/// written, that of a huge page in every scan. Where they wait in the queue, their own view, if
/// there is one, is tracked as the guest view is.
///
/// What does not go is refused by [`Builder::start`](crate::Builder::start). Nor can
/// [`InstallMethod::Move`](crate::InstallMethod::Move) be used, since what is moved arrives
/// unprotected. Before Linux 6.4 neither can CONTINUE: shared memory is installed by COPY there.
///
/// Source: `Documentation/admin-guide/mm/userfaultfd.rst`, write protect notifications;
/// `Documentation/admin-guide/mm/pagemap.rst`, `PAGEMAP_SCAN`.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum WriteTracking {
    /// Writes are not noticed.
    #[default]
    Off,
    /// The kernel lifts the protection of a page that is written to, and nobody waits. Who wants to
    /// know scans [`Pager::tracked`](crate::Pager::tracked) with `PAGEMAP_SCAN`, which finds what
    /// has been written and protects it again in one step. Needs
    /// [`Features::WP_ASYNC`] (Linux 6.7).
    ///
    /// To begin, [`Pager::protect`](crate::Pager::protect): pages that have not come are then
    /// known as not written. A scan without it reports absent pages of 4 KiB once.
    Asynchronous,
    /// The first write to a protected page waits until the [`WriteObserver`] has been told and the
    /// protection is lifted, by a thread that reads faults.
    /// [`Pager::protect`](crate::Pager::protect) protects again.
    Blocking,
}

impl WriteTracking {
    /// Whether pages that come from the source are write-protected.
    pub(crate) fn protects_arrivals(self) -> bool {
        self != Self::Off
    }

    /// Whether pages that were there before, or that were removed, are write-protected when they
    /// are mapped again. It is not known whether they were written to. Where the kernel is asked,
    /// an unprotected page counts as written; where an observer is told, only writes to a protected
    /// one are seen: both lose nothing.
    pub(crate) fn protects_again(self) -> bool {
        self == Self::Blocking
    }

    /// The features without which it cannot be.
    pub(crate) fn features(self, layout: &Layout) -> Features {
        let shared = layout
            .iter()
            .any(|(_, region)| region.backing() != pageferry_memory::Backing::Anonymous);
        let kinds = if shared { Features::WP_HUGETLBFS_SHMEM } else { Features::empty() };
        match self {
            Self::Off => Features::empty(),
            Self::Asynchronous => {
                kinds | Features::PAGEFAULT_FLAG_WP | Features::WP_UNPOPULATED | Features::WP_ASYNC
            }
            Self::Blocking => kinds | Features::PAGEFAULT_FLAG_WP,
        }
    }

    /// Why it cannot be with this delivery.
    pub(crate) fn refuses(
        self,
        delivery: Delivery,
        layout: &Layout,
        observed: bool,
    ) -> Option<String> {
        let own_views = layout.iter().all(|(_, region)| region.vcpu_view().is_some());
        match self {
            Self::Off => None,
            _ if delivery.exits() && !own_views => Some(format!(
                "with delivery {delivery} the markers of absent pages, which scans call written, \
                 are in the guest view: give the vCPUs a view of their own, or deliver by queue"
            )),
            Self::Blocking if delivery == Delivery::Exit => Some(
                "with delivery exit nobody reads faults: use WriteTracking::Asynchronous, or \
                 delivery hybrid"
                    .into(),
            ),
            Self::Asynchronous => None,
            Self::Blocking if delivery == Delivery::Signal => Some(
                "with delivery signal a write to a protected page looks as an access to an absent \
                 one: use WriteTracking::Asynchronous, or deliver by queue"
                    .into(),
            ),
            Self::Blocking if !observed => Some(
                "blocking write tracking needs someone who is told: Builder::write_observer".into(),
            ),
            Self::Blocking => None,
        }
    }
}

/// Who is told of writes, and of what is removed.
///
/// Called by the threads that read faults, while the thread concerned waits. It must not block, nor
/// touch the memory, nor call the pager; it should not allocate.
pub trait WriteObserver: Send + Sync {
    /// A write to `page`, which was protected, is about to go on: with
    /// [`WriteTracking::Blocking`]. `page` is one page of the backing, as the thread addressed it;
    /// `thread` is the id of the writing thread ([`Fault::thread`](pageferry_uffd::Fault::thread)),
    /// where the kernel tells.
    fn written(&self, page: HostRange, thread: Option<u32>);

    /// The pages of `range` are about to be removed (`MADV_DONTNEED`, `MADV_REMOVE`): what they
    /// contain changes, and of shared memory and huge pages no scan tells. With either tracking,
    /// where [`Events::Watch`](crate::Events::Watch) is on. `range` may reach beyond the memory.
    fn removed(&self, range: HostRange) {
        let _ = range;
    }
}

/// Why pages could not be write-protected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtectError {
    /// The pager was started with [`WriteTracking::Off`].
    #[error("write-protecting {range}: the pager was started without write tracking")]
    Off {
        /// The range asked for.
        range: HostRange,
    },
    /// No page of the range is in a tracked view. Nothing was changed.
    #[error("write-protecting {range}: none of it is tracked memory")]
    Outside {
        /// The range asked for.
        range: HostRange,
    },
    /// The kernel refused a part of the range; what is before it is protected.
    #[error("write-protecting {part}: {error}")]
    Kernel {
        /// The part.
        part: HostRange,
        /// What the kernel said.
        #[source]
        error: UffdError,
    },
    /// The memory was moved or unmapped all the time. What is left of it may be protected or not.
    #[error("write-protecting {range}: it is unmapped or moved again and again")]
    Changing {
        /// The range asked for.
        range: HostRange,
    },
    /// The pager is being stopped.
    #[error("write-protecting {range}: the pager has stopped")]
    Stopped {
        /// The range asked for.
        range: HostRange,
    },
}

/// What a pager knows about who tracks.
pub(crate) struct Tracking {
    pub(crate) mode: WriteTracking,
    observer: Option<Arc<dyn WriteObserver>>,
    lifts: Lifts,
}

impl Tracking {
    pub(crate) fn new(mode: WriteTracking, observer: Option<Arc<dyn WriteObserver>>) -> Self {
        Self { mode, observer, lifts: Lifts::default() }
    }

    pub(crate) fn removed(&self, range: HostRange) {
        if self.mode != WriteTracking::Off
            && let Some(observer) = &self.observer
        {
            observer.removed(range);
        }
    }
}

/// The threads that are just now lifting protections. Between telling the observer and lifting,
/// whoever re-arms could take what the observer noted and protect the page, and then the protection
/// would be lifted with nothing noted: the next write would be lost. So re-arming waits for those
/// that have begun before it.
#[derive(Default)]
struct Lifts {
    /// Which of the two is entered.
    current: AtomicUsize,
    inside: [AtomicUsize; 2],
    /// Held by who waits, never by who lifts.
    waiting: Mutex<()>,
}

struct Lift<'a>(&'a AtomicUsize);

impl Drop for Lift<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Lifts {
    fn enter(&self) -> Lift<'_> {
        let inside = &self.inside[self.current.load(SeqCst) & 1];
        inside.fetch_add(1, SeqCst);
        Lift(inside)
    }

    /// Returns when all who were inside have left, however many enter meanwhile: those enter the
    /// other one. Both are waited for, since a thread may enter the one that it read as current
    /// long ago.
    fn wait_for_those_inside(&self) {
        let _alone = self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for _ in 0..2 {
            let left = &self.inside[self.current.fetch_add(1, SeqCst) & 1];
            while left.load(SeqCst) != 0 {
                thread::yield_now();
            }
        }
    }
}

/// How often a range is looked up again because it was unmapped or moved meanwhile.
const LOOKS: u32 = 64;

impl Core {
    /// A thread waits because it wrote to a protected page: notes it, lifts the protection, and
    /// lets the thread go on.
    pub(crate) fn written(&self, fault: Arrived, changing: &dyn AddressSpaceChanging) {
        let uffd = self.targets.iter().flat_map(|target| target.shards.iter());
        let Some(uffd) =
            uffd.into_iter().find(|uffd| Some(uffd.as_fd().as_raw_fd()) == fault.queue)
        else {
            return;
        };
        let found = self.find(fault.address);
        let size = found.map_or(4096, |(region, _)| {
            self.targets[usize::from(region.get())].region.page_size().bytes()
        });
        let page = HostRange::new(fault.address.align_down(size), size);
        if found.is_some()
            && let Some(observer) = &self.tracking.observer
        {
            let _lift = self.tracking.lifts.enter();
            self.stats.add(Counter::written, 1);
            observer.written(page, fault.thread);
            while let Ok(Outcome::Retry { .. }) = uffd.write_protect(page, false, Wake::Yes) {
                if self.stopping.load(Acquire) {
                    break;
                }
                changing.let_events_be_read();
            }
        }
        // Once more for what was unmapped or moved meanwhile: the thread finds out for itself.
        if let Err(error) = uffd.wake(page) {
            tracing::debug!("{error}");
        }
    }

    /// Every range of addresses that shows tracked memory now, its userfaultfd, and the size of its
    /// pages.
    fn tracked_places(&self) -> Vec<(Arc<Userfaultfd>, HostRange, u64)> {
        let mut places = Vec::new();
        if self.tracking.mode != WriteTracking::Off {
            let inside = self.gate.install();
            self.each_place(&inside, |target, view, uffd, host| {
                if target.tracked(view) {
                    places.push((Arc::clone(uffd), host, target.region.page_size().bytes()));
                }
            });
        }
        places
    }

    /// [`Pager::tracked`](crate::Pager::tracked).
    pub(crate) fn tracked(&self) -> Vec<HostRange> {
        let mut ranges: Vec<HostRange> = Vec::new();
        for (_, host, _) in self.tracked_places() {
            match ranges.last_mut() {
                Some(last) if last.end() == host.start() => {
                    *last = HostRange::new(last.start(), last.len() + host.len());
                }
                _ => ranges.push(host),
            }
        }
        ranges
    }

    /// [`Pager::protect`](crate::Pager::protect).
    pub(crate) fn protect(&self, range: HostRange) -> Result<(), ProtectError> {
        if self.tracking.mode == WriteTracking::Off {
            return Err(ProtectError::Off { range });
        }
        self.tracking.lifts.wait_for_those_inside();
        for _ in 0..LOOKS {
            let places = self.tracked_places();
            let mut parts = places
                .iter()
                .filter_map(|(uffd, host, page)| Some((uffd, host.intersection(range)?, *page)))
                .peekable();
            if parts.peek().is_none() {
                return Err(ProtectError::Outside { range });
            }
            let mut all = true;
            for (uffd, part, page) in parts {
                all &= self.protect_part(uffd, part, page, range)?;
            }
            if all {
                return Ok(());
            }
            WaitForReader(self).let_events_be_read();
        }
        Err(ProtectError::Changing { range })
    }

    /// False when it is not there any more.
    fn protect_part(
        &self,
        uffd: &Userfaultfd,
        part: HostRange,
        page: u64,
        range: HostRange,
    ) -> Result<bool, ProtectError> {
        loop {
            match uffd.write_protect(part, true, Wake::No) {
                Ok(Outcome::Installed { .. }) => return Ok(true),
                Ok(Outcome::Retry { .. }) if self.stopping.load(Acquire) => {
                    return Err(ProtectError::Stopped { range });
                }
                Ok(Outcome::Retry { .. }) => WaitForReader(self).let_events_be_read(),
                // Older kernels (6.1) protect a part of one mapping only.
                Ok(_) if part.len() > page => {
                    let (first, second) = part.split_at((part.len() / 2).next_multiple_of(page));
                    let first = self.protect_part(uffd, first, page, range)?;
                    return Ok(self.protect_part(uffd, second, page, range)? && first);
                }
                Ok(_) => return Ok(false),
                Err(error) => return Err(ProtectError::Kernel { part, error }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_waits_for_those_inside_and_for_nobody_else() {
        let lifts = Lifts::default();
        for _ in 0..3 {
            lifts.wait_for_those_inside();
            let (first, left) = (lifts.enter(), AtomicUsize::new(0));
            thread::scope(|scope| {
                scope.spawn(|| {
                    lifts.wait_for_those_inside();
                    assert_eq!(left.load(SeqCst), 1, "the first had not left");
                });
                // Others come and go meanwhile.
                for _ in 0..1000 {
                    drop(lifts.enter());
                    thread::yield_now();
                }
                left.store(1, SeqCst);
                drop(first);
            });
        }
    }
}
