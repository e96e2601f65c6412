//! Faults, and the operations that answer them.

use std::time::Duration;

use rustix::io::Errno;

use super::{
    Shortfall,
    area::{self, Area, Backing},
    lab::{Lab, PAGES, done, done_soon, poll},
    missing,
};
use crate::{CopyMode, FaultKind, Features, Mapped, OpenWay, Options, RegisterMode, Wake};

fn expect(what: &str, found: u8, wanted: u8) -> Result<(), Shortfall> {
    if found == wanted {
        return Ok(());
    }
    missing(format!("{what} is {found:#04x} where {wanted:#04x} was installed"))
}

fn serve_missing(features: Features, backing: Backing) -> Result<(), Shortfall> {
    let lab = Lab::new(features, backing, RegisterMode::MISSING)?;
    let (_, byte) = lab.fault(
        FaultKind::Missing,
        |area| area.read(0),
        |lab, _| lab.copy(lab.area.page(0), 0x5a, CopyMode::WAKE),
    )?;
    expect("the page", byte, 0x5a)
}

pub(super) fn missing_anonymous() -> Result<(), Shortfall> {
    serve_missing(Features::empty(), Backing::Anonymous)
}

pub(super) fn missing_memfd() -> Result<(), Shortfall> {
    serve_missing(Features::MISSING_SHMEM, Backing::Memfd)
}

pub(super) fn missing_hugetlb() -> Result<(), Shortfall> {
    serve_missing(Features::MISSING_HUGETLBFS, Backing::Hugetlb2M)
}

fn serve_minor(features: Features, backing: Backing) -> Result<(), Shortfall> {
    let lab = Lab::new(features, backing, RegisterMode::MINOR)?;
    let alias = lab.area.alias()?;
    alias.write(0, 0x5a);
    let (_, byte) = lab.fault(
        FaultKind::Minor,
        |area| area.read(0),
        |lab, _| done(lab.uffd.continue_range(lab.area.page(0), CopyMode::WAKE)?),
    )?;
    expect("the page", byte, 0x5a)
}

pub(super) fn minor_memfd() -> Result<(), Shortfall> {
    serve_minor(Features::MINOR_SHMEM, Backing::Memfd)
}

pub(super) fn minor_hugetlb() -> Result<(), Shortfall> {
    serve_minor(Features::MINOR_HUGETLBFS, Backing::Hugetlb2M)
}

pub(super) fn kernel_fault() -> Result<(), Shortfall> {
    let uffd = Options::new().ways([OpenWay::DeviceNode, OpenWay::Syscall]).open()?;
    let area = Area::new(Backing::Anonymous, PAGES)?;
    area::register(&uffd, &area, RegisterMode::MISSING)?;
    let lab = Lab { uffd, area: area.into() };
    let (fault, result) = lab.fault(
        FaultKind::Missing,
        |area| area.write_by_kernel(1),
        |lab, _| lab.copy(lab.area.page(0), 0x5a, CopyMode::WAKE),
    )?;
    result?;
    if !fault.write {
        return missing("the fault of a write came as one of a read");
    }
    expect("the byte the kernel wrote", lab.area.read(1), 0xee)?;
    expect("the page around it", lab.area.read(0), 0x5a)
}

pub(super) fn zeropage() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::empty(), Backing::Anonymous, RegisterMode::MISSING)?;
    let (_, byte) = lab.fault(
        FaultKind::Missing,
        |area| area.read(0),
        |lab, _| done(lab.uffd.zeropage(lab.area.page(0), Wake::Yes)?),
    )?;
    expect("the page", byte, 0)
}

pub(super) fn dont_wake() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::empty(), Backing::Anonymous, RegisterMode::MISSING)?;
    let (ended, alive) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (_, byte) = lab.fault(
        FaultKind::Missing,
        move |area| {
            let byte = area.read(0);
            drop(alive);
            byte
        },
        |lab, _| {
            let page = lab.area.page(0);
            lab.copy(page, 0x5a, CopyMode::NO_WAKE)?;
            let (_, woken) = poll(&lab.uffd, &ended, Duration::from_millis(20))?;
            lab.uffd.wake(page)?;
            if woken { missing("the thread was woken all the same") } else { Ok(()) }
        },
    )?;
    expect("the page", byte, 0x5a)
}

pub(super) fn poison() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::POISON, Backing::Anonymous, RegisterMode::MISSING)?;
    let page = lab.area.page(0);
    done(lab.uffd.poison(page, Wake::Yes)?)?;
    // Through the kernel: in user mode the access would be a signal to the whole process.
    match lab.attend(|area| area.write_by_kernel(0), |_| missing("the page still raises faults"))? {
        Err(Errno::FAULT | Errno::HWPOISON) => {}
        Err(errno) => return missing(format!("the poisoned page answers {errno}")),
        Ok(()) => return missing("the poisoned page can be written"),
    }
    lab.copy(page, 0x5a, CopyMode::WAKE)?;
    expect("the page copied over the poison", lab.area.read(0), 0x5a)
}

pub(super) fn move_pages() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::MOVE, Backing::Anonymous, RegisterMode::MISSING)?;
    let source = Area::new(Backing::Anonymous, 1)?;
    source.write(0, 0x5a);
    let (_, byte) = lab.fault(
        FaultKind::Missing,
        |area| area.read(0),
        |lab, _| done_soon(|| area::move_pages(&lab.uffd, lab.area.page(0), &source)),
    )?;
    expect("the page", byte, 0x5a)?;
    expect("the page it was moved from", source.read(0), 0)
}

pub(super) fn sigbus() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::SIGBUS, Backing::Anonymous, RegisterMode::MISSING)?;
    match lab.attend(|area| area.write_by_kernel(0), |_| missing("the access raised an event"))? {
        Err(Errno::FAULT) => Ok(()),
        Err(errno) => missing(format!("the access ended with {errno}")),
        Ok(()) => missing("the access succeeded"),
    }
}

pub(super) fn thread_id() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::THREAD_ID, Backing::Anonymous, RegisterMode::MISSING)?;
    let (fault, thread) = lab.fault(
        FaultKind::Missing,
        |area| {
            area.read(0);
            rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
        },
        |lab, _| lab.copy(lab.area.page(0), 0, CopyMode::WAKE),
    )?;
    if fault.thread == Some(thread) {
        return Ok(());
    }
    missing(format!("the fault of thread {thread} came as one of {:?}", fault.thread))
}

pub(super) fn exact_address() -> Result<(), Shortfall> {
    let lab = Lab::new(Features::EXACT_ADDRESS, Backing::Anonymous, RegisterMode::MISSING)?;
    let (fault, _) = lab.fault(
        FaultKind::Missing,
        |area| area.read(0x123),
        |lab, _| lab.copy(lab.area.page(0), 0, CopyMode::WAKE),
    )?;
    let wanted = lab.area.range().skip(0x123).start();
    if fault.address == wanted {
        return Ok(());
    }
    missing(format!("the fault at {wanted} came as one at {}", fault.address))
}
