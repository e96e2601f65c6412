//! Faults that leave KVM_RUN, in every memory set-up.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::{sync::atomic::Ordering::*, thread};

use common::*;
use pageferry_kvm::{SignalSet, VmPagerOptions};
use pageferry_memory::{Advice, HostRange};
use pageferry_paging::{Delivery, Events};

/// Every page in an order of its own, each read once in full.
fn permuted() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|n| n * 37 % PAGES)
}

fn all_pages(setup: Setup, delivery: Delivery, ring: Ring) {
    let guest = Guest::new(Config { setup, delivery, ..Config::default() });
    let mut vcpu = guest.vcpu(0);
    let before = SignalSet::blocked();
    for page in permuted() {
        for offset in [page * PAGE + 0x18, page * PAGE, page * PAGE + PAGE - 8] {
            let read = vcpu.read(&guest, ring, offset);
            assert_eq!(read, Guest::expected(offset), "{setup:?} {delivery} {ring:?} {offset:#x}");
        }
        assert_eq!(SignalSet::blocked(), before, "the mask is not as it was");
    }
    let stats = vcpu.pager.stats();
    let case = format!("{setup:?} {delivery} {ring:?}: {stats:?}");
    assert_eq!(guest.source.asked(), PAGES, "{case}");
    // A reader of the queue says so after the guest has gone on.
    wait_for("nothing to remain", || guest.pager().remaining() == 0);
    let exits = if delivery.exits() { PAGES } else { 0 };
    assert_eq!(stats.exits(), exits, "{case}");
    assert_eq!(stats.time.count(), exits, "{case}");
    if ring == Ring::Three {
        assert_eq!(stats.poison, exits, "{case}");
    }
    assert_eq!(guest.vm_pager.stats(), [stats]);
}

#[test]
fn every_page_comes_once_with_its_own_bytes() {
    if !exits() {
        return;
    }
    let _watch = watch(60);
    for setup in SETUPS {
        for ring in [Ring::Three, Ring::Zero] {
            all_pages(setup, Delivery::Exit, ring);
            if setup != Setup::NoQueue {
                all_pages(setup, Delivery::Hybrid(1), ring);
            }
        }
    }
}

/// The same without exits, where KVM waits for every page, on any kernel.
#[test]
fn by_queue_too() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for setup in [Setup::Missing, Setup::Minor, Setup::MinorOwnView] {
        for ring in [Ring::Three, Ring::Zero] {
            for delivery in [Delivery::Queue, Delivery::Sharded(2)] {
                all_pages(setup, delivery, ring);
            }
        }
    }
}

#[test]
fn huge_pages_come_whole() {
    if !exits() || !huge_pages(4) {
        return;
    }
    let Some(_pages) = pageferry_testing::HugePages::reserve(4) else { return };
    let _watch = watch(60);
    for setup in [Setup::Minor, Setup::MinorOwnView, Setup::NoQueue] {
        let guest =
            Guest::new(Config { setup, backing: Some(HUGE), len: 4 << 21, ..Config::default() });
        let mut vcpu = guest.vcpu(0);
        for offset in [5 << 20, 0, (2 << 20) - 8, (8 << 20) - 8, 2 << 20] {
            assert_eq!(vcpu.read(&guest, Ring::Three, offset), Guest::expected(offset));
        }
        assert_eq!((guest.source.asked(), vcpu.pager.stats().poison), (4, 4), "{setup:?}");
    }
}

/// Once all is there, a run leaves the signals alone and counts nothing.
#[test]
fn a_complete_pager_is_out_of_the_way() {
    if !exits() {
        return;
    }
    let _watch = watch(10);
    let guest = Guest::new(Config { len: PAGE, ..Config::default() });
    let mut vcpu = guest.vcpu(0);
    vcpu.read(&guest, Ring::Three, 0);
    wait_for("the pager to be complete", || !guest.pager().delivers_exits());
    let exits = vcpu.pager.stats().exits();
    // The thread's system calls are filtered: changing the mask fails, which is asserted not to
    // happen.
    thread::scope(|scope| {
        scope.spawn(|| {
            vcpu.read(&guest, Ring::Three, 8);
            forbid(libc::SYS_rt_sigprocmask);
            for offset in [16, 24] {
                assert_eq!(vcpu.read(&guest, Ring::Three, offset), Guest::expected(offset));
            }
        });
    });
    assert_eq!(vcpu.pager.stats().exits(), exits);
}

