//! The operations of a fault allocate nothing: they run in signal handlers, and on threads that
//! must not wait for an allocator's lock.
#![cfg(not(loom))]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::cell::Cell;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};
use std::thread;
use std::time::Duration;

use pageferry_memory::{
    Backing, Claim, GranuleIndex, GranuleRange, Layout, PageMap, Region, RegionConfig, State,
    WaitPolicy,
};

thread_local! {
    /// How often this thread has allocated or freed.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, block: Block) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise is the one wanted.
        unsafe { System.dealloc(pointer, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls_during(work: impl FnOnce()) -> u64 {
    let before = CALLS.get();
    work();
    CALLS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(calls_during(|| drop(std::hint::black_box(vec![1_u8]))), 2);
}

#[test]
fn a_fault_allocates_nothing() {
    let region = Region::new(&RegionConfig::new(1 << 20, Backing::Anonymous)).unwrap();
    let layout = Layout::new(vec![Arc::new(region)]).unwrap();
    let (_, region) = layout.iter().next().unwrap();
    let address = region.guest_view().range().start().checked_add(5 * 4096 + 17).unwrap();
    let calls = calls_during(|| {
        let (id, granule) = layout.find_host(address).unwrap();
        let region = layout.get(id).unwrap();
        let map = region.page_map();
        assert_eq!(map.claim(granule), Claim::Won);
        let around = GranuleRange::new(GranuleIndex::new(6), 100);
        assert_eq!(map.claim_run(around), around);
        assert_eq!(region.host_range(around).len(), 100 * 4096);
        assert_eq!(map.publish(GranuleRange::one(granule)), 1);
        assert_eq!(map.release(around), 100);
        assert_eq!(map.poison(around), 100);
        assert_eq!(map.discard(around), 0);
        assert!(map.publish_discarded(around.first()));
        let policy = WaitPolicy { spins: 10, timeout: Some(Duration::from_secs(1)) };
        assert_eq!(map.wait(granule, policy), Ok(State::Present));
        assert_eq!(map.next_run(State::Absent, granule, 7).unwrap().count(), 7);
    });
    assert_eq!(calls, 0);
}

#[test]
fn sleeping_and_being_woken_allocates_nothing() {
    let map = PageMap::new(1);
    let granule = GranuleIndex::new(0);
    assert_eq!(map.claim(granule), Claim::Won);
    let in_vain = AtomicBool::new(false);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let short = WaitPolicy { spins: 0, timeout: Some(Duration::from_millis(1)) };
            let long = WaitPolicy { spins: 0, timeout: None };
            calls_during(|| {
                assert!(map.wait(granule, short).is_err());
                in_vain.store(true, SeqCst);
                assert_eq!(map.wait(granule, long), Ok(State::Present));
                assert!(map.wait_complete(None));
            })
        });
        let calls = calls_during(|| {
            // So that the waiter sleeps at least once.
            while !in_vain.load(SeqCst) {
                assert!(!map.wait_complete(Some(Duration::from_millis(5))));
            }
            assert_eq!(map.publish(GranuleRange::one(granule)), 1);
        });
        assert_eq!(calls, 0);
        assert_eq!(waiter.join().unwrap(), 0);
    });
}
