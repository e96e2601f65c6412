//! Processes that end, start other programs, or cannot be stopped; and trackers that are killed.

mod common;

use std::{
    os::unix::process::CommandExt,
    thread,
    time::{Duration, Instant},
};

use common::{
    Group, Held as _, Target, again, count, count_slowly, counters_address, end_with_parent,
    expect_counting, expect_still, listen, tell,
};
use pageferry_process::{
    Detail, Missing, Pid, Process, ProcessError, StopMethod, StopOptions, UserfaultfdRequest,
};
use pageferry_testing::{Random, child, wait_for};
use pageferry_uffd::{Features, OpenWay};

fn by(method: StopMethod) -> StopOptions {
    StopOptions::default().method(method)
}

/// Everything there is to be done to a process.
fn do_all(process: &Process, method: StopMethod) -> Result<(), ProcessError> {
    // A busy machine is no reason to fail.
    let options = by(method).patience(Duration::from_secs(30));
    if method == StopMethod::Ptrace {
        process.check_syscalls()?;
    }
    let mut stopped = process.stop_with(options)?;
    let mappings = process.mappings(Detail::Names)?;
    let mut bytes = [0; 64];
    process.read_memory(mappings[0].range.start(), &mut bytes)?;
    if method == StopMethod::Ptrace {
        let request = UserfaultfdRequest::new(Features::empty()).ways(OpenWay::ALL);
        stopped.open_userfaultfd(&request)?;
    }
    stopped.resume()?;
    Ok(())
}

/// Whether it is said that the process has ended, and nothing else.
fn is_end(error: &ProcessError) -> bool {
    matches!(error, ProcessError::Ended { .. })
}

/// In a child: a busy thread and some that wait.
fn some_threads() {
    end_with_parent();
    count(0);
    (1..6).for_each(count_slowly);
}

#[test]
fn killed_at_any_step() {
    const ME: &str = "killed_at_any_step";
    if child::case().is_some() {
        some_threads();
        tell("running");
        listen();
        std::process::exit(0);
    }
    let mut random = Random::new(1);
    let mut ended = 0;
    for round in 0..60_u64 {
        let mut target = Target::start(ME, "run");
        assert_eq!(target.hear(), "running");
        let process = target.process();
        let killer = {
            let process = process.clone();
            let delay = Duration::from_micros(random.below(6_000));
            thread::spawn(move || {
                thread::sleep(delay);
                process.signal(pageferry_process::Signal::KILL).unwrap();
            })
        };
        let result = (0..50).try_for_each(|_| do_all(&process, StopMethod::Ptrace));
        killer.join().unwrap();
        if let Err(error) = result {
            assert!(is_end(&error), "round {round}: {error}");
            ended += 1;
        }
        // The parent is told as if nobody had traced it.
        assert_eq!(target.end(), -9, "round {round}");
    }
    assert!(ended > 30, "{ended} were killed in time");
}

#[test]
fn ends_at_any_step() {
    const ME: &str = "ends_at_any_step";
    if let Some(case) = child::case() {
        some_threads();
        tell("running");
        thread::sleep(Duration::from_micros(case.parse().unwrap()));
        std::process::exit(7);
    }
    let mut random = Random::new(2);
    for round in 0..60_u64 {
        let mut target = Target::start(ME, &random.below(6_000).to_string());
        assert_eq!(target.hear(), "running");
        let opened = Process::open(target.pid());
        let result = opened.and_then(|process| {
            loop {
                do_all(&process, StopMethod::Ptrace)?;
            }
        });
        let error: ProcessError = match result {
            Ok(never) => never,
            Err(error) => error,
        };
        assert!(is_end(&error), "round {round}: {error}");
        assert_eq!(target.end(), 7, "round {round}");
    }
}

