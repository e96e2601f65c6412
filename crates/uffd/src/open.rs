//! Opening a userfaultfd: which way, and with which features.

use std::{fmt, os::fd::OwnedFd};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mm::UserfaultfdFlags,
};

use crate::{Features, Ioctls, Negotiated, Userfaultfd, abi};

/// The ways to a userfaultfd.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum OpenWay {
    /// `/dev/userfaultfd`: whoever may open the node gets a descriptor for all faults.
    DeviceNode,
    /// The system call: for all faults, if `vm.unprivileged_userfaultfd` is 1 or the caller has
    /// `CAP_SYS_PTRACE`.
    Syscall,
    /// The system call with `UFFD_USER_MODE_ONLY`: needs no privilege, but a fault taken inside
    /// the kernel (`read(2)` into the range, KVM, vhost) fails with EFAULT or SIGBUS instead of
    /// waiting.
    SyscallUserModeOnly,
}

impl OpenWay {
    /// All ways, best first.
    pub const ALL: [Self; 3] = [Self::DeviceNode, Self::Syscall, Self::SyscallUserModeOnly];
}

impl fmt::Display for OpenWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DeviceNode => "/dev/userfaultfd",
            Self::Syscall => "userfaultfd(2)",
            Self::SyscallUserModeOnly => "userfaultfd(2) for user-mode faults only",
        })
    }
}

/// Why one way did not lead to a userfaultfd.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Obstacle {
    /// The caller may not use it.
    Denied(Errno),
    /// The kernel or the host does not have it.
    Absent(Errno),
    /// It opened, but lacks these of the required features.
    Lacks(Features),
    /// It opened, and the kernel has the required features, but does not let the caller have them.
    /// Of today's features only `EVENT_FORK` takes a privilege.
    Withheld {
        /// The required features.
        features: Features,
        /// The kernel's reason.
        errno: Errno,
    },
}

/// One way that was tried without success.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Attempt {
    /// The way.
    pub way: OpenWay,
    /// What was in the way.
    pub obstacle: Obstacle,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = self.way;
        match self.obstacle {
            Obstacle::Denied(errno) => {
                write!(f, "{way}: {errno}; ")?;
                f.write_str(match way {
                    OpenWay::DeviceNode => {
                        "give the user read and write permission on the device node"
                    }
                    OpenWay::Syscall => {
                        "set the sysctl vm.unprivileged_userfaultfd to 1, or grant CAP_SYS_PTRACE, \
                         or use the device node"
                    }
                    OpenWay::SyscallUserModeOnly => {
                        "this way needs no privilege, so a seccomp filter or a security module \
                         denies it: allow userfaultfd there"
                    }
                })
            }
            Obstacle::Absent(errno) => {
                write!(f, "{way}: {errno}; ")?;
                f.write_str(match way {
                    OpenWay::DeviceNode => {
                        "the node comes with Linux 6.1; in a container it must be passed in"
                    }
                    OpenWay::Syscall => "the kernel is built without CONFIG_USERFAULTFD",
                    OpenWay::SyscallUserModeOnly => {
                        "it comes with Linux 5.11, if built with CONFIG_USERFAULTFD"
                    }
                })
            }
            Obstacle::Lacks(features) => {
                write!(f, "{way}: the kernel lacks {features}; a newer one may have it")
            }
            Obstacle::Withheld { features, errno } => write!(
                f,
                "{way}: {errno} when asking for {features}; EVENT_FORK takes CAP_SYS_PTRACE"
            ),
        }
    }
}

/// Why no userfaultfd could be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Every way was tried; each with its reason and what can be done about it.
    #[error("no way to a userfaultfd: {}", list(.0))]
    NoWay(Vec<Attempt>),
    /// A way that is there and allowed failed for lack of something else, such as file
    /// descriptors; a lesser way is not taken then.
    #[error("opening {way}: cannot {doing}: {errno}")]
    System {
        /// The way.
        way: OpenWay,
        /// The step that failed.
        doing: &'static str,
        /// The kernel's reason.
        errno: Errno,
    },
}

fn list(attempts: &[Attempt]) -> String {
    if attempts.is_empty() {
        return "none was to be tried".to_owned();
    }
    attempts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ")
}

/// What to open, and how.
///
/// By default every way is tried, from [`OpenWay::DeviceNode`] down, no feature is asked for, and
/// reads do not block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    required: Features,
    optional: Features,
    ways: Vec<OpenWay>,
    nonblocking: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            required: Features::empty(),
            optional: Features::empty(),
            ways: OpenWay::ALL.to_vec(),
            nonblocking: true,
        }
    }
}

impl Options {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Features without which a descriptor is of no use.
    pub fn required(mut self, features: Features) -> Self {
        self.required = features;
        self
    }

    /// Features to enable where the kernel has them and lets the caller have them.
    pub fn optional(mut self, features: Features) -> Self {
        self.optional = features;
        self
    }

    /// The ways to try, in this order.
    pub fn ways(mut self, ways: impl Into<Vec<OpenWay>>) -> Self {
        self.ways = ways.into();
        self
    }

