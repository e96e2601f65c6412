//! Delivery by exits, without a KVM: what leaves KVM_RUN there is here an access by the kernel that
//! fails on a mark instead of waiting, and the thread that made it then asks for the page.

mod common;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    thread,
    time::Duration,
};

use common::*;
use pageferry_memory::{
    Advice, Backing, HostAddress, HostRange, Layout, Region, RegionConfig, State,
};
use pageferry_paging::{
    Delivery, Events, InstallMethod, Pager, Prefetch, Resolved, StartError, Status,
};
use pageferry_uffd::{Pagemap, PagemapEntry};

const PAGES: u64 = 256;
const PAGE: u64 = 4096;

/// How KVM gets at the memory.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Setup {
    OneView(Backing),
    OwnView(Backing),
}

impl Setup {
    /// What there is, and the huge pages for it, to be kept for so long.
    fn all() -> (Vec<Self>, Option<HugePages>) {
        let mut setups = vec![
            Self::OneView(Backing::Anonymous),
            Self::OneView(Backing::Memfd),
            Self::OwnView(Backing::Memfd),
        ];
        let pages = HugePages::reserve(8);
        if pages.is_some() {
            setups.extend([Self::OneView(HUGE), Self::OwnView(HUGE)]);
        }
        (setups, pages)
    }

    fn layout(self) -> Layout {
        let (backing, vcpu_view) = match self {
            Self::OneView(backing) => (backing, false),
            Self::OwnView(backing) => (backing, true),
        };
        let len = if backing == HUGE { 8 << 21 } else { PAGES << 12 };
        let config = RegionConfig { vcpu_view, ..RegionConfig::new(len, backing) };
        Layout::new(vec![Arc::new(Region::new(&config).unwrap())]).unwrap()
    }
}

/// Makes accesses as KVM does: in the kernel, where a mark is an error and not a wait.
struct Vcpu {
    pipe: (OwnedFd, OwnedFd),
    view: HostRange,
}

impl Vcpu {
    fn of(pager: &Pager) -> Self {
        let pipe = rustix::pipe::pipe().unwrap();
        Self { pipe, view: pager.layout().get(REGION).unwrap().kvm_view().range() }
    }

    fn address(&self, offset: u64) -> HostAddress {
        self.view.start().checked_add(offset).unwrap()
    }

    /// The word at `offset`, or nothing if it cannot be read.
    fn read(&self, offset: u64) -> Option<u64> {
        let from = self.address(offset).as_ptr().cast();
        // SAFETY: the kernel reads 8 bytes of the view, which is mapped as long as the pager lives.
        let written = unsafe { libc::write(self.pipe.1.as_raw_fd(), from, 8) };
        if written < 0 {
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
            return None;
        }
        let mut word = [0; 8];
        assert_eq!((written, rustix::io::read(&self.pipe.0, &mut word).unwrap()), (8, 8));
        Some(u64::from_ne_bytes(word))
    }

    /// As a vCPU does it: reads, leaves, asks, reads again. Returns how often it had to leave.
    fn run(&self, pager: &Pager, offset: u64) -> Result<(u64, u32), Resolved> {
        for exits in 0..10 {
            if let Some(word) = self.read(offset) {
                return Ok((word, exits));
            }
            match pager.resolve_exit(self.address(offset), &mut || false) {
                Resolved::Present => {}
                other => return Err(other),
            }
        }
        panic!("the page at {offset:#x} is there, and is not");
    }
}

fn start(setup: Setup, delivery: Delivery, events: Events, source: Arc<Pattern>) -> Pager {
    Pager::builder(setup.layout())
        .delivery(delivery)
        .events(events)
        .prefetch(Prefetch::NONE)
        .start(source)
        .unwrap()
}

fn step(pager: &Pager) -> u64 {
    pager.layout().get(REGION).unwrap().granule().bytes()
}

