//! What was written is read again: random memory, chains of up to five images.

mod common;

use std::ops::ControlFlow;

use common::{PAGE, at, encode, go_on, open, page, pages};
use pageferry_image::{
    Chain, Content, Digest, Encoder, Image, ImageError, ImageRange, Missing, WriterOptions, diff,
    flatten,
};
use pageferry_memory::PageSize;
use proptest::prelude::*;

/// High, as a process has its memory.
const BASE: u64 = 0x7f00_0000_0000 / PAGE;
const PAGES: usize = 96;

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum What {
    Data(u8),
    Zero,
    Poisoned,
    Gone,
}

/// From this block on, so many blocks.
type Told = (u64, u64, What);

#[derive(Clone, Debug)]
struct Plan {
    /// Pages a block has.
    block: u64,
    told: Vec<Told>,
}

/// What a page is to be: its byte, if it has any.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Page {
    Absent,
    Byte(u8),
    Poisoned,
}

fn plan() -> impl Strategy<Value = Plan> {
    let what = prop_oneof![
        6 => (0..6_u8).prop_map(What::Data),
        2 => Just(What::Zero),
        1 => Just(What::Poisoned),
        1 => Just(What::Gone),
    ];
    prop_oneof![Just(1_u64), Just(4)].prop_flat_map(move |block| {
        let blocks = PAGES as u64 / block;
        let told = (0..blocks, 1..=blocks / 4, what.clone())
            .prop_map(move |(first, count, what)| (first, count.min(blocks - first), what));
        prop::collection::vec(told, 0..24).prop_map(move |told| Plan { block, told })
    })
}

/// The byte of a page in a block of data: 0 in places, and the same in many.
fn byte(seed: u8, page: u64) -> u8 {
    seed.saturating_sub((page % 2) as u8)
}

/// Writes one image and does the same to the model.
fn build(plan: &Plan, parent: Option<&Image>, model: &mut [Page]) -> Vec<u8> {
    let size = PageSize::try_new(plan.block * PAGE).unwrap();
    let mut options = WriterOptions::new(size);
    if let Some(parent) = parent {
        options = options.parent(parent, "parent.pfi");
    }
    encode(options, |encoder| {
        for &(first, count, what) in &plan.told {
            let first = first * plan.block;
            let count = count * plan.block;
            let range = pages(BASE + first, count);
            match what {
                What::Data(seed) => {
                    let bytes: Vec<u8> =
                        (first..first + count).flat_map(|n| page(byte(seed, n))).collect();
                    encoder.write(at(BASE + first), &bytes).unwrap();
                }
                What::Zero => encoder.zero(range).unwrap(),
                What::Poisoned => encoder.poison(range).unwrap(),
                What::Gone => encoder.gone(range).unwrap(),
            }
            for number in first..first + count {
                model[number as usize] = match what {
                    What::Data(seed) => Page::Byte(byte(seed, number)),
                    What::Zero => Page::Byte(0),
                    What::Poisoned => Page::Poisoned,
                    What::Gone => Page::Absent,
                };
            }
        }
    })
}

fn check(chain: &Chain, model: &[Page]) {
    let mut end = 0;
    let mut amount = 0;
    for extent in chain.extents(ImageRange::ALL) {
        let extent = extent.unwrap();
        assert!(extent.range.start().get() >= end, "in order");
        assert_ne!(extent.content, Content::Absent);
        end = extent.range.end().get();
        amount += extent.range.len();
    }
    let there = model.iter().filter(|page| **page != Page::Absent).count() as u64;
    assert_eq!(amount, there * PAGE);
    let mut buffer = page(0xee);
    for (number, expected) in model.iter().enumerate() {
        let place = at(BASE + number as u64);
        let content = chain.extent_at(place).unwrap().content;
        let read = chain.read_at(place, &mut buffer, Missing::Poison);
        match (expected, content, read) {
            (Page::Byte(byte), Content::Data, Ok(())) => assert_eq!(buffer, page(*byte)),
            (Page::Byte(0), Content::Zero, Ok(())) => assert_eq!(buffer, page(0)),
            (Page::Absent, Content::Absent, Err(ImageError::NoBytes { at, .. }))
            | (Page::Poisoned, Content::Poisoned, Err(ImageError::NoBytes { at, .. })) => {
                assert_eq!(at, place);
            }
            other => panic!("page {number}: {other:?}"),
        }
        let zeroed = chain.read_at(place, &mut buffer, Missing::Zero);
        assert_eq!(zeroed.is_ok(), *expected != Page::Poisoned);
    }
    // Any piece, aligned or not, as far as it can be read.
    let all = model.iter().take_while(|page| matches!(page, Page::Byte(_))).count();
    let bytes: Vec<u8> = model[..all]
        .iter()
        .flat_map(|expected| match expected {
            Page::Byte(byte) => page(*byte),
            _ => unreachable!("taken while it has bytes"),
        })
        .collect();
    for (start, end) in [(0, bytes.len()), (1, bytes.len()), (5000, 12345), (4095, 4097)] {
        if start < end && end <= bytes.len() {
            let mut piece = vec![0xee; end - start];
            let place = at(BASE).checked_add(start as u64).unwrap();
            chain.read_at(place, &mut piece, Missing::Poison).unwrap();
            assert!(piece == bytes[start..end], "{start}..{end}");
        }
    }
}

