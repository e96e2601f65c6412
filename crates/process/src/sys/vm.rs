//! process_vm_readv(2) and process_vm_writev(2).

use libc::iovec;
use pageferry_uffd::{HostAddress, HostRange};
use rustix::{io::Errno, process::Pid};

use super::last_errno;

/// How many ranges one call takes (`UIO_MAXIOV`).
pub(crate) const RANGES_MAX: usize = 1024;

/// Copies the ranges of another process's memory one after the other into `into`, until it is full
/// or a page cannot be read; answers with how many bytes. At most [`RANGES_MAX`] ranges are read.
pub(crate) fn read(process: Pid, from: &[HostRange], into: &mut [u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote: Vec<iovec> = from.iter().take(RANGES_MAX).map(|&range| remote(range)).collect();
    // SAFETY: the kernel writes to the slice only; the other vector is of addresses of the other
    // process, which it only reads.
    let done = unsafe {
        libc::process_vm_readv(
            process.as_raw_pid(),
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    usize::try_from(done).map_err(|_| last_errno())
}

/// Copies `bytes` to another process's memory; answers with how many, fewer than all when a page
/// cannot be written.
pub(crate) fn write(process: Pid, to: HostAddress, bytes: &[u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let range = HostRange::try_new(to, bytes.len() as u64).ok_or(Errno::FAULT)?;
    let remote = remote(range);
    // SAFETY: the kernel only reads the slice; what it writes to is memory of the other process,
    // and of this one only if the two share it, which both then cope with.
    let done = unsafe {
        libc::process_vm_writev(process.as_raw_pid(), &raw const local, 1, &raw const remote, 1, 0)
    };
    usize::try_from(done).map_err(|_| last_errno())
}

fn remote(range: HostRange) -> iovec {
    iovec {
        iov_base: std::ptr::without_provenance_mut(range.start().get() as usize),
        iov_len: range.len() as usize,
    }
}
