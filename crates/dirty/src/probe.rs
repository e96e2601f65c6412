//! What can track a target, found by doing, and which of it to take.

use std::{fmt, fs::OpenOptions, os::fd::AsFd, sync::Arc};

use pageferry_memory::{Mapping, PageSize};
use pageferry_uffd::{Errno, Pagemap};

use crate::{
    DirtyError, DirtySet, Method, Target, Tracked, Tracker, WpAsync, WpBlocking, soft_dirty,
    target::{has_ended, pidfd},
};

/// Up to this much memory of another process, its soft-dirty bits are preferred to a userfaultfd.
///
/// They need no system call made in its name, but stop it at each harvest for as long as it takes to
/// walk and protect all its memory. By `pageferry bench dirty` on Linux 6.12, emulated, a cycle of 4
/// MiB takes 0.6 ms more than with asynchronous write protection, and one of 16 MiB 1.1 ms; on real
/// CPUs about a tenth of that. Attaching takes half a millisecond more, once (`cargo bench -p
/// pageferry-process`): up to this size that is the price of eight harvests or so.
pub const SOFT_DIRTY_UP_TO: u64 = 4 << 20;

/// What has to be given for a method that works otherwise.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Condition {
    /// A userfaultfd that the process has opened and handed over.
    Userfaultfd,
    /// The process is stopped while its pages are harvested.
    Stopped,
    /// This process has one thread.
    OneThread,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Userfaultfd => "a userfaultfd that the process opens and hands over",
            Self::Stopped => "the process stopped during each harvest",
            Self::OneThread => "a process of one thread",
        })
    }
}

/// Whether a method can be had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ability {
    /// It was tried, and works.
    Works,
    /// It works, given this.
    Needs(Condition),
    /// It cannot be had, for this reason.
    Missing(String),
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Works => f.write_str("works"),
            Self::Needs(condition) => write!(f, "needs {condition}"),
            Self::Missing(reason) => write!(f, "missing: {reason}"),
        }
    }
}

/// What can track a target.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The target.
    pub target: Target,
    /// Each method of this crate.
    pub methods: Vec<(Method, Ability)>,
}

/// A method, and why it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The method.
    pub method: Method,
    /// What it needs.
    pub condition: Option<Condition>,
    /// Why it was chosen, for people.
    pub reason: String,
}

/// Why no method was chosen.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "no way to track the writes of {}: {}", .0.target,
    .0.methods.iter().map(|(method, ability)| format!("{method}: {ability}"))
        .collect::<Vec<_>>().join("; ")
)]
pub struct NoMethod(pub Report);

/// Tries every method on a few pages of this process, and finds out what the target allows. It is
/// neither stopped nor changed.
pub fn probe(target: Target) -> Report {
    let tried = [
        (Method::WpAsync, try_tracker(|memory| WpAsync::own([memory]))),
        (Method::WpBlocking, try_tracker(|memory| WpBlocking::own([memory]))),
        (Method::SoftDirty, soft_dirty::kernel_has_it().map_err(|error| error.to_string())),
    ];
    let methods = tried
        .into_iter()
        .map(|(method, works)| {
            let allowed = works.and_then(|()| match (target, method) {
                (Target::Own, Method::SoftDirty) => Ok(Ability::Needs(Condition::OneThread)),
                (Target::Own, _) => Ok(Ability::Works),
                (Target::Process(_), Method::SoftDirty) => {
                    may_clear(target).map(|()| Ability::Needs(Condition::Stopped))
                }
                (Target::Process(pid), _) => {
                    may_trace(pid).map(|()| Ability::Needs(Condition::Userfaultfd))
                }
            });
            (method, allowed.unwrap_or_else(Ability::Missing))
        })
        .collect();
    Report { target, methods }
}

/// [`probe`]s a target, and chooses for `bytes` of its memory.
///
/// # Errors
///
/// [`NoMethod`].
pub fn choose(target: Target, bytes: u64) -> Result<Choice, NoMethod> {
    probe(target).choose(bytes)
}

impl Report {
    /// Whether this method can be had.
    pub fn find(&self, method: Method) -> Option<&Ability> {
        self.methods.iter().find(|(found, _)| *found == method).map(|(_, ability)| ability)
    }

    /// The method to be preferred for so many bytes of tracked memory.
    ///
    /// # Errors
    ///
    /// [`NoMethod`].
    pub fn choose(&self, bytes: u64) -> Result<Choice, NoMethod> {
        let condition = |method| match self.find(method) {
            Some(Ability::Works) => Some(None),
            Some(Ability::Needs(condition)) => Some(Some(*condition)),
            _ => None,
        };
        let missing = |method| match self.find(method) {
            Some(Ability::Missing(reason)) => reason.as_str(),
            _ => "not tried",
        };
        let chosen = |method, reason: String| {
            condition(method).map(|condition| Choice { method, condition, reason })
        };
        let mib = bytes >> 20;
        let small = || {
            let limit = SOFT_DIRTY_UP_TO >> 20;
            let other = self.target != Target::Own && bytes <= SOFT_DIRTY_UP_TO;
            other.then_some(())?;
            chosen(
                Method::SoftDirty,
                format!(
                    "{mib} MiB are walked in no time, and up to {limit} MiB that is less trouble \
                     than a system call in the name of {}",
                    self.target
                ),
            )
        };
        let preferred = || {
            chosen(
                Method::WpAsync,
                format!(
                    "nothing waits, neither at the first write to a page nor for a harvest of {mib} \
                     MiB"
                ),
            )
        };
        // Each of the rest has its price, and is taken for want of the one before.
        let bits = || {
            chosen(
                Method::SoftDirty,
                format!("asynchronous write protection is missing ({})", missing(Method::WpAsync)),
            )
        };
        let blocking = || {
            chosen(
                Method::WpBlocking,
                format!(
                    "asynchronous write protection is missing ({}); every first write to a page \
                     waits",
                    missing(Method::WpAsync)
                ),
            )
        };
        let rest = || match self.target {
            // That a process has one thread does not last.
            Target::Own => blocking().or_else(bits),
            Target::Process(_) => bits().or_else(blocking),
        };
        small().or_else(preferred).or_else(rest).ok_or_else(|| NoMethod(self.clone()))
    }
}

