//! Huge pages of 1 GiB for a test.

use std::fs;

use pageferry_memory::{HugePagePool, PageSize};

const SIZE: PageSize = PageSize::SIZE_1G;

/// Pages of 1 GiB that are there until this is dropped, if nobody else takes them.
#[must_use = "dropping it takes the huge pages away"]
pub struct GiantPages {
    before: u64,
}

impl GiantPages {
    /// `None`, having said so, if the host has too few and they cannot be added.
    pub fn reserve(needed: u64) -> Option<Self> {
        let pool = || HugePagePool::read(SIZE);
        let Ok(before) = pool() else {
            println!("skipped: needs huge pages of 1 GiB");
            return None;
        };
        let pages = Self { before: before.total };
        let missing = needed.saturating_sub(before.available());
        if missing > 0 {
            // Whoever may not, or finds no contiguous memory, sees that below.
            let _ =
                fs::write(HugePagePool::control_file(SIZE), (before.total + missing).to_string());
        }
        let available = pool().map_or(0, |pool| pool.available());
        if available < needed {
            println!("skipped: needs {needed} free huge pages of 1 GiB, there are {available}");
            return None;
        }
        Some(pages)
    }
}

impl Drop for GiantPages {
    fn drop(&mut self) {
        if HugePagePool::read(SIZE).is_ok_and(|pool| pool.total == self.before) {
            return;
        }
        if let Err(error) = fs::write(HugePagePool::control_file(SIZE), self.before.to_string()) {
            eprintln!("huge pages of 1 GiB stay reserved: {error}");
        }
    }
}
