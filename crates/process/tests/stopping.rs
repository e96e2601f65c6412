//! A stopped process stands still, and goes on as it was.

mod common;

use std::{
    io::{PipeReader, Read, Write},
    thread,
    time::{Duration, Instant},
};

use common::{
    Group, Held as _, Target, count, count_slowly, counters_address, end_with_parent,
    expect_counting, expect_still, listen, tell,
};
use pageferry_process::{
    Pid, Process, ProcessError, Signal, StopMethod, StopOptions, UserfaultfdRequest,
};
use pageferry_testing::{child, wait_for};
use pageferry_uffd::{Features, OpenWay};
use rustix::{
    event::{PollFd, PollFlags, epoll, poll},
    time::Timespec,
};

const PTRACE: [StopMethod; 1] = [StopMethod::Ptrace];
const BOTH: [StopMethod; 2] = [StopMethod::Ptrace, StopMethod::ControlGroup];

fn by(method: StopMethod) -> StopOptions {
    StopOptions::default().method(method)
}

/// In a child: so many threads, of which eight never wait and the others mostly do.
fn crowd(threads: usize) -> ! {
    common::alone();
    for counter in 0..threads {
        if counter % 16 == 0 { count(counter) } else { count_slowly(counter) }
    }
    tell(&counters_address().to_string());
    listen();
    std::process::exit(0)
}

/// A child with such a crowd, in a group of its own if there can be one; and where it counts.
fn start_crowd(test: &str, threads: usize) -> (Target, Process, u64, Option<Group>) {
    let group = Group::new(&format!("{test}-{threads}"));
    let target = common::start_alone_in(group.as_ref(), test, &threads.to_string());
    let address = target.hear().parse().unwrap();
    let process = target.process();
    expect_counting(&process, address, threads);
    (target, process, address, group)
}

#[test]
fn no_thread_moves() {
    const ME: &str = "no_thread_moves";
    if let Some(case) = child::case() {
        crowd(case.parse().unwrap());
    }
    for threads in [1, 100] {
        let (target, process, address, group) = start_crowd(ME, threads);
        let methods = if group.is_some() { &BOTH[..] } else { &PTRACE };
        for &method in methods {
            for _ in 0..3 {
                let stopped = process.stop_with(by(method)).unwrap();
                assert_eq!(stopped.method(), method);
                expect_still(&process, address);
                let time = stopped.resume().unwrap();
                assert!(time >= Duration::from_millis(20), "{time:?} is not all of it");
                expect_counting(&process, address, threads);
            }
        }
        assert_eq!(target.status("TracerPid"), "0");
        if group.is_some() {
            assert_eq!(process.stop().unwrap().method(), StopMethod::ControlGroup);
        }
    }
}

#[test]
fn a_hundred_threads_are_stopped() {
    const ME: &str = "a_hundred_threads_are_stopped";
    if let Some(case) = child::case() {
        crowd(case.parse().unwrap());
    }
    let (_target, process, _, group) = start_crowd(ME, 100);
    let methods = if group.is_some() { &BOTH[..] } else { &PTRACE };
    for &method in methods {
        // How long it takes `cargo bench` measures; here only that it is never for ever.
        for _ in 0..40 {
            let took = process.stop_with(by(method)).unwrap().resume().unwrap();
            assert!(took < Duration::from_secs(5), "{method:?}: {took:?}");
        }
    }
    // And the same with what an attaching tracker does in the stop.
    if !pageferry_testing::userfaultfd() {
        return;
    }
    process.check_syscalls().unwrap();
    for _ in 0..40 {
        let mut stopped = process.stop_with(by(StopMethod::Ptrace)).unwrap();
        let request = UserfaultfdRequest::new(Features::empty()).ways(OpenWay::ALL);
        let uffd = stopped.open_userfaultfd(&request).unwrap();
        let took = stopped.resume().unwrap();
        assert!(took < Duration::from_secs(5), "{took:?}");
        drop(uffd);
    }
}

