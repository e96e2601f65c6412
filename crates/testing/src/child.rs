//! Tests in which a thread is to die of a signal: the test binary runs itself again for one case,
//! and looks how that ended.
//!
//! A test begins with `if let Some(case) = child::case()`: there it does, in the child, what is
//! tested. The rest of it, in the parent, calls [`expect`] for every case.

use std::{
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::PATIENCE;

/// The variable that tells a child its case.
pub(crate) const CASE: &str = "PAGEFERRY_TEST_CASE";
/// What the child prints when it has come to the step that is tested.
const REACHED: &str = "reached the step under test";

/// How a child says that it saw memory that it should not have seen.
pub const SAW_MEMORY: i32 = 42;
/// How a child says that nothing happened for long.
pub const STUCK: i32 = 43;

/// How a child ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// It was killed by the signal with this number.
    Signal(i32),
    /// It exited with this status.
    Exit(i32),
}

/// A memory error.
pub const SIGBUS: End = End::Signal(Signal::BUS.as_raw());
/// An access to what is not mapped.
pub const SIGSEGV: End = End::Signal(Signal::SEGV.as_raw());

/// In a child: the case to run.
pub fn case() -> Option<String> {
    std::env::var(CASE).ok()
}

/// In a child: it is about to do what is tested. Ends before this do not count.
pub fn reached() {
    let mut out = std::io::stdout();
    writeln!(out, "{REACHED}").unwrap();
    out.flush().unwrap();
}

/// In a child: ends it after a while as [`STUCK`], whatever its threads wait for.
pub fn end_if_stuck() {
    thread::spawn(|| {
        // Well before the parent kills it.
        thread::sleep(PATIENCE / 2);
        std::process::exit(STUCK);
    });
}

/// In a child: it survived; the word says with what.
pub fn saw(value: u64) -> ! {
    eprintln!("saw {value:#x}");
    std::process::exit(SAW_MEMORY)
}

/// Runs `test` of this binary again for `case`; returns how it ended and all that it printed.
#[track_caller]
pub fn run(test: &str, case: &str) -> (End, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut err = child.stderr.take().unwrap();
    let reader = |stream: &mut dyn Read| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let out = thread::spawn(move || reader(&mut out));
    let err = thread::spawn(move || reader(&mut err));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{test} {case}: the child did not end");
        }
        thread::sleep(Duration::from_millis(1));
    };
    let printed = out.join().unwrap() + &err.join().unwrap();
    let end = match (status.signal(), status.code()) {
        (Some(signal), _) => End::Signal(signal),
        (None, code) => End::Exit(code.expect("it has ended")),
    };
    (end, printed)
}

/// Runs a child that is to reach the step under test and to end so there.
#[track_caller]
pub fn expect(test: &str, case: &str, expected: End) {
    let (end, printed) = run(test, case);
    assert!(printed.contains(REACHED), "{test} {case}: ended early with {end:?}: {printed}");
    assert_eq!(end, expected, "{test} {case}: {printed}");
}
