//! Writes noticed while memory arrives: what comes is not written, what is written after it came
//! is, and nothing is lost, whoever writes, scans and removes meanwhile.

mod common;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Duration,
};

use common::{
    external::{Kind, Reservation, external},
    *,
};
use pageferry_memory::{Advice, Backing, HostAddress, HostRange, Layout, Region, RegionConfig};
use pageferry_paging::{
    Delivery, InstallMethod, Pager, Prefetch, ProtectError, Resolved, StartError, Status,
    WriteObserver, WriteTracking,
};
use pageferry_uffd::{Features, Outcome, PageRegion, Pagemap, RegisterMode, ScanRequest, Wake};

const PAGES: u64 = 64;
const QUEUES: [Delivery; 5] = [
    Delivery::Queue,
    Delivery::QueueN(3),
    Delivery::ByThread(3),
    Delivery::ByCpu(2),
    Delivery::Sharded(3),
];

/// What memory is tried, and the huge pages for it, to be kept for so long.
fn backings() -> (Vec<Backing>, Option<HugePages>) {
    let mut backings = vec![Backing::Anonymous, Backing::Memfd];
    let pages = HugePages::reserve(8);
    backings.extend(pages.is_some().then_some(HUGE));
    (backings, pages)
}

fn layout_for(backing: Backing) -> Layout {
    layout(backing, if backing == HUGE { 8 << 21 } else { PAGES << 12 })
}

/// Notes the pages that it is told of.
#[derive(Default)]
struct Notes {
    written: Mutex<BTreeSet<u64>>,
    removed: Mutex<Vec<HostRange>>,
    threads: Mutex<BTreeSet<Option<u32>>>,
}

impl WriteObserver for Notes {
    fn written(&self, page: HostRange, thread: Option<u32>) {
        self.written.lock().unwrap().insert(page.start().get());
        self.threads.lock().unwrap().insert(thread);
    }

    fn removed(&self, range: HostRange) {
        self.removed.lock().unwrap().push(range);
    }
}

/// A tracker of the simplest kind: the pages written since the last harvest.
struct Tracker<'a> {
    pager: &'a Pager,
    notes: Arc<Notes>,
    pagemap: Pagemap,
    tracking: WriteTracking,
}

impl Tracker<'_> {
    fn arm(&self) {
        for range in self.pager.tracked() {
            self.pager.protect(range).unwrap();
        }
    }

    fn harvest(&self) -> BTreeSet<u64> {
        match self.tracking {
            WriteTracking::Off => unreachable!(),
            WriteTracking::Blocking => {
                let taken = std::mem::take(&mut *self.notes.written.lock().unwrap());
                for page in &taken {
                    let start = HostAddress::new(*page);
                    self.pager.protect(HostRange::new(start, self.page())).unwrap();
                }
                taken
            }
            WriteTracking::Asynchronous => {
                self.pager.tracked().into_iter().flat_map(|range| self.scan(range)).collect()
            }
        }
    }

    fn page(&self) -> u64 {
        self.pager.layout().get(REGION).unwrap().page_size().bytes()
    }

    fn scan(&self, range: HostRange) -> Vec<u64> {
        let mut found = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let mut regions = [PageRegion::default(); 64];
            let request = ScanRequest::written(rest, true);
            let result = self.pagemap.scan(&request, &mut regions).unwrap();
            for region in &regions[..result.regions] {
                let step = self.page();
                let range = region.range();
                found.extend((range.start().get()..range.end().get()).step_by(step as usize));
            }
            rest = rest.skip(result.walk_end.get() - rest.start().get());
        }
        found
    }
}

fn start(
    layout: Layout,
    tracking: WriteTracking,
    delivery: Delivery,
    source: Pattern,
) -> (Pager, Arc<Notes>) {
    let notes = Arc::new(Notes::default());
    let pager = Pager::builder(layout)
        .delivery(delivery)
        .prefetch(Prefetch::NONE)
        .write_tracking(tracking)
        .write_observer(Arc::clone(&notes) as _)
        .start(Arc::new(source))
        .unwrap();
    (pager, notes)
}

fn tracker<'a>(pager: &'a Pager, notes: &Arc<Notes>, tracking: WriteTracking) -> Tracker<'a> {
    let pagemap = Pagemap::open_self().unwrap();
    Tracker { pager, notes: Arc::clone(notes), pagemap, tracking }
}

