//! The memory that a case is run on: fresh mappings, made the same way for every contender.

use std::{
    ffi::c_void,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr,
};

use anyhow::Context as _;
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
};

use super::case::{Backing, Case, Kind};

/// One mapping, unmapped on drop.
#[derive(Debug)]
struct View {
    start: *mut c_void,
    len: usize,
}

// SAFETY: a `View` is only an address and a length; what it points to is touched by raw accesses
// of whoever uses the address, never through a reference made here.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

const PROTECTION: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

impl View {
    fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a null hint makes a mapping of its own, which overlaps nothing.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), len, PROTECTION, flags)? };
        Self { start, len }.without_huge_pages()
    }

    fn shared(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: as in `anonymous`.
        let start = unsafe { mmap(ptr::null_mut(), len, PROTECTION, MapFlags::SHARED, file, 0)? };
        Self { start, len }.without_huge_pages()
    }

    /// A page a fault is what is measured.
    fn without_huge_pages(self) -> io::Result<Self> {
        match self.advise(Advice::LinuxNoHugepage) {
            // A kernel built without transparent huge pages does not know the advice.
            Ok(()) => Ok(self),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(self),
            Err(error) => Err(error),
        }
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is this mapping, which nothing has touched yet, so none of the
        // advices given here changes contents that anybody relies on.
        unsafe { madvise(self.start, self.len, advice)? };
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and who uses its address keeps the value.
        if let Err(error) = unsafe { munmap(self.start, self.len) } {
            eprintln!("pageferry: unmapping {:p}+{:#x}: {error}", self.start, self.len);
        }
    }
}

/// The memory of one run: the guest's view and, for a memfd, the file and its alias.
#[derive(Debug)]
pub(crate) struct Memory {
    guest: View,
    alias: Option<View>,
    file: Option<OwnedFd>,
}

impl Memory {
    /// Maps fresh memory for `case`. No page of the guest's view is mapped. For [`Kind::Minor`]
    /// every page is in the page cache (as zeros) and mapped in the alias.
    pub(crate) fn new(case: &Case) -> anyhow::Result<Self> {
        let len = case.bytes();
        let what = || format!("{len} bytes of {} memory for the benchmark", case.backing);
        match case.backing {
            Backing::Anon => {
                let guest = View::anonymous(len).with_context(what)?;
                Ok(Self { guest, alias: None, file: None })
            }
            Backing::Memfd => {
                let file =
                    memfd_create("pageferry-bench", MemfdFlags::CLOEXEC).with_context(what)?;
                ftruncate(&file, len as u64).with_context(what)?;
                let guest = View::shared(file.as_fd(), len).with_context(what)?;
                let alias = View::shared(file.as_fd(), len).with_context(what)?;
                if case.kind == Kind::Minor {
                    alias.advise(Advice::LinuxPopulateWrite).with_context(what)?;
                }
                Ok(Self { guest, alias: Some(alias), file: Some(file) })
            }
        }
    }

    /// Where the guest's view begins.
    pub(crate) fn guest(&self) -> *mut u8 {
        self.guest.start.cast()
    }

    /// Where the alias begins, if the memory is a memfd.
    pub(crate) fn alias(&self) -> Option<*mut u8> {
        self.alias.as_ref().map(|view| view.start.cast())
    }

    /// The memfd.
    #[allow(dead_code, reason = "for a contender that maps views of its own")]
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// The length of each view in bytes.
    pub(crate) fn len(&self) -> usize {
        self.guest.len
    }
}
