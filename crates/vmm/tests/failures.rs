//! How it fails: sources that are lost, threads that panic, memory that can never come, memslots
//! that come and go, signals at any time.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use common::*;
use kvm_ioctls::VcpuFd;
use pageferry_kvm::{Exit, MemoryErrors, RunError, VcpuPager, VcpuStats, VmPager};
use pageferry_memory::{GuestAddress, RegionId};
use pageferry_paging::{Prefetch, Status};
use pageferry_vmm::{
    End, Operation, Order, PatternOptions, PatternSource, Report, Ring, RunOptions, Share,
    VcpuRunner, Vm, VmConfig,
};

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
/// Returns how often it was done: once at least.
fn run_while(paged: &Paged, mut meanwhile: impl FnMut(&Vm)) -> u64 {
    let done = thread::scope(|scope| {
        let run = scope.spawn(|| paged.run(&quiet()));
        let mut done = 0;
        while done == 0 || !run.is_finished() {
            meanwhile(&paged.vm);
            done += 1;
        }
        let report = run.join().unwrap();
        assert!(report.is_good(), "{}: {report}", paged.case);
        paged.check_vcpus(&report);
        done
    });
    paged.check_counts(512);
    paged.check_contents(false);
    done
}

/// For every delivery on every set-up: runs a machine, and does `in_pause` in pauses of it, again
/// and again, each time with the next number.
#[track_caller]
fn run_with_pauses(in_pause: impl Fn(&Vm, &VmPager, u16)) {
    each_case(120, |case| {
        let paged = slow(case);
        let mut turn = 0_u16;
        run_while(&paged, |vm| {
            vm.pause();
            in_pause(vm, &paged.vm_pager, turn);
            turn = turn.wrapping_add(1);
            vm.resume();
        });
    });
}

/// Runs a machine that never ends, does `meanwhile`, stops it, and checks all that came.
fn run_endless(
    case: Case,
    options: &RunOptions<'_>,
    meanwhile: impl FnOnce(&Paged),
) -> (Paged, Report) {
    let paged = endless(case);
    let report = thread::scope(|scope| {
        let run = scope.spawn(|| paged.run(options));
        meanwhile(&paged);
        paged.vm.stop();
        run.join().unwrap()
    });
    assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped), "{case}: {report}");
    assert_eq!(report.mismatches(), 0, "{case}: {report}");
    paged.check_contents(false);
    (paged, report)
}

#[test]
fn a_source_lost_while_vcpus_wait() {
    each_case(120, |case| {
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
            paged.wait_counted(512);
            paged.check_contents(false);
            wait_for("the last answer to be counted", || {
                paged.source.answered() + second.answered() >= 512
            });
            assert_eq!(paged.source.answered() + second.answered(), 512, "{case}");
            let counts = paged.pager.statistics().counts;
            assert_eq!((counts.installed, counts.poisoned), (512, 0), "{case}: {counts:?}");
            assert!(paged.source.answered() <= 100, "{case}");
            assert_eq!(paged.pager.remaining(), 0, "{case}");
        }
    });
}

/// A panic of the page source strikes a vCPU's thread in the middle of a fault, if that thread asks
/// the source itself. Everybody else goes on, and gets that page, too.
#[test]
fn a_vcpu_whose_thread_panics_in_a_fault() {
    each_case(120, |case| {
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
        paged.wait_counted(256);
        paged.check_contents(false);
        assert_eq!(paged.pager.statistics().counts.installed, 256, "{case}");
        // It begins anew, and finds all there.
        let report = paged.run(&quiet());
        assert!(report.is_good(), "{case}: {report}");
    });
}

/// A vCPU's thread as of an embedder that takes the vCPU away for good: it ends at the next signal
/// after `leave` was set.
struct Leaver<'a> {
    pager: VcpuPager,
    /// It enters the guest once this holds.
    enters: Box<dyn Fn() -> bool + Send + 'a>,
    leave: Option<&'a AtomicBool>,
    left: &'a AtomicBool,
}

impl VcpuRunner for Leaver<'_> {
    fn run<'a>(&mut self, vcpu: &'a mut VcpuFd) -> Result<Exit<'a>, RunError> {
        wait_for("the other vCPU's fault", || (self.enters)());
        let result = self.pager.run(vcpu);
        let leaves = self.leave.is_some_and(|leave| leave.load(SeqCst));
        if leaves && result.as_ref().is_err_and(RunError::is_interrupted) {
            return Err(RunError::Kvm(kvm_ioctls::Error::new(libc::ECANCELED)));
        }
        result
    }

    fn stats(&self) -> Option<VcpuStats> {
        Some(self.pager.stats())
    }
}

impl Drop for Leaver<'_> {
    fn drop(&mut self) {
        if self.leave.is_some() {
            self.left.store(true, SeqCst);
        }
    }
}