fn differing(one: &Chain, other: &Chain) -> Vec<u64> {
    let mut found = Vec::new();
    let mut end = None;
    diff(one, other, &mut |difference| {
        let (start, count) = (difference.range.start().get() / PAGE, difference.range.len() / PAGE);
        assert!(end.is_none_or(|end| start >= end));
        end = Some(start + count);
        found.extend((start..start + count).map(|page| page - BASE));
        ControlFlow::Continue(())
    })
    .unwrap();
    found
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn chains(plans in prop::collection::vec(plan(), 1..=5)) {
        let mut model = vec![Page::Absent; PAGES];
        let mut files: Vec<Vec<u8>> = Vec::new();
        let mut before: Option<(Chain, Vec<Page>)> = None;
        let chain = |files: &[Vec<u8>]| {
            Chain::new(files.iter().rev().map(|bytes| open(bytes.clone())).collect()).unwrap()
        };
        for plan in &plans {
            let parent = files.last().map(|bytes| open(bytes.clone()));
            files.push(build(plan, parent.as_ref(), &mut model));
            let now = chain(&files);
            check(&now, &model);
            if let Some((chain, old)) = &before {
                // Told in blocks of the smallest size there is.
                let unit = (now.block_size().bytes() / PAGE) as usize;
                let expected: Vec<u64> = (0..PAGES)
                    .filter(|n| {
                        let block = n / unit * unit..(n / unit + 1) * unit;
                        old[block.clone()] != model[block]
                    })
                    .map(|n| n as u64)
                    .collect();
                prop_assert_eq!(differing(chain, &now), expected);
            }
            before = Some((now, model.clone()));
        }
        let whole = chain(&files);
        prop_assert!(whole.verify(&mut go_on).unwrap().is_intact());
        for size in [PageSize::SIZE_4K, whole.block_size()] {
            let mut encoder = Encoder::new(Vec::new(), "flat", WriterOptions::new(size)).unwrap();
            flatten(&whole, &mut encoder, &mut go_on).unwrap();
            let flat = Chain::new(vec![open(encoder.finish().unwrap().0)]).unwrap();
            prop_assert_eq!(differing(&whole, &flat), Vec::<u64>::new());
            check(&flat, &model);
        }
    }
}

/// Stored blocks for what was written.
#[test]
fn equal_blocks_are_stored_once() {
    let all = WriterOptions::REMEMBERED;
    // Bytes of pages one after the other, digests remembered, blocks stored.
    for (bytes, remembered, stored) in [
        (&[][..], all, 0),
        (&[0, 0, 0], all, 0),
        (&[1, 1, 1], all, 1),
        (&[1, 2, 0, 2, 1, 3], all, 3),
        (&[1, 2, 1, 2], 0, 4),
        (&[1, 2, 3, 4, 1], 2, 5),
        (&[1, 2, 1, 3, 1, 4, 1], 4, 4),
    ] {
        for together in [true, false] {
            let options = common::options().remembered(remembered);
            let image = open(encode(options, |encoder| {
                let contents: Vec<u8> = bytes.iter().flat_map(|byte| page(*byte)).collect();
                if together {
                    encoder.write(at(5), &contents).unwrap();
                } else {
                    for (n, page) in contents.chunks(PAGE as usize).enumerate().rev() {
                        encoder.write(at(5 + n as u64), page).unwrap();
                    }
                }
            }));
            let amounts = image.info().amounts;
            let zero = bytes.iter().filter(|byte| **byte == 0).count() as u64;
            let data = bytes.len() as u64 - zero;
            assert_eq!((amounts.data, amounts.zero), (data * PAGE, zero * PAGE), "{bytes:?}");
            if together || remembered == all {
                assert_eq!(amounts.stored, stored * PAGE, "{bytes:?} {remembered}");
            }
            let chain = Chain::new(vec![image]).unwrap();
            let mut buffer = page(0xee);
            for (n, byte) in bytes.iter().enumerate() {
                chain.read_at(at(5 + n as u64), &mut buffer, Missing::Poison).unwrap();
                assert_eq!(buffer, page(*byte));
            }
        }
    }
}

