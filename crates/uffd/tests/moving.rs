//! The events of moving and unmapping, as a kernel really sends them.
//!
//! These tests ask what is at an address where nothing is mapped any more. The kernel lets a
//! userfaultfd install pages in whatever any userfaultfd of the process has registered, so nobody
//! else may map and register anything there meanwhile: they have a program of their own, and run
//! one at a time.

mod common;

use std::sync::Mutex;

use common::{contents, map, next_event, next_fault, open, run, unmap};
use pageferry_uffd::{
    CopyMode, Event, FaultKind, Features, HostRange, Outcome, RegisterMode, Userfaultfd, Wake,
};
use rustix::mm::MremapFlags;

static ALONE: Mutex<()> = Mutex::new(());

fn register_range(userfaultfd: &Userfaultfd, range: HostRange) {
    // SAFETY: a mapping of the test, whose contents are nobody's values.
    unsafe { userfaultfd.register_raw(range, RegisterMode::MISSING) }.unwrap();
}

#[test]
fn remap_is_reported_and_faults_follow_the_memory() {
    let _alone = ALONE.lock();
    let Some(userfaultfd) = open(Features::EVENT_REMAP) else { return };
    let page = rustix::param::page_size() as u64;
    let (from, to) = (map(None, 2 * page).unwrap(), map(None, 2 * page).unwrap());
    register_range(&userfaultfd, from);
    let remap = run(move || {
        let len = 2 * page as usize;
        let (old, new) = (from.start().as_ptr().cast(), to.start().as_ptr().cast());
        // SAFETY: both are mappings of the test, which nobody uses meanwhile.
        unsafe { rustix::mm::mremap_fixed(old, len, len, MremapFlags::MAYMOVE, new) }.is_ok()
    });
    match next_event(&userfaultfd) {
        Event::Remap { from: old, to: new, len } => {
            assert_eq!((old, new, len), (from.start(), to.start(), 2 * page));
        }
        other => panic!("{other:?}"),
    }
    assert!(remap.finish());

    let gone = userfaultfd.zeropage(from.take(page), Wake::Yes);
    assert_eq!(gone, Ok(Outcome::RangeGone { done: 0 }));
    let toucher = run(move || {
        // SAFETY: this is where the mapping is now.
        unsafe { to.start().as_ptr().read_volatile() }
    });
    next_fault(&userfaultfd, FaultKind::Missing, to.take(page));
    let bytes = contents(page, [0x5a]);
    assert!(userfaultfd.copy(to.start(), &bytes, CopyMode::WAKE).unwrap().is_complete());
    assert_eq!(toucher.finish(), 0x5a);
    unmap(to);
}

#[test]
fn unmap_is_reported() {
    let _alone = ALONE.lock();
    let Some(userfaultfd) = open(Features::EVENT_UNMAP) else { return };
    let page = rustix::param::page_size() as u64;
    let range = map(None, 4 * page).unwrap();
    register_range(&userfaultfd, range);
    let (first, rest) = range.split_at(page);
    for part in [first, rest] {
        let thread = run(move || unmap(part));
        match next_event(&userfaultfd) {
            Event::Unmap(unmapped) => assert_eq!(unmapped, part),
            other => panic!("{other:?}"),
        }
        thread.finish();
        let gone = userfaultfd.zeropage(part, Wake::Yes);
        assert_eq!(gone, Ok(Outcome::RangeGone { done: 0 }));
    }
}
