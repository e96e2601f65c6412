//! What `/proc` says of a process and its threads, by file.
//!
//! Source: `Documentation/filesystems/proc.rst`.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::{io::Errno, process::Pid};

use crate::{Missing, ProcessError, Seccomp};

/// `CAP_SYS_PTRACE`, as a bit of a set of capabilities.
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// The path of one file of a process.
pub(crate) fn path(pid: Pid, file: &str) -> PathBuf {
    format!("/proc/{pid}/{file}").into()
}

/// The path of one file of a thread.
pub(crate) fn thread_path(pid: Pid, thread: Pid, file: &str) -> PathBuf {
    format!("/proc/{pid}/task/{thread}/{file}").into()
}

/// Reads a file of a process. `None` when process or thread has ended.
pub(crate) fn read(pid: Pid, path: PathBuf) -> Result<Option<Vec<u8>>, ProcessError> {
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(ProcessError::Proc { pid, path, source }),
    }
}

/// Whether the error means that the process of the file has ended.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// All threads of a process, in the order in which they were made; none when it has ended.
pub(crate) fn threads(pid: Pid) -> Result<Vec<Pid>, ProcessError> {
    let path = path(pid, "task");
    let failed = |source| ProcessError::Proc { pid, path: path.clone(), source };
    let mut threads = Vec::new();
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(threads),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let name = match entry {
            Ok(entry) => entry.file_name(),
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(failed(error)),
        };
        let thread = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        threads.push(thread.ok_or_else(|| ProcessError::NotUnderstood {
            pid,
            path: path.clone(),
            expected: "the number of a thread",
            text: name.to_string_lossy().into_owned(),
        })?);
    }
    Ok(threads)
}

/// `/proc/PID/stat` of a thread.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Stat {
    /// Its state, the letter.
    pub(crate) state: char,
    /// `PF_…`.
    flags: u64,
}

impl Stat {
    /// Of a thread; `None` when it has ended.
    pub(crate) fn of(pid: Pid, thread: Pid) -> Result<Option<Self>, ProcessError> {
        let path = thread_path(pid, thread, "stat");
        let Some(bytes) = read(pid, path.clone())? else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes);
        Self::parse(&text).map(Some).ok_or_else(|| ProcessError::NotUnderstood {
            pid,
            path,
            expected: "the state and flags of a thread",
            text: text.into_owned(),
        })
    }

    fn parse(text: &str) -> Option<Self> {
        // The name of the program stands before, in parentheses, and may contain anything.
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?.chars().next()?;
        // After the numbers of its parent, group, session and terminal, and of that's group.
        let flags = fields.nth(5)?.parse().ok()?;
        Some(Self { state, flags })
    }

    /// Whether it executes no instruction of its program any more: it has ended, or is on its way
    /// out in the kernel, where it gives up its memory first of all.
    pub(crate) fn is_over(self) -> bool {
        const EXITING: u64 = 1 << 2;
        is_dead(self.state) || self.flags & EXITING != 0
    }

    /// Whether it is the kernel's own.
    pub(crate) fn is_kernel(self) -> bool {
        const KERNEL_THREAD: u64 = 1 << 21;
        self.flags & KERNEL_THREAD != 0
    }
}

/// The state of a thread, the letter of `/proc/PID/stat`; `None` when it has ended.
pub(crate) fn state(pid: Pid, thread: Pid) -> Result<Option<char>, ProcessError> {
    Ok(Stat::of(pid, thread)?.map(|stat| stat.state))
}

/// Whether a thread has ended, or is about to.
pub(crate) fn is_over(pid: Pid, thread: Pid) -> Result<bool, ProcessError> {
    Ok(Stat::of(pid, thread)?.is_none_or(Stat::is_over))
}

/// A thread that is neither over nor about to be, so that it has memory: the first one, or, where
/// that has ended before the others, another. `None` when all are.
pub(crate) fn a_thread(pid: Pid) -> Result<Option<Pid>, ProcessError> {
    // A thread that starts another program takes over the number of the first one, which may have
    // been looked at by then, and gives its own up, which may be yet to be looked at.
    for _ in 0..2 {
        for thread in std::iter::once(pid).chain(threads(pid)?) {
            if !is_over(pid, thread)? {
                return Ok(Some(thread));
            }
        }
    }
    Ok(None)
}