fn can(tracking: WriteTracking) -> bool {
    let kinds = Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
    match tracking {
        WriteTracking::Off => userfaultfd(),
        WriteTracking::Asynchronous => features(kinds | Features::WP_ASYNC),
        WriteTracking::Blocking => features(kinds),
    }
}

/// What goes together.
fn cases() -> Vec<(WriteTracking, Delivery)> {
    let mut cases = Vec::new();
    for tracking in [WriteTracking::Asynchronous, WriteTracking::Blocking] {
        if can(tracking) {
            cases.extend(QUEUES.map(|delivery| (tracking, delivery)));
            if tracking == WriteTracking::Asynchronous {
                cases.push((tracking, Delivery::Signal));
            }
        }
    }
    cases
}

fn step(pager: &Pager) -> u64 {
    pager.layout().get(REGION).unwrap().granule().bytes()
}

fn granules(pager: &Pager) -> u64 {
    pager.layout().get(REGION).unwrap().granules()
}

/// Where a granule is in the guest view.
fn at(pager: &Pager, granule: u64) -> u64 {
    let region = pager.layout().get(REGION).unwrap();
    region.host_range(span(granule, 1).granules).start().get()
}

#[test]
fn what_comes_is_clean_and_what_is_written_is_not() {
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for (tracking, delivery) in cases() {
        for &backing in &backings {
            let case = format!("{tracking:?} {delivery} {backing}");
            let source = Pattern { zero_every: Some(3), ..Pattern::default() };
            let (pager, notes) = start(layout_for(backing), tracking, delivery, source);
            let tracker = tracker(&pager, &notes, tracking);
            tracker.arm();
            assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}: nothing is there");
            let (step, granules) = (step(&pager), granules(&pager));
            for granule in 0..granules / 2 {
                let expected = if granule % 3 == 0 { 0 } else { word(REGION, granule * step) };
                assert_eq!(peek(pager.layout(), granule * step), expected, "{case}");
            }
            assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}: only read");
            // One that is there, one of zeros, one that comes because it is written to.
            let written = [1, 3, granules - 2];
            for granule in written {
                poke(pager.layout(), granule * step + 8, 7);
            }
            let expected: BTreeSet<u64> = written.map(|granule| at(&pager, granule)).into();
            assert_eq!(tracker.harvest(), expected, "{case}");
            assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}: told once");
            // Again, and the rest comes.
            poke(pager.layout(), step + 16, 7);
            for granule in 0..granules {
                peek(pager.layout(), granule * step);
            }
            assert_eq!(tracker.harvest(), [at(&pager, 1)].into(), "{case}");
            assert_eq!(peek(pager.layout(), step + 8), 7, "{case}");
            let status = pager.wait_complete(PATIENCE);
            assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
            if tracking == WriteTracking::Blocking {
                let own = rustix::thread::gettid().as_raw_nonzero().get() as u32;
                assert_eq!(*notes.threads.lock().unwrap(), [Some(own)].into(), "{case}");
                assert_eq!(pager.statistics().counts.written, 4, "{case}");
            }
            assert_eq!(pager.statistics().counts.eexist, 0, "{case}");
        }
    }
}

/// Four threads count up a word of each page, while memory comes and a fifth harvests. After the
/// last harvest each page's count is what it was when its page was last copied: each write is
/// followed by a harvest that tells of it.
#[test]
fn no_write_is_lost() {
    let (backings, _pages) = backings();
    let _watch = watch(120);
    for (tracking, delivery) in cases() {
        for &backing in &backings {
            for sweep in [false, true] {
                no_write_is_lost_in(tracking, delivery, backing, sweep);
            }
        }
    }
}

const WRITERS: u64 = 4;

