//! The system calls that neither the standard library nor `rustix` has, one module an interface.

pub(crate) mod ptrace;
pub(crate) mod sched;
pub(crate) mod uffd;
pub(crate) mod vm;

use rustix::io::Errno;

/// Why the last call of the C library failed.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error())
        .expect("an error of the operating system has a number")
}
