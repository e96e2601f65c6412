//! Before the threads that are to be stopped.
//!
//! Until the last thread has been asked to stop, and from when the first has been let go, the
//! threads of the other process compete with the one that traces them: those that compute take the
//! CPU from it for some milliseconds at a time, and the others stand still meanwhile.

use crate::sys::sched::{self, Policy};

/// How the thread that traces is scheduled. It was made for that and ends with it, so that no other
/// thread of this process is ever scheduled in another way than it was.
#[derive(Debug)]
pub(super) struct Precedence(Option<Policies>);

#[derive(Copy, Clone, Debug)]
struct Policies {
    /// Mostly, while it waits for threads that need a CPU, perhaps its own: as others are. It is not
    /// favoured then: where it is in one group of processes with them, the kernel divides what is the
    /// group's among the CPUs by the weight of its threads there, so that a heavy one on one CPU
    /// leaves next to nothing to those on another.
    patient: Policy,
    /// While it does what does not wait for anybody.
    urgent: Policy,
}

impl Precedence {
    /// What the calling thread may have of it. Who may have none goes without.
    pub(super) fn take() -> Self {
        let Ok(now) = sched::policy() else { return Self(None) };
        let policies = match now {
            Policy::Shared { .. } => {
                Policies { patient: now, urgent: Policy::RealTime { priority: 1 } }
            }
            // A thread gets the priority of its maker. With that it would wait, as it does by
            // yielding, for threads that it does not let run.
            Policy::RealTime { .. } => {
                Policies { patient: Policy::Shared { nice: 0 }, urgent: now }
            }
        };
        // Tried now, when nobody has been stopped yet.
        let allowed = [policies.patient, policies.urgent, policies.patient]
            .into_iter()
            .all(|policy| sched::set_policy(policy).is_ok());
        Self(allowed.then_some(policies))
    }

    /// Does what waits for nobody, before all threads that share the CPUs.
    pub(super) fn first<R>(&self, work: impl FnOnce() -> R) -> R {
        let Some(Policies { patient, urgent }) = self.0 else { return work() };
        // It was allowed before; where it is not any more, this takes longer.
        let _ = sched::set_policy(urgent);
        let done = work();
        // To have less is always allowed.
        let _ = sched::set_policy(patient);
        done
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use pageferry_testing::{
        child,
        target::{self, Target},
    };

    use super::*;
    use crate::{Process, StopMethod, StopOptions};

    const USUAL: Policy = Policy::RealTime { priority: 1 };

    fn now() -> Policy {
        sched::policy().unwrap()
    }

    /// Whether this process may be scheduled before others; says so if not.
    fn is_allowed() -> bool {
        let allowed = thread::spawn(|| sched::set_policy(USUAL)).join().unwrap();
        if let Err(errno) = allowed {
            println!("skipped: needs CAP_SYS_NICE: {errno}");
        }
        allowed.is_ok()
    }

    #[test]
    fn it_is_first_only_where_it_does_not_wait() {
        if !is_allowed() {
            return;
        }
        // How its maker is scheduled, and how it is then.
        let real_time = Policy::RealTime { priority: 5 };
        for (maker, patient, urgent) in [
            (now(), now(), USUAL),
            (Policy::Shared { nice: 5 }, Policy::Shared { nice: 5 }, USUAL),
            (real_time, Policy::Shared { nice: 0 }, real_time),
        ] {
            let made = thread::spawn(move || {
                sched::set_policy(maker).unwrap();
                let before = now();
                let seen = thread::spawn(move || {
                    assert_eq!(now(), before);
                    let precedence = Precedence::take();
                    let first = now();
                    [first, precedence.first(now), now(), precedence.first(now), now()]
                });
                let seen = seen.join().unwrap();
                assert_eq!(now(), before, "the maker's is its own");
                seen
            });
            let expected = [patient, urgent, patient, urgent, patient];
            assert_eq!(made.join().unwrap(), expected, "{maker:?}");
        }
    }

    #[test]
    fn who_may_have_none_goes_without() {
        // As much as it takes to be refused everything, of this thread alone.
        let seen = thread::spawn(|| {
            sched::set_policy(Policy::Shared { nice: 5 }).unwrap();
            if !rustix::process::geteuid().is_root() {
                println!("skipped: needs root, to lose its rights");
                return None;
            }
            rustix::thread::set_capabilities(
                None,
                rustix::thread::CapabilitySets {
                    effective: rustix::thread::CapabilitySet::empty(),
                    permitted: rustix::thread::CapabilitySet::empty(),
                    inheritable: rustix::thread::CapabilitySet::empty(),
                },
            )
            .unwrap();
            let precedence = Precedence::take();
            Some([now(), precedence.first(now), now()])
        });
        let Some(seen) = seen.join().unwrap() else { return };
        assert_eq!(seen, [Policy::Shared { nice: 5 }; 3]);
    }

    #[test]
    fn no_thread_stays_first() {
        const ME: &str = "stop::precedence::tests::no_thread_stays_first";
        if child::case().is_some() {
            target::alone();
            target::tell("here");
            target::listen();
        }
        let target = Target::start_alone(ME, "wait");
        assert_eq!(target.hear(), "here");
        let process = Process::open(target.pid()).unwrap();
        let path = format!("/proc/{}/sched", target.pid());
        // Of threads of its own, and of those that are stopped.
        let policies = || {
            (
                now(),
                std::fs::read_to_string(&path).ok().map(|text| {
                    text.lines()
                        .filter(|line| line.starts_with("policy") || line.starts_with("prio"))
                        .map(str::to_owned)
                        .collect::<Vec<_>>()
                }),
            )
        };
        let before = policies();
        let options = StopOptions::default().method(StopMethod::Ptrace);
        for patience in [Duration::from_secs(30), Duration::ZERO] {
            // With no patience it may fail, or not.
            let stopped = process.stop_with(options.patience(patience));
            assert_eq!(policies(), before);
            drop(stopped);
            assert_eq!(policies(), before);
        }
    }
}
