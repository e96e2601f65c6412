//! Page maps, and the writes found in them.

mod common;

use std::sync::Arc;

use common::{Backing, Memory, open};
use pageferry_uffd::{
    ClearRefs, Errno, Features, HostRange, Mapped, PageCategories, PageRegion, Pagemap,
    PagemapEntry, PagemapError, RegisterMode, Registration, ScanRequest, ScanResult, Wake,
    clear_refs,
};

#[test]
fn entries_tell_present_from_absent_and_private_from_shared() {
    let pagemap = Pagemap::open(std::process::id()).unwrap();
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let memory = Memory::new(backing, 4).unwrap();
        memory.write(1, 1);
        memory.write(3, 1);
        let mut entries = [PagemapEntry::default(); 8];
        assert_eq!(pagemap.read_entries(memory.range(), &mut entries), Ok(4));
        let present: Vec<_> = entries[..4].iter().map(|entry| entry.present()).collect();
        assert_eq!(present, [false, true, false, true]);
        assert_eq!(entries[1].file(), backing == Backing::Memfd);
        assert!(entries[1].exclusive() && !entries[1].swapped() && !entries[1].uffd_wp());
        assert_eq!(entries[0].frame(), None);

        let mut two = [PagemapEntry::default(); 2];
        assert_eq!(pagemap.read_entries(memory.pages(1, 3), &mut two), Ok(2));
        assert_eq!(two, entries[1..3]);
    }
}

#[test]
fn entries_show_write_protection() {
    let Some(userfaultfd) = open(Features::PAGEFAULT_FLAG_WP) else { return };
    let memory = Memory::new(Backing::Anonymous, 2).unwrap();
    memory.write(0, 1);
    memory.write(1, 1);
    let _registration = userfaultfd.register(&*memory, memory.range(), RegisterMode::WP).unwrap();
    assert!(userfaultfd.write_protect(memory.page(1), true, Wake::Yes).unwrap().is_complete());
    let mut entries = [PagemapEntry::default(); 2];
    let pagemap = Pagemap::open_self().unwrap();
    assert_eq!(pagemap.read_entries(memory.range(), &mut entries), Ok(2));
    assert_eq!(entries.map(PagemapEntry::uffd_wp), [false, true]);
}

#[test]
fn a_range_that_is_not_whole_pages_is_refused() {
    let memory = Memory::new(Backing::Anonymous, 2).unwrap();
    let odd = memory.range().skip(1);
    let result = Pagemap::open_self().unwrap().read_entries(odd, &mut []);
    assert_eq!(result, Err(PagemapError::Unaligned { range: odd, page_size: memory.page_size() }));
}

/// Memory whose writes the kernel notes by itself, all of it protected.
fn tracked(backing: Backing, pages: u64) -> Option<(Arc<Memory>, Registration<Arc<Memory>>)> {
    let userfaultfd = open(Features::WP_ASYNC)?;
    let memory = Memory::new(backing, pages)?;
    let registration =
        userfaultfd.register(Arc::clone(&memory), memory.range(), RegisterMode::WP).unwrap();
    assert!(userfaultfd.write_protect(memory.range(), true, Wake::Yes).unwrap().is_complete());
    Some((memory, registration))
}

fn ranges(regions: &[PageRegion]) -> Vec<HostRange> {
    regions.iter().map(PageRegion::range).collect()
}

