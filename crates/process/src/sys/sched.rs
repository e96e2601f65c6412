//! sched_getattr(2) and sched_setattr(2), of the calling thread.

use std::mem::size_of;

use libc::sched_attr;
use rustix::io::Errno;

use super::last_errno;

/// The first version of the structure, which every kernel knows.
const SIZE: usize = 48;
const _: () = assert!(size_of::<sched_attr>() >= SIZE);

/// How a thread is scheduled.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Policy {
    /// In turns with the others (`SCHED_OTHER`).
    Shared {
        /// From -20, much of the CPU, to 19, little.
        nice: i32,
    },
    /// Before all that share, for as long as it does not wait (`SCHED_FIFO`).
    RealTime {
        /// From 1 to 99.
        priority: u32,
    },
}

/// How the calling thread is scheduled. One that was not asked for its own deadlines is in one of
/// the two ways, or in a variant of it.
pub(crate) fn policy() -> Result<Policy, Errno> {
    let mut attributes = attributes();
    let at = &raw mut attributes;
    // SAFETY: the kernel writes at most `SIZE` bytes, as it is told, of the structure.
    let done = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, at, SIZE, 0) };
    if done != 0 {
        return Err(last_errno());
    }
    Ok(match attributes.sched_policy.cast_signed() {
        libc::SCHED_FIFO | libc::SCHED_RR => {
            Policy::RealTime { priority: attributes.sched_priority }
        }
        _ => Policy::Shared { nice: attributes.sched_nice },
    })
}

/// Has the calling thread scheduled so. The kernel refuses it (EPERM) to those who lack
/// `CAP_SYS_NICE` and whose limits (`RLIMIT_NICE`, `RLIMIT_RTPRIO`) do not allow it.
pub(crate) fn set_policy(policy: Policy) -> Result<(), Errno> {
    let mut attributes = attributes();
    match policy {
        Policy::Shared { nice } => {
            attributes.sched_policy = libc::SCHED_OTHER.cast_unsigned();
            attributes.sched_nice = nice;
        }
        Policy::RealTime { priority } => {
            attributes.sched_policy = libc::SCHED_FIFO.cast_unsigned();
            attributes.sched_priority = priority;
        }
    }
    // SAFETY: the kernel reads the structure, `SIZE` bytes of it, as that says.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}

fn attributes() -> sched_attr {
    // SAFETY: the structure consists of integers.
    let mut attributes: sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = SIZE as u32;
    attributes
}
