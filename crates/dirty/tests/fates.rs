//! What becomes of another process while it is tracked.

mod common;

use std::{num::NonZeroUsize, sync::Arc};

use common::{
    harvest,
    memory::Kind,
    remote::{Remote, base, serve},
};
use pageferry_dirty::{
    Ability, Condition, DirtyError, DirtySet, Method, Notice, Overflow, Target, Tracker, WpAsync,
    choose, probe,
};
use pageferry_memory::HostAddress;
use pageferry_testing::{PATIENCE, watch};
use pageferry_uffd::{Features, OpenWay, Options, Userfaultfd};

const PAGES: u64 = 1024;

/// Runs a test with both methods that need a userfaultfd.
fn each(kinds: &[Kind], test: impl Fn(&mut Remote, &mut dyn Tracker, &DirtySet)) {
    for &kind in kinds {
        for method in 0..2 {
            let Some(mut remote) = Remote::new(kind, PAGES) else { continue };
            let Some(mut tracker) = remote.by_userfaultfd(method) else { continue };
            println!("{}, {kind:?}", tracker.method());
            let _watch = watch(120);
            tracker.arm(&[remote.tracked]).unwrap();
            let set = DirtySet::new(tracker.ranges()).unwrap();
            test(&mut remote, &mut *tracker, &set);
        }
    }
}

const KINDS: [Kind; 2] = [Kind::Anonymous, Kind::Memfd];

#[test]
fn written_discarded_and_forked() {
    each(&KINDS, |remote, tracker, set| {
        remote.tell("write 3 4");
        assert_eq!(harvest(tracker, set), [remote.pages(3, 4)]);
        // The child has the memory, untracked, and copy on write for both.
        remote.tell("fork");
        assert_eq!(harvest(tracker, set), []);
        remote.tell("write 4 1");
        assert_eq!(harvest(tracker, set), [remote.pages(4, 1)]);
        remote.tell("write 512 512");
        remote.tell("discard 512 512");
        assert_eq!(harvest(tracker, set), [remote.pages(512, 512)]);
        remote.tell("write 600 1");
        assert!(harvest(tracker, set).contains(&remote.pages(600, 1)));
        tracker.disarm().unwrap();
        remote.tell("write 0 1024");
        assert_eq!(remote.tell("read 1023"), 0x5a);
    });
}

#[test]
fn what_is_unmapped_moved_or_replaced_is_reported_as_gone() {
    for gone in ["unmap 100 28", "move 100 28", "replace 100 28"] {
        each(&KINDS, |remote, tracker, set| {
            remote.tell("write 99 30");
            remote.tell("write 700 1");
            remote.tell(gone);
            let harvested = tracker.harvest(set).unwrap();
            assert_eq!(harvested.gone, [remote.pages(100, 28)], "{gone}");
            let left = [base(remote.pages(0, 100)), base(remote.pages(128, PAGES - 128))];
            assert_eq!(tracker.ranges(), left, "{gone}");
            let found = set.take();
            for page in [99, 100, 127, 128, 700] {
                let page = remote.pages(page, 1);
                assert!(found.iter().any(|run| run.contains_range(page)), "{gone}: {found:?}");
            }

            // The rest is tracked as before.
            remote.tell("write 99 1");
            remote.tell("write 128 1");
            let expected = [remote.pages(99, 1), remote.pages(128, 1)];
            assert_eq!(harvest(tracker, set), expected, "{gone}");

            if gone.starts_with("replace") {
                remote.tell("write 110 1");
                assert_eq!(harvest(tracker, set), [], "{gone}: what is new is not tracked");
                tracker.arm(&[base(remote.pages(100, 28))]).unwrap();
                remote.tell("write 111 1");
                assert_eq!(harvest(tracker, set), [remote.pages(111, 1)], "{gone}");
            }
            tracker.disarm().unwrap();
            remote.tell("write 128 100");
        });
    }
}

#[test]
fn everything_gone_at_once() {
    each(&KINDS, |remote, tracker, set| {
        remote.tell("unmap 0 1024");
        let harvested = tracker.harvest(set).unwrap();
        assert_eq!(harvested.gone, [remote.tracked.range]);
        assert!(tracker.ranges().is_empty());
        assert_eq!(set.take(), [remote.tracked.range]);
        assert_eq!(harvest(tracker, set), []);
        tracker.disarm().unwrap();
    });
}

#[test]
fn ranges_that_are_not_mapped_are_refused() {
    each(&KINDS, |remote, tracker, set| {
        remote.tell("unmap 100 100");
        tracker.harvest(set).unwrap();
        let error = tracker.arm(&[base(remote.pages(100, 10))]).unwrap_err();
        assert!(matches!(error, DirtyError::Register { .. }), "{error}");
        remote.tell("write 50 1");
        set.take();
        assert_eq!(harvest(tracker, set), [remote.pages(50, 1)]);
    });
}

#[test]
fn a_process_that_is_killed_is_gone() {
    each(&KINDS, |remote, tracker, set| {
        remote.tell("write 3 1");
        remote.end();
        let error = tracker.harvest(set).unwrap_err();
        assert!(matches!(error, DirtyError::ProcessGone { pid } if pid == remote.pid()), "{error}");
        let error = tracker.arm(&[base(remote.tracked.range)]).unwrap_err();
        // It is still known as armed; and a part that is not cannot be armed either.
        assert!(matches!(error, DirtyError::Overlaps { .. }), "{error}");
        tracker.disarm().unwrap();
        let error = tracker.arm(&[base(remote.tracked.range)]).unwrap_err();
        assert!(matches!(error, DirtyError::ProcessGone { .. }), "{error}");
    });
}

