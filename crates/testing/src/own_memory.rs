//! An image that cannot be read everywhere.

use std::{fs::File, ops::Range};

use pageferry_memory::{HostRange, Mapping};

use crate::PAGE;

/// A stretch of this process's own memory that is used as an image, with a gap in it that no read
/// gets over: it fails with `EIO`.
#[derive(Debug)]
pub struct OwnMemory {
    mapping: Mapping,
}

impl OwnMemory {
    /// So many pages, each of which contains what `contents` makes of its number, except those in
    /// `gap`.
    pub fn new(pages: u64, gap: Range<u64>, contents: impl Fn(u64) -> Vec<u8>) -> Self {
        let mapping = Mapping::anonymous(pages * PAGE).unwrap();
        for page in (0..pages).filter(|page| !gap.contains(page)) {
            mapping.write_at(page * PAGE, &contents(page)).unwrap();
        }
        let (_, from_gap_on) = mapping.range().split_at(gap.start * PAGE);
        close_off(from_gap_on.take((gap.end - gap.start) * PAGE));
        Self { mapping }
    }

    /// The image. It is of use as long as the memory lives.
    pub fn file(&self) -> File {
        File::open("/proc/self/mem").unwrap()
    }

    /// Where in the image the first page is, in bytes.
    pub fn offset(&self) -> u64 {
        self.mapping.range().start().get()
    }
}

/// Makes `range` unreadable even for /proc/self/mem, by replacing it with pages of a file that
/// has none.
fn close_off(range: HostRange) {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let empty = tempfile::tempfile().unwrap();
    // SAFETY: the range belongs to a mapping of this test, of which nobody holds a reference.
    let mapped = unsafe {
        mmap(
            range.start().as_ptr().cast(),
            range.len() as usize,
            ProtFlags::READ,
            MapFlags::PRIVATE | MapFlags::FIXED,
            &empty,
            0,
        )
    };
    mapped.unwrap();
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn only_the_gap_cannot_be_read() {
        let memory = OwnMemory::new(6, 2..4, crate::page);
        let file = memory.file();
        for page in 0..6 {
            let mut bytes = vec![0; PAGE as usize];
            let read = file.read_exact_at(&mut bytes, memory.offset() + page * PAGE);
            if (2..4).contains(&page) {
                assert_eq!(read.unwrap_err().raw_os_error(), Some(5), "page {page}");
            } else {
                read.unwrap();
                assert_eq!(bytes, crate::page(page), "page {page}");
            }
        }
    }
}
