//! Sources and guests that the tests of this crate share.
#![allow(dead_code, unreachable_pub, unused_imports)] // Each test binary uses a part of it.

pub mod child;
pub mod external;
mod ledger;
mod patience;

pub use ledger::{Answers, Ledger, Loss};
pub use patience::{PATIENCE, Watch, wait_for, watch};

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    },
    thread::{self, JoinHandle},
};

use pageferry_memory::{
    Backing, GranuleIndex, GranuleRange, Layout, PageSize, Region, RegionConfig, RegionId,
};
use pageferry_paging::{
    Completion, Delivery, PageSink, PageSource, Pager, SinkError, SourceError, Span, Urgency,
};

pub const DELIVERIES: [Delivery; 6] = [
    Delivery::Queue,
    Delivery::QueueN(3),
    Delivery::ByThread(3),
    Delivery::ByCpu(2),
    Delivery::Sharded(3),
    Delivery::Signal,
];

/// The eight bytes at each multiple of eight of the source's memory.
pub fn word(region: RegionId, offset: u64) -> u64 {
    let mut x = (offset >> 3) ^ (u64::from(region.get()) << 56) ^ 0x5851_f42d_4c95_7f2d;
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^ (x >> 33) | 1
}

pub fn fill_pattern(region: RegionId, mut offset: u64, bytes: &mut [u8]) {
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word(region, offset).to_ne_bytes());
        offset += 8;
    }
}

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

/// Whether a userfaultfd can be had at all.
pub fn userfaultfd() -> bool {
    let works = pageferry_uffd::Options::new().open().is_ok();
    if !works {
        println!("skipped: needs userfaultfd");
    }
    works
}

/// Reserved and free huge pages of 2 MiB.
pub fn huge_pages(needed: u64) -> bool {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0);
    let enough = free >= needed;
    if !enough {
        println!("skipped: needs {needed} free huge pages of 2 MiB, there are {free}");
    }
    enough
}

pub fn layout(backing: Backing, bytes: u64) -> Layout {
    let region = Region::new(&RegionConfig::new(bytes, backing)).unwrap();
    Layout::new(vec![Arc::new(region)]).unwrap()
}

pub const HUGE: Backing = Backing::Hugetlb(PageSize::SIZE_2M);
pub const REGION: RegionId = RegionId::new(0);

/// Reads the eight bytes at `offset` of region 0 as a guest would: in user mode, faulting.
pub fn peek(layout: &Layout, offset: u64) -> u64 {
    let view = layout.get(REGION).unwrap().guest_view();
    assert!(offset.is_multiple_of(8) && offset + 8 <= view.range().len());
    // SAFETY: inside the mapping and aligned, checked above; the layout keeps it mapped.
    unsafe { view.as_ptr().add(offset as usize).cast::<u64>().read_volatile() }
}

pub fn poke(layout: &Layout, offset: u64, value: u64) {
    let view = layout.get(REGION).unwrap().guest_view();
    assert!(offset.is_multiple_of(8) && offset + 8 <= view.range().len());
    // SAFETY: as in `peek`; tests that write concurrently write disjoint words.
    unsafe { view.as_ptr().add(offset as usize).cast::<u64>().write_volatile(value) }
}

/// Checks every word of every page of region 0.
pub fn verify_all(layout: &Layout) {
    let region = layout.get(REGION).unwrap();
    for offset in (0..region.len()).step_by(8) {
        assert_eq!(peek(layout, offset), word(REGION, offset), "offset {offset:#x}");
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

/// A delivery by its name, as printed.
pub fn delivery_named(name: &str) -> Delivery {
    DELIVERIES.into_iter().find(|d| d.to_string() == name).unwrap()
}

/// The numbers below `count` in an order of their own for every `seed`.
pub fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut random = Random::new(seed);
    for index in (1..order.len()).rev() {
        order.swap(index, random.below(index as u64 + 1) as usize);
    }
    order
}

/// xorshift64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed + 1) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }
}
