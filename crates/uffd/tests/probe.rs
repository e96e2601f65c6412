//! The probe ends, and finds what trying by hand finds.

mod common;

use std::{
    collections::HashSet,
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{Backing, Memory, Running, contents, map, run, unmap};
use pageferry_uffd::{
    ClearRefs, CopyMode, Errno, Event, EventBuffer, Fault, FaultKind, Features, HostRange, Mapped,
    MoveMode, OpenWay, Options, PageCategories, PageRegion, Pagemap, PagemapEntry, RegisterMode,
    Registration, ScanRequest, Userfaultfd, Wake, clear_refs,
    probe::{Probe, Status, probe},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    mm::MremapFlags,
};

/// A fork waits for the readers of all userfaultfds of the process that follow forks, and a reader
/// that allocates meanwhile waits for the fork.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn the_probe_tries_everything_and_ends() {
    let _alone = ALONE.lock();
    let probe = probe();
    let ids: HashSet<_> = probe.findings.iter().map(|finding| finding.id).collect();
    assert_eq!(ids.len(), probe.findings.len(), "names are unique");
    let opened = Options::new().open();
    assert_eq!(probe.opened_by, opened.as_ref().map(|uffd| uffd.negotiated().opened_by).ok());
    assert_eq!(probe.features, opened.as_ref().map(|uffd| uffd.negotiated().available).ok());
    for finding in &probe.findings {
        if let Status::Missing { reason } | Status::Untested { reason } = &finding.status {
            assert!(!reason.is_empty(), "{}", finding.id);
        }
    }
    if opened.is_err() {
        println!("skipped: needs userfaultfd");
        return;
    }
    // What every kernel with userfaultfd has had from the start.
    for id in ["missing.anonymous", "zeropage", "dont-wake"] {
        assert!(probe.works(id), "{:?}", probe.find(id));
    }
}

/// `None` for what did not work: that is to be compared, not to be reported.
type Done = Option<()>;

fn yes(is_so: bool) -> Done {
    is_so.then_some(())
}

fn open(features: Features) -> Option<Arc<Userfaultfd>> {
    Options::new().required(features).open().ok().map(Arc::new)
}

fn opens_by(way: OpenWay) -> Done {
    Options::new().ways([way]).open().ok().map(drop)
}

/// Registered memory of two pages, or of one huge page.
struct Trial {
    memory: Arc<Memory>,
    registration: Registration<Arc<Memory>>,
}

impl Trial {
    fn new(features: Features, backing: Backing, mode: RegisterMode) -> Option<Self> {
        Self::on(open(features)?, backing, mode)
    }

    fn on(uffd: Arc<Userfaultfd>, backing: Backing, mode: RegisterMode) -> Option<Self> {
        let memory = Memory::new(backing, if backing == Backing::Hugetlb2M { 1 } else { 2 })?;
        Self::of(uffd, memory, mode)
    }

    fn of(uffd: Arc<Userfaultfd>, memory: Arc<Memory>, mode: RegisterMode) -> Option<Self> {
        let registration = uffd.register(Arc::clone(&memory), memory.range(), mode).ok()?;
        Some(Self { memory, registration })
    }

    fn missing(features: Features) -> Option<Self> {
        Self::new(features, Backing::Anonymous, RegisterMode::MISSING)
    }

    fn uffd(&self) -> &Userfaultfd {
        self.registration.uffd()
    }

    /// Starts `action`, and waits for the fault it raises in the first page.
    fn fault<T: Send + 'static>(
        &self,
        kind: FaultKind,
        action: impl FnOnce(&Memory) -> T + Send + 'static,
    ) -> Option<(Fault, Running<T>)> {
        let memory = Arc::clone(&self.memory);
        let thread = run(move || action(&memory));
        match event(self.uffd())? {
            Event::Fault(fault)
                if fault.kind == kind && self.memory.page(0).contains(fault.address) =>
            {
                Some((fault, thread))
            }
            _ => None,
        }
    }

    fn copy(&self, mode: CopyMode) -> Done {
        let page = self.memory.page(0);
        let bytes = contents(page.len(), [0x5a]);
        yes(self.uffd().copy(page.start(), &bytes, mode).ok()?.is_complete())
    }

    fn protect(&self, protected: bool) -> Done {
        let page = self.memory.page(0);
        yes(self.uffd().write_protect(page, protected, Wake::Yes).ok()?.is_complete())
    }
}

/// The next event, if one comes.
fn event(uffd: &Userfaultfd) -> Option<Event> {
    event_in(&mut EventBuffer::new(1), uffd)
}

