//! What came of a run.

use std::{fmt, time::Duration};

use pageferry_kvm::VcpuStats;
use pageferry_memory::{GuestAddress, HostAddress};

/// A word that is not what it should be.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// Where.
    pub address: GuestAddress,
    /// What is there.
    pub found: u64,
    /// What should be.
    pub expected: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, found, expected } = self;
        write!(f, "{found:#x} at {address} where {expected:#x} should be")
    }
}

/// How a vCPU's run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum End {
    /// The payload did all it had to.
    Finished,
    /// [`Vm::stop`](crate::Vm::stop) was called.
    Stopped,
    /// The guest got a machine check (#MC): memory that can never come, say.
    MachineCheck {
        /// The bank that has it.
        bank: u8,
        /// The bank's status register.
        status: u64,
        /// The address it concerns.
        address: GuestAddress,
    },
    /// The guest got another exception, which it never should.
    Exception {
        /// Which.
        vector: u8,
        /// Its error code, 0 if it has none.
        error_code: u64,
        /// The linear address of the last page fault (CR2).
        fault_address: u64,
        /// The instruction.
        instruction: u64,
    },
    /// The guest touched an address at which there is no memory.
    NoMemory {
        /// Which.
        address: GuestAddress,
        /// Whether it wrote.
        write: bool,
    },
    /// The pager was told to hand memory errors to the embedder, and here is one.
    MemoryError {
        /// Where, if that is known.
        guest: Option<GuestAddress>,
        /// The same for the host.
        host: HostAddress,
    },
    /// The vCPU's thread panicked.
    Panicked(String),
    /// KVM refused to go on, or exited for a reason nobody expects.
    Failed(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::Stopped => f.write_str("stopped"),
            Self::MachineCheck { bank, status, address } => {
                write!(f, "machine check at {address} (bank {bank}, status {status:#x})")
            }
            Self::Exception { vector, error_code, fault_address, instruction } => write!(
                f,
                "exception {vector}, error code {error_code:#x}, at instruction {instruction:#x}, \
                 CR2 {fault_address:#x}"
            ),
            Self::NoMemory { address, write } => {
                let access = if *write { "write to" } else { "read of" };
                write!(f, "{access} {address}, where there is no memory")
            }
            Self::MemoryError { guest: Some(guest), host } => {
                write!(f, "memory error at {guest} (host {host})")
            }
            Self::MemoryError { guest: None, host } => write!(f, "memory error at host {host}"),
            Self::Panicked(why) => write!(f, "the thread panicked: {why}"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// How long the first access to each unit took, measured in the guest with the time stamp counter.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TouchTimes {
    /// How many there are.
    pub count: u64,
    /// The shortest, in ticks; 0 when there is none.
    pub min: u64,
    /// The longest, in ticks.
    pub max: u64,
    /// All together, in ticks.
    pub sum: u64,
    /// The n-th counts times with n significant bits: from 2^(n-1) ticks to less than 2^n.
    pub log2: Vec<u64>,
    /// Ticks in a millisecond, if KVM knows.
    pub ticks_per_ms: Option<u32>,
}

impl TouchTimes {
    /// The mean in nanoseconds, if there are any and the counter's frequency is known.
    pub fn mean_ns(&self) -> Option<f64> {
        let khz = f64::from(self.ticks_per_ms?);
        (self.count > 0).then(|| self.sum as f64 / self.count as f64 * 1e6 / khz)
    }
}

/// What one vCPU did and saw.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VcpuReport {
    /// How it ended.
    pub end: End,
    /// Units touched.
    pub touches: u64,
    /// Words that were not what they should be.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatch: Option<Mismatch>,
    /// From its first entry into the guest to its end, pauses included.
    pub wall: Duration,
    /// How long touches took.
    pub times: TouchTimes,
    /// Exits from KVM that reached the VMM: progress and the end, not paging.
    pub exits: u64,
    /// Times it was kicked out of the guest.
    pub kicks: u64,
    /// What its pager counted, if it had one.
    pub pager: Option<VcpuStats>,
}

/// What one device thread did and saw.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Pages it read and wrote.
    pub pages: u64,
    /// Pages that could not come.
    pub poisoned: u64,
    /// Words that were not what they should be.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatch: Option<Mismatch>,
}

/// What came of a run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Of each vCPU.
    pub vcpus: Vec<VcpuReport>,
    /// Of each device thread.
    pub devices: Vec<DeviceReport>,
    /// How long it all took.
    pub wall: Duration,
}

/// One line for each vCPU and device thread.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong = |f: &mut fmt::Formatter<'_>, mismatches, first: Option<Mismatch>| {
            write!(f, "{mismatches} mismatches")?;
            first.map_or(Ok(()), |first| write!(f, ", first {first}"))
        };
        for (number, vcpu) in self.vcpus.iter().enumerate() {
            write!(f, "vCPU {number}: {}; {} touches, ", vcpu.end, vcpu.touches)?;
            wrong(f, vcpu.mismatches, vcpu.first_mismatch)?;
            writeln!(f, "; {:?}, {} exits, {} kicks", vcpu.wall, vcpu.exits, vcpu.kicks)?;
        }
        for (number, device) in self.devices.iter().enumerate() {
            write!(f, "device {number}: {} pages, {} poisoned, ", device.pages, device.poisoned)?;
            wrong(f, device.mismatches, device.first_mismatch)?;
            writeln!(f)?;
        }
        write!(f, "{:?} in all", self.wall)
    }
}

impl Report {
    /// Whether every vCPU came to the end of its payload and nobody saw a wrong word.
    pub fn is_good(&self) -> bool {
        self.vcpus.iter().all(|vcpu| vcpu.end == End::Finished) && self.mismatches() == 0
    }

    /// Wrong words that vCPUs and device threads saw.
    pub fn mismatches(&self) -> u64 {
        let vcpus: u64 = self.vcpus.iter().map(|vcpu| vcpu.mismatches).sum();
        vcpus + self.devices.iter().map(|device| device.mismatches).sum::<u64>()
    }

    /// Units that vCPUs touched.
    pub fn touches(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.touches).sum()
    }

    /// Units touched in a second, by all vCPUs together.
    pub fn touches_per_second(&self) -> f64 {
        self.touches() as f64 / self.wall.as_secs_f64()
    }
}
