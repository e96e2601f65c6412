//! Blocks that are stored once in a chain, not once in each image.

mod common;

use std::collections::HashSet;

use common::{PAGE, at, encode_for_child, go_on, open, options, page, pages};
use pageferry_image::{
    Chain, Content, Encoder, Image, Known, Missing, WriterOptions, diff, flatten,
};
use pageferry_memory::PageSize;
use proptest::prelude::*;

/// Images of memory, one after the other, each told what the ones before have stored.
struct Growing {
    images: Vec<Vec<u8>>,
    known: Option<Known>,
    options: WriterOptions,
}

impl Growing {
    fn new(options: WriterOptions) -> Self {
        Self { images: Vec::new(), known: None, options }
    }

    fn next(&mut self, tell: impl FnOnce(&mut Encoder<Vec<u8>>)) {
        let mut options = self.options.clone();
        if let Some(parent) = self.images.last() {
            options = options.parent(&open(parent.clone()), "parent.pfi");
        }
        if let Some(known) = self.known.take() {
            options = options.known(known);
        }
        let (bytes, known) = encode_for_child(options, tell);
        self.images.push(bytes);
        self.known = Some(known);
    }

    fn chain(&self) -> Chain {
        Chain::new(self.images.iter().rev().cloned().map(open).collect()).unwrap()
    }
}