/// [`event`], allocating nothing.
fn event_in(buffer: &mut EventBuffer, uffd: &Userfaultfd) -> Option<Event> {
    let patience = Timespec::try_from(Duration::from_secs(10)).unwrap();
    let mut fds = [PollFd::new(uffd, PollFlags::IN)];
    if rustix::event::poll(&mut fds, Some(&patience)) != Ok(1) {
        return None;
    }
    uffd.read_events(buffer).ok()?;
    buffer.drain().next()?.ok()
}

fn serve_missing(features: Features, backing: Backing) -> Done {
    let trial = Trial::new(features, backing, RegisterMode::MISSING)?;
    let (_, thread) = trial.fault(FaultKind::Missing, |memory| memory.read(0))?;
    trial.copy(CopyMode::WAKE)?;
    yes(thread.finish() == 0x5a)
}

fn serve_minor(features: Features, backing: Backing) -> Done {
    let trial = Trial::new(features, backing, RegisterMode::MINOR)?;
    trial.memory.write_alias(0, 0x5a);
    let (_, thread) = trial.fault(FaultKind::Minor, |memory| memory.read(0))?;
    let page = trial.memory.page(0);
    yes(trial.uffd().continue_range(page, CopyMode::WAKE).ok()?.is_complete())?;
    yes(thread.finish() == 0x5a)
}

fn kernel_fault() -> Done {
    let uffd = Options::new().ways([OpenWay::DeviceNode, OpenWay::Syscall]).open().ok()?;
    let trial = Trial::on(Arc::new(uffd), Backing::Anonymous, RegisterMode::MISSING)?;
    let (_, thread) = trial.fault(FaultKind::Missing, |memory| memory.read_by_kernel(0))?;
    trial.copy(CopyMode::WAKE)?;
    yes(thread.finish() == Ok(0x5a))
}

fn zeropage() -> Done {
    let trial = Trial::missing(Features::empty())?;
    let (_, thread) = trial.fault(FaultKind::Missing, |memory| memory.read(0))?;
    yes(trial.uffd().zeropage(trial.memory.page(0), Wake::Yes).ok()?.is_complete())?;
    yes(thread.finish() == 0)
}

fn dont_wake() -> Done {
    let trial = Trial::missing(Features::empty())?;
    let (_, thread) = trial.fault(FaultKind::Missing, |memory| memory.read(0))?;
    trial.copy(CopyMode::NO_WAKE)?;
    yes(!thread.ends_soon())?;
    trial.uffd().wake(trial.memory.page(0)).ok()?;
    yes(thread.finish() == 0x5a)
}

fn poison() -> Done {
    let trial = Trial::missing(Features::POISON)?;
    yes(trial.uffd().poison(trial.memory.page(0), Wake::Yes).ok()?.is_complete())?;
    // On a thread, as it would wait if the page was just absent.
    let memory = Arc::clone(&trial.memory);
    let thread = run(move || memory.read_by_kernel(0));
    yes(matches!(thread.finish(), Err(Errno::FAULT | Errno::HWPOISON)))?;
    trial.copy(CopyMode::WAKE)?;
    yes(trial.memory.read(0) == 0x5a)
}

fn move_pages() -> Done {
    let trial = Trial::missing(Features::MOVE)?;
    let source = Memory::new(Backing::Anonymous, 1)?;
    source.write(0, 0x5a);
    let to = trial.memory.page(0).start();
    let complete = (0..1000).any(|_| {
        // SAFETY: the contents of both are nobody's values.
        let moved = unsafe { trial.uffd().move_pages(to, source.range(), MoveMode::default()) };
        moved.is_ok_and(|outcome| outcome.is_complete())
    });
    yes(complete && trial.memory.read(0) == 0x5a)
}

fn sigbus() -> Done {
    let trial = Trial::missing(Features::SIGBUS)?;
    let memory = Arc::clone(&trial.memory);
    yes(run(move || memory.read_by_kernel(0)).finish() == Err(Errno::FAULT))
}

fn thread_id() -> Done {
    let trial = Trial::missing(Features::THREAD_ID)?;
    let (fault, thread) = trial.fault(FaultKind::Missing, |memory| {
        memory.read(0);
        rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
    })?;
    trial.copy(CopyMode::WAKE)?;
    yes(fault.thread == Some(thread.finish()))
}

fn exact_address() -> Done {
    let trial = Trial::missing(Features::EXACT_ADDRESS)?;
    let address = trial.memory.range().skip(0x1234 % trial.memory.page_size()).start();
    let (fault, thread) = trial.fault(FaultKind::Missing, move |_| {
        // SAFETY: within the memory of the trial, which the thread keeps mapped.
        unsafe { address.as_ptr().read_volatile() }
    })?;
    trial.copy(CopyMode::WAKE)?;
    thread.finish();
    yes(fault.address == address)
}

