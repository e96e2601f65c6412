//! Memory of every kind.

use std::{fs::File, io::Write, ptr, sync::Arc};

use pageferry_dirty::Tracked;
use pageferry_memory::{
    Advice, HostAddress, HostRange, Mapping, MemoryFile, MemoryFileKind, PageSize,
};
use pageferry_testing::HugePages;
use rustix::mm::{MapFlags, ProtFlags};

/// What memory is of.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Anonymous,
    Thp,
    Memfd,
    Hugetlb,
    PrivateFile,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] =
        [Self::Anonymous, Self::Thp, Self::Memfd, Self::Hugetlb, Self::PrivateFile];

    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }

    pub(crate) fn from_name(name: &str) -> Self {
        Self::ALL.into_iter().find(|kind| kind.name() == name).expect("a kind of memory")
    }

    pub(crate) fn page(self) -> PageSize {
        if self == Self::Hugetlb { PageSize::SIZE_2M } else { PageSize::base() }
    }
}

/// Some memory, and what it needs. The huge pages go after the mapping.
pub(crate) struct Memory {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) file: Option<MemoryFile>,
    pub(crate) kind: Kind,
    _huge: Option<HugePages>,
}

impl Memory {
    /// `None`, having said so, when the host has too few huge pages.
    pub(crate) fn new(kind: Kind, pages: u64) -> Option<Self> {
        let huge = match kind {
            Kind::Hugetlb => Some(HugePages::reserve(pages)?),
            _ => None,
        };
        Some(Self { _huge: huge, ..Self::reserved(kind, pages) })
    }

    /// The same, where somebody else sees to huge pages, and takes them away afterwards.
    pub(crate) fn reserved(kind: Kind, pages: u64) -> Self {
        let len = pages * kind.page().bytes();
        let (mapping, file) = match kind {
            Kind::Anonymous | Kind::Thp => {
                let mapping = Mapping::anonymous(len).unwrap();
                let advice = match kind {
                    Kind::Thp => Advice::HugePage,
                    _ => Advice::NoHugePage,
                };
                // A kernel without transparent huge pages does not know the advice.
                let _ = mapping.advise(mapping.range(), advice);
                (mapping, None)
            }
            Kind::Memfd => {
                let file = MemoryFile::create("dirty", len, MemoryFileKind::Normal).unwrap();
                (Mapping::shared(&file, 0, len, None).unwrap(), Some(file))
            }
            Kind::Hugetlb => {
                let size = kind.page();
                let kind = MemoryFileKind::Hugetlb(size);
                let file = MemoryFile::create("dirty", len, kind).unwrap();
                (Mapping::shared(&file, 0, len, Some(size)).unwrap(), Some(file))
            }
            Kind::PrivateFile => (private_file(len), None),
        };
        Self { mapping: Arc::new(mapping), file, kind, _huge: None }
    }

    pub(crate) fn tracked(&self) -> Tracked {
        Tracked { range: self.mapping.range(), page: self.kind.page() }
    }

    pub(crate) fn pages(&self, first: u64, count: u64) -> HostRange {
        super::pages(self.tracked(), first, count)
    }

    /// Writes a byte in every page of a range of pages.
    pub(crate) fn write(&self, first: u64, count: u64) {
        let page = self.kind.page().bytes();
        for index in first..first + count {
            self.mapping.write_at(index * page + 8, &[0x5a]).unwrap();
        }
    }

    pub(crate) fn read(&self, page: u64) -> u8 {
        let mut byte = [0];
        self.mapping.read_at(page * self.kind.page().bytes() + 8, &mut byte).unwrap();
        byte[0]
    }
}

/// Unmaps, and only then lets the file go.
struct Unmap(HostRange, #[allow(dead_code, reason = "kept open")] File);

impl Drop for Unmap {
    fn drop(&mut self) {
        // SAFETY: mapped by `private_file` for this value, which is the last to know of it.
        unsafe { rustix::mm::munmap(self.0.start().as_ptr().cast(), self.0.len() as usize) }
            .unwrap();
    }
}

fn private_file(len: u64) -> Mapping {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0; len as usize]).unwrap();
    // SAFETY: a new mapping, where the kernel finds room.
    let start = unsafe {
        rustix::mm::mmap(
            ptr::null_mut(),
            len as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
            &file,
            0,
        )
    }
    .unwrap();
    let range = HostRange::new(HostAddress::from_ptr(start), len);
    // SAFETY: it is unmapped when the keepalive is dropped, and nobody has a reference into it.
    unsafe { Mapping::from_raw(range, Arc::new(Unmap(range, file))) }
}
