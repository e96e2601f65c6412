//! The yardsticks: for each delivery the smallest loop around the same system calls, with a page
//! that is already at hand, as one would write it in C; and the loop of the manual page.
//!
//! Nothing here uses the library's own crates: what is measured against must not change with what
//! is measured. The loops have no page map, no source, no statistics and no events; an error ends
//! the run.

mod dispatch;
pub(super) mod queue;
mod signal;
pub(super) mod sys;

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    sync::atomic::{AtomicI32, Ordering},
};

use anyhow::{Context as _, bail};
use linux_raw_sys::general::{
    UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_SIGBUS,
    UFFD_FEATURE_THREAD_ID, UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING,
};

use self::sys::Range;
use super::{
    case::{Backing, Case, Contender, Delivery, Kind, Measurement, PAGE, split},
    guest,
    memory::Memory,
};
use crate::exit::Failure;

/// The smallest loop for each delivery.
#[derive(Debug)]
pub(crate) struct Raw;

/// One thread, one message per read(2), poll(2) before each: the example of userfaultfd(2). It
/// ignores the case's delivery.
#[derive(Debug)]
pub(crate) struct Reader;

impl Contender for Raw {
    fn name(&self) -> &str {
        "raw"
    }

    fn run(&mut self, case: &Case) -> anyhow::Result<Measurement> {
        measure(case, case.delivery, case.batch)
    }
}

impl Contender for Reader {
    fn name(&self) -> &str {
        "reader"
    }

    fn run(&mut self, case: &Case) -> anyhow::Result<Measurement> {
        measure(case, Delivery::Queue, 1)
    }
}

/// Makes one page present.
pub(super) trait Install: Sync {
    /// Installs the page at `address`, a page's start in the registered memory. Returns 0 or an errno.
    ///
    /// # Safety
    /// `address` is the start of a page of the memory this was made for, that memory is still
    /// mapped, and the userfaultfd `uffd` is open.
    unsafe fn install(&self, uffd: RawFd, address: u64, wake: bool) -> i32;
}

/// Installs the same page everywhere. Copied into every thread of a loop, as a C program would have
/// it in its registers.
#[derive(Copy, Clone, Debug)]
struct Installer {
    /// Where the fixed page is.
    page: *const u8,
    /// What to add to an address of the guest's view to get to the alias: CONTINUE if there is
    /// one, else COPY.
    to_alias: Option<isize>,
}

// SAFETY: the fixed page is only read, and outlives the threads that read it: every loop's
// threads are scoped inside `measure`, which owns the page.
unsafe impl Send for Installer {}
// SAFETY: as above.
unsafe impl Sync for Installer {}

impl Install for Installer {
    #[inline]
    unsafe fn install(&self, uffd: RawFd, address: u64, wake: bool) -> i32 {
        match self.to_alias {
            // SAFETY: the fixed page is PAGE bytes long and lives as long as the loops do.
            None => unsafe { sys::copy(uffd, address, self.page, PAGE as u64, wake) },
            Some(to_alias) => {
                // SAFETY: the alias is as long as the guest's view, so this is a page of it; the
                // fixed page lies elsewhere.
                unsafe {
                    let to = (address as *mut u8).wrapping_offset(to_alias);
                    std::ptr::copy_nonoverlapping(self.page, to, PAGE);
                    sys::make_present(uffd, address, PAGE as u64, wake)
                }
            }
        }
    }
}

/// What the threads of a loop share.
#[derive(Debug)]
pub(super) struct Loop<I> {
    installer: I,
    /// The parts of the memory that are registered, each with one userfaultfd.
    parts: Vec<Range>,
    /// Readable once the loop is to end.
    stop: OwnedFd,
    /// The first errno that a loop could not go on from, or 0.
    failed: AtomicI32,
}

impl<I: Install> Loop<I> {
    /// For the memory `parts`.
    pub(super) fn new(installer: I, parts: Vec<Range>) -> anyhow::Result<Self> {
        let stop = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .context("eventfd for the end of a loop")?;
        Ok(Self { installer, parts, stop, failed: AtomicI32::new(0) })
    }

    pub(super) fn installer(&self) -> &I {
        &self.installer
    }

    /// An error if the loop could not go on.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.failed.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Makes the page at `address` present and wakes its threads; notes what goes wrong, and then
    /// sends the waiting threads on by unregistering: they see zero pages, and the run fails.
    #[inline]
    pub(super) fn resolve(&self, uffd: RawFd, address: u64) {
        let address = address & !(PAGE as u64 - 1);
        // SAFETY: the kernel reports faults in registered memory only, which is what the installer
        // was made for; it and the userfaultfd outlive the loop's threads.
        match unsafe { self.installer.install(uffd, address, true) } {
            0 => {}
            errno => self.fail(uffd, errno),
        }
    }

