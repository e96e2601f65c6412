//! Opening, and the events other than faults.

use super::{
    Shortfall,
    area::{Area, Backing},
    lab::{Lab, attend},
    missing,
};
use crate::{Event, Features, HostRange, Mapped, OpenWay, Options, RegisterMode};

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

pub(super) fn event_fork() -> Result<(), Shortfall> {
    Options::new().required(Features::EVENT_FORK).open()?;
    Err(Shortfall::Untested(
        "the kernel grants it; forking the calling process to see it could disturb its threads"
            .to_owned(),
    ))
}
