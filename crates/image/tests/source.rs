//! A chain as a source.

mod common;
#[path = "common/sink.rs"]
mod sink;

use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use common::{Flipped, PAGE, at, encode, open, options, page, pages};
use pageferry_image::{Chain, ChainSource, Image, Missing, Storage, WriterOptions};
use pageferry_memory::PageSize;
use pageferry_paging::{PageSource, SourceError, Urgency};
use sink::{Answer, Sink, layout, span};

const BASE: u64 = 0x100;

/// Data 1 to 4, zero, nothing, poisoned, data 8: the later ones in a child.
fn images() -> Vec<Vec<u8>> {
    let parent = encode(options(), |encoder| {
        encoder.write(at(BASE), &[page(1), page(2), page(99), page(99)].concat()).unwrap();
        encoder.write(at(BASE + 5), &page(99)).unwrap();
        encoder.write(at(BASE + 7), &page(8)).unwrap();
    });
    let child = encode(options().parent(&open(parent.clone()), "parent.pfi"), |encoder| {
        encoder.write(at(BASE + 2), &[page(3), page(4)].concat()).unwrap();
        encoder.zero(pages(BASE + 4, 1)).unwrap();
        encoder.gone(pages(BASE + 5, 1)).unwrap();
        encoder.poison(pages(BASE + 6, 1)).unwrap();
    });
    vec![child, parent]
}

fn chain(images: Vec<Vec<u8>>) -> Arc<Chain> {
    Arc::new(Chain::new(images.into_iter().map(open).collect()).unwrap())
}

fn data(range: Range<u8>) -> Vec<Answer> {
    range.map(Answer::Data).collect()
}

fn expected(absent: Answer) -> Vec<Answer> {
    [data(1..5), vec![Answer::Zero, absent, Answer::Poison], data(8..9)].concat()
}

#[test]
fn every_granule_is_answered_once() {
    for (missing, absent) in [(Missing::Poison, Answer::Poison), (Missing::Zero, Answer::Zero)] {
        for preloaded in [false, true] {
            for piece in [1, 3, 100] {
                let chain = chain(images());
                let source = if preloaded {
                    ChainSource::preloaded(chain, missing).unwrap()
                } else {
                    ChainSource::new(chain, missing)
                };
                assert_eq!((source.signal_safe(), source.answers_inline()), (preloaded, true));
                // The second region begins where there is nothing.
                let regions = [(8, PAGE, BASE * PAGE), (8, PAGE, (BASE - 2) * PAGE)];
                let sink = Sink::new(layout(&regions), piece);
                source.attach(sink.clone()).unwrap();
                source.request(span(0, 0, 8), Urgency::Demand, &*sink).unwrap();
                assert_eq!(*sink.calls.lock().unwrap(), 4, "what is alike is one answer");
                source.request(span(1, 0, 5), Urgency::Prefetch, &*sink).unwrap();
                source.request(span(1, 5, 3), Urgency::Prefetch, &*sink).unwrap();
                assert_eq!(sink.by_granule(0), expected(absent));
                let second = [&[absent, absent], &expected(absent)[..6]].concat();
                assert_eq!(sink.by_granule(1), second);
                let outside = source.request(span(0, 7, 2), Urgency::Demand, &*sink);
                assert!(matches!(outside, Err(SourceError::Mismatch(_))));
                source.detach();
            }
        }
    }
}

/// Granules larger than blocks, and smaller ones.
#[test]
fn granules_of_other_sizes_than_blocks() {
    let source = ChainSource::new(chain(images()), Missing::Zero);
    let sink = Sink::new(layout(&[(4, 2 * PAGE, BASE * PAGE)]), 1);
    source.request(span(0, 0, 4), Urgency::Demand, &*sink).unwrap();
    // The last one is poisoned in part.
    let all = [Answer::Mixed, Answer::Mixed, Answer::Zero, Answer::Poison];
    assert_eq!(sink.by_granule(0), all);
    let source = ChainSource::new(chain(images()), Missing::Poison);
    let sink = Sink::new(layout(&[(4, 2 * PAGE, BASE * PAGE)]), 1);
    source.request(span(0, 0, 4), Urgency::Demand, &*sink).unwrap();
    let all = [Answer::Mixed, Answer::Mixed, Answer::Poison, Answer::Poison];
    assert_eq!(sink.by_granule(0), all);

    let large = WriterOptions::new(PageSize::try_new(4 * PAGE).unwrap());
    let image = encode(large, |encoder| {
        encoder.write(at(BASE), &[page(1), page(2), page(0), page(4)].concat()).unwrap();
        encoder.zero(pages(BASE + 4, 4)).unwrap();
    });
    let source = ChainSource::preloaded(chain(vec![image]), Missing::Poison).unwrap();
    assert!(!source.signal_safe(), "part of a block needs a buffer");
    let sink = Sink::new(layout(&[(8, PAGE, BASE * PAGE)]), 3);
    source.request(span(0, 0, 8), Urgency::Demand, &*sink).unwrap();
    let all = [&[1, 2, 0, 4].map(Answer::Data)[..], &[Answer::Zero; 4]].concat();
    assert_eq!(sink.by_granule(0), all);
}

