//! Memory that bytes are received into when they cannot go straight to their place.
//!
//! Two pools of equal, page-aligned buffers in one anonymous mapping each, taken and returned
//! without locks or allocation, so that a signal handler can use them:
//! * [`Staging`]: COPY's source. Buffers keep their pages, the lowest free one is used first, so
//!   the working set stays in cache.
//! * [`Movable`]: pages that MOVE takes away, populated ahead of time by a thread of the pager:
//!   allocation happens off the fault path.

#![allow(unsafe_code)]

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    time::Duration,
};

use pageferry_memory::{Advice, HostRange, Mapping, MappingError};
use rustix::thread::futex;

/// At most 64 buffers: one bit each.
struct Pool {
    mapping: Mapping,
    buffer_len: u64,
    /// A set bit is a free buffer.
    free: AtomicU64,
    /// Counts returns, for those who wait for one.
    returned: AtomicU32,
    waiting: AtomicU32,
}

impl Pool {
    fn new(buffers: u32, buffer_len: u64, free: u64) -> Result<Self, MappingError> {
        assert!((1..=64).contains(&buffers));
        let mapping = Mapping::anonymous(buffer_len * u64::from(buffers))?;
        Ok(Self {
            mapping,
            buffer_len,
            free: AtomicU64::new(free),
            returned: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
        })
    }

    fn try_take(&self) -> Option<u32> {
        let mut free = self.free.load(Relaxed);
        while free != 0 {
            match self.free.compare_exchange_weak(free, free & (free - 1), Acquire, Relaxed) {
                Ok(_) => return Some(free.trailing_zeros()),
                Err(now) => free = now,
            }
        }
        None
    }

    /// Waits for a buffer: those who hold one make progress without us.
    fn take(&self) -> u32 {
        loop {
            if let Some(index) = self.try_take() {
                return index;
            }
            let returned = self.returned.load(SeqCst);
            self.waiting.fetch_add(1, SeqCst);
            let taken = self.try_take();
            if taken.is_none() {
                // Errors are EAGAIN (a buffer came back) and EINTR: look again in both cases.
                let _ = futex::wait(&self.returned, futex::Flags::PRIVATE, returned, None);
            }
            self.waiting.fetch_sub(1, SeqCst);
            if let Some(index) = taken {
                return index;
            }
        }
    }

    fn give_back(&self, index: u32) {
        self.free.fetch_or(1 << index, SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            self.returned.fetch_add(1, SeqCst);
            // Waking cannot fail on a valid address; the count of the woken is of no interest.
            let _ = futex::wake(&self.returned, futex::Flags::PRIVATE, 1);
        }
    }

    fn range(&self, index: u32) -> HostRange {
        let start = self.mapping.range().start();
        let offset = u64::from(index) * self.buffer_len;
        HostRange::new(
            start.checked_add(offset).expect("a buffer lies inside its mapping"),
            self.buffer_len,
        )
    }

    /// # Safety
    /// The caller holds buffer `index` (its bit is clear and it was the one to clear it) and keeps
    /// it while the slice lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn bytes(&self, index: u32) -> &mut [u8] {
        let range = self.range(index);
        // SAFETY: the range lies in a private anonymous mapping that lives as long as `self`, and
        // is exclusively the caller's; any byte pattern is a valid u8.
        unsafe { std::slice::from_raw_parts_mut(range.start().as_ptr(), range.len() as usize) }
    }
}

/// The buffers that COPY copies from.
pub(crate) struct Staging(Pool);

/// A staging buffer; returned on drop.
pub(crate) struct Staged<'a> {
    pool: &'a Pool,
    index: u32,
}

impl Staging {
    /// `granule` bytes is the least a buffer must hold.
    pub(crate) fn new(granule: u64) -> Result<Self, MappingError> {
        let buffer_len = granule.max(256 << 10);
        // Bounded by what is touched, not by what is mapped, except for gigantic granules.
        let buffers = (((64u64 << 20) / buffer_len).clamp(2, 64)) as u32;
        let all = if buffers == 64 { u64::MAX } else { (1 << buffers) - 1 };
        let pool = Pool::new(buffers, buffer_len, all)?;
        Ok(Self(pool))
    }

    pub(crate) fn buffer_len(&self) -> u64 {
        self.0.buffer_len
    }

    pub(crate) fn take(&self) -> Staged<'_> {
        Staged { pool: &self.0, index: self.0.take() }
    }
}

