//! A userfaultfd of another process's memory.

mod common;

use std::{
    alloc::{Layout, alloc_zeroed},
    collections::BTreeMap,
    thread,
    time::Duration,
};

use common::{Held as _, Target, end_with_parent, listen, tell};
use pageferry_process::{
    Pid, Process, ProcessError, StopMethod, StopOptions, Stopped, UserfaultfdRequest,
};
use pageferry_testing::{child, wait_for};
use pageferry_uffd::{
    Attempt, Errno, Event, EventBuffer, Fault, FaultKind, Features, HostAddress, HostRange,
    Obstacle, OpenWay, Outcome, RegisterMode, Userfaultfd, Wake,
};

const PAGE: u64 = 4096;
const PAGES: u64 = 16;

fn stop(process: &Process) -> Stopped<'_> {
    process.stop_with(StopOptions::default().method(StopMethod::Ptrace)).unwrap()
}

/// In a child: sums that come out wrong when a register does, of integers and of vectors.
fn compute(wrong: &'static str) {
    fn sums() -> (u64, [f64; 8]) {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut sums = [0.1_f64; 8];
        for step in 0..20_000_u64 {
            hash = (hash ^ step).wrapping_mul(0x100_0000_01b3).rotate_left(7);
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = *sum * 1.000_01 + (step as f64) / (lane as f64 + 1.0);
            }
        }
        (hash, sums)
    }
    let expected = sums();
    thread::spawn(move || {
        loop {
            if sums() != expected {
                tell(wrong);
                std::process::exit(1);
            }
        }
    });
}

/// In a child: computes, waits in several ways, and writes where it is told to.
fn work() -> ! {
    end_with_parent();
    compute("a sum is wrong");
    compute("another sum is wrong");
    thread::spawn(thread::park);
    thread::spawn(|| thread::sleep(Duration::from_secs(600)));
    let layout = Layout::from_size_align((PAGE * PAGES) as usize, PAGE as usize).unwrap();
    // SAFETY: the size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    for page in 0..PAGES {
        // SAFETY: the page is within the memory, of which there is no reference.
        unsafe { memory.add((page * PAGE) as usize).write_volatile(1) };
    }
    tell(&(memory.addr()).to_string());
    loop {
        let line = listen();
        if line == "end" {
            std::process::exit(0);
        }
        let page: usize = line.parse().unwrap();
        // SAFETY: as above.
        unsafe { memory.add(page * PAGE as usize).write_volatile(2) };
        tell(&format!("wrote {page}"));
    }
}

/// All that can be seen of a stopped process from outside.
fn look(pid: Pid) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    seen.insert("maps".to_owned(), read(&format!("/proc/{pid}/maps")));
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let link = std::fs::read_link(&path).unwrap();
        seen.insert(path.display().to_string(), link.display().to_string());
    }
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = entry.unwrap().path().display().to_string();
        // The system call, its arguments, the stack pointer and the instruction pointer.
        seen.insert(format!("{task} registers"), read(&format!("{task}/syscall")));
        for key in ["SigPnd", "SigBlk", "SigIgn", "SigCgt", "TracerPid"] {
            let line = common::status_line(&format!("{task}/status"), key);
            seen.insert(format!("{task} {key}"), line);
        }
    }
    seen
}

#[test]
fn nothing_is_left_in_the_process() {
    const ME: &str = "nothing_is_left_in_the_process";
    if child::case().is_some() {
        work();
    }
    if !pageferry_testing::userfaultfd() {
        return;
    }
    let mut target = Target::start(ME, "work");
    let _address = target.hear();
    let process = target.process();
    process.check_syscalls().unwrap();
    for way in OpenWay::ALL {
        for round in 0..20 {
            let mut stopped = stop(&process);
            let before = look(target.pid());
            let request = UserfaultfdRequest::new(Features::empty()).ways([way]);
            // Every second time with a feature that no kernel has, for which it takes another.
            let request = if round % 2 == 0 {
                request
            } else {
                request.optional(Features::from_bits_retain(1 << 62) | Features::THREAD_ID)
            };
            let uffd = match stopped.open_userfaultfd(&request) {
                Ok(uffd) => uffd,
                Err(ProcessError::NoUserfaultfd { attempts, .. }) => {
                    println!("skipped: needs {way}: {}", attempts[0]);
                    break;
                }
                Err(error) => panic!("{way}: {error}"),
            };
            assert_eq!(uffd.negotiated().opened_by, way);
            assert_eq!(uffd.negotiated().enabled.contains(Features::THREAD_ID), round % 2 != 0);
            assert_eq!(look(target.pid()), before, "{way}");
            stopped.resume().unwrap();
        }
    }
    // Computing goes on, and comes to the same.
    thread::sleep(Duration::from_millis(100));
    target.say("3");
    assert_eq!(target.hear(), "wrote 3");
    assert_eq!(target.status("TracerPid"), "0");
    target.say("end");
    assert_eq!(target.end(), 0);
}

