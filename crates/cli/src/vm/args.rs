//! What can be asked of `pageferry vm`.

use clap::ValueEnum;
use pageferry::memory::PageSize;
use pageferry_vmm::{Arrival, Behaviour, Setup, VmConfig, WriteTracking};

use super::place::Name;
use crate::{exit, size};

const RUN_EXAMPLES: &str = "\
Examples:
  pageferry vm run --name a
  pageferry vm run --name b --memory 256MiB --vcpus 1 --behaviour random-write --rate 200

A process with a guest: bare-metal code on vCPUs that touches its memory as it is told to, and checks
every word it reads. It runs until it is stopped (`pageferry vm stop`, SIGINT, SIGTERM) or has moved
elsewhere (`pageferry migrate`); all of these end it with 0, a wrong word with 1. While a migration
has given the guest away and its memory is still needed, the first signal is kept until that is over,
and the second ends the process, and with it what the guest has not got yet.";

const RECEIVE_EXAMPLES: &str = "\
Examples:
  pageferry vm receive --name a --listen 192.0.2.7:7000
  pageferry vm receive --name a --listen unix:/run/a.sock --page-size 2MiB --json

Waits for one guest, and is that guest's process then, as `pageferry vm run` is. Ends with 4 if the
source is lost before the guest runs here, with 1 if it calls the migration off, and with 130 or 143
if a signal comes before. With port 0 the system picks one; the address is the first line printed.
There is no encryption and no authentication yet: listen on addresses that only trusted peers reach.";

/// Run guests that check themselves, look at them, and stop them
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(clap::Subcommand, Debug)]
pub(super) enum Command {
    Run(RunArgs),
    Receive(ReceiveArgs),
    /// List the guests that run here
    #[command(after_help = exit::help("Example:\n  pageferry vm list"))]
    List,
    /// Tell how a guest is
    #[command(after_help = exit::help("Example:\n  pageferry vm status a"))]
    Status(NameArgs),
    /// Stop a guest, and wait for its end
    #[command(after_help = exit::help("Example:\n  pageferry vm stop a"))]
    Stop(NameArgs),
}

#[derive(clap::Args, Debug)]
pub(super) struct NameArgs {
    /// The guest's name
    pub(super) name: Name,
}

/// Run a guest
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help_of_server(RUN_EXAMPLES))]
pub(super) struct RunArgs {
    /// What it is called here
    #[arg(long)]
    pub(super) name: Name,
    /// Its memory
    #[arg(long, default_value = "1GiB", value_parser = size::parse, value_name = "SIZE")]
    memory: u64,
    /// Its vCPUs
    #[arg(long, default_value = "2", value_name = "N")]
    vcpus: u16,
    /// What it does
    #[arg(long, value_enum, default_value = "random-write")]
    behaviour: BehaviourName,
    /// How much it writes at most, in MB/s of whole pages [default: as much as it can]
    #[arg(long, value_name = "MB/S")]
    rate: Option<u64>,
    /// How its writes are tracked when it is moved
    #[arg(long, value_enum, default_value = "log")]
    tracking: TrackingName,
    #[command(flatten)]
    mapping: MappingArgs,
}

/// Wait for a guest, and run it
#[derive(clap::Args, Debug)]
#[command(after_help = exit::help(RECEIVE_EXAMPLES))]
pub(super) struct ReceiveArgs {
    /// What it is called here
    #[arg(long)]
    pub(super) name: Name,
    /// Where to listen: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR")]
    pub(super) listen: String,
    /// Most memory that it may have [default: what is free]
    #[arg(long, value_parser = size::parse, value_name = "SIZE")]
    pub(super) max_memory: Option<u64>,
    /// How its writes are tracked when it is moved again
    #[arg(long, value_enum, default_value = "log")]
    tracking: TrackingName,
    #[command(flatten)]
    mapping: MappingArgs,
}

#[derive(clap::Args, Debug)]
struct MappingArgs {
    /// How its memory is mapped
    #[arg(long, value_enum, default_value = "minor")]
    setup: SetupName,
    /// The pages of its memory; huge ones must be free
    #[arg(long, value_enum, default_value = "4KiB")]
    page_size: PageSizeName,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum BehaviourName {
    /// Reads a hundred pages a second
    Idle,
    /// Reads pages at random
    RandomRead,
    /// Counts in pages at random
    RandomWrite,
    /// Counts in all pages, one after the other
    LinearWrite,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum TrackingName {
    /// KVM's dirty log
    Log,
    /// KVM's dirty rings
    Ring,
    /// Write protection by userfaultfd
    Protection,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum SetupName {
    /// One mapping, in which pages are missing
    Missing,
    /// Shared memory, written through a second mapping
    Minor,
    /// The same with a third mapping that only KVM uses
    MinorOwnView,
    /// As minor, but nobody reads a userfaultfd
    NoQueue,
}

#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
enum PageSizeName {
    #[value(name = "4KiB")]
    Base,
    #[value(name = "2MiB")]
    Huge,
    #[value(name = "1GiB")]
    Giant,
}

/// Bytes of each vCPU's dirty ring, where there are rings: 4096 entries.
const RING: u32 = 1 << 16;

impl TrackingName {
    fn tracking(self) -> WriteTracking {
        match self {
            Self::Log => WriteTracking::Log,
            Self::Ring => WriteTracking::Ring,
            Self::Protection => WriteTracking::Protection,
        }
    }

    fn ring(self) -> Option<u32> {
        (self == Self::Ring).then_some(RING)
    }
}

impl MappingArgs {
    fn setup(&self) -> Setup {
        match self.setup {
            SetupName::Missing => Setup::Missing,
            SetupName::Minor => Setup::Minor,
            SetupName::MinorOwnView => Setup::MinorOwnView,
            SetupName::NoQueue => Setup::NoQueue,
        }
    }

    fn page_size(&self) -> PageSize {
        match self.page_size {
            PageSizeName::Base => PageSize::SIZE_4K,
            PageSizeName::Huge => PageSize::SIZE_2M,
            PageSizeName::Giant => PageSize::SIZE_1G,
        }
    }
}

impl RunArgs {
    pub(super) fn tracking(&self) -> WriteTracking {
        self.tracking.tracking()
    }

    /// The machine; or why there can be none.
    pub(super) fn config(&self) -> Result<VmConfig, String> {
        let writes = [BehaviourName::RandomWrite, BehaviourName::LinearWrite];
        if self.rate.is_some() && !writes.contains(&self.behaviour) {
            return Err("--rate is for guests that write".to_owned());
        }
        let rate = self.rate.map(|rate| rate.saturating_mul(1_000_000));
        let behaviour = match self.behaviour {
            BehaviourName::Idle => Behaviour::Idle,
            BehaviourName::RandomRead => Behaviour::RandomRead,
            BehaviourName::RandomWrite => Behaviour::RandomWrite { rate },
            BehaviourName::LinearWrite => Behaviour::LinearWrite { rate },
        };
        let mut config = VmConfig::new(self.vcpus, self.memory);
        config.payload = behaviour.into();
        config.setup = self.mapping.setup();
        config.page_size = self.mapping.page_size();
        config.dirty_ring = self.tracking.ring();
        Ok(config)
    }
}

impl ReceiveArgs {
    pub(super) fn tracking(&self) -> WriteTracking {
        self.tracking.tracking()
    }

    pub(super) fn arrival(&self) -> Arrival {
        Arrival {
            setup: self.mapping.setup(),
            page_size: self.mapping.page_size(),
            dirty_ring: self.tracking.ring(),
            ..Arrival::default()
        }
    }
}
