//! Delivery through a userfaultfd's queue: threads that poll, read and install.

use std::os::fd::{AsRawFd as _, RawFd};

use anyhow::Context as _;

use super::{
    Install, Loop,
    sys::{self, Messages},
};

/// Serves every userfaultfd of `uffds` with `readers` threads, each taking at most `batch`
/// messages a read, while `guest` runs.
pub(in crate::bench) fn serve<I: Install, T>(
    shared: &Loop<I>,
    uffds: &[RawFd],
    readers: usize,
    batch: usize,
    guest: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        for &uffd in uffds {
            for _ in 0..readers {
                scope.spawn(move || {
                    each_fault(shared, uffd, batch, |m| shared.resolve(uffd, m.address));
                });
            }
        }
        let measured = guest();
        sys::raise(shared.stop.as_raw_fd()).context("ending the readers")?;
        measured
    })
}

/// Polls and reads `uffd` until the loop is stopped, and hands each message to `handle`.
///
/// After a read that did not fill the buffer the queue was empty, so the next call is poll(2).
pub(super) fn each_fault<I: Install>(
    shared: &Loop<I>,
    uffd: RawFd,
    batch: usize,
    mut handle: impl FnMut(sys::Message),
) {
    let stop = shared.stop.as_raw_fd();
    let mut messages = Messages::new(batch);
    loop {
        match sys::wait(uffd, stop) {
            Ok(true) => {}
            Ok(false) => return,
            Err(errno) => return shared.fail(uffd, errno),
        }
        match messages.read(uffd) {
            Ok(faults) => faults.for_each(&mut handle),
            Err(errno) => return shared.fail(uffd, errno),
        }
    }
}