#[test]
fn a_harvest_finds_each_write_once() {
    for backing in common::BACKINGS {
        let Some((memory, _registration)) = tracked(backing, 8) else { continue };
        let pagemap = Pagemap::open_self().unwrap();
        let mut regions = [PageRegion::default(); 8];
        let request = ScanRequest::written(memory.range(), true);
        for page in [1, 2, 5] {
            memory.write(page, 1);
        }
        let look = ScanRequest::written(memory.range(), false);
        let walk_end = memory.range().end();
        // Looking changes nothing, however often.
        for request in [look, look, request] {
            let result = pagemap.scan(&request, &mut regions);
            assert_eq!(result, Ok(ScanResult { regions: 2, walk_end }), "{backing:?}");
            assert_eq!(ranges(&regions[..2]), [memory.pages(1, 2), memory.page(5)]);
            assert_eq!(regions[0].categories(), PageCategories::WRITTEN);
        }
        let result = pagemap.scan(&request, &mut regions);
        assert_eq!(result, Ok(ScanResult { regions: 0, walk_end }));

        memory.write(2, 2);
        let result = pagemap.scan(&request, &mut regions).unwrap();
        assert_eq!(ranges(&regions[..result.regions]), [memory.page(2)]);
    }
}

#[test]
fn a_scan_goes_on_where_the_room_ended() {
    let Some((memory, _registration)) = tracked(Backing::Anonymous, 16) else { return };
    let pagemap = Pagemap::open_self().unwrap();
    let odd: Vec<_> = (0..8).map(|index| 2 * index + 1).collect();
    for &page in &odd {
        memory.write(page, 1);
    }
    let mut found = Vec::new();
    let mut left = memory.range();
    while !left.is_empty() {
        let mut regions = [PageRegion::default(); 3];
        let result = pagemap.scan(&ScanRequest::written(left, true), &mut regions).unwrap();
        found.extend(ranges(&regions[..result.regions]));
        let walked = result.walk_end.offset_from(left.start()).unwrap();
        assert!(walked > 0, "a scan with room makes progress");
        left = left.skip(walked);
    }
    let expected: Vec<_> = odd.iter().map(|&page| memory.page(page)).collect();
    assert_eq!(found, expected);

    for &page in &odd {
        memory.write(page, 2);
    }
    let request = ScanRequest { max_pages: 2, ..ScanRequest::written(memory.range(), true) };
    let mut regions = [PageRegion::default(); 16];
    let result = pagemap.scan(&request, &mut regions).unwrap();
    assert_eq!(ranges(&regions[..result.regions]), [memory.page(1), memory.page(3)]);
    assert!(result.walk_end <= memory.page(5).start());
}

/// The kernel has a buffer of its own, of 512 regions, and says where that was full last.
#[test]
fn a_scan_that_came_to_the_end_says_so() {
    let Some((memory, _registration)) = tracked(Backing::Anonymous, 1400) else { return };
    let pagemap = Pagemap::open_self().unwrap();
    let odd: Vec<_> = (0..700).map(|index| memory.page(2 * index + 1)).collect();
    for room in [2048, 600] {
        for page in 0..700 {
            memory.write(2 * page + 1, 1);
        }
        let mut regions = vec![PageRegion::default(); room];
        let (mut found, mut calls) = (Vec::new(), 0);
        let mut left = memory.range();
        while !left.is_empty() {
            let result = pagemap.scan(&ScanRequest::written(left, false), &mut regions).unwrap();
            found.extend(ranges(&regions[..result.regions]));
            left = left.skip(result.walk_end.offset_from(left.start()).unwrap());
            calls += 1;
        }
        assert_eq!(found, odd, "each once");
        assert_eq!(calls, if room == 600 { 2 } else { 1 });
    }
}

#[test]
fn what_a_failing_harvest_took_is_not_lost() {
    // Two neighbouring halves, of which only the first is tracked.
    let Some(userfaultfd) = open(Features::WP_ASYNC) else { return };
    let memory = Memory::new(Backing::Anonymous, 8).unwrap();
    let half = memory.pages(0, 4);
    let _registration = userfaultfd.register(&*memory, half, RegisterMode::WP).unwrap();
    assert!(userfaultfd.write_protect(half, true, Wake::Yes).unwrap().is_complete());
    memory.write(1, 1);
    memory.write(3, 1);

    let pagemap = Pagemap::open_self().unwrap();
    let mut regions = [PageRegion::default(); 8];
    let error =
        pagemap.scan(&ScanRequest::written(memory.range(), true), &mut regions).unwrap_err();
    assert!(error.to_string().contains("asynchronous write protection"), "{error}");
    let PagemapError::Scan { errno: Errno::PERM, regions: filled, .. } = error else {
        panic!("{error}");
    };
    let mut found = ranges(&regions[..filled]);

    let result = pagemap.scan(&ScanRequest::written(half, true), &mut regions).unwrap();
    found.extend(ranges(&regions[..result.regions]));
    for page in [1, 3] {
        assert!(found.contains(&memory.page(page)), "page {page} is lost: {found:?}");
    }
}