/// From now on this system call fails in the calling thread.
fn forbid(call: libc::c_long) {
    let filter = [
        // Load the number; if it is this one, fail; else allow.
        libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 },
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: call as u32 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | 77 },
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program is as long as stated; it concerns the calling thread.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
    }
}

/// Pages that are there, but not mapped where KVM looks: reclaimed, in effect.
#[test]
fn what_is_there_but_not_mapped_is_mapped() {
    if !exits() {
        return;
    }
    let _watch = watch(20);
    // With a reader it is a fault of the queue's, not an exit; without one it must be no fault.
    for (setup, delivery) in [Setup::Minor, Setup::MinorOwnView]
        .into_iter()
        .flat_map(|setup| [Delivery::Hybrid(1), Delivery::Exit].map(|delivery| (setup, delivery)))
    {
        for ring in [Ring::Three, Ring::Zero] {
            let events = Some(Events::Ignore);
            let guest = Guest::new(Config { setup, events, delivery, ..Config::default() });
            let mut vcpu = guest.vcpu(0);
            for page in 0..4 {
                vcpu.read(&guest, ring, page * PAGE);
            }
            let view = guest.region.kvm_view();
            let pages = HostRange::new(view.range().start(), 2 * PAGE);
            view.advise(pages, Advice::DontNeed).unwrap();
            for page in 0..4 {
                let read = vcpu.read(&guest, ring, page * PAGE + 8);
                assert_eq!(read, Guest::expected(page * PAGE + 8), "{setup:?} {ring:?} {page}");
            }
            assert_eq!(guest.source.asked(), 4, "nothing is fetched again");
        }
    }
}

/// One fetch for two vCPUs and a device thread that want the same page.
#[test]
fn a_page_that_several_want_is_fetched_once() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for setup in [Setup::Minor, Setup::MinorOwnView] {
        let source = Source::holding();
        let guest = Guest::new(Config {
            setup,
            source,
            delivery: Delivery::Hybrid(1),
            ..Config::default()
        });
        thread::scope(|scope| {
            let guest = &guest;
            let waiting: Vec<_> = (0..2)
                .map(|number| {
                    let mut vcpu = guest.vcpu(number);
                    // Before either runs: they share their code.
                    vcpu.prepare(
                        guest,
                        Ring::Three,
                        &[0x48, 0x8b, 0x07], // mov rax, [rdi]
                        Registers { rdi: at(3 * PAGE), ..Registers::default() },
                    );
                    scope.spawn(move || (vcpu.finish().rax, vcpu.pager.stats()))
                })
                .collect();
            let device = scope.spawn(|| {
                let address = guest.region.guest_view().range().skip(3 * PAGE).start();
                assert!(guest.pager().resolve(address));
            });
            wait_for("somebody to ask", || guest.source.asked() > 0);
            thread::sleep(std::time::Duration::from_millis(20));
            guest.source.release();
            device.join().unwrap();
            for vcpu in waiting {
                let (read, stats) = vcpu.join().unwrap();
                assert_eq!(read, Guest::expected(3 * PAGE));
                assert!(stats.poison <= 1 && stats.waited <= stats.poison, "{stats:?}");
            }
        });
        assert_eq!(guest.source.asked(), 1, "{setup:?}");
    }
}

#[test]
fn exits_without_resident_tables_are_refused_on_shadow_paging() {
    use pageferry_kvm::{KvmError, VmPager, probe};
    if !exits() {
        return;
    }
    let guest = Guest::new(Config::default());
    let options = VmPagerOptions { guest_page_tables_resident: false, ..VmPagerOptions::default() };
    match (probe::host().paging, VmPager::new(guest.pager().clone(), options)) {
        (probe::Paging::TwoDimensional, Ok(_)) => {}
        (probe::Paging::Shadow | probe::Paging::Unknown, Err(error)) => {
            assert!(matches!(error, KvmError::ShadowPaging { .. }), "{error}");
            assert!(error.to_string().contains("resident"), "{error}");
        }
        (paging, result) => panic!("{paging:?}: {result:?}"),
    }
    assert_eq!(guest.source.granules.load(SeqCst), 0);
}
