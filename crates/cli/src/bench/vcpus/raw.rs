//! The yardsticks: for each delivery the smallest loop around KVM_RUN and the same system calls, as
//! one would write it in C; and the loop of the manual page.
//!
//! The machine and its guest are the same as everybody's. What serves the faults uses none of the
//! library: no page map, no source, no statistics and no events; an error ends the run.

mod exit;

use std::{
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use linux_raw_sys::general::{
    UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_POISON,
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING,
};
use pageferry::{memory::GuestAddress, paging::Delivery};
use pageferry_vmm::{KvmRun, Pattern, Vm};

use self::exit::ExitLoop;
use super::{
    super::{
        case::{Kind, PAGE, split},
        reference::{
            Install, Loop, queue,
            sys::{self, Range},
        },
    },
    case::{Case, Measurement},
    machine,
};
use crate::signals::Signals;

pub(super) const NAME: &str = "raw";
pub(super) const READER: &str = "reader";

/// Serves `case` once with the smallest loop for its delivery.
pub(super) fn run(case: &Case, signals: &Signals) -> anyhow::Result<Measurement> {
    let vm = machine::build(case)?;
    let measured = match case.resolved.served {
        None => machine::run(&vm, |_| Box::new(KvmRun), signals)?.0,
        Some(delivery) => serve(&vm, case, delivery, case.batch, signals)?,
    };
    machine::verify(&vm, case, &measured)?;
    Ok(measured)
}

/// Serves `case` once as the example of userfaultfd(2) does, whatever its delivery: one thread, one
/// message per read(2), poll(2) before each.
pub(super) fn reader(case: &Case, signals: &Signals) -> anyhow::Result<Measurement> {
    let vm = machine::build(case)?;
    let measured = serve(&vm, case, Delivery::Queue, 1, signals)?;
    machine::verify(&vm, case, &measured)?;
    Ok(measured)
}

/// One region as KVM has it.
#[derive(Copy, Clone, Debug)]
struct Part {
    kvm: Range,
    guest: u64,
    /// What to add to an address of KVM's view to get to where bytes are written.
    to_fill: Option<isize>,
}

/// Makes the pages of a machine present.
#[derive(Debug)]
struct Pages {
    parts: Vec<Part>,
    /// To CONTINUE what is filled, or to COPY.
    minor: bool,
    delay: Duration,
    installed: AtomicU64,
}

impl Pages {
    fn new(vm: &Vm, case: &Case) -> Self {
        let layout = vm.layout();
        let parts = layout.iter().map(|(_, region)| {
            let kvm = region.kvm_view();
            let fill = region.fill_view().map(|fill| fill.as_ptr() as isize);
            Part {
                kvm: Range { start: kvm.as_ptr() as u64, len: region.len() },
                guest: region.guest_base().get(),
                to_fill: fill.map(|fill| fill - kvm.as_ptr() as isize),
            }
        });
        Self {
            parts: parts.collect(),
            minor: case.setup.kind() == Kind::Minor,
            delay: case.delay,
            installed: AtomicU64::new(0),
        }
    }

    fn part(&self, address: u64) -> Option<&Part> {
        self.parts.iter().find(|part| address.wrapping_sub(part.kvm.start) < part.kvm.len)
    }

    /// Where KVM has what the guest has at `guest`.
    fn of_guest(&self, guest: u64) -> Option<u64> {
        let part = self.parts.iter().find(|part| guest.wrapping_sub(part.guest) < part.kvm.len)?;
        Some(part.kvm.start + (guest - part.guest))
    }
}

impl Install for Pages {
    #[inline]
    unsafe fn install(&self, uffd: RawFd, address: u64, wake: bool) -> i32 {
        let Some(part) = self.part(address) else { return libc::EFAULT };
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        self.installed.fetch_add(1, Relaxed);
        let guest = part.guest + (address - part.kvm.start);
        if self.minor {
            let Some(to_fill) = part.to_fill else { return libc::EFAULT };
            let to = (address as *mut u8).wrapping_offset(to_fill);
            // SAFETY: the fill view is as long as KVM's, so this is a page of it; nobody else
            // accesses it before it is made present.
            let page = unsafe { std::slice::from_raw_parts_mut(to, PAGE) };
            Pattern::default().fill(GuestAddress::new(guest), page);
            // SAFETY: as the caller promises.
            unsafe { sys::make_present(uffd, address, PAGE as u64, wake) }
        } else {
            let words: [u64; PAGE / 8] = std::array::from_fn(|word| {
                Pattern::default().word(GuestAddress::new(guest + 8 * word as u64))
            });
            // SAFETY: the words are a page, and the rest is as the caller promises.
            unsafe { sys::copy(uffd, address, words.as_ptr().cast(), PAGE as u64, wake) }
        }
    }
}

/// Sets up a loop for `delivery`, runs the guest against it, and ends it.
fn serve(
    vm: &Vm,
    case: &Case,
    delivery: Delivery,
    batch: usize,
    signals: &Signals,
) -> anyhow::Result<Measurement> {
    let pages = Pages::new(vm, case);
    let shards = if let Delivery::Sharded(shards) = delivery { shards.into() } else { 1 };
    let mut uffds = Vec::new();
    let mut registered = Vec::new();
    for shard in 0..shards {
        let uffd = open(case, delivery)?;
        for (_, region) in vm.layout().iter() {
            let pages = split(region.granules() as usize, shards, shard);
            if pages.is_empty() {
                continue;
            }
            // The guest's view, if KVM has one of its own: nobody touches it, but its readers wait.
            for view in std::iter::once(region.guest_view()).chain(region.vcpu_view()) {
                let start = view.as_ptr() as u64 + (pages.start * PAGE) as u64;
                let range = Range { start, len: (pages.len() * PAGE) as u64 };
                let mode = match case.setup.kind() {
                    Kind::Missing => UFFDIO_REGISTER_MODE_MISSING,
                    Kind::Minor => UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
                };
                sys::register(uffd.as_raw_fd(), range, mode.into()).with_context(|| {
                    format!("registering memory for {} faults", case.setup.kind())
                })?;
                registered.push(range);
            }
        }
        uffds.push(uffd);
    }
    let fds: Vec<RawFd> = uffds.iter().map(|uffd| uffd.as_raw_fd()).collect();
    if delivery.exits() {
        for part in &pages.parts {
            sys::poison(fds[0], part.kvm).context("marking absent pages")?;
        }
    }
    let shared = Loop::new(pages, registered)?;
    let by_queue = || machine::run(vm, |_| Box::new(KvmRun), signals);
    let by_exit = || machine::run(vm, |_| Box::new(ExitLoop::new(&shared, fds[0])), signals);
    let ran = match delivery {
        Delivery::Queue | Delivery::Sharded(_) => queue::serve(&shared, &fds, 1, batch, by_queue),
        Delivery::QueueN(readers) => queue::serve(&shared, &fds, readers.into(), batch, by_queue),
        Delivery::Exit => by_exit(),
        Delivery::Hybrid(readers) => queue::serve(&shared, &fds, readers.into(), batch, by_exit),
        other => bail!("there is no loop to compare delivery {other} with"),
    };
    // What the guest met then follows from it.
    shared.check().context("installing a page")?;
    let (measured, _) = ran?;
    let installed = shared.installer().installed.load(Relaxed);
    ensure!(installed == case.pages, "{installed} of {} pages were installed", case.pages);
    for (_, region) in vm.layout().iter() {
        region.page_map().set_present(region.all_granules());
    }
    Ok(measured)
}

/// Opens a userfaultfd with what the case needs.
fn open(case: &Case, delivery: Delivery) -> anyhow::Result<OwnedFd> {
    let mut features = match case.setup.kind() {
        Kind::Missing => 0,
        Kind::Minor => UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM,
    };
    if delivery.exits() {
        features |= UFFD_FEATURE_POISON;
    }
    sys::open_for_kernel(features.into())
        .with_context(|| format!("a userfaultfd with features {features:#x}"))
}
