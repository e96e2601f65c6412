//! Huge pages for the time of a run, however it ends: a process beside it, the keeper, gives them back
//! when this one was killed before it could.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use pageferry::memory::{HugePagePool, PageSize};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    io::{Errno, retry_on_intr},
};

use crate::{
    Context,
    exit::{Exit, Failure},
};

/// Pages added to a pool; taken out again on drop.
#[derive(Debug)]
pub(super) struct Reserved {
    size: PageSize,
    added: u64,
    /// Keeps others of us from counting on the same pages until they are mapped.
    lock: Option<File>,
    keeper: Option<Child>,
}

/// Gives huge pages back when `pageferry demo` could not
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// In bytes.
    #[arg(long)]
    page_size: u64,
    #[arg(long)]
    pages: u64,
}

/// What is written to the keeper once there is nothing for it to do.
const DONE: &[u8] = b".";

/// Waits for the end of whoever started it, which is the end of standard input. Signals to the whole
/// group of processes are for that one.
pub(crate) fn keep(args: &Args) -> anyhow::Result<Exit> {
    let mut said = Vec::new();
    io::stdin().read_to_end(&mut said).context("waiting for the demo's end")?;
    if said == DONE {
        return Ok(Exit::Success);
    }
    let size = PageSize::try_new(args.page_size).context("no size of a page")?;
    take_out(size, args.pages).context("giving huge pages back")?;
    Ok(Exit::Success)
}

/// Makes the pool smaller, whoever else has changed it in between.
fn take_out(size: PageSize, pages: u64) -> io::Result<()> {
    let control = HugePagePool::control_file(size);
    let _lock = lock(&control)?;
    let total = HugePagePool::read(size)?.total;
    fs::write(control, total.saturating_sub(pages).to_string())
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
        let mut reserved = Self { size, added: 0, lock: Some(lock), keeper: None };
        let pool = HugePagePool::read(size)?;
        let Some(more) = needed.checked_sub(pool.available()).filter(|&more| more > 0) else {
            return Ok(reserved);
        };
        fs::write(&control, (pool.total + more).to_string()).map_err(|error| {
            lacking(format!("{} are free, and reserving more failed: {error}", pool.available()))
        })?;
        reserved.added = more;
        reserved.keeper = Some(start_keeper(size, more)?);
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
}

fn start_keeper(size: PageSize, pages: u64) -> anyhow::Result<Child> {
    let myself = std::env::current_exe().context("finding this program to start the keeper")?;
    Command::new(&myself)
        .arg("demo-keeper")
        .args(["--page-size", &size.bytes().to_string()])
        .args(["--pages", &pages.to_string()])
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {} to keep huge pages", myself.display()))
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
        // It would wait for itself.
        self.lock = None;
        if self.added > 0
            && let Err(error) = take_out(self.size, self.added)
        {
            let control = HugePagePool::control_file(self.size);
            eprintln!("pageferry: {} pages stay reserved in {control}: {error}", self.added);
        }
        if let Some(mut keeper) = self.keeper.take() {
            // One that is gone has nothing to do either.
            let _ = keeper.stdin.take().map(|mut stdin| stdin.write_all(DONE));
            let _ = keeper.wait();
        }
    }
}