#[test]
fn starts_another_program_at_any_step() {
    const ME: &str = "starts_another_program_at_any_step";
    const TIMES: u32 = 60;
    if let Some(case) = child::case() {
        let left: u32 = case.parse().unwrap();
        end_with_parent();
        (0..6).for_each(count_slowly);
        if left == TIMES {
            tell("running");
        }
        thread::sleep(Duration::from_millis(u64::from(left % 8) * 5));
        if left == 0 {
            tell("enough");
            listen();
            std::process::exit(0);
        }
        // By a thread that is not the first one, which has to wait for the ends of all others.
        let error = again(ME, &(left - 1).to_string()).exec();
        panic!("{error}");
    }
    let target = Target::start(ME, &TIMES.to_string());
    assert_eq!(target.hear(), "running");
    let (mut replaced, mut done) = (0, 0);
    let target_pid = target.pid();
    let begin = Instant::now();
    let ended = thread::spawn(move || {
        let line = target.hear();
        (target, line)
    });
    while !ended.is_finished() {
        assert!(begin.elapsed() < Duration::from_secs(120), "{replaced} {done}");
        let result =
            Process::open(target_pid).and_then(|process| do_all(&process, StopMethod::Ptrace));
        match result {
            Ok(()) => done += 1,
            Err(ProcessError::Replaced { .. }) => replaced += 1,
            // Between two programs, when nothing of the second is mapped yet.
            Err(ProcessError::NoInstruction { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let (target, line) = ended.join().unwrap();
    assert_eq!(line, "enough");
    println!("{done} times done, {replaced} times replaced");
    // On a slow machine it may never stay one program for as long as all that takes.
    assert!(done + replaced > 0);
    do_all(&target.process(), StopMethod::Ptrace).unwrap();
}

#[test]
fn another_program_is_noticed() {
    const ME: &str = "another_program_is_noticed";
    match child::case().as_deref() {
        Some("first") => {
            end_with_parent();
            tell("first");
            listen();
            panic!("{}", again(ME, "second").exec());
        }
        Some(_) => {
            end_with_parent();
            tell("second");
            listen();
            std::process::exit(0);
        }
        None => {}
    }
    let mut target = Target::start(ME, "first");
    assert_eq!(target.hear(), "first");
    let process = target.process();
    process.check().unwrap();
    target.say("go");
    assert_eq!(target.hear(), "second");
    let is_it = |error| matches!(error, ProcessError::Replaced { .. });
    assert!(is_it(process.check().unwrap_err()));
    assert!(is_it(process.stop().unwrap_err()));
    assert!(is_it(process.mappings(Detail::Names).unwrap_err()));
    let head = target.process().mappings(Detail::Names).unwrap()[0].range.start();
    assert!(is_it(process.read_memory(head, &mut [0; 8]).unwrap_err()));
    assert!(process.is_alive());
    target.process().read_memory_exact(head, &mut [0; 8]).unwrap();
}

/// In a child: does things to a process, until it is killed.
fn track(case: &str) -> ! {
    end_with_parent();
    let mut words = case.split(' ');
    let (what, pid) = (words.next().unwrap(), words.next().unwrap().parse().unwrap());
    let process = match Process::open(Pid::from_raw(pid).unwrap()) {
        Ok(process) => process,
        Err(error) => {
            tell(&format!("refused {error:?}"));
            std::process::exit(0);
        }
    };
    let method = if what == "freeze" { StopMethod::ControlGroup } else { StopMethod::Ptrace };
    if what == "attach" {
        tell("attaching");
        loop {
            do_all(&process, method).unwrap();
        }
    }
    let stopped = process.stop_with(by(method)).unwrap();
    tell("stopped");
    listen();
    drop(stopped);
    std::process::exit(0)
}

#[test]
fn it_goes_on_when_its_tracker_is_killed() {
    const ME: &str = "it_goes_on_when_its_tracker_is_killed";
    match child::case() {
        Some(case) if case == "run" => {
            common::alone();
            some_threads();
            tell(&counters_address().to_string());
            listen();
            std::process::exit(0);
        }
        Some(case) => track(&case),
        None => {}
    }
    let group = Group::new(ME);
    let target = common::start_alone_in(group.as_ref(), ME, "run");
    let address = target.hear().parse().unwrap();
    let process = target.process();
    for what in ["ptrace", "freeze"] {
        if what == "freeze" && group.is_none() {
            continue;
        }
        let mut tracker = Target::start(ME, &format!("{what} {}", target.pid()));
        assert_eq!(tracker.hear(), "stopped");
        expect_still(&process, address);
        tracker.kill();
        assert_eq!(tracker.end(), -9);
        expect_counting(&process, address, 6);
        assert_eq!(target.status("TracerPid"), "0");
    }
}

/// In a child: one thread whose sums come out wrong if a register does.
fn sum(way: &str) -> ! {
    common::alone();
    tell(&counters_address().to_string());
    let fresh = || {
        (0..2_000_u64).fold((0x9e37_79b9_u64, 0.5_f64), |(hash, sum), step| {
            (
                (hash ^ step).wrapping_mul(0x100_0000_01b3).rotate_left(9),
                sum * 1.000_1 + (hash % 1000) as f64,
            )
        })
    };
    let expected = fresh();
    loop {
        if fresh() != expected {
            tell("a sum is wrong");
            std::process::exit(1);
        }
        if way == "sleep" {
            let nap = rustix::time::Timespec { tv_sec: 0, tv_nsec: 200_000 };
            let slept = rustix::thread::nanosleep(&nap);
            if !matches!(slept, rustix::thread::NanosleepRelativeResult::Ok) {
                tell(&format!("a sleep: {slept:?}"));
                std::process::exit(1);
            }
        }
        common::COUNTERS[0].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// The tracker is killed at any moment, also while a system call is made in the name of the
/// process, by its only thread.
#[test]
fn it_goes_on_wherever_its_tracker_is_killed() {
    const ME: &str = "it_goes_on_wherever_its_tracker_is_killed";
    match child::case() {
        Some(case) if case.starts_with("attach ") => track(&case),
        Some(case) => sum(&case),
        None => {}
    }
    if !pageferry_testing::userfaultfd() {
        return;
    }
    let mut random = Random::new(3);
    for way in ["compute", "sleep"] {
        let target = Target::start_alone(ME, way);
        let address = target.hear().parse().unwrap();
        let process = target.process();
        for round in 0..40 {
            let mut tracker = Target::start(ME, &format!("attach {}", target.pid()));
            assert_eq!(tracker.hear(), "attaching");
            thread::sleep(Duration::from_micros(random.below(20_000)));
            tracker.kill();
            assert_eq!(tracker.end(), -9);
            assert!(process.is_alive(), "{way}: killed with its tracker in round {round}");
            expect_counting(&process, address, 1);
        }
    }
}

#[test]
fn it_has_one_tracer() {
    const ME: &str = "it_has_one_tracer";
    match child::case() {
        Some(case) if case == "run" => {
            some_threads();
            tell(&counters_address().to_string());
            listen();
            std::process::exit(0);
        }
        Some(case) => track(&case),
        None => {}
    }
    let target = Target::start(ME, "run");
    let address = target.hear().parse().unwrap();
    let process = target.process();
    let mut tracker = Target::start(ME, &format!("ptrace {}", target.pid()));
    assert_eq!(tracker.hear(), "stopped");
    for error in [
        process.stop_with(by(StopMethod::Ptrace)).unwrap_err(),
        process.check_syscalls().unwrap_err(),
    ] {
        let ProcessError::AlreadyTraced { tracer, .. } = error else { panic!("{error}") };
        // The thread that traces is one of the tracker's.
        let thread = format!("/proc/{}/task/{tracer}", tracker.pid());
        assert!(std::path::Path::new(&thread).exists(), "{error}");
    }
    expect_still(&process, address);
    tracker.say("enough");
    assert_eq!(tracker.end(), 0);
    expect_counting(&process, address, 6);
    do_all(&process, StopMethod::Ptrace).unwrap();
}

#[test]
fn what_permission_is_missing_is_said() {
    const ME: &str = "what_permission_is_missing_is_said";
    const NOBODY: u32 = 65_534;
    match child::case() {
        Some(case) if case == "run" => {
            some_threads();
            tell("running");
            listen();
            std::process::exit(0);
        }
        Some(case) => {
            // SAFETY: they take numbers only.
            let changed = unsafe {
                (libc::setresgid(NOBODY, NOBODY, NOBODY), libc::setresuid(NOBODY, NOBODY, NOBODY))
            };
            assert_eq!(changed, (0, 0));
            track(&case)
        }
        None => {}
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root, to become another user");
        return;
    }
    let target = Target::start(ME, "run");
    assert_eq!(target.hear(), "running");
    let tracker = Target::start(ME, &format!("other {}", target.pid()));
    let heard = tracker.hear();
    let missing = format!("{:?}", Missing::OtherUser { theirs: 0, ours: NOBODY });
    assert!(heard.starts_with("refused NotPermitted"), "{heard}");
    assert!(heard.contains(&missing), "{heard}");
}

#[test]
fn a_thread_that_does_not_stop_is_named() {
    const ME: &str = "a_thread_that_does_not_stop_is_named";
    if child::case().is_some() {
        some_threads();
        tell(&counters_address().to_string());
        // A thread that makes a child as vfork does waits in the kernel until that ends.
        thread::spawn(|| {
            // SAFETY: the structure consists of integers; the child has memory of its own, and does
            // nothing but wait and end, by system calls.
            unsafe {
                let mut arguments: libc::clone_args = std::mem::zeroed();
                arguments.flags = libc::CLONE_VFORK as u64;
                arguments.exit_signal = libc::SIGCHLD as u64;
                let size = size_of::<libc::clone_args>();
                if libc::syscall(libc::SYS_clone3, &raw const arguments, size) == 0 {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                    libc::_exit(0);
                }
            }
        });
        listen();
        std::process::exit(0);
    }
    let target = Target::start(ME, "run");
    let address = target.hear().parse().unwrap();
    let process = target.process();
    let in_kernel = || {
        process.threads().unwrap().into_iter().find(|thread| {
            let read = |file| {
                let path = format!("/proc/{}/task/{thread}/{file}", target.pid());
                std::fs::read_to_string(path).unwrap_or_default()
            };
            // Others may wait there for a moment, too, but they have no child.
            read("stat").contains(") D ") && !read("children").is_empty()
        })
    };
    wait_for("a thread in the kernel", || in_kernel().is_some());
    let culprit = in_kernel().unwrap();
    let patience = Duration::from_millis(300);
    let begin = Instant::now();
    let options = by(StopMethod::Ptrace).patience(patience);
    let error = process.stop_with(options).unwrap_err();
    assert!(begin.elapsed() >= patience);
    let ProcessError::Unstoppable { thread, state, waited, .. } = error else { panic!("{error}") };
    assert_eq!((thread, state, waited), (culprit, 'D', patience));
    assert!(error.to_string().contains("vfork"), "{error}");
    // All has been undone.
    expect_counting(&process, address, 6);
    assert_eq!(target.status("TracerPid"), "0");
    let traced = common::status_line(&format!("/proc/{culprit}/status"), "TracerPid");
    assert_eq!(traced, "0");
    // The child of the thread that waits, which nobody else would end.
    let children = format!("/proc/{}/task/{culprit}/children", target.pid());
    let children = std::fs::read_to_string(children).unwrap();
    for pid in children.split_whitespace() {
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, pageferry_process::Signal::KILL).unwrap();
    }
    wait_for("the thread to come back", || in_kernel().is_none());
    drop(process.stop_with(by(StopMethod::Ptrace)).unwrap());
    expect_counting(&process, address, 6);
}

#[test]
fn the_first_thread_may_have_ended() {
    const ME: &str = "the_first_thread_may_have_ended";
    if child::case().is_some() {
        common::alone();
        some_threads();
        tell(&counters_address().to_string());
        // SAFETY: it ends this thread, and nothing of it is used any more.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let target = Target::start_alone(ME, "run");
    let address = target.hear().parse().unwrap();
    wait_for("the first thread to end", || target.state() == 'Z');
    let process = target.process();
    assert!(process.is_alive());
    expect_counting(&process, address, 6);
    assert!(!process.mappings(Detail::Full).unwrap().is_empty());
    for _ in 0..5 {
        do_all(&process, StopMethod::Ptrace).unwrap();
    }
    let mut stopped = process.stop_with(by(StopMethod::Ptrace)).unwrap();
    expect_still(&process, address);
    let pid = stopped.syscall(libc::SYS_getpid.cast_unsigned(), [0; 6]).unwrap();
    assert_eq!(pid, u64::from(target.pid().as_raw_pid().unsigned_abs()));
    drop(stopped);
    expect_counting(&process, address, 6);
}