#[test]
fn every_page_once_and_right() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        for delivery in [Delivery::Exit, Delivery::Hybrid(2)] {
            for events in [Events::Watch, Events::Ignore] {
                for threaded in [false, true] {
                    let case = format!("{setup:?} {delivery} {events:?} {threaded}");
                    let source = Pattern { threaded, zero_every: Some(7), ..Pattern::default() };
                    let source = Arc::new(source);
                    let pager = start(setup, delivery, events, Arc::clone(&source));
                    assert!(pager.delivers_exits(), "{case}");
                    let (vcpu, step) = (Vcpu::of(&pager), step(&pager));
                    let granules = pager.layout().get(REGION).unwrap().granules();
                    for granule in shuffled(granules, 1) {
                        let zero = granule.is_multiple_of(7);
                        for offset in [granule * step, (granule + 1) * step - 8] {
                            let (got, exits) = vcpu.run(&pager, offset).unwrap();
                            let want = if zero { 0 } else { word(REGION, offset) };
                            assert_eq!(got, want, "{case}: {offset:#x}");
                            // One exit for the first word of a page, none for its last.
                            assert_eq!(exits == 0, offset % step != 0, "{case}: {offset:#x}");
                        }
                    }
                    assert_eq!(source.requests(), granules, "{case}");
                    let status = pager.wait_complete(PATIENCE);
                    assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
                    assert!(!pager.delivers_exits(), "{case}: all is there");
                    let counts = pager.statistics().counts;
                    assert_eq!((counts.faults, counts.installed), (granules, granules), "{case}");
                }
            }
        }
    }
}

/// vCPUs by exits on their own view, everybody else by the queue on the guest view, all on the
/// same pages at the same time.
#[test]
fn vcpus_and_others_race_for_the_same_pages() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups.into_iter().filter(|setup| matches!(setup, Setup::OwnView(_))) {
        for (threaded, events) in
            [(false, Events::Watch), (true, Events::Watch), (true, Events::Ignore)]
        {
            let source = Arc::new(Pattern { threaded, ..Pattern::default() });
            let pager = start(setup, Delivery::Hybrid(2), events, Arc::clone(&source));
            let step = step(&pager);
            let granules = pager.layout().get(REGION).unwrap().granules();
            thread::scope(|scope| {
                for seed in 0..6 {
                    let pager = &pager;
                    scope.spawn(move || {
                        let vcpu = Vcpu::of(pager);
                        for granule in shuffled(granules, seed / 2) {
                            let offset = granule * step + 1024;
                            let got = match seed % 2 {
                                0 => vcpu.run(pager, offset).unwrap().0,
                                _ => peek(pager.layout(), offset),
                            };
                            assert_eq!(got, word(REGION, offset), "{setup:?}: {offset:#x}");
                        }
                    });
                }
            });
            assert_eq!(source.granules.load(SeqCst), granules, "{setup:?}: each page once");
            assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)));
            assert!(!pager.delivers_exits());
        }
    }
}

#[test]
fn sixty_four_threads_on_one_page() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        let source = Arc::new(Pattern { threaded: true, ..Pattern::default() });
        let pager = start(setup, Delivery::Hybrid(1), Events::Watch, Arc::clone(&source));
        thread::scope(|scope| {
            for _ in 0..64 {
                scope.spawn(|| {
                    assert_eq!(Vcpu::of(&pager).run(&pager, 8).unwrap().0, word(REGION, 8));
                });
            }
        });
        assert_eq!(source.requests(), 1, "{setup:?}");
    }
}

#[test]
fn what_the_source_poisons_stays_an_error() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        for delivery in [Delivery::Exit, Delivery::Hybrid(1)] {
            let source = Arc::new(Pattern { poisoned: Some(3), ..Pattern::default() });
            let pager = start(setup, delivery, Events::Watch, source);
            let (vcpu, step) = (Vcpu::of(&pager), step(&pager));
            for _ in 0..3 {
                assert_eq!(vcpu.run(&pager, 3 * step), Err(Resolved::Poisoned), "{setup:?}");
            }
            assert_eq!(vcpu.run(&pager, 4 * step).unwrap().0, word(REGION, 4 * step));
            for granule in 0..pager.layout().get(REGION).unwrap().granules() {
                let _ = vcpu.run(&pager, granule * step);
            }
            assert_eq!(pager.remaining(), 0);
            assert!(pager.delivers_exits(), "{setup:?}: an error is delivered for ever");
        }
    }
}

