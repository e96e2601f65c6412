//! The handshake of a userfaultfd that another process made.

use std::os::fd::BorrowedFd;

use linux_raw_sys::general::{_UFFDIO_API, UFFD_API, UFFDIO, USERFAULTFD_IOC, uffdio_api};
use pageferry_uffd::Features;
use rustix::{
    io::Errno,
    ioctl::{Opcode, Updater, ioctl, opcode},
};

/// `USERFAULTFD_IOC_NEW`, of the device node.
pub(crate) const NEW: u32 = opcode::none(USERFAULTFD_IOC as u8, 0);
const _: () = assert!(NEW == 0x0000_aa00);

const API: Opcode = opcode::read_write::<uffdio_api>(UFFDIO as u8, _UFFDIO_API as u8);
const _: () = assert!(API == 0xc018_aa3f);

/// `UFFDIO_API`: enables `features`, once in the life of a descriptor; answers with all that the
/// kernel has. A refusal (EINVAL for features that it lacks, EPERM for those the caller may not
/// have) leaves the descriptor as it was.
pub(crate) fn handshake(fd: BorrowedFd<'_>, features: Features) -> Result<Features, Errno> {
    let mut arg = uffdio_api { api: UFFD_API.into(), features: features.bits(), ioctls: 0 };
    // SAFETY: the opcode reads and writes one `uffdio_api`; on a descriptor of another kind it is
    // unknown.
    unsafe { ioctl(fd, Updater::<API, uffdio_api>::new(&mut arg)) }?;
    Ok(Features::from_bits_retain(arg.features))
}
