//! Bounded waiting. A thread that waits for a page cannot be ended, and a test that fails while
//! there is one would never end: the process ends instead, and says why.

use std::{
    io::Write,
    panic::Location,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Longer than anything takes here that works, on a machine however busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

fn give_up(what: &str, caller: &Location<'_>) -> ! {
    // Not `eprintln`, which the test harness keeps to itself until the test has ended.
    let _ = writeln!(std::io::stderr(), "\n{caller}: waited in vain: {what}");
    std::process::exit(101)
}

/// Waits until `condition` holds.
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
pub struct Watch(Option<mpsc::Sender<()>>);

/// Watches over a test.
#[track_caller]
pub fn watch(seconds: u64) -> Watch {
    let caller = Location::caller();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let result = receiver.recv_timeout(Duration::from_secs(seconds));
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
