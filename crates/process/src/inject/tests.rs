//! What is restored is compared byte by byte, by the means that restored it.

use std::process::{Command, Stdio};

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
    // One that waits in a system call, with no input; and one that computes.
    for (program, arguments) in [("cat", &[][..]), ("sh", &["-c", "while :; do :; done"])] {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = Process::open(Pid::from_child(&child)).unwrap();
        let mut ways = Vec::new();
        for round in 0..20 {
            let options =
                StopOptions::default().method(StopMethod::Ptrace).patience(Duration::from_secs(30));
            let mut stopped = process.stop_with(options).unwrap();
            // It may be starting still, with libraries to come.
            let Ok(landing) = process.landing() else { continue };
            ways.push(landing.way_back().is_some());
            let equal = stopped.session(move |session| {
                let before = everything(session);
                let number = libc::SYS_getppid.cast_unsigned();
                assert_eq!(
                    session.syscall(number, [round; 6]).unwrap(),
                    Ok(u64::from(std::process::id()))
                );
                let after = everything(session);
                assert_eq!(before.registers, after.registers);
                before == after
            });
            assert!(equal.unwrap(), "{program}, {round}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!ways.is_empty(), "{program}");
        println!("{program}: {ways:?}");
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
