//! What the host has, and lacks.

use std::{fs::File, io, path::PathBuf};

use pageferry_memory::{HugePagePool, PageSize};
use pageferry_uffd::Features;
use rustix::fs::{FlockOperation, flock};

/// Whether a userfaultfd can be had at all; says so if not.
pub fn userfaultfd() -> bool {
    let works = pageferry_uffd::Options::new().open();
    if let Err(error) = &works {
        println!("skipped: needs userfaultfd: {error}");
    }
    works.is_ok()
}

/// Whether a userfaultfd can be had that has these features; says so if not.
pub fn features(needed: Features) -> bool {
    let works = pageferry_uffd::Options::new().required(needed).open();
    if let Err(error) = &works {
        println!("skipped: needs userfaultfd with {needed:?}: {error}");
    }
    works.is_ok()
}

const SIZE: PageSize = PageSize::SIZE_2M;

/// How many huge pages of 2 MiB a new mapping could have.
fn available() -> u64 {
    // A kernel without huge pages has none.
    HugePagePool::read(SIZE).map_or(0, |pool| pool.free.saturating_sub(pool.promised))
}

fn say_skipped(needed: u64, available: u64) {
    println!("skipped: needs {needed} free huge pages of 2 MiB, there are {available}");
}

/// Whether so many huge pages of 2 MiB are free, at this moment; says so if not. It reserves
/// nothing: see [`HugePages`] for that.
pub fn huge_pages(needed: u64) -> bool {
    let available = available();
    if available < needed {
        say_skipped(needed, available);
    }
    available >= needed
}

/// Huge pages of 2 MiB that are there for one test, until this is dropped.
///
/// Only one test at a time has them, of all tests in all processes that ask in this way: a lock on
/// the pool's file in sysfs sees to that. What the pool lacks is added where that is allowed, and
/// taken away in the end, so the memory has to be unmapped before this is dropped. A process that
/// is killed leaves the pool as it is then.
#[derive(Debug)]
#[must_use = "dropping it takes the huge pages away"]
pub struct HugePages {
    added: u64,
    _lock: File,
}

impl HugePages {
    /// Waits for its turn; `None`, having said so, if the host has too few and they cannot be
    /// added. A thread that has some already must not ask again: it would wait for itself.
    pub fn reserve(needed: u64) -> Option<Self> {
        let lock = match File::open(pool_file()) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                say_skipped(needed, 0);
                return None;
            }
            Err(error) => panic!("{}: {error}", pool_file().display()),
        };
        flock(&lock, FlockOperation::LockExclusive).expect("a lock on the pool of huge pages");
        let mut pages = Self { added: 0, _lock: lock };
        let missing = needed.saturating_sub(available());
        if missing > 0 {
            let before = total();
            // Who may not add any finds too few below.
            if set_total(before + missing).is_ok() {
                // Fewer than asked for where memory is short or fragmented.
                pages.added = total().saturating_sub(before);
            }
        }
        let available = available();
        if available < needed {
            say_skipped(needed, available);
            return None;
        }
        Some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.added == 0 {
            return;
        }
        if let Err(error) = set_total(total().saturating_sub(self.added)) {
            eprintln!("{} huge pages of 2 MiB stay reserved: {error}", self.added);
        }
    }
}

fn pool_file() -> PathBuf {
    format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", SIZE.bytes() >> 10).into()
}

/// Pages in the pool, used or not.
fn total() -> u64 {
    HugePagePool::read(SIZE).expect("the pool of huge pages").total
}

fn set_total(pages: u64) -> io::Result<()> {
    std::fs::write(pool_file(), pages.to_string())
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;
    use crate::{HUGE, PATIENCE, REGION, layout};

    #[test]
    fn huge_pages_are_there_for_one_at_a_time() {
        let Some(pages) = HugePages::reserve(2) else { return };
        assert!(huge_pages(2));
        let memory = layout(HUGE, 4 << 20);
        memory.get(REGION).unwrap().guest_view().write_at(2 << 20, &[1]).unwrap();

        let (say, said) = mpsc::channel();
        let other = thread::spawn(move || {
            let pages = HugePages::reserve(1);
            say.send(pages.is_some()).unwrap();
        });
        // Its turn cannot come yet, however fast or slow the machine is.
        assert!(said.recv_timeout(Duration::from_millis(50)).is_err(), "one at a time");
        drop(memory);
        drop(pages);
        assert_eq!(said.recv_timeout(PATIENCE), Ok(true));
        other.join().unwrap();
    }
}
