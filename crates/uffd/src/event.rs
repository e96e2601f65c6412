//! Events: what a userfaultfd has to say, decoded.
//!
//! Source: `struct uffd_msg` in `include/uapi/linux/userfaultfd.h`.

use std::{
    fmt,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use linux_raw_sys::general as raw;

pub use crate::abi::MESSAGE_SIZE;
use crate::{HostAddress, HostRange};

/// What a fault was about.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum FaultKind {
    /// The page is not there.
    Missing,
    /// The page is in the page cache, but not mapped.
    Minor,
    /// The page is write-protected.
    WriteProtect,
}

/// A thread waits for a page.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Fault {
    /// The address; that of the page unless [`Features::EXACT_ADDRESS`] is enabled.
    ///
    /// [`Features::EXACT_ADDRESS`]: crate::Features::EXACT_ADDRESS
    pub address: HostAddress,
    /// What is wrong with the page.
    pub kind: FaultKind,
    /// Whether the access was a write.
    pub write: bool,
    /// The waiting thread's id, in the process-id name space of whoever reads; `None` unless
    /// [`Features::THREAD_ID`] is enabled.
    ///
    /// [`Features::THREAD_ID`]: crate::Features::THREAD_ID
    pub thread: Option<u32>,
}

/// One event. All but [`Fault`](Self::Fault) come only if their feature is enabled, and hold up the
/// thread that caused them until they are read.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A thread waits for a page.
    Fault(Fault),
    /// The process forked; the child's copies of the registered ranges belong to this new
    /// userfaultfd. See [`Userfaultfd::from_received_fd`].
    ///
    /// A thread of the same process that reads these events must not allocate between the fork and
    /// the read: the C library's `fork` holds the locks of its allocator, and does not return
    /// before the event is read.
    ///
    /// [`Userfaultfd::from_received_fd`]: crate::Userfaultfd::from_received_fd
    Fork {
        /// The child's userfaultfd.
        uffd: OwnedFd,
    },
    /// A registered range was moved.
    Remap {
        /// Where it was.
        from: HostAddress,
        /// Where it is.
        to: HostAddress,
        /// Its length in bytes before the move.
        len: u64,
    },
    /// Pages were discarded: they read as zeros, or fault again.
    Remove(HostRange),
    /// The range is not mapped any more.
    Unmap(HostRange),
}

/// An event as it is in the message: a fork's descriptor is only a number yet, owned by nobody.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum RawEvent {
    /// See [`Event::Fault`].
    Fault(Fault),
    /// See [`Event::Fork`].
    Fork {
        /// The child's userfaultfd, open in the process that read the message.
        uffd: RawFd,
    },
    /// See [`Event::Remap`].
    Remap {
        /// Where the range was.
        from: HostAddress,
        /// Where it is.
        to: HostAddress,
        /// Its length in bytes.
        len: u64,
    },
    /// See [`Event::Remove`].
    Remove(HostRange),
    /// See [`Event::Unmap`].
    Unmap(HostRange),
}

/// A message that is not one of the known kind.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The event number is not known.
    #[error("userfaultfd: unknown event {number:#x}")]
    UnknownEvent {
        /// The number.
        number: u8,
    },
    /// A fault with flags that are unknown, or exclude each other. What kind of fault it is cannot
    /// be told.
    #[error("userfaultfd: fault at {address} with flags {flags:#x}, which mean nothing known")]
    FaultFlags {
        /// Where.
        address: HostAddress,
        /// All flags.
        flags: u64,
    },
    /// A range that ends before it starts or wraps around the end of the address space.
    #[error("userfaultfd: {event} event with the range {start:#x} to {end:#x}")]
    BadRange {
        /// Which event.
        event: &'static str,
        /// Its start.
        start: u64,
        /// Its end; for a move, start plus length, wrapped.
        end: u64,
    },
    /// A fork's descriptor that cannot be one.
    #[error("userfaultfd: fork event with the file descriptor {fd:#x}")]
    BadDescriptor {
        /// The number.
        fd: u32,
    },
}

/// Decodes one message.
///
/// # Errors
///
/// [`DecodeError`]; never panics, whatever the bytes.
pub fn decode_message(message: &[u8; MESSAGE_SIZE]) -> Result<RawEvent, DecodeError> {
    let [first, second, third] = [8, 16, 24].map(|offset| {
        let mut word = [0; 8];
        word.copy_from_slice(&message[offset..offset + 8]);
        u64::from_ne_bytes(word)
    });
    // A u32 at the start of a 64-bit field, as the unions in the message have it.
    let half = |offset: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&message[offset..offset + 4]);
        u32::from_ne_bytes(word)
    };
    match u32::from(message[0]) {
        raw::UFFD_EVENT_PAGEFAULT => decode_fault(first, second, half(24)).map(RawEvent::Fault),
        raw::UFFD_EVENT_FORK => {
            let fd = half(8);
            RawFd::try_from(fd)
                .map(|uffd| RawEvent::Fork { uffd })
                .map_err(|_| DecodeError::BadDescriptor { fd })
        }
        raw::UFFD_EVENT_REMAP => {
            let (from, to, len) = (HostAddress::new(first), HostAddress::new(second), third);
            for start in [from, to] {
                if HostRange::try_new(start, len).is_none() {
                    let start = start.get();
                    let end = start.wrapping_add(len);
                    return Err(DecodeError::BadRange { event: "remap", start, end });
                }
            }
            Ok(RawEvent::Remap { from, to, len })
        }
        raw::UFFD_EVENT_REMOVE => decode_range("remove", first, second).map(RawEvent::Remove),
        raw::UFFD_EVENT_UNMAP => decode_range("unmap", first, second).map(RawEvent::Unmap),
        _ => Err(DecodeError::UnknownEvent { number: message[0] }),
    }
}

