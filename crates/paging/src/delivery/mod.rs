//! How faults reach the engine.

mod cpu;
pub(crate) mod dispatch;
mod exit;
mod queue;
pub(crate) mod signal;

use std::fmt;

pub(crate) use dispatch::spawn_dispatched;
pub use exit::Resolved;
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
    ///
    /// Each region is split into so many parts of equal length, at page boundaries. `mremap` of a
    /// range with such a boundary in it is EFAULT, and nothing is changed: to the kernel it is two
    /// mappings. [`Auto`](Self::Auto) therefore splits no memory that an embedder mapped itself,
    /// unless it says that it [is not moved](crate::Events::Ignore).
    Sharded(u16),
    /// The faulting thread resolves its own fault in a SIGBUS handler. Memory accessed from inside
    /// the kernel (`read(2)` into it, KVM) fails with EFAULT while it is absent.
    Signal,
    /// Every absent page of what KVM maps carries a POISON marker, so that a vCPU leaves KVM_RUN
    /// with the fault instead of waiting in the kernel; its thread then calls
    /// [`Pager::resolve_exit`](crate::Pager::resolve_exit). Nobody reads faults: whoever else
    /// touches the memory asks for it first ([`Pager::resolve`](crate::Pager::resolve)). With
    /// [`Events::Watch`](crate::Events::Watch) one thread reads events.
    ///
    /// Where KVM has no view of its own, the marks are in the guest view. A thread of this process
    /// that touches one in user mode then gets SIGBUS, which is answered as with
    /// [`Signal`](Self::Signal) if the source allows it; the kernel gets EFAULT.
    Exit,
    /// As [`Exit`](Self::Exit), and this many threads read the userfaultfd, for everybody who uses
    /// the guest view of regions whose vCPUs have a view of their own.
    Hybrid(u16),
}

impl Delivery {
    /// Whether vCPUs leave KVM_RUN with their faults.
    pub fn exits(self) -> bool {
        matches!(self, Self::Exit | Self::Hybrid(_))
    }
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
            Self::Exit => f.write_str("exit"),
            Self::Hybrid(n) => write!(f, "hybrid({n})"),
        }
    }
}
