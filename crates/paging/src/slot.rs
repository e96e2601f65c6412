//! Which source is in charge: read on every request, replaced when a source is lost.

#![allow(unsafe_code)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use crate::PageSource;

struct Entry {
    source: Arc<dyn PageSource>,
    generation: u64,
}

/// Lock-free to enter, so that a fault (and a signal handler) can.
pub(crate) struct SourceSlot {
    current: AtomicPtr<Entry>,
    users: AtomicUsize,
    generation: AtomicU64,
    /// The latest generation that is lost or was taken out of charge.
    ended: AtomicU64,
    /// Owns what `current` points to, and one that was lost until it is replaced.
    owned: Mutex<Option<Box<Entry>>>,
}

/// The right to call the current source. While it lives, the source is not replaced.
pub(crate) struct InUse<'a> {
    slot: &'a SourceSlot,
    entry: &'a Entry,
}

impl InUse<'_> {
    pub(crate) fn source(&self) -> &dyn PageSource {
        &*self.entry.source
    }

    pub(crate) fn generation(&self) -> u64 {
        self.entry.generation
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.slot.users.fetch_sub(1, SeqCst);
    }
}

impl SourceSlot {
    pub(crate) fn new() -> Self {
        Self {
            current: AtomicPtr::new(std::ptr::null_mut()),
            users: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            owned: Mutex::new(None),
        }
    }

    /// The source in charge; `None` while there is none.
    pub(crate) fn enter(&self) -> Option<InUse<'_>> {
        // SeqCst on both sides: either this thread's entry is seen by `vacate`, or it sees null.
        self.users.fetch_add(1, SeqCst);
        let entry = self.current.load(SeqCst);
        if entry.is_null() {
            self.users.fetch_sub(1, SeqCst);
            return None;
        }
        // SAFETY: `entry` came from the box in `owned`, which is dropped only by `vacate`, after
        // it has seen `users` at zero with `current` null; our count in `users` prevents that
        // until the `InUse` is dropped.
        let entry = unsafe { &*entry };
        Some(InUse { slot: self, entry })
    }

    /// Takes the source of `generation` out of charge, be it only about to be put there. Does not
    /// wait for its users. True for the first who says so of a source that was not replaced.
    pub(crate) fn lose(&self, generation: u64) -> bool {
        // SeqCst on both sides: either `install` sees that the source has ended, or we see it
        // in charge.
        let first = self.ended.fetch_max(generation, SeqCst) < generation;
        let entry = self.current.load(SeqCst);
        if !entry.is_null() && self.generation.load(SeqCst) == generation {
            // Failing means that it was taken out of charge by somebody else.
            let _ = self.current.compare_exchange(entry, std::ptr::null_mut(), SeqCst, SeqCst);
        }
        first
    }

    /// Takes whatever source there is out of charge, waits until nobody uses it, and returns it.
    pub(crate) fn vacate(&self) -> Option<Arc<dyn PageSource>> {
        let mut owned = self.owned.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.current.store(std::ptr::null_mut(), SeqCst);
        // That it closes its connections now is no loss.
        self.ended.fetch_max(self.generation.load(SeqCst), SeqCst);
        while self.users.load(SeqCst) != 0 {
            thread::yield_now();
        }
        owned.take().map(|entry| Arc::clone(&entry.source))
    }

    /// The generation that the next [`install`](Self::install) will give.
    pub(crate) fn next_generation(&self) -> u64 {
        self.generation.load(SeqCst) + 1
    }

    /// Puts a source in charge, unless it was lost before. The slot must be vacant.
    pub(crate) fn install(&self, source: Arc<dyn PageSource>) {
        let mut owned = self.owned.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let generation = self.generation.fetch_add(1, SeqCst) + 1;
        let entry = owned.insert(Box::new(Entry { source, generation }));
        self.current.store(&raw mut **entry, SeqCst);
        if self.ended.load(SeqCst) >= generation {
            self.current.store(std::ptr::null_mut(), SeqCst);
        }
    }
}