fn numbered(number: u64) -> Vec<u8> {
    let mut bytes = page(1);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn amounts(image: &Image) -> (u64, u64, u64) {
    let amounts = image.info().amounts;
    (amounts.data / PAGE, amounts.stored / PAGE, amounts.elsewhere / PAGE)
}

#[test]
fn what_an_ancestor_has_is_not_stored_again() {
    let mut growing = Growing::new(options());
    let first: Vec<u8> = (0..3000).flat_map(numbered).collect();
    growing.next(|encoder| encoder.write(at(0), &first).unwrap());
    growing.next(|encoder| {
        encoder.write(at(10), &numbered(5000)).unwrap();
        encoder.write(at(11), &numbered(5001)).unwrap();
    });
    // As it was; moved; of two images, one behind the other; new, between others.
    growing.next(|encoder| {
        encoder.write(at(0), &first[..100 * PAGE as usize]).unwrap();
        encoder.write(at(5000), &first[1000 * PAGE as usize..]).unwrap();
        encoder.write(at(9000), &[numbered(2999), numbered(5000)].concat()).unwrap();
        encoder.write(at(9010), &[numbered(7), numbered(6000), numbered(8)].concat()).unwrap();
    });
    let chain = growing.chain();
    let [newest, middle, oldest] = chain.images() else { panic!("there are three") };
    assert_eq!(amounts(oldest), (3000, 3000, 0));
    assert_eq!(amounts(middle), (2, 2, 0));
    assert_eq!(amounts(newest), (2105, 1, 2104));
    // Runs of references go on as long as the blocks do: 0, 5000, 9000, 9001, 9010, 9011, 9012.
    assert_eq!(newest.info().runs, 7);
    let expected = [
        (0, 0),
        (10, 10),
        (11, 11),
        (99, 99),
        (100, 100),
        (5000, 1000),
        (6999, 2999),
        (9000, 2999),
        (9001, 5000),
        (9010, 7),
        (9011, 6000),
        (9012, 8),
    ];
    let mut buffer = page(0);
    for (place, number) in expected {
        chain.read_at(at(place), &mut buffer, Missing::Poison).unwrap();
        assert!(buffer == numbered(number), "page {place}");
        assert_eq!(chain.extent_at(at(place)).unwrap().content, Content::Data);
    }
    // Across runs, images and parts of pages.
    let mut some = vec![0; 3 * PAGE as usize];
    chain.read_at(at(9010), &mut some, Missing::Poison).unwrap();
    assert!(some == [numbered(7), numbered(6000), numbered(8)].concat());
    chain.preload().unwrap();
    let verified = chain.verify(&mut go_on).unwrap();
    assert!(verified.is_intact(), "{verified:?}");
    assert_eq!(verified.blocks, 3003);
}

#[test]
fn what_is_known_of_something_else_is_left_aside() {
    let (one, known) = encode_for_child(options(), |encoder| {
        encoder.write(at(0), &page(7)).unwrap();
    });
    let (other, _) = encode_for_child(options(), |encoder| {
        encoder.write(at(0), &page(7)).unwrap();
    });
    let large = WriterOptions::new(PageSize::SIZE_2M);
    let cases = [
        ("the parent", options().parent(&open(one.clone()), "p.pfi"), true),
        ("another parent", options().parent(&open(other), "p.pfi"), false),
        ("no parent", options(), false),
        ("other blocks", large.parent(&open(one), "p.pfi"), false),
    ];
    for (what, options, refers) in cases {
        let (bytes, _) = encode_for_child(options.known(known.clone()), |encoder| {
            let size = encoder.block_size().bytes() as usize;
            encoder.write(at(512), &vec![7; size]).unwrap();
        });
        assert_eq!(bytes[16..24] == [1, 0, 0, 0, 0, 0, 0, 0], refers, "{what}: the feature");
        let amounts = open(bytes).info().amounts;
        assert_eq!(amounts.elsewhere > 0, refers, "{what}");
        assert_eq!(amounts.stored > 0, !refers, "{what}");
    }
}

/// One that was not told about stands between two that were.
#[test]
fn references_reach_over_images_that_know_nothing() {
    let mut growing = Growing::new(options());
    growing.next(|encoder| encoder.write(at(0), &page(7)).unwrap());
    growing.known = None;
    growing.next(|encoder| encoder.write(at(1), &[page(7), page(8)].concat()).unwrap());
    growing.next(|encoder| encoder.write(at(5), &[page(8), page(7)].concat()).unwrap());
    growing.next(|encoder| encoder.write(at(7), &[page(7), page(8)].concat()).unwrap());
    let chain = growing.chain();
    let found: Vec<_> = chain.images().iter().map(amounts).collect();
    assert_eq!(found, [(2, 0, 2), (2, 0, 2), (2, 2, 0), (1, 1, 0)]);
    let mut bytes = page(0);
    for (place, byte) in [(0, 7), (1, 7), (2, 8), (5, 8), (6, 7), (7, 7), (8, 8)] {
        chain.read_at(at(place), &mut bytes, Missing::Poison).unwrap();
        assert_eq!(bytes, page(byte), "page {place}");
    }
}

const PAGES: u64 = 48;
/// Bytes that pages are of.
const VALUES: u8 = 12;

#[derive(Clone, Debug)]
enum Said {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Gone(u64, u64),
}

fn said() -> impl Strategy<Value = Said> {
    let range = || (0..PAGES - 8, 1..8_u64);
    prop_oneof![
        4 => (0..PAGES - 8, prop::collection::vec(0..VALUES, 1..8)).prop_map(|(first, bytes)|
            Said::Write(first, bytes)),
        1 => range().prop_map(|(first, count)| Said::Zero(first, count)),
        1 => range().prop_map(|(first, count)| Said::Gone(first, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// However little is remembered: the memory is the same as without, and in no more room.
    #[test]
    fn memory_is_the_same_with_and_without(
        images in prop::collection::vec(prop::collection::vec(said(), 0..10), 1..6),
        remembered in 0..40_usize,
    ) {
        let mut with = Growing::new(options().remembered(remembered));
        let mut without = Growing::new(options());
        let mut model = vec![None; PAGES as usize];
        for image in &images {
            without.known = None;
            for growing in [&mut with, &mut without] {
                growing.next(|encoder| for said in image {
                    match said {
                        Said::Write(first, bytes) => {
                            let bytes: Vec<u8> = bytes.iter().flat_map(|byte| page(*byte)).collect();
                            encoder.write(at(*first), &bytes).unwrap();
                        }
                        Said::Zero(first, count) => encoder.zero(pages(*first, *count)).unwrap(),
                        Said::Gone(first, count) => encoder.gone(pages(*first, *count)).unwrap(),
                    }
                });
            }
            for said in image {
                match said {
                    Said::Write(first, bytes) => for (page, byte) in (*first..).zip(bytes) {
                        model[page as usize] = Some(*byte);
                    },
                    Said::Zero(first, count) => {
                        model[*first as usize..(first + count) as usize].fill(Some(0));
                    }
                    Said::Gone(first, count) => {
                        model[*first as usize..(first + count) as usize].fill(None);
                    }
                }
            }
        }
        let (with, without) = (with.chain(), without.chain());
        for (place, expected) in (0..).zip(&model) {
            let mut bytes = page(0xff);
            let read = with.read_at(at(place), &mut bytes, Missing::Poison);
            match expected {
                Some(byte) => prop_assert!(read.is_ok() && bytes == page(*byte), "page {place}"),
                None => prop_assert!(read.is_err(), "page {place}"),
            }
        }
        let mut different = 0;
        diff(&with, &without, &mut |_| { different += 1; std::ops::ControlFlow::Continue(()) })
            .unwrap();
        prop_assert_eq!(different, 0);
        prop_assert!(with.verify(&mut go_on).unwrap().is_intact());
        if remembered >= 2 * VALUES as usize {
            let written = images.iter().flatten().filter_map(|said| match said {
                Said::Write(_, bytes) => Some(bytes),
                _ => None,
            });
            let different: HashSet<u8> = written.flatten().copied().filter(|byte| *byte > 0).collect();
            let stored = |image: &Image| image.info().amounts.stored / PAGE;
            let stored: u64 = with.images().iter().map(stored).sum();
            prop_assert_eq!(stored, different.len() as u64, "each of them once");
        }
        let mut encoder = Encoder::new(Vec::new(), "flat", options()).unwrap();
        flatten(&with, &mut encoder, &mut go_on).unwrap();
        let flat = Chain::new(vec![open(encoder.finish().unwrap().0)]).unwrap();
        diff(&with, &flat, &mut |_| { different += 1; std::ops::ControlFlow::Continue(()) })
            .unwrap();
        prop_assert_eq!(different, 0);
    }
}
