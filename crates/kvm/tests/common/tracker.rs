//! KVM's trackers of writes, with a guest.

use std::collections::BTreeSet;

use pageferry_kvm::{
    KvmError,
    dirty::{DirtyLog, DirtyRing, Harvested, LogMode, RingSize, TrackedSlot, WriteMarks},
    probe,
};
use pageferry_memory::{GranuleRange, GuestAddress};
use pageferry_paging::Delivery;

use super::{BASE, Config, Guest, Machine, Vcpu, kvm};

/// KVM_EXIT_DIRTY_RING_FULL.
pub const RING_FULL: u32 = 31;

pub const MOV_RAX: [u8; 3] = [0x48, 0x8b, 0x07]; // mov rax, [rdi]
pub const MOV_TO: [u8; 3] = [0x48, 0x89, 0x07]; // mov [rdi], rax

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Method {
    Log(LogMode),
    /// With rings of this many bytes; 0: the smallest.
    Ring(u32),
}

pub const METHODS: [Method; 5] = [
    Method::Log(LogMode::Automatic),
    Method::Log(LogMode::Manual),
    Method::Log(LogMode::InitiallySet),
    Method::Ring(0),
    Method::Ring(64 << 10),
];

pub enum Tracker {
    Log(DirtyLog),
    Ring(DirtyRing),
}

impl Tracker {
    pub fn arm(&mut self) -> Result<(), KvmError> {
        match self {
            Self::Log(log) => log.arm(),
            Self::Ring(ring) => ring.arm(),
        }
    }

    pub fn harvest(
        &mut self,
        told: &mut dyn FnMut(u32, GranuleRange),
    ) -> Result<Harvested, KvmError> {
        match self {
            Self::Log(log) => log.harvest(told),
            Self::Ring(ring) => ring.harvest(told),
        }
    }

    pub fn disarm(&mut self) -> Result<(), KvmError> {
        match self {
            Self::Log(log) => log.disarm(),
            Self::Ring(ring) => ring.disarm(),
        }
    }

    /// The pages of slot 0 that are told, of which none is told twice.
    #[track_caller]
    pub fn pages(&mut self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        let harvested = self
            .harvest(&mut |slot, run| {
                assert_eq!(slot, 0);
                for page in run.iter() {
                    assert!(pages.insert(page.get()), "page {page} is told twice");
                }
            })
            .unwrap();
        assert_eq!(harvested.pages, pages.len() as u64);
        pages
    }
}

/// How faults can be delivered here, exits first; empty, and says so, without KVM.
pub fn deliveries() -> Vec<Delivery> {
    if !kvm() {
        return Vec::new();
    }
    let exits = probe::host().works(probe::POISON_EXITS);
    exits.then_some(Delivery::Exit).into_iter().chain([Delivery::Queue]).collect()
}

/// The smallest rings that KVM gives here.
pub fn enable_smallest(guest: &Machine) -> Result<RingSize, KvmError> {
    (12..=20)
        .map(|shift| RingSize::enable(&guest.vm, 1 << shift))
        .reduce(Result::or)
        .expect("some sizes")
}

/// A guest of so many vCPUs with a tracker of its paged memory; or says what is missing.
pub fn tracked(
    method: Method,
    config: Config,
    vcpus: u64,
    marks: Option<WriteMarks>,
) -> Option<(Guest, Vec<Vcpu>, Tracker)> {
    let guest = Guest::new(config);
    let mut slot = TrackedSlot::new(0, GuestAddress::new(BASE), guest.region.kvm_view().range());
    slot.marks = marks;
    let make_vcpus = || (0..vcpus).map(|n| guest.vcpu(n)).collect::<Vec<_>>();
    match method {
        Method::Log(mode) => {
            let vcpus = make_vcpus();
            // SAFETY: the guest has made the slot so.
            match unsafe { DirtyLog::new(&guest.vm, vec![slot], mode) } {
                Ok(log) => Some((guest, vcpus, Tracker::Log(log))),
                Err(KvmError::NoLogMode { .. }) => {
                    println!("skipped: needs a dirty log in mode {mode:?}");
                    None
                }
                Err(error) => panic!("{error}"),
            }
        }
        Method::Ring(bytes) => {
            let size = match bytes {
                0 => enable_smallest(&guest),
                bytes => RingSize::enable(&guest.vm, bytes),
            };
            let size = match size {
                Ok(size) => size,
                Err(error) => {
                    println!("skipped: needs dirty rings: {error}");
                    return None;
                }
            };
            let vcpus = make_vcpus();
            let fds = vcpus.iter().map(|vcpu| &vcpu.fd);
            // SAFETY: the guest has made the slot so, and the vCPUs.
            let ring = unsafe { DirtyRing::new(&guest.vm, size, vec![slot], fds) }.unwrap();
            Some((guest, vcpus, Tracker::Ring(ring)))
        }
    }
}
