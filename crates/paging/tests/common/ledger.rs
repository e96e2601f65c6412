//! A source that keeps books: what each granule was asked for and answered, by granule. All of
//! `request` is safe in a signal handler, also when a thread of the source answers.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    },
    thread::{self, JoinHandle},
};

use pageferry_memory::{GranuleIndex, GranuleRange};
use pageferry_paging::{Completion, PageSink, PageSource, SinkError, SourceError, Span, Urgency};
use rustix::thread::futex;

use super::{REGION, fill_pattern};

/// Who answers.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Answers {
    /// The thread that asks, before `request` returns.
    Inline,
    /// A thread of the source.
    Threaded,
}

/// How the source is lost, once it has done as much as it is to do.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Loss {
    /// It has been asked for so many granules, and answers those: the next request is an error.
    Request,
    /// It has answered so many, and tells the sink that it answers no more.
    Sink,
    /// It has answered so many, and answers no more, until [`Ledger::declare_lost`].
    Silence,
}

/// The granules of region 0 that it was asked for and that it answered.
pub struct Ledger {
    answers: Answers,
    loss: Option<(Loss, u64)>,
    pub poisoned: Option<u64>,
    /// Asked for, not yet answered: a bit a granule.
    owed: Box<[AtomicU64]>,
    pub asked: Box<[AtomicU32]>,
    pub answered: Box<[AtomicU32]>,
    pub expedited: Box<[AtomicU32]>,
    pub requests: AtomicU64,
    pub as_prefetch: AtomicU64,
    /// Requests are accepted and stay unanswered while set.
    held: AtomicBool,
    total_asked: AtomicU64,
    total_answered: AtomicU64,
    pub lost: AtomicBool,
    stop: AtomicBool,
    bell: AtomicU32,
    sink: Mutex<Option<Arc<dyn PageSink>>>,
    worker: Mutex<Option<JoinHandle<()>>>,
    pub completed: Mutex<Option<Completion>>,
}

fn counters(granules: u64) -> Box<[AtomicU32]> {
    (0..granules).map(|_| AtomicU32::new(0)).collect()
}

