//! What guests do that run until they are stopped, for migrations.

use std::fmt;

use crate::{Operation, Order, Payload};

/// A guest that runs until it is stopped, and checks all that it touches all the time: as a
/// [`Payload`], each vCPU in its own part of the memory.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Behaviour {
    /// Reads a hundred pages a second.
    Idle,
    /// Reads pages at random, as fast as it can.
    RandomRead,
    /// Counts in pages at random.
    RandomWrite {
        /// Bytes of pages in a second, of all vCPUs; `None`: as fast as it can.
        rate: Option<u64>,
    },
    /// Counts in all pages in ascending order, again and again.
    LinearWrite {
        /// As above.
        rate: Option<u64>,
    },
}

impl Behaviour {
    /// One of each kind, as fast as it can.
    pub const ALL: [Self; 4] = [
        Self::Idle,
        Self::RandomRead,
        Self::RandomWrite { rate: None },
        Self::LinearWrite { rate: None },
    ];
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |rate: &Option<u64>| {
            rate.map_or_else(String::new, |rate| format!(" of {} MB/s", rate as f64 / 1e6))
        };
        match self {
            Self::Idle => f.write_str("idle"),
            Self::RandomRead => f.write_str("random read"),
            Self::RandomWrite { rate } => write!(f, "random write{}", at(rate)),
            Self::LinearWrite { rate } => write!(f, "linear write{}", at(rate)),
        }
    }
}

impl From<Behaviour> for Payload {
    fn from(behaviour: Behaviour) -> Self {
        let (order, operation, rate) = match behaviour {
            Behaviour::Idle => (Order::Random, Operation::ReadVerify, Some(100 << 12)),
            Behaviour::RandomRead => (Order::Random, Operation::ReadVerify, None),
            Behaviour::RandomWrite { rate } => (Order::Random, Operation::Count, rate),
            Behaviour::LinearWrite { rate } => (Order::Sequential, Operation::Count, rate),
        };
        Self { order, operation, rate, rounds: u64::MAX, ..Self::default() }
    }
}