fn no_write_is_lost_in(tracking: WriteTracking, delivery: Delivery, backing: Backing, sweep: bool) {
    let case = format!("{tracking:?} {delivery} {backing} sweep {sweep}");
    println!("{case}");
    let notes = Arc::new(Notes::default());
    let pager = Pager::builder(layout_for(backing))
        .delivery(delivery)
        .prefetch(if sweep { Prefetch::SWEEP } else { Prefetch::NONE })
        .write_tracking(tracking)
        .write_observer(Arc::clone(&notes) as _)
        .start(Arc::new(Pattern { threaded: delivery != Delivery::Signal, ..Pattern::default() }))
        .unwrap();
    let tracker = tracker(&pager, &notes, tracking);
    let (step, granules) = (step(&pager), granules(&pager));
    tracker.arm();
    let writing = AtomicBool::new(true);
    let mut copies = vec![[None; WRITERS as usize]; granules as usize];
    let mut copy = |pages: BTreeSet<u64>| {
        let start = at(&pager, 0);
        for page in pages {
            let granule = (page - start) / step;
            for writer in 0..WRITERS {
                let value = peek(pager.layout(), granule * step + 8 * writer);
                copies[granule as usize][writer as usize] = Some(value);
            }
        }
    };
    let counts: Vec<Vec<u64>> = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (pager, writing) = (&pager, &writing);
                scope.spawn(move || {
                    let mut random = Random::new(writer + 1);
                    let mut counts = vec![0; granules as usize];
                    while writing.load(SeqCst) {
                        let granule = random.below(granules);
                        counts[granule as usize] += 1;
                        let count = counts[granule as usize];
                        poke(pager.layout(), granule * step + 8 * writer, count);
                    }
                    counts
                })
            })
            .collect();
        for _ in 0..200 {
            copy(tracker.harvest());
        }
        writing.store(false, SeqCst);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    copy(tracker.harvest());
    for granule in 0..granules {
        for writer in 0..WRITERS {
            let written = counts[writer as usize][granule as usize];
            let copied = copies[granule as usize][writer as usize];
            if written > 0 {
                assert_eq!(copied, Some(written), "{case}: granule {granule} writer {writer}");
            }
            // And nothing of it was overwritten by what came.
            let offset = granule * step + 8 * writer;
            let expected = if written > 0 { written } else { word(REGION, offset) };
            assert_eq!(peek(pager.layout(), offset), expected, "{case}");
        }
    }
    // Of several threads that waited for one page, some may be told of again.
    wait_for(&case, || tracker.harvest().is_empty());
}

/// Removed memory is told of, and what is written there afterwards is.
#[test]
fn what_is_removed_is_told() {
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for (tracking, delivery) in cases() {
        for &backing in &backings {
            let case = format!("{tracking:?} {delivery} {backing}");
            let (pager, notes) = start(layout_for(backing), tracking, delivery, Pattern::default());
            let tracker = tracker(&pager, &notes, tracking);
            tracker.arm();
            let (step, granules) = (step(&pager), granules(&pager));
            for granule in 0..granules / 2 {
                peek(pager.layout(), granule * step);
            }
            assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}");
            // One that came, one that has not.
            for granule in [1, granules - 2] {
                let region = Arc::clone(pager.layout().get(REGION).unwrap());
                let range = region.host_range(span(granule, 1).granules);
                let advice =
                    if backing == Backing::Anonymous { Advice::DontNeed } else { Advice::Remove };
                region.guest_view().advise(range, advice).unwrap();
                wait_for("the removal to be told", || {
                    notes.removed.lock().unwrap().last() == Some(&range)
                });
                // Told again or not when it is touched: a scan may call it written.
                assert_eq!(peek(pager.layout(), granule * step), 0, "{case}");
                let mut reported = tracker.harvest();
                reported.remove(&range.start().get());
                assert_eq!(reported, BTreeSet::new(), "{case}");
                poke(pager.layout(), granule * step, 9);
                assert_eq!(tracker.harvest(), [range.start().get()].into(), "{case}");
            }
        }
    }
}

