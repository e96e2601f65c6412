//! Serving from a chain whose index has been read allocates nothing, as a SIGBUS handler needs it:
//! not where bytes are read, and not where they are damaged or missing.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout as Block, System},
    cell::Cell,
    fs,
    sync::Arc,
};

use common::{PAGE, at, options, page, pages};
use pageferry_image::{Chain, ChainSource, Image, ImageWriter, Missing};
use pageferry_memory::{GranuleIndex, GranuleRange, Layout};
use pageferry_paging::{Fill, PageSink, PageSource, SinkError, SourceError, Span, Urgency};
use pageferry_testing::{REGION, RegionShape, layout_of};

thread_local! {
    /// How often this thread has allocated or freed.
    static MINE: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        MINE.set(MINE.get() + 1);
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, block: Block) {
        MINE.set(MINE.get() + 1);
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.dealloc(pointer, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts what it is told of one granule.
struct Sink {
    layout: Layout,
    answer: Cell<Option<&'static str>>,
}

// SAFETY: used by the one thread of the test alone.
unsafe impl Sync for Sink {}

impl Sink {
    fn say(&self, answer: &'static str) -> Result<(), SinkError> {
        assert_eq!(self.answer.replace(Some(answer)), None, "answered twice");
        Ok(())
    }
}

impl PageSink for Sink {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn page(&self, _: Span, _: &[u8]) -> Result<(), SinkError> {
        self.say("page")
    }

    fn fill(&self, _: Span, fill: &mut Fill<'_>) -> Result<(), SinkError> {
        let mut bytes = [0; PAGE as usize];
        fill(&mut bytes)?;
        self.say("data")
    }

    fn zero(&self, _: Span) -> Result<(), SinkError> {
        self.say("zero")
    }

    fn poison(&self, _: Span) -> Result<(), SinkError> {
        self.say("poison")
    }

    fn push(&self, _: Span, _: &[u8]) -> Result<u64, SinkError> {
        unreachable!("nothing is pushed")
    }

    fn lost(&self, why: SourceError) {
        panic!("a file is never lost: {why}")
    }
}

#[test]
fn serving_allocates_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut writer = ImageWriter::create(path("0.pfi"), options()).unwrap();
    writer.write(at(0), &[page(1), page(2), page(3)].concat()).unwrap();
    writer.finish().unwrap();
    let parent = Image::open(path("0.pfi")).unwrap();
    let mut writer =
        ImageWriter::create(path("1.pfi"), options().parent(&parent, "0.pfi")).unwrap();
    writer.write(at(1), &page(4)).unwrap();
    writer.zero(pages(3, 1)).unwrap();
    writer.poison(pages(4, 1)).unwrap();
    writer.finish().unwrap();
    // Page 2, the third block.
    let mut bytes = fs::read(path("0.pfi")).unwrap();
    bytes[3 * 4096 + 5] ^= 1;
    fs::write(path("0.pfi"), bytes).unwrap();

    let chain = Arc::new(Chain::open(directory.path()).unwrap());
    let source = ChainSource::preloaded(chain, Missing::Poison).unwrap();
    assert!(source.signal_safe());
    let shape = RegionShape { granules: 6, granule: PAGE, image_offset: 0 };
    let sink = Sink { layout: layout_of([shape]), answer: Cell::new(None) };
    for (number, expected) in
        ["data", "data", "poison", "zero", "poison", "poison"].into_iter().enumerate()
    {
        let granules = GranuleRange::one(GranuleIndex::new(number as u64));
        let before = MINE.get();
        source.request(Span { region: REGION, granules }, Urgency::Demand, &sink).unwrap();
        assert_eq!(MINE.get() - before, 0, "page {number}");
        assert_eq!(sink.answer.take(), Some(expected), "page {number}");
    }
    let before = MINE.get();
    drop(std::hint::black_box(vec![1_u8]));
    assert_eq!(MINE.get() - before, 2, "the counter counts");
}
