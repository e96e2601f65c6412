//! Write protection that the kernel lifts by itself.

use std::sync::Arc;

use pageferry_uffd::{Features, Mapped, Options, Userfaultfd};

use crate::{
    DirtyError, DirtySet, Harvested, Method, Target, Tracked, Tracker,
    armed::{Armed, Rearm},
    protect::{OtherProcess, OwnMemory},
};

/// Asynchronous write protection by userfaultfd (`UFFD_FEATURE_WP_ASYNC`), harvested with
/// `PAGEMAP_SCAN`, which finds what was written and protects it again in one step. Linux 6.7 has
/// both. No thread ever waits.
///
/// * Memory of every kind that can be mapped writable: anonymous, shared, huge pages, private and
///   shared mappings of files.
/// * Arming marks every page, those that are not there too, which takes 8 bytes of page table for
///   4 KiB of memory that has none yet. Memory that is not there when it is armed gets no
///   transparent huge pages on its first use.
/// * Transparent huge pages of anonymous memory are protected as they are, and split by the first
///   write; those of shared memory are split at once.
/// * What is discarded is reported; but not of a private mapping of a file, where the kernel keeps
///   the mark of a page that was not written since the last harvest, and the page goes back to what
///   the file has. A hole punched into a file, or `MADV_REMOVE`, which does that,
///   is not: whoever does that knows, and what is then written is reported.
/// * Reading a page that is not there does not make it dirty.
///
/// Source: `Documentation/admin-guide/mm/userfaultfd.rst`, `Documentation/admin-guide/mm/pagemap.rst`.
#[derive(Debug)]
pub struct WpAsync {
    armed: Armed,
}

/// What a userfaultfd must have.
const FEATURES: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::WP_HUGETLBFS_SHMEM)
    .union(Features::WP_UNPOPULATED)
    .union(Features::WP_ASYNC);

/// Features with which somebody would have to read events.
const EVENTS: Features = Features::EVENT_FORK
    .union(Features::EVENT_REMAP)
    .union(Features::EVENT_REMOVE)
    .union(Features::EVENT_UNMAP);

impl WpAsync {
    /// The features that a userfaultfd of another process must have been opened with. It must have
    /// none of the events.
    pub const FEATURES: Features = FEATURES;

    /// For memory of this process: ranges inside of these mappings can be armed.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Open`] when the kernel or the host withholds what it takes.
    pub fn own<M: Mapped + 'static>(
        memory: impl IntoIterator<Item = M>,
    ) -> Result<Self, DirtyError> {
        let method = Method::WpAsync;
        let uffd = Options::new()
            .required(FEATURES)
            .open()
            .map_err(|source| DirtyError::Open { method, source })?;
        let protector = OwnMemory::new(Arc::new(uffd), memory);
        Ok(Self { armed: Armed::new(Target::Own, protector, Rearm::ByScan)? })
    }

    /// For memory of another process, by a userfaultfd that it has opened and handed over. When the
    /// last descriptor of it is closed, tracking ends, and the process is as it was before.
    ///
    /// # Safety
    ///
    /// `uffd` serves the process `pid`, and not this one.
    ///
    /// # Errors
    ///
    /// [`DirtyError::Descriptor`] when it lacks a feature, or has events; [`DirtyError::ProcessGone`].
    #[allow(unsafe_code, reason = "which process a descriptor serves cannot be found out")]
    pub unsafe fn with_userfaultfd(uffd: Arc<Userfaultfd>, pid: u32) -> Result<Self, DirtyError> {
        check_descriptor(Method::WpAsync, &uffd, pid, FEATURES)?;
        // SAFETY: the caller's promise.
        let protector = unsafe { OtherProcess::new(uffd, pid) };
        Ok(Self { armed: Armed::new(Target::Process(pid), protector, Rearm::ByScan)? })
    }
}

impl Tracker for WpAsync {
    fn method(&self) -> Method {
        Method::WpAsync
    }

    fn ranges(&self) -> &[Tracked] {
        self.armed.ranges()
    }

    fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        self.armed.arm(ranges)
    }

    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        self.armed.harvest(into)
    }

    fn disarm(&mut self) -> Result<(), DirtyError> {
        self.armed.disarm()
    }
}

impl Drop for WpAsync {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!("{error}");
        }
    }
}

/// Whether a descriptor of another process is of use.
pub(crate) fn check_descriptor(
    method: Method,
    uffd: &Userfaultfd,
    pid: u32,
    needed: Features,
) -> Result<(), DirtyError> {
    let enabled = uffd.negotiated().enabled;
    let refuse = |what, features| Err(DirtyError::Descriptor { method, pid, what, features });
    if pid == std::process::id() {
        return refuse("is said to be of this process, whose memory is tracked by `own`", enabled);
    }
    if !enabled.contains(needed) {
        return refuse("lacks features", needed - enabled);
    }
    if enabled.intersects(EVENTS) {
        return refuse("has events, which nobody reads", enabled & EVENTS);
    }
    if method == Method::WpBlocking && uffd.user_mode_only() {
        return refuse("is for user-mode faults only: system calls that write would fail", enabled);
    }
    if method == Method::WpBlocking && enabled.contains(Features::WP_ASYNC) {
        return refuse("reports no writes", enabled & Features::WP_ASYNC);
    }
    Ok(())
}
