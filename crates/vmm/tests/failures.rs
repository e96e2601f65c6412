//! How it fails: sources that are lost, threads that panic, memory that can never come, memslots
//! that come and go, signals at any time.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use common::*;
use pageferry_kvm::MemoryErrors;
use pageferry_memory::{GuestAddress, PageSize, RegionId};
use pageferry_paging::{Prefetch, Status};
use pageferry_vmm::{
    End, Operation, Order, PatternOptions, PatternSource, Ring, RunOptions, Share, Vm, VmConfig,
};

const SMALL: PageSize = PageSize::SIZE_4K;
const LOW: u64 = 1 << 30;
const HIGH: u64 = 4 << 30;

fn quiet() -> RunOptions<'static> {
    RunOptions::default()
}

/// 4 vCPUs that read and change 512 pages at random.
fn reads_and_changes() -> VmConfig {
    config(Order::Random, Operation::ReadModifyWrite, Ring::Three, Share::Own, 4, 512 << 12)
}

/// The same, from a source that takes its time.
fn slow(case: Case) -> Paged {
    let delay = Duration::from_micros(100);
    let source = PatternOptions { delay, ..PatternOptions::default() };
    Paged::new(case, reads_and_changes(), source)
}

/// 4 vCPUs that read 512 pages again and again, until they are stopped.
fn endless(case: Case) -> Paged {
    let mut config = reads_and_changes();
    config.payload.operation = Operation::ReadVerify;
    config.payload.rounds = u64::MAX;
    config.payload.progress_every = 1;
    let delay = Duration::from_micros(200);
    Paged::new(case, config, PatternOptions { delay, ..PatternOptions::default() })
}

/// Does `meanwhile` again and again while the machine runs, and checks everything afterwards.
/// Returns how often it was done.
fn run_while(paged: &Paged, mut meanwhile: impl FnMut(&Vm)) -> u64 {
    let done = thread::scope(|scope| {
        let run = scope.spawn(|| paged.run(&quiet()));
        let mut done = 0;
        while !run.is_finished() {
            meanwhile(&paged.vm);
            done += 1;
        }
        let report = run.join().unwrap();
        assert!(report.is_good(), "{}: {report}", paged.case);
        paged.check_vcpus(&report);
        done
    });
    paged.check_contents(false);
    paged.check_counts(512);
    done
}

#[test]
fn a_source_lost_while_vcpus_wait() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        for threads in [0, 2] {
            let config = reads_and_changes();
            let source =
                PatternOptions { threads, lose_after: Some(100), ..PatternOptions::default() };
            let paged = Paged::new(case, config, source);
            let second = PatternSource::new(PatternOptions::default());
            let report = thread::scope(|scope| {
                let run = scope.spawn(|| paged.run(&quiet()));
                wait_for("the loss to be seen", || {
                    matches!(paged.pager.status(), Status::Stalled { .. })
                });
                // All wait; a pause is possible all the same.
                paged.vm.pause();
                paged.vm.resume();
                assert!(!run.is_finished(), "{case}: somebody went on without pages");
                paged.pager.attach_source(Arc::clone(&second) as _).unwrap();
                run.join().unwrap()
            });
            assert!(report.is_good(), "{case}: {report}");
            paged.check_contents(false);
            paged.wait_counted(512);
            wait_for("the last answer to be counted", || {
                paged.source.answered() + second.answered() >= 512
            });
            assert_eq!(paged.source.answered() + second.answered(), 512, "{case}");
            let counts = paged.pager.statistics().counts;
            assert_eq!((counts.installed, counts.poisoned), (512, 0), "{case}: {counts:?}");
            assert!(paged.source.answered() <= 100, "{case}");
            assert_eq!(paged.pager.remaining(), 0, "{case}");
        }
    }
}

