//! What becomes of answers: counted exactly when they are too many or come unasked, installed with
//! as few calls as can be, and received where they belong.

mod common;

use std::sync::{
    Arc, Barrier, Mutex,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use common::*;
use pageferry_memory::{Backing, Layout};
use pageferry_paging::{
    Completion, Counts, Delivery, Events, InstallMethod, PageSink, PageSource, Pager, Prefetch,
    SinkError, SourceError, Span, Status, Urgency,
};
use pageferry_testing::{HugePages, features};
use pageferry_uffd::Features;

const PAGE: u64 = 4096;
/// A block of pages that is asked for as one.
const PAGES: u64 = 64;
const EVENTS: [Events; 2] = [Events::Watch, Events::Ignore];
const WAYS: [(Backing, InstallMethod); 4] = [
    (Backing::Anonymous, InstallMethod::Copy),
    (Backing::Anonymous, InstallMethod::Move),
    (Backing::Memfd, InstallMethod::Copy),
    (Backing::Memfd, InstallMethod::Continue),
];
const HUGE_WAYS: [(Backing, InstallMethod); 2] =
    [(HUGE, InstallMethod::Copy), (HUGE, InstallMethod::Continue)];

/// What a source does with a request. It may be called in a signal handler.
type Answer = dyn Fn(Span, &dyn PageSink) -> Result<(), SinkError> + Send + Sync;

/// A source that answers as it is told.
struct Told {
    answer: Box<Answer>,
    /// Granules asked for.
    asked: AtomicU64,
    sink: Mutex<Option<Arc<dyn PageSink>>>,
}

impl Told {
    fn to(
        answer: impl Fn(Span, &dyn PageSink) -> Result<(), SinkError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            answer: Box::new(answer),
            asked: AtomicU64::new(0),
            sink: Mutex::new(None),
        })
    }

    fn sink(&self) -> Arc<dyn PageSink> {
        Arc::clone(self.sink.lock().unwrap().as_ref().expect("attached"))
    }
}

impl PageSource for Told {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        *self.sink.lock().unwrap() = Some(sink);
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        let result = (self.answer)(span, sink);
        // Afterwards: who waits for this finds that the answer has been dealt with.
        self.asked.fetch_add(span.granules.count(), SeqCst);
        match result {
            Ok(()) | Err(SinkError::Stopped) => Ok(()),
            Err(error) => panic!("{error}"),
        }
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        true
    }

    fn detach(&self) {
        *self.sink.lock().unwrap() = None;
    }
}

/// Answers a span as one.
fn fill(span: Span, sink: &dyn PageSink) -> Result<(), SinkError> {
    fill_seeing(span, sink, |_| {})
}

/// [`fill`], showing the memory that is lent before it is filled.
fn fill_seeing(
    span: Span,
    sink: &dyn PageSink,
    mut see: impl FnMut(&[u8]),
) -> Result<(), SinkError> {
    let granule = sink.layout().get(span.region).unwrap().granule().bytes();
    let mut offset = span.granules.first().get() * granule;
    sink.fill(span, &mut |bytes| {
        see(bytes);
        fill_pattern(span.region, offset, bytes);
        offset += bytes.len() as u64;
        Ok(())
    })
}

/// What is expected in a span of pages.
fn bytes_of(span: Span) -> Vec<u8> {
    let mut bytes = vec![0; (span.granules.count() * PAGE) as usize];
    fill_pattern(span.region, span.granules.first().get() * PAGE, &mut bytes);
    bytes
}

struct Setup {
    delivery: Delivery,
    install: InstallMethod,
    events: Events,
    prefetch: Prefetch,
}

impl Setup {
    fn start(&self, layout: Layout, source: &Arc<Told>) -> Pager {
        Pager::builder(layout)
            .delivery(self.delivery)
            .install(Some(self.install))
            .events(self.events)
            .prefetch(self.prefetch)
            .start(Arc::clone(source) as _)
            .unwrap()
    }
}

fn each_setup(
    ways: &[(Backing, InstallMethod)],
    prefetch: Prefetch,
    mut case: impl FnMut(&str, &Setup, Backing),
) {
    for &(backing, install) in ways.iter().filter(|(_, install)| available(*install)) {
        for delivery in DELIVERIES {
            for events in EVENTS {
                let name = format!("{delivery} {backing} {install:?} {events:?}");
                case(&name, &Setup { delivery, install, events, prefetch }, backing);
            }
        }
    }
}

fn layout_for(backing: Backing) -> Layout {
    layout(backing, if backing == HUGE { 4 << 20 } else { PAGES * PAGE })
}

/// Complete, everything right; the counts, once the last answer has been dealt with.
fn finished(case: &str, pager: &Pager, source: &Told, asked: u64) -> Counts {
    verify_all(pager.layout());
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
    wait_for(case, || source.asked.load(SeqCst) >= asked);
    assert_eq!(source.asked.load(SeqCst), asked, "{case}");
    assert_eq!(pager.last_error(), None, "{case}");
    pager.statistics().counts
}

