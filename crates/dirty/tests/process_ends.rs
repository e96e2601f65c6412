//! The process ends, starts another program, or is killed while it is tracked; and the tracker is
//! killed.

#[path = "common/process.rs"]
mod common;

use std::{
    thread,
    time::{Duration, Instant},
};

use common::{METHODS, PAGE, Target, again, attach, harvest, serve};
use pageferry_dirty::{AttachOptions, Method, ProcessTrackError, ProcessTracker};
use pageferry_process::{Pid, Process, Signal};
use pageferry_testing::{Random, child, wait_for, watch};
use pageferry_uffd::{Pagemap, PagemapEntry};

#[test]
fn process_child() {
    serve();
}

const LEN: u64 = 64 * PAGE;

/// What becomes of the target.
const ENDS: [&str; 3] = ["exit", "exec", "kill"];

fn meet(target: &mut Target, end: &str) {
    match end {
        "kill" => {
            target.kill();
            target.end();
        }
        "exit" => {
            target.say("exit");
            target.end();
        }
        _ => {
            target.say("exec");
            assert_eq!(target.hear(), "here");
        }
    }
}

#[track_caller]
fn expect_gone(error: ProcessTrackError, end: &str) {
    let executed = matches!(error, ProcessTrackError::TargetExecuted { .. });
    let exited = matches!(error, ProcessTrackError::TargetExited { .. });
    assert!(error.is_gone() && if end == "exec" { executed } else { exited }, "{end}: {error}");
}

#[test]
fn process_that_is_gone_is_said_to_be() {
    let _watch = watch(60);
    for method in METHODS {
        for end in ENDS {
            let mut target = Target::start();
            let area = target.map("anonymous", LEN);
            let process = target.process();
            let Some(mut tracker) = attach(&process, method) else { break };
            target.tell("fill", &[area.start().get(), LEN, 1]);
            let _ = harvest(&mut tracker, &process, true);
            target.tell("fill", &[area.start().get(), LEN, 1]);
            if tracker.needs_stop() {
                meet(&mut target, end);
                let stopped = process.stop();
                expect_gone(stopped.unwrap_err().into(), end);
                continue;
            }
            meet(&mut target, end);
            for _ in 0..2 {
                expect_gone(tracker.harvest(None).unwrap_err(), end);
            }
            tracker.detach().unwrap();
            let error = ProcessTracker::attach(process, &AttachOptions::default()).unwrap_err();
            expect_gone(error, end);
        }
    }
}

/// Killed while it is stopped for a harvest.
#[test]
fn process_killed_while_stopped_is_said_to_be_gone() {
    let _watch = watch(60);
    for method in METHODS {
        let mut target = Target::start();
        let process = target.process();
        let Some(mut tracker) = attach(&process, method) else { continue };
        let stopped = process.stop().unwrap();
        target.kill();
        let mut error = None;
        wait_for("its end", || {
            error = tracker.harvest(Some(&stopped)).err();
            error.is_some()
        });
        expect_gone(error.unwrap(), "kill");
        drop(stopped);
        target.end();
    }
}

/// At any step: sometimes it is attached to and harvested, sometimes it is gone before.
#[test]
fn process_killed_at_any_time_hangs_nothing() {
    let _watch = watch(120);
    let mut random = Random::new(3);
    let mut gone = 0;
    for round in 0..60 {
        let method = METHODS[round % 2];
        let mut target = Target::start();
        let area = target.map("anonymous", LEN);
        target.tell("writers", &[2, area.start().get(), LEN]);
        let process = target.process();
        let pid = target.pid();
        let wait = Duration::from_micros(random.below(6000));
        let killer = thread::spawn(move || {
            thread::sleep(wait);
            if round % 3 == 0 {
                let _ = target.try_tell("exec", &[]);
            } else {
                target.kill();
            }
            target
        });
        let options = AttachOptions { method: Some(method), ..AttachOptions::default() };
        let result = ProcessTracker::attach(process, &options).and_then(|mut tracker| {
            loop {
                tracker.harvest(None)?;
            }
        });
        let error: ProcessTrackError = match result {
            Err(error) => error,
            Ok(never) => never,
        };
        if matches!(error, ProcessTrackError::Process(_)) && !error.is_gone() {
            common::say_skipped(error);
            return;
        }
        assert!(error.is_gone(), "{pid}, after {wait:?}: {error}");
        gone += 1;
        drop(killer.join().unwrap());
    }
    assert_eq!(gone, 60);
}

