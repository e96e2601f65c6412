//! A userfaultfd of another process's memory.

use std::os::fd::{AsFd, OwnedFd};

use pageferry_uffd::{Attempt, Features, HostAddress, Obstacle, OpenWay, Userfaultfd};
use rustix::{
    io::Errno,
    process::{ForeignRawFd, PidfdFlags, PidfdGetfdFlags},
};

use crate::{
    ProcessError, Stopped,
    stop::Session,
    sys::uffd::{NEW, handshake},
};

/// What userfaultfd is wanted.
///
/// With the events of forks, unmapping, removing and moving ([`Features::EVENT_FORK`] and so on) the
/// process waits, at each such call, until the event has been read: who asks for them has to read
/// until the descriptor is closed, and of a fork take the descriptor of the child from the event,
/// or the child's memory stays registered with nobody to answer. Without them, a child is not
/// tracked and not held up; memory that is unmapped or moved is not tracked any more, and what is
/// mapped anew was never.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserfaultfdRequest {
    required: Features,
    optional: Features,
    ways: Vec<OpenWay>,
}

impl UserfaultfdRequest {
    /// One with these features, for faults taken inside the kernel too.
    ///
    /// The exception is [`Features::WP_ASYNC`]: there no fault is ever waited for when only writes
    /// are tracked, so that one which serves only user-mode faults will do, for which the other
    /// process needs no rights. Choose the [`ways`](Self::ways) if pages are to be served too.
    pub fn new(required: Features) -> Self {
        let mut ways = vec![OpenWay::Syscall, OpenWay::DeviceNode];
        if required.contains(Features::WP_ASYNC) {
            ways.push(OpenWay::SyscallUserModeOnly);
        }
        Self { required, optional: Features::empty(), ways }
    }

    /// Features to enable where the kernel has them and lets this process have them.
    pub fn optional(mut self, features: Features) -> Self {
        self.optional = features;
        self
    }

    /// The ways to try, in this order. The rights they take are those of the other process.
    pub fn ways(mut self, ways: impl Into<Vec<OpenWay>>) -> Self {
        self.ways = ways.into();
        self
    }
}

impl Stopped<'_> {
    /// Has the process open a userfaultfd of its memory, and hand it over. Of that nothing is left
    /// in it; the descriptor returned is the only one, is close-on-exec, and reading from it does
    /// not block.
    ///
    /// What is registered with it, by [`Userfaultfd::register_raw`], is memory of the other
    /// process. When the descriptor is closed, or this process dies, the kernel ends all
    /// registrations: write protection is lifted and who waits goes on. After the process has
    /// started another program (exec), or ended, its operations fail with ESRCH, and REGISTER and
    /// UNREGISTER with ENOMEM.
    ///
    /// # Errors
    ///
    /// As [`syscall`](Self::syscall); [`ProcessError::NoUserfaultfd`] with each way and what was in
    /// it.
    pub fn open_userfaultfd(
        &mut self,
        request: &UserfaultfdRequest,
    ) -> Result<Userfaultfd, ProcessError> {
        let pid = self.process().pid();
        let mut attempts = Vec::new();
        for &way in &request.ways {
            let opened = self.open_by(way, request);
            match opened.map_err(|error| self.process().confirm(error))? {
                Ok(opened) => return Ok(opened),
                Err(obstacle) => attempts.push(Attempt { way, obstacle }),
            }
        }
        Err(ProcessError::NoUserfaultfd { pid, attempts })
    }

    fn open_by(
        &mut self,
        way: OpenWay,
        request: &UserfaultfdRequest,
    ) -> Result<Result<Userfaultfd, Obstacle>, ProcessError> {
        let pid = self.process().pid();
        let kernel = |doing| move |errno| ProcessError::Kernel { pid, doing, errno };
        let mut fd = match self.session(move |session| session.make_userfaultfd(way))?? {
            Ok(fd) => fd,
            Err(obstacle) => return Ok(Err(obstacle)),
        };
        let mut features = request.required | request.optional;
        // A refusal leaves the descriptor as it was. A second one is needed only to learn what the
        // kernel has.
        loop {
            let errno = match handshake(fd.as_fd(), features) {
                Ok(_) => break,
                Err(errno) => errno,
            };
            let fewer = match errno {
                Errno::PERM => features - (Features::EVENT_FORK - request.required),
                Errno::INVAL => {
                    let available = handshake(fd.as_fd(), Features::empty())
                        .map_err(kernel("ask its userfaultfd for the kernel's features"))?;
                    let lacking = request.required - available;
                    if !lacking.is_empty() {
                        return Ok(Err(Obstacle::Lacks(lacking)));
                    }
                    fd = match self.session(move |session| session.make_userfaultfd(way))?? {
                        Ok(fd) => fd,
                        Err(obstacle) => return Ok(Err(obstacle)),
                    };
                    features & available
                }
                errno => return Err(kernel("enable features of its userfaultfd")(errno)),
            };
            if fewer == features {
                return match errno {
                    Errno::PERM => {
                        Ok(Err(Obstacle::Withheld { features: request.required, errno }))
                    }
                    errno => Err(kernel("enable features of its userfaultfd")(errno)),
                };
            }
            features = fewer;
        }
        let uffd = Userfaultfd::from_received_fd(fd, features, way);
        uffd.map(Ok).map_err(|source| ProcessError::Userfaultfd { pid, source })
    }
}

