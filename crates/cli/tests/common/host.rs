//! What the host has, and lacks.

use std::{fs, sync::Mutex};

use super::{json, pageferry, run};

/// Whether this process can have a userfaultfd: what doctor says of it.
pub fn has_userfaultfd() -> bool {
    let has = json(&run(&mut pageferry(["--json", "doctor"])))["findings"]
        .as_array()
        .expect("findings")
        .iter()
        .any(|f| f["id"] == "missing.anonymous" && f["status"] == "works");
    if !has {
        println!("skipped: needs userfaultfd");
    }
    has
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The pool of 2 MiB huge pages. Only one test at a time uses it.
pub static HUGE_PAGES: Mutex<()> = Mutex::new(());

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

fn pool(file: &str) -> u64 {
    let text = fs::read_to_string(format!("{POOL}/{file}")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Pages that a new mapping could get.
pub fn huge_pages_available() -> u64 {
    pool("free_hugepages").saturating_sub(pool("resv_hugepages"))
}

/// Pages in the pool, used or not.
pub fn huge_pages_total() -> u64 {
    pool("nr_hugepages")
}

/// Whether nobody uses huge pages: only then do their numbers say what the command did.
pub fn huge_pages_are_idle() -> bool {
    let idle = pool("free_hugepages") == huge_pages_total() && pool("resv_hugepages") == 0;
    if !idle {
        println!("skipped: needs a pool of huge pages that nobody else uses");
    }
    idle
}

/// Whether the command can have `needed` huge pages: they are there, or it can reserve them.
pub fn huge_pages(needed: u64) -> bool {
    let available = huge_pages_available();
    let can_reserve =
        rustix::fs::access(format!("{POOL}/nr_hugepages"), rustix::fs::Access::WRITE_OK).is_ok();
    let enough = available >= needed || can_reserve;
    if !enough {
        println!("skipped: needs {needed} free huge pages of 2 MiB, there are {available}");
    }
    enough
}