    /// Whether reading when nothing is pending returns at once (the default) or waits. A blocking
    /// descriptor cannot be polled: `poll` answers POLLERR.
    pub fn nonblocking(mut self, nonblocking: bool) -> Self {
        self.nonblocking = nonblocking;
        self
    }

    /// Opens a userfaultfd of this process, close-on-exec, by the first way that leads to one with
    /// the required features.
    ///
    /// A way that is denied or absent falls through to the next;
    /// [`Negotiated::opened_by`] says which it was.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoWay`] with the reason of every way, or [`OpenError::System`].
    pub fn open(&self) -> Result<Userfaultfd, OpenError> {
        let mut attempts = Vec::with_capacity(self.ways.len());
        for &way in &self.ways {
            match self.open_by(way)? {
                Ok(userfaultfd) => return Ok(userfaultfd),
                Err(obstacle) => attempts.push(Attempt { way, obstacle }),
            }
        }
        Err(OpenError::NoWay(attempts))
    }

    fn open_by(&self, way: OpenWay) -> Result<Result<Userfaultfd, Obstacle>, OpenError> {
        let system = |doing| move |errno| OpenError::System { way, doing, errno };

        // A descriptor can be asked only once, so one is spent on what the kernel has.
        let scout = match self.create(way) {
            Ok(fd) => fd,
            Err(errno @ (Errno::PERM | Errno::ACCESS)) => return Ok(Err(Obstacle::Denied(errno))),
            Err(
                errno @ (Errno::NOENT
                | Errno::NOSYS
                | Errno::NODEV
                | Errno::NXIO
                | Errno::INVAL
                | Errno::NOTTY),
            ) => {
                return Ok(Err(Obstacle::Absent(errno)));
            }
            Err(errno) => return Err(system("create a descriptor")(errno)),
        };
        let (available, _) =
            handshake(&scout, Features::empty()).map_err(system("ask for the features"))?;
        drop(scout);

        let lacking = self.required - available;
        if !lacking.is_empty() {
            return Ok(Err(Obstacle::Lacks(lacking)));
        }

        let mut enabled = self.required | (self.optional & available);
        loop {
            let fd = self.create(way).map_err(system("create a second descriptor"))?;
            match handshake(&fd, enabled) {
                Ok((_, ioctls)) => {
                    let negotiated = Negotiated { available, enabled, ioctls, opened_by: way };
                    return Ok(Ok(Userfaultfd::opened(fd, negotiated)));
                }
                Err(Errno::PERM) => {
                    let without = enabled - (Features::EVENT_FORK - self.required);
                    if without == enabled {
                        let obstacle =
                            Obstacle::Withheld { features: self.required, errno: Errno::PERM };
                        return Ok(Err(obstacle));
                    }
                    enabled = without;
                }
                Err(errno) => return Err(system("enable the features")(errno)),
            }
        }
    }

    fn create(&self, way: OpenWay) -> Result<OwnedFd, Errno> {
        let mut flags = UserfaultfdFlags::CLOEXEC;
        if self.nonblocking {
            flags |= UserfaultfdFlags::NONBLOCK;
        }
        match way {
            OpenWay::DeviceNode => {
                let device = rustix::fs::open(
                    "/dev/userfaultfd",
                    OFlags::RDWR | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                return abi::new_from_device(&device, flags.bits());
            }
            OpenWay::Syscall => {}
            OpenWay::SyscallUserModeOnly => {
                flags |=
                    UserfaultfdFlags::from_bits_retain(linux_raw_sys::general::UFFD_USER_MODE_ONLY);
            }
        }
        // SAFETY: a descriptor by itself touches no memory; what is done with it is answered for
        // where ranges are registered.
        unsafe { rustix::mm::userfaultfd(flags) }
    }
}

/// Enables `features` on a fresh descriptor; answers with all the kernel has, and the operations.
fn handshake(fd: &OwnedFd, features: Features) -> Result<(Features, Ioctls), Errno> {
    let mut arg = abi::uffdio_api { api: abi::UFFD_API, features: features.bits(), ioctls: 0 };
    abi::handshake(fd, &mut arg)?;
    Ok((Features::from_bits_retain(arg.features), Ioctls::from_bits_retain(arg.ioctls)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_every_way_and_its_remedy() {
        let error = OpenError::NoWay(vec![
            Attempt { way: OpenWay::DeviceNode, obstacle: Obstacle::Denied(Errno::ACCESS) },
            Attempt { way: OpenWay::Syscall, obstacle: Obstacle::Denied(Errno::PERM) },
            Attempt {
                way: OpenWay::SyscallUserModeOnly,
                obstacle: Obstacle::Lacks(Features::MOVE | Features::POISON),
            },
        ]);
        let text = error.to_string();
        for part in ["/dev/userfaultfd", "vm.unprivileged_userfaultfd", "POISON | MOVE"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn no_ways_no_userfaultfd() {
        let error = Options::new().ways([]).open().unwrap_err();
        assert_eq!(error, OpenError::NoWay(Vec::new()));
    }
}
