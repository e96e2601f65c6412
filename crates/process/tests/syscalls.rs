//! System calls in the name of another process.

mod common;

use std::{
    io::Read,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use common::{Group, Held as _, Target, listen, tell};
use pageferry_process::{
    Pid, Process, ProcessError, Seccomp, Signal, StopMethod, StopOptions, Stopped,
};
use pageferry_testing::{child, wait_for};
use pageferry_uffd::{Errno, HostAddress};
use rustix::{
    event::{PollFd, PollFlags, epoll, poll},
    time::Timespec,
};

fn by_ptrace() -> StopOptions {
    StopOptions::default().method(StopMethod::Ptrace)
}

#[track_caller]
fn call(stopped: &mut Stopped<'_>, number: libc::c_long, arguments: [u64; 6]) -> u64 {
    stopped.syscall(number.cast_unsigned(), arguments).unwrap()
}

/// In a child: the test is run by the first thread, which waits in one way; says how that ended.
fn wait_in_one_way(way: &str) -> ! {
    common::alone();
    let half_a_second = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
    let begin = Instant::now();
    let stdin = std::io::stdin();
    let input = || PollFd::new(&stdin, PollFlags::IN);
    tell("waiting");
    let end = match way {
        "read" => format!("{:?}", stdin.lock().read(&mut [0; 8])),
        "poll for ever" => format!("{:?}", poll(&mut [input()], None)),
        "poll in vain" => format!("{:?}", poll(&mut [input()], Some(&half_a_second))),
        "epoll" => {
            let all = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            let data = epoll::EventData::new_u64(0);
            epoll::add(&all, &stdin, data, epoll::EventFlags::IN).unwrap();
            let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data }; 1];
            format!("{:?}", epoll::wait(&all, &mut events, None))
        }
        "sleep" => match rustix::thread::nanosleep(&half_a_second) {
            rustix::thread::NanosleepRelativeResult::Ok => "Ok(0)".to_owned(),
            other => format!("{other:?}"),
        },
        "park" => {
            std::thread::park_timeout(Duration::from_millis(500));
            "Ok(0)".to_owned()
        }
        "nothing" => {
            while begin.elapsed() < Duration::from_millis(500) {
                std::hint::spin_loop();
            }
            "Ok(0)".to_owned()
        }
        other => panic!("{other}"),
    };
    tell(&format!("{end} {}", begin.elapsed() >= Duration::from_millis(500)));
    std::process::exit(0)
}

#[test]
fn the_thread_goes_on_where_it_was() {
    const ME: &str = "the_thread_goes_on_where_it_was";
    if let Some(case) = child::case() {
        wait_in_one_way(&case);
    }
    for (way, by_input) in [
        ("read", true),
        ("poll for ever", true),
        ("epoll", true),
        ("poll in vain", false),
        ("sleep", false),
        ("park", false),
        ("nothing", false),
    ] {
        let mut target = Target::start_alone(ME, way);
        assert_eq!(target.hear(), "waiting");
        let process = target.process();
        process.check_syscalls().unwrap();
        for round in 0..10 {
            let mut stopped = match process.stop_with(by_ptrace()) {
                // Where the machine is busy half a second is soon over.
                Err(ProcessError::Ended { .. }) if round > 0 && !by_input => break,
                stopped => stopped.unwrap(),
            };
            for _ in 0..5 {
                let pid = call(&mut stopped, libc::SYS_getpid, [0; 6]);
                assert_eq!(pid, u64::from(target.pid().as_raw_pid().unsigned_abs()), "{way}");
            }
            stopped.resume().unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        if by_input {
            assert!(process.is_alive(), "{way}: {}", target.hear());
            target.say("1234567");
            // However early that was.
            let heard = target.hear();
            assert!(heard.starts_with("Ok("), "{way}: {heard}");
        } else {
            assert_eq!(target.hear(), "Ok(0) true", "{way}");
        }
        assert_eq!(target.end(), 0, "{way}");
    }
}

#[test]
fn arguments_and_answers() {
    const ME: &str = "arguments_and_answers";
    if child::case().is_some() {
        wait_in_one_way("read");
    }
    let target = Target::start_alone(ME, "read");
    assert_eq!(target.hear(), "waiting");
    let process = target.process();
    let maps = || std::fs::read(format!("/proc/{}/maps", target.pid())).unwrap();
    let mut stopped = process.stop_with(by_ptrace()).unwrap();
    let before = maps();

    let (length, both, private) = (8192, 3, 0x22);
    let map = [0, length, both, private, u64::MAX, 0];
    let at = call(&mut stopped, libc::SYS_mmap, map);
    assert_ne!(maps(), before);
    let mut bytes = [1; 8192];
    process.read_memory_exact(HostAddress::new(at), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8192]);
    // Six arguments: one page of it is mapped again elsewhere.
    let pages = [at, 4096, 4096, 3, at + 4096, 0];
    assert_eq!(call(&mut stopped, libc::SYS_mremap, pages), at + 4096);
    assert_eq!(call(&mut stopped, libc::SYS_munmap, [at, length, 0, 0, 0, 0]), 0);
    assert_eq!(maps(), before);

    let number = libc::SYS_close.cast_unsigned();
    let error = stopped.syscall(number, [u64::MAX, 0, 0, 0, 0, 0]).unwrap_err();
    assert!(matches!(error, ProcessError::Syscall { errno: Errno::BADF, .. }), "{error}");
    let error = stopped.syscall(100_000, [0; 6]).unwrap_err();
    assert!(matches!(error, ProcessError::Syscall { errno: Errno::NOSYS, .. }), "{error}");

    // One that waits is given up.
    let pause = libc::SYS_pause.cast_unsigned();
    let error = stopped.syscall(pause, [0; 6]).unwrap_err();
    assert!(matches!(error, ProcessError::Unstoppable { state: 'S', .. }), "{error}");
    let pid = call(&mut stopped, libc::SYS_getpid, [0; 6]);
    assert_eq!(pid, u64::from(target.pid().as_raw_pid().unsigned_abs()));
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// In a child: counts a real-time signal, of which every one is delivered.
fn count_signals() {
    // SAFETY: the structure consists of integers, and the handler only adds to a number.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()), 0);
    }
}

