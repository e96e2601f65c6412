//! The descriptor and its operations.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, FdFlags};

use crate::{
    EventBuffer, Features, HostAddress, HostRange, Ioctls, OpenWay, Operation, Outcome,
    RegisterMode, UffdError,
    abi::{self, uffdio_range},
};

/// What kernel and caller agreed on when the descriptor was opened.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// Everything the kernel has.
    pub available: Features,
    /// What is enabled on this descriptor.
    pub enabled: Features,
    /// The operations of the descriptor itself; those of a range come with its registration.
    pub ioctls: Ioctls,
    /// The way it was opened.
    pub opened_by: OpenWay,
}

/// Whether threads waiting for a range are woken when it is done.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Wake {
    /// They are.
    #[default]
    Yes,
    /// They are not; [`Userfaultfd::wake`] follows, or nobody waits.
    No,
}

impl Wake {
    const fn no(self, bit: u64) -> u64 {
        match self {
            Self::Yes => 0,
            Self::No => bit,
        }
    }
}

/// How pages are installed by [`Userfaultfd::copy`] and [`Userfaultfd::continue_range`].
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct CopyMode {
    /// Whether waiting threads are woken.
    pub wake: bool,
    /// Whether the pages are write-protected from the start; the range must be registered with
    /// [`RegisterMode::WP`].
    pub write_protect: bool,
}

impl CopyMode {
    /// Wake, no write protection.
    pub const WAKE: Self = Self { wake: true, write_protect: false };
    /// Neither.
    pub const NO_WAKE: Self = Self { wake: false, write_protect: false };

    /// The same, with the pages write-protected.
    pub const fn write_protected(self) -> Self {
        Self { write_protect: true, ..self }
    }

    const fn bits(self, write_protect: u64) -> u64 {
        let wake = if self.wake { 0 } else { abi::MODE_DONTWAKE };
        if self.write_protect { wake | write_protect } else { wake }
    }
}

impl Default for CopyMode {
    fn default() -> Self {
        Self::WAKE
    }
}

/// How [`Userfaultfd::move_pages`] moves.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct MoveMode {
    /// Whether waiting threads are woken.
    pub wake: Wake,
    /// Whether absent source pages are skipped, leaving the destination absent too, instead of
    /// ending the move.
    pub allow_src_holes: bool,
}

/// A userfaultfd past its handshake.
///
/// Losing the last descriptor of a userfaultfd resumes every thread that waits on it, with pages of
/// zeros: keep it until nobody can fault any more or every page is present or poisoned.
///
/// The operations install pages only where nothing is present yet, in ranges registered with a
/// userfaultfd; everything that could break somebody's memory was promised when the range was
/// registered. Beware that it need not be this userfaultfd: the kernel lets any one of the same
/// address space install, which matters where a range is unmapped and its addresses are used again.
/// All operations may be called from any number of threads at once.
///
/// See `Documentation/admin-guide/mm/userfaultfd.rst` and `ioctl_userfaultfd(2)`.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    negotiated: Negotiated,
    received: bool,
}

impl Userfaultfd {
    pub(crate) fn opened(fd: OwnedFd, negotiated: Negotiated) -> Self {
        Self { fd, negotiated, received: false }
    }

