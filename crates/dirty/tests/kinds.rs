//! What is reported, exactly, for memory of every kind of this process.

mod common;

use std::sync::Arc;

use common::{
    OWN, harvest,
    memory::{Kind, Memory},
    own_tracker,
};
use pageferry_dirty::{DirtyError, DirtySet, Method, Tracked, Tracker, WpAsync};
use pageferry_memory::{Advice, HostRange, PageSize};
use pageferry_testing::watch;

/// Runs a test with every method and every kind of memory it is made for: 8 pages, or of memory of
/// base pages 1536, three page tables of 2 MiB.
fn each(kinds: &[Kind], test: impl Fn(&Memory, &mut dyn Tracker, &DirtySet)) {
    for (name, make) in OWN {
        for &kind in kinds {
            let pages = if kind == Kind::Hugetlb { 8 } else { 1536 };
            let Some(memory) = Memory::new(kind, pages) else { continue };
            let Some(mut tracker) = own_tracker(make, &memory.mapping) else { continue };
            println!("{name}, {kind:?}");
            let _watch = watch(120);
            if (name, kind) == ("wp-blocking", Kind::PrivateFile) {
                // The kernel has that for files of tmpfs only, and nobody knows where this one is.
                if let Err(error) = tracker.arm(&[memory.tracked()]) {
                    assert!(matches!(error, DirtyError::Register { .. }), "{error}");
                    assert!(tracker.ranges().is_empty());
                    continue;
                }
                tracker.disarm().unwrap();
            }
            let set = DirtySet::new(&[memory.tracked()]).unwrap();
            test(&memory, &mut *tracker, &set);
        }
    }
}

#[test]
fn just_what_was_written_is_reported_once() {
    each(&Kind::ALL, |memory, tracker, set| {
        memory.write(0, 4);
        tracker.arm(&[memory.tracked()]).unwrap();
        assert_eq!(tracker.ranges(), [memory.tracked()]);
        assert_eq!(harvest(tracker, set), [], "what was written before is not");
        let harvested = tracker.harvest(set).unwrap();
        assert_eq!((harvested.pages, harvested.calls > 0), (0, true));
        for _ in 0..3 {
            memory.write(1, 2);
            memory.write(6, 1);
            let found = harvest(tracker, set);
            if memory.kind == Kind::Thp {
                // Never there when armed, or there as small pages: the mapping decides.
                assert!(found.contains(&memory.pages(1, 2)), "{found:?}");
            } else {
                assert_eq!(found, [memory.pages(1, 2), memory.pages(6, 1)]);
            }
            assert_eq!(harvest(tracker, set), []);
        }
        tracker.disarm().unwrap();
        assert!(tracker.ranges().is_empty());
        memory.write(0, 8);
        assert_eq!(harvest_nothing(tracker), []);
    });
}

fn harvest_nothing(tracker: &mut dyn Tracker) -> Vec<HostRange> {
    harvest(tracker, &DirtySet::default())
}

#[test]
fn a_first_write_to_a_page_that_was_never_there_is_reported_and_a_read_is_not() {
    each(&Kind::ALL, |memory, tracker, set| {
        tracker.arm(&[memory.tracked()]).unwrap();
        for page in 0..4 {
            assert_eq!(memory.read(page), 0);
        }
        assert_eq!(harvest(tracker, set), [], "reading");
        memory.write(2, 1);
        memory.write(5, 1);
        assert_eq!(harvest(tracker, set), [memory.pages(2, 1), memory.pages(5, 1)]);
        assert_eq!((memory.read(2), memory.read(3), memory.read(5)), (0x5a, 0, 0x5a));
    });
}

#[test]
fn a_huge_page_is_split_by_its_first_write() {
    each(&[Kind::Thp], |memory, tracker, set| {
        memory.write(0, 1536);
        tracker.arm(&[memory.tracked()]).unwrap();
        for page in [0, 700, 701, 1535] {
            memory.write(page, 1);
        }
        let expected = [memory.pages(0, 1), memory.pages(700, 2), memory.pages(1535, 1)];
        assert_eq!(harvest(tracker, set), expected);
        assert_eq!(harvest(tracker, set), []);
    });
}

fn discard(memory: &Memory, first: u64, count: u64) {
    memory.mapping.advise(memory.pages(first, count), Advice::DontNeed).unwrap();
}

