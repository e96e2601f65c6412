//! What is restored is compared byte by byte, by the means that restored it.

use pageferry_testing::{
    child,
    target::{self, Target},
};

use super::*;
use crate::{Process, StopMethod, StopOptions};

/// Everything of a thread that a system call in its name could change.
#[derive(PartialEq, Debug)]
struct Everything {
    registers: [u64; 27],
    extended: Vec<u8>,
    mask: u64,
    sequence: Option<u64>,
    below_the_stack: Vec<u8>,
}

fn everything(session: &Session) -> Everything {
    let thread = session.a_thread().unwrap();
    let r = ptrace::registers(thread).unwrap().unwrap();
    let mut below_the_stack = vec![0; 16 << 10];
    let from = HostAddress::new(r.rsp - below_the_stack.len() as u64);
    session.process().read_memory_exact(from, &mut below_the_stack).unwrap();
    Everything {
        registers: [
            r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx,
            r.rdx, r.rsi, r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base,
            r.gs_base, r.ds, r.es, r.fs, r.gs,
        ],
        extended: ptrace::extended_state(thread).unwrap(),
        mask: ptrace::signal_mask(thread).unwrap(),
        sequence: ptrace::rseq_area(thread).unwrap(),
        below_the_stack,
    }
}

#[test]
fn every_byte_is_restored() {
    const ME: &str = "inject::tests::every_byte_is_restored";
    if let Some(case) = child::case() {
        target::alone();
        target::tell("here");
        if case == "computes" {
            loop {
                std::hint::spin_loop();
            }
        }
        target::listen();
        std::process::exit(0);
    }
    for case in ["waits in a system call", "computes"] {
        let target = Target::start_alone(ME, case);
        assert_eq!(target.hear(), "here");
        let pid = target.pid();
        let process = Process::open(pid).unwrap();
        let mut ways = Vec::new();
        for round in 0..20 {
            let options =
                StopOptions::default().method(StopMethod::Ptrace).patience(Duration::from_secs(30));
            let mut stopped = process.stop_with(options).unwrap();
            let landing = process.landing().unwrap();
            ways.push(landing.way_back().is_some());
            let equal = stopped.session(move |session| {
                let before = everything(session);
                let number = libc::SYS_getpid.cast_unsigned();
                assert_eq!(
                    session.syscall(number, [round; 6]).unwrap(),
                    Ok(u64::from(pid.as_raw_pid().cast_unsigned()))
                );
                let after = everything(session);
                assert_eq!(before.registers, after.registers);
                before == after
            });
            assert!(equal.unwrap(), "{case}, {round}");
        }
        println!("{case}: {ways:?}");
    }
}

#[test]
fn answers_are_errors_or_not() {
    for (answer, expected) in [
        (0, Ok(0)),
        (7, Ok(7)),
        (-1, Err(Errno::PERM)),
        (-4095, Err(Errno::from_raw_os_error(4095))),
        (-4096, Ok(-4096_i64 as u64)),
        (-512, Err(Errno::INTR)),
        (-516, Err(Errno::INTR)),
        (i64::MIN, Ok(1 << 63)),
    ] {
        assert_eq!(result(answer), expected, "{answer}");
    }
}