/// In a child of its own: tracks the process that the case names.
fn track(case: &str) -> ! {
    let (method, pid) = case.split_once(' ').unwrap();
    let method = METHODS[method.parse::<usize>().unwrap()];
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    let process = Process::open(pid).unwrap();
    let Some(mut tracker) = attach(&process, method) else {
        println!("{}none", common::MARK);
        std::process::exit(0)
    };
    let _ = harvest(&mut tracker, &process, true);
    println!("{}tracking", common::MARK);
    loop {
        let _ = harvest(&mut tracker, &process, false);
    }
}

#[test]
fn process_runs_on_when_its_tracker_is_killed() {
    const ME: &str = "process_runs_on_when_its_tracker_is_killed";
    if let Some(case) = child::case() {
        track(&case);
    }
    let _watch = watch(60);
    for (number, method) in METHODS.into_iter().enumerate() {
        for freeze in [false, true] {
            let mut target = Target::start();
            let area = target.map("anonymous", LEN);
            let other = target.map("shared", LEN);
            for range in [area, other] {
                target.tell("fill", &[range.start().get(), LEN, 1]);
            }
            target.settle();
            let before = target.condition().replace(" sd", "");
            target.tell("writers", &[2, area.start().get(), LEN]);

            let mut tracker = Target::spawn(&mut again(ME, &format!("{number} {}", target.pid())));
            if tracker.hear() == "none" {
                println!("skipped: needs {method}");
                break;
            }
            if freeze {
                // Writers of the blocking method wait now, for nobody.
                rustix::process::kill_process(tracker.pid(), Signal::STOP).unwrap();
                thread::sleep(Duration::from_millis(20));
            }
            tracker.kill();
            tracker.end();

            // It runs on: the writers, too.
            let rounds = target.tell("rounds", &[]);
            wait_for("the writers to go on", || target.tell("rounds", &[]) > rounds + 10);
            target.tell("still", &[]);
            assert!(!target.is_registered(), "{method}");
            target.settle();
            let after = target.condition().replace(" sd", "");
            assert_eq!(without_threads(&before), without_threads(&after), "{method}");
            expect_unprotected(&target, [area, other]);
            let begin = Instant::now();
            for range in [area, other] {
                target.tell("fill", &[range.start().get(), LEN, 2]);
            }
            assert!(begin.elapsed() < Duration::from_secs(5), "its writes wait");
        }
    }
}

/// The C library keeps the stacks and heaps of threads that have ended.
fn without_threads(condition: &str) -> String {
    let lines = condition.lines().filter(|line| {
        !line.contains("-p 00000000 00:00 0")
            && !line.starts_with("VmFlags")
            && !line.contains("SigQ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[track_caller]
fn expect_unprotected(target: &Target, ranges: [pageferry_uffd::HostRange; 2]) {
    let pid = target.pid().as_raw_nonzero().get().unsigned_abs();
    let pagemap = Pagemap::open(pid).unwrap();
    for range in ranges {
        let mut entries = [PagemapEntry::default(); (LEN / PAGE) as usize];
        assert_eq!(pagemap.read_entries(range, &mut entries), Ok(entries.len()));
        assert!(entries.iter().all(|entry| !entry.uffd_wp()));
    }
}

/// The blocking method, while the tracker lives but nobody answers for a while, loses nothing.
#[test]
fn process_that_waits_for_a_tracker_goes_on_when_it_is_detached() {
    let _watch = watch(60);
    let mut target = Target::start();
    let area = target.map("anonymous", LEN);
    target.tell("writers", &[4, area.start().get(), LEN]);
    for _ in 0..20 {
        let process = target.process();
        let Some(mut tracker) = attach(&process, Method::WpBlocking) else { return };
        let _ = harvest(&mut tracker, &process, false);
        drop(tracker);
        let rounds = target.tell("rounds", &[]);
        wait_for("the writers to go on", || target.tell("rounds", &[]) > rounds);
    }
    target.tell("still", &[]);
    assert!(!target.is_registered());
}