fn send_one(process: &Process) {
    let value = libc::sigval { sival_ptr: std::ptr::null_mut() };
    // SAFETY: it takes numbers only.
    let sent = unsafe { libc::sigqueue(process.pid().as_raw_pid(), libc::SIGRTMIN(), value) };
    assert_eq!(sent, 0);
}

#[test]
fn no_signal_is_lost() {
    const ME: &str = "no_signal_is_lost";
    if let Some(case) = child::case() {
        common::alone();
        count_signals();
        for _ in 1..case.parse().unwrap() {
            std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            });
        }
        tell("counting");
        // A read that fails with EINTR is not passed over here.
        let mut line = [0; 16];
        let read = std::io::stdin().lock().read(&mut line);
        tell(&format!("{} {:?}", SIGNALS.load(Ordering::Relaxed), read.map(|_| ())));
        std::process::exit(0);
    }
    for threads in [1, 5] {
        let mut target = Target::start_alone(ME, &threads.to_string());
        assert_eq!(target.hear(), "counting");
        let process = target.process();
        let mut sent = 0;
        for round in 0..30 {
            let mut stopped = process.stop_with(by_ptrace()).unwrap();
            for _ in 0..3 {
                send_one(&process);
                sent += 1;
                if round % 2 == 0 {
                    call(&mut stopped, libc::SYS_getpid, [0; 6]);
                }
            }
            drop(stopped);
            send_one(&process);
            sent += 1;
        }
        // Those sent last may not have been taken yet.
        let pending = || target.status("SigPnd") + &target.status("ShdPnd");
        wait_for("signals to be taken", || pending().bytes().all(|digit| digit == b'0'));
        target.say("enough");
        assert_eq!(target.hear(), format!("{sent} Ok(())"), "{threads} threads");
    }
}

#[test]
fn a_process_stopped_by_job_control_stays_so() {
    const ME: &str = "a_process_stopped_by_job_control_stays_so";
    if child::case().is_some() {
        wait_in_one_way("read");
    }
    let mut target = Target::start_alone(ME, "read");
    assert_eq!(target.hear(), "waiting");
    let process = target.process();
    process.signal(Signal::STOP).unwrap();
    wait_for("it to be stopped", || target.state() == 'T');
    for _ in 0..5 {
        let mut stopped = process.stop_with(by_ptrace()).unwrap();
        call(&mut stopped, libc::SYS_getpid, [0; 6]);
        // Once more meanwhile.
        process.signal(Signal::STOP).unwrap();
        call(&mut stopped, libc::SYS_getpid, [0; 6]);
        drop(stopped);
        wait_for("it to be stopped again", || target.state() == 'T');
    }
    target.say("1234567");
    process.signal(Signal::CONT).unwrap();
    assert!(target.hear().starts_with("Ok("));
}

#[test]
fn frozen_processes_make_none() {
    const ME: &str = "frozen_processes_make_none";
    if child::case().is_some() {
        wait_in_one_way("read");
    }
    let Some(group) = Group::new(ME) else { return };
    let mut target = common::start_alone_in(Some(&group), ME, "read");
    assert_eq!(target.hear(), "waiting");
    let process = target.process();
    let getpid = libc::SYS_getpid.cast_unsigned();

    let mut stopped = process.stop().unwrap();
    assert_eq!(stopped.method(), StopMethod::ControlGroup);
    let error = stopped.syscall(getpid, [0; 6]).unwrap_err();
    assert!(matches!(error, ProcessError::Frozen { .. }), "{error}");
    drop(stopped);

    // By somebody else.
    group.set_frozen(true);
    wait_for("it to be frozen", || group.is_frozen());
    let mut stopped = process.stop().unwrap();
    assert_eq!(stopped.method(), StopMethod::Ptrace);
    let error = stopped.syscall(getpid, [0; 6]).unwrap_err();
    assert!(matches!(error, ProcessError::Frozen { .. }), "{error}");
    group.set_frozen(false);
    call(&mut stopped, libc::SYS_getpid, [0; 6]);
    drop(stopped);
    target.say("1234567");
    assert!(target.hear().starts_with("Ok("));
}

