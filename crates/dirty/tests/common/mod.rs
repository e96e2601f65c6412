//! Memory of every kind, threads that write to it, and a process that does both on demand.
#![allow(dead_code, reason = "every test file uses its own part of this")]

pub(crate) mod field;
pub(crate) mod memory;
pub(crate) mod remote;

use std::sync::Arc;

use pageferry_dirty::{DirtyError, DirtySet, Tracked, Tracker, WpAsync, WpBlocking};
use pageferry_memory::{HostRange, Mapping};

/// A way to track the own memory.
pub(crate) type Make = fn(Arc<Mapping>) -> Result<Box<dyn Tracker>, DirtyError>;

pub(crate) const OWN: [(&str, Make); 2] = [
    ("wp-async", |memory| Ok(Box::new(WpAsync::own([memory])?))),
    ("wp-blocking", |memory| Ok(Box::new(WpBlocking::own([memory])?))),
];

/// A tracker of the own memory; `None`, having said so, when the host lacks what it takes.
pub(crate) fn own_tracker(make: Make, memory: &Arc<Mapping>) -> Option<Box<dyn Tracker>> {
    match make(Arc::clone(memory)) {
        Ok(tracker) => Some(tracker),
        Err(error @ DirtyError::Open { .. }) => {
            println!("skipped: needs {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Harvests once; answers the runs found.
#[track_caller]
pub(crate) fn harvest(tracker: &mut dyn Tracker, set: &DirtySet) -> Vec<HostRange> {
    let harvested = tracker.harvest(set).unwrap();
    assert_eq!((&harvested.whole, &harvested.gone), (&vec![], &vec![]));
    let (pages, runs) = (set.count(), set.take());
    assert!(harvested.pages >= pages, "{harvested:?}");
    runs
}

/// So many pages from a first one on.
pub(crate) fn pages(tracked: Tracked, first: u64, count: u64) -> HostRange {
    let size = tracked.page.bytes();
    let range = tracked.range.skip(first * size).take(count * size);
    assert_eq!(range.len(), count * size, "pages outside of {tracked:?}");
    range
}
