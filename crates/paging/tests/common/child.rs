//! Tests in which a thread is to die of SIGBUS: the test binary runs itself again for one case,
//! and looks how that ended.

use std::{
    io::Read,
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const CASE: &str = "PAGEFERRY_TEST_CASE";
/// How the child says that it saw memory that it should not have seen.
pub const SAW_MEMORY: i32 = 42;
/// How the child says that nothing happened for long.
pub const STUCK: i32 = 43;
const PATIENCE: Duration = Duration::from_secs(20);
/// What the child prints when it has come to the step that is tested.
const REACHED: &str = "reached the step under test";

/// How a child ended.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum End {
    Signal(i32),
    Exit(i32),
}

/// The case to run, in a child.
pub fn case() -> Option<String> {
    std::env::var(CASE).ok()
}

/// The child is about to do what is tested: ends before this do not count.
pub fn reached() {
    use std::io::Write;
    let mut out = std::io::stdout();
    writeln!(out, "{REACHED}").unwrap();
    out.flush().unwrap();
}

/// Ends the child after a while, whatever its threads wait for.
pub fn end_if_stuck() {
    thread::spawn(|| {
        thread::sleep(PATIENCE / 2);
        std::process::exit(STUCK);
    });
}

/// The child survived; the word says with what.
pub fn saw(value: u64) -> ! {
    eprintln!("saw {value:#x}");
    std::process::exit(SAW_MEMORY)
}

/// Runs `test` of this binary again for `case`; says how it ended and all that it printed.
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
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    };
    thread::scope(|scope| {
        let out = scope.spawn(move || reader(&mut out));
        let err = scope.spawn(move || reader(&mut err));
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
            (None, code) => End::Exit(code.unwrap()),
        };
        (end, printed)
    })
}

/// Runs a child that is to reach the step under test and to end so there.
#[track_caller]
pub fn expect(test: &str, case: &str, expected: End) {
    let (end, printed) = run(test, case);
    assert!(printed.contains(REACHED), "{test} {case}: ended early with {end:?}: {printed}");
    assert_eq!(end, expected, "{test} {case}: {printed}");
}

pub const SIGBUS: End = End::Signal(7);
pub const SIGSEGV: End = End::Signal(11);
