//! What is measured: one combination of delivery, vCPUs and memory; and the result.

use std::{fmt, time::Duration};

use clap::ValueEnum;
use pageferry::{memory::PageSize, paging};
use pageferry_kvm::{Hints, VcpuDelivery, choose, probe};
use pageferry_vmm::{Payload, Ring as VmmRing, VmConfig};
use serde::Serialize;

use super::{
    super::case::{Backing, Kind, Order, display_as_value_name},
    times::Times,
};

/// How a vCPU's fault reaches the one who resolves it.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Delivery {
    /// No paging at all: everything is present
    None,
    /// One userfaultfd, one thread that reads it
    Queue,
    /// One userfaultfd, several threads that read it
    QueueN,
    /// One userfaultfd and reader for each part of the memory
    Sharded,
    /// The vCPU leaves KVM_RUN, and its own thread brings the page
    Exit,
    /// The same, and several threads read a userfaultfd for everybody else
    Hybrid,
    /// Whichever of these the library picks on this host
    Auto,
}

/// How the memory is mapped, and which of its mappings KVM uses.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Setup {
    /// Anonymous memory, one view
    Missing,
    /// A memory file; KVM has the view that everybody faults in
    Minor,
    /// A memory file; KVM has a view of its own
    MinorOwnView,
    /// A memory file; nobody reads a queue, faults are exits only
    NoQueue,
}

/// The guest's privilege level.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, ValueEnum)]
pub(super) enum Ring {
    /// A user program's
    #[value(name = "3")]
    Three,
    /// The kernel's; where KVM emulates it (PVM), some 10 us an instruction
    #[value(name = "0")]
    Zero,
}

display_as_value_name!(Delivery, Setup, Ring);

impl Setup {
    pub(super) fn kind(self) -> Kind {
        if self == Self::Missing { Kind::Missing } else { Kind::Minor }
    }

    pub(super) fn backing(self) -> Backing {
        if self == Self::Missing { Backing::Anon } else { Backing::Memfd }
    }

    /// Whether this delivery can be had on it, and means something.
    pub(super) fn takes(self, delivery: Delivery) -> bool {
        self != Self::NoQueue || matches!(delivery, Delivery::None | Delivery::Exit)
    }

    fn vmm(self) -> pageferry_vmm::Setup {
        match self {
            Self::Missing => pageferry_vmm::Setup::Missing,
            Self::Minor => pageferry_vmm::Setup::Minor,
            Self::MinorOwnView => pageferry_vmm::Setup::MinorOwnView,
            Self::NoQueue => pageferry_vmm::Setup::NoQueue,
        }
    }
}

impl Delivery {
    /// Whether a vCPU certainly leaves KVM_RUN for it.
    pub(super) fn exits(self) -> bool {
        matches!(self, Self::Exit | Self::Hybrid)
    }

    /// What it is on this host for so many vCPUs, and for [`Auto`](Self::Auto) the reason.
    pub(super) fn resolve(self, vcpus: u16, workers: u16) -> anyhow::Result<Resolved> {
        let wanted = match self {
            Self::None => return Ok(Resolved { served: None, why: None }),
            Self::Queue => VcpuDelivery::Queue,
            Self::QueueN => VcpuDelivery::QueueN(workers),
            Self::Sharded => VcpuDelivery::Sharded(workers),
            Self::Exit => VcpuDelivery::Exit,
            Self::Hybrid => VcpuDelivery::Hybrid(workers),
            Self::Auto => VcpuDelivery::Auto,
        };
        let hints = Hints {
            vcpus: Some(vcpus),
            guest_page_tables_resident: true,
            only_vcpus: true,
            ..Hints::default()
        };
        let (served, why) = choose(wanted, probe::host(), &hints)?;
        Ok(Resolved { served: Some(served), why: (self == Self::Auto).then_some(why) })
    }
}

/// What a delivery came to on this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Resolved {
    /// None: nothing is paged.
    pub(super) served: Option<paging::Delivery>,
    /// Why it was picked.
    pub(super) why: Option<String>,
}

/// One measurement to make. Every contender gets the very same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Case {
    pub(super) delivery: Delivery,
    pub(super) resolved: Resolved,
    pub(super) setup: Setup,
    pub(super) vcpus: u16,
    /// Pages of 4 KiB in all, of which every vCPU touches its own slice, each once.
    pub(super) pages: u64,
    pub(super) order: Order,
    pub(super) ring: Ring,
    pub(super) seed: u64,
    /// The most messages taken by one read(2) of a userfaultfd. At least 1.
    pub(super) batch: usize,
    /// From asking for a page to having it.
    pub(super) delay: Duration,
}

impl Case {
    /// The machine that it is measured on.
    pub(super) fn machine(&self) -> VmConfig {
        let mut config = VmConfig::new(self.vcpus, self.pages * PageSize::SIZE_4K.bytes());
        config.setup = self.setup.vmm();
        config.payload = Payload {
            order: match self.order {
                Order::Random => pageferry_vmm::Order::Random,
                Order::Sequential => pageferry_vmm::Order::Sequential,
            },
            ring: match self.ring {
                Ring::Three => VmmRing::Three,
                Ring::Zero => VmmRing::Zero,
            },
            seed: self.seed,
            ..Payload::default()
        };
        config
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { delivery, setup, vcpus, .. } = self;
        write!(f, "{delivery}, {vcpus} vCPUs, set-up {setup}")
    }
}

/// What one run of one case took.
#[derive(Clone, Debug)]
pub(super) struct Measurement {
    /// Pages that were touched, each exactly once.
    pub(super) pages: u64,
    /// From the vCPUs' common start to the last one's end.
    pub(super) wall: Duration,
    /// User and system time of the whole process within that time.
    pub(super) cpu: Duration,
    /// How long the first touch of each page took the guest.
    pub(super) times: Times,
}
