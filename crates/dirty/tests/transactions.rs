//! No write is lost: six threads write, a thousand harvests, and every count in every page is
//! accounted for after each of them.

mod common;

use common::{
    OWN,
    field::{Field, Writers},
    memory::{Kind, Memory},
    own_tracker,
    remote::{Remote, serve},
};
use pageferry_dirty::{DirtyError, SoftDirty, Target, Tracker};
use pageferry_memory::HostAddress;

/// More than one page table, and a good part of them written between two harvests.
fn pages(kind: Kind) -> u64 {
    if kind == Kind::Hugetlb { 8 } else { 1200 }
}

fn own(kind: Kind) {
    for (name, make) in OWN {
        let Some(memory) = Memory::new(kind, pages(kind)) else { return };
        let Some(mut tracker) = own_tracker(make, &memory.mapping) else { continue };
        // Half of it is there, so that pages appear while they are tracked.
        memory.write(0, pages(kind) / 2);
        match tracker.arm(&[memory.tracked()]) {
            Err(DirtyError::Register { .. }) if (name, kind) == OWN_REFUSED => continue,
            armed => armed.unwrap(),
        }
        let mut writers = Writers::start(&memory.mapping, memory.tracked());
        let done = HostAddress::from_ptr(writers.done.as_ptr());
        let field = Field::new(std::process::id(), memory.tracked(), done);
        field.check(&format!("{name}, {kind:?}"), &mut *tracker, || writers.stop());
        tracker.disarm().unwrap();
    }
}

/// The kernel has no synchronous write protection for files, but those of tmpfs.
const OWN_REFUSED: (&str, Kind) = ("wp-blocking", Kind::PrivateFile);

#[test]
fn own_anonymous() {
    own(Kind::Anonymous);
}

#[test]
fn own_thp() {
    own(Kind::Thp);
}

#[test]
fn own_memfd() {
    own(Kind::Memfd);
}

#[test]
fn own_hugetlb() {
    own(Kind::Hugetlb);
}

#[test]
fn own_private_file() {
    own(Kind::PrivateFile);
}

fn other(kind: Kind) {
    for method in 0..2 {
        let Some(mut remote) = Remote::new(kind, pages(kind)) else { return };
        let Some(mut tracker) = remote.by_userfaultfd(method) else { continue };
        match tracker.arm(&[remote.tracked]) {
            Err(DirtyError::Register { .. }) if (method, kind) == (1, Kind::PrivateFile) => {
                continue;
            }
            armed => armed.unwrap(),
        }
        let field = remote.start();
        let what = format!("another process, {}, {kind:?}", tracker.method());
        field.check(&what, &mut *tracker, || {
            remote.tell("stop");
        });
        tracker.disarm().unwrap();
    }
}

#[test]
fn other_anonymous() {
    other(Kind::Anonymous);
}

#[test]
fn other_thp() {
    other(Kind::Thp);
}

#[test]
fn other_memfd() {
    other(Kind::Memfd);
}

#[test]
fn other_hugetlb() {
    other(Kind::Hugetlb);
}

#[test]
fn other_private_file() {
    other(Kind::PrivateFile);
}

fn soft_dirty(kind: Kind) {
    let Some(mut remote) = Remote::new(kind, pages(kind)) else { return };
    let target = Target::Process(remote.pid());
    let mut tracker = match SoftDirty::new(target, remote.stopper()) {
        Ok(tracker) => tracker,
        Err(DirtyError::Missing { what, .. }) => return println!("skipped: needs {what}"),
        Err(error) => panic!("{error}"),
    };
    tracker.arm(&[remote.tracked]).unwrap();
    let field = remote.start();
    let what = format!("another process, soft-dirty, {kind:?}");
    field.check(&what, &mut tracker, || {
        remote.tell("stop");
    });
}

#[test]
fn soft_dirty_anonymous() {
    soft_dirty(Kind::Anonymous);
}

#[test]
fn soft_dirty_thp() {
    soft_dirty(Kind::Thp);
}

#[test]
fn soft_dirty_memfd() {
    soft_dirty(Kind::Memfd);
}

#[test]
fn soft_dirty_private_file() {
    soft_dirty(Kind::PrivateFile);
}

#[test]
fn child() {
    serve();
}