/// What cannot come is an error, and not zeros, though its absent pages are protected by markers
/// which POISON does not replace: while the pager lives, and after it.
#[test]
fn protected_absent_pages_can_be_poisoned() {
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for (tracking, delivery) in cases() {
        for &backing in &backings {
            for without in [Features::empty(), Features::POISON] {
                let case = format!("{tracking:?} {delivery} {backing} without {without}");
                let notes = Arc::new(Notes::default());
                let pager = Pager::builder(layout_for(backing))
                    .delivery(delivery)
                    .prefetch(Prefetch::NONE)
                    .without_features(without)
                    .write_tracking(tracking)
                    .write_observer(Arc::clone(&notes) as _)
                    .start(Arc::new(Pattern { poisoned: Some(3), ..Pattern::default() }))
                    .unwrap();
                let tracker = tracker(&pager, &notes, tracking);
                tracker.arm();
                let read =
                    |granule| external::read_by_kernel(HostAddress::new(at(&pager, granule)));
                peek(pager.layout(), 2 * step(&pager));
                assert!(!pager.resolve(HostAddress::new(at(&pager, 3))), "{case}");
                assert!(read(3).is_err(), "{case}");
                // The marks of what cannot come may look like writes.
                let mut reported = tracker.harvest();
                reported.remove(&at(&pager, 3));
                assert_eq!(reported, BTreeSet::new(), "{case}");
                let (there, missing) = (at(&pager, 2), at(&pager, 5));
                let (word, layout) = (word(REGION, 2 * step(&pager)), pager.layout().clone());
                tracker.arm();
                drop(pager);
                let read = |address| external::read_by_kernel(HostAddress::new(address));
                assert_eq!(read(there), Ok(word), "{case}");
                assert!(read(missing).is_err(), "{case}: {:?}", read(missing));
                drop(layout);
            }
        }
    }
}

/// Memory of several userfaultfds and of an embedder, moved and unmapped: what can be armed is what
/// is mapped, where it is mapped.
#[test]
fn what_is_tracked_follows_the_memory() {
    let _watch = watch(60);
    for (tracking, delivery) in cases() {
        let case = format!("{tracking:?} {delivery}");
        let bytes = PAGES << 12;
        let reservation = Reservation::new(2 * bytes);
        let layout = external(&reservation, bytes, Kind::Anonymous);
        let (pager, notes) = start(layout, tracking, delivery, Pattern::default());
        let tracker = tracker(&pager, &notes, tracking);
        assert_eq!(pager.tracked(), [reservation.range(0, bytes)], "{case}");
        tracker.arm();
        for page in 0..PAGES {
            peek(pager.layout(), page << 12);
        }
        let moved = reservation.move_to(reservation.range(4 << 12, 4096), bytes);
        reservation.unmap(reservation.range(8 << 12, 4096));
        let expected = [
            reservation.range(0, 4 << 12),
            moved,
            reservation.range(5 << 12, 3 << 12),
            reservation.range(9 << 12, (PAGES - 9) << 12),
        ];
        let sorted = |ranges: &[HostRange]| -> BTreeSet<(u64, u64)> {
            ranges.iter().map(|range| (range.start().get(), range.len())).collect()
        };
        wait_for("events", || sorted(&pager.tracked()) == sorted(&expected));
        assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}");
        // SAFETY: the test's own memory, which is mapped.
        unsafe { moved.start().as_ptr().cast::<u64>().write_volatile(5) };
        assert_eq!(tracker.harvest(), [moved.start().get()].into(), "{case}");
        let gone = reservation.range(8 << 12, 4096);
        let refused = pager.protect(gone);
        assert!(matches!(refused, Err(ProtectError::Outside { range }) if range == gone), "{case}");
        pager.protect(reservation.range(0, 2 * bytes)).unwrap();
    }
}

#[test]
fn what_does_not_go_is_refused() {
    if !can(WriteTracking::Asynchronous) {
        return;
    }
    let refused = |tracking, delivery, install, observed: bool| {
        let mut builder = Pager::builder(layout_for(Backing::Anonymous))
            .delivery(delivery)
            .install(install)
            .write_tracking(tracking);
        if observed {
            builder = builder.write_observer(Arc::new(Notes::default()));
        }
        match builder.start(Arc::new(Pattern::default())) {
            Ok(_) => panic!("{tracking:?} {delivery} was not refused"),
            Err(StartError::Tracking { why } | StartError::Install { why, .. }) => why,
            Err(other) => panic!("{other}"),
        }
    };
    use WriteTracking::{Asynchronous, Blocking};
    for delivery in [Delivery::Exit, Delivery::Hybrid(1)] {
        for tracking in [Asynchronous, Blocking] {
            assert!(refused(tracking, delivery, None, true).contains("view of their own"));
        }
    }
    assert!(refused(Blocking, Delivery::Signal, None, true).contains("Asynchronous"));
    assert!(refused(Blocking, Delivery::Queue, None, false).contains("write_observer"));
    let moving = Some(InstallMethod::Move);
    assert!(refused(Asynchronous, Delivery::Queue, moving, true).contains("MOVE"));
    // Nor does a pager that does not track.
    let pager =
        Pager::builder(layout_for(Backing::Anonymous)).start(Arc::new(Pattern::default())).unwrap();
    let range = pager.layout().get(REGION).unwrap().guest_view().range();
    assert!(matches!(pager.protect(range), Err(ProtectError::Off { .. })));
    assert_eq!(pager.tracked(), []);
}

