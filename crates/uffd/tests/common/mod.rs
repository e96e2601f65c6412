//! Memory to try things on, and threads that touch it.
#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::{
    os::fd::{AsFd, OwnedFd},
    ptr,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use pageferry_uffd::{
    Errno, Event, EventBuffer, Fault, FaultKind, Features, HostAddress, HostRange, Mapped, OpenWay,
    Options, Userfaultfd,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::MemfdFlags,
    mm::{Advice, MapFlags, ProtFlags},
};

/// Longer than anything takes here that works, on a machine however busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What memory is of.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Backing {
    Anonymous,
    Memfd,
    Hugetlb2M,
}

pub(crate) const BACKINGS: [Backing; 3] = [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb2M];

/// A mapping, and for files a second one of the same memory, which is never registered.
#[derive(Debug)]
pub(crate) struct Memory {
    view: HostRange,
    alias: Option<HostRange>,
    page: u64,
    file: Option<OwnedFd>,
}

// SAFETY: mapped by `new` and unmapped by `drop`; tests that unmap or move memory themselves use
// `forget`. No references to its bytes are made that overlap with a change of them.
unsafe impl Mapped for Memory {
    fn range(&self) -> HostRange {
        self.view
    }
}

impl Memory {
    /// `None`, having said so, when the host lacks what it takes.
    pub(crate) fn new(backing: Backing, pages: u64) -> Option<Arc<Self>> {
        let page = match backing {
            Backing::Anonymous | Backing::Memfd => rustix::param::page_size() as u64,
            Backing::Hugetlb2M => 2 << 20,
        };
        let len = pages * page;
        let flags = match backing {
            Backing::Anonymous => {
                let view = map(None, len).unwrap();
                return Some(Arc::new(Self { view, alias: None, page, file: None }));
            }
            Backing::Memfd => MemfdFlags::CLOEXEC,
            Backing::Hugetlb2M => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let memory = (|| {
            let file = rustix::fs::memfd_create("pageferry-test", flags)?;
            rustix::fs::ftruncate(&file, len)?;
            let view = map(Some(&file), len)?;
            let alias = map(Some(&file), len)?;
            Ok(Arc::new(Self { view, alias: Some(alias), page, file: Some(file) }))
        })();
        match memory {
            Ok(memory) => Some(memory),
            Err(Errno::NOMEM | Errno::NODEV | Errno::NOENT) if backing == Backing::Hugetlb2M => {
                println!("skipped: needs {pages} free reserved huge pages of 2 MiB");
                None
            }
            Err(errno) => panic!("mapping {pages} pages of {backing:?}: {errno}"),
        }
    }

    pub(crate) fn page_size(&self) -> u64 {
        self.page
    }

    pub(crate) fn pages(&self, first: u64, count: u64) -> HostRange {
        let range = self.view.skip(first * self.page).take(count * self.page);
        assert_eq!(range.len(), count * self.page, "pages outside the memory");
        range
    }

    pub(crate) fn page(&self, index: u64) -> HostRange {
        self.pages(index, 1)
    }

    /// Reads the first byte of a page.
    pub(crate) fn read(&self, index: u64) -> u8 {
        // SAFETY: within the mapping.
        unsafe { self.page(index).start().as_ptr().read_volatile() }
    }

    /// Writes the first byte of a page.
    pub(crate) fn write(&self, index: u64, value: u8) {
        // SAFETY: within the mapping.
        unsafe { self.page(index).start().as_ptr().write_volatile(value) }
    }

    /// Writes the first byte of a page through the second mapping.
    pub(crate) fn write_alias(&self, index: u64, value: u8) {
        let alias = self.alias.expect("memory with a second mapping");
        // SAFETY: within the second mapping.
        unsafe { alias.skip(index * self.page).start().as_ptr().write_volatile(value) }
    }

    /// Has the kernel read the first byte of a page, so that a page that cannot be read is an
    /// error and not a signal.
    pub(crate) fn read_by_kernel(&self, index: u64) -> Result<u8, Errno> {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        // SAFETY: within the mapping; nothing writes to the page meanwhile.
        let source = unsafe { std::slice::from_raw_parts(self.page(index).start().as_ptr(), 1) };
        rustix::io::write(&writer, source)?;
        let mut byte = [0];
        assert_eq!(rustix::io::read(&reader, &mut byte), Ok(1));
        Ok(byte[0])
    }

    /// Discards a range (`MADV_DONTNEED`).
    pub(crate) fn discard(&self, range: HostRange) {
        advise(range, Advice::LinuxDontNeed).unwrap();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for range in [Some(self.view), self.alias].into_iter().flatten() {
            unmap(range);
        }
    }
}

pub(crate) fn map(file: Option<&OwnedFd>, len: u64) -> Result<HostRange, Errno> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping where the kernel finds room.
    let start = unsafe {
        match file {
            None => rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len as usize,
                protection,
                MapFlags::PRIVATE,
            ),
            Some(file) => rustix::mm::mmap(
                ptr::null_mut(),
                len as usize,
                protection,
                MapFlags::SHARED,
                file,
                0,
            ),
        }
    }?;
    let range = HostRange::new(HostAddress::from_ptr(start), len);
    match advise(range, Advice::LinuxNoHugepage) {
        Ok(()) | Err(Errno::INVAL) => Ok(range),
        Err(errno) => Err(errno),
    }
}

