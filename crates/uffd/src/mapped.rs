//! The promise that memory stays mapped while somebody works on it.

use std::sync::Arc;

use crate::HostRange;

/// Owns, or keeps alive, a mapping of this process.
///
/// # Safety
///
/// As long as the value lives, the whole of [`range`](Self::range) stays mapped, in this process,
/// by the same mapping: it is not unmapped, moved, or replaced by another one, and `range` always
/// answers the same. Discarding pages (`madvise(MADV_DONTNEED)`, hole punching) is allowed.
///
/// The contents are nobody's Rust values: no reference to bytes of the range exists, they are
/// reached by raw pointers, and whoever reads them copes with any bytes, and with threads, other
/// processes or the kernel writing at the same time.
pub unsafe trait Mapped: Send + Sync {
    /// The addresses the mapping covers.
    fn range(&self) -> HostRange;
}

// SAFETY: the shared value lives at least as long as this reference to it.
unsafe impl<M: Mapped + ?Sized> Mapped for Arc<M> {
    fn range(&self) -> HostRange {
        (**self).range()
    }
}

// SAFETY: the borrowed value outlives the borrow, and cannot be changed through it.
unsafe impl<M: Mapped + ?Sized> Mapped for &M {
    fn range(&self) -> HostRange {
        (**self).range()
    }
}