#[test]
fn what_stands_in_the_way_is_said() {
    const ME: &str = "what_stands_in_the_way_is_said";
    if child::case().is_some() {
        work();
    }
    if !pageferry_testing::userfaultfd() {
        return;
    }
    let target = Target::start(ME, "work");
    let _address = target.hear();
    let process = target.process();
    let mut stopped = stop(&process);
    let before = look(target.pid());

    let unknown = Features::from_bits_retain(1 << 62);
    let request = UserfaultfdRequest::new(unknown);
    let error = stopped.open_userfaultfd(&request).unwrap_err();
    let ProcessError::NoUserfaultfd { attempts, .. } = &error else { panic!("{error}") };
    assert!(!attempts.is_empty());
    for Attempt { obstacle, .. } in attempts {
        assert!(matches!(obstacle, Obstacle::Lacks(lacking) if *lacking == unknown), "{error}");
    }
    assert_eq!(look(target.pid()), before);

    // No descriptor is left.
    let is_open =
        |number| std::fs::symlink_metadata(format!("/proc/{}/fd/{number}", target.pid())).is_ok();
    let free = (0..).find(|&number: &u64| !is_open(number)).unwrap();
    let mut limits = rustix::process::prlimit(
        Some(target.pid()),
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(free), maximum: Some(1 << 10) },
    )
    .unwrap();
    let request = UserfaultfdRequest::new(Features::empty()).ways([OpenWay::Syscall]);
    let error = stopped.open_userfaultfd(&request).unwrap_err();
    assert!(matches!(error, ProcessError::Kernel { errno: Errno::MFILE, .. }), "{error}");
    let request = request.ways([OpenWay::DeviceNode]);
    if std::path::Path::new("/dev/userfaultfd").exists() {
        let error = stopped.open_userfaultfd(&request).unwrap_err();
        assert!(matches!(error, ProcessError::Kernel { errno: Errno::MFILE, .. }), "{error}");
    }
    assert_eq!(look(target.pid()), before);
    limits.maximum = Some(1 << 10);
    limits.current = Some(1 << 10);
    rustix::process::prlimit(Some(target.pid()), rustix::process::Resource::Nofile, limits)
        .unwrap();
    let request = UserfaultfdRequest::new(Features::empty()).ways(OpenWay::ALL);
    stopped.open_userfaultfd(&request).unwrap();
}

/// A userfaultfd of the memory of a child at `work`, all of it write-protected.
fn protect(process: &Process, address: u64) -> Userfaultfd {
    let range = HostRange::new(HostAddress::new(address), PAGE * PAGES);
    let request = UserfaultfdRequest::new(Features::PAGEFAULT_FLAG_WP).ways(OpenWay::ALL);
    let mut stopped = stop(process);
    let uffd = stopped.open_userfaultfd(&request).unwrap();
    // SAFETY: the range is memory of the other process, with nothing in it that is absent.
    unsafe { uffd.register_raw(range, RegisterMode::WP) }.unwrap();
    let done = uffd.write_protect(range, true, Wake::No).unwrap();
    assert!(matches!(done, Outcome::Installed { .. }), "{done:?}");
    uffd
}

/// Waits until the child waits for somebody who lets it write to a page.
fn fault(uffd: &Userfaultfd, address: u64, page: u64) -> Fault {
    let mut events = EventBuffer::new(4);
    wait_for("a write", || uffd.read_events(&mut events).unwrap() > 0);
    let event = events.drain().next().unwrap().unwrap();
    let Event::Fault(fault) = event else { panic!("{event:?}") };
    assert_eq!(fault.kind, FaultKind::WriteProtect);
    assert_eq!(fault.address.align_down(PAGE).get(), address + page * PAGE);
    fault
}

#[test]
fn writes_of_another_process_are_seen() {
    const ME: &str = "writes_of_another_process_are_seen";
    if let Some(case) = child::case() {
        if case == "work" {
            work();
        }
        track_until_killed(&case);
    }
    if !pageferry_testing::features(Features::PAGEFAULT_FLAG_WP) {
        return;
    }
    let mut target = Target::start(ME, "work");
    let address = target.hear().parse().unwrap();
    let process = target.process();

    let uffd = protect(&process, address);
    target.say("3");
    fault(&uffd, address, 3);
    let page = HostRange::new(HostAddress::new(address + 3 * PAGE), PAGE);
    let done = uffd.write_protect(page, false, Wake::Yes).unwrap();
    assert!(matches!(done, Outcome::Installed { .. }), "{done:?}");
    assert_eq!(target.hear(), "wrote 3");

    // Who waits goes on when the descriptor is closed, and nothing is protected any more.
    target.say("4");
    fault(&uffd, address, 4);
    drop(uffd);
    assert_eq!(target.hear(), "wrote 4");
    target.say("5");
    assert_eq!(target.hear(), "wrote 5");

    // And the same when the tracker is killed.
    let mut tracker = Target::start(ME, &format!("{} {address}", target.pid()));
    assert_eq!(tracker.hear(), "tracking");
    target.say("6");
    wait_for("the tracker to have seen it", || tracker.hear() == "a write");
    tracker.kill();
    assert_eq!(target.hear(), "wrote 6");
    target.say("7");
    assert_eq!(target.hear(), "wrote 7");
    target.say("end");
    assert_eq!(target.end(), 0);
}

/// In a child: tracks the writes of another process, and never lets one go on.
fn track_until_killed(case: &str) -> ! {
    end_with_parent();
    let (pid, address) = case.split_once(' ').unwrap();
    let (pid, address) = (Pid::from_raw(pid.parse().unwrap()).unwrap(), address.parse().unwrap());
    let process = Process::open(pid).unwrap();
    let uffd = protect(&process, address);
    tell("tracking");
    fault(&uffd, address, 6);
    tell("a write");
    listen();
    unreachable!("it is killed before")
}
