//! Exit codes, the same for every command.

use std::{fmt, process::ExitCode};

use crate::signals::Signal;

/// How a command ended. The numbers are part of the command's interface.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Exit {
    /// It did what was asked.
    Success,
    /// It ran and failed, or what it was to verify is wrong.
    Failed,
    /// The options contradict each other. (What clap itself finds wrong also ends with 2.)
    Usage,
    /// This host lacks something without which the command cannot run at all.
    MissingCapability,
    /// The page source, or the peer, is gone.
    SourceLost,
    /// Stopped by SIGINT or SIGTERM.
    Interrupted(Signal),
}

const CODES: &str = "\
Exit codes:
    0  success
    1  failed, or verification failed
    2  wrong usage
    3  this host lacks a needed capability (see `pageferry doctor`)
    4  page source or peer lost
  130  stopped by SIGINT
  143  stopped by SIGTERM";

/// What `--help` of a command ends with: its examples, and the exit codes.
pub(crate) fn help(examples: &str) -> String {
    format!("{examples}\n\n{CODES}")
}

/// As [`help`], for a command that goes on until it is stopped.
pub(crate) fn help_of_server(examples: &str) -> String {
    let codes = CODES.replace("    0  success\n", "    0  stopped by SIGINT or SIGTERM\n");
    let kept =
        codes.lines().filter(|line| !line.contains("  stopped by") || line.contains("  0  "));
    format!("{examples}\n\n{}", kept.collect::<Vec<_>>().join("\n"))
}

/// As [`help`], for a command that goes on until it is stopped, unless it is told `--for` how long.
pub(crate) fn help_of_watcher(examples: &str) -> String {
    let codes = CODES
        .replace("0  success", "0  success; without --for also stopped by SIGINT or SIGTERM")
        .replace("stopped by SIGINT\n", "stopped by SIGINT, with --for or before it began\n")
        .replace(
            "  143  stopped by SIGTERM",
            "  143  stopped by SIGTERM, with --for or before it began",
        );
    format!("{examples}\n\n{codes}")
}

impl Exit {
    pub(crate) fn code(self) -> u8 {
        match self {
            Exit::Success => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::MissingCapability => 3,
            Exit::SourceLost => 4,
            Exit::Interrupted(Signal::Interrupt) => 130,
            Exit::Interrupted(Signal::Terminate) => 143,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// An error that decides the exit code. Any error without one of these in its chain is
/// [`Exit::Failed`].
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    /// Options that contradict each other.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    /// Something this host lacks; the message says what, and how to get it.
    pub(crate) fn missing(message: impl Into<String>) -> Self {
        Self { exit: Exit::MissingCapability, message: message.into() }
    }

    /// The page source, or the peer, is gone.
    pub(crate) fn source_lost(message: impl Into<String>) -> Self {
        Self { exit: Exit::SourceLost, message: message.into() }
    }

    /// A signal asked the command to stop before it was done.
    pub(crate) fn interrupted(signal: Signal) -> Self {
        Self { exit: Exit::Interrupted(signal), message: format!("stopped by {signal}") }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The exit code that belongs to `error`.
pub(crate) fn of_error(error: &anyhow::Error) -> Exit {
    error.chain().find_map(|e| e.downcast_ref::<Failure>()).map_or(Exit::Failed, |f| f.exit)
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_failure_in_the_chain_decides() {
        let missing = anyhow::Error::new(Failure::missing("no userfaultfd"));
        let cases = [
            (missing, 3),
            (anyhow::anyhow!("plain"), 1),
            (Failure::usage("both").into(), 2),
            (Failure::interrupted(Signal::Interrupt).into(), 130),
            (Failure::interrupted(Signal::Terminate).into(), 143),
            (Err::<(), _>(Failure::missing("inner")).context("outer").expect_err("is an error"), 3),
        ];
        for (error, code) in cases {
            assert_eq!(of_error(&error).code(), code, "{error:#}");
        }
    }

    #[test]
    fn help_says_what_a_signal_means() {
        let codes = |help: &str| -> Vec<String> {
            let lines = help.lines().map(str::trim);
            lines.filter(|line| line.contains("SIG")).map(str::to_owned).collect()
        };
        assert_eq!(codes(&help("")), ["130  stopped by SIGINT", "143  stopped by SIGTERM"]);
        assert_eq!(codes(&help_of_server("")), ["0  stopped by SIGINT or SIGTERM"]);
        assert_eq!(
            codes(&help_of_watcher("")),
            [
                "0  success; without --for also stopped by SIGINT or SIGTERM",
                "130  stopped by SIGINT, with --for or before it began",
                "143  stopped by SIGTERM, with --for or before it began",
            ]
        );
    }

    #[test]
    fn help_lists_every_code() {
        let all = [
            Exit::Success,
            Exit::Failed,
            Exit::Usage,
            Exit::MissingCapability,
            Exit::SourceLost,
            Exit::Interrupted(Signal::Interrupt),
            Exit::Interrupted(Signal::Terminate),
        ];
        for exit in all {
            let number = exit.code().to_string();
            assert!(
                CODES.lines().any(|l| l.split_whitespace().next() == Some(&number)),
                "{number}"
            );
        }
    }
}
