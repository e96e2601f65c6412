//! Huge pages for the time of a run.

use std::{fs, io};

use pageferry::memory::{HugePagePool, PageSize};

use crate::exit::Failure;

/// Pages added to a pool; taken out again on drop.
#[derive(Debug)]
pub(super) struct Reserved {
    size: PageSize,
    before: u64,
}

impl Reserved {
    /// Makes sure that `needed` pages of `size` are available, reserving what lacks. `None` when
    /// enough are.
    pub(super) fn new(size: PageSize, needed: u64) -> anyhow::Result<Option<Self>> {
        let lacking = |why: String| {
            let file = HugePagePool::control_file(size);
            Failure::missing(format!(
                "{needed} huge pages of {size} are needed, {why}; as root: echo N > {file}"
            ))
        };
        let pool = HugePagePool::read(size)
            .map_err(|error| lacking(format!("and this kernel has none of that size ({error})")))?;
        let Some(more) = needed.checked_sub(pool.available()).filter(|&more| more > 0) else {
            return Ok(None);
        };
        set(size, pool.total + more).map_err(|error| {
            lacking(format!("{} are free, and reserving more failed: {error}", pool.available()))
        })?;
        let reserved = Self { size, before: pool.total };
        // The kernel reserves as many as it can find, and says so only here.
        let now = HugePagePool::read(size)?;
        if now.available() < needed {
            let found = now.available();
            drop(reserved);
            return Err(lacking(format!("and memory for only {found} was found")).into());
        }
        Ok(Some(reserved))
    }
}

fn set(size: PageSize, pages: u64) -> io::Result<()> {
    fs::write(HugePagePool::control_file(size), pages.to_string())
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = set(self.size, self.before) {
            let file = HugePagePool::control_file(self.size);
            eprintln!("pageferry: {file} could not be set back to {}: {error}", self.before);
        }
    }
}
