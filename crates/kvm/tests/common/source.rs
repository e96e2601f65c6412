//! Where the test guests' memory comes from.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
};

use pageferry_memory::RegionId;
use pageferry_paging::{Completion, PageSink, PageSource, SinkError, SourceError, Span, Urgency};

/// What is at an offset of the memory, whole words.
pub type Contents = fn(RegionId, u64, &mut [u8]);

/// Computes its bytes, keeps them back while it is told to, and counts what it is asked for.
pub struct Source {
    pub contents: Contents,
    /// Granules that can never come.
    pub poisoned: BTreeSet<u64>,
    /// Nothing is answered while this is set.
    pub hold: AtomicBool,
    pub granules: AtomicU64,
    pub held: Mutex<Vec<Span>>,
    pub sink: Mutex<Option<Arc<dyn PageSink>>>,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            contents: pageferry_testing::fill_pattern,
            poisoned: BTreeSet::new(),
            hold: AtomicBool::new(false),
            granules: AtomicU64::new(0),
            held: Mutex::default(),
            sink: Mutex::default(),
        }
    }
}

impl Source {
    pub fn holding() -> Self {
        Self { hold: AtomicBool::new(true), ..Self::default() }
    }

    /// How many granules it was asked for.
    pub fn asked(&self) -> u64 {
        self.granules.load(SeqCst)
    }

    /// Answers what it held back, and from now on at once.
    pub fn release(&self) {
        self.hold.store(false, SeqCst);
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        let sink = self.sink.lock().unwrap().clone().expect("it is attached");
        for span in held {
            self.answer(span, &*sink).unwrap();
        }
    }

    fn answer(&self, span: Span, sink: &dyn PageSink) -> Result<(), SinkError> {
        let granule = sink.layout().get(span.region).unwrap().granule().bytes();
        for index in span.granules.iter() {
            let one = Span { granules: pageferry_memory::GranuleRange::one(index), ..span };
            if self.poisoned.contains(&index.get()) {
                sink.poison(one)?;
                continue;
            }
            sink.fill(one, &mut |bytes| {
                (self.contents)(span.region, index.get() * granule, bytes);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl PageSource for Source {
    fn attach(&self, sink: Arc<dyn PageSink>) -> Result<(), SourceError> {
        *self.sink.lock().unwrap() = Some(sink);
        Ok(())
    }

    fn request(&self, span: Span, _: Urgency, sink: &dyn PageSink) -> Result<(), SourceError> {
        self.granules.fetch_add(span.granules.count(), SeqCst);
        let mut held = self.held.lock().unwrap();
        if self.hold.load(SeqCst) {
            held.push(span);
            return Ok(());
        }
        drop(held);
        self.answer(span, sink).map_err(|error| SourceError::Lost(error.to_string()))
    }

    fn complete(&self, _: Completion) -> Result<(), SourceError> {
        Ok(())
    }

    fn detach(&self) {
        *self.sink.lock().unwrap() = None;
    }
}
