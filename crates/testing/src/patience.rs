//! Bounded waiting. A thread that waits for a page cannot be ended, and a test that fails while
//! there is one would never end: the process ends instead, and says why.

use std::{
    io::Write,
    panic::Location,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Longer than anything takes that works, on a machine however busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Ends the process as failed, because threads of it wait for pages and cannot be ended.
pub fn fail(why: &str) -> ! {
    // Not `eprintln`, which the test harness keeps to itself until the test has ended. Nobody is
    // left to tell when this fails.
    let _ = writeln!(std::io::stderr(), "\n{why}");
    std::process::exit(101)
}

fn give_up(what: &str, caller: &Location<'_>) -> ! {
    fail(&format!("{caller}: waited in vain: {what}"))
}

/// Waits until `condition` holds; after [`PATIENCE`] it ends the process.
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            give_up(what, Location::caller());
        }
        thread::sleep(Duration::from_micros(100));
    }
}

/// Ends the process if it is not dropped in time.
#[derive(Debug)]
#[must_use = "dropping it ends the watch"]
pub struct Watch(Option<mpsc::Sender<()>>);

/// Watches over a test that works in so many seconds. It gets [`PATIENCE`] on top of them, so that
/// a [`wait_for`] in it gives up first, and says what for.
#[track_caller]
pub fn watch(seconds: u64) -> Watch {
    let caller = Location::caller();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let result = receiver.recv_timeout(Duration::from_secs(seconds) + PATIENCE);
        if result == Err(mpsc::RecvTimeoutError::Timeout) {
            give_up("the end of the test", caller);
        }
    });
    Watch(Some(sender))
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0 = None;
    }
}
