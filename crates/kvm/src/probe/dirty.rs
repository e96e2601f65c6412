//! Whether writes are found: one, and when it has been harvested, the next.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
};
use kvm_ioctls::Kvm;
use pageferry_memory::GranuleRange;

use super::{
    Answer, Shortfall,
    machine::{Machine, PORT, Ran, on_a_thread},
};
use crate::{
    KvmError,
    dirty::{Harvested, LogMode, RingSize},
};

const PAGES: u64 = 4;
const DATA_PAGE: u64 = 3;

/// Real mode, from page 1 on: writes to page 3, says so, and again.
const PROGRAM: [u8; 7] = [
    0xa2, 0x00, 0x30, // again: mov [0x3000], al: page 3
    0xe6, PORT, // out PORT, al
    0xeb, 0xf9, // jmp again
];

/// Of the rings that are tried, or the largest that there can be.
const RING_BYTES: u32 = 64 << 10;

/// Rings, and how large they can be.
pub(super) fn ring(kvm: &Kvm) -> (Answer, Option<u32>) {
    let caps = [
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, "acquire/release"),
        (KVM_CAP_DIRTY_LOG_RING, "total store order"),
    ];
    let announced = caps.into_iter().find_map(|(cap, name)| {
        let bytes = u32::try_from(kvm.check_extension_raw(cap.into())).ok()?;
        (bytes > 0).then_some((bytes, name))
    });
    let Some((largest, name)) = announced else {
        return (Err(Shortfall::Missing("not announced".to_owned())), None);
    };
    match harvest_ring(kvm, largest.min(RING_BYTES)) {
        Ok(()) => {
            let how = "a write harvested from a ring, and after its reset the next one";
            (Ok(format!("{how}; {name}, up to {} KiB a vCPU", largest / 1024)), Some(largest))
        }
        Err(why) => (Err(Shortfall::Missing(why)), None),
    }
}

fn harvest_ring(kvm: &Kvm, bytes: u32) -> Result<(), String> {
    let mut size = None;
    let machine = Machine::prepared(kvm, PAGES, &PROGRAM, |vm| {
        size = Some(RingSize::enable(vm, bytes).map_err(|error| error.to_string())?);
        Ok(())
    })?;
    let size = size.ok_or("no rings were enabled")?;
    let mut ring = machine.ring(size).map_err(|error| error.to_string())?;
    on_a_thread(machine, move |machine| {
        writes(machine)?;
        ring.arm().map_err(|error| error.to_string())?;
        one_by_one(machine, &mut |told| ring.harvest(told))?;
        ring.disarm().map_err(|error| error.to_string())
    })
}

/// The dirty log, cleared in ranges.
pub(super) fn manual_protect(kvm: &Kvm) -> Answer {
    let known = kvm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    if known <= 0 {
        return Err(Shortfall::Missing("not announced".to_owned()));
    }
    let modes = [(LogMode::Manual, 1), (LogMode::InitiallySet, 2)];
    for (mode, _) in modes.into_iter().filter(|(_, bit)| known & bit != 0) {
        let machine = Machine::prepared(kvm, PAGES, &PROGRAM, |_| Ok(()))?;
        let mut log = machine.log(mode).map_err(|error| error.to_string())?;
        on_a_thread(machine, move |machine| {
            writes(machine)?;
            log.arm().map_err(|error| error.to_string())?;
            let first = pages(&mut |told| log.harvest(told))?;
            let all: Vec<u64> = (0..PAGES).collect();
            if first != if mode == LogMode::InitiallySet { all } else { vec![] } {
                return Err(format!("a log in mode {mode:?} begins with pages {first:?}"));
            }
            one_by_one(machine, &mut |told| log.harvest(told))?;
            log.disarm().map_err(|error| error.to_string())
        })?;
    }
    Ok(format!("a write harvested, and after its clear the next one; modes {known:#x}"))
}

type Harvest<'h> =
    &'h mut dyn FnMut(&mut dyn FnMut(u32, GranuleRange)) -> Result<Harvested, KvmError>;

fn pages(harvest: Harvest<'_>) -> Result<Vec<u64>, String> {
    let mut pages = Vec::new();
    harvest(&mut |_, run| pages.extend(run.iter().map(|page| page.get())))
        .map_err(|error| error.to_string())?;
    Ok(pages)
}

fn writes(machine: &mut Machine) -> Result<(), String> {
    match machine.run()? {
        Ran::Out(_) => Ok(()),
        other => Err(format!("a guest that writes to a page: {other:?}")),
    }
}

fn one_by_one(machine: &mut Machine, harvest: Harvest<'_>) -> Result<(), String> {
    for _ in 0..3 {
        writes(machine)?;
        let found = [pages(harvest)?, pages(harvest)?];
        // Pages may be told that were not written.
        if !found[0].contains(&DATA_PAGE) || !found[1].is_empty() {
            return Err(format!("page {DATA_PAGE} was written, and harvested were {found:?}"));
        }
    }
    Ok(())
}
