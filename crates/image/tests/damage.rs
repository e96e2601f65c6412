//! Every flipped bit is found and named, and so is an image that was cut short.

mod common;

use std::{ops::Range, sync::Arc};

use common::{
    Flipped, PAGE, at, encode, go_on, open, options, page, pages, small, small_child,
    small_referring,
};
use pageferry_image::{Chain, Content, Digest, Image, ImageError, Missing, Part, WriterOptions};
use pageferry_memory::PageSize;

/// What of an image a byte belongs to, as an error names it; the places are drawn in the design
/// document.
fn parts(bytes: &[u8]) -> Vec<(Part, Range<u64>)> {
    let length = bytes.len() as u64;
    let field = |at: usize| {
        let footer = &bytes[bytes.len() - 256..];
        u64::from_le_bytes(*footer[at..].first_chunk().unwrap())
    };
    let (blocks, runs, catalog, root) = (field(104), field(120), field(136), field(152));
    let mut parts = vec![(Part::Header, 0..4096)];
    parts.extend((0..field(112)).map(|n| (Part::Block(n), 4096 * (n + 1)..4096 * (n + 2))));
    parts.extend([
        (Part::BlockTable(0), blocks..runs),
        (Part::RunTable(0), runs..catalog),
        (Part::Catalog, catalog..root),
        (Part::Root, root..length - 256),
        (Part::Footer, length - 256..length),
    ]);
    let mut end = 0;
    for (part, range) in &parts {
        assert!(range.start == end && !range.is_empty(), "{part} leaves a gap");
        end = range.end;
    }
    assert_eq!(end, length, "every byte belongs to a part");
    parts
}

#[test]
fn every_flipped_bit_is_found_and_named() {
    for bytes in [small_child(&open(small())), small_referring().1] {
        every_flipped_bit_of(bytes);
    }
}

fn every_flipped_bit_of(bytes: Vec<u8>) {
    let bytes = Arc::new(bytes);
    let parts = parts(&bytes);
    for at in 0..bytes.len() {
        let (part, range) = parts.iter().find(|(_, range)| range.contains(&(at as u64))).unwrap();
        for bit in 0..8 {
            let bytes = Arc::clone(&bytes);
            let flipped = Box::new(Flipped { bytes, at, mask: 1 << bit });
            let errors = match Image::from_storage(flipped, "flipped") {
                Err(error) => vec![error],
                Ok(image) => {
                    let verified = image.verify(&mut go_on).unwrap();
                    assert_eq!(verified.damaged as usize, verified.damage.len());
                    verified.damage.into_iter().map(|damage| damage.error).collect()
                }
            };
            let [error] = &errors[..] else { panic!("bit {bit} of byte {at}: {errors:?}") };
            match error {
                ImageError::NotAnImage { .. } => assert!(at < 8, "{at}: {error}"),
                ImageError::Corrupt { label, part: named, offset, length, .. } => {
                    assert_eq!((named, *offset..*offset + length), (part, range.clone()), "{at}");
                    assert_eq!(label, "flipped");
                }
                other => panic!("bit {bit} of byte {at}: {other}"),
            }
        }
    }
}

#[test]
fn every_truncation_is_found_and_named() {
    let bytes = small();
    for length in 0..bytes.len() {
        match Image::from_storage(Box::new(bytes[..length].to_vec()), "cut").unwrap_err() {
            ImageError::Incomplete { label, length: said } => {
                assert_eq!((&*label, said), ("cut", length as u64));
            }
            other => panic!("{length}: {other}"),
        }
    }
    for more in [1, 255, 256, 257, 4096] {
        let longer = [&bytes[..], &vec![0; more]].concat();
        let error = Image::from_storage(Box::new(longer), "longer").unwrap_err();
        assert!(matches!(error, ImageError::Incomplete { .. }), "{more}: {error}");
    }
}

