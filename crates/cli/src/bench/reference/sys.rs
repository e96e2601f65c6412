//! userfaultfd(2) and ioctl_userfaultfd(2), as thin as they go.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use linux_raw_sys::{
    general::{
        UFFD_API, UFFD_USER_MODE_ONLY, UFFDIO_COPY_MODE_DONTWAKE, uffd_msg, uffdio_api,
        uffdio_continue, uffdio_copy, uffdio_poison, uffdio_range, uffdio_register,
    },
    ioctl::{
        UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE,
    },
};

/// `_IO(0xAA, 0)`: opens a userfaultfd on `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: u32 = 0xaa00;
/// `_IOWR(0xAA, 8, struct uffdio_poison)`.
const UFFDIO_POISON: u32 = 0xc000_aa08 | (size_of::<uffdio_poison>() as u32) << 16;
/// `UFFDIO_CONTINUE_MODE_DONTWAKE`.
const CONTINUE_MODE_DONTWAKE: u64 = 1;

const OPEN_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// A range of registered memory, in bytes.
#[derive(Copy, Clone, Debug)]
pub(in crate::bench) struct Range {
    pub(in crate::bench) start: u64,
    pub(in crate::bench) len: u64,
}

impl Range {
    fn raw(self) -> uffdio_range {
        uffdio_range { start: self.start, len: self.len }
    }
}

/// Opens a non-blocking userfaultfd by device node, system call or user-mode-only system call,
/// whichever works first, and enables `features`.
pub(in crate::bench) fn open(features: u64) -> io::Result<OwnedFd> {
    let uffd = open_device().or_else(|_| open_syscall(0)).or_else(|_| {
        // The guest's touches are made in user mode, so nothing is lost.
        open_syscall(UFFD_USER_MODE_ONLY as libc::c_int)
    })?;
    enable(uffd, features)
}

/// The same for a guest of KVM, whose faults are the kernel's: never user-mode-only.
pub(in crate::bench) fn open_for_kernel(features: u64) -> io::Result<OwnedFd> {
    enable(open_device().or_else(|_| open_syscall(0))?, features)
}

fn enable(uffd: OwnedFd, features: u64) -> io::Result<OwnedFd> {
    let mut api = uffdio_api { api: u64::from(UFFD_API), features, ioctls: 0 };
    // SAFETY: UFFDIO_API takes a `uffdio_api`.
    unsafe { ioctl(uffd.as_raw_fd(), UFFDIO_API, &mut api)? };
    Ok(uffd)
}

fn open_device() -> io::Result<OwnedFd> {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: USERFAULTFD_IOC_NEW takes open flags by value.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, OPEN_FLAGS) })
}

