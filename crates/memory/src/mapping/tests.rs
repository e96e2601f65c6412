use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::{MemoryFile, MemoryFileKind};

/// The line of `/proc/self/maps` for the mapping that begins at this address.
fn line_of_maps(start: HostAddress) -> Option<String> {
    let prefix = format!("{:x}-", start.get());
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .find(|line| line.starts_with(&prefix))
        .map(str::to_owned)
}

#[test]
fn bytes_come_back() {
    let mapping = Mapping::anonymous(3 << 20).unwrap();
    let bytes: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
    mapping.write_at(4093, &bytes).unwrap();
    let mut read = vec![0; bytes.len()];
    mapping.read_at(4093, &mut read).unwrap();
    assert_eq!(read, bytes);
    mapping.read_at((3 << 20) - 16, &mut read[..16]).unwrap();
    assert_eq!(read[..16], [0; 16]);
}

#[test]
fn accesses_outside_are_refused() {
    let mapping = Mapping::anonymous(8192).unwrap();
    let mut bytes = [0xaa; 16];
    for offset in [8177, 8192, 8193, u64::MAX, u64::MAX - 15] {
        let error = mapping.read_at(offset, &mut bytes).unwrap_err();
        assert_eq!(error, OutOfRange { offset, len: 16, mapping: mapping.range() });
        assert_eq!(mapping.write_at(offset, &bytes).unwrap_err(), error);
    }
    assert_eq!(bytes, [0xaa; 16]);
    mapping.read_at(8176, &mut bytes).unwrap();
    mapping.read_at(8192, &mut []).unwrap();
}

#[test]
fn large_mappings_are_aligned_for_huge_pages() {
    let file = MemoryFile::create("aligned", 16 << 20, MemoryFileKind::Normal).unwrap();
    for offset in [0, 4096, 2 << 20, (3 << 20) + 8192] {
        let mapping = Mapping::shared(&file, offset, 4 << 20, None).unwrap();
        assert_eq!(mapping.range().start().get() % HUGE_ALIGNMENT, offset % HUGE_ALIGNMENT);
        assert_eq!(mapping.range().len(), 4 << 20);
    }
    let mapping = Mapping::anonymous(2 << 20).unwrap();
    assert!(mapping.range().start().is_aligned(HUGE_ALIGNMENT));
}

#[test]
fn two_views_of_a_file_show_the_same_bytes() {
    let file = MemoryFile::create("views", 1 << 20, MemoryFileKind::Normal).unwrap();
    let one = Mapping::shared(&file, 0, 1 << 20, None).unwrap();
    let other = Mapping::shared(&file, 4096, 8192, None).unwrap();
    one.write_at(4099, b"pageferry").unwrap();
    let mut read = [0; 9];
    other.read_at(3, &mut read).unwrap();
    assert_eq!(&read, b"pageferry");
    one.advise(HostRange::new(one.range().start(), 8192), Advice::Remove).unwrap();
    other.read_at(3, &mut read).unwrap();
    assert_eq!(read, [0; 9]);
}

#[test]
fn odd_sizes_are_refused() {
    let file = MemoryFile::create("odd", 8192, MemoryFileKind::Normal).unwrap();
    for (offset, len, hugetlb) in [
        (0, 0, None),
        (0, 100, None),
        (1, 4096, None),
        (0, 4096, Some(PageSize::SIZE_2M)),
        (4096, 2 << 20, Some(PageSize::SIZE_2M)),
    ] {
        let error = Mapping::shared(&file, offset, len, hugetlb).unwrap_err();
        assert!(matches!(error, MappingError::Unaligned { .. }), "{error}");
    }
    assert!(matches!(Mapping::anonymous(4097), Err(MappingError::Unaligned { .. })));
}

#[test]
fn more_than_the_address_space_is_an_error() {
    for len in [1 << 60, !0xfff] {
        let error = Mapping::anonymous(len).unwrap_err();
        assert!(matches!(error, MappingError::Map { .. }), "{error}");
    }
}

