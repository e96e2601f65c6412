//! What can be asked of `pageferry demo`.

use std::{fmt, num::NonZeroU16};

use clap::ValueEnum;
use pageferry::{
    memory::{Backing, PageSize},
    paging::{Delivery, InstallMethod, Prefetch},
};
use pageferry_kvm::VcpuDelivery;
use pageferry_vmm::Setup;

use super::{pattern::PAGE, threads::Workload};
use crate::{exit, size};

const EXAMPLES: &str = "\
Examples:
  pageferry demo
  pageferry demo --memory 2GiB --threads 8 --delivery sharded --prefetch none
  pageferry demo --guest kvm --delivery exit --setup no-queue
  pageferry demo --guest threads --backing memfd --prefetch around:64KiB --json
  pageferry demo --delay-us 500 --workload zipf

Two processes on this host: one holds the memory and serves it over TCP; in the other a guest runs
on that memory, none of which is there at first. Each page it touches is fetched and installed, the
guest goes on, and the rest follows in the background. At the end every page is fetched once more
and compared byte by byte.

The guest is a KVM guest where /dev/kvm works, and threads of the process otherwise, or where the
options are for threads only; the report says which, and why.";

/// Move a running guest's memory between two processes, and verify every page
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(EXAMPLES))]
pub(crate) struct Args {
    /// Memory of the guest
    #[arg(long, default_value = "512MiB", value_parser = parse_memory, value_name = "SIZE")]
    pub(super) memory: u64,
    /// Threads of the guest; the vCPUs of a KVM guest
    #[arg(long, default_value = "4", value_parser = parse_threads, value_name = "N")]
    pub(super) threads: NonZeroU16,
    /// What the guest is [default: kvm where that works, threads otherwise]
    #[arg(long, value_enum)]
    pub(super) guest: Option<GuestKind>,
    /// How faults reach the engine
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) delivery: DeliveryName,
    /// How a KVM guest's memory is mapped [default: missing for anon, minor for all others,
    /// minor-own-view for all others with --delivery hybrid]
    #[arg(long, value_enum)]
    pub(super) setup: Option<SetupName>,
    /// How pages are installed
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) install: InstallName,
    /// What the guest's memory is made of [default: anon; memfd if the set-up or --delivery hybrid
    /// needs shared memory]
    #[arg(long, value_enum)]
    pub(super) backing: Option<BackingName>,
    /// What is fetched beyond what is touched: none, sweep, or around:SIZE
    #[arg(long, default_value = "sweep", value_parser = parse_prefetch, value_name = "POLICY")]
    pub(super) prefetch: Prefetch,
    /// What the guest does
    #[arg(long, value_enum, default_value = "mixed")]
    pub(super) workload: Workload,
    /// Delay each answer of the source by this many microseconds
    #[arg(long, default_value = "0", value_name = "N")]
    pub(super) delay_us: u64,
    /// Seed of the memory's contents; of a KVM guest, of its random accesses
    #[arg(long, default_value = "1", value_name = "N")]
    pub(super) seed: u64,
}