/// More than a leaf of the tables, and more than a record of the run table can say.
#[test]
fn large_tables() {
    let (count, far) = (2500_u64, 1_u64 << 35);
    let contents = |number: u64| {
        let mut bytes = page(1);
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    let image = open(encode(common::options(), |encoder| {
        for number in (0..count).rev() {
            encoder.write(at(3 * number + 1), &contents(number)).unwrap();
        }
        encoder.zero(pages(far, 5 << 32)).unwrap();
    }));
    assert_eq!(image.info().runs, count + 6);
    let chain = Chain::new(vec![image]).unwrap();
    let mut buffer = page(0);
    for number in 0..count {
        for (place, content) in [(3 * number, Content::Absent), (3 * number + 1, Content::Data)] {
            assert_eq!(chain.extent_at(at(place)).unwrap().content, content, "{place}");
        }
        chain.read_at(at(3 * number + 1), &mut buffer, Missing::Poison).unwrap();
        assert_eq!(buffer, contents(number), "{number}");
    }
    let mut end = far * PAGE;
    for extent in chain.extents(ImageRange::new(at(far), u64::MAX - far * PAGE)) {
        let extent = extent.unwrap();
        assert_eq!((extent.range.start().get(), extent.content), (end, Content::Zero));
        end = extent.range.end().get();
    }
    assert_eq!(end, (far + (5 << 32)) * PAGE);
}

#[test]
fn many_readers_at_once() {
    let bytes = encode(common::options(), |encoder| {
        for number in 0..3000_u64 {
            let mut bytes = page(2);
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            encoder.write(at(number), &bytes).unwrap();
        }
    });
    let chain = Chain::new(vec![open(bytes)]).unwrap();
    let barrier = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for reader in 0..8_u64 {
            let (chain, barrier) = (&chain, &barrier);
            scope.spawn(move || {
                let mut random = pageferry_testing::Random::new(reader);
                let mut buffer = page(0);
                barrier.wait();
                for _ in 0..1000 {
                    let number = random.below(3000);
                    chain.read_at(at(number), &mut buffer, Missing::Poison).unwrap();
                    assert_eq!(u64::from_le_bytes(*buffer.first_chunk().unwrap()), number);
                }
            });
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    let error = Encoder::new(Vec::new(), "x", WriterOptions::new(PageSize::SIZE_1G)).unwrap_err();
    assert!(matches!(error, ImageError::Unfit { .. }), "{error}");
    let mut encoder = Encoder::new(Vec::new(), "x", common::options()).unwrap();
    let last = u64::MAX / PAGE;
    for (start, bytes) in [(1, PAGE), (0, PAGE - 1), (last * PAGE, 2 * PAGE)] {
        let range = ImageRange::new(pageferry_memory::ImageOffset::new(start), 0);
        let error = encoder.write(range.start(), &vec![1; bytes as usize]).unwrap_err();
        assert!(matches!(error, ImageError::Unaligned { .. }), "{error}");
    }
    let mapping = |first, count, name: &[u8]| pageferry_image::ImageMapping {
        range: pages(first, count),
        flags: pageferry_image::MappingFlags::READ,
        page_size: PageSize::SIZE_4K,
        file_offset: 0,
        device: (0, 0),
        inode: 0,
        name: name.to_vec(),
    };
    let error = encoder.set_mappings(vec![mapping(5, 2, b""), mapping(4, 2, b"")]).unwrap_err();
    assert!(matches!(error, ImageError::Overlap { .. }), "{error}");
    let error = encoder.set_mappings(vec![mapping(5, 2, &[b'x'; 65536])]).unwrap_err();
    assert!(matches!(error, ImageError::Unfit { .. }), "{error}");
    for (key, value) in [("x".repeat(256), 0), (String::new(), (1 << 20) + 1)] {
        let error = encoder.set_metadata(key, vec![0; value]).unwrap_err();
        assert!(matches!(error, ImageError::Unfit { .. }), "{error}");
    }
    // None of it has broken anything.
    encoder.write(at(1), &page(1)).unwrap();
    let (bytes, written) = encoder.finish().unwrap();
    assert_eq!((bytes.len() as u64, written.amounts.data), (written.length, PAGE));
    assert_eq!(open(bytes).seal(), written.seal);
}

#[test]
fn the_same_contents_give_the_same_file() {
    assert_eq!(Digest::of(&common::small()), Digest::of(&common::small()));
}
