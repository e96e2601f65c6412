//! A terminal for the command to run in: a pty(7), and a model of what is on its screen.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use rustix::{
    fd::OwnedFd,
    fs::OFlags,
    process::{Pid, Signal},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Termios, Winsize, tcgetattr, tcsetwinsize},
};
use vt100::Screen;

use super::common::wait_for;

fn control() -> rustix::io::Result<OwnedFd> {
    openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
}

/// Whether there are pseudo-terminals here.
pub(crate) fn available() -> bool {
    let available = control().is_ok();
    if !available {
        println!("skipped: needs /dev/ptmx and a devpts");
    }
    available
}

/// What came from the command.
struct Received {
    parser: vt100::Parser,
    /// All of it.
    bytes: Vec<u8>,
}

pub(crate) struct Terminal {
    keyboard: File,
    /// The command's side, held open so that its state can be looked at when the command has ended.
    line: OwnedFd,
    received: Arc<Mutex<Received>>,
}

impl Terminal {
    /// One with so many rows and columns.
    pub(crate) fn new(rows: u16, columns: u16) -> Self {
        let control = control().expect("a pseudo-terminal");
        grantpt(&control).expect("granted");
        unlockpt(&control).expect("unlocked");
        let name = ptsname(&control, Vec::new()).expect("its name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let line = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).expect("its line");
        let parser = vt100::Parser::new(rows, columns, 0);
        let received = Arc::new(Mutex::new(Received { parser, bytes: Vec::new() }));
        let keyboard = File::from(control);
        let mut from = keyboard.try_clone().expect("a second descriptor");
        let to = Arc::clone(&received);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // An error is how the end of the other side shows.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let mut to = to.lock().expect("no reader has panicked");
                to.parser.process(&buffer[..count]);
                to.bytes.extend_from_slice(&buffer[..count]);
            }
        });
        let terminal = Self { keyboard, line, received };
        terminal.resize(rows, columns);
        terminal
    }

    /// Gives it another size, as a window that is dragged.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        self.received().parser.screen_mut().set_size(rows, columns);
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.line, size).expect("its size");
    }

    /// Starts a command whose terminal this is.
    pub(crate) fn start(&self, command: &mut Command) -> InTerminal {
        let side = || File::from(self.line.try_clone().expect("a descriptor"));
        command.stdin(side()).stdout(side()).stderr(side()).env("TERM", "xterm-256color");
        let adopt = || {
            // SAFETY: two system calls that touch no memory; standard input is the terminal.
            let failed = unsafe { libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 };
            if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: `adopt` makes only system calls: it is async-signal-safe.
        unsafe { command.pre_exec(adopt) };
        InTerminal { child: command.spawn().expect("the command starts") }
    }

    /// Presses keys.
    pub(crate) fn press(&self, keys: &[u8]) {
        (&self.keyboard).write_all(keys).expect("pressed");
    }

    /// Shows a line, as a shell's output before the command.
    pub(crate) fn show(&self, text: &str) {
        rustix::io::write(&self.line, format!("{text}\r\n").as_bytes()).expect("shown");
        self.wait_for(text, |screen| screen.contents().contains(text));
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().expect("no reader has panicked")
    }

    /// What is on the screen.
    pub(crate) fn screen(&self) -> Screen {
        self.received().parser.screen().clone()
    }

    /// All that was ever sent to it, as text.
    pub(crate) fn sent(&self) -> String {
        String::from_utf8_lossy(&self.received().bytes).into_owned()
    }

    /// Waits until the screen looks so, and answers with it.
    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, mut looks: impl FnMut(&Screen) -> bool) -> Screen {
        wait_for(what, || {
            let screen = self.screen();
            looks(&screen).then_some(screen)
        })
    }

    /// How the line is set: raw or not, and all the rest (termios(3)).
    pub(crate) fn settings(&self) -> String {
        let Termios { input_modes, output_modes, control_modes, local_modes, .. } =
            tcgetattr(&self.line).expect("its settings");
        format!("{input_modes:?} {output_modes:?} {control_modes:?} {local_modes:?}")
    }
}

/// A command in a terminal; killed on drop.
pub(crate) struct InTerminal {
    child: Child,
}

impl InTerminal {
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Waits for its end, which has to come.
    #[track_caller]
    pub(crate) fn end(mut self) -> ExitStatus {
        wait_for("the command's end", || self.child.try_wait().expect("waiting"))
    }
}

impl Drop for InTerminal {
    fn drop(&mut self) {
        // It may have ended meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
