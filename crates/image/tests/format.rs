//! Files of every version that was ever written open in every later one.

mod common;

use common::{at, go_on, identity, page, pages, small, small_child, small_referring};
use pageferry_image::{
    Amounts, Chain, Content, ImageRange, MappingFlags, Missing, ParentState, list,
};

const PLACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v1");

#[test]
fn version_1() {
    let chain = Chain::open(PLACE).unwrap();
    assert!(chain.verify(&mut go_on).unwrap().is_intact());
    let [newest, oldest] = chain.images() else { panic!("there are two images") };
    assert_eq!((newest.id(), oldest.id()), (identity(2).0, identity(1).0));
    let info = newest.info();
    assert_eq!((info.version, info.ancestors, info.created), (1, 1, identity(2).1));
    assert_eq!(info.parent.unwrap().name(), "small.pfi");

    let extents: Vec<_> = chain.extents(ImageRange::ALL).map(Result::unwrap).collect();
    let extents: Vec<_> = extents.iter().map(|extent| (extent.range, extent.content)).collect();
    assert_eq!(
        extents,
        [
            (pages(0x90, 1), Content::Poisoned),
            (pages(0x100, 1), Content::Data),
            (pages(0x101, 1), Content::Data),
            (pages(0x103, 1), Content::Zero),
            (pages(0x200, 1 << 20), Content::Zero),
        ]
    );
    let mut buffer = page(0);
    for (number, byte) in [(0x100, 7), (0x101, 9), (0x103, 0), (0x1000, 0)] {
        chain.read_at(at(number), &mut buffer, Missing::Poison).unwrap();
        assert_eq!(buffer, page(byte));
    }

    let [mapping] = oldest.mappings().unwrap() else { panic!("there is one mapping") };
    assert_eq!(mapping.range, pages(0x100, 4));
    assert_eq!(mapping.flags, MappingFlags::READ | MappingFlags::WRITE | MappingFlags::SHARED);
    assert_eq!((mapping.file_offset, mapping.device, mapping.inode), (0x3000, (8, 1), 4711));
    assert_eq!(mapping.name, b"/tmp/file (deleted)");
    assert_eq!(oldest.metadata().unwrap().collect::<Vec<_>>(), [("comm", &b"small"[..])]);
    assert_eq!(newest.metadata().unwrap().collect::<Vec<_>>(), [("round", &b"1"[..])]);

    let listed = list(PLACE).unwrap();
    let states: Vec<_> = listed.iter().map(|listed| listed.parent).collect();
    assert_eq!(states, [ParentState::None, ParentState::Present]);
}

/// What is written today is what version 1 was: who changes the format makes it another version.
#[test]
fn version_1_is_what_is_written() {
    let fixture = |name: &str| std::fs::read(format!("{PLACE}/{name}.pfi")).unwrap();
    assert!(small() == fixture("small"));
    assert!(small_child(&common::open(small())) == fixture("child"));
}

const REFERRING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/v1-referring");

/// Version 1 with the required feature that an image may refer to blocks of its ancestors.
#[test]
fn version_1_with_references() {
    let chain = Chain::open(REFERRING).unwrap();
    assert!(chain.verify(&mut go_on).unwrap().is_intact());
    let info = chain.newest().info();
    assert_eq!((info.version, info.id), (1, identity(3).0));
    let bytes = |pages: u64| pages * common::PAGE;
    let Amounts { data, zero, stored, elsewhere, .. } = info.amounts;
    assert_eq!((data, zero, stored, elsewhere), (bytes(5), bytes(1), bytes(1), bytes(4)));
    let mut buffer = page(0);
    for (number, byte) in
        [(0x100, 7), (0x101, 8), (0x102, 9), (0x103, 7), (0x300, 7), (0x301, 8), (0x302, 0)]
    {
        chain.read_at(at(number), &mut buffer, Missing::Poison).unwrap();
        assert_eq!(buffer, page(byte), "{number:#x}");
    }
    let fixture = |name: &str| std::fs::read(format!("{REFERRING}/{name}.pfi")).unwrap();
    let (small, child) = small_referring();
    assert!(small == fixture("small") && child == fixture("child"));
}