/// An image whose memory has an image is not mistaken for that when it is cut behind it.
#[test]
fn an_image_in_an_image_is_no_end() {
    let mut inner = small();
    let end = inner.len();
    inner.resize(end.next_multiple_of(4096), 0);
    let outer = encode(options(), |encoder| encoder.write(at(0), &inner).unwrap());
    let cut = outer[..4096 + end].to_vec();
    let error = Image::from_storage(Box::new(cut), "cut").unwrap_err();
    assert!(
        matches!(error, ImageError::Corrupt { part: Part::Footer, .. }),
        "its footer belongs to another header: {error}"
    );
}

#[test]
fn no_image_at_all() {
    for bytes in [b"\x89PNG\r\n\x1a\n".to_vec(), vec![0; 8192], vec![1; 3]] {
        let error = Image::from_storage(Box::new(bytes), "other").unwrap_err();
        assert!(matches!(error, ImageError::NotAnImage { .. }), "{error}");
    }
    for (path, opens) in [("/dev/null", true), ("/", true), ("/nonexistent", false)] {
        match Image::open(path).unwrap_err() {
            ImageError::Examine { .. } => assert!(opens, "{path}"),
            ImageError::Open { .. } => assert!(!opens, "{path}"),
            other => panic!("{path}: {other}"),
        }
    }
}

#[test]
fn a_later_version_is_refused_by_name() {
    // Where in the header, the new value, what is then said.
    type Expected = fn(&ImageError) -> bool;
    let cases: [(usize, u8, Expected); 3] = [
        (8, 2, |error| matches!(error, ImageError::Version { found: 2, known: 1, .. })),
        (16, 6, |error| matches!(error, ImageError::Features { bits: 6, .. })),
        (16, 0, |error| matches!(error, ImageError::Corrupt { part: Part::Footer, .. })),
    ];
    for (at, value, expected) in cases {
        let mut bytes = small();
        bytes[at] = value;
        // Optional features are no obstacle, but the footer belongs to another header now.
        bytes[24] = 0xff;
        let digest = Digest::of(&bytes[..4064]).bytes();
        bytes[4064..4096].copy_from_slice(&digest);
        let error = Image::from_storage(Box::new(bytes), "later").unwrap_err();
        assert!(expected(&error), "{at}: {error}");
        assert!(error.to_string().contains("later"), "{error}");
    }
    let mut bytes = small();
    bytes[24] = 0xff;
    pageferry_image::fuzz::reseal(&mut bytes);
    open(bytes);
}

/// One damaged block costs the memory that had its bytes and nothing else.
#[test]
fn damage_is_told_by_the_memory_that_is_lost() {
    let bytes = encode(options(), |encoder| {
        for number in 0..3000 {
            let mut page = page(1);
            page[..8].copy_from_slice(&u64::to_le_bytes(number));
            encoder.write(at(number), &page).unwrap();
        }
        let mut same = page(1);
        same[..8].copy_from_slice(&1234_u64.to_le_bytes());
        encoder.write(at(9000), &same).unwrap();
    });
    let flip = |at| {
        let bytes = Arc::new(bytes.clone());
        Image::from_storage(Box::new(Flipped { bytes, at, mask: 0x10 }), "flipped").unwrap()
    };

    let image = flip(4096 * 1235 + 77);
    let verified = image.verify(&mut go_on).unwrap();
    assert_eq!((verified.damaged, verified.blocks), (1, 2999));
    assert_eq!(verified.damage[0].lost, [pages(1234, 1), pages(9000, 1)]);
    assert_eq!(verified.damage[0].lost_bytes, 2 * PAGE);
    let chain = Chain::new(vec![image]).unwrap();
    let mut buffer = vec![0; PAGE as usize];
    for number in (0..3000).chain([9000]) {
        let read = chain.read_at(at(number), &mut buffer, Missing::Poison);
        match read {
            Ok(()) => assert_ne!(number, 1234),
            Err(ImageError::Corrupt { part: Part::Block(1234), offset, .. }) => {
                assert!(number == 1234 || number == 9000);
                assert_eq!(offset, 4096 * 1235);
            }
            Err(other) => panic!("{number}: {other}"),
        }
    }

    // A leaf of the block table: its 1024 blocks.
    let image = flip(4096 * 3001 + 1024 * 48 + 5);
    let verified = image.verify(&mut go_on).unwrap();
    assert_eq!((verified.damaged, verified.blocks), (1, 3000 - 1024));
    assert_eq!(verified.damage[0].lost, [pages(1024, 1024), pages(9000, 1)]);
    let chain = Chain::new(vec![image]).unwrap();
    for (number, intact) in [(1023, true), (1024, false), (2047, false), (2048, true)] {
        let read = chain.read_at(at(number), &mut buffer, Missing::Poison);
        assert_eq!(read.is_ok(), intact, "{number}");
        assert_eq!(chain.extent_at(at(number)).unwrap().content, Content::Data);
    }
}

