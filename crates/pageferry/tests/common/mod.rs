//! A guest, its contents, and bounded waiting.
#![allow(dead_code, unreachable_pub)] // Each test binary uses a part of it.

use std::{
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    panic::Location,
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use pageferry::memory::{Backing, Layout, PageSize, Region, RegionConfig, RegionId};

pub const PAGE: u64 = 4096;
pub const REGION: RegionId = RegionId::new(0);
/// Longer than anything takes here that works, on a machine however busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a userfaultfd can be had at all.
pub fn userfaultfd() -> bool {
    let works = pageferry::uffd::Options::new().open().is_ok();
    if !works {
        println!("skipped: needs userfaultfd");
    }
    works
}

/// Whether so many huge pages of 2 MiB are free.
pub fn huge_pages(needed: u64) -> bool {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0);
    if free < needed {
        println!("skipped: needs {needed} free huge pages of 2 MiB, there are {free}");
    }
    free >= needed
}

/// One region of 4 KiB granules, or of 2 MiB ones on huge pages.
pub fn layout(backing: Backing, bytes: u64) -> Layout {
    let region = Region::new(&RegionConfig::new(bytes, backing)).unwrap();
    Layout::new(vec![Arc::new(region)]).unwrap()
}

pub const HUGE: Backing = Backing::Hugetlb(PageSize::SIZE_2M);

/// What the eight bytes at each multiple of eight are; never zero.
pub fn word(offset: u64) -> u64 {
    let mut x = (offset >> 3) ^ 0x2545_f491_4f6c_dd1d;
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (x ^ (x >> 33)) | 1
}

pub fn page(number: u64) -> Vec<u8> {
    let start = number * PAGE;
    (start..start + PAGE).step_by(8).flat_map(|offset| word(offset).to_le_bytes()).collect()
}

/// Reads the eight bytes at `offset` of region 0 as a guest would: in user mode, faulting.
pub fn peek(layout: &Layout, offset: u64) -> u64 {
    let view = layout.get(REGION).unwrap().guest_view();
    assert!(offset.is_multiple_of(8) && offset + 8 <= view.range().len());
    // SAFETY: inside the mapping and aligned, checked above; the layout keeps it mapped.
    u64::from_le(unsafe { view.as_ptr().add(offset as usize).cast::<u64>().read_volatile() })
}

/// The numbers below `count` in an order of their own for every `seed`.
pub fn shuffled(count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    let mut x = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed + 1) | 1;
    for index in (1..order.len()).rev() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        order.swap(index, ((x >> 16) % (index as u64 + 1)) as usize);
    }
    order
}

/// Ends the process, because threads of it wait for pages and cannot be ended.
pub fn fail(why: &str) -> ! {
    // Not `eprintln`, which the test harness keeps to itself until the test has ended.
    let _ = writeln!(std::io::stderr(), "\n{why}");
    std::process::exit(101)
}

fn give_up(what: &str, caller: &Location<'_>) -> ! {
    fail(&format!("{caller}: waited in vain: {what}"))
}

/// Waits until `condition` holds. A thread that waits for a page cannot be ended, and a test that
/// fails while there is one would never end: the process ends instead.
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            give_up(what, Location::caller());
        }
        thread::sleep(Duration::from_micros(100));
    }
}

/// Ends the process if it is not dropped in time.
pub struct Watch(Option<mpsc::Sender<()>>);

/// Watches over a test.
#[track_caller]
pub fn watch() -> Watch {
    let caller = Location::caller();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        if receiver.recv_timeout(2 * PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            give_up("the end of the test", caller);
        }
    });
    Watch(Some(sender))
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0 = None;
    }
}

/// The variable that tells this binary, run by itself, which case a thread is to die in.
const CASE: &str = "PAGEFERRY_TEST_CASE";
/// What the child prints when it has come to the access that is tested.
const REACHED: &str = "reached the access under test";

/// The case to run, in a child.
pub fn case() -> Option<String> {
    std::env::var(CASE).ok()
}

/// In a child: makes the access that it is to die of. It survives this only if there is a bug.
pub fn touch_and_die(layout: &Layout, offset: u64) -> ! {
    let mut out = std::io::stdout();
    writeln!(out, "{REACHED}").unwrap();
    out.flush().unwrap();
    let value = peek(layout, offset);
    eprintln!("saw {value:#x}");
    std::process::exit(42)
}

/// Runs `test` of this binary again for `case`, which is to die of SIGBUS at the access tested.
#[track_caller]
pub fn expect_sigbus(test: &str, case: &str) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = |stream: &mut dyn Read| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let out = thread::spawn(move || reader(&mut out));
    let err = thread::spawn(move || reader(&mut err));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{test} {case}: the child did not end");
        }
        thread::sleep(Duration::from_millis(1));
    };
    let printed = out.join().unwrap() + &err.join().unwrap();
    assert!(printed.contains(REACHED), "{test} {case}: ended early with {status}: {printed}");
    let sigbus = rustix::process::Signal::BUS.as_raw();
    assert_eq!(status.signal(), Some(sigbus), "{test} {case}: {status}: {printed}");
}
