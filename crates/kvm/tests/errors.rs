//! Memory that can never come, and memory that is taken away.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use kvm_ioctls::VcpuExit;
use pageferry_kvm::{Exit, MemoryErrors, VmPagerOptions};
use pageferry_memory::{GuestAddress, HostAddress};
use pageferry_paging::Delivery;

const BAD: u64 = 3;

fn options(memory_errors: MemoryErrors) -> VmPagerOptions {
    VmPagerOptions { guest_page_tables_resident: true, memory_errors, ..VmPagerOptions::default() }
}

fn bad_guest(memory_errors: MemoryErrors, setup: Setup, delivery: Delivery) -> Guest {
    let source = Source { poisoned: [BAD].into(), ..Source::default() };
    let options = options(memory_errors);
    Guest::new(Config { setup, delivery, source, options, ..Config::default() })
}

const MOV_RAX: [u8; 3] = [0x48, 0x8b, 0x07]; // mov rax, [rdi]
const MOV_TO: [u8; 3] = [0x48, 0x89, 0x07]; // mov [rdi], rax

#[test]
fn an_exit_says_where() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for (setup, delivery) in [
        (Setup::Missing, Delivery::Exit),
        (Setup::Minor, Delivery::Exit),
        (Setup::MinorOwnView, Delivery::Exit),
        (Setup::NoQueue, Delivery::Exit),
        (Setup::Missing, Delivery::Queue),
        (Setup::Minor, Delivery::Queue),
    ] {
        for (ring, code) in [
            (Ring::Three, MOV_RAX),
            (Ring::Three, MOV_TO),
            (Ring::Zero, MOV_RAX),
            (Ring::Zero, MOV_TO),
        ] {
            let case = format!("{setup:?} {delivery} {ring:?}");
            let guest = bad_guest(MemoryErrors::Exit, setup, delivery);
            let mut vcpu = guest.vcpu(0);
            let offset = BAD * PAGE + 0x10;
            let page = guest.region.kvm_view().range().skip(BAD * PAGE).take(PAGE);
            let registers = Registers { rdi: at(offset), rax: 5, ..Registers::default() };
            vcpu.prepare(&guest, ring, &code, registers);
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::MemoryError { guest: Some(guest), host }) => {
                    assert_eq!(guest.get() & !(PAGE - 1), at(BAD * PAGE), "{case}");
                    assert!(page.contains(host), "{case}");
                }
                other => panic!("{case}: {other:?}"),
            }
            if vcpu.pager.is_mid_instruction() {
                // The embedder lets it go on: it reads ones, or writes nowhere.
                let rax = vcpu.finish().rax;
                assert_eq!(rax, if code == MOV_RAX { u64::MAX } else { 5 }, "{case}");
            } else {
                // It does not go on by itself, however often it is tried.
                for _ in 0..3 {
                    let again = vcpu.pager.run(&mut vcpu.fd);
                    assert!(matches!(again, Ok(Exit::MemoryError { .. })), "{case}: {again:?}");
                }
            }
            let stats = vcpu.pager.stats();
            assert!(stats.memory_errors > 0 && stats.machine_checks == 0, "{case}: {stats:?}");
            // Others are as good as ever.
            let good = (BAD + 1) * PAGE;
            assert_eq!(vcpu.read(&guest, ring, good), Guest::expected(good), "{case}");
        }
    }
}

const IA32_MCG_STATUS: u32 = 0x17a;
const IA32_MCG_CTL: u32 = 0x17b;
const IA32_MC1_CTL: u32 = 0x404;
const IA32_MC1_STATUS: u32 = 0x405;
const IA32_MC1_ADDR: u32 = 0x406;
const MACHINE_CHECK: u8 = 18;