/// What is found covers what must be, page by page.
#[track_caller]
fn assert_covers(found: &[HostRange], wanted: HostRange) {
    let covered: u64 =
        found.iter().filter_map(|run| run.intersection(wanted)).map(HostRange::len).sum();
    assert_eq!(covered, wanted.len(), "{wanted} is not all in {found:?}");
}

#[test]
fn what_is_discarded_is_reported_and_so_is_what_is_written_there() {
    each(&Kind::ALL, |memory, tracker, set| {
        let pages = memory.tracked().pages();
        memory.write(0, pages);
        tracker.arm(&[memory.tracked()]).unwrap();
        // A part of a page table, and two whole ones, which may go with it.
        let parts: &[(u64, u64)] =
            if memory.kind == Kind::Hugetlb { &[(1, 2)] } else { &[(3, 5), (512, 1024)] };
        for &(first, count) in parts {
            discard(memory, first, count);
            let found = harvest(tracker, set);
            // Shared memory keeps its contents, and need not be reported. Of a private mapping of a
            // file the kernel keeps the mark that it is not written, though it goes back to what the
            // file has: that is documented.
            if matches!(memory.kind, Kind::Anonymous | Kind::Thp) {
                assert_covers(&found, memory.pages(first, count));
            }
            assert_eq!(harvest(tracker, set), [], "reported once");

            memory.write(first + 1, 1);
            let found = harvest(tracker, set);
            assert_covers(&found, memory.pages(first + 1, 1));
            assert_eq!(harvest(tracker, set), []);
        }
    });
}

#[test]
fn what_was_written_and_then_discarded_is_reported() {
    each(&Kind::ALL, |memory, tracker, set| {
        let pages = memory.tracked().pages();
        for prepared in [false, true] {
            if prepared {
                memory.write(0, pages);
            }
            tracker.arm(&[memory.tracked()]).unwrap();
            let (first, count) = if memory.kind == Kind::Hugetlb { (2, 3) } else { (512, 512) };
            memory.write(first, count);
            discard(memory, first, count);
            let found = harvest(tracker, set);
            assert_covers(&found, memory.pages(first, count));
            discard(memory, first, count);
            memory.write(first, 1);
            assert_covers(&harvest(tracker, set), memory.pages(first, 1));
            tracker.disarm().unwrap();
        }
    });
}

#[test]
fn what_is_written_into_a_punched_hole_is_reported() {
    each(&[Kind::Memfd, Kind::Hugetlb], |memory, tracker, set| {
        let (pages, size) = (memory.tracked().pages(), memory.kind.page().bytes());
        memory.write(0, pages);
        tracker.arm(&[memory.tracked()]).unwrap();
        let half = pages / 2;
        memory.file.as_ref().unwrap().punch_hole(half * size, half * size).unwrap();
        // The hole itself may be reported or not: it was not made through the mapping.
        harvest(tracker, set);
        assert_eq!(memory.read(half), 0);
        harvest(tracker, set);
        memory.write(half + 1, 2);
        assert_covers(&harvest(tracker, set), memory.pages(half + 1, 2));
        assert_eq!(harvest(tracker, set), []);
        assert_eq!((memory.read(half), memory.read(half + 1)), (0, 0x5a));
    });
}

#[test]
fn ranges_are_added_and_what_is_armed_stays_so() {
    each(&[Kind::Anonymous, Kind::Memfd], |memory, tracker, set| {
        let part = |first, count| Tracked { range: memory.pages(first, count), ..memory.tracked() };
        tracker.arm(&[part(0, 100), part(200, 100)]).unwrap();
        memory.write(50, 1);
        memory.write(150, 1);
        tracker.arm(&[part(100, 100)]).unwrap();
        memory.write(151, 1);
        memory.write(299, 2);
        let expected =
            [(50, 1), (151, 1), (299, 1)].map(|(first, count)| memory.pages(first, count));
        assert_eq!(harvest(tracker, set), expected);

        let error = tracker.arm(&[part(400, 10), part(299, 2)]).unwrap_err();
        assert!(matches!(error, DirtyError::Overlaps { .. }), "{error}");
        memory.write(400, 1);
        assert_eq!(harvest(tracker, set), [], "nothing of a refused request is armed");
    });
}