#[test]
fn categories_other_than_written() {
    let pagemap = Pagemap::open_self().unwrap();
    let memory = Memory::new(Backing::Memfd, 4).unwrap();
    memory.write(2, 1);
    let mut regions = [PageRegion::default(); 4];
    let both = PageCategories::PRESENT | PageCategories::FILE;
    let result = match pagemap.scan(&ScanRequest::having(memory.range(), both), &mut regions) {
        Err(PagemapError::Scan { errno: Errno::NOTTY, .. }) => {
            println!("skipped: needs PAGEMAP_SCAN");
            return;
        }
        result => result.unwrap(),
    };
    assert_eq!(ranges(&regions[..result.regions]), [memory.page(2)]);
    assert_eq!(regions[0].categories(), both);

    let absent = ScanRequest {
        category_inverted: PageCategories::PRESENT,
        ..ScanRequest::having(memory.range(), PageCategories::PRESENT)
    };
    let result = pagemap.scan(&absent, &mut regions).unwrap();
    assert_eq!(ranges(&regions[..result.regions]), [memory.pages(0, 2), memory.page(3)]);
}

#[test]
fn soft_dirty_bits_are_cleared_and_set_by_writes() {
    // Of a file: the kernel merges anonymous mappings with a new one beside them, of another test,
    // and a new one counts as written to.
    let memory = Memory::new(Backing::Memfd, 2).unwrap();
    let pagemap = Pagemap::open_self().unwrap();
    let dirty = || {
        let mut entries = [PagemapEntry::default(); 2];
        assert_eq!(pagemap.read_entries(memory.range(), &mut entries), Ok(2));
        entries.map(PagemapEntry::soft_dirty)
    };
    memory.write(0, 1);
    memory.write(1, 1);
    if dirty() == [false, false] {
        println!("skipped: needs a kernel with soft-dirty bits");
        return;
    }
    clear_refs(std::process::id(), ClearRefs::SoftDirty).unwrap();
    assert_eq!(dirty(), [false, false]);
    memory.write(1, 2);
    assert_eq!(dirty(), [false, true]);
}

/// The referenced pages of this mapping, as `/proc/self/smaps` has them, in KiB.
fn referenced(range: HostRange) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", range.start());
    let line = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&start))
        .find_map(|line| line.strip_prefix("Referenced:"))
        .expect("the mapping and its line");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn references_are_cleared() {
    // A file's mapping: those are not merged with their neighbours.
    let memory = Memory::new(Backing::Memfd, 4).unwrap();
    for page in 0..4 {
        memory.write(page, 1);
    }
    assert_eq!(referenced(memory.range()), 16);
    clear_refs(std::process::id(), ClearRefs::Mapped).unwrap();
    assert_eq!(referenced(memory.range()), 0);
}

#[test]
fn errors_name_the_process() {
    // Above what the kernel gives out as process ids.
    let error = clear_refs(u32::MAX, ClearRefs::All).unwrap_err();
    assert_eq!(error.errno, Errno::NOENT);
    assert!(error.to_string().contains("/proc/4294967295/clear_refs"), "{error}");
    let error = Pagemap::open(u32::MAX).unwrap_err();
    assert!(error.to_string().contains("/proc/4294967295/pagemap"), "{error}");
}