impl Staged<'_> {
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `self` holds the buffer, and lends it mutably only through `&mut self`.
        unsafe { self.pool.bytes(self.index) }
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        self.pool.give_back(self.index);
    }
}

/// Populated pages for MOVE.
pub(crate) struct Movable {
    pool: Pool,
    /// A set bit is a buffer whose pages were moved away.
    empty: AtomicU64,
    /// Bumped when a buffer becomes empty, to call the refiller.
    emptied: AtomicU32,
    refiller_waits: AtomicBool,
}

/// A buffer of populated pages. Dropping it hands it to the refiller.
pub(crate) struct MovablePages<'a> {
    owner: &'a Movable,
    index: u32,
}

impl Movable {
    pub(crate) const BUFFER: u64 = 256 << 10;
    const BUFFERS: u32 = 64;

    pub(crate) fn new() -> Result<Self, MappingError> {
        let pool = Pool::new(Self::BUFFERS, Self::BUFFER, 0)?;
        // MOVE takes only pages that no forked child shares.
        pool.mapping.advise(pool.mapping.range(), Advice::DontFork).map_err(|source| {
            MappingError::Map { what: "pages to move", len: pool.mapping.range().len(), source }
        })?;
        // MOVE takes whole pages; a huge page would have to be split first.
        if let Err(error) = pool.mapping.advise(pool.mapping.range(), Advice::NoHugePage) {
            // A kernel without huge pages says EINVAL, and has none to keep out.
            tracing::debug!("keeping huge pages out of the movable pages: {error}");
        }
        Ok(Self {
            pool,
            empty: AtomicU64::new(u64::MAX),
            emptied: AtomicU32::new(0),
            refiller_waits: AtomicBool::new(false),
        })
    }

    /// A populated buffer, if one is ready. Never waits: the caller can COPY instead.
    pub(crate) fn try_take(&self) -> Option<MovablePages<'_>> {
        self.pool.try_take().map(|index| MovablePages { owner: self, index })
    }

    /// Populates every emptied buffer; returns how many.
    pub(crate) fn refill(&self) -> io::Result<u32> {
        let mut refilled = 0;
        loop {
            let empty = self.empty.load(Acquire);
            if empty == 0 {
                return Ok(refilled);
            }
            let index = empty.trailing_zeros();
            self.empty.fetch_and(!(1 << index), AcqRel);
            if let Err(error) =
                self.pool.mapping.advise(self.pool.range(index), Advice::PopulateWrite)
            {
                self.empty.fetch_or(1 << index, Release);
                return Err(error);
            }
            self.pool.give_back(index);
            refilled += 1;
        }
    }

    /// Blocks the refiller until a buffer is empty, or for `timeout`.
    pub(crate) fn wait_for_empty(&self, timeout: Duration) {
        let seen = self.emptied.load(SeqCst);
        self.refiller_waits.store(true, SeqCst);
        if self.empty.load(SeqCst) == 0 {
            let timeout = futex::Timespec {
                tv_sec: timeout.as_secs() as i64,
                tv_nsec: i64::from(timeout.subsec_nanos()),
            };
            // Every outcome (woken, timed out, changed, interrupted) means: look again.
            let _ = futex::wait(&self.emptied, futex::Flags::PRIVATE, seen, Some(&timeout));
        }
        self.refiller_waits.store(false, SeqCst);
    }
}

impl MovablePages<'_> {
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `self` holds the buffer, and lends it mutably only through `&mut self`.
        unsafe { self.owner.pool.bytes(self.index) }
    }

    /// What is in them. Pages that were moved away read as zeros.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        // SAFETY: `self` holds the buffer, and lends it mutably only through `&mut self`.
        unsafe { self.owner.pool.bytes(self.index) }
    }

    /// Where the pages are. Whatever MOVE takes from here, the buffer is repopulated before it is
    /// lent again.
    pub(crate) fn range(&self) -> HostRange {
        self.owner.pool.range(self.index)
    }
}

impl Drop for MovablePages<'_> {
    fn drop(&mut self) {
        self.owner.empty.fetch_or(1 << self.index, SeqCst);
        if self.owner.refiller_waits.load(SeqCst) {
            self.owner.emptied.fetch_add(1, SeqCst);
            let _ = futex::wake(&self.owner.emptied, futex::Flags::PRIVATE, 1);
        }
    }
}