    /// Takes over a userfaultfd that another process opened, or that a fork event brought, and that
    /// is past its handshake. `enabled` and `opened_by` are what the sender says.
    ///
    /// The descriptor is made close-on-exec.
    ///
    /// # Errors
    ///
    /// [`UffdError::NotUserfaultfd`] when it is something else; [`UffdError::Inspect`] when that
    /// cannot be found out, for which `/proc` must be mounted.
    pub fn from_received_fd(
        fd: OwnedFd,
        enabled: Features,
        opened_by: OpenWay,
    ) -> Result<Self, UffdError> {
        let number = fd.as_raw_fd();
        let inspect = |errno| UffdError::Inspect { fd: number, errno };
        let found =
            rustix::fs::readlink(format!("/proc/self/fd/{number}"), Vec::new()).map_err(inspect)?;
        if found.to_bytes() != b"anon_inode:[userfaultfd]" {
            let found = found.to_string_lossy().into_owned();
            return Err(UffdError::NotUserfaultfd { fd: number, found });
        }
        rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(inspect)?;
        let negotiated = Negotiated {
            available: enabled,
            enabled,
            ioctls: Ioctls::API | Ioctls::REGISTER | Ioctls::UNREGISTER,
            opened_by,
        };
        Ok(Self { fd, negotiated, received: true })
    }

    /// What was agreed on at opening. For a received descriptor: what the sender said.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Whether faults taken inside the kernel fail instead of being served.
    pub fn user_mode_only(&self) -> bool {
        self.negotiated.opened_by == OpenWay::SyscallUserModeOnly
    }

    /// Whether the descriptor came from elsewhere, and so may serve another address space.
    pub fn is_received(&self) -> bool {
        self.received
    }

    /// Installs a copy of `src` at `dst` (`UFFDIO_COPY`). Both `dst` and the length are multiples of
    /// the page size of the range.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; most often EINVAL for alignment or mode, ENOMEM, ENOSPC.
    pub fn copy(&self, dst: HostAddress, src: &[u8], mode: CopyMode) -> Result<Outcome, UffdError> {
        // SAFETY: a slice is readable for its length.
        unsafe { self.copy_from_ptr(dst, src.as_ptr(), src.len() as u64, mode) }
    }

    /// [`copy`](Self::copy) from memory of which no slice may exist because others write to it.
    ///
    /// # Safety
    ///
    /// `src` is readable for `len` bytes.
    ///
    /// # Errors
    ///
    /// As [`copy`](Self::copy).
    pub unsafe fn copy_from_ptr(
        &self,
        dst: HostAddress,
        src: *const u8,
        len: u64,
        mode: CopyMode,
    ) -> Result<Outcome, UffdError> {
        let what = Operation::Copy;
        let range = destination(what, dst, len)?;
        let mut arg = abi::uffdio_copy {
            dst: dst.get(),
            src: HostAddress::from_ptr(src).get(),
            len,
            mode: mode.bits(abi::COPY_MODE_WP),
            copy: 0,
        };
        // SAFETY: the kernel only reads the source, which the caller promises to be readable, and
        // fills absent pages of ranges registered for that.
        let result = unsafe { abi::copy(&self.fd, &mut arg) };
        outcome(what, range, arg.copy, result)
    }

    /// Installs pages of zeros (`UFFDIO_ZEROPAGE`); not for hugetlb memory.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; most often EINVAL for alignment or hugetlb.
    pub fn zeropage(&self, range: HostRange, wake: Wake) -> Result<Outcome, UffdError> {
        let mut arg = abi::uffdio_zeropage {
            range: raw(range),
            mode: wake.no(abi::MODE_DONTWAKE),
            zeropage: 0,
        };
        // SAFETY: the kernel fills absent pages of ranges registered for that.
        let result = unsafe { abi::zeropage(&self.fd, &mut arg) };
        outcome(Operation::ZeroPage, range, arg.zeropage, result)
    }

    /// Maps what the page cache has (`UFFDIO_CONTINUE`), in a range registered with
    /// [`RegisterMode::MINOR`].
    ///
    /// # Errors
    ///
    /// [`UffdError`]; EFAULT when the page cache has nothing at the start of the range.
    pub fn continue_range(&self, range: HostRange, mode: CopyMode) -> Result<Outcome, UffdError> {
        let mut arg = abi::uffdio_continue {
            range: raw(range),
            mode: mode.bits(abi::CONTINUE_MODE_WP),
            mapped: 0,
        };
        // SAFETY: the kernel maps, where nothing is mapped, the pages that the mapping is of.
        let result = unsafe { abi::continue_range(&self.fd, &mut arg) };
        outcome(Operation::Continue, range, arg.mapped, result)
    }

