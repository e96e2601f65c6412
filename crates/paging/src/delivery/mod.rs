//! How faults reach the engine.

mod cpu;
pub(crate) mod dispatch;
mod queue;
pub(crate) mod signal;

use std::fmt;

pub(crate) use dispatch::spawn_dispatched;
pub(crate) use queue::{EveryQueue, PANICS, ReaderConfig, spawn_reader};

/// How faults reach the engine. Thread counts of 0 mean: one for each CPU, at most 8.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum Delivery {
    /// Chosen when the pager starts, from the hints; [`Pager::chosen`](crate::Pager::chosen) says
    /// what and why.
    #[default]
    Auto,
    /// One userfaultfd, one thread reading it.
    Queue,
    /// One userfaultfd, this many threads reading it.
    QueueN(u16),
    /// One reader, handing each fault to one of this many workers by hash of the faulting
    /// thread's id.
    ByThread(u16),
    /// One reader, handing each fault to one of this many workers by the CPU that the faulting
    /// thread last ran on.
    ByCpu(u16),
    /// The memory split by address into this many userfaultfds, each with its own reader.
    Sharded(u16),
    /// The faulting thread resolves its own fault in a SIGBUS handler. Memory accessed from inside
    /// the kernel (`read(2)` into it, KVM) fails with EFAULT while it is absent.
    Signal,
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Queue => f.write_str("queue"),
            Self::QueueN(n) => write!(f, "queue-n({n})"),
            Self::ByThread(n) => write!(f, "by-thread({n})"),
            Self::ByCpu(n) => write!(f, "by-cpu({n})"),
            Self::Sharded(n) => write!(f, "sharded({n})"),
            Self::Signal => f.write_str("signal"),
        }
    }
}
