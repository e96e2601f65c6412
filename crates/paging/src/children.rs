//! Memory that children made by `fork(2)` do not have (`MADV_DONTFORK`, madvise(2)).

#![allow(unsafe_code)]

use pageferry_memory::{Advice, HostRange, Mapping};

/// Ranges that are kept out of children until it is dropped.
#[derive(Default)]
pub(crate) struct KeptOut(Vec<HostRange>);

impl KeptOut {
    /// # Errors
    /// What madvise(2) answers; the mapping is as it was.
    pub(crate) fn add(&mut self, view: &Mapping) -> std::io::Result<()> {
        view.advise(view.range(), Advice::DontFork)?;
        self.0.push(view.range());
        Ok(())
    }

    /// What is kept out lies here now: some of it was moved or unmapped, and something of
    /// somebody else may be in its old place.
    pub(crate) fn moved_to(&mut self, ranges: impl Iterator<Item = HostRange>) {
        self.0 = ranges.collect();
    }
}

impl Drop for KeptOut {
    fn drop(&mut self) {
        for range in &self.0 {
            let (start, len) = (range.start().as_ptr().cast(), range.len() as usize);
            // SAFETY: changes what children will have, and nothing in this process. The range is
            // mapped: it belongs to a view that the owner of this value keeps alive.
            if unsafe { libc::madvise(start, len, libc::MADV_DOFORK) } != 0 {
                let error = std::io::Error::last_os_error();
                tracing::warn!("{range} stays out of forked children: {error}");
            }
        }
    }
}