fn write_protect(features: Features, backing: Backing, populated: bool) -> Done {
    let uffd = open(Features::PAGEFAULT_FLAG_WP | features)?;
    let trial = Trial::on(uffd, backing, RegisterMode::WP)?;
    if populated {
        trial.memory.write(0, 1);
    }
    trial.protect(true)?;
    let (fault, thread) = trial.fault(FaultKind::WriteProtect, |memory| memory.write(0, 2))?;
    trial.protect(false)?;
    thread.finish();
    yes(fault.write && trial.memory.read(0) == 2)
}

fn scan(request: &ScanRequest) -> Option<Vec<HostRange>> {
    let mut regions = [PageRegion::default(); 4];
    let result = Pagemap::open_self().ok()?.scan(request, &mut regions).ok()?;
    Some(regions[..result.regions].iter().map(PageRegion::range).collect())
}

fn wp_async() -> Done {
    let trial = Trial::new(Features::WP_ASYNC, Backing::Anonymous, RegisterMode::WP)?;
    let range = trial.memory.range();
    yes(trial.uffd().write_protect(range, true, Wake::Yes).ok()?.is_complete())?;
    let harvest = ScanRequest::written(range, true);
    for _ in 0..2 {
        trial.memory.write(1, 1);
        yes(scan(&harvest)? == [trial.memory.page(1)])?;
        yes(scan(&harvest)?.is_empty())?;
    }
    Some(())
}

/// Of two pages the second was written.
fn second_written() -> Option<(Arc<Memory>, [PagemapEntry; 2])> {
    let memory = Memory::new(Backing::Anonymous, 2)?;
    memory.write(1, 1);
    let entries = entries_of(&memory)?;
    Some((memory, entries))
}

fn entries_of(memory: &Memory) -> Option<[PagemapEntry; 2]> {
    let mut entries = [PagemapEntry::default(); 2];
    let count = Pagemap::open_self().ok()?.read_entries(memory.range(), &mut entries).ok()?;
    (count == 2).then_some(entries)
}

fn pagemap() -> Done {
    let (_memory, entries) = second_written()?;
    yes(entries.map(PagemapEntry::present) == [false, true])
}

fn pagemap_scan() -> Done {
    let (memory, _) = second_written()?;
    let request = ScanRequest::having(memory.range(), PageCategories::PRESENT);
    yes(scan(&request)? == [memory.page(1)])
}

fn soft_dirty() -> Done {
    let (memory, _) = second_written()?;
    clear_refs(std::process::id(), ClearRefs::SoftDirty).ok()?;
    yes(!entries_of(&memory)?[1].soft_dirty())?;
    memory.write(1, 2);
    yes(entries_of(&memory)?[1].soft_dirty())
}

fn event_remove() -> Done {
    let trial = Trial::missing(Features::EVENT_REMOVE)?;
    let memory = Arc::clone(&trial.memory);
    let thread = run(move || memory.discard(memory.page(1)));
    let seen = event(trial.uffd())?;
    thread.finish();
    yes(matches!(seen, Event::Remove(range) if range == trial.memory.page(1)))
}

/// A mapping of one page that can be moved and unmapped.
fn registered_range(features: Features) -> Option<(Arc<Userfaultfd>, HostRange)> {
    let uffd = open(features)?;
    let range = map(None, rustix::param::page_size() as u64).unwrap();
    // SAFETY: a mapping of the trial, whose contents are nobody's values.
    match unsafe { uffd.register_raw(range, RegisterMode::MISSING) } {
        Ok(_) => Some((uffd, range)),
        Err(_) => {
            unmap(range);
            None
        }
    }
}

fn event_remap() -> Done {
    let (uffd, range) = registered_range(Features::EVENT_REMAP)?;
    let target = map(None, range.len()).unwrap();
    let thread = run(move || {
        let len = range.len() as usize;
        let (old, new) = (range.start().as_ptr().cast(), target.start().as_ptr().cast());
        // SAFETY: both are mappings of the trial, which nobody uses meanwhile.
        unsafe { rustix::mm::mremap_fixed(old, len, len, MremapFlags::MAYMOVE, new) }.is_ok()
    });
    let seen = event(&uffd);
    assert!(thread.finish());
    unmap(target);
    yes(matches!(seen?, Event::Remap { from, to, len }
        if (from, to, len) == (range.start(), target.start(), range.len())))
}

fn event_unmap() -> Done {
    let (uffd, range) = registered_range(Features::EVENT_UNMAP)?;
    let thread = run(move || unmap(range));
    let seen = event(&uffd);
    thread.finish();
    yes(matches!(seen?, Event::Unmap(unmapped) if unmapped == range))
}