/// A wait ends when it is interrupted, the page comes nevertheless, and a new source serves who
/// waits.
#[test]
fn waiting_can_be_interrupted() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        let source = Arc::new(Pattern { hold: AtomicBool::new(true), ..Pattern::default() });
        let pager = start(setup, Delivery::Exit, Events::Watch, Arc::clone(&source));
        let vcpu = Vcpu::of(&pager);
        let mut asked = 0;
        let resolved = pager.resolve_exit(vcpu.address(0), &mut || {
            asked += 1;
            asked > 3
        });
        assert_eq!((resolved, source.requests()), (Resolved::Interrupted, 1), "{setup:?}");
        // Asked for once, and still on its way.
        assert_eq!(
            pager.resolve_exit(vcpu.address(0), &mut || true),
            Resolved::Interrupted,
            "{setup:?}"
        );
        assert_eq!(source.requests(), 1);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| vcpu.run(&pager, 0).unwrap().0);
            thread::sleep(Duration::from_millis(20));
            pager.attach_source(Arc::new(Pattern::default())).unwrap();
            assert_eq!(waiting.join().unwrap(), word(REGION, 0), "{setup:?}");
        });
        assert_eq!(pager.resolve_exit(HostAddress::new(4096), &mut || false), Resolved::NotOurs);
    }
}

/// Whoever looks again while it waits still has the one fault, whenever the page comes.
#[test]
fn a_fault_that_waits_long_is_one_fault() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        let source = Arc::new(Pattern { hold: AtomicBool::new(true), ..Pattern::default() });
        let pager = start(setup, Delivery::Exit, Events::Watch, Arc::clone(&source));
        let vcpu = Vcpu::of(&pager);
        let mut looks = 0;
        let resolved = pager.resolve_exit(vcpu.address(0), &mut || {
            looks += 1;
            if looks == 3 {
                // Between two looks.
                source.answer_now(span(0, 1));
            }
            false
        });
        assert_eq!((resolved, looks), (Resolved::Present, 3), "{setup:?}");
        let counts = pager.statistics().counts;
        assert_eq!((counts.faults, counts.demand, counts.stale), (1, 1, 0), "{setup:?}");
    }
}

/// Removed memory reads as zero, marked or not, while the pager lives and afterwards.
#[test]
fn removed_memory_is_zero() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        let source = Arc::new(Pattern::default());
        let layout = setup.layout();
        let region = Arc::clone(layout.get(REGION).unwrap());
        let pager = Pager::builder(layout)
            .delivery(Delivery::Hybrid(1))
            .prefetch(Prefetch::NONE)
            .start(source)
            .unwrap();
        let (vcpu, step) = (Vcpu::of(&pager), step(&pager));
        assert_eq!(vcpu.run(&pager, step).unwrap().0, word(REGION, step));
        let advice = match setup {
            Setup::OneView(Backing::Anonymous) => Advice::DontNeed,
            _ => Advice::Remove,
        };
        // One that had come, two that had not.
        let removed = pager.layout().get(REGION).unwrap().guest_view().range();
        let removed = removed.split_at(step).1.split_at(3 * step).0;
        region.guest_view().advise(removed, advice).unwrap();
        for granule in [1, 2] {
            assert_eq!(vcpu.run(&pager, granule * step).unwrap().0, 0, "{setup:?} {granule}");
        }
        assert_eq!(vcpu.run(&pager, 4 * step).unwrap().0, word(REGION, 4 * step));
        assert_eq!(region.page_map().state(common::span(3, 1).granules.first()), State::Discarded);
        drop(pager);
        assert_eq!(vcpu.read(3 * step), Some(0), "{setup:?}: nobody touched it before the end");
        assert_eq!(vcpu.read(5 * step), None, "{setup:?}: what never came stays an error");
    }
}

