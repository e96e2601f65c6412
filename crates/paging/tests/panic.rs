//! The source panics in a request: on a thread of the engine, which survives that, and gives up if
//! it goes on and on. No page of zeros is seen, whatever happens.
//!
//! Delivery by signal is not among the deliveries here: there a request runs in a signal handler,
//! out of which nothing may unwind, and a panic ends the process.

mod common;

use std::{
    sync::{Arc, Once, atomic::AtomicU32, mpsc},
    thread,
};

use common::{child, *};
use pageferry_memory::{Advice, Backing, GranuleIndex, GranuleRange};
use pageferry_paging::{Delivery, Pager, Prefetch, Status};

/// Of one thread.
const SURVIVED: u32 = 16;

/// What this test does on purpose is not printed.
fn without_noise() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.payload().downcast_ref() != Some(&"a panic on purpose") {
                usual(panic);
            }
        }));
    });
}

fn deliveries() -> impl Iterator<Item = Delivery> {
    DELIVERIES.into_iter().filter(|delivery| *delivery != Delivery::Signal)
}

fn panics_now_and_then(delivery: Delivery, backing: Backing, prefetch: Prefetch, panics: u32) {
    let case = format!("{delivery} {backing} {prefetch:?} {panics}");
    let source = Arc::new(Pattern { panics: AtomicU32::new(panics), ..Pattern::default() });
    let pager = Pager::builder(layout(backing, 1 << 20))
        .delivery(delivery)
        .prefetch(prefetch)
        .start(Arc::clone(&source) as _)
        .unwrap();
    touch_at_random(pager.layout(), 4);
    verify_all(pager.layout());
    let status = pager.wait_complete(PATIENCE);
    assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
    let counts = pager.statistics().counts;
    assert_eq!(counts.panics, u64::from(panics), "{case}: {counts:?}");
    assert_eq!(counts.installed, pager.layout().total_granules(), "{case}: {counts:?}");
    assert_eq!((counts.eexist, counts.poisoned), (0, 0), "{case}: {counts:?}");
    assert_eq!(pager.last_error(), None, "{case}");
}

#[test]
fn panics_are_survived_and_every_page_is_right() {
    if !userfaultfd() {
        return;
    }
    without_noise();
    let _watch = watch(60);
    for delivery in deliveries() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            for prefetch in [
                Prefetch::NONE,
                Prefetch::SWEEP,
                Prefetch::around(64 << 10),
                Prefetch { around: 0, ahead: 64 << 10, sweep: false },
            ] {
                for panics in [1, SURVIVED - 1] {
                    panics_now_and_then(delivery, backing, prefetch, panics);
                }
            }
        }
    }
}

/// The guest never goes on; the word it must not see is reported by the exit code.
fn panics_for_ever(delivery: Delivery, ending: &str) {
    without_noise();
    child::end_if_stuck();
    let source = Arc::new(Pattern { panics: AtomicU32::new(u32::MAX), ..Pattern::default() });
    let pager = Pager::builder(layout(Backing::Anonymous, 17 << 12))
        .delivery(delivery)
        .prefetch(Prefetch::NONE)
        .start(source)
        .unwrap();
    let region = Arc::clone(pager.layout().get(REGION).unwrap());
    let touch = |page: u64| {
        let view = Arc::clone(region.guest_view());
        thread::spawn(move || {
            let mut bytes = [0; 8];
            view.read_at(page << 12, &mut bytes).unwrap();
            child::saw(u64::from_ne_bytes(bytes))
        })
    };
    // Whatever shares the faults out, every thread of the engine gets some of them.
    for page in 0..16 {
        touch(page);
    }
    wait_for("the threads of the engine give up", || {
        pager.last_error().is_some_and(|error| error.contains("panicked 16 times"))
    });
    assert_eq!(pager.status(), Status::Running, "the source is not lost");
    child::reached();
    match ending {
        "stall" => {
            assert_eq!(pager.remaining(), 17);
            std::process::exit(0);
        }
        "abandoned" => {
            pager.abandon();
            thread::park_timeout(PATIENCE);
        }
        "dropped with an event unread" => {
            // The one page that nobody touches.
            let removed = region.host_range(GranuleRange::one(GranuleIndex::new(16)));
            let view = Arc::clone(region.guest_view());
            let (say, told) = mpsc::channel();
            let removing = thread::spawn(move || {
                say.send(rustix::thread::gettid()).unwrap();
                view.advise(removed, Advice::DontNeed).unwrap();
            });
            let thread = told.recv().unwrap().as_raw_nonzero();
            // Either its event is read, by a thread of the engine that is left, or it is held up.
            wait_for("a removal", || {
                let path = format!("/proc/self/task/{thread}/stat");
                let held_up = std::fs::read_to_string(path).is_ok_and(|stat| stat.contains(") D "));
                held_up || removing.is_finished()
            });
            drop(pager);
            thread::park_timeout(PATIENCE);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn panics_without_end_stall_the_guest() {
    const NAME: &str = "panics_without_end_stall_the_guest";
    if let Some(case) = child::case() {
        let (delivery, ending) = case.split_once('/').unwrap();
        return panics_for_ever(delivery_named(delivery), ending);
    }
    if !userfaultfd() || !poison() {
        return;
    }
    for delivery in deliveries() {
        for (ending, expected) in [
            ("stall", child::End::Exit(0)),
            ("abandoned", child::SIGBUS),
            ("dropped with an event unread", child::SIGBUS),
        ] {
            child::expect(NAME, &format!("{delivery}/{ending}"), expected);
        }
    }
}

/// A source that panics when asked in advance still serves faults, and completes.
#[test]
fn a_sweep_that_always_panics_is_given_up() {
    use pageferry_paging::{Completion, PageSink, PageSource, SourceError, Span, Urgency};

    struct OnlyOnDemand(Pattern);

    impl PageSource for OnlyOnDemand {
        fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
            self.0.attach(sink)
        }

        fn request(
            &self,
            span: Span,
            urgency: Urgency,
            sink: &dyn PageSink,
        ) -> Result<(), SourceError> {
            if urgency == Urgency::Prefetch {
                panic!("a panic on purpose");
            }
            self.0.request(span, urgency, sink)
        }

        fn complete(&self, counts: Completion) -> Result<(), SourceError> {
            self.0.complete(counts)
        }

        fn detach(&self) {
            self.0.detach();
        }
    }

    if !userfaultfd() {
        return;
    }
    without_noise();
    let _watch = watch(60);
    for delivery in deliveries() {
        let pager = Pager::builder(layout(Backing::Memfd, 256 << 10))
            .delivery(delivery)
            .prefetch(Prefetch::SWEEP)
            .start(Arc::new(OnlyOnDemand(Pattern::default())))
            .unwrap();
        wait_for("sixteen panics", || pager.statistics().counts.panics == u64::from(SURVIVED));
        verify_all(pager.layout());
        let status = pager.wait_complete(PATIENCE);
        assert!(matches!(status, Status::Complete(_)), "{delivery}: {status:?}");
        assert_eq!(pager.statistics().counts.panics, u64::from(SURVIVED), "{delivery}");
    }
}