impl Ledger {
    pub fn new(granules: u64, answers: Answers) -> Self {
        Self {
            answers,
            loss: None,
            poisoned: None,
            owed: (0..granules.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            asked: counters(granules),
            answered: counters(granules),
            expedited: counters(granules),
            requests: AtomicU64::new(0),
            as_prefetch: AtomicU64::new(0),
            held: AtomicBool::new(false),
            total_asked: AtomicU64::new(0),
            total_answered: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            bell: AtomicU32::new(0),
            sink: Mutex::new(None),
            worker: Mutex::new(None),
            completed: Mutex::new(None),
        }
    }

    /// Does so many granules and perhaps a few more, then is lost.
    pub fn lost_after(self, granules: u64, loss: Loss) -> Self {
        Self { loss: Some((loss, granules)), ..self }
    }

    /// Holds its answers from the start.
    pub fn holding(self) -> Self {
        self.held.store(true, SeqCst);
        self
    }

    pub fn with_poisoned(self, granule: u64) -> Self {
        Self { poisoned: Some(granule), ..self }
    }

    /// Answers what is owed, and whatever is asked from now on. The source must be threaded.
    pub fn release(&self) {
        assert_eq!(self.answers, Answers::Threaded);
        self.held.store(false, SeqCst);
        self.ring();
    }

    pub fn hold(&self) {
        self.held.store(true, SeqCst);
    }

    /// Tells the engine that this source is gone.
    pub fn declare_lost(&self) {
        self.lost.store(true, SeqCst);
        let sink = self.sink.lock().unwrap().clone();
        sink.expect("attached").lost(SourceError::Lost("on purpose".into()));
    }

    pub fn answered_total(&self) -> u64 {
        self.total_answered.load(SeqCst)
    }

    pub fn asked_of(&self, granule: u64) -> u32 {
        self.asked[granule as usize].load(SeqCst)
    }

    pub fn has_answered(&self, granule: u64) -> bool {
        self.answered[granule as usize].load(SeqCst) > 0
    }

    /// No granule was asked for or answered more than once.
    pub fn check_once(&self) {
        for (granule, (asked, answered)) in self.asked.iter().zip(&self.answered).enumerate() {
            let (asked, answered) = (asked.load(SeqCst), answered.load(SeqCst));
            assert!(asked <= 1, "granule {granule} was asked for {asked} times");
            assert!(answered <= asked, "granule {granule}: {answered} answers to {asked} requests");
        }
    }

    fn ring(&self) {
        self.bell.fetch_add(1, SeqCst);
        let _ = futex::wake(&self.bell, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    fn exhausted(&self) -> Option<Loss> {
        let (loss, after) = self.loss?;
        let so_far = match loss {
            Loss::Request => self.total_asked.load(SeqCst),
            Loss::Sink | Loss::Silence => self.answered_total(),
        };
        (so_far >= after).then_some(loss)
    }

    fn answer(&self, granules: GranuleRange, sink: &dyn PageSink) -> Result<(), SinkError> {
        let size = sink.layout().get(REGION).unwrap().granule().bytes();
        for granule in granules.iter() {
            let one = Span { region: REGION, granules: GranuleRange::one(granule) };
            // Counted first: a thread that sees the page must find it answered.
            self.answered[granule.get() as usize].fetch_add(1, SeqCst);
            self.total_answered.fetch_add(1, SeqCst);
            if self.poisoned == Some(granule.get()) {
                sink.poison(one)?;
                continue;
            }
            sink.fill(one, &mut |bytes| {
                fill_pattern(REGION, granule.get() * size, bytes);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn work(&self, sink: &dyn PageSink) {
        while !self.stop.load(SeqCst) {
            let heard = self.bell.load(SeqCst);
            let mut found = false;
            if !self.held.load(SeqCst) && !self.lost.load(SeqCst) {
                for (index, word) in self.owed.iter().enumerate() {
                    let mut bits = word.swap(0, SeqCst);
                    while bits != 0 {
                        match self.exhausted() {
                            Some(Loss::Sink) => {
                                if !self.lost.swap(true, SeqCst) {
                                    sink.lost(SourceError::Lost("on purpose".into()));
                                }
                                break;
                            }
                            Some(Loss::Silence) => break,
                            // What was accepted is answered.
                            Some(Loss::Request) | None => {}
                        }
                        if self.held.load(SeqCst) {
                            word.fetch_or(bits, SeqCst);
                            break;
                        }
                        found = true;
                        let granule = index as u64 * 64 + u64::from(bits.trailing_zeros());
                        bits &= bits - 1;
                        match self.answer(GranuleRange::one(GranuleIndex::new(granule)), sink) {
                            Ok(()) | Err(SinkError::Stopped) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            }
            if !found {
                let most = futex::Timespec { tv_sec: 1, tv_nsec: 0 };
                let _ = futex::wait(&self.bell, futex::Flags::PRIVATE, heard, Some(&most));
            }
        }
    }

    /// For an `Arc`, as its thread needs it.
    pub fn source(self) -> (Arc<Self>, Arc<dyn PageSource>) {
        let ledger = Arc::new(self);
        (Arc::clone(&ledger), Arc::new(Handle(ledger)))
    }
}

/// What the pager is given: attaching must start a thread that owns the ledger too.
struct Handle(Arc<Ledger>);

impl PageSource for Handle {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        *self.0.sink.lock().unwrap() = Some(Arc::clone(&sink));
        if self.0.answers == Answers::Threaded {
            let ledger = Arc::clone(&self.0);
            *self.0.worker.lock().unwrap() = Some(thread::spawn(move || ledger.work(&*sink)));
        }
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        urgency: Urgency,
        sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let ledger = &*self.0;
        let lost = || SourceError::Lost(String::new());
        if ledger.lost.load(SeqCst) {
            return Err(lost());
        }
        let exhausted = ledger.exhausted();
        if exhausted == Some(Loss::Request)
            || (exhausted == Some(Loss::Sink) && ledger.answers == Answers::Inline)
        {
            ledger.lost.store(true, SeqCst);
            return match exhausted {
                Some(Loss::Sink) => {
                    sink.lost(lost());
                    Ok(())
                }
                _ => Err(lost()),
            };
        }
        ledger.requests.fetch_add(1, SeqCst);
        ledger.total_asked.fetch_add(span.granules.count(), SeqCst);
        if urgency == Urgency::Prefetch {
            ledger.as_prefetch.fetch_add(span.granules.count(), SeqCst);
        }
        for granule in span.granules.iter() {
            ledger.asked[granule.get() as usize].fetch_add(1, SeqCst);
        }
        if exhausted == Some(Loss::Silence) {
            return Ok(());
        }
        if ledger.answers == Answers::Inline && !ledger.held.load(SeqCst) {
            return match ledger.answer(span.granules, sink) {
                Ok(()) | Err(SinkError::Stopped) => Ok(()),
                Err(error) => panic!("{error}"),
            };
        }
        for granule in span.granules.iter() {
            let bit = 1 << (granule.get() % 64);
            ledger.owed[(granule.get() / 64) as usize].fetch_or(bit, SeqCst);
        }
        ledger.ring();
        Ok(())
    }

    fn expedite(&self, span: Span) -> Result<(), SourceError> {
        for granule in span.granules.iter() {
            self.0.expedited[granule.get() as usize].fetch_add(1, SeqCst);
        }
        Ok(())
    }

    fn signal_safe(&self) -> bool {
        true
    }

    fn answers_inline(&self) -> bool {
        self.0.answers == Answers::Inline
    }

    fn complete(&self, counts: Completion) -> Result<(), SourceError> {
        *self.0.completed.lock().unwrap() = Some(counts);
        Ok(())
    }

    fn detach(&self) {
        self.0.stop.store(true, SeqCst);
        self.0.ring();
        if let Some(worker) = self.0.worker.lock().unwrap().take() {
            worker.join().unwrap();
        }
        *self.0.sink.lock().unwrap() = None;
    }
}