#[test]
fn dropping_unmaps() {
    // Another thread may map something right there afterwards, so the name is what is looked for.
    let file = MemoryFile::create("dropping-unmaps", 1 << 20, MemoryFileKind::Normal).unwrap();
    let mapping = Mapping::shared(&file, 0, 1 << 20, None).unwrap();
    let start = mapping.range().start();
    let is_mapped = || line_of_maps(start).is_some_and(|line| line.contains("dropping-unmaps"));
    assert!(is_mapped());
    drop(mapping);
    assert!(!is_mapped());
}

#[test]
fn an_embedders_mapping_is_left_to_it() {
    struct Keepalive<'a>(Mapping, &'a AtomicBool);
    impl Drop for Keepalive<'_> {
        fn drop(&mut self) {
            self.1.store(true, Ordering::Relaxed);
        }
    }
    static DROPPED: AtomicBool = AtomicBool::new(false);
    let keepalive = Arc::new(Keepalive(Mapping::anonymous(4096).unwrap(), &DROPPED));
    let range = keepalive.0.range();
    // SAFETY: the range stays mapped while the keepalive lives, and no reference to it exists.
    let mapping = unsafe { Mapping::from_raw(range, keepalive.clone()) };
    mapping.write_at(0, b"kept").unwrap();
    drop(mapping);
    let mut read = [0; 4];
    keepalive.0.read_at(0, &mut read).unwrap();
    assert_eq!(&read, b"kept");
    assert!(!DROPPED.load(Ordering::Relaxed));
    // SAFETY: as above.
    let mapping = unsafe { Mapping::from_raw(range, keepalive) };
    assert!(!DROPPED.load(Ordering::Relaxed));
    drop(mapping);
    assert!(DROPPED.load(Ordering::Relaxed));
}

#[test]
fn many_parts_are_advised_and_nothing_else() {
    // More than the kernel takes at once, and a last batch of one.
    let pages = 2 * 2049;
    let mapping = Mapping::anonymous(pages * 4096).unwrap();
    for page in 0..pages {
        mapping.write_at(page * 4096, &[1]).unwrap();
    }
    let page = |page: u64| mapping.range().skip(page * 4096).take(4096);
    let odd: Vec<_> = (0..pages / 2).map(|index| page(2 * index + 1)).collect();
    mapping.advise_all(&odd, Advice::DontNeed).unwrap();
    for page in 0..pages {
        let mut byte = [7];
        mapping.read_at(page * 4096, &mut byte).unwrap();
        assert_eq!(u64::from(byte[0]), (page + 1) % 2, "page {page}");
    }
    let outside = HostRange::new(mapping.range().end(), 4096);
    let error = mapping.advise_all(&[page(0), outside], Advice::DontNeed).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let mut byte = [7];
    mapping.read_at(0, &mut byte).unwrap();
    assert_eq!(byte, [1], "nothing was told");
    mapping.advise_all(&[], Advice::DontNeed).unwrap();
}

#[test]
fn advice_takes_effect_and_is_bounds_checked() {
    let mapping = Mapping::anonymous(64 << 10).unwrap();
    let range = mapping.range();
    mapping.advise(range, Advice::PopulateWrite).unwrap();
    mapping.write_at(0, b"data").unwrap();
    mapping.advise(HostRange::new(range.start(), 4096), Advice::DontNeed).unwrap();
    let mut read = [1; 4];
    mapping.read_at(0, &mut read).unwrap();
    assert_eq!(read, [0; 4]);
    for advice in [Advice::PopulateRead, Advice::DontFork, Advice::DontDump] {
        mapping.advise(range, advice).unwrap();
    }
    let beyond = HostRange::new(range.start(), range.len() + 4096);
    let error = mapping.advise(beyond, Advice::DontNeed).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_shortage_of_huge_pages_says_what_to_do() {
    let size = PageSize::SIZE_2M;
    let Ok(pool) = HugePagePool::read(size) else {
        println!("skipped: needs a kernel with huge pages of {size}");
        return;
    };
    let needed = pool.total + 1_000_000;
    let file =
        MemoryFile::create("short", needed * size.bytes(), MemoryFileKind::Hugetlb(size)).unwrap();
    let error = Mapping::shared(&file, 0, file.len(), Some(size)).unwrap_err();
    assert!(matches!(error, MappingError::NotEnoughHugePages { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&format!("{needed} huge pages of 2 MiB are needed")), "{text}");
    assert!(text.contains("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"), "{text}");
}
