//! What a machine is to be, and what its guest is to do.

mod encoded;

use std::{fmt, time::Duration};

use pageferry_memory::{GuestAddress, PageSize};

pub(crate) use self::encoded::CONFIG;
use crate::{Pattern, VmError};

/// How the guest's memory is mapped, and which of its mappings KVM uses.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Setup {
    /// (a) One view of anonymous memory (hugetlb with huge pages), in which everybody faults.
    Missing,
    /// (b) A memory file. KVM and everybody else fault in the guest view, and bytes are
    /// written through the fill view.
    Minor,
    /// (c) A memory file. KVM has a view of its own; everybody else faults in the guest view.
    MinorOwnView,
    /// (d) As (b), but nobody reads a queue: a vCPU exits, and every other component asks before it
    /// touches.
    NoQueue,
}

impl Setup {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Missing, Self::Minor, Self::MinorOwnView, Self::NoQueue];
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Minor => "minor",
            Self::MinorOwnView => "minor-own-view",
            Self::NoQueue => "no-queue",
        })
    }
}

/// In which order a vCPU touches its units.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Order {
    /// Ascending.
    Sequential,
    /// A permutation that the guest computes: a full-period linear congruential generator over the
    /// next power of two, its output mixed, what lies beyond the last unit skipped.
    Random,
    /// As Zipf's law with exponent 1 has it: few units very often, most never. The host draws the
    /// units and writes their numbers into a table in the guest's boot memory.
    Zipf,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sequential, Self::Random, Self::Zipf];
}

/// What a vCPU does with each unit.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Operation {
    /// Reads some words and compares them.
    ReadVerify,
    /// Writes words of its own, then reads them back. What it does not write must stay as it was.
    Write,
    /// Reads and compares words, and writes each back with some bits turned. Where several vCPUs
    /// may do it to the same unit, or one does it repeatedly, a word already turned is accepted
    /// and left as it is.
    ReadModifyWrite,
    /// Counts in each word: compares it with what the round before left there, and writes this
    /// round's. So a page that is lost or stale is noticed by the next round, however many there
    /// are. Only where each unit is one vCPU's, and touched once a round.
    Count,
}

impl Operation {
    /// All of them that any vCPUs may do to any units in any order.
    pub const ALL: [Self; 3] = [Self::ReadVerify, Self::Write, Self::ReadModifyWrite];
}

/// The privilege level at which the guest runs.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Ring {
    /// The kernel's. Where KVM emulates it (PVM), some 10 us an instruction.
    Zero,
    /// A user program's, with access to I/O ports (IOPL 3).
    Three,
}

impl Ring {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Zero, Self::Three];
}

/// Which units a vCPU touches.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Share {
    /// A part of the memory of its own: the parts follow one another.
    #[default]
    Own,
    /// All of the memory, as every other vCPU: they race.
    All,
}

/// What the guest does.
#[derive(Clone, Debug)]
pub struct Payload {
    /// In which order it touches its units.
    pub order: Order,
    /// In which order every second vCPU does, beginning with the second of all; `None`: in the
    /// same.
    pub order_of_others: Option<Order>,
    /// What it does with them.
    pub operation: Operation,
    /// At which privilege level.
    pub ring: Ring,
    /// Which units each vCPU touches.
    pub share: Share,
    /// The size of a unit: what is touched at its first word, its last and seven between. A
    /// unit of the size of huge pages touches each of them once.
    pub unit: PageSize,
    /// How many units a vCPU touches in each round at most; `None`: all that are its own. The order
    /// Zipf touches as many as this, however often each.
    pub units_per_vcpu: Option<u64>,
    /// How many times the same is done.
    pub rounds: u64,
    /// The start of random sequences.
    pub seed: u64,
    /// Which pages are zero at first.
    pub pattern: Pattern,
    /// A vCPU leaves the guest after every so many units and tells; 0: only at the end.
    pub progress_every: u64,
    /// A read of this address, after the units of the last round: of one in no region, say.
    pub stray: Option<GuestAddress>,
    /// How many bytes of units all vCPUs together touch in a second at most. Each leaves the guest
    /// after [`progress_every`](Self::progress_every) units, or about every millisecond if that is
    /// 0, to rest.
    pub rate: Option<u64>,
}

impl Default for Payload {
    /// Reads each page once, in ascending order, in ring 3.
    fn default() -> Self {
        Self {
            order: Order::Sequential,
            order_of_others: None,
            operation: Operation::ReadVerify,
            ring: Ring::Three,
            share: Share::Own,
            unit: PageSize::SIZE_4K,
            units_per_vcpu: None,
            rounds: 1,
            seed: 1,
            pattern: Pattern::default(),
            progress_every: 0,
            stray: None,
            rate: None,
        }
    }
}