fn decode_fault(flags: u64, address: u64, thread: u32) -> Result<Fault, DecodeError> {
    const WRITE: u64 = raw::UFFD_PAGEFAULT_FLAG_WRITE as u64;
    const WP: u64 = raw::UFFD_PAGEFAULT_FLAG_WP as u64;
    const MINOR: u64 = raw::UFFD_PAGEFAULT_FLAG_MINOR as u64;

    let address = HostAddress::new(address);
    let kind = match flags & !WRITE {
        0 => FaultKind::Missing,
        WP => FaultKind::WriteProtect,
        MINOR => FaultKind::Minor,
        _ => return Err(DecodeError::FaultFlags { address, flags }),
    };
    let thread = (thread != 0).then_some(thread);
    Ok(Fault { address, kind, write: flags & WRITE != 0, thread })
}

fn decode_range(event: &'static str, start: u64, end: u64) -> Result<HostRange, DecodeError> {
    HostRange::from_bounds(HostAddress::new(start), HostAddress::new(end))
        .ok_or(DecodeError::BadRange { event, start, end })
}

/// Room for a fixed number of events, filled by [`Userfaultfd::read_events`] and emptied by
/// [`drain`](Self::drain).
///
/// Descriptors of fork events in it are closed when it is dropped.
///
/// [`Userfaultfd::read_events`]: crate::Userfaultfd::read_events
pub struct EventBuffer {
    /// Messages `next..end` were read by the kernel's hand and not taken yet.
    bytes: Box<[u8]>,
    next: usize,
    end: usize,
}

impl EventBuffer {
    /// Room for `capacity` events of 32 bytes each.
    ///
    /// # Panics
    ///
    /// When `capacity` is 0.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "an event buffer needs room for an event");
        Self { bytes: vec![0; capacity * MESSAGE_SIZE].into_boxed_slice(), next: 0, end: 0 }
    }

    /// How many events it can hold.
    pub fn capacity(&self) -> usize {
        self.bytes.len() / MESSAGE_SIZE
    }

    /// How many events are waiting in it.
    pub fn len(&self) -> usize {
        self.end - self.next
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the events out, in the order the kernel reported them. What is left when the iterator
    /// is dropped is discarded; descriptors of fork events are closed.
    pub fn drain(&mut self) -> Drain<'_> {
        Drain { buffer: self }
    }

    /// The free bytes behind the events, after moving those to the front.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let waiting = self.next * MESSAGE_SIZE..self.end * MESSAGE_SIZE;
        self.bytes.copy_within(waiting, 0);
        self.end -= self.next;
        self.next = 0;
        &mut self.bytes[self.end * MESSAGE_SIZE..]
    }

    /// Notes that a userfaultfd's read filled `count` messages of [`room`](Self::room).
    pub(crate) fn filled(&mut self, count: usize) {
        debug_assert!(self.end + count <= self.capacity());
        self.end += count;
    }

    fn take(&mut self) -> Option<Result<Event, DecodeError>> {
        if self.next == self.end {
            return None;
        }
        let start = self.next * MESSAGE_SIZE;
        let mut message = [0; MESSAGE_SIZE];
        message.copy_from_slice(&self.bytes[start..start + MESSAGE_SIZE]);
        // Before anything else, so that no message is ever taken twice.
        self.next += 1;
        Some(decode_message(&message).map(|event| match event {
            RawEvent::Fault(fault) => Event::Fault(fault),
            RawEvent::Fork { uffd } => {
                // SAFETY: the message was read from a userfaultfd, so the kernel opened the
                // descriptor for whoever reads it, and it is taken only this once.
                Event::Fork { uffd: unsafe { OwnedFd::from_raw_fd(uffd) } }
            }
            RawEvent::Remap { from, to, len } => Event::Remap { from, to, len },
            RawEvent::Remove(range) => Event::Remove(range),
            RawEvent::Unmap(range) => Event::Unmap(range),
        }))
    }
}

impl Drop for EventBuffer {
    fn drop(&mut self) {
        while let Some(event) = self.take() {
            drop(event);
        }
    }
}

impl fmt::Debug for EventBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBuffer")
            .field("capacity", &self.capacity())
            .field("waiting", &self.len())
            .finish_non_exhaustive()
    }
}

/// Takes events out of an [`EventBuffer`]. See [`EventBuffer::drain`].
#[derive(Debug)]
pub struct Drain<'a> {
    buffer: &'a mut EventBuffer,
}

impl Iterator for Drain<'_> {
    type Item = Result<Event, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.buffer.take()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.buffer.len();
        (left, Some(left))
    }
}

impl ExactSizeIterator for Drain<'_> {}
impl std::iter::FusedIterator for Drain<'_> {}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        while let Some(event) = self.buffer.take() {
            drop(event);
        }
    }
}

#[cfg(test)]
mod tests;
