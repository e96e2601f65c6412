//! The source is lost: the guest stalls and sees nothing wrong, another source finishes; or
//! somebody gives up, and what is missing is a memory error, never zeros.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
};

use common::{child, *};
use pageferry_memory::{Advice, Backing, GranuleIndex, GranuleRange, Layout};
use pageferry_paging::{
    Completion, Delivery, Events, PageSink, PageSource, Pager, Prefetch, SourceError, Span, Status,
    Urgency,
};

const THREADS: u64 = 4;

fn bytes_of(backing: Backing) -> u64 {
    if backing == HUGE { 16 << 20 } else { 2 << 20 }
}

fn backings() -> Vec<Backing> {
    let mut backings = vec![Backing::Anonymous, Backing::Memfd];
    if huge_pages(8) {
        backings.push(HUGE);
    }
    backings
}

/// Which granule each thread is about to touch, and which were seen whole.
struct Progress {
    at: Vec<AtomicU64>,
    seen: Vec<AtomicBool>,
}

const FINISHED: u64 = u64::MAX;

impl Progress {
    fn new(threads: u64, granules: u64) -> Self {
        Self {
            at: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            seen: (0..granules).map(|_| AtomicBool::new(false)).collect(),
        }
    }
}

/// Reads all granules in an order of its own, and checks a few words of each.
fn guest(layout: &Layout, thread: u64, progress: &Progress) {
    let region = layout.get(REGION).unwrap();
    let size = region.granule().bytes();
    for granule in shuffled(region.granules(), thread) {
        progress.at[thread as usize].store(granule, SeqCst);
        for within in [0, size / 2, size - 8] {
            let offset = granule * size + within;
            assert_eq!(peek(layout, offset), word(REGION, offset), "granule {granule}");
        }
        progress.seen[granule as usize].store(true, SeqCst);
    }
    progress.at[thread as usize].store(FINISHED, SeqCst);
}

/// Several sources in a row are lost in the same way; the last one finishes.
fn lost_in_a_row(delivery: Delivery, backing: Backing, loss: Loss, answers: Answers, sweep: bool) {
    let case = format!("{delivery} {backing} {loss:?} {answers:?} sweep {sweep}");
    let layout = layout(backing, bytes_of(backing));
    let granules = layout.total_granules();
    let progress = Arc::new(Progress::new(THREADS, granules));
    let new = || Ledger::new(granules, answers);
    let (first, source) = new().lost_after(granules / 8, loss).source();
    let pager = Pager::builder(layout)
        .delivery(delivery)
        .prefetch(if sweep { Prefetch::SWEEP } else { Prefetch::NONE })
        .start(source)
        .unwrap();
    let mut ledgers = vec![first];
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (pager, progress) = (&pager, Arc::clone(&progress));
            scope.spawn(move || guest(pager.layout(), thread, &progress));
        }
        for losses in 0..3 {
            if loss == Loss::Silence {
                wait_for(&case, || {
                    let silent = ledgers.last().unwrap();
                    let asked: u32 = silent.asked.iter().map(|asked| asked.load(SeqCst)).sum();
                    u64::from(asked) > silent.answered_total()
                });
                ledgers.last().unwrap().declare_lost();
            }
            wait_for(&case, || matches!(pager.status(), Status::Stalled { .. }));
            // Every thread comes to a granule that nobody has answered, and none beyond it.
            let answered = |granule| ledgers.iter().any(|ledger| ledger.has_answered(granule));
            wait_for(&case, || {
                let stopped = |at: &AtomicU64| {
                    let at = at.load(SeqCst);
                    at == FINISHED || !answered(at)
                };
                progress.at.iter().all(stopped)
            });
            for (granule, seen) in progress.seen.iter().enumerate() {
                let seen = seen.load(SeqCst);
                assert!(!seen || answered(granule as u64), "{case}: {granule} came from nowhere");
            }
            assert!(pager.remaining() > 0, "{case}");
            let next = if losses < 2 { new().lost_after(granules / 8, loss) } else { new() };
            let (ledger, source) = next.source();
            pager.attach_source(source).unwrap();
            ledgers.push(ledger);
        }
    });
    verify_all(pager.layout());
    let last = ledgers.last().unwrap();
    let status = pager.wait_complete(PATIENCE);
    let agreed = Completion { granules_from_source: last.answered_total(), granules_poisoned: 0 };
    assert_eq!(status, Status::Complete(agreed), "{case}");
    assert_eq!(*last.completed.lock().unwrap(), Some(agreed), "{case}");
    for ledger in &ledgers {
        ledger.check_once();
    }
    for granule in 0..granules {
        let answers = ledgers.iter().filter(|ledger| ledger.has_answered(granule)).count();
        assert_eq!(answers, 1, "{case}: granule {granule}");
    }
    let counts = pager.statistics().counts;
    assert_eq!(counts.installed, granules, "{case}: {counts:?}");
    assert_eq!((counts.eexist, counts.poisoned), (0, 0), "{case}: {counts:?}");
}

