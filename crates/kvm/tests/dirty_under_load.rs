//! Writes that go on while they are harvested: KVM's dirty log and dirty rings lose none.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::{
    sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    thread,
    time::Duration,
};

use common::{load::*, tracker::*, *};
use pageferry_kvm::dirty::LogMode;
use pageferry_paging::Delivery;
use pageferry_testing::Effort;

/// The transaction test: vCPUs write all the time, and harvests go on. Whoever copies each page that
/// is told has, after a harvest during which nobody writes, what the guest has: whatever was
/// written since a harvest is in the next one.
/// `disturbed`: signals come all the time to the thread that harvests, which some kernels end
/// KVM_RESET_DIRTY_RINGS early for.
fn nothing_is_lost(method: Method, vcpus: u64, delivery: Delivery, disturbed: bool) {
    const HARVESTS: u64 = 1000;
    const PAGES: u64 = 256;
    let case = format!("{method:?} {vcpus} {delivery}");
    let config = Config { len: PAGES * PAGE, delivery, ..Config::default() };
    let Some((guest, machine, mut tracker)) = tracked(method, config, vcpus, None) else {
        return;
    };
    if let Tracker::Ring(ring) = &tracker {
        guest.vm_pager.collect_full_rings(Some(ring.collector()));
    }
    // A small one, so that slots are armed again in several steps.
    if let Tracker::Log(log) = &mut tracker {
        log.set_chunk(64);
    }
    let word = |page: u64| u64::from_le_bytes(guest.peek(page * PAGE, 8).try_into().unwrap());
    let first: Vec<u64> = (0..PAGES).map(|page| Guest::expected(page * PAGE)).collect();
    tracker.arm().unwrap();
    for vcpu in &machine {
        // Before any of them runs: they share their code.
        vcpu.prepare(&guest, Ring::Three, &adding(PAGES, 12), Registers::default());
    }
    let (stop, additions) = (AtomicBool::new(false), AtomicU64::new(0));
    // Held for reading by who writes.
    let writing = RwLock::new(());
    let harvests = thread::scope(|scope| {
        let (guest, stop, additions, writing) = (&guest, &stop, &additions, &writing);
        let stopping = Stop(stop);
        for (n, mut vcpu) in machine.into_iter().enumerate() {
            scope.spawn(move || {
                let mut rax = n as u64 + 1;
                while !stop.load(SeqCst) {
                    let Ok(held) = writing.read() else { break };
                    let registers =
                        Registers { rax, rcx: ADDITIONS, rdi: at(0), ..Registers::default() };
                    vcpu.enter(Ring::Three, CODE, registers);
                    rax = vcpu.finish().rax;
                    additions.fetch_add(ADDITIONS, SeqCst);
                    drop(held);
                    // Whoever wants to write-lock has to get a turn.
                    thread::yield_now();
                }
                let stats = vcpu.pager.stats();
                assert_eq!(stats.foreign_signals, 0);
                stats.rings_full
            });
        }
        if disturbed {
            let harvester = disturb_me();
            scope.spawn(move || {
                while !stop.load(SeqCst) {
                    // SAFETY: the thread that harvests waits for this one.
                    assert_eq!(unsafe { libc::pthread_kill(harvester, libc::SIGUSR2) }, 0);
                    thread::sleep(Duration::from_micros(20));
                }
            });
        }
        let mut copy = first.clone();
        // Emulated machines are slow.
        let effort = Effort::new(HARVESTS, Duration::from_secs(8));
        let mut harvests = 0;
        while effort.goes_on(harvests) {
            let quiet = (harvests % 16 == 15).then(|| writing.write().unwrap());
            let harvested = tracker
                .harvest(&mut |_, run| {
                    for page in run.iter() {
                        copy[page.get() as usize] = word(page.get());
                    }
                })
                .unwrap();
            if quiet.is_some() {
                for (page, copied) in (0..).zip(&copy) {
                    // What has not come yet has not been written.
                    let now = if is_present(guest, page) { word(page) } else { *copied };
                    assert_eq!(*copied, now, "{case}: page {page} after {harvests} harvests");
                }
            }
            // One that finds nothing says nothing.
            harvests += u64::from(harvested.pages > 0 || quiet.is_some());
        }
        drop(stopping);
        harvests
    });
    assert!(harvests >= 32, "{case}: {harvests} harvests");
    let sum = (0..PAGES)
        .filter(|page| is_present(&guest, *page))
        .map(|page| word(page).wrapping_sub(first[page as usize]))
        .fold(0, u64::wrapping_add);
    assert_eq!(sum, additions.load(SeqCst), "{case}: additions were lost");
    println!("{case}: {harvests} harvests, {sum} writes");
}

/// Has a signal that does nothing; answers who the calling thread is.
fn disturb_me() -> libc::pthread_t {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: the handler may run at any time.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(_) as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()), 0);
        libc::pthread_self()
    }
}

fn is_present(guest: &Guest, page: u64) -> bool {
    let granule = pageferry_memory::GranuleIndex::new(page);
    guest.region.page_map().state(granule) == pageferry_memory::State::Present
}

#[test]
fn nothing_is_lost_by_the_log() {
    let Some(&first) = deliveries().first() else { return };
    let _watch = Effort::new(0, Duration::ZERO).watch(180);
    for mode in [LogMode::Automatic, LogMode::Manual, LogMode::InitiallySet] {
        nothing_is_lost(Method::Log(mode), 3, first, false);
    }
    nothing_is_lost(Method::Log(LogMode::Manual), 1, Delivery::Queue, true);
}

#[test]
fn nothing_is_lost_by_rings() {
    let Some(&first) = deliveries().first() else { return };
    let _watch = Effort::new(0, Duration::ZERO).watch(180);
    for (bytes, vcpus, delivery, disturbed) in [
        (0, 1, first, false),
        (0, 3, first, true),
        (64 << 10, 3, first, true),
        (0, 2, Delivery::Queue, false),
    ] {
        nothing_is_lost(Method::Ring(bytes), vcpus, delivery, disturbed);
    }
}
