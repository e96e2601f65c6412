//! Getting at a process: a method, and what it needs.

use std::time::{Duration, Instant};

use pageferry_memory::PageSize;
use pageferry_process::{Mapping, Pid, Process, ProcessError, StopMethod, UserfaultfdRequest};
use pageferry_uffd::{HostAddress, HostRange, Pagemap, PagemapEntry, Userfaultfd};

use super::{
    AttachOptions, ProcessTrackError,
    bits::Bits,
    protection::{Protection, features},
};
use crate::{Ability, Choice, Condition, Method, Report, Target, probe, soft_dirty};

/// A method in use.
pub(super) struct Means {
    pub(super) means: super::Means,
    pub(super) choice: Choice,
    pub(super) stopped: Duration,
}

/// Chooses a method, unless one is asked for, and prepares what it needs.
pub(super) fn means(
    process: &Process,
    options: &AttachOptions,
    mappings: &[Mapping],
) -> Result<Means, ProcessTrackError> {
    let pid = process.pid();
    let target = Target::Process(pid.as_raw_nonzero().get().unsigned_abs());
    if let Some(method) = options.method {
        let choice = Choice { method, condition: None, reason: "it was asked for".to_owned() };
        return prepare(process, options, choice);
    }
    let report = probe(target);
    let choice = report.choose(resident(mappings));
    process.check()?;
    let choice = choice?;
    if choice.method == Method::SoftDirty {
        return prepare(process, options, choice);
    }
    match prepare(process, options, choice) {
        // That it lets a descriptor be opened can only be known by asking it.
        Err(ProcessTrackError::Process(error)) if is_refusal(&error) && has_bits(&report) => {
            let reason = format!("no userfaultfd can be had: {error}");
            let choice = Choice { method: Method::SoftDirty, condition: None, reason };
            prepare(process, options, choice)
        }
        result => result,
    }
}

/// The memory that has to be walked.
fn resident(mappings: &[Mapping]) -> u64 {
    let details = mappings.iter().filter_map(|mapping| mapping.details);
    details.map(|details| details.resident + details.swapped).sum()
}

fn has_bits(report: &Report) -> bool {
    !matches!(report.find(Method::SoftDirty), None | Some(Ability::Missing(_)))
}

/// Whether the process does not let a system call be made in its name, or the call is refused to
/// it.
fn is_refusal(error: &ProcessError) -> bool {
    matches!(
        error,
        ProcessError::NoUserfaultfd { .. }
            | ProcessError::Confined { .. }
            | ProcessError::Dispatches { .. }
            | ProcessError::Bits32 { .. }
            | ProcessError::NoInstruction { .. }
    )
}

fn prepare(
    process: &Process,
    options: &AttachOptions,
    mut choice: Choice,
) -> Result<Means, ProcessTrackError> {
    let pid = process.pid();
    let (means, stopped) = match choice.method {
        Method::SoftDirty => {
            soft_dirty::kernel_has_it()?;
            (super::Means::Bits(Bits::new(process)?), Duration::ZERO)
        }
        method @ (Method::WpAsync | Method::WpBlocking) => {
            let blocking = method == Method::WpBlocking;
            let (uffd, stopped) = open(process, options, blocking)?;
            let protection = Protection::new(uffd, process, blocking)?;
            (super::Means::Protection(Box::new(protection)), stopped)
        }
        method => return Err(ProcessTrackError::NotForProcesses { pid, method }),
    };
    choice.condition = condition(choice.method);
    Ok(Means { means, choice, stopped })
}

/// What a method needs to track a process.
fn condition(method: Method) -> Option<Condition> {
    match method {
        Method::SoftDirty => Some(Condition::Stopped),
        Method::WpAsync | Method::WpBlocking => Some(Condition::Userfaultfd),
        _ => None,
    }
}

/// Has the process open a userfaultfd.
fn open(
    process: &Process,
    options: &AttachOptions,
    blocking: bool,
) -> Result<(Userfaultfd, Duration), ProcessTrackError> {
    // What can be known before need not be found out while it stands still.
    process.check_syscalls()?;
    let request = UserfaultfdRequest::new(features(blocking));
    let mut stopped = process.stop_with(options.stop.method(StopMethod::Ptrace))?;
    let since: Instant = stopped.since();
    let opened = stopped.open_userfaultfd(&request);
    let resumed = stopped.resume();
    let opened = opened?;
    Ok((opened, resumed.unwrap_or_else(|_| since.elapsed())))
}

/// The page map of the memory that a process has, by a thread that has it: the first one may have
/// ended before the others.
pub(super) fn a_pagemap(process: &Process) -> Result<(Pagemap, Pid), ProcessTrackError> {
    let pid = process.pid();
    let mut error = None;
    for thread in process.threads()? {
        let opened = Pagemap::open(thread.as_raw_nonzero().get().unsigned_abs());
        let tried = opened.and_then(|pagemap| {
            let range = HostRange::new(HostAddress::new(0), PageSize::base().bytes());
            let count = pagemap.read_entries(range, &mut [PagemapEntry::default()])?;
            Ok((pagemap, count))
        });
        match tried {
            Ok((pagemap, 1)) => {
                // Only now is it known whose it is.
                process.check()?;
                return Ok((pagemap, thread));
            }
            // Of a thread that has ended.
            Ok(_) => {}
            Err(source) => error = Some(source),
        }
    }
    process.check()?;
    Err(match error {
        Some(source) => ProcessTrackError::Pagemap { pid, source },
        None => ProcessTrackError::TargetExited { pid },
    })
}
