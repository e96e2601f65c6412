//! The system calls themselves: opcodes, flags and structures, checked at compile time.
//!
//! The structures come from `linux-raw-sys`; what its headers lack is defined here. Every size,
//! offset and ioctl number that crosses into the kernel is asserted, so that a change of a
//! dependency cannot pass unseen. Source: `include/uapi/linux/userfaultfd.h`, `linux/fs.h`.

use std::{
    ffi::c_void,
    mem::offset_of,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

use linux_raw_sys::general as raw;
pub(crate) use linux_raw_sys::general::{
    pm_scan_arg, uffdio_api, uffdio_continue, uffdio_copy, uffdio_move, uffdio_poison,
    uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use rustix::{
    fd::AsFd,
    io::{Errno, Result},
    ioctl::{Ioctl, IoctlOutput, Opcode, Setter, Updater, ioctl, opcode},
};

pub(crate) const MODE_DONTWAKE: u64 = 1 << 0;
pub(crate) const COPY_MODE_WP: u64 = 1 << 1;
pub(crate) const CONTINUE_MODE_WP: u64 = 1 << 1;
pub(crate) const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;
pub(crate) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub(crate) const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
pub(crate) const UFFD_API: u64 = raw::UFFD_API as u64;

/// Bytes of a `struct uffd_msg`.
pub const MESSAGE_SIZE: usize = 32;

const GROUP: u8 = raw::UFFDIO as u8;

const IOC_NEW: Opcode = opcode::none(raw::USERFAULTFD_IOC as u8, 0);
const API: Opcode = opcode::read_write::<uffdio_api>(GROUP, raw::_UFFDIO_API as u8);
const REGISTER: Opcode = opcode::read_write::<uffdio_register>(GROUP, raw::_UFFDIO_REGISTER as u8);
// The direction of these two is the wrong way round in the kernel's header, and stays so.
const UNREGISTER: Opcode = opcode::read::<uffdio_range>(GROUP, raw::_UFFDIO_UNREGISTER as u8);
const WAKE: Opcode = opcode::read::<uffdio_range>(GROUP, raw::_UFFDIO_WAKE as u8);
const COPY: Opcode = opcode::read_write::<uffdio_copy>(GROUP, raw::_UFFDIO_COPY as u8);
const ZEROPAGE: Opcode = opcode::read_write::<uffdio_zeropage>(GROUP, raw::_UFFDIO_ZEROPAGE as u8);
const MOVE: Opcode = opcode::read_write::<uffdio_move>(GROUP, raw::_UFFDIO_MOVE as u8);
const WRITEPROTECT: Opcode =
    opcode::read_write::<uffdio_writeprotect>(GROUP, raw::_UFFDIO_WRITEPROTECT as u8);
const CONTINUE: Opcode = opcode::read_write::<uffdio_continue>(GROUP, raw::_UFFDIO_CONTINUE as u8);
const POISON: Opcode = opcode::read_write::<uffdio_poison>(GROUP, raw::_UFFDIO_POISON as u8);
const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);

macro_rules! assert_layout {
    ($type:ident: $size:literal { $($field:ident @ $offset:literal),* $(,)? }) => {
        const _: () = {
            assert!(size_of::<raw::$type>() == $size);
            $(assert!(offset_of!(raw::$type, $field) == $offset);)*
        };
    };
}

assert_layout!(uffd_msg: 32 { event @ 0, arg @ 8 });
assert_layout!(uffdio_api: 24 { api @ 0, features @ 8, ioctls @ 16 });
assert_layout!(uffdio_range: 16 { start @ 0, len @ 8 });
assert_layout!(uffdio_register: 32 { range @ 0, mode @ 16, ioctls @ 24 });
assert_layout!(uffdio_copy: 40 { dst @ 0, src @ 8, len @ 16, mode @ 24, copy @ 32 });
assert_layout!(uffdio_zeropage: 32 { range @ 0, mode @ 16, zeropage @ 24 });
assert_layout!(uffdio_writeprotect: 24 { range @ 0, mode @ 16 });
assert_layout!(uffdio_continue: 32 { range @ 0, mode @ 16, mapped @ 24 });
assert_layout!(uffdio_poison: 32 { range @ 0, mode @ 16, updated @ 24 });
assert_layout!(uffdio_move: 40 { dst @ 0, src @ 8, len @ 16, mode @ 24, move_ @ 32 });
assert_layout!(page_region: 24 { start @ 0, end @ 8, categories @ 16 });
assert_layout!(pm_scan_arg: 96 {
    size @ 0, flags @ 8, start @ 16, end @ 24, walk_end @ 32, vec @ 40, vec_len @ 48,
    max_pages @ 56, category_inverted @ 64, category_mask @ 72, category_anyof_mask @ 80,
    return_mask @ 88,
});

// The members of the unions in `uffd_msg` that the decoder reads by offset.
assert_layout!(uffd_msg__bindgen_ty_1__bindgen_ty_1: 24 { flags @ 0, address @ 8, feat @ 16 });
assert_layout!(uffd_msg__bindgen_ty_1__bindgen_ty_2: 4 { ufd @ 0 });
assert_layout!(uffd_msg__bindgen_ty_1__bindgen_ty_3: 24 { from @ 0, to @ 8, len @ 16 });
assert_layout!(uffd_msg__bindgen_ty_1__bindgen_ty_4: 16 { start @ 0, end @ 8 });

const _: () = {
    assert!(size_of::<raw::uffd_msg>() == MESSAGE_SIZE);
    assert!(raw::UFFDIO_COPY_MODE_DONTWAKE as u64 == MODE_DONTWAKE);
    assert!(raw::UFFDIO_ZEROPAGE_MODE_DONTWAKE as u64 == MODE_DONTWAKE);
    assert!(raw::UFFDIO_COPY_MODE_WP as u64 == COPY_MODE_WP);
    assert!(raw::UFFD_API == 0xaa);
};

// The numbers as they are on the architectures with the common ioctl encoding.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
const _: () = {
    assert!(IOC_NEW == 0x0000_aa00);
    assert!(API == 0xc018_aa3f);
    assert!(REGISTER == 0xc020_aa00);
    assert!(UNREGISTER == 0x8010_aa01);
    assert!(WAKE == 0x8010_aa02);
    assert!(COPY == 0xc028_aa03);
    assert!(ZEROPAGE == 0xc020_aa04);
    assert!(MOVE == 0xc028_aa05);
    assert!(WRITEPROTECT == 0xc018_aa06);
    assert!(CONTINUE == 0xc020_aa07);
    assert!(POISON == 0xc020_aa08);
    assert!(PAGEMAP_SCAN == 0xc060_6610);
};

/// `USERFAULTFD_IOC_NEW` on an open `/dev/userfaultfd`.
struct NewUserfaultfd {
    flags: usize,
}

// SAFETY: the opcode takes its flags in place of a pointer, writes no memory of ours, and answers
// with a new file descriptor that nobody else owns.
unsafe impl Ioctl for NewUserfaultfd {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        IOC_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.flags)
    }

    unsafe fn output_from_ptr(fd: IoctlOutput, _: *mut c_void) -> Result<OwnedFd> {
        // SAFETY: the ioctl succeeded, so `fd` is open and was made for this call.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }
}

