//! Areas of guest memory that KVM writes by itself: named before the first run, and by the guest.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::thread;

use common::*;
use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{
    MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit, VcpuFd,
};
use pageferry_kvm::{
    AREA_REGISTERS, Exit, KvmAreas, KvmError, MemoryErrors, RunError, VmPagerOptions, probe,
};
use pageferry_memory::{GranuleIndex, GuestAddress, State};
use pageferry_paging::Delivery;

const STEAL_TIME: u32 = 0x4b56_4d03;
const KVMCLOCK: u32 = 0x4b56_4d01;
const WALL_CLOCK: u32 = 0x4b56_4d00;
/// A register that has nothing to do with memory.
const PAT: u32 = 0x277;

/// General protection.
const GP: u8 = 13;

const WRMSR: [u8; 2] = [0x0f, 0x30];

fn options(kvm_areas: KvmAreas, memory_errors: MemoryErrors) -> VmPagerOptions {
    VmPagerOptions {
        guest_page_tables_resident: true,
        kvm_areas,
        memory_errors,
        ..VmPagerOptions::default()
    }
}

/// Stolen time is not at the beginning of its page.
fn enable_areas(vcpu: &VcpuFd) -> bool {
    set_msr(vcpu, KVMCLOCK, at(5 * PAGE) | 1) && set_msr(vcpu, STEAL_TIME, at(9 * PAGE + 64) | 1)
}

fn with_features(guest: &Guest, vcpu: &VcpuFd) {
    let cpuid = guest.kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
}

fn is_present(guest: &Guest, page: u64) -> bool {
    guest.region.page_map().state(GranuleIndex::new(page)) == State::Present
}

#[test]
fn areas_that_kvm_writes_come_first() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for kvm_areas in [KvmAreas::BringFirst, KvmAreas::Follow, KvmAreas::Leave] {
        let options = options(kvm_areas, MemoryErrors::Exit);
        let guest = Guest::new(Config { options, ..Config::default() });
        let mut vcpu = guest.vcpu(0);
        with_features(&guest, &vcpu.fd);
        if !enable_areas(&vcpu.fd) {
            println!("skipped: needs a KVM with kvmclock and stolen time");
            return;
        }
        if kvm_areas == KvmAreas::Leave {
            vcpu.read(&guest, Ring::Three, 0);
            assert_eq!(guest.source.asked(), 1);
            vcpu.pager.make_kvm_areas_present(&vcpu.fd).unwrap();
            assert_eq!(guest.source.asked(), 3);
            continue;
        }
        vcpu.read(&guest, Ring::Three, 0);
        assert_eq!(guest.source.asked(), 3, "the page read, and two areas");
        assert!(is_present(&guest, 5) && is_present(&guest, 9));
        assert_written(&guest, 5 * PAGE, 32, "the clock");
    }
}

#[test]
fn an_area_that_can_never_come_is_an_error() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let source = Source { poisoned: [5].into(), ..Source::default() };
    let guest = Guest::new(Config { source, ..Config::default() });
    let mut vcpu = guest.vcpu(0);
    with_features(&guest, &vcpu.fd);
    if !enable_areas(&vcpu.fd) {
        println!("skipped: needs a KVM with kvmclock and stolen time");
        return;
    }
    // nop
    vcpu.prepare(&guest, Ring::Three, &[0x90], Registers::default());
    match vcpu.pager.run(&mut vcpu.fd) {
        Err(RunError::Paging(KvmError::AreaPoisoned { area, guest })) => {
            assert_eq!((area, guest), ("kvmclock", GuestAddress::new(at(5 * PAGE))));
        }
        other => panic!("{other:?}"),
    }
}

/// What a test of a guest's own registers needs; says so if it is not there.
fn register_exits() -> bool {
    let works = probe::host().works(probe::REGISTER_EXITS);
    if exits() && !works {
        println!("skipped: needs exits for writes of registers");
    }
    exits() && works
}

/// A guest whose registers are followed.
fn following(config: Config, memory_errors: MemoryErrors) -> (Guest, Vcpu) {
    let options = options(KvmAreas::Follow, memory_errors);
    let guest = Guest::new(Config { options, ..config });
    guest.vm_pager.filter_area_registers(&guest.vm).unwrap();
    let vcpu = guest.vcpu(0);
    with_features(&guest, &vcpu.fd);
    (guest, vcpu)
}

fn registers(msr: u32, value: u64) -> Registers {
    assert!(value < 1 << 32, "edx is 0");
    Registers { rcx: msr.into(), rax: value, ..Registers::default() }
}

/// KVM has written to these bytes, which tell in a version that they are complete.
#[track_caller]
fn assert_written(guest: &Guest, offset: u64, len: usize, what: &str) {
    let version_at = if len == 64 { 8 } else { 0 };
    let now = guest.peek(offset, len);
    assert_ne!(now, Guest::contents(offset, len), "{what} was not written");
    let version = u32::from_le_bytes(now[version_at..][..4].try_into().unwrap());
    assert_eq!(version % 2, 0, "{what} was not written completely");
    let page = offset & !(PAGE - 1);
    let before = (offset - page) as usize;
    assert_eq!(guest.peek(page, before), Guest::contents(page, before), "before {what}");
    let (end, after) = (offset + len as u64, PAGE as usize - before - len);
    assert_eq!(guest.peek(end, after), Guest::contents(end, after), "after {what}");
}