/// vCPUs that leave KVM_RUN have a view of their own, which KVM tracks; the view of everybody else
/// is tracked here.
#[test]
fn beside_vcpus_that_exit() {
    if !poison() {
        return;
    }
    let (backings, _pages) = backings();
    let _watch = watch(60);
    for &backing in backings.iter().filter(|backing| **backing != Backing::Anonymous) {
        for (tracking, delivery) in [
            (WriteTracking::Asynchronous, Delivery::Exit),
            (WriteTracking::Asynchronous, Delivery::Hybrid(2)),
            (WriteTracking::Blocking, Delivery::Hybrid(2)),
        ] {
            if !can(tracking) {
                continue;
            }
            let case = format!("{tracking:?} {delivery} {backing}");
            let len = layout_for(backing).get(REGION).unwrap().len();
            let config = RegionConfig { vcpu_view: true, ..RegionConfig::new(len, backing) };
            let region = Arc::new(Region::new(&config).unwrap());
            let layout = Layout::new(vec![Arc::clone(&region)]).unwrap();
            let source = Pattern { poisoned: Some(5), ..Pattern::default() };
            let (pager, notes) = start(layout, tracking, delivery, source);
            let tracker = tracker(&pager, &notes, tracking);
            assert_eq!(pager.tracked(), [region.guest_view().range()], "{case}");
            tracker.arm();
            let step = step(&pager);
            let vcpu = |granule: u64| region.kvm_view().range().skip(granule * step).start();
            for granule in [1, 2, 3] {
                let resolved = pager.resolve_exit(vcpu(granule), &mut || false);
                assert_eq!(resolved, Resolved::Present, "{case}");
                assert_eq!(external::read(vcpu(granule)), word(REGION, granule * step), "{case}");
            }
            assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}");
            // SAFETY: the test's own memory, which is mapped, and there.
            unsafe { vcpu(1).as_ptr().cast::<u64>().write_volatile(1) };
            assert_eq!(tracker.harvest(), BTreeSet::new(), "{case}: KVM knows");
            poke(pager.layout(), 2 * step, 7);
            assert_eq!(tracker.harvest(), [at(&pager, 2)].into(), "{case}");
            assert_eq!([1, 2].map(|granule| external::read(vcpu(granule))), [1, 7], "{case}");
            // An error in both.
            let poisoned = pager.resolve_exit(vcpu(5), &mut || false);
            assert_eq!(poisoned, Resolved::Poisoned, "{case}");
            let guest = region.guest_view().range().skip(5 * step).start();
            for address in [vcpu(5), guest] {
                assert!(external::read_by_kernel(address).is_err(), "{case}");
            }
            assert_eq!(pager.statistics().counts.closed, 0, "{case}");
        }
    }
    let queue = Delivery::Queue;
    // On kernels without POISON CONTINUE does not protect.
    for tracking in [WriteTracking::Asynchronous, WriteTracking::Blocking] {
        if !can(tracking) {
            continue;
        }
        // What waits in the queue is tracked in both views.
        let config =
            RegionConfig { vcpu_view: true, ..RegionConfig::new(PAGES << 12, Backing::Memfd) };
        let region = Arc::new(Region::new(&config).unwrap());
        let layout = Layout::new(vec![Arc::clone(&region)]).unwrap();
        let (pager, notes) = start(layout, tracking, queue, Pattern::default());
        let tracker = tracker(&pager, &notes, tracking);
        tracker.arm();
        let page = region.kvm_view().range().skip(3 << 12).start();
        assert_eq!(external::read(page), word(REGION, 3 << 12));
        assert_eq!(tracker.harvest(), BTreeSet::new(), "{tracking:?}");
        // SAFETY: the test's own memory, which is mapped.
        unsafe { page.as_ptr().cast::<u64>().write_volatile(1) };
        assert_eq!(tracker.harvest(), [page.get()].into(), "{tracking:?}");
    }
}

