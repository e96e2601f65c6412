//! Writes as they happen.

mod common;

use std::{num::NonZeroUsize, sync::Arc, thread, time::Duration};

use common::memory::{Kind, Memory};
use pageferry_dirty::{
    DirtyError, DirtySet, NoNotice, Notice, Overflow, Tracked, Tracker, WpBlocking, WriteEvent,
    WriteEvents,
};
use pageferry_memory::HostAddress;
use pageferry_testing::{PATIENCE, wait_for, watch};
use rustix::time::{ClockId, clock_gettime};

fn armed(memory: &Memory) -> Option<WpBlocking> {
    let mut tracker = match WpBlocking::own([Arc::clone(&memory.mapping)]) {
        Ok(tracker) => tracker,
        Err(error @ DirtyError::Open { .. }) => {
            println!("skipped: needs {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    tracker.arm(&[memory.tracked()]).unwrap();
    Some(tracker)
}

fn capacity(events: usize) -> NonZeroUsize {
    NonZeroUsize::new(events).unwrap()
}

#[track_caller]
fn next(events: &WriteEvents) -> WriteEvent {
    match events.next_within(PATIENCE) {
        Ok(Notice::Write(event)) => event,
        other => panic!("{other:?}"),
    }
}

fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[test]
fn an_event_says_where_when_and_who() {
    let _watch = watch(10);
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::Hugetlb] {
        let Some(memory) = Memory::new(kind, 8) else { continue };
        let Some(mut tracker) = armed(&memory) else { return };
        let events = tracker.events(capacity(16), Overflow::Wait);
        for page in [3, 1] {
            let before = now();
            let (thread, after) = thread::scope(|scope| {
                let write = || {
                    memory.write(page, 1);
                    memory.write(page, 1);
                    let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
                    (thread, now())
                };
                scope.spawn(write).join().unwrap()
            });
            let event = next(&events);
            // Exactly, where the kernel tells.
            let page = memory.pages(page, 1);
            let exact = page.start().checked_add(8).unwrap();
            assert!([page.start(), exact].contains(&event.address), "{event:?}");
            assert!((before..=after).contains(&event.time), "{event:?}");
            assert!(event.thread.is_none_or(|found| found == thread), "{event:?} {thread}");
        }
        assert_eq!(events.try_next(), Err(NoNotice::Empty), "only the first write to a page");
        let set = DirtySet::new(&[memory.tracked()]).unwrap();
        tracker.harvest(&set).unwrap();
        assert_eq!(set.take(), [memory.pages(1, 1), memory.pages(3, 1)]);
        memory.write(3, 1);
        assert!(memory.pages(3, 1).contains(next(&events).address), "after the harvest again");
        drop(tracker);
        assert_eq!(events.try_next(), Err(NoNotice::Ended));
    }
}

#[test]
fn writers_wait_for_room_and_no_event_is_lost() {
    const PAGES: u64 = 512;
    let _watch = watch(20);
    let Some(memory) = Memory::new(Kind::Anonymous, PAGES) else { return };
    let Some(mut tracker) = armed(&memory) else { return };
    let events = tracker.events(capacity(3), Overflow::Wait);
    let mut found: Vec<HostAddress> = thread::scope(|scope| {
        for writer in 0..4 {
            let memory = &memory;
            scope.spawn(move || (writer..PAGES).step_by(4).for_each(|page| memory.write(page, 1)));
        }
        (0..PAGES).map(|_| next(&events).address.align_down(4096)).collect()
    });
    found.sort_unstable();
    let pages = (0..PAGES).map(|page| memory.pages(page, 1).start());
    assert!(found.into_iter().eq(pages), "one event for every page");
    assert_eq!(events.try_next(), Err(NoNotice::Empty));
}

#[test]
fn a_writer_that_waits_for_room_goes_on_when_tracking_ends() {
    let _watch = watch(10);
    type End = fn(WpBlocking, WriteEvents);
    let ends: [(&str, End); 4] = [
        ("the tracker is dropped", |tracker, _events| drop(tracker)),
        ("the stream is dropped", |_tracker, events| drop(events)),
        ("another stream is asked for", |mut tracker, _events| {
            let events = tracker.events(capacity(100), Overflow::Wait);
            assert!(matches!(events.next_within(PATIENCE), Ok(Notice::Write(_))));
        }),
        ("it is disarmed", |mut tracker, _events| tracker.disarm().unwrap()),
    ];
    for (what, end) in ends {
        let Some(memory) = Memory::new(Kind::Anonymous, 8) else { return };
        let Some(mut tracker) = armed(&memory) else { return };
        let events = tracker.events(capacity(1), Overflow::Wait);
        thread::scope(|scope| {
            let writer = scope.spawn(|| memory.write(0, 8));
            // One is in the buffer, and the second cannot be.
            wait_for("the first write", || memory.read(0) == 0x5a);
            thread::sleep(Duration::from_millis(20));
            assert!(!writer.is_finished(), "{what}: the writer did not wait");
            end(tracker, events);
            wait_for(what, || writer.is_finished());
        });
        assert_eq!(memory.read(7), 0x5a);
    }
}

#[test]
fn what_has_no_room_is_told_as_a_whole_range() {
    let _watch = watch(10);
    let Some(memory) = Memory::new(Kind::Anonymous, 100) else { return };
    let mut tracker = match WpBlocking::own([Arc::clone(&memory.mapping)]) {
        Ok(tracker) => tracker,
        Err(error) => return println!("skipped: needs {error}"),
    };
    let halves =
        [(0, 50), (50, 50)].map(|(first, count)| Tracked::base(memory.pages(first, count)));
    tracker.arm(&halves).unwrap();
    let events = tracker.events(capacity(4), Overflow::WholeRange);
    memory.write(60, 2);
    memory.write(0, 10);
    let mut told: Vec<_> = std::iter::from_fn(|| events.try_next().ok()).collect();
    assert_eq!(told.pop(), Some(Notice::Whole(halves[0].range)));
    assert_eq!(told.len(), 4);
    assert!(told.iter().all(|notice| matches!(notice, Notice::Write(_))), "{told:?}");
    // The harvest is exact all the same.
    let set = DirtySet::new(&halves).unwrap();
    tracker.harvest(&set).unwrap();
    assert_eq!(set.take(), [memory.pages(0, 10), memory.pages(60, 2)]);
    memory.write(60, 1);
    assert!(memory.pages(60, 1).contains(next(&events).address), "there is room again");
}

#[test]
fn whoever_waits_for_events_is_told_of_the_end() {
    let Some(memory) = Memory::new(Kind::Anonymous, 8) else { return };
    let Some(mut tracker) = armed(&memory) else { return };
    let events = tracker.events(capacity(8), Overflow::Wait);
    let reader = thread::spawn(move || events.count());
    memory.write(0, 5);
    drop(tracker);
    wait_for("the end of the stream", || reader.is_finished());
    assert_eq!(reader.join().unwrap(), 5);
}
