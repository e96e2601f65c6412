//! The guest, whichever it is: prepared, started, watched, asked what it saw.

use std::sync::Arc;

use anyhow::Context as _;
use pageferry::{
    memory::{Layout, Region, RegionConfig},
    paging::{Builder, Delivery, Pager},
};
use pageferry_vmm::{Setup, VcpuReport, Vm};

use super::{
    args::Args,
    machine::{self, Machine},
    pattern::{Contents, PAGE, Pattern},
    plan::{Kind, Plan},
    threads::{Increments, Threads},
    verify::Subject,
};
use crate::bench::histogram::Histogram;

/// A guest that does not run yet, and its memory, all of which is absent.
#[derive(Debug)]
pub(super) enum Prepared {
    Threads { region: Arc<Region>, pattern: Pattern },
    Kvm(Arc<Vm>),
}

impl Prepared {
    pub(super) fn new(args: &Args, plan: &Plan, bytes: u64) -> anyhow::Result<Self> {
        match plan.kind {
            Kind::Threads => {
                let region = Region::new(&RegionConfig::new(bytes, plan.backing.backing()))?;
                let pattern = Pattern { seed: args.seed };
                Ok(Self::Threads { region: Arc::new(region), pattern })
            }
            Kind::Kvm(setup) => {
                machine::build(args, setup, plan.backing.page_size(), bytes).map(Self::Kvm)
            }
        }
    }

    pub(super) fn layout(&self) -> anyhow::Result<Layout> {
        match self {
            Self::Threads { region, .. } => Ok(Layout::new(vec![Arc::clone(region)])?),
            Self::Kvm(vm) => Ok(vm.layout()),
        }
    }

    /// What the source is to serve.
    pub(super) fn contents(&self) -> Contents {
        match self {
            Self::Threads { pattern, .. } => Contents::Seeded(*pattern),
            Self::Kvm(_) => Contents::OfAddresses,
        }
    }

    /// The engine for this guest, but for what is the same with every guest.
    pub(super) fn pager(&self, args: &Args) -> anyhow::Result<Builder> {
        match (self, args.install.method()) {
            (Self::Threads { .. }, method) => Ok(Pager::builder(self.layout()?).install(method)),
            (Self::Kvm(vm), None) => Ok(vm.pager()),
            (Self::Kvm(vm), method) => Ok(vm.pager().install(method)),
        }
    }

    pub(super) fn start(&self, args: &Args, pager: &Arc<Pager>) -> anyhow::Result<Guest> {
        match self {
            Self::Threads { region, pattern } => {
                let threads = u64::from(args.threads.get());
                // Twice as many accesses as there are pages, by all threads together.
                let touches = (2 * region.len() / PAGE).div_ceil(threads);
                let guest = Threads::start(region, *pattern, args.workload, threads, touches)
                    .context("starting the guest's threads")?;
                Ok(Guest::Threads(guest))
            }
            Self::Kvm(vm) => Machine::start(vm, pager).map(Guest::Kvm),
        }
    }

    /// What is to be verified after a run.
    pub(super) fn subject(&self, left: Left, pager: &Arc<Pager>) -> anyhow::Result<Subject> {
        let layout = self.layout()?;
        Ok(match self {
            Self::Threads { .. } => Subject { layout, left, vm: None, ask: None },
            Self::Kvm(vm) => {
                let own_view = vm.config().setup == Setup::MinorOwnView;
                let ask = match pager.chosen().delivery {
                    // Somebody reads the queue of the view in which pages are read.
                    Delivery::Hybrid(_) if own_view => None,
                    delivery => delivery.exits().then(|| Arc::clone(pager)),
                };
                Subject { layout, left, vm: Some(Arc::clone(vm)), ask }
            }
        })
    }
}

/// A guest that runs. Dropping it stops it.
#[derive(Debug)]
pub(super) enum Guest {
    Threads(Threads),
    Kvm(Machine),
}

/// What a guest saw and did.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) accesses: u64,
    /// Accesses that wrote, if the guest counts them.
    pub(super) writes: Option<u64>,
    /// Reads that found what should not be there.
    pub(super) wrong: u64,
    /// How long accesses to granules took that were not there before, if the guest can tell those.
    pub(super) latency: Option<Box<Histogram>>,
    /// What it made of the memory.
    pub(super) left: Left,
    /// Of each vCPU, if it has any.
    pub(super) vcpus: Option<Vec<VcpuReport>>,
}

/// What a guest made of the memory.
#[derive(Clone, Debug)]
pub(super) enum Left {
    /// The last word of each page was counted up so often.
    Counted(Increments),
    /// Some words were turned into others, the difference (xor) being this; [`pageferry_vmm::Vm`]
    /// knows which.
    Turned(u64),
}

impl Guest {
    /// Accesses made so far.
    pub(super) fn touches(&self) -> u64 {
        match self {
            Self::Threads(threads) => threads.touches(),
            Self::Kvm(machine) => machine.touches(),
        }
    }

    pub(super) fn is_finished(&self) -> bool {
        match self {
            Self::Threads(threads) => threads.is_finished(),
            Self::Kvm(machine) => machine.is_finished(),
        }
    }

    /// Waits for its end and asks what it saw.
    pub(super) fn join(self) -> anyhow::Result<Seen> {
        match self {
            Self::Threads(threads) => threads.join(),
            Self::Kvm(machine) => machine.join(),
        }
    }
}