pub(crate) fn unmap(range: HostRange) {
    // SAFETY: only for mappings the tests made and nobody uses any more.
    unsafe { rustix::mm::munmap(range.start().as_ptr().cast(), range.len() as usize) }.unwrap();
}

pub(crate) fn advise(range: HostRange, advice: Advice) -> Result<(), Errno> {
    // SAFETY: only for mappings of the tests, whose contents are nobody's values.
    unsafe { rustix::mm::madvise(range.start().as_ptr().cast(), range.len() as usize, advice) }
}

/// Opens with these features. `None`, having said so, when the host lacks what it takes.
pub(crate) fn open(features: Features) -> Option<Arc<Userfaultfd>> {
    open_by(&OpenWay::ALL, features)
}

/// [`open`] for tests in which faults are taken inside the kernel.
pub(crate) fn open_full(features: Features) -> Option<Arc<Userfaultfd>> {
    open_by(&[OpenWay::DeviceNode, OpenWay::Syscall], features)
}

fn open_by(ways: &[OpenWay], features: Features) -> Option<Arc<Userfaultfd>> {
    match Options::new().ways(ways).required(features).open() {
        Ok(userfaultfd) => Some(Arc::new(userfaultfd)),
        Err(error) => {
            println!("skipped: needs userfaultfd with {features}: {error}");
            None
        }
    }
}

/// Bytes for a page: the first and the last tell pages apart.
pub(crate) fn contents(page_size: u64, pages: impl IntoIterator<Item = u8>) -> Vec<u8> {
    pages.into_iter().flat_map(|byte| std::iter::repeat_n(byte, page_size as usize)).collect()
}

/// A thread whose end is waited for with patience, so that a test of waking fails and does not
/// hang.
pub(crate) struct Running<T>(mpsc::Receiver<T>);

pub(crate) fn run<T: Send + 'static>(action: impl FnOnce() -> T + Send + 'static) -> Running<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // Nobody listens when the test has failed already.
        let _ = sender.send(action());
    });
    Running(receiver)
}

impl<T> Running<T> {
    pub(crate) fn finish(self) -> T {
        self.0.recv_timeout(PATIENCE).expect("the thread ends")
    }

    /// Whether it ends within a moment. Only for threads that must not; after a yes there is
    /// nothing left to finish.
    pub(crate) fn ends_soon(&self) -> bool {
        self.0.recv_timeout(Duration::from_millis(20)).is_ok()
    }
}

pub(crate) fn wait_readable(fd: impl AsFd) {
    let timeout = Timespec::try_from(PATIENCE).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1), "an event comes");
    assert_eq!(fds[0].revents(), PollFlags::IN);
}

/// Waits for just one event.
pub(crate) fn next_event(userfaultfd: &Userfaultfd) -> Event {
    next_event_in(&mut EventBuffer::new(8), userfaultfd)
}

/// [`next_event`], allocating nothing.
pub(crate) fn next_event_in(buffer: &mut EventBuffer, userfaultfd: &Userfaultfd) -> Event {
    wait_readable(userfaultfd);
    assert_eq!(userfaultfd.read_events(buffer), Ok(1));
    buffer.drain().next().unwrap().unwrap()
}

/// Waits for just one event, which is a fault of this kind in this range.
pub(crate) fn next_fault(userfaultfd: &Userfaultfd, kind: FaultKind, range: HostRange) -> Fault {
    match next_event(userfaultfd) {
        Event::Fault(fault) => {
            assert_eq!(fault.kind, kind);
            assert!(range.contains(fault.address), "{} is not in {range}", fault.address);
            fault
        }
        other => panic!("{other:?} where a fault was expected"),
    }
}
