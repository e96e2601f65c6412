//! Huge pages for the time of a run.

use std::{
    fs::{self, File},
    io,
};

use anyhow::Context as _;
use pageferry::memory::{HugePagePool, PageSize};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    io::{Errno, retry_on_intr},
};

use crate::{Context, exit::Failure};

/// Pages added to a pool; taken out again on drop.
#[derive(Debug)]
pub(super) struct Reserved {
    size: PageSize,
    added: u64,
    /// Keeps others of us from counting on the same pages until they are mapped.
    lock: Option<File>,
}

impl Reserved {
    /// Makes sure that `needed` pages of `size` are available, reserving what lacks.
    ///
    /// # Errors
    /// When there are not so many to be had, or a signal comes while others of us reserve theirs.
    pub(super) fn new(size: PageSize, needed: u64, context: &Context) -> anyhow::Result<Self> {
        let control = HugePagePool::control_file(size);
        let lacking = |why: String| {
            Failure::missing(format!(
                "{needed} huge pages of {size} are needed, {why}; as root: echo N > {control}"
            ))
        };
        let file = File::open(&control)
            .map_err(|error| lacking(format!("and this kernel has none of that size ({error})")))?;
        let lock = lock_unless_stopped(file, context)?;
        let mut reserved = Self { size, added: 0, lock: Some(lock) };
        let pool = HugePagePool::read(size)?;
        let Some(more) = needed.checked_sub(pool.available()).filter(|&more| more > 0) else {
            return Ok(reserved);
        };
        fs::write(&control, (pool.total + more).to_string()).map_err(|error| {
            lacking(format!("{} are free, and reserving more failed: {error}", pool.available()))
        })?;
        reserved.added = more;
        // The kernel reserves as many as it can find, and says so only here.
        let found = HugePagePool::read(size)?.available();
        if found < needed {
            return Err(lacking(format!("and memory for only {found} was found")).into());
        }
        Ok(reserved)
    }

    /// The pages are mapped: others may count those that are left.
    pub(super) fn mapped(&mut self) {
        self.lock = None;
    }

    /// What was added is taken out, whoever else has changed the pool in between.
    fn give_back(&mut self) -> io::Result<()> {
        let control = HugePagePool::control_file(self.size);
        let _lock = match self.lock.take() {
            Some(lock) => lock,
            None => lock(&control)?,
        };
        let total = HugePagePool::read(self.size)?.total;
        fs::write(control, total.saturating_sub(self.added).to_string())
    }
}

/// How often a lock that somebody else has is tried.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// As [`lock`], but for a signal that asks to stop.
fn lock_unless_stopped(file: File, context: &Context) -> anyhow::Result<File> {
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(error) => return Err(error).context("locking the pool of huge pages"),
        }
        context.stop_if_asked()?;
        let mut fds = [PollFd::new(&context.signals, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, Some(&TICK))).context("waiting for huge pages")?;
    }
}

/// An exclusive lock on the pool, among those who ask for one.
fn lock(control: &str) -> io::Result<File> {
    let file = File::open(control)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.added > 0
            && let Err(error) = self.give_back()
        {
            let control = HugePagePool::control_file(self.size);
            eprintln!("pageferry: {} pages stay reserved in {control}: {error}", self.added);
        }
    }
}
