//! What ends a long operation from outside.

use std::{io, sync::Arc, time::Duration};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

/// Ends a long operation, now or whenever it is begun: an eventfd(2), so that an operation that
/// waits in the kernel notices at once. Clones stop the same operations.
#[derive(Clone, Debug)]
pub struct Stop {
    event: Arc<OwnedFd>,
    also: Option<Arc<OwnedFd>>,
}

/// What a wait ended with.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Woken {
    Stopped,
    /// What was waited for is there.
    Ready,
    TimedOut,
}

impl Stop {
    /// A stop that has not been called for.
    ///
    /// # Errors
    /// eventfd(2)'s: no more descriptors.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event: Arc::new(event), also: None })
    }

    /// A stop that is also called for by `fd` becoming readable (a signalfd, say). It is never
    /// read.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn when_readable(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { also: Some(Arc::new(fd)), ..Self::new()? })
    }

    /// Calls for it. Once is enough, and for ever.
    pub fn stop(&self) {
        // EAGAIN: the counter is full, so it is readable.
        let _ = rustix::io::write(&*self.event, &1_u64.to_ne_bytes());
    }

    /// Whether it has been called for.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.wait(&[], PollFlags::IN, Duration::ZERO), Ok(Woken::Stopped))
    }

    /// Waits until one of `fds` is ready for what `flags` say, at most for `limit`.
    pub(crate) fn wait(
        &self,
        fds: &[BorrowedFd<'_>],
        flags: PollFlags,
        limit: Duration,
    ) -> io::Result<Woken> {
        let also = self.also.iter().map(Arc::as_ref);
        let mut polled: Vec<PollFd<'_>> = std::iter::once(&*self.event)
            .chain(also)
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .chain(fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, flags)))
            .collect();
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
        match poll(&mut polled, Some(&limit)) {
            Ok(0) | Err(Errno::INTR) => return Ok(Woken::TimedOut),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let stops = 1 + usize::from(self.also.is_some());
        let stopped = polled[..stops].iter().any(|fd| !fd.revents().is_empty());
        Ok(if stopped { Woken::Stopped } else { Woken::Ready })
    }
}

/// Readable once [`Stop::stop`] was called.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