/// The page is there, the mapping is not: as after reclaim.
#[test]
fn present_but_not_mapped() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    let deliveries = [Delivery::Hybrid(1), Delivery::Exit];
    let shared = |setup: &Setup| !matches!(setup, Setup::OneView(Backing::Anonymous));
    for (setup, delivery) in
        setups.into_iter().filter(shared).flat_map(|setup| deliveries.map(|d| (setup, d)))
    {
        let source = Arc::new(Pattern::default());
        let pager = start(setup, delivery, Events::Ignore, Arc::clone(&source));
        let (vcpu, step) = (Vcpu::of(&pager), step(&pager));
        assert_eq!(vcpu.run(&pager, 0).unwrap(), (word(REGION, 0), 1));
        let view = Arc::clone(pager.layout().get(REGION).unwrap().kvm_view());
        view.advise(view.range().split_at(step).0, Advice::DontNeed).unwrap();
        assert_eq!(pager.resolve_exit(vcpu.address(0), &mut || false), Resolved::Present);
        assert_eq!(vcpu.read(0), Some(word(REGION, 0)), "{setup:?}");
        // By a reader for who waits in the kernel, or without one by the kernel itself.
        view.advise(view.range().split_at(step).0, Advice::DontNeed).unwrap();
        assert_eq!(vcpu.read(0), Some(word(REGION, 0)), "{setup:?}");
        assert_eq!(source.requests(), 1);
    }
}

/// Where KVM uses the guest view, it is the view with the marks: other threads of this process get
/// SIGBUS there, which the pager answers.
#[test]
fn other_threads_touch_the_marked_view() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups.into_iter().filter(|setup| matches!(setup, Setup::OneView(_))) {
        for delivery in [Delivery::Exit, Delivery::Hybrid(1)] {
            let source = Arc::new(Pattern::default());
            let pager = start(setup, delivery, Events::Watch, Arc::clone(&source));
            let step = step(&pager);
            let granules = pager.layout().get(REGION).unwrap().granules();
            thread::scope(|scope| {
                for thread in 0..4 {
                    let pager = &pager;
                    scope.spawn(move || {
                        let vcpu = Vcpu::of(pager);
                        for granule in shuffled(granules, thread / 2) {
                            let offset = granule * step + 8;
                            let got = match thread % 2 {
                                0 => vcpu.run(pager, offset).unwrap().0,
                                _ => peek(pager.layout(), offset),
                            };
                            assert_eq!(got, word(REGION, offset), "{setup:?} {offset:#x}");
                        }
                    });
                }
            });
            assert_eq!(source.granules.load(SeqCst), granules, "{setup:?}");
        }
    }
}

/// Prefetched pages are mapped for the vCPUs, too: they need not leave for them.
#[test]
fn what_is_swept_needs_no_exit() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        let pager = Pager::builder(setup.layout())
            .delivery(Delivery::Exit)
            .prefetch(Prefetch::SWEEP)
            .start(Arc::new(Pattern::default()))
            .unwrap();
        assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)));
        let (vcpu, step) = (Vcpu::of(&pager), step(&pager));
        for granule in 0..pager.layout().get(REGION).unwrap().granules() {
            let offset = granule * step + 512;
            assert_eq!(vcpu.read(offset), Some(word(REGION, offset)), "{setup:?} {granule}");
        }
        assert!(!pager.delivers_exits());
        assert_eq!(pager.statistics().counts.faults, 0);
    }
}

#[test]
fn moving_pages_over_marks_is_refused() {
    if !poison() {
        return;
    }
    let refused = Pager::builder(Setup::OneView(Backing::Anonymous).layout())
        .delivery(Delivery::Exit)
        .install(Some(InstallMethod::Move))
        .start(Arc::new(Pattern::default()));
    let Err(StartError::Install { why, .. }) = refused else { panic!("{:?}", refused.err()) };
    assert!(why.contains("MOVE"), "{why}");
}

