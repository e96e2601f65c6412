//! A page source for tests: the guest's first contents, with everything that can go wrong.

mod pool;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    time::Duration,
};

use pageferry_memory::{GranuleIndex, GuestAddress, Region};
use pageferry_paging::{Completion, PageSink, PageSource, SinkError, SourceError, Span, Urgency};

use self::pool::Pool;
use crate::Pattern;

/// How a [`PatternSource`] behaves.
#[derive(Clone, Debug, Default)]
pub struct PatternOptions {
    /// What it serves. The payload must expect the same.
    pub pattern: Pattern,
    /// From a request to its answer. With none, `request` itself answers, unless `threads` says
    /// otherwise; with some, a pool of threads does, and delays do not add up.
    pub delay: Duration,
    /// Threads that answer; 0: none without a delay, four with one.
    pub threads: u16,
    /// Addresses whose granules it cannot read.
    pub poisoned: Vec<GuestAddress>,
    /// Addresses, multiples of 8, whose words it serves wrong.
    pub lies: Vec<GuestAddress>,
    /// It is lost as soon as more granules than these have been requested, as if by
    /// [`lose`](PatternSource::lose) at that moment; `None`: it is not.
    pub lose_after: Option<u64>,
    /// It panics, once, when the granule of this address is requested, and answers when it is
    /// requested again.
    pub panic_at: Option<GuestAddress>,
    /// It keeps requests back until it is [released](PatternSource::release).
    pub held: bool,
}

/// Serves what [`expected_word`](crate::expected_word) says.
///
/// Without delay and threads it answers inside `request`, allocates nothing and takes no lock, so that
/// it may be asked from a signal handler.
pub struct PatternSource {
    shared: Arc<Shared>,
    pool: Mutex<Option<Pool>>,
    sink: Mutex<Option<Arc<dyn PageSink>>>,
    /// What is kept back, while anything is.
    held: Mutex<Option<Vec<Span>>>,
}

/// What the pool's threads need, too.
struct Shared {
    options: PatternOptions,
    lost: AtomicBool,
    panic_armed: AtomicBool,
    requests: AtomicU64,
    granules: AtomicU64,
    answered: AtomicU64,
    completions: AtomicU64,
}

impl PatternSource {
    /// A source that is there.
    pub fn new(options: PatternOptions) -> Arc<Self> {
        Arc::new(Self {
            held: Mutex::new(options.held.then(Vec::new)),
            shared: Arc::new(Shared {
                panic_armed: AtomicBool::new(options.panic_at.is_some()),
                options,
                lost: AtomicBool::new(false),
                requests: AtomicU64::new(0),
                granules: AtomicU64::new(0),
                answered: AtomicU64::new(0),
                completions: AtomicU64::new(0),
            }),
            pool: Mutex::new(None),
            sink: Mutex::new(None),
        })
    }

    /// Is lost: answers nothing more, and tells the engine. What was asked of it and has not been
    /// answered is never answered.
    pub fn lose(&self) {
        self.shared.lost.store(true, SeqCst);
        let sink = lock(&self.sink).clone();
        if let Some(sink) = sink {
            sink.lost(lost());
        }
    }

    /// Answers what was kept back, and keeps nothing back any more.
    ///
    /// # Errors
    /// When it is lost or detached; nothing of that is answered then.
    pub fn release(&self) -> Result<(), SourceError> {
        let held = lock(&self.held).take().unwrap_or_default();
        let sink = lock(&self.sink).clone();
        let Some(sink) = sink else { return Err(detached()) };
        held.into_iter().try_for_each(|span| self.serve(span, &*sink))
    }

    /// Requests it got.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(SeqCst)
    }

    /// Granules requested.
    pub fn granules(&self) -> u64 {
        self.shared.granules.load(SeqCst)
    }

    /// Granules answered, poisoned ones included.
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(SeqCst)
    }

    /// How many times it was told that all memory is there.
    pub fn completions(&self) -> u64 {
        self.shared.completions.load(SeqCst)
    }

    /// Answers now, or has the pool do it.
    fn serve(&self, span: Span, sink: &dyn PageSink) -> Result<(), SourceError> {
        if self.threads() == 0 {
            return match self.shared.answer(span, sink) {
                // Whoever stopped the pager expects no answer.
                Ok(()) | Err(SinkError::Stopped) => Ok(()),
                Err(error) => Err(SourceError::Lost(error.to_string())),
            };
        }
        match lock(&self.pool).as_ref() {
            Some(pool) => {
                pool.push(span, self.shared.options.delay);
                Ok(())
            }
            None => Err(detached()),
        }
    }

    /// Whether a request is answered before it returns, without a lock.
    fn is_direct(&self) -> bool {
        self.threads() == 0 && !self.shared.options.held
    }

    fn threads(&self) -> usize {
        let options = &self.shared.options;
        match options.threads {
            0 if options.delay.is_zero() => 0,
            0 => 4,
            threads => threads.into(),
        }
    }
}

