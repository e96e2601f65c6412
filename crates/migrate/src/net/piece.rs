//! Bytes to be sent from where they lie, without a Rust reference to them.
#![allow(unsafe_code)]

use std::{io, marker::PhantomData, ops::Range, os::fd::AsRawFd};

use pageferry_memory::{Mapping, OutOfRange};
use rustix::fd::BorrowedFd;

/// Bytes that only the kernel will read: a slice, or memory that others may be writing.
///
/// A running or paused guest's memory may not be seen through `&[u8]`, because nothing stops
/// somebody else from changing it. The kernel, which copies it into a socket, does not mind.
#[derive(Copy, Clone, Debug)]
#[repr(transparent)]
pub struct Piece<'a> {
    raw: libc::iovec,
    memory: PhantomData<&'a ()>,
}

impl<'a> Piece<'a> {
    /// The `length` bytes from `start` on.
    ///
    /// # Safety
    /// They stay mapped, by the same mapping, during `'a`. They may be written meanwhile; that
    /// they cannot be read makes sending fail with EFAULT and is no safety matter.
    #[must_use]
    pub unsafe fn from_raw(start: *const u8, length: usize) -> Self {
        Self {
            raw: libc::iovec { iov_base: start.cast_mut().cast(), iov_len: length },
            memory: PhantomData,
        }
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.iov_len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of `range` among these.
    ///
    /// # Panics
    /// If `range` is not within them.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Piece<'a> {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {}", self.len());
        let start = self.raw.iov_base.cast::<u8>().wrapping_add(range.start);
        // SAFETY: within the bytes of `self`, which stay mapped during `'a`.
        unsafe { Self::from_raw(start, range.end - range.start) }
    }
}

impl<'a> From<&'a [u8]> for Piece<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        // SAFETY: borrowed for `'a`.
        unsafe { Self::from_raw(bytes.as_ptr(), bytes.len()) }
    }
}

/// Where received bytes belong: a buffer, or memory of a guest, of which there is no reference.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    Bytes(&'a mut [u8]),
    Memory {
        mapping: &'a Mapping,
        /// The place is all inside the mapping.
        offset: u64,
        length: usize,
    },
}

impl<'a> Place<'a> {
    /// The `length` bytes of the mapping from `offset` on.
    pub(crate) fn memory(
        mapping: &'a Mapping,
        offset: u64,
        length: usize,
    ) -> Result<Self, OutOfRange> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > mapping.range().len()) {
            return Err(OutOfRange { offset, len: length as u64, mapping: mapping.range() });
        }
        Ok(Self::Memory { mapping, offset, length })
    }

    /// Number of bytes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Memory { length, .. } => *length,
        }
    }

    /// The bytes from `from` on.
    ///
    /// # Panics
    /// If there are not so many.
    pub(super) fn rest(&mut self, from: usize) -> Place<'_> {
        match self {
            Self::Bytes(bytes) => Place::Bytes(&mut bytes[from..]),
            Self::Memory { mapping, offset, length } => {
                assert!(from <= *length, "{from} of {length}");
                Place::Memory { mapping, offset: *offset + from as u64, length: *length - from }
            }
        }
    }

    /// Copies `bytes`, no more than the place has, to its beginning.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        match self {
            Self::Bytes(place) => place[..bytes.len()].copy_from_slice(bytes),
            Self::Memory { mapping, offset, length } => {
                assert!(bytes.len() <= *length, "{} of {length}", bytes.len());
                mapping.write_at(*offset, bytes).expect("the place is inside the mapping");
            }
        }
    }

    fn iovec(&mut self) -> libc::iovec {
        let start = match self {
            Self::Bytes(bytes) => bytes.as_mut_ptr(),
            Self::Memory { mapping, offset, .. } => mapping.as_ptr().wrapping_add(*offset as usize),
        };
        libc::iovec { iov_base: start.cast(), iov_len: self.len() }
    }
}

/// readv(2) into `place` and then into `after`.
pub(super) fn read_places(
    socket: BorrowedFd<'_>,
    mut place: Place<'_>,
    after: &mut [u8],
) -> io::Result<usize> {
    let parts = [place.iovec(), Place::Bytes(after).iovec()];
    // SAFETY: both parts are mapped and writable during the call: buffers that are borrowed
    // exclusively, or memory of a mapping, of which no reference exists.
    let read = unsafe { libc::readv(socket.as_raw_fd(), parts.as_ptr(), parts.len() as i32) };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(read as usize) }
}

/// sendmsg(2) of as many of `pieces` as one call takes, without SIGPIPE.
pub(super) fn send_pieces(socket: BorrowedFd<'_>, pieces: &[Piece<'_>]) -> io::Result<usize> {
    const IOV_MAX: usize = 1024;
    // SAFETY: msghdr is plain data for which all-zero is "nothing of this".
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // `Piece` is transparent over iovec, and the kernel does not write through it.
    message.msg_iov = pieces.as_ptr().cast::<libc::iovec>().cast_mut();
    message.msg_iovlen = pieces.len().min(IOV_MAX) as _;
    // SAFETY: `message` points at `msg_iovlen` valid iovecs, each of memory that is mapped for
    // the piece's lifetime; no name and no control data.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
}