fn every_way_of_losing(backing: Backing) {
    for delivery in DELIVERIES {
        for (loss, answers) in [
            (Loss::Request, Answers::Inline),
            (Loss::Request, Answers::Threaded),
            (Loss::Sink, Answers::Inline),
            (Loss::Sink, Answers::Threaded),
            (Loss::Silence, Answers::Threaded),
        ] {
            for sweep in [false, true] {
                lost_in_a_row(delivery, backing, loss, answers, sweep);
            }
        }
    }
}

#[test]
fn lost_sources_stall_the_guest_and_the_next_one_finishes_anonymous() {
    if userfaultfd() {
        let _watch = watch(60);
        every_way_of_losing(Backing::Anonymous);
    }
}

#[test]
fn lost_sources_stall_the_guest_and_the_next_one_finishes_memfd() {
    if userfaultfd() {
        let _watch = watch(60);
        every_way_of_losing(Backing::Memfd);
    }
}

#[test]
fn lost_sources_stall_the_guest_and_the_next_one_finishes_hugetlb() {
    if userfaultfd() && huge_pages(8) {
        let _watch = watch(60);
        every_way_of_losing(HUGE);
    }
}

/// A source that says that it is lost before attaching it has returned.
struct LostAtOnce;

impl PageSource for LostAtOnce {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        sink.lost(SourceError::Lost("while attaching".into()));
        Ok(())
    }

    fn request(&self, _: Span, _: Urgency, _: &dyn PageSink) -> Result<(), SourceError> {
        // Like a socket whose peer is gone and whose buffer is not yet full.
        Ok(())
    }

    fn detach(&self) {}
}

#[test]
fn a_source_lost_while_it_is_attached_is_lost() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    let layout = layout(Backing::Memfd, 64 << 10);
    let granules = layout.total_granules();
    let pager = Pager::builder(layout).start(Arc::new(LostAtOnce)).unwrap();
    let Status::Stalled { why } = pager.status() else { panic!("{:?}", pager.status()) };
    assert!(why.contains("while attaching"), "{why}");
    pager.attach_source(Ledger::new(granules, Answers::Inline).source().1).unwrap();
    verify_all(pager.layout());
}

/// A source that does not fit.
struct Misfit;

impl PageSource for Misfit {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Err(SourceError::Mismatch("too small".into()))
    }

    fn request(&self, _: Span, _: Urgency, _: &dyn PageSink) -> Result<(), SourceError> {
        panic!("asked although it refused to be attached")
    }

    fn detach(&self) {}
}

#[test]
fn a_source_that_does_not_fit_leaves_the_guest_stalled_until_one_does() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        let layout = layout(Backing::Anonymous, 256 << 10);
        let granules = layout.total_granules();
        let (first, source) =
            Ledger::new(granules, Answers::Inline).lost_after(0, Loss::Request).source();
        let pager = Pager::builder(layout)
            .delivery(delivery)
            .prefetch(Prefetch::NONE)
            .start(source)
            .unwrap();
        thread::scope(|scope| {
            scope.spawn(|| verify_all(pager.layout()));
            wait_for("a loss", || matches!(pager.status(), Status::Stalled { .. }));
            assert!(pager.attach_source(Arc::new(Misfit)).is_err());
            assert_eq!(
                pager.status(),
                Status::Stalled { why: "page source does not fit: too small".into() }
            );
            assert_eq!(first.answered_total(), 0);
            pager.attach_source(Ledger::new(granules, Answers::Inline).source().1).unwrap();
        });
        assert!(matches!(pager.wait_complete(PATIENCE), Status::Complete(_)), "{delivery}");
    }
}

/// A source whose first request takes as long as the test wants, and is an error then.
#[derive(Default)]
struct LostSlowly {
    asked: AtomicBool,
    go_on: AtomicBool,
}

impl PageSource for LostSlowly {
    fn attach(&self, _: Arc<dyn PageSink>) -> Result<(), SourceError> {
        Ok(())
    }

