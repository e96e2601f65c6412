//! Images that lie: no panic, and no memory for what is not there.

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use common::{
    at, encode, encode_for_child, identity, open, options, page, small, small_child,
    small_referring,
};
use pageferry_image::{
    Chain, Encoder, Image, ImageError, Missing, Part, Storage, WriterOptions, flatten, fuzz,
};
use pageferry_memory::PageSize;
use proptest::prelude::*;

/// Bytes that are allocated, and the most there were.
static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), SeqCst) + layout.size();
        MOST.fetch_max(now, SeqCst);
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tests of this file count together.
const BOUND: usize = 64 << 20;

#[track_caller]
fn bounded() {
    let most = MOST.load(SeqCst);
    assert!(most > 0 && most < BOUND, "{most} bytes were allocated at a time");
}

/// The fields of the footer, of eight bytes each, that say how much there is and where.
const FIELDS: std::ops::Range<usize> = 96..208;

#[test]
fn lying_numbers_are_refused() {
    let (_, bytes) = small_referring();
    let footer = bytes.len() - 256;
    for field in FIELDS.step_by(8) {
        let there = u64::from_le_bytes(*bytes[footer + field..].first_chunk().unwrap());
        for lie in [
            0,
            1,
            there.wrapping_sub(1),
            there + 1,
            there + 4096,
            1 << 32,
            1 << 40,
            1 << 52,
            u64::MAX / 48,
            u64::MAX / 4096,
            1 << 63,
            u64::MAX,
        ] {
            if lie == there {
                continue;
            }
            let mut lying = bytes.clone();
            lying[footer + field..][..8].copy_from_slice(&lie.to_le_bytes());
            fuzz::reseal(&mut lying);
            let refused = match Image::from_storage(Box::new(lying), "lying") {
                Err(ImageError::Corrupt { part: Part::Footer, .. }) => true,
                Err(ImageError::Incomplete { .. }) => field == 96,
                // Amounts are for people; verifying counts them.
                Ok(image) => field >= 168 && !image.verify(&mut common::go_on).unwrap().is_intact(),
                Err(other) => panic!("{field}: {lie:#x}: {other}"),
            };
            assert!(refused, "{field}: {lie:#x}");
        }
    }
    bounded();
}

#[test]
fn lying_records_are_refused() {
    let bytes = small_child(&open(small()));
    let footer = bytes.len() - 256;
    let field =
        |at: usize| u64::from_le_bytes(*bytes[footer + at..].first_chunk().unwrap()) as usize;
    let (blocks, runs) = (field(104), field(120));
    // There are two runs: data, then gone. Where, the bytes there, what is said.
    let cases: &[(usize, &[u8], &str)] = &[
        (blocks, &[0; 8], "does not lie where"),
        (blocks + 8, &[1], "does not lie where"),
        (blocks + 12, &[1], "encoded in an unknown way"),
        (runs + 8, &[1], "blocks that there are not"),
        (runs + 8, &[0xff; 8], "blocks that there are not"),
        (runs + 16, &[0; 4], "not in order"),
        (runs + 16, &[2], "blocks that there are not"),
        (runs + 20, &[4], "unknown kind"),
        (runs + 24, &[0; 8], "not in order"),
        (runs + 24, &[0xff; 8], "not in order"),
        (runs + 24 + 7, &[0x10], "not in order"),
    ];
    for (at, lie, said) in cases {
        let mut lying = bytes.clone();
        lying[*at..at + lie.len()].copy_from_slice(lie);
        fuzz::reseal(&mut lying);
        let image = Image::from_storage(Box::new(lying), "lying").unwrap();
        let error = image.preload().unwrap_err().to_string();
        assert!(error.contains(said), "{at}: {error}");
        let verified = image.verify(&mut common::go_on).unwrap();
        assert!(verified.damage.iter().any(|damage| damage.error.to_string().contains(said)));
    }
    bounded();
}

/// References to what is not there: some are seen in the image alone, some where its ancestors are.
#[test]
fn lying_references_are_refused() {
    let (parent, child) = small_referring();
    let footer = child.len() - 256;
    let runs = u64::from_le_bytes(*child[footer + 120..].first_chunk().unwrap()) as usize;
    const NO_IMAGE: &str = "blocks of an ancestor that there is not";
    const NO_BLOCK: &str = "blocks of an ancestor that there are not";
    // The first run is page 0x101: block 1 of the parent, which has two.
    assert_eq!(child[runs + 8..runs + 24], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 1, 0, 0]);
    let cases: &[(usize, &[u8], &str, bool)] = &[
        (runs + 21, &[0], NO_IMAGE, true),
        (runs + 21, &[2], NO_IMAGE, true),
        (runs + 21, &[0xff, 0xff], NO_IMAGE, true),
        (runs + 8, &[0xff; 8], NO_IMAGE, true),
        (16, &[0], "unknown kind", true),
        (runs + 8, &[2], NO_BLOCK, false),
        (runs + 8, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], NO_BLOCK, false),
        // Blocks of another size than the parent's.
        (104, &[13], "", false),
    ];
    for (place, lie, said, alone) in cases {
        let mut lying = child.clone();
        lying[*place..place + lie.len()].copy_from_slice(lie);
        fuzz::reseal(&mut lying);
        if said.is_empty() {
            // Nothing lies where it did.
            assert!(Image::from_storage(Box::new(lying), "lying").is_err());
            continue;
        }
        let image = Image::from_storage(Box::new(lying), "lying").unwrap();
        assert_eq!(image.preload().is_err(), *alone, "{place}");
        let chain = Chain::new(vec![image, open(parent.clone())]).unwrap();
        let mut page = page(0);
        let error = chain.read_at(at(0x101), &mut page, Missing::Poison).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("lying"), "{place}: {error}");
        assert_eq!(chain.extent_at(at(0x101)).unwrap_err().to_string(), error);
        let verified = chain.verify(&mut common::go_on).unwrap();
        assert!(verified.damage.iter().any(|damage| damage.error.to_string() == error), "{place}");
        let flat = flatten(&chain, &mut encoder(), &mut common::go_on).unwrap_err();
        assert_eq!(flat.to_string(), error);
    }
    bounded();
}

