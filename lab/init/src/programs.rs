//! The programs to run.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use rustix::termios::tcdrain;

use crate::Error;

/// A program and its arguments.
pub(crate) struct Program(Vec<OsString>);

/// How a program ended.
pub(crate) enum End {
    Exit(i32),
    Signal(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exit(status) => write!(f, "exit {status}"),
            End::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> = self.0.iter().map(|word| word.to_string_lossy()).collect();
        f.write_str(&words.join(" "))
    }
}

/// Reads a list of programs: for each the number of its words, then the words, every one of these
/// ended by a zero byte.
pub(crate) fn read(path: &str) -> Result<Vec<Program>, Error> {
    let bytes = fs::read(path).map_err(|error| format!("reading {path}: {error}"))?;
    parse(&bytes).ok_or(format!("{path} is not a list of programs"))
}

fn parse(bytes: &[u8]) -> Option<Vec<Program>> {
    let mut words = bytes.split_inclusive(|&byte| byte == 0).map(|word| word.strip_suffix(&[0]));
    let mut programs = Vec::new();
    while let Some(count) = words.next() {
        let count: usize = str::from_utf8(count?).ok()?.parse().ok().filter(|&count| count > 0)?;
        let program: Option<Vec<_>> = words
            .by_ref()
            .take(count)
            .map(|word| Some(OsString::from_vec(word?.to_vec())))
            .collect();
        programs.push(Program(program.filter(|words| words.len() == count)?));
    }
    Some(programs)
}

impl Program {
    /// Runs the program to its end, with its output to `output`.
    pub(crate) fn run(&self, mut output: &File) -> Result<End, Error> {
        let failed = |error: std::io::Error| format!("running {self}: {error}");
        // The words and the form of `cargo test`, which tools that read its output look for.
        writeln!(output, "     Running {self}").map_err(failed)?;
        let child = Command::new(&self.0[0])
            .args(&self.0[1..])
            .env_clear()
            .envs([("HOME", "/root"), ("PATH", "/bin"), ("RUST_BACKTRACE", "1")])
            .envs(asked_for())
            .current_dir("/tmp")
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output.try_clone().map_err(failed)?)
            .status();
        tcdrain(output).map_err(|error| failed(error.into()))?;
        match child {
            Ok(status) => Ok(match status.code() {
                Some(code) => End::Exit(code),
                None => End::Signal(status.signal().expect("no exit code, so a signal")),
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(format!("running {self}: {error}: it has to be statically linked"))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(bytes: &[u8]) -> Option<Vec<Vec<OsString>>> {
        Some(parse(bytes)?.into_iter().map(|program| program.0).collect())
    }

    #[test]
    fn lists() {
        assert_eq!(words(b""), Some(vec![]));
        assert_eq!(words(b"1\0a\0"), Some(vec![vec!["a".into()]]));
        assert_eq!(
            words(b"3\0a\0\0b c\n\x002\0d\x003\0"),
            Some(vec![vec!["a".into(), "".into(), "b c\n".into()], vec!["d".into(), "3".into()]])
        );
    }

    #[test]
    fn not_lists() {
        for bytes in [&b"1\0a"[..], b"2\0a\0", b"0\0", b"x\0a\0", b"1", b"1\0", b"-1\0a\0"] {
            assert_eq!(words(bytes), None, "{bytes:?}");
        }
    }
}

/// What `--env` says.
fn asked_for() -> impl Iterator<Item = (String, String)> {
    std::env::vars().filter_map(|(name, value)| {
        name.strip_prefix("LAB_ENV_").map(|name| (name.to_owned(), value))
    })
}
