//! Memory of an embedder, which the tests move and unmap as they like.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, Mutex},
};

use pageferry_memory::{
    GuestAddress, HostAddress, HostRange, ImageOffset, Layout, Mapping, MemoryFile, MemoryFileKind,
    PageSize, Region,
};

/// A stretch of addresses that nobody else uses, except what was unmapped or moved away: there the
/// kernel may put something of somebody else.
pub struct Reservation {
    range: HostRange,
    /// What of it is still ours, to be unmapped in the end.
    owned: Mutex<Vec<HostRange>>,
}

impl Reservation {
    /// Nothing is mapped there that could be accessed.
    pub fn new(bytes: u64) -> Arc<Self> {
        // SAFETY: a new mapping where the kernel finds room.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let range = HostRange::new(HostAddress::from_ptr(start), bytes);
        Arc::new(Self { range, owned: Mutex::new(vec![range]) })
    }

    fn disown(&self, range: HostRange) {
        let mut owned = self.owned.lock().unwrap();
        let cut = |piece: &HostRange| {
            let before = piece.take(range.start().get().saturating_sub(piece.start().get()));
            let after = piece.skip(range.end().get().saturating_sub(piece.start().get()));
            [before, after].into_iter().filter(|rest| !rest.is_empty()).collect::<Vec<_>>()
        };
        *owned = owned.iter().flat_map(cut).collect();
    }

    pub fn at(&self, offset: u64) -> HostAddress {
        self.range.start().checked_add(offset).unwrap()
    }

    pub fn range(&self, offset: u64, bytes: u64) -> HostRange {
        let range = HostRange::new(self.at(offset), bytes);
        assert!(self.range.contains_range(range));
        range
    }

    /// Maps memory there: of the file, or anonymous.
    pub fn map(&self, offset: u64, bytes: u64, file: Option<BorrowedFd<'_>>) -> HostRange {
        let range = self.range(offset, bytes);
        let (kind, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        // SAFETY: inside the reservation, whose addresses only the test uses.
        let mapped = unsafe {
            libc::mmap(
                range.start().as_ptr().cast(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        assert_eq!(mapped.cast(), range.start().as_ptr());
        // SAFETY: as above; the pages are not there yet, so nothing changes.
        unsafe { libc::madvise(mapped, bytes as usize, libc::MADV_NOHUGEPAGE) };
        range
    }

    /// `mremap` to another place in the reservation.
    pub fn move_to(&self, from: HostRange, offset: u64) -> HostRange {
        let to = self.range(offset, from.len());
        self.disown(from);
        let len = from.len() as usize;
        // SAFETY: both are inside the reservation, whose addresses only the test uses.
        let moved = unsafe {
            libc::mremap(
                from.start().as_ptr().cast(),
                len,
                len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                to.start().as_ptr(),
            )
        };
        assert_eq!(moved.cast(), to.start().as_ptr(), "{}", std::io::Error::last_os_error());
        to
    }

    pub fn unmap(&self, range: HostRange) {
        assert!(self.range.contains_range(range));
        self.disown(range);
        // SAFETY: inside the reservation, whose addresses only the test uses.
        let result = unsafe { libc::munmap(range.start().as_ptr().cast(), range.len() as usize) };
        assert_eq!(result, 0);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let owned = std::mem::take(&mut *self.owned.lock().unwrap());
        for range in owned {
            self.unmap(range);
        }
    }
}

/// What a region of an embedder is made of.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    Anonymous,
    Shared,
    /// With a second mapping, so that installs may go through it.
    SharedWithFillView,
}

/// A layout of one region at offset 0 of the reservation.
pub fn external(reservation: &Arc<Reservation>, bytes: u64, kind: Kind) -> Layout {
    let file = (kind != Kind::Anonymous)
        .then(|| MemoryFile::create("pageferry-test", bytes, MemoryFileKind::Normal).unwrap());
    let range = reservation.map(0, bytes, file.as_ref().map(MemoryFile::fd));
    // SAFETY: the addresses stay the test's as long as the reservation lives, and no references
    // into them are made. The tests that unmap or move parts test just that.
    let guest = unsafe { Mapping::from_raw(range, Arc::clone(reservation) as _) };
    let fill = (kind == Kind::SharedWithFillView)
        .then(|| Arc::new(Mapping::shared(file.as_ref().unwrap().fd(), 0, bytes, None).unwrap()));
    let region = Region::external(
        Arc::new(guest),
        fill,
        PageSize::SIZE_4K,
        None,
        GuestAddress::new(0),
        ImageOffset::new(0),
    );
    Layout::new(vec![Arc::new(region.unwrap())]).unwrap()
}

/// Reads eight bytes in user mode.
pub fn read(address: HostAddress) -> u64 {
    // SAFETY: the tests pass addresses of their reservations, where they mapped memory.
    unsafe { address.as_ptr().cast::<u64>().read_volatile() }
}

/// Has the kernel read eight bytes: what is not mapped is an error then, and not a signal. Memory
/// that is absent is waited for.
pub fn read_by_kernel(address: HostAddress) -> Result<u64, rustix::io::Errno> {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the kernel checks the address itself.
    let written = unsafe { libc::write(writer.as_raw_fd(), address.as_ptr().cast(), 8) };
    if written < 0 {
        let error = std::io::Error::last_os_error();
        return Err(rustix::io::Errno::from_io_error(&error).unwrap());
    }
    assert_eq!(written, 8);
    let mut bytes = [0; 8];
    assert_eq!(rustix::io::read(&reader, &mut bytes), Ok(8));
    Ok(u64::from_ne_bytes(bytes))
}
