//! Write protection under which the first write waits until it is noted.

use std::{num::NonZeroUsize, sync::Arc};

use pageferry_uffd::{Features, Mapped, OpenWay, Options, Userfaultfd};

use rustix::{fs::OFlags, io::Errno};

use crate::{
    DirtyError, DirtySet, Harvested, Method, Overflow, Target, Tracked, Tracker, WriteEvents,
    armed::{Armed, Rearm},
    protect::{OtherProcess, OwnMemory},
    reader::Reader,
    wp_async::check_descriptor,
};

/// Write protection by userfaultfd, lifted by a thread of the tracker: the first write to a page
/// waits for that thread, which can tell of each of them ([`events`](Self::events)).
///
/// A harvest reports the pages that are not protected, and protects them. That the page table says
/// what is dirty, and no second record of it, is what keeps anything from being lost: a protection
/// that is lifted while a harvest runs is either seen by it or by the next.
///
/// * Anonymous memory, huge pages, and shared memory and files of tmpfs. Mappings of other files are
///   refused by the kernel. Linux 6.4 (`UFFD_FEATURE_WP_UNPOPULATED`); before 6.7 the page map is read entry by
///   entry.
/// * Arming and discarding are as with [`WpAsync`](crate::WpAsync). What is discarded is no event,
///   nor is what is written there before the next harvest.
/// * A descriptor for user-mode faults only is refused, since a system call that writes to a
///   protected page would fail.
/// * What this tracker itself needs must not be tracked: heap or stacks of this process. With
///   [`Overflow::Wait`] nor must be what is needed to take events out.
///
/// Source: `Documentation/admin-guide/mm/userfaultfd.rst`.
#[derive(Debug)]
pub struct WpBlocking {
    /// Before the reader: what waits is released while somebody still answers.
    armed: Armed,
    reader: Reader,
}

/// What a userfaultfd must have.
const FEATURES: Features =
    Features::PAGEFAULT_FLAG_WP.union(Features::WP_HUGETLBFS_SHMEM).union(Features::WP_UNPOPULATED);

impl WpBlocking {
    /// The features that a userfaultfd of another process must have been opened with. It must have
    /// none of the events, nor `WP_ASYNC`, and not be for user-mode faults only.
    pub const FEATURES: Features = FEATURES;

    /// The features that make events say more.
    pub const OPTIONAL_FEATURES: Features = Features::THREAD_ID.union(Features::EXACT_ADDRESS);

    /// For memory of this process: ranges inside of these mappings can be armed.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Open`] when the kernel or the host withholds what it takes;
    /// [`DirtyError::Reader`].
    pub fn own<M: Mapped + 'static>(
        memory: impl IntoIterator<Item = M>,
    ) -> Result<Self, DirtyError> {
        let method = Method::WpBlocking;
        let uffd = Options::new()
            .required(FEATURES)
            .optional(Self::OPTIONAL_FEATURES)
            .ways([OpenWay::DeviceNode, OpenWay::Syscall])
            .open()
            .map_err(|source| DirtyError::Open { method, source })?;
        let uffd = Arc::new(uffd);
        let protector = OwnMemory::new(Arc::clone(&uffd), memory);
        let armed = Armed::new(Target::Own, protector, Rearm::RunByRun)?;
        Ok(Self { armed, reader: Reader::start(uffd)? })
    }

    /// For memory of another process, by a userfaultfd that it has opened and handed over, and from
    /// which nobody else reads.
    ///
    /// When the last descriptor of it is closed, tracking ends, and the process is as it was before:
    /// also if this process is killed. A copy of the descriptor elsewhere keeps writers waiting.
    ///
    /// # Safety
    ///
    /// `uffd` serves the process `pid`, and not this one.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Descriptor`] when it lacks a feature, or has events; [`DirtyError::ProcessGone`];
    /// [`DirtyError::Reader`].
    #[allow(unsafe_code, reason = "which process a descriptor serves cannot be found out")]
    pub unsafe fn with_userfaultfd(uffd: Arc<Userfaultfd>, pid: u32) -> Result<Self, DirtyError> {
        check_descriptor(Method::WpBlocking, &uffd, pid, FEATURES)?;
        set_nonblocking(&uffd)?;
        // SAFETY: the caller's promise.
        let protector = unsafe { OtherProcess::new(Arc::clone(&uffd), pid) };
        let armed = Armed::new(Target::Process(pid), protector, Rearm::RunByRun)?;
        Ok(Self { armed, reader: Reader::start(uffd)? })
    }

    /// A stream of the writes from now on, of which `capacity` can wait to be taken out. The stream
    /// so far ends.
    pub fn events(&mut self, capacity: NonZeroUsize, overflow: Overflow) -> WriteEvents {
        let (events, queue) = WriteEvents::new(capacity, overflow);
        self.reader.set_queue(Some(queue));
        events
    }
}

/// A descriptor on which reading waits cannot be polled.
fn set_nonblocking(uffd: &Userfaultfd) -> Result<(), DirtyError> {
    let set = || {
        let flags = rustix::fs::fcntl_getfl(uffd)?;
        rustix::fs::fcntl_setfl(uffd, flags | OFlags::NONBLOCK)
    };
    set().map_err(|errno: Errno| DirtyError::Reader { source: errno.into() })
}

impl Tracker for WpBlocking {
    fn method(&self) -> Method {
        Method::WpBlocking
    }

    fn ranges(&self) -> &[Tracked] {
        self.armed.ranges()
    }

    fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        let all: Vec<_> = self.armed.ranges().iter().chain(ranges).copied().collect();
        self.reader.set_armed(&all);
        let result = self.armed.arm(ranges);
        if result.is_err() {
            self.reader.set_armed(self.armed.ranges());
        }
        result
    }

    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        // What is gone stays known to the reader until the end: its registrations do, too.
        self.armed.harvest(into)
    }

    fn disarm(&mut self) -> Result<(), DirtyError> {
        let result = self.armed.disarm();
        if result.is_ok() {
            self.reader.set_armed(&[]);
        }
        result
    }
}

impl Drop for WpBlocking {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!("{error}");
        }
    }
}