/// What is damaged is poisoned; the rest is served.
#[test]
fn damage_is_poisoned() {
    let bytes = Arc::new(encode(options(), |encoder| {
        for number in 0..20 {
            encoder.write(at(number), &page(number as u8 + 1)).unwrap();
        }
    }));
    for piece in [1, 4, 100] {
        let flipped = Flipped { bytes: bytes.clone(), at: 4096 * 8 + 9, mask: 1 };
        let image = Image::from_storage(Box::new(flipped), "flipped").unwrap();
        let chain = Arc::new(Chain::new(vec![image]).unwrap());
        let source = ChainSource::new(chain, Missing::Poison);
        let sink = Sink::new(layout(&[(20, PAGE, 0)]), piece);
        source.request(span(0, 0, 20), Urgency::Demand, &*sink).unwrap();
        let all = [data(1..8), vec![Answer::Poison], data(9..21)].concat();
        assert_eq!(sink.by_granule(0), all);
    }
    // The index: nobody knows what any of them is.
    let index = 4096 * 21 + 20 * 48;
    let flipped = Flipped { bytes, at: index + 1, mask: 1 };
    let image = Image::from_storage(Box::new(flipped), "flipped").unwrap();
    let chain = Arc::new(Chain::new(vec![image]).unwrap());
    assert!(ChainSource::preloaded(chain.clone(), Missing::Zero).is_err());
    let source = ChainSource::new(chain, Missing::Zero);
    let sink = Sink::new(layout(&[(20, PAGE, 0)]), 1);
    source.request(span(0, 0, 20), Urgency::Demand, &*sink).unwrap();
    assert_eq!(sink.by_granule(0), [Answer::Poison; 20]);
}

/// Storage that counts what is read of it.
#[derive(Debug)]
struct Counted {
    bytes: Vec<u8>,
    read: Arc<AtomicU64>,
}

impl Storage for Counted {
    fn length(&self) -> io::Result<u64> {
        self.bytes.length()
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read.fetch_add(bytes.len() as u64, Relaxed);
        self.bytes.read_at(offset, bytes)
    }
}

#[test]
fn a_page_is_read_without_the_rest() {
    const COUNT: u64 = 5000;
    let bytes = encode(options(), |encoder| {
        for number in 0..COUNT {
            let mut bytes = page(1);
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            encoder.write(at(number), &bytes).unwrap();
        }
    });
    let length = bytes.len() as u64;
    let read = Arc::new(AtomicU64::new(0));
    let image =
        Image::from_storage(Box::new(Counted { bytes, read: read.clone() }), "counted").unwrap();
    let opened = read.load(Relaxed);
    assert!(opened < 4096 + 256 + 1024, "opening reads header, root and footer: {opened}");
    let chain = Chain::new(vec![image]).unwrap();
    let mut buffer = page(0);
    chain.read_at(at(4321), &mut buffer, Missing::Poison).unwrap();
    // One leaf of each table and the block.
    let first = read.load(Relaxed) - opened;
    assert!(first <= PAGE + 1024 * (48 + 24), "{first} of {length}");
    chain.read_at(at(4322), &mut buffer, Missing::Poison).unwrap();
    assert_eq!(read.load(Relaxed) - opened - first, PAGE, "the index is kept");
    chain.preload().unwrap();
    let before = read.load(Relaxed);
    for number in 0..COUNT {
        chain.extent_at(at(number)).unwrap();
    }
    assert_eq!(read.load(Relaxed), before, "nothing is looked up in the file any more");
}