    /// Marks absent pages as poisoned (`UFFDIO_POISON`): an access raises SIGBUS, as for a memory
    /// error. [`copy`](Self::copy) and [`continue_range`](Self::continue_range) may replace the
    /// mark by a page.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; EINVAL when the kernel lacks [`Features::POISON`].
    pub fn poison(&self, range: HostRange, wake: Wake) -> Result<Outcome, UffdError> {
        let mut arg =
            abi::uffdio_poison { range: raw(range), mode: wake.no(abi::MODE_DONTWAKE), updated: 0 };
        // SAFETY: the kernel marks absent pages of ranges registered for that.
        let result = unsafe { abi::poison(&self.fd, &mut arg) };
        outcome(Operation::Poison, range, arg.updated, result)
    }

    /// Moves the pages at `src` to `dst`, without copying (`UFFDIO_MOVE`). Both are private
    /// anonymous memory; `dst` is registered, the pages at `src` belong to this process alone. The
    /// source is left absent.
    ///
    /// # Safety
    ///
    /// `src` is memory of this process, which the descriptor serves, and nothing relies on its contents:
    /// once moved it reads as zeros, or faults if it is registered.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; EBUSY when a source page is shared or pinned, EINVAL when source and
    /// destination do not fit, and always with a descriptor of another process.
    pub unsafe fn move_pages(
        &self,
        dst: HostAddress,
        src: HostRange,
        mode: MoveMode,
    ) -> Result<Outcome, UffdError> {
        let what = Operation::Move { from: src.start() };
        let range = destination(what, dst, src.len())?;
        let holes = if mode.allow_src_holes { abi::MOVE_MODE_ALLOW_SRC_HOLES } else { 0 };
        let mut arg = abi::uffdio_move {
            dst: dst.get(),
            src: src.start().get(),
            len: src.len(),
            mode: mode.wake.no(abi::MODE_DONTWAKE) | holes,
            move_: 0,
        };
        // SAFETY: the kernel fills absent pages of ranges registered for that; the source is the
        // caller's to give.
        let result = unsafe { abi::move_pages(&self.fd, &mut arg) };
        outcome(what, range, arg.move_, result)
    }

    /// Sets or lifts write protection (`UFFDIO_WRITEPROTECT`) on the whole of a range registered
    /// with [`RegisterMode::WP`]. Setting it wakes nobody, whatever `wake` says.
    ///
    /// # Errors
    ///
    /// [`UffdError`]. There is no partial progress: all, or [`Outcome::Retry`] with nothing done.
    pub fn write_protect(
        &self,
        range: HostRange,
        protect: bool,
        wake: Wake,
    ) -> Result<Outcome, UffdError> {
        let (what, mode) = if protect {
            // The kernel refuses DONTWAKE here as meaningless.
            (Operation::WriteProtect, abi::WRITEPROTECT_MODE_WP)
        } else {
            (Operation::WriteUnprotect, wake.no(abi::WRITEPROTECT_MODE_DONTWAKE))
        };
        let mut arg = abi::uffdio_writeprotect { range: raw(range), mode };
        // SAFETY: the kernel changes what a write does, in ranges registered for that.
        let result = unsafe { abi::write_protect(&self.fd, &mut arg) };
        let progress = if result.is_ok() { range.len().cast_signed() } else { 0 };
        outcome(what, range, progress, result)
    }

    /// Wakes the threads that wait for a page of `range` (`UFFDIO_WAKE`). They try again, and fault
    /// again if the page is still absent.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; EINVAL for an unaligned or empty range.
    pub fn wake(&self, range: HostRange) -> Result<(), UffdError> {
        // SAFETY: waking changes no memory, and `fd` is a userfaultfd by construction.
        unsafe { abi::wake(&self.fd, raw(range)) }.map_err(|errno| UffdError::Ioctl {
            what: Operation::Wake,
            range,
            errno,
        })
    }