/// Threads of this process that take part (set-up d) ask before they touch; nothing is read, and
/// nothing waits in the kernel.
#[test]
fn no_queue_at_all() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups {
        let source = Arc::new(Pattern::default());
        let pager = start(setup, Delivery::Exit, Events::Ignore, Arc::clone(&source));
        let checked = AtomicU64::new(0);
        let (step, start) =
            (step(&pager), pager.layout().get(REGION).unwrap().guest_view().range().start());
        let granules = pager.layout().get(REGION).unwrap().granules();
        thread::scope(|scope| {
            for thread in 0..4 {
                let (pager, checked) = (&pager, &checked);
                scope.spawn(move || {
                    let vcpu = Vcpu::of(pager);
                    for granule in shuffled(granules, thread) {
                        let offset = granule * step + 16;
                        let got = if thread % 2 == 0 {
                            vcpu.run(pager, offset).unwrap().0
                        } else {
                            assert!(pager.resolve(start.checked_add(offset).unwrap()));
                            peek(pager.layout(), offset)
                        };
                        assert_eq!(got, word(REGION, offset), "{setup:?} {offset:#x}");
                        checked.fetch_add(1, Relaxed);
                    }
                });
            }
        });
        assert_eq!(checked.into_inner(), 4 * granules);
        assert_eq!(source.granules.load(SeqCst), granules);
        let counts = pager.statistics().counts;
        assert_eq!((counts.reads, counts.installed), (0, granules), "{setup:?}");
    }
}

/// What a vCPU brings is mapped for it alone; whoever touches it in the guest view has it mapped then,
/// also if that was before it came.
#[test]
fn the_guest_view_is_mapped_when_it_is_touched() {
    if !poison() {
        return;
    }
    let (setups, _pages) = Setup::all();
    let _watch = watch(60);
    for setup in setups.into_iter().filter(|setup| matches!(setup, Setup::OwnView(_))) {
        for events in [Events::Watch, Events::Ignore] {
            let source = Arc::new(Pattern { threaded: true, ..Pattern::default() });
            let pager = start(setup, Delivery::Hybrid(1), events, Arc::clone(&source));
            let (vcpu, step) = (Vcpu::of(&pager), step(&pager));
            let guest = pager.layout().get(REGION).unwrap().guest_view().range();
            let mapped = |granule: u64| {
                let page = HostRange::new(guest.skip(granule * step).start(), PAGE);
                let mut entry = [PagemapEntry::default()];
                Pagemap::open_self().unwrap().read_entries(page, &mut entry).unwrap();
                entry[0].present()
            };
            for granule in [1, 2, 3, 5] {
                let (got, exits) = vcpu.run(&pager, granule * step).unwrap();
                assert_eq!((got, exits), (word(REGION, granule * step), 1), "{setup:?}");
                assert!(!mapped(granule), "{setup:?} {events:?}");
            }
            assert_eq!(peek(pager.layout(), step + 8), word(REGION, step + 8), "{setup:?}");
            // Those that are there and next to it come along, if they are small.
            let small = step == PAGE;
            wait_for("the neighbours", || mapped(2) == small && mapped(3) == small);
            assert_eq!([1, 4, 5].map(mapped), [true, false, false], "{setup:?}");

            // A host thread waits first, then the vCPU leaves for the same page, which comes.
            source.hold.store(true, SeqCst);
            thread::scope(|scope| {
                let waiting = scope.spawn(|| peek(pager.layout(), 6 * step));
                wait_for("a request", || source.requests() == 5);
                let vcpus: Vec<_> = (0..2)
                    .map(|_| scope.spawn(|| Vcpu::of(&pager).run(&pager, 6 * step).unwrap().0))
                    .collect();
                let faults = pager.statistics().counts.faults;
                wait_for("the vCPUs", || pager.statistics().counts.faults >= faults.max(7));
                source.hold.store(false, SeqCst);
                let sink = source.me.lock().unwrap().clone().unwrap();
                let mut bytes = vec![0; step as usize];
                fill_pattern(REGION, 6 * step, &mut bytes);
                sink.page(span(6, 1), &bytes).unwrap();
                assert_eq!(waiting.join().unwrap(), word(REGION, 6 * step), "{setup:?}");
                for vcpu in vcpus {
                    assert_eq!(vcpu.join().unwrap(), word(REGION, 6 * step), "{setup:?}");
                }
            });
            let counts = pager.statistics().counts;
            assert_eq!((counts.installed, counts.eexist), (5, 0), "{setup:?}: {counts:?}");
        }
    }
}