#[test]
fn a_set_without_room_is_refused_and_nothing_is_lost() {
    each(&[Kind::Anonymous], |memory, tracker, set| {
        tracker.arm(&[memory.tracked()]).unwrap();
        memory.write(7, 1);
        let range = memory.pages(0, 1000);
        let small = DirtySet::new(&[Tracked { range, ..memory.tracked() }]).unwrap();
        let error = tracker.harvest(&small).unwrap_err();
        assert!(matches!(error, DirtyError::NotInSet { .. }), "{error}");
        assert_eq!(harvest(tracker, set), [memory.pages(7, 1)]);
    });
}

#[test]
fn memory_of_others_is_refused() {
    let Some(mine) = Memory::new(Kind::Anonymous, 4) else { return };
    let Some(other) = Memory::new(Kind::Anonymous, 4) else { return };
    for (_, make) in OWN {
        let Some(mut tracker) = own_tracker(make, &mine.mapping) else { continue };
        let error = tracker.arm(&[mine.tracked(), other.tracked()]).unwrap_err();
        assert!(matches!(error, DirtyError::NotOwned { .. }), "{error}");
        let odd = Tracked { page: PageSize::SIZE_2M, ..mine.tracked() };
        let error = tracker.arm(&[odd]).unwrap_err();
        assert!(matches!(error, DirtyError::Unaligned { .. }), "{error}");
        // The failed ones have left nothing.
        tracker.arm(&[mine.tracked()]).unwrap();
    }
}

#[test]
fn what_another_tracker_has_is_refused_until_it_is_dropped() {
    let Some(memory) = Memory::new(Kind::Anonymous, 4) else { return };
    for (_, make) in OWN {
        let Some(mut first) = own_tracker(make, &memory.mapping) else { continue };
        first.arm(&[memory.tracked()]).unwrap();
        let Some(mut second) = own_tracker(make, &memory.mapping) else { continue };
        let error = second.arm(&[memory.tracked()]).unwrap_err();
        assert!(error.to_string().contains("another userfaultfd"), "{error}");
        drop(first);
        second.arm(&[memory.tracked()]).unwrap();
        // And what has no tracker any more is written to as ever.
        drop(second);
        memory.write(0, 4);
        assert_eq!(memory.read(3), 0x5a);
    }
}

#[test]
fn writes_of_the_kernel_are_reported() {
    each(&Kind::ALL, |memory, tracker, set| {
        tracker.arm(&[memory.tracked()]).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        let page = memory.pages(3, 1).start().as_ptr();
        // SAFETY: inside of the mapping, and the only reference to this byte.
        let into = unsafe { std::slice::from_raw_parts_mut(page, 1) };
        assert_eq!(rustix::io::read(&reader, into), Ok(1));
        assert_eq!(harvest(tracker, set), [memory.pages(3, 1)]);
    });
}

#[test]
fn trackers_are_objects_that_go_from_thread_to_thread() {
    let Some(memory) = Memory::new(Kind::Anonymous, 4) else { return };
    let trackers: Vec<Box<dyn Tracker>> =
        OWN.iter().filter_map(|(_, make)| own_tracker(*make, &memory.mapping)).collect();
    for mut tracker in trackers {
        tracker.arm(&[memory.tracked()]).unwrap();
        let set = DirtySet::new(&[memory.tracked()]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                memory.write(1, 1);
                assert_eq!(harvest(&mut *tracker, &set), [memory.pages(1, 1)]);
            });
        });
        let name = tracker.method().to_string();
        assert!([Method::WpAsync, Method::WpBlocking].map(Method::name).contains(&&*name));
    }
}

/// 64 MiB in 16,384 runs: more than one call of the kernel has room for.
#[test]
fn a_harvest_of_more_runs_than_fit_goes_on() {
    let Some(memory) = Memory::new(Kind::Anonymous, 16 << 10) else { return };
    let mut tracker = match WpAsync::own([Arc::clone(&memory.mapping)]) {
        Ok(tracker) => tracker,
        Err(error) => return println!("skipped: needs {error}"),
    };
    tracker.arm(&[memory.tracked()]).unwrap();
    let set = DirtySet::new(&[memory.tracked()]).unwrap();
    for page in (1..16 << 10).step_by(2) {
        memory.write(page, 1);
    }
    let harvested = tracker.harvest(&set).unwrap();
    assert_eq!((harvested.pages, set.count()), (8 << 10, 8 << 10));
    assert!(harvested.calls > 1, "{harvested:?}");
    assert!(set.take().iter().all(|run| run.len() == 4096));
    assert_eq!(harvest(&mut tracker, &set), []);
}