#[test]
fn a_process_that_executes_another_program_is_gone() {
    each(&KINDS, |remote, tracker, set| {
        remote.tell("write 3 1");
        tracker.harvest(set).unwrap();
        remote.tell("exec");
        // The answer comes just before. Until then it is tracked; afterwards nothing is there.
        let gone = |result: &Result<_, DirtyError>| match result {
            Err(DirtyError::ProcessGone { .. }) => true,
            Err(error) => panic!("{error}"),
            Ok(_) => false,
        };
        pageferry_testing::wait_for("the end of the program", || {
            let result = tracker.harvest(set);
            gone(&result) || tracker.ranges().is_empty()
        });
        assert!(set.test(remote.pages(3, 1).start()), "what was found before is not lost");
        tracker.disarm().unwrap();
    });
}

#[test]
fn the_process_is_unharmed_when_the_tracker_goes_at_any_time() {
    each(&KINDS, |remote, tracker, _| {
        remote.start();
        // As when its process is killed: the descriptor is closed by nobody's decision.
        tracker.disarm().unwrap();
        remote.tell("stop");
    });
    for kind in KINDS {
        let Some(mut remote) = Remote::new(kind, PAGES) else { continue };
        let Some(mut tracker) = remote.wp_blocking() else { continue };
        tracker.arm(&[remote.tracked]).unwrap();
        remote.start();
        drop(tracker);
        remote.tell("stop");
        remote.tell("write 0 1024");
        assert_eq!(remote.tell("read 5"), 0x5a);
    }
}

#[test]
fn writes_of_another_process_are_told_with_its_thread() {
    let Some(mut remote) = Remote::new(Kind::Anonymous, 8) else { return };
    let Some(mut tracker) = remote.wp_blocking() else { return };
    tracker.arm(&[remote.tracked]).unwrap();
    let events = tracker.events(NonZeroUsize::new(8).unwrap(), Overflow::Wait);
    remote.tell("write 5 1");
    let Ok(Notice::Write(event)) = events.next_within(PATIENCE) else { panic!("no event") };
    assert!(remote.pages(5, 1).contains(event.address), "{event:?}");
    let threads = std::fs::read_dir(format!("/proc/{}/task", remote.pid())).unwrap();
    let mut threads = threads.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let thread = event.thread.expect("the kernel tells").to_string();
    assert!(threads.any(|found| found == thread), "{event:?}");
}

fn received(features: Features) -> Option<Arc<Userfaultfd>> {
    use std::os::fd::AsFd;
    let opened = match Options::new().required(features).open() {
        Ok(opened) => opened,
        Err(error) => {
            println!("skipped: needs {error}");
            return None;
        }
    };
    let fd = opened.as_fd().try_clone_to_owned().unwrap();
    Some(Arc::new(Userfaultfd::from_received_fd(fd, features, OpenWay::Syscall).unwrap()))
}

#[test]
fn descriptors_that_are_of_no_use_are_refused() {
    let Some(remote) = Remote::new(Kind::Anonymous, 8) else { return };
    let removals = WpAsync::FEATURES | Features::EVENT_REMOVE;
    for (features, pid, complaint) in [
        (Features::WP_ASYNC, remote.pid(), "lacks features (WP_HUGETLBFS_SHMEM"),
        (removals, remote.pid(), "has events"),
        (WpAsync::FEATURES, std::process::id(), "of this process"),
    ] {
        let Some(uffd) = received(features) else { return };
        // SAFETY: nothing is ever armed.
        let error = unsafe { WpAsync::with_userfaultfd(uffd, pid) }.unwrap_err();
        let found = error.to_string();
        let found = found.replace("PAGEFAULT_FLAG_WP | ", "");
        assert!(found.contains(complaint), "{found}");
    }
    let Some(uffd) = received(WpAsync::FEATURES) else { return };
    // SAFETY: nothing is ever armed.
    let error = unsafe { WpAsync::with_userfaultfd(uffd, u32::MAX) }.unwrap_err();
    assert!(matches!(error, DirtyError::ProcessGone { .. }), "{error}");
}

#[test]
fn what_can_track_is_found_by_doing() {
    let own = probe(Target::Own);
    let Some(remote) = Remote::new(Kind::Anonymous, 8) else { return };
    let other = probe(Target::Process(remote.pid()));
    for report in [&own, &other] {
        for (method, ability) in &report.methods {
            println!("{}: {method}: {ability}", report.target);
        }
    }
    for (mine, (method, others)) in own.methods.iter().zip(&other.methods) {
        let expected = match mine {
            (_, Ability::Works) => Ability::Needs(Condition::Userfaultfd),
            (_, Ability::Needs(Condition::OneThread)) => Ability::Needs(Condition::Stopped),
            (_, missing) => missing.clone(),
        };
        assert_eq!(*others, expected, "{method}");
    }
    match choose(Target::Own, 1 << 30) {
        Ok(choice) => assert!(!choice.reason.is_empty() && choice.method != Method::KvmLog),
        Err(error) => println!("skipped: needs {error}"),
    }
}

/// Addresses of the other process are not those of this one.
#[test]
fn the_memory_of_another_process_is_not_touched_here() {
    each(&[Kind::Anonymous], |remote, tracker, _| {
        let start: HostAddress = tracker.ranges()[0].range.start();
        assert_eq!(start, remote.tracked.range.start());
    });
}

#[test]
fn child() {
    serve();
}