/// What a machine is to be.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// How many vCPUs it has, 1 to [`VmConfig::MAX_VCPUS`]. Each has a thread while it runs.
    pub vcpus: u16,
    /// Its paged memory, in bytes: a multiple of the page size and of the payload's unit. It has
    /// some memory to boot from besides.
    pub memory: u64,
    /// How the memory is mapped.
    pub setup: Setup,
    /// The size of the memory's pages: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: PageSize,
    /// What the guest does.
    pub payload: Payload,
    /// Bytes of a dirty ring for each vCPU, if it is to have one: writes are tracked by rings then,
    /// and there is no dirty log. See [`RingSize`](pageferry_kvm::dirty::RingSize).
    pub dirty_ring: Option<u32>,
}

impl Payload {
    /// After how many units a vCPU leaves the guest; 0: only at the end.
    pub(crate) fn units_between_exits(&self, vcpus: u16) -> u64 {
        match self.rate {
            Some(rate) if self.progress_every == 0 => {
                (rate / u64::from(vcpus) / self.unit.bytes() / 1000).max(1)
            }
            _ => self.progress_every,
        }
    }

    /// How long those take at the least, if they are not to be touched as fast as it goes.
    pub(crate) fn time_between_exits(&self, vcpus: u16) -> Option<Duration> {
        let rate = self.rate? as f64;
        let units = self.units_between_exits(vcpus) as f64;
        let bytes = units * self.unit.bytes() as f64 * f64::from(vcpus);
        Some(Duration::try_from_secs_f64(bytes / rate).map_or(MAX_REST, |time| time.min(MAX_REST)))
    }

    /// In which order this vCPU touches its units.
    pub(crate) fn order_of(&self, vcpu: u16) -> Order {
        self.order_of_others.filter(|_| !vcpu.is_multiple_of(2)).unwrap_or(self.order)
    }
}

/// More units than the largest memory has.
const MAX_UNITS: u64 = 1 << 32;
/// The longest rest from one exit for progress to the next.
const MAX_REST: Duration = Duration::from_secs(3600);

impl VmConfig {
    /// The most vCPUs there can be.
    pub const MAX_VCPUS: u16 = 64;

    /// A machine of set-up (b) with pages of 4 KiB, whose guest does the default.
    pub fn new(vcpus: u16, memory: u64) -> Self {
        Self {
            vcpus,
            memory,
            setup: Setup::Minor,
            page_size: PageSize::SIZE_4K,
            payload: Payload::default(),
            dirty_ring: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), VmError> {
        let refuse = |why: String| Err(VmError::Config { why });
        let Self { vcpus, memory, page_size, ref payload, .. } = *self;
        if vcpus == 0 || vcpus > Self::MAX_VCPUS {
            return refuse(format!("{vcpus} vCPUs: there can be 1 to {}", Self::MAX_VCPUS));
        }
        let sizes = [PageSize::SIZE_4K, PageSize::SIZE_2M, PageSize::SIZE_1G];
        for (what, size) in [("pages", page_size), ("units", payload.unit)] {
            if !sizes.contains(&size) {
                return refuse(format!("{what} of {size}: they are 4 KiB, 2 MiB or 1 GiB"));
            }
            if memory == 0 || !size.is_multiple(memory) {
                return refuse(format!("{memory:#x} bytes of memory are no {what} of {size}"));
            }
        }
        if memory > crate::boot::MAX_MEMORY {
            let most = crate::boot::MAX_MEMORY;
            return refuse(format!("{memory:#x} bytes of memory: at most {most:#x}"));
        }
        let zero_every = payload.pattern.zero_every;
        if zero_every != 0 && !zero_every.is_power_of_two() {
            return refuse(format!("every {zero_every}th page zero: only powers of two"));
        }
        if payload.rounds == 0 || payload.units_per_vcpu == Some(0) {
            return refuse("a payload that touches nothing".to_owned());
        }
        if payload.units_per_vcpu.is_some_and(|units| units > MAX_UNITS) {
            return refuse(format!("more than {MAX_UNITS} units for a vCPU"));
        }
        if payload.rate == Some(0) {
            return refuse("a rate of 0 bytes a second".to_owned());
        }
        let zipf = (0..vcpus).any(|vcpu| payload.order_of(vcpu) == Order::Zipf);
        let shared = payload.share == Share::All && vcpus > 1;
        if payload.operation == Operation::Count && (zipf || shared) {
            return refuse(
                "counting in units that are touched by several, or repeatedly".to_owned(),
            );
        }
        if payload.share == Share::Own && memory / payload.unit.bytes() < u64::from(vcpus) {
            return refuse(format!("fewer than one unit of {} for each vCPU", payload.unit));
        }
        Ok(())
    }
}