/// A panic of the page source strikes a vCPU's thread in the middle of a fault, if that thread asks
/// the source itself. Everybody else goes on, and gets that page, too.
#[test]
fn a_vcpu_whose_thread_panics_in_a_fault() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        let config =
            config(Order::Sequential, Operation::ReadVerify, Ring::Three, Share::All, 4, 256 << 12);
        let panic_at = Some(GuestAddress::new(LOW + (40 << 12)));
        let source = PatternOptions { panic_at, ..PatternOptions::default() };
        let paged = Paged::new(case, config, source);
        let report = paged.run(&quiet());
        let (panicked, others): (Vec<_>, Vec<_>) =
            report.vcpus.iter().partition(|vcpu| matches!(vcpu.end, End::Panicked(_)));
        assert!(panicked.len() <= 1, "{case}: {report}");
        assert_eq!(panicked.len() == 1, case.delivery.exits(), "{case}: {report}");
        for vcpu in panicked {
            let End::Panicked(why) = &vcpu.end else { unreachable!() };
            assert!(why.contains("on purpose"), "{why}");
        }
        for vcpu in others {
            assert_eq!((&vcpu.end, vcpu.touches), (&End::Finished, 256), "{case}: {report}");
        }
        assert_eq!(report.mismatches(), 0, "{case}");
        paged.check_contents(false);
        paged.wait_counted(256);
        assert_eq!(paged.pager.statistics().counts.installed, 256, "{case}");
        // It begins anew, and finds all there.
        let report = paged.run(&quiet());
        assert!(report.is_good(), "{case}: {report}");
    }
}

#[test]
fn ten_thousand_pauses_during_paging() {
    if !can_page() {
        return;
    }
    let _watch = watch(240);
    let all: Vec<Case> = cases(SMALL).collect();
    let each = 10_000 / all.len() as u64 + 1;
    let mut cycles = 0;
    for case in all {
        let mut paused = 0;
        while paused < each {
            let paged = slow(case);
            paused += run_while(&paged, |vm| {
                vm.pause();
                vm.resume();
                // Pauses without an end would leave the guest no time to come to its own.
                thread::sleep(Duration::from_micros(50));
            });
        }
        cycles += paused;
    }
    assert!(cycles >= 10_000);
}

#[test]
fn a_memslot_taken_away_and_put_back_during_paging() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        let paged = slow(case);
        let mut turn = 0;
        run_while(&paged, |vm| {
            let (region, pager) = (RegionId::new(turn % 2), Some(&paged.vm_pager));
            turn += 1;
            vm.pause();
            vm.remove_slot(region, pager).unwrap();
            vm.restore_slot(region, pager).unwrap();
            vm.resume();
        });
        assert!(turn > 0);
    }
}

#[test]
fn a_memslot_moved_during_paging() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        let paged = slow(case);
        let mut turn = 0;
        run_while(&paged, |vm| {
            let (region, to) = [(0, 20), (1, 30), (0, 1), (1, 4)][turn % 4];
            turn += 1;
            vm.pause();
            let to = GuestAddress::new(to << 30);
            vm.move_slot(RegionId::new(region), to, Some(&paged.vm_pager)).unwrap();
            vm.resume();
        });
        assert!(turn > 0);
    }
}

#[test]
fn an_address_in_no_region() {
    if !can_page() {
        return;
    }
    let _watch = watch(60);
    let stray = GuestAddress::new(0xd000_0010);
    for case in cases(SMALL) {
        for ring in Ring::ALL {
            let mut config = VmConfig::new(2, 32 << 12);
            config.payload.ring = ring;
            config.payload.stray = Some(stray);
            let paged = Paged::new(case, config, PatternOptions::default());
            let report = paged.run(&quiet());
            for vcpu in &report.vcpus {
                let end = End::NoMemory { address: stray, write: false };
                assert_eq!((&vcpu.end, vcpu.touches), (&end, 16), "{case}: {report}");
            }
            paged.check_counts(32);
        }
    }
}

/// The embedder's signals, of every kind of kick there is, during paging: none is lost, and none
/// disturbs the guest.
#[test]
fn kicks_during_paging() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        let paged = slow(case);
        run_while(&paged, |vm| {
            vm.kick();
            thread::sleep(Duration::from_micros(50));
        });
    }
}