/// Reads something of a process by the path of one of its threads; `None` when it has no thread
/// any more of which it could be read.
///
/// The kernel answers in many ways when a thread has ended, or gives up its memory just then: no
/// such file, no such process, access denied, nothing. None of them counts for a thread of which
/// one then sees that it is over.
pub(crate) fn read_by_thread<R>(
    pid: Pid,
    file: &str,
    read: impl Fn(&Path) -> io::Result<R>,
) -> Result<Option<R>, ProcessError> {
    while let Some(thread) = a_thread(pid)? {
        let path = thread_path(pid, thread, file);
        let result = read(&path);
        if is_over(pid, thread)? {
            continue;
        }
        return result.map(Some).map_err(|source| ProcessError::Proc { pid, path, source });
    }
    Ok(None)
}

/// Whether a thread with this state executes no instruction any more, and has no memory.
pub(crate) fn is_dead(state: char) -> bool {
    matches!(state, 'Z' | 'X' | 'x')
}

/// `/proc/PID/status` of a process or thread.
pub(crate) struct Status {
    pid: Pid,
    path: PathBuf,
    text: String,
}

impl Status {
    /// Of a thread; `None` when it has ended.
    pub(crate) fn of(pid: Pid, thread: Pid) -> Result<Option<Self>, ProcessError> {
        let path = thread_path(pid, thread, "status");
        let bytes = read(pid, path.clone())?;
        Ok(bytes.map(|bytes| Self {
            pid,
            path,
            text: String::from_utf8_lossy(&bytes).into_owned(),
        }))
    }

    /// Of a thread that is not over.
    pub(crate) fn of_any(pid: Pid) -> Result<Self, ProcessError> {
        let text = read_by_thread(pid, "status", |path| std::fs::read(path))?;
        let text = text.ok_or(ProcessError::Ended { pid, doing: "reading its status" })?;
        let text = String::from_utf8_lossy(&text).into_owned();
        Ok(Self { pid, path: path(pid, "status"), text })
    }

    fn line(&self, key: &str) -> Option<&str> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix(key).and_then(|line| line.strip_prefix(':')))
            .map(str::trim)
    }

    fn not_understood(&self, expected: &'static str, text: &str) -> ProcessError {
        let (pid, path) = (self.pid, self.path.clone());
        ProcessError::NotUnderstood { pid, path, expected, text: text.to_owned() }
    }

    /// Who traces it; 0 is nobody.
    pub(crate) fn tracer(&self) -> Result<i32, ProcessError> {
        let line = self.line("TracerPid").unwrap_or("");
        line.parse().map_err(|_| self.not_understood("the number of a tracer", line))
    }

    /// What confines it. A kernel without seccomp has no such line.
    pub(crate) fn seccomp(&self) -> Result<Option<Seccomp>, ProcessError> {
        match self.line("Seccomp") {
            None | Some("0") => Ok(None),
            Some("1") => Ok(Some(Seccomp::Strict)),
            Some("2") => Ok(Some(Seccomp::Filter)),
            Some(other) => Err(self.not_understood("a mode of seccomp", other)),
        }
    }

    /// How many threads its process has, counting those that have ended and are not quite gone.
    pub(crate) fn threads(&self) -> Result<usize, ProcessError> {
        let line = self.line("Threads").unwrap_or("");
        line.parse().map_err(|_| self.not_understood("a number of threads", line))
    }

    /// Whether it has a shadow stack, against which every return is checked.
    pub(crate) fn has_shadow_stack(&self) -> bool {
        self.line("x86_Thread_features").is_some_and(|features| features.contains("shstk"))
    }

    fn users(&self) -> impl Iterator<Item = u32> {
        self.line("Uid").unwrap_or("").split_whitespace().filter_map(|user| user.parse().ok())
    }

    fn has_capability(&self, capability: u64) -> bool {
        self.line("CapEff")
            .and_then(|set| u64::from_str_radix(set, 16).ok())
            .is_some_and(|set| set & capability != 0)
    }
}

