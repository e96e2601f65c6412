//! Sources and guests that the tests of this crate share.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test binary uses a part of it.

pub mod external;
mod ledger;

pub use ledger::{Answers, Ledger, Loss};
pub use pageferry_testing::{
    HUGE, HugePages, PATIENCE, REGION, Random, Watch, child, features, fill_pattern, huge_pages,
    layout, peek, poke, shuffled, userfaultfd, verify_all, wait_for, watch, word,
};

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    },
    thread::{self, JoinHandle},
};

use pageferry_memory::{GranuleIndex, GranuleRange, Layout};
use pageferry_paging::{
    Completion, Delivery, InstallMethod, PageSink, PageSource, Pager, SinkError, SourceError, Span,
    Urgency,
};
use pageferry_uffd::Features;

pub const DELIVERIES: [Delivery; 6] = [
    Delivery::Queue,
    Delivery::QueueN(3),
    Delivery::ByThread(3),
    Delivery::ByCpu(2),
    Delivery::Sharded(3),
    Delivery::Signal,
];

/// A source that computes its bytes, and counts what it is asked.
#[derive(Default)]
pub struct Pattern {
    /// Answer from a thread instead of inline.
    pub threaded: bool,
    /// Say no to being asked in a signal handler.
    pub not_signal_safe: bool,
    /// Granule that is answered as poisoned.
    pub poisoned: Option<u64>,
    /// Granules whose number is a multiple of this are answered as zero.
    pub zero_every: Option<u64>,
    /// Panic in this many requests.
    pub panics: AtomicU32,
    /// Fail every request from the one with this number on.
    pub fail_from: Option<u64>,
    /// Do not answer while set.
    pub hold: AtomicBool,
    pub requests: AtomicU64,
    pub granules: AtomicU64,
    pub demanded: AtomicU64,
    pub expedited: AtomicU64,
    pub completed: Mutex<Option<Completion>>,
    pub queue: Arc<Queue>,
    pub worker: Mutex<Option<JoinHandle<()>>>,
    pub me: Mutex<Option<Arc<dyn PageSink>>>,
}

#[derive(Default)]
pub struct Queue {
    spans: Mutex<(VecDeque<(Span, Urgency)>, bool)>,
    changed: Condvar,
}

impl Pattern {
    fn answer(&self, span: Span, sink: &dyn PageSink) -> Result<(), SinkError> {
        answer(self.poisoned, self.zero_every, span, sink)
    }

    pub fn release(&self) {
        self.hold.store(false, SeqCst);
        let _queue = self.queue.spans.lock().unwrap();
        self.queue.changed.notify_all();
    }

    /// Answers what it was asked and kept to itself.
    pub fn answer_now(&self, span: Span) {
        let sink = self.me.lock().unwrap().clone().expect("attached");
        self.answer(span, &*sink).unwrap();
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(SeqCst)
    }
}

fn answer(
    poisoned: Option<u64>,
    zero_every: Option<u64>,
    span: Span,
    sink: &dyn PageSink,
) -> Result<(), SinkError> {
    let granule = sink.layout().get(span.region).unwrap().granule().bytes();
    let special = |g: GranuleIndex| {
        Some(g.get()) == poisoned || zero_every.is_some_and(|n| g.get().is_multiple_of(n))
    };
    let mut rest = span.granules;
    while !rest.is_empty() {
        let plain = rest.iter().take_while(|g| !special(*g)).count() as u64;
        if plain == 0 {
            let (one, after) = rest.split_at(1);
            let one_span = Span { region: span.region, granules: one };
            if Some(one.first().get()) == poisoned {
                sink.poison(one_span)?;
            } else {
                sink.zero(one_span)?;
            }
            rest = after;
            continue;
        }
        let (run, after) = rest.split_at(plain);
        let mut offset = run.first().get() * granule;
        sink.fill(Span { region: span.region, granules: run }, &mut |bytes| {
            fill_pattern(span.region, offset, bytes);
            offset += bytes.len() as u64;
            Ok(())
        })?;
        rest = after;
    }
    Ok(())
}