/// Tells that it has been told, and returns only when it may.
struct Slow {
    told: mpsc::SyncSender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl WriteObserver for Slow {
    fn written(&self, _: HostRange, _: Option<u32>) {
        self.told.send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
    }
}

/// Whoever re-arms waits for writes that are just being told: otherwise the protection would be
/// lifted after it was set, and the write after that be noted nowhere.
#[test]
fn arming_waits_for_what_is_being_told() {
    if !can(WriteTracking::Blocking) {
        return;
    }
    let _watch = watch(60);
    let (told, hear) = mpsc::sync_channel(0);
    let (go_on, may) = mpsc::channel();
    let pager = Pager::builder(layout_for(Backing::Anonymous))
        .delivery(Delivery::Queue)
        .prefetch(Prefetch::NONE)
        .write_tracking(WriteTracking::Blocking)
        .write_observer(Arc::new(Slow { told, go_on: Mutex::new(may) }))
        .start(Arc::new(Pattern::default()))
        .unwrap();
    peek(pager.layout(), 0);
    let range = pager.tracked()[0];
    thread::scope(|scope| {
        let writer = scope.spawn(|| poke(pager.layout(), 8, 1));
        hear.recv().unwrap();
        let arming = scope.spawn(|| pager.protect(range));
        thread::sleep(Duration::from_millis(50));
        assert!(!arming.is_finished(), "the write is still being told");
        go_on.send(()).unwrap();
        // The page may be protected before the thread has written: then that is told again.
        let (mut armed, mut written) = (false, false);
        while !(armed && written) {
            if hear.recv_timeout(Duration::from_millis(1)).is_ok() {
                go_on.send(()).unwrap();
            }
            (armed, written) = (arming.is_finished(), writer.is_finished());
        }
        arming.join().unwrap().unwrap();
        pager.protect(range).unwrap();
        let writer = scope.spawn(|| poke(pager.layout(), 8, 2));
        hear.recv().unwrap();
        go_on.send(()).unwrap();
        writer.join().unwrap();
    });
    assert_eq!(peek(pager.layout(), 8), 2);
}

/// Why vCPUs that exit are not tracked here: a scan calls the marks of absent pages written.
#[test]
fn marks_look_written() {
    if !can(WriteTracking::Asynchronous) || !poison() {
        return;
    }
    let (backings, _pages) = backings();
    for &backing in &backings {
        let layout = layout_for(backing);
        let region = layout.get(REGION).unwrap();
        let uffd = Arc::new(
            pageferry_uffd::Options::new()
                .required(Features::POISON | Features::WP_ASYNC | Features::WP_UNPOPULATED)
                .open()
                .unwrap(),
        );
        let range = region.guest_view().range();
        let mode = RegisterMode::MISSING | RegisterMode::WP;
        let _registration = uffd.register(Arc::clone(region.guest_view()), range, mode).unwrap();
        let scan = || {
            let mut regions = [PageRegion::default(); 64];
            let pagemap = Pagemap::open_self().unwrap();
            let result = pagemap.scan(&ScanRequest::written(range, true), &mut regions).unwrap();
            result.regions
        };
        for poisoned in [false, true] {
            if poisoned {
                let lifted = uffd.write_protect(range, false, Wake::No);
                assert!(matches!(lifted, Ok(Outcome::Installed { .. })), "{backing}: {lifted:?}");
                let marked = uffd.poison(range, Wake::No);
                assert!(matches!(marked, Ok(Outcome::Installed { .. })), "{backing}: {marked:?}");
            }
            let protected = uffd.write_protect(range, true, Wake::No);
            assert!(matches!(protected, Ok(Outcome::Installed { .. })), "{backing}: {protected:?}");
            let expected = match (poisoned, backing) {
                (false, _) => [0, 0],
                (true, HUGE) => [1, 1],
                (true, _) => [1, 0],
            };
            assert_eq!([scan(), scan()], expected, "{backing} poisoned {poisoned}");
        }
    }
}