    /// Registers a range (`UFFDIO_REGISTER`); answers with the operations it supports.
    /// [`register`](Self::register) does the same for memory of this process, safely.
    ///
    /// # Safety
    ///
    /// The range is memory of the process the descriptor serves. From now on whoever has a
    /// userfaultfd of that process, this one or another, decides what its absent pages contain and
    /// when an access to one ends, so nothing there may rely on absent pages being zero, or be
    /// referenced as a Rust value.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; EBUSY when another userfaultfd has part of it, EINVAL when it is not aligned,
    /// not mapped or of a kind that does not support the mode.
    pub unsafe fn register_raw(
        &self,
        range: HostRange,
        mode: RegisterMode,
    ) -> Result<Ioctls, UffdError> {
        let mut arg = abi::uffdio_register { range: raw(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: the caller answers for the range.
        unsafe { abi::register(&self.fd, &mut arg) }.map_err(|errno| UffdError::Ioctl {
            what: Operation::Register,
            range,
            errno,
        })?;
        Ok(Ioctls::from_bits_retain(arg.ioctls))
    }

    /// Ends the registration of a range (`UFFDIO_UNREGISTER`). Threads waiting in it resume, with
    /// pages of zeros where nothing was installed: poison what is absent first.
    ///
    /// # Errors
    ///
    /// [`UffdError`]; EINVAL for a range that is not mapped, ENOMEM when a mapping would have to be
    /// split and cannot be.
    pub fn unregister_raw(&self, range: HostRange) -> Result<(), UffdError> {
        // SAFETY: memory that is not registered behaves as any other, and `fd` is a userfaultfd by
        // construction.
        unsafe { abi::unregister(&self.fd, raw(range)) }.map_err(|errno| UffdError::Ioctl {
            what: Operation::Unregister,
            range,
            errno,
        })
    }

    /// Reads as many events as are pending and fit, in one `read(2)`, behind those still in `buf`;
    /// answers with how many. 0 means that nothing is pending (on a blocking descriptor it waits
    /// instead). Allocates nothing.
    ///
    /// Several threads may read from one descriptor; every event goes to one of them.
    ///
    /// # Errors
    ///
    /// [`UffdError::Read`], [`UffdError::BufferFull`] when `buf` has no room,
    /// [`UffdError::TornRead`].
    pub fn read_events(&self, buf: &mut EventBuffer) -> Result<usize, UffdError> {
        let (pending, capacity) = (buf.len(), buf.capacity());
        let room = buf.room();
        if room.is_empty() {
            return Err(UffdError::BufferFull { pending, capacity });
        }
        let bytes = loop {
            match rustix::io::read(&self.fd, &mut *room) {
                Ok(bytes) => break bytes,
                Err(Errno::AGAIN) => return Ok(0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(UffdError::Read { errno }),
            }
        };
        if !bytes.is_multiple_of(abi::MESSAGE_SIZE) {
            return Err(UffdError::TornRead { bytes });
        }
        let count = bytes / abi::MESSAGE_SIZE;
        buf.filled(count);
        Ok(count)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn raw(range: HostRange) -> uffdio_range {
    uffdio_range { start: range.start().get(), len: range.len() }
}

fn destination(what: Operation, start: HostAddress, len: u64) -> Result<HostRange, UffdError> {
    HostRange::try_new(start, len).ok_or(UffdError::Wraps { what, start, len })
}

fn outcome(
    what: Operation,
    range: HostRange,
    progress: i64,
    result: Result<(), Errno>,
) -> Result<Outcome, UffdError> {
    Outcome::classify(range.len(), progress, result).map_err(|errno| UffdError::Ioctl {
        what,
        range,
        errno,
    })
}
