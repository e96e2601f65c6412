//! Serving a fault from an image allocates nothing: in the SIGBUS handler of the thread that
//! touches the memory (an allocator's lock may be held there), and on the threads of the engine
//! (fork(2) may hold it until they go on).

use std::{
    alloc::{GlobalAlloc, Layout as Block, System},
    cell::Cell,
    fs::{self, File},
    io::Write as _,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use pageferry_image::RawImage;
use pageferry_memory::{Backing, Layout, Region, RegionConfig};
use pageferry_paging::{Delivery, InstallMethod, Pager, Prefetch, StartError};

thread_local! {
    /// How often this thread has allocated or freed.
    static MINE: Cell<u64> = const { Cell::new(0) };
}
/// How often all threads have.
static ALL: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count() {
    MINE.set(MINE.get() + 1);
    ALL.fetch_add(1, SeqCst);
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, block: Block) {
        count();
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.dealloc(pointer, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PAGE: u64 = 4096;
const PAGES: u64 = 512;
/// Of the image; all else is data.
const HOLE: std::ops::Range<u64> = 100..200;

fn byte_of(page: u64) -> u8 {
    if HOLE.contains(&page) { 0 } else { (page % 251) as u8 + 1 }
}

fn image() -> RawImage {
    let fd: OwnedFd =
        rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    let mut file = File::from(fd);
    for page in 0..PAGES {
        if HOLE.contains(&page) {
            std::io::Seek::seek_relative(&mut file, PAGE as i64).expect("a place");
        } else {
            file.write_all(&[byte_of(page); PAGE as usize]).expect("writing");
        }
    }
    RawImage::from_file(file, "image").expect("an image")
}

/// Touches the pages, back and forth, and returns how often anybody allocated, and this thread.
fn allocations(pager: &Pager, pages: std::ops::Range<u64>) -> (u64, u64) {
    let (_, region) = pager.layout().iter().next().expect("a region");
    let view = region.guest_view();
    let before = (ALL.load(SeqCst), MINE.get());
    let middle = (pages.start + pages.end) / 2;
    for (low, high) in (pages.start..middle).zip((middle..pages.end).rev()) {
        for page in [low, high] {
            let mut byte = [0xee];
            view.read_at(page * PAGE + 17, &mut byte).expect("within the region");
            assert_eq!(byte[0], byte_of(page), "page {page}");
        }
    }
    (ALL.load(SeqCst) - before.0, MINE.get() - before.1)
}

/// Waits until no other thread of this process has anything to do (proc_pid_stat(5)).
fn wait_until_others_sleep() {
    let me = rustix::thread::gettid().as_raw_nonzero().to_string();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let busy = fs::read_dir("/proc/self/task").expect("threads").any(|task| {
            let task = task.expect("a thread");
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let state = stat.rsplit(") ").next().unwrap_or_default();
            task.file_name() != *me && !state.starts_with('S')
        });
        if !busy {
            return;
        }
        assert!(Instant::now() < deadline, "some thread is always busy");
        std::thread::sleep(Duration::from_millis(1));
    }
}

// One test, so that nobody else allocates meanwhile.
#[test]
fn a_fault_allocates_nothing() {
    assert_eq!(
        {
            let before = (ALL.load(SeqCst), MINE.get());
            drop(std::hint::black_box(vec![1_u8]));
            (ALL.load(SeqCst) - before.0, MINE.get() - before.1)
        },
        (2, 2),
        "the counters count"
    );
    let deliveries = [
        Delivery::Queue,
        Delivery::QueueN(2),
        Delivery::ByThread(2),
        Delivery::ByCpu(2),
        Delivery::Sharded(2),
        Delivery::Signal,
    ];
    let memory = [
        (Backing::Anonymous, InstallMethod::Copy),
        (Backing::Anonymous, InstallMethod::Move),
        (Backing::Memfd, InstallMethod::Copy),
        (Backing::Memfd, InstallMethod::Continue),
    ];
    let prefetches = [
        Prefetch::NONE,
        Prefetch::around(64 << 10),
        Prefetch { around: 0, ahead: 64 << 10, sweep: false },
    ];
    for delivery in deliveries {
        for (backing, install) in memory {
            for prefetch in prefetches {
                let case = format!("{delivery} {backing} {install:?} {prefetch:?}");
                let region = Region::new(&RegionConfig::new(PAGES * PAGE, backing));
                let layout = Layout::new(vec![Arc::new(region.expect("memory"))]).expect("one");
                let started = Pager::builder(layout)
                    .delivery(delivery)
                    .install(Some(install))
                    .prefetch(prefetch)
                    .start(Arc::new(image()));
                let pager = match started {
                    Ok(pager) => pager,
                    Err(StartError::Open(error)) => {
                        println!("skipped: needs userfaultfd: {error}");
                        return;
                    }
                    Err(error) => panic!("{case}: {error}"),
                };
                // Threads allocate while they start.
                allocations(&pager, 0..64);
                wait_until_others_sleep();
                let (all, mine) = allocations(&pager, 64..PAGES);
                assert_eq!(mine, 0, "{case}: in the thread that touches the memory");
                assert_eq!(all, 0, "{case}: in some thread");
                assert!(pager.statistics().counts.faults > 0, "{case}");
            }
        }
    }
}