/// Signals of somebody who knows nothing of vCPUs, to their threads: each one is handled.
#[test]
fn signals_of_others_during_paging() {
    static CAUGHT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: libc::c_int) {
        CAUGHT.fetch_add(1, SeqCst);
    }
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    // Real-time signals queue: as many arrive as are sent.
    let signal = libc::SIGRTMIN() + 7;
    let handler = count as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing but an atomic addition.
    assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
    for case in cases(SMALL) {
        let paged = endless(case);
        let threads = [const { AtomicI32::new(0) }; 4];
        let progress = |vcpu: u16, _| {
            // SAFETY: no argument, and it always succeeds.
            threads[usize::from(vcpu)].store(unsafe { libc::gettid() }, SeqCst);
        };
        let before = CAUGHT.load(SeqCst);
        let report = thread::scope(|scope| {
            let options = RunOptions { progress: Some(&progress), ..RunOptions::default() };
            let run = scope.spawn(|| paged.run(&{ options }));
            let mut sent = 0;
            while paged.pager.remaining() > 0 || sent == 0 {
                for thread in &threads {
                    let thread = thread.load(SeqCst);
                    if thread != 0 {
                        // SAFETY: a plain system call; the thread runs until it is stopped below.
                        let answer = unsafe {
                            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal)
                        };
                        assert_eq!(answer, 0);
                        sent += 1;
                    }
                }
                thread::sleep(Duration::from_micros(100));
            }
            wait_for("all signals to be handled", || CAUGHT.load(SeqCst) - before >= sent);
            assert_eq!(CAUGHT.load(SeqCst) - before, sent, "{case}");
            paged.vm.stop();
            run.join().unwrap()
        });
        assert_eq!(report.mismatches(), 0, "{case}: {report}");
        paged.check_contents(false);
        paged.check_vcpus(&report);
        paged.check_counts(512);
    }
}

/// A page that the source cannot read, in each region, in the middle of a vCPU's part.
fn poisoned(case: Case, ring: Ring, memory_errors: MemoryErrors) -> (Paged, [GuestAddress; 2]) {
    let bad = [LOW, HIGH].map(|base| GuestAddress::new(base + (10 << 12)));
    let mut config = VmConfig::new(2, 64 << 12);
    config.payload.ring = ring;
    let source = PatternOptions { poisoned: bad.to_vec(), ..PatternOptions::default() };
    (Paged::with(case, config, source, Prefetch::NONE, memory_errors), bad)
}

#[test]
fn a_page_that_can_never_come_is_the_embedders_to_see() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        for ring in Ring::ALL {
            let (paged, bad) = poisoned(case, ring, MemoryErrors::Exit);
            let report = paged.run(&quiet());
            for (vcpu, bad) in report.vcpus.iter().zip(bad) {
                let End::MemoryError { guest, .. } = vcpu.end else {
                    panic!("{case}, {ring:?}: {report}")
                };
                assert_eq!((guest, vcpu.touches), (Some(bad), 10), "{case}, {ring:?}");
            }
            assert_eq!(paged.pager.statistics().counts.poisoned, 2, "{case}");
        }
    }
}

#[test]
fn a_page_that_can_never_come_is_a_machine_check() {
    const RECOVERABLE_LOAD: u64 = 0x134;
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        let (paged, bad) = poisoned(case, Ring::Three, MemoryErrors::Mce);
        let report = paged.run(&quiet());
        for (vcpu, bad) in report.vcpus.iter().zip(bad) {
            let End::MachineCheck { status, address, .. } = vcpu.end else {
                panic!("{case}: {report}")
            };
            assert_eq!(status & 0xffff, RECOVERABLE_LOAD, "{case}: {report}");
            assert_eq!((address, vcpu.touches), (bad, 10), "{case}: {report}");
            assert_eq!(vcpu.pager.as_ref().unwrap().machine_checks, 1, "{case}");
        }
        // The rest is as it should be.
        assert_eq!(report.mismatches(), 0, "{case}");
    }
}

#[test]
fn a_stop_during_paging() {
    if !can_page() {
        return;
    }
    let _watch = watch(120);
    for case in cases(SMALL) {
        let paged = endless(case);
        let report = thread::scope(|scope| {
            let run = scope.spawn(|| paged.run(&quiet()));
            wait_for("the first pages", || paged.source.answered() >= 20);
            paged.vm.stop();
            run.join().unwrap()
        });
        assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped), "{case}: {report}");
        assert_eq!(report.mismatches(), 0, "{case}");
    }
}
