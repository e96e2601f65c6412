//! Proof that nothing writes while soft-dirty bits are read and cleared.

use std::{
    fs, io,
    time::{Duration, Instant},
};

use crate::{DirtyError, Target, target::is_gone};

/// Keeps a process from writing for a moment.
///
/// Soft-dirty bits are read by one call of the kernel and cleared by another. A write between the
/// two sets a bit that is cleared unread: that page is lost. So the tracker reads and clears only
/// inside of [`while_frozen`](Self::while_frozen).
///
/// Threads of other processes that share the memory (`CLONE_VM` without `CLONE_THREAD`, `vfork`), and
/// what the kernel writes for the process while it is stopped (asynchronous I/O that is under way),
/// are for the implementation to think of.
pub trait Freeze: Send {
    /// Runs `work` once, while no thread of the process runs.
    ///
    /// # Errors
    ///
    /// Those of `work`; [`DirtyError::Freeze`], [`DirtyError::Running`] or
    /// [`DirtyError::ProcessGone`] if the process could not be stopped, and `work` was not run then.
    fn while_frozen(
        &mut self,
        work: &mut dyn FnMut() -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError>;
}

/// A closure that stops, does the work, and lets go on, as
/// `move |work: &mut dyn FnMut() -> _| { let _stopped = process.stop()?; work() }`.
impl<F> Freeze for F
where
    F: FnMut(&mut dyn FnMut() -> Result<(), DirtyError>) -> Result<(), DirtyError> + Send,
{
    fn while_frozen(
        &mut self,
        work: &mut dyn FnMut() -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        self(work)
    }
}

/// For how long is waited for threads that are ending.
const ENDING: Duration = Duration::from_secs(1);

/// This process has no thread but the one that harvests, which is looked at each time. A thread that
/// has been joined may take a moment more to end: it is waited for.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct OnlyThread;

impl Freeze for OnlyThread {
    fn while_frozen(
        &mut self,
        work: &mut dyn FnMut() -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        if has_one_thread() {
            return work();
        }
        let own = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let pid = std::process::id();
        let deadline = Instant::now() + ENDING;
        while let Some(thread) = threads(Target::Own)?.into_iter().find(|&thread| thread != own) {
            if !is_ending(pid, thread)? || Instant::now() > deadline {
                return Err(DirtyError::Running { pid, thread });
            }
            std::thread::yield_now();
        }
        work()
    }
}

/// Somebody else has stopped the process: by a signal (SIGSTOP), as its tracer, or by the freezer of
/// cgroup v2. That every thread is stopped is looked at each time; that nobody lets it go on
/// meanwhile is for the caller to see to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct AlreadyStopped {
    /// The process.
    pub pid: u32,
}

impl Freeze for AlreadyStopped {
    fn while_frozen(
        &mut self,
        work: &mut dyn FnMut() -> Result<(), DirtyError>,
    ) -> Result<(), DirtyError> {
        let Self { pid } = *self;
        for thread in threads(Target::Process(pid))? {
            if !is_stopped(pid, thread)? {
                return Err(DirtyError::Running { pid, thread });
            }
        }
        work()
    }
}

/// Whether this process surely has one thread only. The directory of its threads has two links, and
/// one more for each of them (`proc_task_getattr` in the kernel's `fs/proc/base.c`): to ask for
/// their number takes a small part of the time that their list takes.
fn has_one_thread() -> bool {
    rustix::fs::stat("/proc/self/task").is_ok_and(|task| task.st_nlink == 3)
}

fn threads(target: Target) -> Result<Vec<u32>, DirtyError> {
    let path = target.path("task");
    let read = || -> io::Result<Vec<u32>> {
        let mut threads = Vec::new();
        for entry in fs::read_dir(&path)? {
            threads.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        Ok(threads)
    };
    read().map_err(|source| {
        if is_gone(&source) {
            DirtyError::ProcessGone { pid: target.pid() }
        } else {
            DirtyError::Proc { path, source }
        }
    })
}

/// Whether a thread is stopped, or has ended.
fn is_stopped(pid: u32, thread: u32) -> Result<bool, DirtyError> {
    match look(pid, thread, state)? {
        None | Some('T' | 't' | 'Z' | 'X') => Ok(true),
        Some(_) => Ok(is_frozen(pid, thread)),
    }
}

/// Whether a thread is on its way out, from where it does not come back, or has ended.
fn is_ending(pid: u32, thread: u32) -> Result<bool, DirtyError> {
    /// `PF_EXITING` of the kernel's `include/linux/sched.h`.
    const EXITING: u64 = 4;
    Ok(look(pid, thread, flags)?.is_none_or(|flags| flags & EXITING != 0))
}

/// What `find` finds in the `stat` file of a thread; `None` if that has ended.
fn look<T>(pid: u32, thread: u32, find: fn(&str) -> Option<T>) -> Result<Option<T>, DirtyError> {
    let path = format!("/proc/{pid}/task/{thread}/stat");
    let stat = match fs::read_to_string(&path) {
        Ok(stat) => stat,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(source) => return Err(DirtyError::Proc { path, source }),
    };
    match find(&stat) {
        Some(found) => Ok(Some(found)),
        None => Err(DirtyError::Proc { path, source: io::ErrorKind::InvalidData.into() }),
    }
}

/// The kernel's flags of a thread, the ninth field.
fn flags(stat: &str) -> Option<u64> {
    stat.rsplit_once(") ")?.1.split(' ').nth(6)?.parse().ok()
}

/// The state in a `stat` file (`proc_pid_stat(5)`), behind a name that may contain anything.
fn state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Whether the freezer of cgroup v2 holds a thread, which is no state of the thread.
fn is_frozen(pid: u32, thread: u32) -> bool {
    // What cannot be read is not known to be frozen.
    let Ok(groups) = fs::read_to_string(format!("/proc/{pid}/task/{thread}/cgroup")) else {
        return false;
    };
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::")) else {
        return false;
    };
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().any(|root| {
        let events = fs::read_to_string(format!("{root}{group}/cgroup.events"));
        events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_behind_any_name() {
        assert_eq!(state("12 (a) b) S 1 2 3"), Some('S'));
        assert_eq!(state("12 (a) T 1"), Some('T'));
        assert_eq!(state("12 (a"), None);
        assert_eq!(flags("12 (a) b) S 1 2 3 4 5 4194564 7"), Some(4_194_564));
        assert_eq!(flags("12 (a) S 1 2"), None);
    }

    #[test]
    fn a_process_that_runs_is_not_frozen() {
        let mut runs = false;
        let mut work = || {
            runs = true;
            Ok(())
        };
        let error = AlreadyStopped { pid: std::process::id() }.while_frozen(&mut work).unwrap_err();
        assert!(matches!(error, DirtyError::Running { .. }), "{error}");
        // The test harness has a thread besides this one.
        let error = OnlyThread.while_frozen(&mut work).unwrap_err();
        assert!(matches!(error, DirtyError::Running { .. }), "{error}");
        let error = AlreadyStopped { pid: u32::MAX }.while_frozen(&mut work).unwrap_err();
        assert!(matches!(error, DirtyError::ProcessGone { .. }), "{error}");
        assert!(!runs);
    }
}