/// Tracks four pages of this process.
fn try_tracker<T: Tracker>(
    make: impl FnOnce(Arc<Mapping>) -> Result<T, DirtyError>,
) -> Result<(), String> {
    let page = PageSize::base().bytes();
    let memory = Mapping::anonymous(4 * page).map_err(|error| error.to_string())?;
    let memory = Arc::new(memory);
    let attempt = || -> Result<[Vec<_>; 2], DirtyError> {
        let mut tracker = make(Arc::clone(&memory))?;
        let tracked = [Tracked::base(memory.range())];
        tracker.arm(&tracked)?;
        let set = DirtySet::new(&tracked)?;
        memory.write_at(2 * page, &[1]).expect("inside of the mapping");
        tracker.harvest(&set)?;
        let first = set.take();
        tracker.harvest(&set)?;
        tracker.disarm()?;
        Ok([first, set.take()])
    };
    let found = attempt().map_err(|error| error.to_string())?;
    if found == [vec![memory.range().skip(2 * page).take(page)], vec![]] {
        return Ok(());
    }
    Err(format!("one page was written, and these were reported: {found:?}"))
}

/// Whether the soft-dirty bits of a process may be read and cleared.
fn may_clear(target: Target) -> Result<(), String> {
    Pagemap::open(target.pid()).map_err(|error| error.to_string())?;
    let path = target.path("clear_refs");
    match OpenOptions::new().write(true).open(&path) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("cannot open {path}: {error}")),
    }
}

/// Whether a process may be traced, which is what it takes to have it open a userfaultfd. Asking for
/// a descriptor that it cannot have tells, and changes nothing.
fn may_trace(pid: u32) -> Result<(), String> {
    let pidfd = pidfd(pid).map_err(|error| error.to_string())?;
    match rustix::process::pidfd_getfd(
        pidfd.as_fd(),
        i32::MAX,
        rustix::process::PidfdGetfdFlags::empty(),
    ) {
        Ok(_) | Err(Errno::BADF) => Ok(()),
        // Its first thread has no descriptors any more; if others have, asking them tells.
        Err(Errno::SRCH) if !has_ended(&pidfd) => Ok(()),
        Err(Errno::PERM) => Err(format!(
            "process {pid} may not be traced: that takes its user's rights or CAP_SYS_PTRACE, and \
             kernel.yama.ptrace_scope to allow it"
        )),
        Err(errno) => Err(format!("process {pid} may not be traced: {errno}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(target: Target, abilities: [Option<Condition>; 3], there: [bool; 3]) -> Report {
        let names = [Method::WpAsync, Method::WpBlocking, Method::SoftDirty];
        let methods = (0..3).map(|index| {
            let ability = match (there[index], abilities[index]) {
                (true, None) => Ability::Works,
                (true, Some(condition)) => Ability::Needs(condition),
                (false, _) => Ability::Missing(format!("no {}", names[index])),
            };
            (names[index], ability)
        });
        Report { target, methods: methods.collect() }
    }

    #[test]
    fn what_is_chosen_and_why() {
        let own = |there| report(Target::Own, [None, None, Some(Condition::OneThread)], there);
        let (fd, stopped) = (Some(Condition::Userfaultfd), Some(Condition::Stopped));
        let other = |there| report(Target::Process(1), [fd, fd, stopped], there);
        let (small, large) = (SOFT_DIRTY_UP_TO, SOFT_DIRTY_UP_TO + 1);
        let cases = [
            (own([true; 3]), small, Method::WpAsync, None, "nothing waits"),
            (own([false, true, true]), small, Method::WpBlocking, None, "no wp-async"),
            (
                own([false, false, true]),
                large,
                Method::SoftDirty,
                Some(Condition::OneThread),
                "no wp-async",
            ),
            (other([true; 3]), small, Method::SoftDirty, stopped, "4 MiB"),
            (other([true; 3]), large, Method::WpAsync, fd, "nothing waits"),
            (other([true, true, false]), small, Method::WpAsync, fd, "nothing waits"),
            (other([false, true, true]), large, Method::SoftDirty, stopped, "no wp-async"),
            (other([false, true, false]), large, Method::WpBlocking, fd, "waits"),
        ];
        for (report, bytes, method, condition, reason) in cases {
            let choice = report.choose(bytes).unwrap();
            assert_eq!((choice.method, choice.condition), (method, condition), "{report:?}");
            assert!(choice.reason.contains(reason), "{}", choice.reason);
        }
        let error = own([false; 3]).choose(small).unwrap_err().to_string();
        for part in ["this process", "wp-async: missing: no wp-async", "soft-dirty"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn a_process_that_never_was_cannot_be_tracked() {
        let error = choose(Target::Process(u32::MAX), 1).unwrap_err();
        assert!(error.0.methods.iter().all(|(_, ability)| matches!(ability, Ability::Missing(_))));
    }
}