/// The page that the path of the device node is written to.
const PAGE: u64 = 4096;
const DEVICE: &[u8] = b"/dev/userfaultfd\0";
/// Flags of a userfaultfd, whichever way it is opened.
const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

impl Session {
    /// Has the process make a userfaultfd, takes it, and has it close its own.
    fn make_userfaultfd(
        &mut self,
        way: OpenWay,
    ) -> Result<Result<OwnedFd, Obstacle>, ProcessError> {
        let made = match way {
            OpenWay::Syscall => self.call(libc::SYS_userfaultfd, [FLAGS, 0, 0, 0, 0, 0])?,
            OpenWay::SyscallUserModeOnly => {
                let flags = FLAGS | u64::from(linux_raw_sys::general::UFFD_USER_MODE_ONLY);
                self.call(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0])?
            }
            OpenWay::DeviceNode => self.make_by_device()?,
        };
        let number = match made {
            Ok(number) => number,
            Err(errno @ (Errno::PERM | Errno::ACCESS)) => return Ok(Err(Obstacle::Denied(errno))),
            Err(
                errno @ (Errno::NOENT
                | Errno::NOSYS
                | Errno::NODEV
                | Errno::NXIO
                | Errno::INVAL
                | Errno::NOTTY),
            ) => return Ok(Err(Obstacle::Absent(errno))),
            Err(errno) => {
                let (pid, doing) = (self.pid(), "have it make a userfaultfd");
                return Err(ProcessError::Kernel { pid, doing, errno });
            }
        };
        let taken = self.take(number);
        // Whether or not it could be taken.
        self.close(number)?;
        taken.map(Ok)
    }

    fn call(
        &mut self,
        number: libc::c_long,
        arguments: [u64; 6],
    ) -> Result<Result<u64, Errno>, ProcessError> {
        self.syscall(number.cast_unsigned(), arguments)
    }

    /// A copy of a descriptor of the process.
    fn take(&self, number: u64) -> Result<OwnedFd, ProcessError> {
        let failed = self.failed("take over a descriptor of it");
        let number = ForeignRawFd::try_from(number).map_err(|_| failed(Errno::BADF))?;
        let get = |pidfd: &dyn AsFd| {
            rustix::process::pidfd_getfd(pidfd.as_fd(), number, PidfdGetfdFlags::empty())
        };
        let thread = self.a_thread()?;
        let fd = if thread == self.pid() {
            get(&self.process())
        } else {
            // The table of descriptors of the first thread, which has ended, is gone.
            let flags = PidfdFlags::from_bits_retain(PIDFD_THREAD);
            rustix::process::pidfd_open(thread, flags).and_then(|pidfd| get(&pidfd))
        };
        fd.map_err(failed)
    }

    fn close(&mut self, number: u64) -> Result<(), ProcessError> {
        let closed = self.call(libc::SYS_close, [number, 0, 0, 0, 0, 0])?;
        closed.map(drop).map_err(self.failed("have it close a descriptor"))
    }

    /// Has the process open the device node and make a userfaultfd by it.
    fn make_by_device(&mut self) -> Result<Result<u64, Errno>, ProcessError> {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let page = [0, PAGE, protection, flags, u64::MAX, 0];
        let at = match self.call(libc::SYS_mmap, page)? {
            Ok(at) => at,
            Err(errno) => return Err(self.failed("have it map a page")(errno)),
        };
        let made = self.make_by_path(at);
        let unmapped = self.call(libc::SYS_munmap, [at, PAGE, 0, 0, 0, 0])?;
        let made = made?;
        unmapped.map_err(self.failed("have it unmap a page"))?;
        Ok(made)
    }

    fn make_by_path(&mut self, path: u64) -> Result<Result<u64, Errno>, ProcessError> {
        self.write(HostAddress::new(path), DEVICE)?;
        let flags = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
        let here = i64::from(libc::AT_FDCWD).cast_unsigned();
        let device = match self.call(libc::SYS_openat, [here, path, flags, 0, 0, 0])? {
            Ok(device) => device,
            Err(errno) => return Ok(Err(errno)),
        };
        let made = self.call(libc::SYS_ioctl, [device, NEW.into(), FLAGS, 0, 0, 0]);
        self.close(device)?;
        made
    }
}

/// `PIDFD_THREAD`, since Linux 6.9: a descriptor of a thread that is not the first.
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