/// Without the exit KVM would write to a page that is not there, and nobody would notice.
#[test]
fn areas_that_the_guest_names_later_come_when_it_does() {
    if !register_exits() {
        return;
    }
    let _watch = watch(60);
    let cases = SETUPS.into_iter().map(|setup| (setup, Delivery::Exit));
    for (setup, delivery) in cases.chain([(Setup::MinorOwnView, Delivery::Hybrid(1))]) {
        let (guest, mut vcpu) =
            following(Config { setup, delivery, ..Config::default() }, MemoryErrors::Exit);
        let case = format!("{setup:?} {delivery}");
        vcpu.read(&guest, Ring::Three, 0);
        assert_eq!(guest.source.asked(), 1, "{case}");
        let areas = [
            (KVMCLOCK, 5 * PAGE, 1, 32),
            (STEAL_TIME, 9 * PAGE + 64, 1, 64),
            (WALL_CLOCK, 12 * PAGE + 16, 0, 12),
        ];
        for (number, (msr, offset, enabled, len)) in (1..).zip(areas) {
            let value = at(offset) | enabled;
            vcpu.execute(&guest, Ring::Zero, &WRMSR, registers(msr, value));
            assert_eq!(guest.source.asked(), 1 + number, "{case} {msr:#x}");
            assert!(is_present(&guest, offset / PAGE), "{case} {msr:#x}");
            assert_written(&guest, offset, len, &format!("{case} {msr:#x}"));
            // A read is not filtered. (The wall clock's register keeps nothing that is of use.)
            // rdmsr
            let read = vcpu.execute(&guest, Ring::Zero, &[0x0f, 0x32], registers(msr, 0)).rax;
            assert_eq!((msr_of(&vcpu, msr), read), (value, value), "{case} {msr:#x}");
            assert_eq!(vcpu.pager.stats().register_writes, number, "{case} {msr:#x}");
        }
        // Turned off: nothing is brought.
        vcpu.execute(&guest, Ring::Zero, &WRMSR, registers(STEAL_TIME, at(20 * PAGE)));
        assert_eq!(msr_of(&vcpu, STEAL_TIME), at(20 * PAGE), "{case}");
        assert_eq!(guest.source.asked(), 4, "{case}");
        let stats = vcpu.pager.stats();
        assert_eq!(stats.time.count(), stats.exits(), "{case}: {stats:?}");
    }
}

fn msr_of(vcpu: &Vcpu, index: u32) -> u64 {
    msr(&vcpu.fd, index)
}

/// The resident memory, what is nowhere, and what begins in the one and ends in the other.
#[test]
fn areas_in_no_region_are_kvms() {
    if !register_exits() {
        return;
    }
    let _watch = watch(30);
    let (guest, mut vcpu) = following(Config::default(), MemoryErrors::Exit);
    for address in [14 * PAGE, 0x1000_0000] {
        vcpu.execute(&guest, Ring::Zero, &WRMSR, registers(KVMCLOCK, address | 1));
        assert_eq!(msr_of(&vcpu, KVMCLOCK), address | 1);
        assert_eq!(guest.source.asked(), 0, "{address:#x}");
    }
    // KVM looks at this one when it next enters the guest: it may be anything that can be written.
    vcpu.execute(&guest, Ring::Zero, &WRMSR, registers(WALL_CLOCK, at(0) - 4));
    assert_eq!(guest.source.asked(), 1, "the end of it");
    assert!(is_present(&guest, 0));
}

/// What KVM refuses is the exception that it would have been, in the guest.
#[test]
fn what_kvm_refuses_is_an_exception() {
    if !register_exits() {
        return;
    }
    let _watch = watch(30);
    let (guest, mut vcpu) = following(Config::default(), MemoryErrors::Exit);
    // Reserved bits.
    let value = at(5 * PAGE) | 0b11;
    assert!(!set_msr(&vcpu.fd, STEAL_TIME, value));
    vcpu.prepare(&guest, Ring::Zero, &WRMSR, registers(STEAL_TIME, value));
    match vcpu.pager.run(&mut vcpu.fd) {
        Ok(Exit::Kvm(VcpuExit::IoOut(VECTOR, &[GP]))) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(msr_of(&vcpu, STEAL_TIME), 0);
}

#[test]
fn an_area_that_can_never_come_is_refused_to_the_guest() {
    if !register_exits() {
        return;
    }
    let _watch = watch(30);
    for memory_errors in [MemoryErrors::Exit, MemoryErrors::Mce] {
        let source = Source { poisoned: [5].into(), ..Source::default() };
        let (guest, mut vcpu) = following(Config { source, ..Config::default() }, memory_errors);
        vcpu.prepare(&guest, Ring::Zero, &WRMSR, registers(KVMCLOCK, at(5 * PAGE) | 1));
        if memory_errors == MemoryErrors::Exit {
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::MemoryError { guest: Some(guest), .. }) => {
                    assert_eq!(guest, GuestAddress::new(at(5 * PAGE)));
                }
                other => panic!("{other:?}"),
            }
        }
        match vcpu.pager.run(&mut vcpu.fd) {
            Ok(Exit::Kvm(VcpuExit::IoOut(VECTOR, &[GP]))) => {}
            other => panic!("{memory_errors:?}: {other:?}"),
        }
        assert_eq!(msr_of(&vcpu, KVMCLOCK), 0, "{memory_errors:?}");
        assert_eq!(vcpu.pager.stats().memory_errors, 1, "{memory_errors:?}");
    }
}