/// A block that is damaged costs the images that refer to it too.
#[test]
fn damage_to_an_ancestor_is_told_by_what_is_lost_in_its_descendants() {
    let (parent, child) = small_referring();
    // The block of page 7.
    let flipped = Flipped { bytes: Arc::new(parent), at: 4096 + 9, mask: 1 };
    let parent = Image::from_storage(Box::new(flipped), "parent").unwrap();
    let chain = Chain::new(vec![open(child), parent]).unwrap();
    let verified = chain.verify(&mut go_on).unwrap();
    assert_eq!(verified.damaged, 1);
    let damage = &verified.damage[0];
    assert!(matches!(damage.error, ImageError::Corrupt { part: Part::Block(0), .. }), "{damage:?}");
    assert!(damage.error.to_string().contains("parent"), "{damage:?}");
    let of_parent = [pages(0x100, 1), pages(0x102, 1)];
    let of_child = [pages(0x103, 1), pages(0x300, 1)];
    assert_eq!(damage.lost, [of_parent, of_child].concat());
    assert_eq!(damage.lost_bytes, 4 * PAGE);
    let mut buffer = vec![0; PAGE as usize];
    let error = chain.read_at(at(0x300), &mut buffer, Missing::Poison).unwrap_err();
    assert!(error.to_string().contains("parent"), "the image that has it is named: {error}");
    chain.read_at(at(0x301), &mut buffer, Missing::Poison).unwrap();
}

#[test]
fn verifying_can_be_cancelled() {
    let image = open(small());
    let error = image.verify(&mut |_| std::ops::ControlFlow::Break(())).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled { .. }), "{error}");
    let (mut last, total) = (0, image.info().file_length);
    let mut watch = |progress: pageferry_image::Progress| {
        assert!(progress.done >= last && progress.total == total);
        last = progress.done;
        std::ops::ControlFlow::Continue(())
    };
    let verified = image.verify(&mut watch).unwrap();
    assert!(verified.is_intact());
    assert_eq!((last, verified.bytes), (total, total), "every byte was looked at");
}

/// A file that is written to while it is open is not believed either.
#[test]
fn a_file_that_changes_under_a_reader_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.pfi");
    let bytes = encode(WriterOptions::new(PageSize::SIZE_2M), |encoder| {
        encoder.write(at(512), &page(3).repeat(512)).unwrap();
    });
    std::fs::write(&path, &bytes).unwrap();
    let image = Image::open(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = image.verify(&mut go_on).unwrap_err();
    assert!(matches!(error, ImageError::Incomplete { .. }), "{error}");
    std::fs::write(&path, small()).unwrap();
    let chain = Chain::new(vec![image]).unwrap();
    let mut buffer = vec![0; PAGE as usize];
    let error = chain.read_at(at(512), &mut buffer, Missing::Poison).unwrap_err();
    assert!(matches!(error, ImageError::Read { .. }), "{error}");
}
