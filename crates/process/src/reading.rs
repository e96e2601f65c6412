//! Reading the memory of another process.

use std::os::fd::AsFd;

use pageferry_uffd::{HostAddress, HostRange};
use rustix::io::Errno;

use crate::{Process, ProcessError, sys::vm};

impl Process {
    /// Copies memory of the process, from `at` on, into `into`; answers with how many bytes, fewer
    /// than all when what follows cannot be read (or, rarely, is to be asked for again).
    ///
    /// It works while the process is stopped, and while it runs: then the bytes of different pages
    /// are of different moments. Pages the process itself may not read are read too, where the
    /// kernel allows it. Nothing of the process changes, but for pages that come from swap or, of
    /// shared memory and files, from the page cache.
    ///
    /// # Errors
    ///
    /// [`ProcessError::Unreadable`] when the first byte cannot be read; [`Ended`](ProcessError::Ended);
    /// [`Replaced`](ProcessError::Replaced).
    pub fn read_memory(&self, at: HostAddress, into: &mut [u8]) -> Result<usize, ProcessError> {
        let room = into.len() as u64;
        // Where the range would wrap there is nothing to be read at its end.
        let range =
            HostRange::try_new(at, room).unwrap_or_else(|| HostRange::new(at, u64::MAX - at.get()));
        self.read_scattered(&[range], into)
    }

    /// [`read_memory`](Self::read_memory), until `into` is full.
    ///
    /// # Errors
    ///
    /// As there, for the first byte that cannot be read.
    pub fn read_memory_exact(&self, at: HostAddress, into: &mut [u8]) -> Result<(), ProcessError> {
        let unreadable =
            |address| ProcessError::Unreadable { pid: self.pid(), address, errno: Errno::FAULT };
        let mut done = 0;
        while done < into.len() {
            let next = at.checked_add(done as u64).ok_or_else(|| unreadable(at))?;
            match self.read_memory(next, &mut into[done..])? {
                0 => return Err(unreadable(next)),
                more => done += more,
            }
        }
        Ok(())
    }

    /// Copies several ranges one after the other, in few system calls; answers with how many bytes
    /// it copied, fewer than all when `into` is full, when a page cannot be read, or when there are
    /// more than a thousand ranges.
    ///
    /// # Errors
    ///
    /// As [`read_memory`](Self::read_memory).
    pub fn read_scattered(
        &self,
        ranges: &[HostRange],
        into: &mut [u8],
    ) -> Result<usize, ProcessError> {
        let first = ranges.iter().find(|range| !range.is_empty());
        let (Some(&first), false) = (first, into.is_empty()) else { return Ok(0) };
        let read = match vm::read(self.pid(), ranges, into) {
            Ok(0) => Err(Errno::FAULT),
            other => other,
        };
        let read = match read {
            Ok(done) => Ok(done),
            Err(errno) => {
                // What the process may not read itself; or its first thread has ended, by whose
                // number the kernel looks for the memory.
                let room = into.len().min(usize::try_from(first.len()).unwrap_or(usize::MAX));
                let memory = self.memory().as_fd();
                let at = first.start();
                let read = rustix::io::retry_on_intr(|| {
                    rustix::io::pread(memory, &mut into[..room], at.get())
                });
                match read {
                    Ok(0) | Err(_) => Err((at, errno)),
                    Ok(done) => Ok(done),
                }
            }
        };
        // Only now is it known that the number meant this process, and this memory of it.
        self.check()?;
        read.map_err(|(address, errno)| ProcessError::Unreadable {
            pid: self.pid(),
            address,
            errno,
        })
    }
}
