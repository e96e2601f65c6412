//! What a program leaves behind becomes a child of the first process.

use std::io;

use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};

/// Kills every process but this one and waits for their ends, so that no program finds another's
/// processes, or the memory that they hold.
pub(crate) fn end_all() -> io::Result<()> {
    kill_all()?;
    loop {
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::CHILD) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[allow(unsafe_code)]
fn kill_all() -> io::Result<()> {
    // SAFETY: kill(2) reads and writes no memory of this process; -1 leaves out the caller.
    if unsafe { libc::kill(-1, libc::SIGKILL) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error),
    }
}