/// The name of an option's value, as the user types it.
pub(super) fn name_of(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

macro_rules! displayed {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&name_of(self))
            }
        }
    )*};
}
displayed!(GuestKind, DeliveryName, SetupName, InstallName, BackingName);

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum GuestKind {
    /// A KVM guest: bare-metal code on vCPUs
    Kvm,
    /// Threads of this process
    Threads,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum DeliveryName {
    /// Whatever is best here; the report says what, and why
    Auto,
    /// One reader of one userfaultfd
    Queue,
    /// Several readers of one userfaultfd
    QueueN,
    /// One reader, workers by the faulting thread
    ByThread,
    /// One reader, workers by the faulting thread's CPU
    ByCpu,
    /// Several userfaultfds, by address
    Sharded,
    /// The faulting thread itself, by SIGBUS (threads only)
    Signal,
    /// The vCPU's own thread, having left KVM_RUN (KVM guests only)
    Exit,
    /// The same, and readers of a userfaultfd for everybody else (KVM guests only)
    Hybrid,
}

impl DeliveryName {
    /// What the engine is to do. Numbers of threads are its own choice.
    pub(super) fn delivery(self) -> Delivery {
        match self {
            Self::Auto => Delivery::Auto,
            Self::Queue => Delivery::Queue,
            Self::QueueN => Delivery::QueueN(0),
            Self::ByThread => Delivery::ByThread(0),
            Self::ByCpu => Delivery::ByCpu(0),
            Self::Sharded => Delivery::Sharded(0),
            Self::Signal => Delivery::Signal,
            Self::Exit => Delivery::Exit,
            Self::Hybrid => Delivery::Hybrid(0),
        }
    }

    /// The same for a KVM guest; `None` if it cannot have it.
    pub(super) fn for_vcpus(self) -> Option<VcpuDelivery> {
        Some(match self {
            Self::Auto => VcpuDelivery::Auto,
            Self::Queue => VcpuDelivery::Queue,
            Self::QueueN => VcpuDelivery::QueueN(0),
            Self::ByThread => VcpuDelivery::ByThread(0),
            Self::ByCpu => VcpuDelivery::ByCpu(0),
            Self::Sharded => VcpuDelivery::Sharded(0),
            Self::Signal => return None,
            Self::Exit => VcpuDelivery::Exit,
            Self::Hybrid => VcpuDelivery::Hybrid(0),
        })
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum SetupName {
    /// One mapping, in which pages are missing
    Missing,
    /// Shared memory, written through a second mapping; KVM uses the first
    Minor,
    /// The same with a third mapping that only KVM uses
    MinorOwnView,
    /// As minor, but nobody reads a userfaultfd: whoever is no vCPU asks first
    NoQueue,
}

impl SetupName {
    pub(super) fn setup(self) -> Setup {
        match self {
            Self::Missing => Setup::Missing,
            Self::Minor => Setup::Minor,
            Self::MinorOwnView => Setup::MinorOwnView,
            Self::NoQueue => Setup::NoQueue,
        }
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum InstallName {
    Auto,
    Copy,
    Continue,
    Move,
}

impl InstallName {
    pub(super) fn method(self) -> Option<InstallMethod> {
        match self {
            Self::Auto => None,
            Self::Copy => Some(InstallMethod::Copy),
            Self::Continue => Some(InstallMethod::Continue),
            Self::Move => Some(InstallMethod::Move),
        }
    }
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum BackingName {
    /// Private anonymous memory
    Anon,
    /// A memfd, mapped twice
    Memfd,
    /// Huge pages of 2 MiB; reserved for the run if need be (root)
    #[value(name = "hugetlb-2m")]
    Hugetlb2m,
    /// Huge pages of 1 GiB; reserved for the run if need be (root)
    #[value(name = "hugetlb-1g")]
    Hugetlb1g,
}

impl BackingName {
    pub(super) fn backing(self) -> Backing {
        match self {
            Self::Anon => Backing::Anonymous,
            Self::Memfd => Backing::Memfd,
            Self::Hugetlb2m => Backing::Hugetlb(PageSize::SIZE_2M),
            Self::Hugetlb1g => Backing::Hugetlb(PageSize::SIZE_1G),
        }
    }

    pub(super) fn page_size(self) -> PageSize {
        match self {
            Self::Anon | Self::Memfd => PageSize::SIZE_4K,
            Self::Hugetlb2m => PageSize::SIZE_2M,
            Self::Hugetlb1g => PageSize::SIZE_1G,
        }
    }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        0 => Err("a guest has some memory".into()),
        bytes => Ok(bytes),
    }
}

fn parse_threads(text: &str) -> Result<NonZeroU16, String> {
    match text.parse::<NonZeroU16>() {
        Ok(threads) if threads.get() <= 4096 => Ok(threads),
        Ok(_) => Err("4096 at most".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn parse_prefetch(text: &str) -> Result<Prefetch, String> {
    match text {
        "none" => Ok(Prefetch::NONE),
        "sweep" => Ok(Prefetch::SWEEP),
        _ => {
            let bytes = text
                .strip_prefix("around:")
                .ok_or_else(|| format!("{text:?} is not none, sweep or around:SIZE"))?;
            let bytes = size::parse(bytes)?;
            if !(bytes.is_power_of_two() && (PAGE..=1 << 30).contains(&bytes)) {
                return Err(format!("{text}: a power of two from 4KiB to 1GiB"));
            }
            Ok(Prefetch::around(bytes))
        }
    }
}