/// In a child: gives up all system calls but few.
fn confine(how: &str) {
    // The strictest mode ends by any other call, so also by waiting for a lock.
    let mut instruction = libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    };
    let program = libc::sock_fprog { len: 1, filter: &raw mut instruction };
    // SAFETY: the program is one instruction, which lives until the calls return.
    unsafe {
        match how {
            "strict" => {
                tell("confined");
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
                loop {
                    let mut byte = 0_u8;
                    libc::syscall(libc::SYS_read, 0, &raw mut byte, 1);
                }
            }
            "filter" => {
                assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
                let filter = libc::SECCOMP_MODE_FILTER;
                assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, filter, &raw const program), 0);
                tell("confined");
                listen();
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn confined_processes_make_none() {
    const ME: &str = "confined_processes_make_none";
    if let Some(case) = child::case() {
        common::alone();
        confine(&case);
        std::process::exit(0);
    }
    for (case, by, mode) in [("strict", Seccomp::Strict, "1"), ("filter", Seccomp::Filter, "2")] {
        let target = Target::start_alone(ME, case);
        assert_eq!(target.hear(), "confined");
        wait_for("it to be confined", || target.status("Seccomp") == mode);
        let process = target.process();
        let is_it = |error: &ProcessError| match error {
            ProcessError::Confined { by: found, .. } => *found == by,
            _ => false,
        };
        let error = process.check_syscalls().unwrap_err();
        assert!(is_it(&error), "{error}");
        expect_said(&error, target.pid(), &["confined by seccomp", &by.to_string(), "may kill it"]);
        // It can be stopped, and read.
        let mut stopped = process.stop_with(by_ptrace()).unwrap();
        let error = stopped.syscall(libc::SYS_getpid.cast_unsigned(), [0; 6]).unwrap_err();
        assert!(is_it(&error), "{error}");
        drop(stopped);
        wait_for("it to wait again", || target.state() == 'S');
    }
}

/// Sees that an error says of which process it is, these things, and what to do.
#[track_caller]
fn expect_said(error: &ProcessError, pid: Pid, said: &[&str]) {
    let text = error.to_string();
    assert!(text.starts_with(&format!("process {pid} is ")), "{text}");
    for part in [said, &["use what takes none", "soft-dirty"]].concat() {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// A 32-bit program, which waits for ever: `mov $29, %eax; int $0x80; jmp` (pause).
fn program_of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEAD: u32 = 52 + 32;
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let mut file = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    // An executable (2) for the 386 (3).
    half(&mut file, 2);
    half(&mut file, 3);
    for value in [1, BASE + HEAD, 52, 0, 0] {
        word(&mut file, value);
    }
    for value in [52, 32, 1, 0, 0, 0] {
        half(&mut file, value);
    }
    let length = HEAD + code.len() as u32;
    // One segment to load (1), to be read and executed (5).
    for value in [1, 0, BASE, BASE, length, length, 5, 0x1000] {
        word(&mut file, value);
    }
    file.extend(code);
    file
}

#[test]
fn programs_of_32_bits_make_none() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    std::fs::write(&path, program_of_32_bits()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    let spawned = std::process::Command::new(&path).spawn();
    let mut program = match spawned {
        Ok(program) => program,
        Err(error) => {
            println!("skipped: needs a kernel that runs 32-bit programs: {error}");
            return;
        }
    };
    let pid = Pid::from_child(&program);
    wait_for("it to wait", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains("(program) S")
    });
    let process = Process::open(pid).unwrap();
    let error = process.check_syscalls().unwrap_err();
    assert!(matches!(error, ProcessError::Bits32 { .. }), "{error}");
    expect_said(&error, pid, &["32-bit program", "64-bit ones only"]);
    let mut stopped = process.stop_with(by_ptrace()).unwrap();
    let error = stopped.syscall(libc::SYS_getpid.cast_unsigned(), [0; 6]).unwrap_err();
    assert!(matches!(error, ProcessError::Bits32 { .. }), "{error}");
    let mut head = [0; 5];
    process.read_memory_exact(HostAddress::new(0x0804_8000), &mut head).unwrap();
    assert_eq!(head, *b"\x7fELF\x01");
    drop(stopped);
    assert!(process.is_alive());
    program.kill().unwrap();
    program.wait().unwrap();
}