#[test]
fn a_machine_check_says_where() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for delivery in [Delivery::Exit, Delivery::Queue] {
        for ring in [Ring::Three, Ring::Zero] {
            let case = format!("{delivery} {ring:?}");
            let guest = bad_guest(MemoryErrors::Mce, Setup::Minor, delivery);
            let mut vcpu = guest.vcpu(0);
            let registers = Registers { rdi: at(BAD * PAGE + 0x10), ..Registers::default() };
            vcpu.prepare(&guest, ring, &MOV_RAX, registers);
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::Kvm(VcpuExit::IoOut(VECTOR, &[MACHINE_CHECK]))) => {}
                other => panic!("{case}: {other:?}"),
            }
            // Valid, uncorrected, enabled, with address and its kind, signaled, action required.
            let status = msr(&vcpu.fd, IA32_MC1_STATUS);
            assert_eq!(status, 0xbd80_0000_0000_0134, "{case}: {status:#x}");
            let address = msr(&vcpu.fd, IA32_MC1_ADDR);
            assert_eq!(address & !(PAGE - 1), at(BAD * PAGE), "{case}");
            let in_progress = msr(&vcpu.fd, IA32_MCG_STATUS);
            let restartable = if vcpu.pager.stats().mmio_reads == 0 { 0b11 } else { 0 };
            assert_eq!(in_progress, 0b100 | restartable, "{case}");
            let stats = vcpu.pager.stats();
            assert_eq!((stats.memory_errors, stats.machine_checks), (1, 1), "{case}");
        }
    }
}

/// KVM would drop the machine check, and the guest touch the memory for ever.
#[test]
fn a_guest_without_machine_checks_is_the_embedders() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for off in [IA32_MCG_CTL, IA32_MC1_CTL] {
        let guest = bad_guest(MemoryErrors::Mce, Setup::Minor, Delivery::Exit);
        let mut vcpu = guest.vcpu(0);
        // The first run gives it the registers.
        vcpu.read(&guest, Ring::Three, 0);
        assert!(set_msr(&vcpu.fd, off, 0), "{off:#x}");
        let registers = Registers { rdi: at(BAD * PAGE), ..Registers::default() };
        vcpu.prepare(&guest, Ring::Three, &MOV_RAX, registers);
        match vcpu.pager.run(&mut vcpu.fd) {
            Ok(Exit::MemoryError { guest: Some(guest), .. }) => {
                assert_eq!(guest, GuestAddress::new(at(BAD * PAGE)));
            }
            other => panic!("{off:#x}: {other:?}"),
        }
    }
}

/// The slot moves while the guest is paged: its addresses follow.
#[test]
fn slots_move() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for ring in [Ring::Three, Ring::Zero] {
        let guest = Guest::new(Config::default());
        let mut vcpu = guest.vcpu(0);
        assert_eq!(vcpu.read(&guest, ring, 0), Guest::expected(0));
        let new_base = 64 << 20;
        let slots = guest.vm_pager.slots();
        let slot = pageferry_kvm::Slot {
            guest: GuestAddress::new(new_base),
            len: PAGES * PAGE,
            region: REGION,
            offset: 0,
            read_only: false,
        };
        slots.set(0, slot).unwrap();
        let mut removed = memslot(0, BASE, guest.region.kvm_view());
        removed.memory_size = 0;
        for slot in [removed, memslot(0, new_base, guest.region.kvm_view())] {
            // SAFETY: the region lives as long as the machine.
            unsafe { guest.vm.set_user_memory_region(slot) }.unwrap();
        }
        // at() is where it was.
        let moved = |offset| offset + new_base - BASE;
        let registers = |offset| Registers { rdi: at(moved(offset)), ..Registers::default() };
        for offset in [8, 7 * PAGE + 8] {
            let read = vcpu.execute(&guest, ring, &MOV_RAX, registers(offset)).rax;
            assert_eq!(read, Guest::expected(offset), "{ring:?} {offset:#x}");
        }
        // Where it was there is nothing now.
        let old = Registers { rdi: at(9 * PAGE), ..Registers::default() };
        vcpu.prepare(&guest, ring, &MOV_RAX, old);
        match vcpu.pager.run(&mut vcpu.fd) {
            Ok(Exit::Kvm(VcpuExit::MmioRead(address, data))) => {
                assert_eq!(address, at(9 * PAGE), "{ring:?}");
                data.fill(7);
            }
            other => panic!("{ring:?}: {other:?}"),
        }
        vcpu.finish();
        assert_eq!(guest.source.asked(), 2, "{ring:?}");
        let host = guest.region.kvm_view().range().start();
        assert_eq!(slots.guest_address(host), Some(GuestAddress::new(new_base)));
        assert_eq!(slots.guest_address(HostAddress::new(0)), None);
    }
}
