//! Soft-dirty bits of another process, and of this one.

mod common;

use common::{
    harvest,
    memory::{Kind, Memory},
    remote::{Remote, base, serve},
};
use pageferry_dirty::{
    AlreadyStopped, DirtyError, DirtySet, Freeze, OnlyThread, SoftDirty, Target, Tracker,
};

const PAGES: u64 = 1024;

fn tracker(remote: &Remote) -> Option<SoftDirty> {
    match SoftDirty::new(Target::Process(remote.pid()), remote.stopper()) {
        Ok(tracker) => Some(tracker),
        Err(DirtyError::Missing { what, .. }) => {
            println!("skipped: needs {what}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn each(kinds: &[Kind], test: impl Fn(&mut Remote, &mut SoftDirty, &DirtySet)) {
    for &kind in kinds {
        let Some(mut remote) = Remote::new(kind, PAGES) else { continue };
        let Some(mut tracker) = tracker(&remote) else { return };
        println!("{kind:?}");
        // There before it is armed, so that what is not there stands out.
        remote.tell(&format!("write 0 {PAGES}"));
        tracker.arm(&[remote.tracked]).unwrap();
        let set = DirtySet::new(tracker.ranges()).unwrap();
        test(&mut remote, &mut tracker, &set);
    }
}

const SMALL: [Kind; 3] = [Kind::Anonymous, Kind::Memfd, Kind::PrivateFile];

#[test]
fn what_was_written_is_reported_once() {
    each(&SMALL, |remote, tracker, set| {
        assert_eq!(harvest(tracker, set), []);
        for _ in 0..3 {
            remote.tell("write 3 4");
            remote.tell("write 700 1");
            assert_eq!(harvest(tracker, set), [remote.pages(3, 4), remote.pages(700, 1)]);
            assert_eq!(harvest(tracker, set), []);
        }
    });
    each(&[Kind::Thp], |remote, tracker, set| {
        remote.tell("write 700 1");
        let found = harvest(tracker, set);
        assert!(found.iter().any(|run| run.contains_range(remote.pages(700, 1))), "{found:?}");
        assert_eq!(harvest(tracker, set), []);
    });
}

#[test]
fn what_was_discarded_is_reported() {
    each(&SMALL, |remote, tracker, set| {
        remote.tell("discard 512 512");
        let found = harvest(tracker, set);
        assert_eq!(found, [remote.pages(512, 512)]);
        // Of what is not there, nothing can be known if it is shared.
        let again = harvest(tracker, set);
        if remote_is_shared(remote) {
            assert_eq!(again, [remote.pages(512, 512)]);
        } else {
            assert_eq!(again, []);
        }
        remote.tell("write 600 1");
        let found = harvest(tracker, set);
        assert!(found.iter().any(|run| run.contains_range(remote.pages(600, 1))), "{found:?}");
    });
}

/// What was not there when it was armed has not changed by not being there.
#[test]
fn what_was_never_there_is_not_reported() {
    for kind in [Kind::Anonymous, Kind::PrivateFile] {
        let Some(mut remote) = Remote::new(kind, PAGES) else { continue };
        let Some(mut tracker) = tracker(&remote) else { return };
        remote.tell("write 0 100");
        remote.tell("write 300 30");
        tracker.arm(&[remote.tracked]).unwrap();
        let set = DirtySet::new(tracker.ranges()).unwrap();
        assert_eq!(harvest(&mut tracker, &set), [], "{kind:?}");
        remote.tell("discard 10 1");
        remote.tell("discard 320 20");
        remote.tell("write 600 1");
        let expected = [remote.pages(10, 1), remote.pages(320, 10), remote.pages(600, 1)];
        assert_eq!(harvest(&mut tracker, &set), expected, "{kind:?}");
        remote.tell("discard 600 1");
        remote.tell("write 10 1");
        let expected = [remote.pages(10, 1), remote.pages(600, 1)];
        assert_eq!(harvest(&mut tracker, &set), expected, "{kind:?}");
    }
}

#[test]
fn what_was_discarded_before_the_first_harvest_is_reported() {
    let Some(mut remote) = Remote::new(Kind::Anonymous, PAGES) else { return };
    let Some(mut tracker) = tracker(&remote) else { return };
    remote.tell("write 100 100");
    tracker.arm(&[remote.tracked]).unwrap();
    remote.tell("discard 150 100");
    let set = DirtySet::new(tracker.ranges()).unwrap();
    assert_eq!(harvest(&mut tracker, &set), [remote.pages(150, 50)]);
}

#[test]
fn who_could_arm_nothing_leaves_the_bits_to_others() {
    let Some(mut remote) = Remote::new(Kind::Anonymous, PAGES) else { return };
    let Some(mut first) = tracker(&remote) else { return };
    remote.tell("unmap 0 10");
    let error = first.arm(&[base(remote.pages(0, 20))]).unwrap_err();
    assert!(matches!(error, DirtyError::Vanished { .. }), "{error}");
    let mut second = tracker(&remote).unwrap();
    second.arm(&[base(remote.pages(10, 20))]).unwrap();
    remote.tell("write 12 1");
    let set = DirtySet::new(second.ranges()).unwrap();
    // It has none of the bits, so it takes none.
    first.harvest(&set).unwrap();
    assert_eq!(harvest(&mut second, &set), [remote.pages(12, 1)]);
}

fn remote_is_shared(remote: &Remote) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", remote.pid())).unwrap();
    let start = format!("{:x}-", remote.tracked.range.start().get());
    maps.lines().any(|line| line.starts_with(&start) && line.contains("rw-s"))
}

#[test]
fn what_was_written_before_more_is_armed_is_not_lost() {
    let Some(mut remote) = Remote::new(Kind::Anonymous, PAGES) else { return };
    let Some(mut tracker) = tracker(&remote) else { return };
    remote.tell("write 0 1024");
    tracker.arm(&[base(remote.pages(0, 100))]).unwrap();
    remote.tell("write 50 2");
    tracker.arm(&[base(remote.pages(100, 100))]).unwrap();
    remote.tell("write 150 1");
    let set = DirtySet::new(tracker.ranges()).unwrap();
    assert_eq!(harvest(&mut tracker, &set), [remote.pages(50, 2), remote.pages(150, 1)]);
    assert_eq!(harvest(&mut tracker, &set), []);
}

#[test]
fn what_is_unmapped_or_moved_is_gone_and_what_is_new_is_dirty() {
    for gone in ["unmap 100 28", "move 100 28"] {
        each(&SMALL, |remote, tracker, set| {
            remote.tell("write 700 1");
            remote.tell(gone);
            let harvested = tracker.harvest(set).unwrap();
            assert_eq!(harvested.gone, [remote.pages(100, 28)], "{gone}");
            assert_eq!(set.take(), [remote.pages(100, 28), remote.pages(700, 1)], "{gone}");
            let left = [base(remote.pages(0, 100)), base(remote.pages(128, PAGES - 128))];
            assert_eq!(tracker.ranges(), left, "{gone}");
            remote.tell("write 128 1");
            assert_eq!(harvest(tracker, set), [remote.pages(128, 1)], "{gone}");
        });
    }
    each(&[Kind::Anonymous], |remote, tracker, set| {
        remote.tell("replace 100 28");
        remote.tell("write 110 1");
        let found = harvest(tracker, set);
        let wanted = remote.pages(100, 28);
        let covered: u64 =
            found.iter().filter_map(|run| run.intersection(wanted)).map(|part| part.len()).sum();
        assert_eq!(covered, wanted.len(), "a new mapping is dirty as a whole: {found:?}");
    });
}

#[test]
fn only_one_tracker_at_a_time() {
    each(&[Kind::Anonymous], |remote, first, _| {
        let mut second = tracker(remote).unwrap();
        let error = second.arm(&[remote.tracked]).unwrap_err();
        assert!(matches!(error, DirtyError::AlreadyTracked { .. }), "{error}");
        first.disarm().unwrap();
        second.arm(&[remote.tracked]).unwrap();
    });
}

#[test]
fn a_process_that_runs_is_refused_and_nothing_is_lost() {
    let Some(mut remote) = Remote::new(Kind::Anonymous, PAGES) else { return };
    let pid = remote.pid();
    let stopped = AlreadyStopped { pid };
    let mut tracker = match SoftDirty::new(Target::Process(pid), stopped) {
        Ok(tracker) => tracker,
        Err(DirtyError::Missing { what, .. }) => return println!("skipped: needs {what}"),
        Err(error) => panic!("{error}"),
    };
    let error = tracker.arm(&[remote.tracked]).unwrap_err();
    assert!(matches!(error, DirtyError::Running { .. }), "{error}");
    remote.tell("write 0 1024");
    let tracked = remote.tracked;
    remote.stopper().while_frozen(&mut || tracker.arm(&[tracked])).unwrap();
    remote.tell("write 5 1");
    let set = DirtySet::new(&[tracked]).unwrap();
    let error = tracker.harvest(&set).unwrap_err();
    assert!(matches!(error, DirtyError::Running { .. }), "{error}");
    assert_eq!(set.count(), 0);
    remote.stopper().while_frozen(&mut || tracker.harvest(&set).map(drop)).unwrap();
    assert_eq!(set.take(), [remote.pages(5, 1)]);
}

#[test]
fn huge_pages_are_refused() {
    let Some(remote) = Remote::new(Kind::Hugetlb, 4) else { return };
    let Some(mut tracker) = tracker(&remote) else { return };
    for tracked in [remote.tracked, base(remote.tracked.range)] {
        let error = tracker.arm(&[tracked]).unwrap_err();
        assert!(matches!(error, DirtyError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn a_process_that_is_killed_is_gone() {
    each(&[Kind::Anonymous], |remote, tracker, set| {
        remote.end();
        let error = tracker.harvest(set).unwrap_err();
        assert!(matches!(error, DirtyError::ProcessGone { .. }), "{error}");
    });
}

/// Runs something in a child that has no thread but this one, which no test has.
fn alone(test: impl FnOnce()) {
    // SAFETY: the C library sees to it that its locks are free in the child, which uses nothing
    // else that other threads may have locked, and does not return from here.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
        // SAFETY: nothing of what the process would do at its end concerns the child.
        unsafe { libc::_exit(if result.is_ok() { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: the status is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child failed");
}

/// A thread that has been joined may be listed for a moment more.
#[test]
fn threads_that_have_been_joined_do_not_count() {
    alone(|| {
        for _ in 0..2000 {
            std::thread::spawn(|| {}).join().unwrap();
            OnlyThread.while_frozen(&mut || Ok(())).unwrap();
        }
    });
}

#[test]
fn a_process_of_one_thread_tracks_itself() {
    match SoftDirty::new(Target::Own, OnlyThread) {
        Ok(_) => {}
        Err(DirtyError::Missing { what, .. }) => return println!("skipped: needs {what}"),
        Err(error) => panic!("{error}"),
    }
    alone(|| {
        let memory = Memory::new(Kind::Anonymous, PAGES).unwrap();
        let mut tracker = SoftDirty::new(Target::Own, OnlyThread).unwrap();
        memory.write(0, PAGES);
        tracker.arm(&[memory.tracked()]).unwrap();
        let set = DirtySet::new(&[memory.tracked()]).unwrap();
        memory.write(5, 2);
        assert_eq!(harvest(&mut tracker, &set), [memory.pages(5, 2)]);
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || receiver.recv());
            memory.write(7, 1);
            let error = tracker.harvest(&set).unwrap_err();
            assert!(matches!(error, DirtyError::Running { .. }), "{error}");
            drop(sender);
        });
        pageferry_testing::wait_for("the end of the thread", || tracker.harvest(&set).is_ok());
        assert_eq!(set.take(), [memory.pages(7, 1)]);
    });
}

#[test]
fn child() {
    serve();
}