/// `PAGEMAP_SCAN`; answers with the number of regions written.
struct PagemapScan<'a> {
    arg: &'a mut pm_scan_arg,
}

// SAFETY: the opcode reads and writes a `pm_scan_arg` (and the vector it points to, for which
// `pagemap_scan` makes its caller answer) and returns a count.
unsafe impl Ioctl for PagemapScan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.arg).cast()
    }

    unsafe fn output_from_ptr(count: IoctlOutput, _: *mut c_void) -> Result<usize> {
        usize::try_from(count).map_err(|_| Errno::OVERFLOW)
    }
}

/// Makes a new userfaultfd from an open `/dev/userfaultfd`. `flags` are `O_CLOEXEC` and
/// `O_NONBLOCK`.
pub(crate) fn new_from_device(device: impl AsFd, flags: u32) -> Result<OwnedFd> {
    // SAFETY: on any other file the opcode is unknown (ENOTTY), or means whatever that file makes
    // of a small integer; nothing of ours is passed by pointer.
    unsafe { ioctl(device, NewUserfaultfd { flags: flags as usize }) }
}

/// `UFFDIO_API`: affects nothing but the descriptor.
pub(crate) fn handshake(fd: impl AsFd, arg: &mut uffdio_api) -> Result<()> {
    // SAFETY: the opcode reads and writes one `uffdio_api`.
    unsafe { ioctl(fd, Updater::<API, uffdio_api>::new(arg)) }
}

macro_rules! updater {
    ($(#[$doc:meta])* $name:ident, $opcode:ident, $type:ty) => {
        $(#[$doc])*
        ///
        /// # Safety
        ///
        /// `fd` is a userfaultfd, and what the operation does to the ranges that `arg` names is
        /// sound (see the caller).
        pub(crate) unsafe fn $name(fd: impl AsFd, arg: &mut $type) -> Result<()> {
            // SAFETY: the opcode reads and writes one such structure; the rest is promised by the
            // caller.
            unsafe { ioctl(fd, Updater::<$opcode, $type>::new(arg)) }
        }
    };
}

updater!(
    /// `UFFDIO_REGISTER`.
    register, REGISTER, uffdio_register
);
updater!(
    /// `UFFDIO_COPY`.
    copy, COPY, uffdio_copy
);
updater!(
    /// `UFFDIO_ZEROPAGE`.
    zeropage, ZEROPAGE, uffdio_zeropage
);
updater!(
    /// `UFFDIO_MOVE`.
    move_pages, MOVE, uffdio_move
);
updater!(
    /// `UFFDIO_WRITEPROTECT`.
    write_protect, WRITEPROTECT, uffdio_writeprotect
);
updater!(
    /// `UFFDIO_CONTINUE`.
    continue_range, CONTINUE, uffdio_continue
);
updater!(
    /// `UFFDIO_POISON`.
    poison, POISON, uffdio_poison
);

/// `UFFDIO_UNREGISTER`.
///
/// # Safety
///
/// `fd` is a userfaultfd.
pub(crate) unsafe fn unregister(fd: impl AsFd, arg: uffdio_range) -> Result<()> {
    // SAFETY: the opcode reads one `uffdio_range` and writes nothing of ours.
    unsafe { ioctl(fd, Setter::<UNREGISTER, uffdio_range>::new(arg)) }
}

/// `UFFDIO_WAKE`.
///
/// # Safety
///
/// `fd` is a userfaultfd.
pub(crate) unsafe fn wake(fd: impl AsFd, arg: uffdio_range) -> Result<()> {
    // SAFETY: the opcode reads one `uffdio_range` and writes nothing of ours.
    unsafe { ioctl(fd, Setter::<WAKE, uffdio_range>::new(arg)) }
}

/// `PAGEMAP_SCAN`.
///
/// # Safety
///
/// `arg.vec` points to `arg.vec_len` writable `page_region`s.
pub(crate) unsafe fn pagemap_scan(fd: impl AsFd, arg: &mut pm_scan_arg) -> Result<usize> {
    // SAFETY: the opcode reads and writes one `pm_scan_arg`, and the vector the caller answers
    // for.
    unsafe { ioctl(fd, PagemapScan { arg }) }
}
