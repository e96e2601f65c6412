//! Opening, and the events other than faults.

use std::{os::unix::process::CommandExt as _, process::Command, sync::Mutex};

use rustix::io::Errno;

use super::{
    Shortfall,
    area::{Area, Backing},
    lab::{Lab, attend},
    missing,
};
use crate::{
    Event, Features, HostRange, Mapped, OpenWay, Options, Outcome, RegisterMode, Userfaultfd, Wake,
};

fn open_by(way: OpenWay) -> Result<(), Shortfall> {
    Options::new().ways([way]).open()?;
    Ok(())
}

pub(super) fn open_device() -> Result<(), Shortfall> {
    open_by(OpenWay::DeviceNode)
}

pub(super) fn open_syscall() -> Result<(), Shortfall> {
    open_by(OpenWay::Syscall)
}

pub(super) fn open_user_mode_only() -> Result<(), Shortfall> {
    open_by(OpenWay::SyscallUserModeOnly)
}

/// Runs `action` and expects just the event that `wanted` accepts.
fn expect_event<T: Send + 'static>(
    lab: &Lab,
    action: impl FnOnce() -> T + Send + 'static,
    wanted: impl Fn(&Event) -> bool,
) -> Result<T, Shortfall> {
    let mut seen = false;
    let value = attend(&lab.uffd, action, |event| {
        if seen || !wanted(&event) {
            return missing(format!("an unexpected event came: {event:?}"));
        }
        seen = true;
        Ok(())
    })?;
    if seen { Ok(value) } else { missing("no event came") }
}

/// A lab whose area is a guest of the check, which is free to move and unmap it.
fn event_lab(feature: Features) -> Result<(Lab, Area, HostRange), Shortfall> {
    let lab = Lab::new(feature, Backing::Anonymous, RegisterMode::MISSING)?;
    let area = Area::new(Backing::Anonymous, 2)?;
    super::area::register(&lab.uffd, &area, RegisterMode::MISSING)?;
    let range = area.range();
    Ok((lab, area, range))
}

pub(super) fn event_remove() -> Result<(), Shortfall> {
    let (lab, area, range) = event_lab(Features::EVENT_REMOVE)?;
    expect_event(
        &lab,
        move || area.discard(),
        |event| matches!(event, Event::Remove(removed) if *removed == range),
    )??;
    Ok(())
}

pub(super) fn event_remap() -> Result<(), Shortfall> {
    let (lab, area, range) = event_lab(Features::EVENT_REMAP)?;
    let target = Area::new(Backing::Anonymous, 2)?;
    let there = target.range().start();
    expect_event(
        &lab,
        move || area.move_onto(target),
        |event| {
            matches!(event, Event::Remap { from, to, len }
                if *from == range.start() && *to == there && *len == range.len())
        },
    )??;
    Ok(())
}

pub(super) fn event_unmap() -> Result<(), Shortfall> {
    let (lab, area, range) = event_lab(Features::EVENT_UNMAP)?;
    expect_event(
        &lab,
        move || drop(area),
        |event| matches!(event, Event::Unmap(unmapped) if *unmapped == range),
    )
}

/// A fork waits for the readers of all userfaultfds of the process that follow forks: were there
/// two of ours, the other might not be reading yet, but allocating, and so wait for this fork.
static FORKING: Mutex<()> = Mutex::new(());

pub(super) fn event_fork() -> Result<(), Shortfall> {
    let _forking = FORKING.lock();
    let (lab, _area, range) = event_lab(Features::EVENT_FORK)?;
    let mut of_child = None;
    let forked = attend(&lab.uffd, fork, |event| match event {
        Event::Fork { uffd } if of_child.is_none() => {
            of_child = Some(uffd);
            Ok(())
        }
        other => missing(format!("an unexpected event came: {other:?}")),
    })?;
    forked?;
    let Some(descriptor) = of_child else { return missing("no event came") };
    let enabled = lab.uffd.negotiated().enabled;
    let child =
        Userfaultfd::from_received_fd(descriptor, enabled, lab.uffd.negotiated().opened_by)?;
    // It is of the child, which has ended.
    match child.zeropage(range, Wake::No)? {
        Outcome::ProcessGone { done: 0 } => Ok(()),
        outcome => missing(format!("the child has ended, and ZEROPAGE there: {outcome:?}")),
    }
}

/// Forks this process. The child ends at once.
fn fork() -> Result<(), Shortfall> {
    // The standard library forks, instead of spawning in the parent's memory, for this: it runs in
    // the child, where its error ends it before any program is run.
    let mut command = Command::new("/nonexistent");
    // SAFETY: makes an error of a number, which neither allocates nor takes a lock.
    unsafe { command.pre_exec(|| Err(Errno::CANCELED.into())) };
    match command.spawn() {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::CANCELED) => Ok(()),
        Err(error) => missing(format!("forking: {error}")),
        Ok(_) => missing("the child went on"),
    }
}