fn second_answers(ways: &[(Backing, InstallMethod)]) {
    each_setup(ways, Prefetch::NONE, |case, setup, backing| {
        let source = Told::to(|span, sink| {
            fill(span, sink)?;
            // Nothing of it may be seen.
            sink.fill(span, &mut |bytes| {
                bytes.fill(0xee);
                Ok(())
            })
        });
        let layout = layout_for(backing);
        let granules = layout.total_granules();
        let pager = setup.start(layout, &source);
        let counts = finished(case, &pager, &source, granules);
        assert_eq!(counts.duplicate, granules, "{case}: {counts:?}");
        let agreed = Completion { granules_from_source: granules, granules_poisoned: 0 };
        assert_eq!(pager.status(), Status::Complete(agreed), "{case}");
        assert_eq!((counts.installed, counts.pushed), (granules, 0), "{case}: {counts:?}");
        assert_eq!(counts.eexist, 0, "{case}: {counts:?}");
    });
}

#[test]
fn what_is_pushed_unasked_is_taken_once_and_counted() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    each_setup(&WAYS, Prefetch::NONE, |case, setup, backing| {
        let source = Told::to(fill);
        let pager = setup.start(layout_for(backing), &source);
        let sink = source.sink();
        let push = |first, count| {
            let span = span(first, count);
            sink.push(span, &bytes_of(span)).unwrap()
        };
        // Taken, a part of it once more, and the rest of the memory on demand.
        assert_eq!(push(8, 24), 24, "{case}");
        assert_eq!(push(16, 24), 8, "{case}");
        assert_eq!(push(8, 1), 0, "{case}");
        let counts = pager.statistics().counts;
        assert_eq!((counts.pushed, counts.duplicate), (32, 17), "{case}: {counts:?}");
        assert_eq!((counts.installed, counts.demand), (32, 0), "{case}: {counts:?}");
        let counts = finished(case, &pager, &source, PAGES - 32);
        assert_eq!((counts.pushed, counts.demand), (32, PAGES - 32), "{case}: {counts:?}");
        assert_eq!((counts.installed, counts.duplicate), (PAGES, 17), "{case}: {counts:?}");
        assert_eq!(push(0, PAGES), 0, "{case}");
        assert_eq!(pager.statistics().counts.duplicate, 17 + PAGES, "{case}");
    });
}

/// Buffers that MOVE takes pages from (staging.rs), and the pages in each.
const BUFFERS: u64 = 64;
const BUFFER_PAGES: u64 = (256 << 10) / PAGE;

/// Has one thread for each of `answers` pages hold what it is given to fill until all have it.
fn all_at_once(delivery: Delivery, answers: u64) -> Counts {
    let source = Told::to(|_, _| Ok(()));
    let setup = Setup {
        delivery,
        install: InstallMethod::Move,
        events: Events::Watch,
        prefetch: Prefetch::around(answers * PAGE),
    };
    let pager = setup.start(layout(Backing::Anonymous, answers * PAGE), &source);
    let case = format!("{delivery} {answers}");
    let sink = source.sink();
    let together = Barrier::new(answers as usize);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| peek(pager.layout(), 0));
        // One fault asks for all of it.
        wait_for(&case, || source.asked.load(SeqCst) == answers);
        for page in 0..answers {
            let (sink, together) = (&sink, &together);
            scope.spawn(move || {
                fill_seeing(span(page, 1), &**sink, |_| {
                    together.wait();
                })
                .unwrap();
            });
        }
        assert_eq!(guest.join().unwrap(), word(REGION, 0), "{case}");
    });
    finished(&case, &pager, &source, answers)
}

/// COPY's buffers are as many as MOVE's: twice that can be on their way.
#[test]
fn move_falls_back_to_copy_only_where_no_page_is_ready() {
    if !available(InstallMethod::Move) {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for answers in [1, BUFFERS, BUFFERS + 1, BUFFERS + 7] {
            let counts = all_at_once(delivery, answers);
            let case = format!("{delivery} {answers}: {counts:?}");
            assert_eq!(counts.move_fallbacks, answers.saturating_sub(BUFFERS), "{case}");
            assert_eq!((counts.installed, counts.eexist), (answers, 0), "{case}");
        }
    }
}

