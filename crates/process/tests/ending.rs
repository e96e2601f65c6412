//! A process that ends is never taken for one that goes on, or for another one.

mod common;

use common::{Held as _, Target, count_slowly, end_with_parent, listen, tell};
use pageferry_process::{
    Detail, Process, ProcessError, Signal, StopMethod, StopOptions, UserfaultfdRequest,
};
use pageferry_testing::{child, wait_for};
use pageferry_uffd::{Features, HostAddress, OpenWay};
use rustix::fs::{FallocateFlags, MemfdFlags};

/// What can be asked of a process.
type Step = (&'static str, fn(&Process) -> Result<(), ProcessError>);

fn by_ptrace() -> StopOptions {
    StopOptions::default().method(StopMethod::Ptrace)
}

const STEPS: [Step; 9] = [
    ("look after it", Process::check),
    ("open it", |process| Process::open(process.pid()).map(drop)),
    ("list its threads", |process| process.threads().map(drop)),
    ("list its mappings", |process| process.mappings(Detail::Names).map(drop)),
    ("list its mappings with details", |process| process.mappings(Detail::Full).map(drop)),
    ("read its memory", |process| {
        match process.read_memory(HostAddress::new(1 << 20), &mut [0; 8]) {
            // Nothing is mapped there.
            Err(ProcessError::Unreadable { .. }) => Ok(()),
            other => other.map(drop),
        }
    }),
    ("find out whether it can be traced", Process::check_syscalls),
    ("stop it", |process| process.stop_with(by_ptrace()).map(drop)),
    ("attach to it", |process| {
        let mut stopped = process.stop_with(by_ptrace())?;
        let request = UserfaultfdRequest::new(Features::empty()).ways(OpenWay::ALL);
        match stopped.open_userfaultfd(&request) {
            Err(ProcessError::NoUserfaultfd { .. }) => Ok(()),
            other => other.map(drop),
        }
    }),
];

/// In a child: has a file of which the kernel frees many pages when the process ends: after it has
/// given up its memory, and before it counts as ended.
fn end_slowly() -> ! {
    const BYTES: u64 = 64 << 20;
    end_with_parent();
    (0..4).for_each(count_slowly);
    let file = rustix::fs::memfd_create("many pages", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, BYTES).unwrap();
    tell("running");
    listen();
    std::process::exit(0)
}

#[test]
fn it_is_gone_and_nothing_else() {
    const ME: &str = "it_is_gone_and_nothing_else";
    if child::case().is_some() {
        end_slowly();
    }
    for (name, step) in STEPS {
        for killed in [true, false, true, false] {
            let mut target = Target::start(ME, "run");
            assert_eq!(target.hear(), "running");
            let process = target.process();
            step(&process).unwrap();
            if killed {
                process.signal(Signal::KILL).unwrap();
            } else {
                target.say("end");
            }
            let mut error = None;
            wait_for("the process to be gone", || {
                error = step(&process).err();
                error.is_some()
            });
            let error = error.unwrap();
            assert!(matches!(error, ProcessError::Ended { .. }), "{name}: {error}");
            assert!(error.to_string().contains(&format!("process {}", target.pid())), "{error}");
            // It stays so, and is not waited for until then.
            let error = step(&process).unwrap_err();
            assert!(matches!(error, ProcessError::Ended { .. }), "{name}: {error}");
            assert_eq!(target.end(), if killed { -9 } else { 0 }, "{name}");
            let error = step(&process).unwrap_err();
            assert!(error.is_gone() && !is_replaced(&error), "{name}: {error}");
        }
    }
}

fn is_replaced(error: &ProcessError) -> bool {
    matches!(error, ProcessError::Replaced { .. })
}
