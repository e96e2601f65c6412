//! userfaultfd write protection, both kinds.

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use anyhow::Context as _;
use rustix::event::{EventfdFlags, eventfd};

use super::{
    super::case::{Contender, Found, Memory},
    sys,
};
use crate::bench::{
    case::PAGE,
    reference::sys::{self as uffd, Range},
};

fn range(memory: &Memory) -> Range {
    Range { start: memory.mapping.range().start().get(), len: memory.bytes }
}

/// The kernel lifts the protection and remembers; PAGEMAP_SCAN asks and protects again.
pub(in super::super) struct Asynchronous {
    range: Range,
    uffd: OwnedFd,
    scan: sys::Scan,
}

impl Asynchronous {
    pub(in super::super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        let scan = sys::Scan::new().context("/proc/self/pagemap")?;
        let features = sys::WP | sys::WP_HUGETLBFS_SHMEM | sys::WP_UNPOPULATED | sys::WP_ASYNC;
        let uffd = uffd::open(features).context("userfaultfd")?;
        Ok(Self { range: range(memory), uffd, scan })
    }
}

impl Contender for Asynchronous {
    fn arm(&mut self) -> anyhow::Result<()> {
        let fd = self.uffd.as_raw_fd();
        uffd::register(fd, self.range, sys::MODE_WP).context("UFFDIO_REGISTER")?;
        sys::write_protect(fd, self.range, true).context("UFFDIO_WRITEPROTECT")
    }

    fn harvest(&mut self, found: &mut Found) -> anyhow::Result<()> {
        let start = self.range.start;
        self.scan
            .written(self.range, |run| {
                found.mark((run.start - start) / PAGE as u64, run.len / PAGE as u64);
            })
            .context("PAGEMAP_SCAN")
    }

    fn disarm(&mut self) -> anyhow::Result<()> {
        uffd::unregister(self.uffd.as_raw_fd(), self.range).context("UFFDIO_UNREGISTER")
    }
}

/// A thread reads who writes, and lifts the protection.
pub(in super::super) struct Blocking {
    range: Range,
    uffd: Arc<OwnedFd>,
    armed: Option<Armed>,
}

struct Armed {
    stop: Arc<OwnedFd>,
    written: Arc<Mutex<Vec<u64>>>,
    reader: JoinHandle<anyhow::Result<()>>,
}

impl Blocking {
    pub(in super::super) fn new(memory: &Memory) -> anyhow::Result<Self> {
        let features = sys::WP | sys::WP_HUGETLBFS_SHMEM | sys::WP_UNPOPULATED;
        let uffd = uffd::open(features).context("userfaultfd")?;
        Ok(Self { range: range(memory), uffd: Arc::new(uffd), armed: None })
    }
}

impl Contender for Blocking {
    fn arm(&mut self) -> anyhow::Result<()> {
        let fd = Arc::clone(&self.uffd);
        uffd::register(fd.as_raw_fd(), self.range, sys::MODE_WP).context("UFFDIO_REGISTER")?;
        sys::write_protect(fd.as_raw_fd(), self.range, true).context("UFFDIO_WRITEPROTECT")?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).context("eventfd")?);
        let written: Arc<Mutex<Vec<u64>>> = Arc::default();
        let reader = std::thread::spawn({
            let (stop, written) = (Arc::clone(&stop), Arc::clone(&written));
            move || read(&fd, &stop, &written)
        });
        self.armed = Some(Armed { stop, written, reader });
        Ok(())
    }

    fn harvest(&mut self, found: &mut Found) -> anyhow::Result<()> {
        let armed = self.armed.as_ref().context("not armed")?;
        let mut written =
            std::mem::take(&mut *armed.written.lock().unwrap_or_else(PoisonError::into_inner));
        // Protecting costs by the call and by the page: neighbours go together.
        written.sort_unstable();
        written.dedup();
        for run in written.chunk_by(|a, b| a + PAGE as u64 == *b) {
            let (start, pages) = (run[0], run.len() as u64);
            found.mark((start - self.range.start) / PAGE as u64, pages);
            let run = Range { start, len: pages * PAGE as u64 };
            sys::write_protect(self.uffd.as_raw_fd(), run, true).context("UFFDIO_WRITEPROTECT")?;
        }
        Ok(())
    }

    fn disarm(&mut self) -> anyhow::Result<()> {
        let Some(armed) = self.armed.take() else { return Ok(()) };
        uffd::unregister(self.uffd.as_raw_fd(), self.range).context("UFFDIO_UNREGISTER")?;
        uffd::raise(armed.stop.as_raw_fd()).context("eventfd")?;
        armed.reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    }
}

fn read(fd: &OwnedFd, stop: &OwnedFd, written: &Mutex<Vec<u64>>) -> anyhow::Result<()> {
    let failed = std::io::Error::from_raw_os_error;
    let fd = fd.as_raw_fd();
    let mut messages = uffd::Messages::new(64);
    while uffd::wait(fd, stop.as_raw_fd()).map_err(failed).context("poll")? {
        for message in messages.read(fd).map_err(failed).context("userfaultfd")? {
            let start = message.address & !(PAGE as u64 - 1);
            written.lock().unwrap_or_else(PoisonError::into_inner).push(start);
            let page = Range { start, len: PAGE as u64 };
            sys::write_protect(fd, page, false).context("UFFDIO_WRITEPROTECT")?;
        }
    }
    Ok(())
}