/// In a child: waits in every way there is, and says how each wait ended.
fn wait_in_every_way() -> ! {
    common::alone();
    let mut ends = Vec::new();
    let mut wait = |name: &'static str, wait: fn(PipeReader) -> String| {
        let (reader, writer) = std::io::pipe().unwrap();
        ends.push((name, writer, thread::spawn(move || wait(reader))));
    };
    wait("read", |mut reader| {
        // Not `read_exact`, which would try again after EINTR.
        format!("{:?}", reader.read(&mut [0; 8]))
    });
    wait("poll for ever", |reader| {
        format!("{:?}", poll(&mut [PollFd::new(&reader, PollFlags::IN)], None))
    });
    wait("poll for long", |reader| {
        let long = Timespec { tv_sec: 600, tv_nsec: 0 };
        format!("{:?}", poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&long)))
    });
    wait("epoll for ever", |reader| {
        let all = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(0);
        epoll::add(&all, &reader, data, epoll::EventFlags::IN).unwrap();
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data }; 1];
        format!("{:?}", epoll::wait(&all, &mut events, None))
    });
    wait("sleep", |reader| {
        let begin = Instant::now();
        let time = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
        let result = rustix::thread::nanosleep(&time);
        drop(reader);
        let long_enough = begin.elapsed() >= Duration::from_millis(500);
        format!("{} {long_enough}", matches!(result, rustix::thread::NanosleepRelativeResult::Ok))
    });
    wait("poll in vain", |reader| {
        let begin = Instant::now();
        let time = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
        let result = poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&time));
        format!("{result:?} {}", begin.elapsed() >= Duration::from_millis(500))
    });
    wait("park", |reader| {
        let begin = Instant::now();
        thread::park_timeout(Duration::from_millis(500));
        drop(reader);
        (begin.elapsed() >= Duration::from_millis(500)).to_string()
    });
    tell("waiting");
    listen();
    for (name, mut writer, thread) in ends {
        // Some have no reader any more.
        if !name.ends_with("in vain") {
            let _ = writer.write_all(b"x");
        }
        tell(&format!("{name}: {}", thread.join().unwrap()));
    }
    std::process::exit(0)
}

#[test]
fn waiting_threads_wait_on() {
    const ME: &str = "waiting_threads_wait_on";
    if child::case().is_some() {
        wait_in_every_way();
    }
    let group = Group::new(ME);
    let methods = if group.is_some() { &BOTH[..] } else { &PTRACE };
    for &method in methods {
        let mut target = common::start_alone_in(group.as_ref(), ME, "wait");
        assert_eq!(target.hear(), "waiting");
        let process = target.process();
        for _ in 0..20 {
            let stopped = process.stop_with(by(method)).unwrap();
            thread::sleep(Duration::from_millis(2));
            drop(stopped);
            thread::sleep(Duration::from_millis(2));
        }
        target.say("now");
        for expected in [
            "read: Ok(1)",
            "poll for ever: Ok(1)",
            "poll for long: Ok(1)",
            "epoll for ever: Ok(1)",
            "sleep: true true",
            "poll in vain: Ok(0) true",
            "park: true",
        ] {
            let heard = target.hear();
            if method == StopMethod::ControlGroup && expected.starts_with("epoll") {
                // The freezer makes it fail, as signal(7) says of stops.
                assert!(
                    heard == expected
                        || heard.contains("Interrupted")
                        || heard.contains("INTR")
                        || heard.contains("Os { code: 4"),
                    "{heard}"
                );
                continue;
            }
            assert_eq!(heard, expected, "{method:?}");
        }
        assert_eq!(target.end(), 0);
    }
}

/// In a child: threads that make threads that make threads. Each ends when the next has begun.
fn breed(counter: usize) {
    thread::spawn(move || {
        common::COUNTERS[counter].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        breed(counter);
    });
}

/// Whether a thread is on its way out, in the kernel, from where it does not come back: `PF_EXITING`
/// in the ninth field of proc_pid_stat(5). It may take a while where the CPU is slow.
fn is_ending(process: &Process, thread: Pid) -> bool {
    const EXITING: u64 = 4;
    let path = format!("/proc/{}/task/{thread}/stat", process.pid());
    let Ok(stat) = std::fs::read_to_string(path) else { return true };
    let fields = stat.rsplit_once(") ").expect("a name").1;
    let flags: u64 = fields.split(' ').nth(6).expect("its flags").parse().unwrap();
    flags & EXITING != 0
}

#[test]
fn threads_born_meanwhile_are_stopped_too() {
    const ME: &str = "threads_born_meanwhile_are_stopped_too";
    if child::case().is_some() {
        end_with_parent();
        (0..4).for_each(breed);
        tell(&counters_address().to_string());
        listen();
        std::process::exit(0);
    }
    let target = Target::start(ME, "breed");
    let address = target.hear().parse().unwrap();
    let process = target.process();
    for round in 0..100 {
        let stopped = process.stop_with(by(StopMethod::Ptrace)).unwrap();
        let threads = process.threads().unwrap();
        for thread in &threads {
            let path = format!("/proc/{}/task/{thread}/status", process.pid());
            // One that had ended is not listed any more, unless it is being taken away just now.
            let Ok(status) = std::fs::read_to_string(path) else { continue };
            let state = status.lines().find(|line| line.starts_with("State:")).unwrap();
            let stopped = state.contains("t (") || state.contains("Z (");
            assert!(stopped || is_ending(&process, *thread), "{thread}: {state}");
        }
        if round % 20 == 0 {
            expect_still(&process, address);
        }
        drop(stopped);
        expect_counting(&process, address, 4);
    }
}