/// Why the kernel does not let this process trace another one.
pub(crate) fn refusal(pid: Pid, doing: &'static str) -> Result<ProcessError, ProcessError> {
    let Some(theirs) = Status::of(pid, pid)? else { return Ok(ProcessError::Ended { pid, doing }) };
    let tracer = theirs.tracer()?;
    if tracer != 0 {
        return Ok(ProcessError::AlreadyTraced { pid, tracer });
    }
    let this = rustix::process::getpid();
    let ours = Status::of(this, this)?.ok_or(ProcessError::Ended { pid: this, doing })?;
    Ok(ProcessError::NotPermitted { pid, doing, missing: missing(&theirs, &ours) })
}

fn missing(theirs: &Status, ours: &Status) -> Missing {
    if !ours.has_capability(CAP_SYS_PTRACE) {
        let user = ours.users().nth(1).unwrap_or(u32::MAX);
        if let Some(other) = theirs.users().find(|&other| other != user) {
            return Missing::OtherUser { theirs: other, ours: user };
        }
    }
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
        .ok()
        .and_then(|scope| scope.trim().parse().ok())
        .unwrap_or(0);
    match scope {
        3 => Missing::Yama { scope },
        _ if ours.has_capability(CAP_SYS_PTRACE) => Missing::Elsewhere,
        0 => Missing::Undumpable,
        scope => Missing::Yama { scope },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(text: &str) -> Status {
        Status { pid: rustix::process::getpid(), path: "status".into(), text: text.to_owned() }
    }

    #[test]
    fn lines_are_found_by_their_whole_key() {
        let status = status("Seccomp_filters:\t3\nSeccomp:\t2\nTracerPid:\t17\nUid:\t1\t2\t3\t4\n");
        assert_eq!(status.seccomp().unwrap(), Some(Seccomp::Filter));
        assert_eq!(status.tracer().unwrap(), 17);
        assert_eq!(status.users().collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(!status.has_shadow_stack());
    }

    #[test]
    fn what_is_not_understood_is_said() {
        let error = status("Seccomp:\t7\n").seccomp().unwrap_err().to_string();
        assert!(error.contains("\"7\"") && error.contains("seccomp"), "{error}");
        assert!(status("").tracer().is_err());
    }

    #[test]
    fn what_is_missing_is_the_first_thing_in_the_way() {
        let root = "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n";
        let user = "Uid:\t7\t7\t7\t7\nCapEff:\t0000000000000000\n";
        let other = "Uid:\t8\t8\t8\t8\nCapEff:\t0000000000000000\n";
        assert_eq!(
            missing(&status(other), &status(user)),
            Missing::OtherUser { theirs: 8, ours: 7 }
        );
        // Where there is no Yama, or it lets the same user trace.
        if !std::path::Path::new("/proc/sys/kernel/yama").exists() {
            assert_eq!(missing(&status(user), &status(user)), Missing::Undumpable);
            assert_eq!(missing(&status(user), &status(root)), Missing::Elsewhere);
        }
    }

    #[test]
    fn states_and_flags_stand_behind_the_name() {
        for (text, state, is_over, is_kernel) in [
            ("7 (sh) S 1 7 7 34816 7 4194304 9", 'S', false, false),
            ("7 (a) Z 1 (b) R 1 7 7 0 -1 4194308 9", 'R', true, false),
            ("7 (gone) Z 1 7 7 0 -1 0 9", 'Z', true, false),
            ("2 (kthreadd) S 0 0 0 0 -1 2129984 0", 'S', false, true),
        ] {
            let stat = Stat::parse(text).unwrap();
            assert_eq!((stat.state, stat.is_over(), stat.is_kernel()), (state, is_over, is_kernel));
        }
        for text in ["", "7 (sh", "7 (sh) ", "7 (sh) S 1 7 7 34816 7", "7 (sh) S 1 7 7 0 7 x 9"] {
            assert_eq!(Stat::parse(text), None, "{text}");
        }
    }

    #[test]
    fn this_thread_runs() {
        let (pid, thread) = (rustix::process::getpid(), rustix::thread::gettid());
        assert_eq!(state(pid, thread).unwrap(), Some('R'));
        assert!(threads(pid).unwrap().contains(&thread));
        let none = Pid::from_raw(i32::MAX).unwrap();
        assert_eq!(state(none, none).unwrap(), None);
        assert!(threads(none).unwrap().is_empty());
        assert!(Status::of(none, none).unwrap().is_none());
    }
}
