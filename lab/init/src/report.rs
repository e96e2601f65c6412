//! Serial ports that carry bytes as they are.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};

/// Opens a serial port without echo and without a carriage return before each newline.
pub(crate) fn raw_port(path: &str) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
    let mut settings = tcgetattr(&port)?;
    settings.make_raw();
    tcsetattr(&port, OptionalActions::Now, &settings)?;
    Ok(port)
}

/// The port for `lab/run`: a line when the machine is ready, at the start and the end of each
/// program, and a last one.
pub(crate) struct Report(File);

impl Report {
    pub(crate) fn open(path: &str) -> io::Result<Report> {
        Ok(Report(raw_port(path)?))
    }

    /// Returns when the line has left the machine, so that it is there whatever happens next.
    pub(crate) fn line(&mut self, text: &str) {
        // Without this port nothing can be told to anyone but by a kernel panic.
        self.0.write_all(format!("{text}\n").as_bytes()).expect("writing a report");
        tcdrain(&self.0).expect("draining a report");
    }
}
