//! Bit sets of the userfaultfd interface: features, registration modes, ioctls.
//!
//! Source: `include/uapi/linux/userfaultfd.h` and `Documentation/admin-guide/mm/userfaultfd.rst`.

use std::fmt;

use bitflags::bitflags;
use linux_raw_sys::general as raw;

bitflags! {
    /// What a userfaultfd can be asked to do (`UFFD_FEATURE_*`).
    ///
    /// Bits this crate has no name for are kept: a newer kernel may offer them and a caller who
    /// knows them may ask for them.
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Features: u64 {
        /// Write-protect mode on anonymous memory, and its fault flag.
        const PAGEFAULT_FLAG_WP = raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
        /// An event with a new userfaultfd when the process forks. Asking for it takes
        /// `CAP_SYS_PTRACE`.
        const EVENT_FORK = raw::UFFD_FEATURE_EVENT_FORK as u64;
        /// An event when a registered range is moved by `mremap`.
        const EVENT_REMAP = raw::UFFD_FEATURE_EVENT_REMAP as u64;
        /// An event when pages are discarded (`MADV_DONTNEED`, `MADV_REMOVE`).
        const EVENT_REMOVE = raw::UFFD_FEATURE_EVENT_REMOVE as u64;
        /// Missing mode on hugetlbfs. Informative: asking for it changes nothing.
        const MISSING_HUGETLBFS = raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64;
        /// Missing mode on shared memory. Informative: asking for it changes nothing.
        const MISSING_SHMEM = raw::UFFD_FEATURE_MISSING_SHMEM as u64;
        /// An event when a registered range is unmapped.
        const EVENT_UNMAP = raw::UFFD_FEATURE_EVENT_UNMAP as u64;
        /// A fault becomes SIGBUS in the faulting thread (EFAULT in a system call) instead of an
        /// event.
        const SIGBUS = raw::UFFD_FEATURE_SIGBUS as u64;
        /// Fault events name the faulting thread.
        const THREAD_ID = raw::UFFD_FEATURE_THREAD_ID as u64;
        /// Minor mode on hugetlbfs.
        const MINOR_HUGETLBFS = raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64;
        /// Minor mode on shared memory.
        const MINOR_SHMEM = raw::UFFD_FEATURE_MINOR_SHMEM as u64;
        /// Fault events carry the address accessed, not that of its page.
        const EXACT_ADDRESS = raw::UFFD_FEATURE_EXACT_ADDRESS as u64;
        /// Write-protect mode on hugetlbfs and shared memory.
        const WP_HUGETLBFS_SHMEM = raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
        /// Write-protecting reaches anonymous pages that are not there yet.
        const WP_UNPOPULATED = raw::UFFD_FEATURE_WP_UNPOPULATED as u64;
        /// `UFFDIO_POISON`.
        const POISON = raw::UFFD_FEATURE_POISON as u64;
        /// The kernel lifts write protection itself; writes are found by `PAGEMAP_SCAN`.
        const WP_ASYNC = raw::UFFD_FEATURE_WP_ASYNC as u64;
        /// `UFFDIO_MOVE`.
        const MOVE = raw::UFFD_FEATURE_MOVE as u64;
    }

    /// Which faults a registered range raises (`UFFDIO_REGISTER_MODE_*`).
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct RegisterMode: u64 {
        /// Access to a page that is not there.
        const MISSING = raw::UFFDIO_REGISTER_MODE_MISSING as u64;
        /// Write to a page that is write-protected by [`Userfaultfd::write_protect`].
        ///
        /// [`Userfaultfd::write_protect`]: crate::Userfaultfd::write_protect
        const WP = raw::UFFDIO_REGISTER_MODE_WP as u64;
        /// Access to a page that is in the page cache but not mapped here.
        const MINOR = raw::UFFDIO_REGISTER_MODE_MINOR as u64;
    }

    /// Which operations the kernel offers, for the descriptor or for one registered range.
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Ioctls: u64 {
        /// `UFFDIO_REGISTER`.
        const REGISTER = 1 << raw::_UFFDIO_REGISTER;
        /// `UFFDIO_UNREGISTER`.
        const UNREGISTER = 1 << raw::_UFFDIO_UNREGISTER;
        /// `UFFDIO_WAKE`.
        const WAKE = 1 << raw::_UFFDIO_WAKE;
        /// `UFFDIO_COPY`.
        const COPY = 1 << raw::_UFFDIO_COPY;
        /// `UFFDIO_ZEROPAGE`.
        const ZEROPAGE = 1 << raw::_UFFDIO_ZEROPAGE;
        /// `UFFDIO_MOVE`.
        const MOVE = 1 << raw::_UFFDIO_MOVE;
        /// `UFFDIO_WRITEPROTECT`.
        const WRITEPROTECT = 1 << raw::_UFFDIO_WRITEPROTECT;
        /// `UFFDIO_CONTINUE`.
        const CONTINUE = 1 << raw::_UFFDIO_CONTINUE;
        /// `UFFDIO_POISON`.
        const POISON = 1 << raw::_UFFDIO_POISON;
        /// `UFFDIO_API`.
        const API = 1 << raw::_UFFDIO_API;
    }
}

macro_rules! display_as_names {
    ($($set:ty),*) => {$(
        impl fmt::Display for $set {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                if self.is_empty() {
                    return f.write_str("none");
                }
                bitflags::parser::to_writer(self, f)
            }
        }
    )*};
}

display_as_names!(Features, RegisterMode, Ioctls);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seventeen_features_in_a_row() {
        assert_eq!(Features::all().bits(), 0x1ffff);
        assert_eq!(Features::MOVE.bits(), 1 << 16);
    }

    #[test]
    fn unknown_bits_are_kept_and_shown() {
        let features = Features::from_bits_retain(1 << 40 | 1);
        assert_eq!(features.bits(), 1 << 40 | 1);
        assert_eq!(features.to_string(), "PAGEFAULT_FLAG_WP | 0x10000000000");
        assert_eq!(Features::empty().to_string(), "none");
    }
}