impl PageSource for Pattern {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        *self.me.lock().unwrap() = Some(Arc::clone(&sink));
        if self.threaded {
            let queue = Arc::clone(&self.queue);
            queue.spans.lock().unwrap().1 = false;
            let (poisoned, zero_every) = (self.poisoned, self.zero_every);
            *self.worker.lock().unwrap() = Some(thread::spawn(move || {
                loop {
                    let mut spans = queue.spans.lock().unwrap();
                    while spans.0.is_empty() && !spans.1 {
                        spans = queue.changed.wait(spans).unwrap();
                    }
                    if spans.1 {
                        return;
                    }
                    let (span, _) = spans.0.pop_front().unwrap();
                    drop(spans);
                    match answer(poisoned, zero_every, span, &*sink) {
                        Ok(()) | Err(SinkError::Stopped) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }));
        }
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        urgency: Urgency,
        sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let number = self.requests.fetch_add(1, SeqCst);
        self.granules.fetch_add(span.granules.count(), SeqCst);
        if urgency == Urgency::Demand {
            self.demanded.fetch_add(span.granules.count(), SeqCst);
        }
        if self.panics.load(SeqCst) > 0 && self.panics.fetch_sub(1, SeqCst) > 0 {
            panic!("a panic on purpose");
        }
        if self.fail_from.is_some_and(|from| number >= from) {
            return Err(SourceError::Lost("on purpose".into()));
        }
        if self.hold.load(SeqCst) {
            return Ok(());
        }
        if self.threaded {
            self.queue.spans.lock().unwrap().0.push_back((span, urgency));
            self.queue.changed.notify_one();
            return Ok(());
        }
        match self.answer(span, sink) {
            Ok(()) | Err(SinkError::Stopped) => Ok(()),
            Err(error) => panic!("{error}"),
        }
    }

    fn expedite(&self, span: Span) -> Result<(), SourceError> {
        self.expedited.fetch_add(span.granules.count(), SeqCst);
        Ok(())
    }

    fn signal_safe(&self) -> bool {
        // The threaded variant allocates when it queues.
        !self.threaded && !self.not_signal_safe
    }

    fn answers_inline(&self) -> bool {
        !self.threaded
    }

    fn complete(&self, counts: Completion) -> Result<(), SourceError> {
        *self.completed.lock().unwrap() = Some(counts);
        Ok(())
    }

    fn detach(&self) {
        self.queue.spans.lock().unwrap().1 = true;
        self.queue.changed.notify_all();
        if let Some(worker) = self.worker.lock().unwrap().take() {
            worker.join().unwrap();
        }
        *self.me.lock().unwrap() = None;
    }
}

/// Runs `threads` threads over all pages of region 0 in different pseudo-random orders, each
/// checking the first and the last word of each page.
pub fn touch_at_random(layout: &Layout, threads: u64) {
    let pages = layout.get(REGION).unwrap().len() >> 12;
    thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut x = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(thread + 1);
                for _ in 0..2 * pages {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    let page = (x % pages) << 12;
                    for offset in [page, page + 4088] {
                        assert_eq!(peek(layout, offset), word(REGION, offset));
                    }
                }
            });
        }
    });
}

pub fn span(first: u64, count: u64) -> Span {
    Span { region: REGION, granules: GranuleRange::new(GranuleIndex::new(first), count) }
}

pub fn with_pager<R>(pager: &Pager, use_it: impl FnOnce(&Layout) -> R) -> R {
    use_it(pager.layout())
}

/// Whether the kernel has what this install takes; says so if not.
pub fn available(install: InstallMethod) -> bool {
    install != InstallMethod::Move || features(Features::MOVE)
}

/// Whether the kernel can make memory an error; says so if not.
pub fn poison() -> bool {
    features(Features::POISON)
}

/// A delivery by its name, as printed.
pub fn delivery_named(name: &str) -> Delivery {
    DELIVERIES.into_iter().find(|d| d.to_string() == name).unwrap()
}