    fn request(&self, _: Span, _: Urgency, _: &dyn PageSink) -> Result<(), SourceError> {
        self.asked.store(true, SeqCst);
        while !self.go_on.load(SeqCst) {
            thread::yield_now();
        }
        Err(SourceError::Lost(String::new()))
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn detach(&self) {}
}

/// While there is no source, what needs none goes on: threads that read removed memory, though
/// their faults are read from the queue together with those on absent memory beside it; and a
/// thread that waits for absent memory that is then removed.
#[test]
fn removed_memory_reads_as_zero_while_there_is_no_source() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let case = format!("{delivery} {backing}");
            let layout = layout(backing, 64 << 10);
            let granules = layout.total_granules();
            let source = Arc::new(LostSlowly::default());
            let pager = Pager::builder(layout)
                .delivery(delivery)
                .prefetch(Prefetch::NONE)
                .start(Arc::clone(&source) as _)
                .unwrap();
            let region = pager.layout().get(REGION).unwrap();
            let remove = |n| {
                let page = region.host_range(GranuleRange::one(GranuleIndex::new(n)));
                let memfd = backing == Backing::Memfd;
                let advice = if memfd { Advice::Remove } else { Advice::DontNeed };
                region.guest_view().advise(page, advice).unwrap();
            };
            for n in (1..16).step_by(2) {
                remove(n);
            }
            thread::scope(|scope| {
                let pager = &pager;
                let reader = |n: u64| scope.spawn(move || peek(pager.layout(), n << 12));
                let first = reader(0);
                wait_for(&case, || source.asked.load(SeqCst));
                let mut absent: Vec<_> = (2..14).step_by(2).map(reader).collect();
                let removed: Vec<_> = (1..16).step_by(2).map(reader).collect();
                source.go_on.store(true, SeqCst);
                for thread in removed {
                    wait_for(&format!("{case}: removed"), || thread.is_finished());
                    assert_eq!(thread.join().unwrap(), 0);
                }
                wait_for(&case, || matches!(pager.status(), Status::Stalled { .. }));
                let stalled = pager.statistics().counts.stalled;
                let waiting = reader(14);
                wait_for(&case, || pager.statistics().counts.stalled > stalled);
                remove(14);
                wait_for(&format!("{case}: removed while waited for"), || waiting.is_finished());
                assert_eq!(waiting.join().unwrap(), 0);
                assert!(!absent.iter().any(|thread| thread.is_finished()));
                let (_, source) = Ledger::new(granules, Answers::Inline).source();
                pager.attach_source(source).unwrap();
                absent.insert(0, first);
                for (index, thread) in absent.into_iter().enumerate() {
                    let expected = word(REGION, index as u64 * 8192);
                    assert_eq!(thread.join().unwrap(), expected, "{case}");
                }
            });
        }
    }
}

/// What the guest of a pager that gives up does.
const ENDINGS: [&str; 4] = [
    "blocked in a request when abandoned",
    "blocked without a source when abandoned",
    "touches after abandoning",
    "touches after the pager is dropped",
];

fn give_up(delivery: Delivery, backing: Backing, events: Events, ending: &str) {
    child::end_if_stuck();
    let layout = layout(backing, bytes_of(backing));
    let granules = layout.total_granules();
    let size = layout.get(REGION).unwrap().granule().bytes();
    let silent = Ledger::new(granules, Answers::Threaded);
    let silent = match ending {
        "blocked without a source when abandoned" => silent.lost_after(1, Loss::Request),
        _ => silent.lost_after(1, Loss::Silence),
    };
    let (ledger, source) = silent.source();
    let region = Arc::clone(layout.get(REGION).unwrap());
    let pager = Pager::builder(layout)
        .delivery(delivery)
        .events(events)
        .prefetch(Prefetch::NONE)
        .start(source)
        .unwrap();
    assert_eq!(peek(pager.layout(), 0), word(REGION, 0));
    let view = Arc::clone(region.guest_view());
    let read = move |granule: u64| {
        let mut bytes = [0; 8];
        view.read_at(granule * size, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    };
    // A thread sees a page a moment before the page map does.
    wait_for("one granule", || pager.remaining() == granules - 1);
    let touch = {
        let read = read.clone();
        move || child::saw(read(3))
    };
    match ending {
        "blocked in a request when abandoned" => {
            thread::spawn(touch);
            wait_for("a request", || ledger.asked_of(3) == 1);
            child::reached();
            pager.abandon();
        }
        "blocked without a source when abandoned" => {
            thread::spawn(touch);
            wait_for("a stall", || matches!(pager.status(), Status::Stalled { .. }));
            child::reached();
            pager.abandon();
        }
        "touches after abandoning" => {
            pager.abandon();
            assert_eq!(pager.status(), Status::Abandoned);
            assert_eq!(pager.wait_complete(PATIENCE), Status::Abandoned);
            assert_eq!(pager.remaining(), 0);
            assert_eq!(pager.statistics().counts.poisoned, granules - 1);
            assert_eq!(read(0), word(REGION, 0), "what was there stays");
            child::reached();
            thread::spawn(touch);
        }
        "touches after the pager is dropped" => {
            drop(pager);
            assert_eq!(read(0), word(REGION, 0), "what was there stays");
            child::reached();
            thread::spawn(touch);
        }
        other => panic!("{other}"),
    }
    // The other thread ends the process.
    thread::park_timeout(PATIENCE);
}

#[test]
fn giving_up_is_a_memory_error_for_what_is_missing() {
    const NAME: &str = "giving_up_is_a_memory_error_for_what_is_missing";
    if let Some(case) = child::case() {
        let parts: Vec<&str> = case.split('/').collect();
        let backing =
            [Backing::Anonymous, Backing::Memfd, HUGE][parts[1].parse::<usize>().unwrap()];
        let events = if parts[2] == "watch" { Events::Watch } else { Events::Ignore };
        return give_up(delivery_named(parts[0]), backing, events, parts[3]);
    }
    if !userfaultfd() || !poison() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for backing in 0..backings().len() {
            for events in ["watch", "ignore"] {
                for ending in ENDINGS {
                    child::expect(
                        NAME,
                        &format!("{delivery}/{backing}/{events}/{ending}"),
                        child::SIGBUS,
                    );
                }
            }
        }
    }
}