fn open_syscall(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd(2) takes one integer.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, OPEN_FLAGS | flags) } as libc::c_int)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `argument` is what the kernel expects for `request`.
unsafe fn ioctl<T>(fd: RawFd, request: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: as this function's contract; the argument lives through the call.
    match unsafe { libc::ioctl(fd, request as _, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Registers `range`, in `UFFDIO_REGISTER_MODE_*` mode.
pub(in crate::bench) fn register(uffd: RawFd, range: Range, mode: u64) -> io::Result<()> {
    let mut argument = uffdio_register { range: range.raw(), mode, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes a `uffdio_register`; it changes how faults are served, not
    // what is mapped.
    unsafe { ioctl(uffd, UFFDIO_REGISTER, &mut argument) }
}

/// Unregisters `range`, which wakes all its waiting threads.
pub(in crate::bench) fn unregister(uffd: RawFd, range: Range) -> io::Result<()> {
    // SAFETY: UFFDIO_UNREGISTER takes a `uffdio_range`.
    unsafe { ioctl(uffd, UFFDIO_UNREGISTER, &mut range.raw()) }
}

/// Marks `range`, which is absent: whoever touches it gets SIGBUS, until something is installed there.
pub(in crate::bench) fn poison(uffd: RawFd, range: Range) -> io::Result<()> {
    let Range { mut start, len } = range;
    let end = start + len;
    while start < end {
        let rest = uffdio_range { start, len: end - start };
        let mut argument = uffdio_poison { range: rest, mode: 0, updated: 0 };
        // SAFETY: UFFDIO_POISON takes a `uffdio_poison`; it changes only what is absent.
        match unsafe { ioctl(uffd, UFFDIO_POISON, &mut argument) } {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                start += argument.updated.max(0) as u64;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Runs an install until it is done. Returns 0 or an errno.
///
/// EEXIST means that the page is there: its threads still have to be woken. EAGAIN means that the
/// address space was changing.
///
/// # Safety
/// `argument` is what the kernel expects for `request`. Async-signal-safe.
#[inline]
unsafe fn install<T>(
    uffd: RawFd,
    request: u32,
    argument: &mut T,
    mut page: uffdio_range,
    wake: bool,
) -> i32 {
    loop {
        // SAFETY: as this function's contract.
        if unsafe { libc::ioctl(uffd, request as _, std::ptr::from_mut(argument)) } == 0 {
            return 0;
        }
        match errno() {
            libc::EAGAIN => {}
            libc::EEXIST if !wake => return 0,
            libc::EEXIST => {
                // SAFETY: UFFDIO_WAKE takes a `uffdio_range`.
                return match unsafe { ioctl(uffd, UFFDIO_WAKE, &mut page) } {
                    Ok(()) => 0,
                    Err(_) => errno(),
                };
            }
            other => return other,
        }
    }
}

#[inline]
fn errno() -> i32 {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() }
}

/// UFFDIO_COPY of `len` bytes at `src` to `dst`. Returns 0 or an errno. Async-signal-safe.
///
/// # Safety
/// `src` is readable for `len` bytes, and `dst` lies in memory registered with `uffd`.
#[inline]
pub(in crate::bench) unsafe fn copy(
    uffd: RawFd,
    dst: u64,
    src: *const u8,
    len: u64,
    wake: bool,
) -> i32 {
    let mode = if wake { 0 } else { u64::from(UFFDIO_COPY_MODE_DONTWAKE) };
    let mut argument = uffdio_copy { dst, src: src as u64, len, mode, copy: 0 };
    let page = uffdio_range { start: dst, len };
    // SAFETY: UFFDIO_COPY takes a `uffdio_copy`.
    unsafe { install(uffd, UFFDIO_COPY, &mut argument, page, wake) }
}

/// UFFDIO_CONTINUE of `len` bytes at `start`. Returns 0 or an errno. Async-signal-safe.
///
/// # Safety
/// `start` lies in memory registered with `uffd`.
#[inline]
pub(in crate::bench) unsafe fn make_present(uffd: RawFd, start: u64, len: u64, wake: bool) -> i32 {
    let range = uffdio_range { start, len };
    let mode = if wake { 0 } else { CONTINUE_MODE_DONTWAKE };
    let mut argument = uffdio_continue { range, mode, mapped: 0 };
    // SAFETY: UFFDIO_CONTINUE takes a `uffdio_continue`.
    unsafe { install(uffd, UFFDIO_CONTINUE, &mut argument, range, wake) }
}

/// One message of a userfaultfd's queue that is a page fault.
#[derive(Copy, Clone, Debug)]
pub(in crate::bench) struct Message {
    pub(in crate::bench) address: u64,
    /// The faulting thread, if UFFD_FEATURE_THREAD_ID was asked for.
    pub(in crate::bench) thread: u32,
}

/// A buffer for messages.
pub(in crate::bench) struct Messages(Vec<uffd_msg>);

impl Messages {
    /// For at most `capacity` messages a read.
    pub(in crate::bench) fn new(capacity: usize) -> Self {
        // SAFETY: all-zero bytes are a valid `uffd_msg`.
        Self(vec![unsafe { std::mem::zeroed() }; capacity])
    }

    /// One read(2): the messages that were there, none if there were none, or the errno. No
    /// feature that is enabled here makes messages of another kind than page faults.
    #[inline]
    pub(in crate::bench) fn read(
        &mut self,
        uffd: RawFd,
    ) -> Result<impl Iterator<Item = Message>, i32> {
        let bytes = std::mem::size_of_val(self.0.as_slice());
        // SAFETY: the buffer has that many bytes, and any bytes are a valid `uffd_msg`.
        let got = unsafe { libc::read(uffd, self.0.as_mut_ptr().cast(), bytes) };
        let count = match got {
            -1 if matches!(errno(), libc::EAGAIN | libc::EINTR) => 0,
            -1 => return Err(errno()),
            bytes => bytes as usize / size_of::<uffd_msg>(),
        };
        Ok(self.0[..count].iter().map(|message| {
            // SAFETY: every message is a page fault, whose part of the union is valid for any
            // bytes.
            let fault = unsafe { message.arg.pagefault };
            // SAFETY: as above; it is 0 without UFFD_FEATURE_THREAD_ID.
            Message { address: fault.address, thread: unsafe { fault.feat.ptid } }
        }))
    }
}

/// Waits for `uffd` to have messages (true) or for `stop` to be readable (false).
#[inline]
pub(in crate::bench) fn wait(uffd: RawFd, stop: RawFd) -> Result<bool, i32> {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(uffd), poll(stop)];
    loop {
        // SAFETY: `fds` is an array of two, valid through the call.
        match unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } {
            -1 if errno() == libc::EINTR => {}
            -1 => return Err(errno()),
            _ if fds[1].revents != 0 => return Ok(false),
            _ if fds[0].revents & libc::POLLERR != 0 => return Err(libc::EIO),
            _ => return Ok(true),
        }
    }
}

/// Makes `stop`, an eventfd, readable for good.
pub(in crate::bench) fn raise(stop: RawFd) -> io::Result<()> {
    let one = 1u64.to_ne_bytes();
    // SAFETY: `one` is 8 readable bytes.
    match unsafe { libc::write(stop, one.as_ptr().cast(), one.len()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