    #[cold]
    pub(super) fn fail(&self, uffd: RawFd, errno: i32) {
        let _ = self.failed.compare_exchange(0, errno, Ordering::SeqCst, Ordering::SeqCst);
        // The kernel refuses the parts that are another userfaultfd's.
        let unregistered = self.parts.iter().filter(|part| sys::unregister(uffd, **part).is_ok());
        if unregistered.count() == 0 {
            // Guest threads may wait for ever, and nothing is left that would send them on.
            std::process::abort();
        }
    }
}

/// Sets up a loop for `delivery`, runs the guest against it, and ends it.
fn measure(case: &Case, delivery: Delivery, batch: usize) -> anyhow::Result<Measurement> {
    let memory = Memory::new(case)?;
    let page = guest::page_contents();
    let to_alias = match (case.kind, memory.alias()) {
        (Kind::Missing, _) => None,
        (Kind::Minor, Some(alias)) => Some(alias as isize - memory.guest() as isize),
        (Kind::Minor, None) => bail!("minor faults need a memfd, not {} memory", case.backing),
    };
    let range = Range { start: memory.guest() as u64, len: memory.len() as u64 };
    let parts = if delivery == Delivery::Sharded { case.workers.min(case.pages) } else { 1 };
    let part = |index| {
        let pages = split(case.pages, parts, index);
        let start = range.start + (pages.start * PAGE) as u64;
        Range { start, len: (pages.len() * PAGE) as u64 }
    };
    let installer = Installer { page: page.as_ptr(), to_alias };
    let shared = Loop::new(installer, (0..parts).map(part).collect())?;
    // SAFETY: `memory` is `case.bytes()` long, and lives to the end of this function.
    let guest = || unsafe { guest::run(memory.guest(), case) };
    let uffds = shared.parts.iter().map(|part| register(case, delivery, *part));
    let uffds = uffds.collect::<anyhow::Result<Vec<OwnedFd>>>()?;
    let fds: Vec<RawFd> = uffds.iter().map(|uffd| uffd.as_raw_fd()).collect();
    let measured = match delivery {
        Delivery::Queue | Delivery::Sharded => queue::serve(&shared, &fds, 1, batch, guest),
        Delivery::QueueN => queue::serve(&shared, &fds, case.workers, batch, guest),
        Delivery::ByThread => {
            dispatch::serve(&shared, fds[0], case.workers, batch, dispatch::By::Thread, guest)
        }
        Delivery::ByCpu => {
            dispatch::serve(&shared, fds[0], case.workers, batch, dispatch::By::Cpu, guest)
        }
        Delivery::Signal => signal::serve(&shared, range, fds[0], guest),
    };
    shared
        .check()
        .with_context(|| format!("installing a page ({delivery}, {} memory)", case.backing))?;
    measured
}

/// Opens a userfaultfd with what the case needs, and registers `range` with it.
fn register(case: &Case, delivery: Delivery, range: Range) -> anyhow::Result<OwnedFd> {
    let mut features = 0;
    let mode = match case.kind {
        Kind::Missing => UFFDIO_REGISTER_MODE_MISSING,
        Kind::Minor => UFFDIO_REGISTER_MODE_MINOR,
    };
    match (case.backing, case.kind) {
        (Backing::Anon, _) => {}
        (Backing::Memfd, Kind::Missing) => features |= UFFD_FEATURE_MISSING_SHMEM,
        (Backing::Memfd, Kind::Minor) => features |= UFFD_FEATURE_MINOR_SHMEM,
    }
    match delivery {
        Delivery::Signal => features |= UFFD_FEATURE_SIGBUS,
        Delivery::ByThread | Delivery::ByCpu => features |= UFFD_FEATURE_THREAD_ID,
        _ => {}
    }
    let uffd = sys::open(u64::from(features)).map_err(|error| {
        Failure::missing(format!(
            "no userfaultfd with features {features:#x}: {error} (`pageferry doctor` says more)"
        ))
    })?;
    sys::register(uffd.as_raw_fd(), range, u64::from(mode))
        .with_context(|| format!("registering {} memory for {} faults", case.backing, case.kind))?;
    Ok(uffd)
}

#[cfg(test)]
mod tests;
