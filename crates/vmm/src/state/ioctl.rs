//! ioctls whose argument is a structure that is kept as it is, in bytes.

use std::{
    ffi::{c_int, c_ulong},
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_xsave};

const KVMIO: c_ulong = 0xae;
const WRITE: c_ulong = 1;
const READ: c_ulong = 2;

/// An ioctl of KVM's whose argument points to so many bytes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    code: c_ulong,
    bytes: usize,
}

impl Request {
    const fn new(direction: c_ulong, number: c_ulong, bytes: usize) -> Self {
        assert!(bytes < 1 << 14, "the size has 14 bits in an ioctl's number");
        Self { code: direction << 30 | (bytes as c_ulong) << 16 | KVMIO << 8 | number, bytes }
    }

    /// `_IOR`: the kernel fills the bytes in.
    pub(crate) const fn read(number: c_ulong, bytes: usize) -> Self {
        Self::new(READ, number, bytes)
    }

    /// `_IOW`: the kernel reads the bytes.
    pub(crate) const fn write(number: c_ulong, bytes: usize) -> Self {
        Self::new(WRITE, number, bytes)
    }

    /// `_IOWR`: the kernel reads the bytes and fills them in.
    pub(crate) const fn both(number: c_ulong, bytes: usize) -> Self {
        Self::new(READ | WRITE, number, bytes)
    }

    /// `_IOR` although the kernel reads the bytes.
    pub(crate) const fn write_declared_read(number: c_ulong, bytes: usize) -> Self {
        Self::new(READ, number, bytes)
    }
}

/// Bytes for the kernel, aligned as any of its structures is.
struct Buffer(Vec<u64>);

impl Buffer {
    /// `bytes`, and zeros up to `len` bytes.
    fn new(bytes: &[u8], len: usize) -> Self {
        let mut words = vec![0; len.max(bytes.len()).div_ceil(8)];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(whole);
        }
        Self(words)
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

fn call(fd: BorrowedFd<'_>, request: Request, buffer: &mut Buffer) -> io::Result<()> {
    assert!(buffer.0.len() * 8 >= request.bytes);
    // SAFETY: the buffer has at least as many bytes as the request's structure, aligned for it, and
    // any bytes are valid for the buffer. What is larger than its request says is for `get_xsave2`
    // and `set_xsave` to see to.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request.code, buffer.0.as_mut_ptr()) };
    match answer {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What an ioctl fills in, beginning with `first`, which the kernel may read.
pub(crate) fn get(fd: BorrowedFd<'_>, request: Request, first: &[u8]) -> io::Result<Vec<u8>> {
    let mut buffer = Buffer::new(first, request.bytes);
    call(fd, request, &mut buffer)?;
    Ok(buffer.bytes(request.bytes))
}

/// Hands bytes to an ioctl: as many as it takes.
pub(crate) fn set(fd: BorrowedFd<'_>, request: Request, bytes: &[u8]) -> io::Result<()> {
    assert_eq!(bytes.len(), request.bytes, "whoever decoded it has checked the length");
    call(fd, request, &mut Buffer::new(bytes, 0))
}

const GET_XSAVE: Request = Request::read(0xa4, size_of::<kvm_xsave>());
const SET_XSAVE: Request = Request::write(0xa5, size_of::<kvm_xsave>());
const GET_XSAVE2: Request = Request::read(0xcf, size_of::<kvm_xsave>());

/// The XSAVE area, of which `size` is what KVM_CAP_XSAVE2 says of the machine: 0 if there is no
/// KVM_GET_XSAVE2.
///
/// Nothing here enables a feature that makes it larger (`arch_prctl(2)`,
/// ARCH_REQ_XCOMP_GUEST_PERM); and what is allocated has room for the largest there is.
pub(crate) fn get_xsave(fd: BorrowedFd<'_>, size: usize) -> io::Result<Vec<u8>> {
    let (request, len) = match size {
        0 => (GET_XSAVE, size_of::<kvm_xsave>()),
        size => (GET_XSAVE2, size),
    };
    let mut buffer = Buffer::new(&[], len.max(LARGEST_XSAVE));
    call(fd, request, &mut buffer)?;
    Ok(buffer.bytes(len))
}

/// Sets it. What this kernel reads beyond the end is zero.
pub(crate) fn set_xsave(fd: BorrowedFd<'_>, size: usize, bytes: &[u8]) -> io::Result<()> {
    call(fd, SET_XSAVE, &mut Buffer::new(bytes, size.max(LARGEST_XSAVE)))
}

/// More than any processor's area: the kernel reads and writes as much as the vCPU has, not what
/// the ioctl's number says.
const LARGEST_XSAVE: usize = 64 << 10;

fn tsc_offset(fd: BorrowedFd<'_>, number: c_ulong, value: &mut u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: (&raw mut *value).addr() as u64,
    };
    let request = Request::write(number, size_of::<kvm_device_attr>());
    (&raw mut *value).expose_provenance();
    // SAFETY: the attribute is one of eight bytes, for which there is room at the address it names.
    let answer: c_int = unsafe { libc::ioctl(fd.as_raw_fd(), request.code, &raw const attribute) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a vCPU's time stamp counter is ahead of the host's, modulo 2^64; `None` where the kernel
/// does not say (before Linux 5.16).
pub(crate) fn get_tsc_offset(fd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let mut value = 0;
    match tsc_offset(fd, 0xe2, &mut value) {
        Ok(()) => Ok(Some(value)),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENXIO | libc::ENOTTY | libc::EINVAL | libc::EPERM) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Sets it.
pub(crate) fn set_tsc_offset(fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
    let mut value = offset;
    tsc_offset(fd, 0xe1, &mut value)
}

/// A descriptor of `kvm-ioctls`, which implements `AsRawFd` only.
pub(crate) fn fd(of: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as what it belongs to, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(of.as_raw_fd()) }
}