#[test]
fn children_are_left_alone() {
    const ME: &str = "children_are_left_alone";
    if child::case().is_some() {
        end_with_parent();
        tell("forking");
        let mut good = 0_u64;
        let run = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let running = run.clone();
        let forks = thread::spawn(move || {
            while running.load(std::sync::atomic::Ordering::Relaxed) {
                let status = common::nothing().status().unwrap();
                assert!(status.success(), "{status}");
                good += 1;
            }
            good
        });
        listen();
        run.store(false, std::sync::atomic::Ordering::Relaxed);
        tell(&forks.join().unwrap().to_string());
        std::process::exit(0);
    }
    let mut target = Target::start(ME, "fork");
    assert_eq!(target.hear(), "forking");
    let process = target.process();
    for _ in 0..100 {
        let options = by(StopMethod::Ptrace).patience(Duration::from_secs(20));
        drop(process.stop_with(options).unwrap());
        thread::sleep(Duration::from_millis(1));
    }
    target.say("enough");
    assert!(target.hear_numbers()[0] > 0);
    assert_eq!(target.end(), 0);
}

#[test]
fn who_was_stopped_stays_so() {
    const ME: &str = "who_was_stopped_stays_so";
    if let Some(case) = child::case() {
        crowd(case.parse().unwrap());
    }
    let (target, process, address, group) = start_crowd(ME, 4);
    let methods = if group.is_some() { &BOTH[..] } else { &PTRACE };
    for &method in methods {
        process.signal(Signal::STOP).unwrap();
        wait_for("it to be stopped", || target.state() == 'T');
        drop(process.stop_with(by(method)).unwrap());
        wait_for("it to be stopped again", || target.state() == 'T');
        expect_still(&process, address);
        process.signal(Signal::CONT).unwrap();
        expect_counting(&process, address, 4);

        // The signals may come meanwhile, too.
        let stopped = process.stop_with(by(method)).unwrap();
        process.signal(Signal::STOP).unwrap();
        drop(stopped);
        wait_for("it to be stopped", || target.state() == 'T');
        expect_still(&process, address);
        let stopped = process.stop_with(by(method)).unwrap();
        process.signal(Signal::CONT).unwrap();
        expect_still(&process, address);
        drop(stopped);
        expect_counting(&process, address, 4);
    }
}

#[test]
fn it_can_be_left_stopped() {
    const ME: &str = "it_can_be_left_stopped";
    if let Some(case) = child::case() {
        crowd(case.parse().unwrap());
    }
    let (target, process, address, group) = start_crowd(ME, 20);
    for _ in 0..5 {
        let stopped = process.stop_with(by(StopMethod::Ptrace)).unwrap();
        let before = common::counters(&process, address);
        assert_eq!(stopped.leave_stopped().unwrap(), StopMethod::Ptrace);
        assert_eq!(target.status("TracerPid"), "0");
        assert_eq!(target.state(), 'T');
        expect_still(&process, address);
        assert_eq!(common::counters(&process, address), before, "it ran in between");
        process.signal(Signal::CONT).unwrap();
        expect_counting(&process, address, 20);
    }
    let Some(group) = group else { return };
    let stopped = process.stop_with(by(StopMethod::ControlGroup)).unwrap();
    let before = common::counters(&process, address);
    assert_eq!(stopped.leave_stopped().unwrap(), StopMethod::ControlGroup);
    assert!(group.is_frozen());
    expect_still(&process, address);
    assert_eq!(common::counters(&process, address), before, "it ran in between");
    let refused = process.stop_with(by(StopMethod::ControlGroup)).unwrap_err();
    assert!(refused.to_string().contains("frozen already"), "{refused}");
    group.set_frozen(false);
    expect_counting(&process, address, 20);
}

#[test]
fn groups_with_others_in_them_are_not_frozen() {
    const ME: &str = "groups_with_others_in_them_are_not_frozen";
    if let Some(case) = child::case() {
        crowd(case.parse().unwrap());
    }
    let (_target, process, address, group) = start_crowd(ME, 2);
    let Some(group) = group else { return };
    let other = common::start_alone_in(Some(&group), ME, "1");
    assert!(!other.hear().is_empty());
    let error = process.stop_with(by(StopMethod::ControlGroup)).unwrap_err();
    assert!(matches!(error, ProcessError::NoOwnGroup { .. }), "{error}");
    assert!(error.to_string().contains("1 other"), "{error}");
    assert!(!group.is_frozen());
    let stopped = process.stop().unwrap();
    assert_eq!(stopped.method(), StopMethod::Ptrace);
    expect_still(&process, address);
}