/// The child waits for its page, which is served to it by its own userfaultfd.
fn event_fork() -> Done {
    let trial = Trial::missing(Features::EVENT_FORK)?;
    let memory = Arc::clone(&trial.memory);
    let (go, start_forking) = rustix::pipe::pipe().unwrap();
    let mut buffer = EventBuffer::new(1);
    let thread = run(move || {
        assert_eq!(rustix::io::read(&go, &mut [0_u8]), Ok(1));
        // SAFETY: the child touches memory that is mapped and exits, and calls nothing that takes
        // a lock another thread may have held.
        match unsafe { libc::fork() } {
            0 => {
                let byte = memory.read(0);
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(i32::from(byte)) }
            }
            pid => pid,
        }
    });
    // Until the event is read, nothing here may allocate or free: see `Event::Fork`.
    assert_eq!(rustix::io::write(&start_forking, &[1]), Ok(1));
    let seen = event_in(&mut buffer, trial.uffd());
    let Some(Event::Fork { uffd }) = seen else { return None };
    let enabled = trial.uffd().negotiated().enabled;
    let child = Userfaultfd::from_received_fd(uffd, enabled, OpenWay::Syscall).ok()?;
    let page = trial.memory.page(0);
    yes(matches!(event(&child)?, Event::Fault(fault) if page.contains(fault.address)))?;
    let bytes = contents(page.len(), [0x5a]);
    yes(child.copy(page.start(), &bytes, CopyMode::WAKE).ok()?.is_complete())?;
    let mut status = 0;
    // SAFETY: waits for the child made above.
    unsafe { libc::waitpid(thread.finish(), &raw mut status, 0) };
    yes(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0x5a)
}

/// What is done by hand for each finding.
fn by_hand(id: &str) -> Done {
    use Backing::{Anonymous, Hugetlb2M, Memfd};

    let none = Features::empty();
    match id {
        "open.device" => opens_by(OpenWay::DeviceNode),
        "open.syscall" => opens_by(OpenWay::Syscall),
        "open.user-mode-only" => opens_by(OpenWay::SyscallUserModeOnly),
        "missing.anonymous" => serve_missing(none, Anonymous),
        "missing.memfd" => serve_missing(Features::MISSING_SHMEM, Memfd),
        "missing.hugetlb-2m" => serve_missing(Features::MISSING_HUGETLBFS, Hugetlb2M),
        "minor.memfd" => serve_minor(Features::MINOR_SHMEM, Memfd),
        "minor.hugetlb-2m" => serve_minor(Features::MINOR_HUGETLBFS, Hugetlb2M),
        "kernel-faults" => kernel_fault(),
        "zeropage" => zeropage(),
        "dont-wake" => dont_wake(),
        "poison" => poison(),
        "move" => move_pages(),
        "sigbus" => sigbus(),
        "thread-id" => thread_id(),
        "exact-address" => exact_address(),
        "wp.anonymous" => write_protect(none, Anonymous, true),
        "wp.memfd" => write_protect(Features::WP_HUGETLBFS_SHMEM, Memfd, true),
        "wp.hugetlb-2m" => write_protect(Features::WP_HUGETLBFS_SHMEM, Hugetlb2M, true),
        "wp.unpopulated" => write_protect(Features::WP_UNPOPULATED, Anonymous, false),
        "wp.async" => wp_async(),
        "pagemap" => pagemap(),
        "pagemap-scan" => pagemap_scan(),
        "soft-dirty" => soft_dirty(),
        "event.remove" => event_remove(),
        "event.remap" => event_remap(),
        "event.unmap" => event_unmap(),
        "event.fork" => event_fork(),
        other => panic!("{other} is not tried by hand"),
    }
}

/// Huge pages that a new mapping could have.
fn free_huge_pages() -> u64 {
    let number = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}_hugepages");
        fs::read_to_string(path).map_or(0, |text| text.trim().parse::<u64>().unwrap())
    };
    number("free").saturating_sub(number("resv"))
}

fn compare(probe: &Probe, huge: bool) {
    for finding in probe.findings.iter().filter(|finding| finding.id.contains("huge") == huge) {
        let done = by_hand(finding.id).is_some();
        assert_eq!(finding.status == Status::Works, done, "{finding:?}");
        // Whatever is needed to try it is there.
        assert!(!matches!(finding.status, Status::Untested { .. }), "{finding:?}");
    }
}

#[test]
fn each_finding_is_what_doing_it_shows() {
    let _alone = ALONE.lock();
    compare(&probe(), false);
}

#[test]
fn findings_on_huge_pages_are_what_doing_it_shows() {
    let _alone = ALONE.lock();
    let before = free_huge_pages();
    let probe = probe();
    if before.min(free_huge_pages()) < 2 {
        println!("skipped: needs 2 free huge pages of 2 MiB, there are {before}");
        return;
    }
    compare(&probe, true);
}