/// More at once than is ready to be moved: what the refiller is too late for is copied, and what
/// is ready is not.
/// MOVE refuses where one side is locked and the other is not (mm/userfaultfd.c, Linux 6.8).
#[test]
fn memory_that_is_locked_is_copied_into() {
    if !features(Features::MOVE) {
        return;
    }
    let _watch = watch(20);
    for delivery in DELIVERIES {
        let layout = layout_for(Backing::Anonymous);
        let view = layout.get(REGION).unwrap().guest_view().range();
        // SAFETY: locks what will come into a mapping that lives longer than this.
        let locked = unsafe {
            let address = view.start().as_ptr().cast();
            libc::mlock2(address, view.len() as usize, libc::MLOCK_ONFAULT as _)
        };
        if locked != 0 {
            println!("skipped: needs mlock2: {}", std::io::Error::last_os_error());
            return;
        }
        let source = Told::to(fill);
        let pager = Pager::builder(layout)
            .delivery(delivery)
            .install(Some(InstallMethod::Move))
            .prefetch(Prefetch::NONE)
            .start(Arc::clone(&source) as _)
            .unwrap();
        verify_all(pager.layout());
        let status = pager.wait_complete(PATIENCE);
        assert!(matches!(status, Status::Complete(_)), "{delivery} {status:?}");
        let counts = pager.statistics().counts;
        assert_eq!((counts.installed, counts.poisoned), (PAGES, 0), "{delivery} {counts:?}");
        assert_eq!(counts.move_fallbacks, PAGES, "{delivery} {counts:?}");
    }
}

#[test]
fn a_long_answer_is_right_whether_or_not_the_refiller_keeps_up() {
    if !available(InstallMethod::Move) {
        return;
    }
    let _watch = watch(60);
    let pages = 4 * BUFFERS * BUFFER_PAGES;
    for delivery in [Delivery::Queue, Delivery::Signal] {
        let setup = Setup {
            delivery,
            install: InstallMethod::Move,
            events: Events::Watch,
            prefetch: Prefetch::around(pages * PAGE),
        };
        let source = Told::to(fill);
        let pager = setup.start(layout(Backing::Anonymous, pages * PAGE), &source);
        let counts = finished(&delivery.to_string(), &pager, &source, pages);
        let case = format!("{delivery}: {counts:?}");
        assert_eq!(counts.installed, pages, "{case}");
        let buffers = pages / BUFFER_PAGES;
        assert!(counts.move_fallbacks <= buffers - BUFFERS, "{case}");
    }
}

#[test]
fn a_contiguous_answer_is_installed_by_one_call() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    each_setup(&WAYS, Prefetch::around(PAGES * PAGE), |case, setup, backing| {
        for whole in [true, false] {
            let source = Told::to(move |span, sink| {
                if whole {
                    return fill(span, sink);
                }
                // The same in pieces: so many calls are seen to be counted.
                for granule in span.granules.iter() {
                    fill(common::span(granule.get(), 1), sink)?;
                }
                Ok(())
            });
            let pager = setup.start(layout_for(backing), &source);
            let counts = finished(case, &pager, &source, PAGES);
            let case = format!("{case} {whole}: {counts:?}");
            // Each userfaultfd is called for its own addresses.
            let shards = if let Delivery::Sharded(shards) = setup.delivery { shards } else { 1 };
            let expected = if whole { u64::from(shards) } else { PAGES };
            assert_eq!(counts.install_calls, expected + counts.eagain, "{case}");
            assert_eq!(counts.installed, PAGES, "{case}");
        }
    });
}

fn received_in_place(ways: &[(Backing, InstallMethod)]) {
    each_setup(ways, Prefetch::NONE, |case, setup, backing| {
        let (inside, outside) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let seen = [Arc::clone(&inside), Arc::clone(&outside)];
        let source = Told::to(move |span, sink| {
            let region = sink.layout().get(span.region).unwrap();
            let place = region.fill_range(span.granules);
            fill_seeing(span, sink, |bytes| {
                let start = bytes.as_ptr() as u64;
                let in_place = place.is_some_and(|place| {
                    assert_eq!(place.len(), bytes.len() as u64, "one granule at a time");
                    place.start().get() == start
                });
                seen[usize::from(!in_place)].fetch_add(1, SeqCst);
            })
        });
        let layout = layout_for(backing);
        let granules = layout.total_granules();
        let pager = setup.start(layout, &source);
        finished(case, &pager, &source, granules);
        let in_place = setup.install == InstallMethod::Continue && setup.events == Events::Ignore;
        let expected = if in_place { (granules, 0) } else { (0, granules) };
        assert_eq!((inside.load(SeqCst), outside.load(SeqCst)), expected, "{case}");
    });
}

#[test]
fn a_second_answer_is_dropped_and_counted() {
    if userfaultfd() {
        let _watch = watch(60);
        second_answers(&WAYS);
    }
}

#[test]
fn bytes_are_received_into_the_fill_view_only_where_nobody_can_take_it_away() {
    if userfaultfd() {
        let _watch = watch(60);
        received_in_place(&WAYS);
    }
}

#[test]
fn huge_pages_are_answered_the_same() {
    if !userfaultfd() {
        return;
    }
    let Some(_pages) = HugePages::reserve(2) else { return };
    let _watch = watch(60);
    second_answers(&HUGE_WAYS);
    received_in_place(&HUGE_WAYS);
}