/// The thread that asked for a page ends before it comes, while another vCPU waits for the same
/// page: the other gets it all the same.
#[test]
fn a_vcpu_whose_thread_ends_in_a_fault() {
    each_case(120, |case| {
        for ring in Ring::ALL {
            // Where KVM emulates, it reads memory itself, and with a queue waits until that is there.
            if ring == Ring::Zero && !case.delivery.exits() {
                continue;
            }
            let shared =
                config(Order::Sequential, Operation::ReadVerify, ring, Share::All, 2, 8 << 12);
            let source = PatternOptions { held: true, ..PatternOptions::default() };
            let paged = Paged::new(case, shared, source);
            let faults = || paged.pager.statistics().counts.faults;
            let (leave, left) = (AtomicBool::new(false), AtomicBool::new(false));
            let runner = |vcpu| -> Box<dyn VcpuRunner + '_> {
                let first = vcpu == 0;
                Box::new(Leaver {
                    pager: paged.vm_pager.vcpu(),
                    enters: Box::new(move || first || faults() >= 1),
                    leave: first.then_some(&leave),
                    left: &left,
                })
            };
            let report = thread::scope(|scope| {
                let run = scope.spawn(|| paged.vm.run_with(&runner, None, &quiet()));
                wait_for("both vCPUs' faults", || faults() >= 2);
                assert_eq!(paged.source.granules(), 1, "{case}: both want the same page");
                leave.store(true, SeqCst);
                paged.vm.kick();
                wait_for("the end of a vCPU's thread", || left.load(SeqCst));
                assert!(!run.is_finished(), "{case}: nobody has the page yet");
                paged.source.release().unwrap();
                run.join().unwrap().unwrap()
            });
            assert!(matches!(report.vcpus[0].end, End::Failed(_)), "{case}: {report}");
            assert_eq!(report.vcpus[0].touches, 0, "{case}: {report}");
            let other = &report.vcpus[1];
            assert_eq!((&other.end, other.touches), (&End::Finished, 8), "{case}: {report}");
            assert_eq!(report.mismatches(), 0, "{case}: {report}");
            paged.check_counts(8);
            paged.check_contents(false);
            // The vCPU may be had back.
            let report = paged.run(&quiet());
            assert!(report.is_good(), "{case}: {report}");
        }
    });
}

#[test]
fn ten_thousand_pauses_during_paging() {
    let each = 10_000_u64.div_ceil(cases(SMALL).count() as u64);
    each_case(240, |case| {
        let mut paused = 0;
        while paused < each {
            paused += run_while(&slow(case), |vm| {
                vm.pause();
                vm.resume();
                // Pauses without an end would leave the guest no time to come to its own.
                thread::sleep(Duration::from_micros(50));
            });
        }
    });
}

#[test]
fn a_memslot_taken_away_and_put_back_during_paging() {
    run_with_pauses(|vm, pager, turn| {
        let region = RegionId::new(turn % 2);
        vm.remove_slot(region, Some(pager)).unwrap();
        vm.restore_slot(region, Some(pager)).unwrap();
    });
}

#[test]
fn a_memslot_moved_during_paging() {
    run_with_pauses(|vm, pager, turn| {
        let (region, to) = [(0, 20), (1, 30), (0, 1), (1, 4)][usize::from(turn % 4)];
        vm.move_slot(RegionId::new(region), GuestAddress::new(to << 30), Some(pager)).unwrap();
    });
}

#[test]
fn an_address_in_no_region() {
    let stray = GuestAddress::new(0xd000_0010);
    each_case(60, |case| {
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
    });
}

/// The embedder's signals, of every kind of kick there is, during paging: none is lost, and none
/// disturbs the guest.
#[test]
fn kicks_during_paging() {
    each_case(120, |case| {
        let paged = slow(case);
        run_while(&paged, |vm| {
            vm.kick();
            thread::sleep(Duration::from_micros(50));
        });
    });
}

/// Signals of somebody who knows nothing of vCPUs, to their threads: each one is handled.
#[test]
fn signals_of_others_during_paging() {
    static CAUGHT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: libc::c_int) {
        CAUGHT.fetch_add(1, SeqCst);
    }
    // Real-time signals queue: as many arrive as are sent.
    let signal = libc::SIGRTMIN() + 7;
    let handler = count as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing but an atomic addition.
    assert_ne!(unsafe { libc::signal(signal, handler) }, libc::SIG_ERR);
    each_case(120, |case| {
        let threads = [const { AtomicI32::new(0) }; 4];
        let progress = |vcpu: u16, _| {
            // SAFETY: no argument, and it always succeeds.
            threads[usize::from(vcpu)].store(unsafe { libc::gettid() }, SeqCst);
        };
        let before = CAUGHT.load(SeqCst);
        let options = RunOptions { progress: Some(&progress), ..RunOptions::default() };
        let (paged, report) = run_endless(case, &options, |paged| {
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
        });
        paged.check_vcpus(&report);
        paged.check_counts(512);
    });
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
    each_case(120, |case| {
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
    });
}

#[test]
fn a_page_that_can_never_come_is_a_machine_check() {
    const RECOVERABLE_LOAD: u64 = 0x134;
    each_case(120, |case| {
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
    });
}

#[test]
fn a_stop_during_paging() {
    each_case(120, |case| {
        run_endless(case, &quiet(), |paged| {
            wait_for("the first pages", || paged.source.answered() >= 20);
        });
    });
}