/// The filter stays when all memory is there.
#[test]
fn registers_are_set_also_when_all_is_there() {
    if !register_exits() {
        return;
    }
    let _watch = watch(30);
    let (guest, mut vcpu) =
        following(Config { len: PAGE, ..Config::default() }, MemoryErrors::Exit);
    vcpu.read(&guest, Ring::Three, 0);
    wait_for("the pager to be complete", || !guest.pager().delivers_exits());
    vcpu.execute(&guest, Ring::Zero, &WRMSR, registers(KVMCLOCK, at(64) | 1));
    assert_written(&guest, 64, 32, "the clock");
    assert_eq!(vcpu.pager.stats().register_writes, 1);
}

/// Interrupted while the area is on its way, the instruction is completed by a later run.
#[test]
fn an_interrupted_write_is_made_later() {
    if !register_exits() {
        return;
    }
    let _watch = watch(30);
    let config = Config { source: Source::holding(), ..Config::default() };
    let (guest, mut vcpu) = following(config, MemoryErrors::Exit);
    vcpu.prepare(&guest, Ring::Zero, &WRMSR, registers(KVMCLOCK, at(5 * PAGE) | 1));
    let immediate_exit = (&raw mut vcpu.fd.get_kvm_run().immediate_exit).addr();
    for round in 0..3 {
        thread::scope(|scope| {
            scope.spawn(|| {
                wait_for("the vCPU to ask", || guest.source.asked() > 0);
                // SAFETY: the vCPU lives, and this is how another thread makes it leave.
                unsafe { (immediate_exit as *mut u8).write_volatile(1) };
            });
            let error = vcpu.pager.run(&mut vcpu.fd).unwrap_err();
            assert!(error.is_interrupted(), "{error}");
        });
        assert!(vcpu.pager.is_mid_instruction(), "{round}");
        assert_eq!(msr_of(&vcpu, KVMCLOCK), 0, "{round}");
        vcpu.fd.set_kvm_immediate_exit(0);
    }
    guest.source.release();
    vcpu.finish();
    assert!(!vcpu.pager.is_mid_instruction());
    assert_written(&guest, 5 * PAGE, 32, "the clock");
    assert_eq!(guest.source.asked(), 1);
}

/// With a filter of the embedder's own: what concerns areas is the pager's, everything else the
/// embedder's; and all is the embedder's where areas are not followed.
#[test]
fn other_registers_are_the_embedders() {
    if !register_exits() {
        return;
    }
    let _watch = watch(30);
    for kvm_areas in [KvmAreas::Follow, KvmAreas::BringFirst] {
        let options = options(kvm_areas, MemoryErrors::Exit);
        let guest = Guest::new(Config { options, ..Config::default() });
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [u64::from(MsrExitReason::all().bits()), 0, 0, 0],
            ..Default::default()
        };
        guest.vm.enable_cap(&cap).unwrap();
        let ranges: Vec<_> = AREA_REGISTERS
            .into_iter()
            .chain([PAT])
            .map(|base| MsrFilterRange {
                flags: MsrFilterRangeFlags::WRITE,
                base,
                msr_count: 1,
                bitmap: &[0],
            })
            .collect();
        guest.vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).unwrap();
        let mut vcpu = guest.vcpu(0);
        with_features(&guest, &vcpu.fd);
        for (msr, value) in [(PAT, 0x0606), (KVMCLOCK, at(5 * PAGE) | 1)] {
            vcpu.prepare(&guest, Ring::Zero, &WRMSR, registers(msr, value));
            if msr == KVMCLOCK && kvm_areas == KvmAreas::Follow {
                vcpu.finish();
                assert_written(&guest, 5 * PAGE, 32, "the clock");
                continue;
            }
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::Kvm(VcpuExit::X86Wrmsr(exit))) => {
                    assert_eq!((exit.index, exit.data), (msr, value), "{kvm_areas:?}");
                    *exit.error = 1;
                }
                other => panic!("{kvm_areas:?}: {other:?}"),
            }
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::Kvm(VcpuExit::IoOut(VECTOR, &[GP]))) => {}
                other => panic!("{kvm_areas:?}: {other:?}"),
            }
            assert_eq!(guest.source.asked(), 0, "{kvm_areas:?} {msr:#x}");
        }
    }
}