/// A parent whose blocks are of another size cannot have been meant.
#[test]
fn references_to_blocks_of_another_size_are_refused() {
    let (id, created) = identity(1);
    let (parent, known) = encode_for_child(options().identity(id, created), |encoder| {
        encoder.write(at(0), &[page(7), page(8)].concat()).unwrap();
    });
    let child = options().parent(&open(parent), "p.pfi").known(known);
    let child = encode(child, |encoder| encoder.write(at(1), &page(7)).unwrap());
    let large = WriterOptions::new(PageSize::try_new(8192).unwrap()).identity(id, created);
    let other = encode(large, |encoder| encoder.write(at(0), &page(7).repeat(2)).unwrap());
    // The child is told that this was its parent.
    let mut lying = child;
    lying[64..96].copy_from_slice(&open(other.clone()).seal().bytes());
    fuzz::reseal(&mut lying);
    let chain = Chain::new(vec![open(lying), open(other)]).unwrap();
    let error = chain.read_at(at(1), &mut page(0), Missing::Poison).unwrap_err();
    assert!(matches!(error, ImageError::Corrupt { part: Part::RunTable(0), .. }), "{error}");
    assert!(!chain.verify(&mut common::go_on).unwrap().is_intact());
    bounded();
}

fn encoder() -> Encoder<Vec<u8>> {
    Encoder::new(Vec::new(), "flat", options()).unwrap()
}

/// A file of a petabyte of zeros that ends in an honest footer.
#[derive(Debug)]
struct Sparse {
    head: Vec<u8>,
    tail: Vec<u8>,
    length: u64,
}

impl Storage for Sparse {
    fn length(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let tail = self.length - self.tail.len() as u64;
        for (at, byte) in (offset..).zip(bytes) {
            *byte = match (self.head.get(at as usize), at.checked_sub(tail)) {
                (Some(head), _) => *head,
                (None, Some(at)) => self.tail[at as usize],
                (None, None) => 0,
            };
        }
        Ok(())
    }
}

#[test]
fn a_huge_sparse_file_costs_nothing() {
    let bytes = encode(options(), |_| {});
    let (blocks, runs) = (1_u64 << 38, 1_u64 << 38);
    let root = blocks / 1024 * 32 + runs / 1024 * 40 + 32;
    let mut at = 4096;
    let mut tail = bytes[bytes.len() - 256..].to_vec();
    let mut put = |field: usize, value: u64| {
        tail[field..field + 8].copy_from_slice(&value.to_le_bytes());
    };
    for (field, count, before) in [(104, blocks, blocks * 4096), (120, runs, blocks * 48)] {
        at += before;
        put(field, at);
        put(field + 8, count);
    }
    at += runs * 24;
    put(136, at);
    put(144, 0);
    put(152, at);
    put(160, root);
    let length = at + root + 256;
    put(96, length);
    let mut sealed = [&bytes[..4096], &tail].concat();
    fuzz::reseal(&mut sealed);
    let tail = sealed.split_off(4096);
    let sparse = Sparse { head: sealed, tail, length };
    let error = Image::from_storage(Box::new(sparse), "sparse").unwrap_err();
    assert!(error.to_string().contains("larger than any may be"), "{error}");
    bounded();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Changed anywhere, with digests that fit and that do not.
    #[test]
    fn nothing_panics(
        kind in 0..3,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        to_end in prop::collection::vec((0..900_usize, any::<u8>()), 0..8),
        sealed: bool,
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let (parent, referring) = small_referring();
        let mut bytes = match kind {
            0 => small(),
            1 => small_child(&open(small())),
            _ => referring,
        };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for (at, byte) in to_end {
            let at = bytes.len() - 1 - at;
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if sealed {
            fuzz::reseal(&mut bytes);
        }
        let _ = fuzz::read(bytes.clone());
        let _ = fuzz::read_chain(vec![bytes, parent]);
        bounded();
    }
}