impl PageSource for PatternSource {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        *lock(&self.sink) = Some(Arc::clone(&sink));
        let threads = self.threads();
        if threads > 0 {
            let shared = Arc::clone(&self.shared);
            let pool = Pool::start(threads, move |span| shared.answer_later(span, &*sink))
                .map_err(|error| SourceError::Io {
                    what: "starting threads that answer".to_owned(),
                    error,
                })?;
            *lock(&self.pool) = Some(pool);
        }
        Ok(())
    }

    fn request(
        &self,
        span: Span,
        _urgency: Urgency,
        sink: &dyn PageSink,
    ) -> Result<(), SourceError> {
        let shared = &self.shared;
        if shared.lost.load(SeqCst) {
            return Err(lost());
        }
        shared.requests.fetch_add(1, SeqCst);
        let count = span.granules.count();
        let requested = shared.granules.fetch_add(count, SeqCst) + count;
        if shared.options.lose_after.is_some_and(|most| requested > most) {
            shared.lost.store(true, SeqCst);
            return Err(lost());
        }
        if shared.covers(span, sink, shared.options.panic_at.as_slice())
            && shared.panic_armed.swap(false, SeqCst)
        {
            panic!("a page source panics on purpose, asked for {span}");
        }
        if shared.options.held
            && let Some(held) = lock(&self.held).as_mut()
        {
            held.push(span);
            return Ok(());
        }
        self.serve(span, sink)
    }

    fn signal_safe(&self) -> bool {
        self.is_direct()
    }

    fn answers_inline(&self) -> bool {
        self.is_direct()
    }

    fn complete(&self, _counts: Completion) -> Result<(), SourceError> {
        self.shared.completions.fetch_add(1, SeqCst);
        Ok(())
    }

    fn detach(&self) {
        // Taken out first: its threads may need the lock to end.
        let pool = lock(&self.pool).take();
        drop(pool);
        *lock(&self.sink) = None;
    }
}

impl Shared {
    fn answer_later(&self, span: Span, sink: &dyn PageSink) {
        if self.lost.load(SeqCst) {
            return;
        }
        match self.answer(span, sink) {
            Ok(()) | Err(SinkError::Stopped) => {}
            Err(error) => sink.lost(SourceError::Lost(error.to_string())),
        }
    }

    /// Answers runs of granules that are answered in the same way.
    fn answer(&self, span: Span, sink: &dyn PageSink) -> Result<(), SinkError> {
        let Some(region) = sink.layout().get(span.region) else {
            return Err(SinkError::OutOfRange(span));
        };
        let mut rest = span.granules;
        while !rest.is_empty() {
            let kind = self.kind(region, rest.first());
            let same = rest.iter().take_while(|granule| self.kind(region, *granule) == kind);
            let (run, after) = rest.split_at(same.count() as u64);
            self.answer_run(Span { region: span.region, granules: run }, region, kind, sink)?;
            self.answered.fetch_add(run.count(), SeqCst);
            rest = after;
        }
        Ok(())
    }

    fn answer_run(
        &self,
        span: Span,
        region: &Region,
        kind: Kind,
        sink: &dyn PageSink,
    ) -> Result<(), SinkError> {
        match kind {
            Kind::Poison => sink.poison(span),
            Kind::Zero => sink.zero(span),
            Kind::Data => {
                let mut address = region.guest_address(span.granules.first());
                sink.fill(span, &mut |bytes| {
                    self.options.pattern.fill(address, bytes);
                    for lie in &self.options.lies {
                        let offset = lie.offset_from(address).map(|offset| offset as usize);
                        if let Some(word) =
                            offset.and_then(|offset| bytes.get_mut(offset..offset + 8))
                        {
                            word.iter_mut().for_each(|byte| *byte = !*byte);
                        }
                    }
                    address = GuestAddress::new(address.get() + bytes.len() as u64);
                    Ok(())
                })
            }
        }
    }

    fn kind(&self, region: &Region, granule: GranuleIndex) -> Kind {
        let start = region.guest_address(granule);
        let len = region.granule().bytes();
        if contains_any(start, len, &self.options.poisoned) {
            return Kind::Poison;
        }
        // A granule with a lie in it is not zero.
        let zero =
            |offset: u64| self.options.pattern.is_zero(GuestAddress::new(start.get() + offset));
        if (0..len).step_by(4096).all(zero) && !contains_any(start, len, &self.options.lies) {
            return Kind::Zero;
        }
        Kind::Data
    }

    fn covers(&self, span: Span, sink: &dyn PageSink, addresses: &[GuestAddress]) -> bool {
        let Some(region) = sink.layout().get(span.region) else { return false };
        let len = span.granules.count() * region.granule().bytes();
        contains_any(region.guest_address(span.granules.first()), len, addresses)
    }
}

#[derive(Copy, Clone, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
    Poison,
}

fn contains_any(start: GuestAddress, len: u64, addresses: &[GuestAddress]) -> bool {
    addresses.iter().any(|address| address.offset_from(start).is_some_and(|offset| offset < len))
}

fn detached() -> SourceError {
    SourceError::Lost("it is detached".to_owned())
}

fn lost() -> SourceError {
    SourceError::Lost("it was told to be".to_owned())
}

/// A panic cannot leave what these locks protect half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
