//! The kernel's pools of reserved huge pages.

use std::{fs, io};

use crate::PageSize;

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// The pool of huge pages of one size.
///
/// Source: the kernel's `Documentation/admin-guide/mm/hugetlbpage.rst`.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
#[non_exhaustive]
pub struct HugePagePool {
    /// The size of its pages.
    pub size: PageSize,
    /// How many pages the pool has.
    pub total: u64,
    /// How many of them are not in use.
    pub free: u64,
    /// How many of the free ones are promised to a mapping that has not touched them yet.
    pub promised: u64,
}

impl HugePagePool {
    /// Reads the state of the pool of pages of this size.
    ///
    /// # Errors
    ///
    /// `NotFound` when the kernel has no huge pages of this size; otherwise what reading sysfs
    /// answered.
    pub fn read(size: PageSize) -> io::Result<Self> {
        Ok(Self {
            size,
            total: read_number(size, "nr_hugepages")?,
            free: read_number(size, "free_hugepages")?,
            promised: read_number(size, "resv_hugepages")?,
        })
    }

    /// Every size of huge pages the kernel has, in ascending order.
    ///
    /// # Errors
    ///
    /// What reading sysfs answered. A kernel without huge pages is no error: it has no sizes.
    pub fn sizes() -> io::Result<Vec<PageSize>> {
        let entries = match fs::read_dir(POOLS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut sizes = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let kib = name
                .to_str()
                .and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok());
            if let Some(size) =
                kib.and_then(|kib: u64| kib.checked_mul(1024)).and_then(PageSize::try_new)
            {
                sizes.push(size);
            }
        }
        sizes.sort_unstable();
        Ok(sizes)
    }

    /// How many pages a new mapping can have: free, and promised to nobody.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.promised)
    }

    /// The file that sets how many pages of this size the pool has.
    pub fn control_file(size: PageSize) -> String {
        attribute(size, "nr_hugepages")
    }
}

fn attribute(size: PageSize, name: &str) -> String {
    format!("{POOLS}/hugepages-{}kB/{name}", size.bytes() / 1024)
}

fn read_number(size: PageSize, name: &str) -> io::Result<u64> {
    let path = attribute(size, name);
    let text = fs::read_to_string(&path)?;
    text.trim().parse().map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{path} holds {text:?}: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_size_can_be_read() {
        for size in HugePagePool::sizes().unwrap() {
            let pool = HugePagePool::read(size).unwrap();
            assert_eq!(pool.size, size);
            assert!(pool.available() <= pool.free);
        }
    }

    #[test]
    fn a_size_that_no_kernel_has_is_not_found() {
        let error = HugePagePool::read(PageSize::SIZE_4K).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
