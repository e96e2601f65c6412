//! Memory that KVM cannot use: KVM_RUN ends with EFAULT, with an address (KVM_EXIT_MEMORY_FAULT) or
//! without.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::{
    os::fd::{FromRawFd, OwnedFd},
    thread,
};

use common::*;
use kvm_bindings::{KVM_MEM_GUEST_MEMFD, kvm_create_guest_memfd, kvm_userspace_memory_region2};
use kvm_ioctls::VcpuExit;
use pageferry_kvm::{Exit, RunError};
use pageferry_memory::{HostRange, Mapping};

/// A slot of the embedder's own, far from the paged memory.
const OTHER: u64 = 0x2000_0000;

const MOV_RAX: [u8; 3] = [0x48, 0x8b, 0x07]; // mov rax, [rdi]
const MOV_TO: [u8; 3] = [0x48, 0x89, 0x07]; // mov [rdi], rax

fn protect(range: HostRange, protection: i32) {
    let (start, len) = (range.start().as_ptr(), range.len() as usize);
    // SAFETY: nobody but the guest uses the range while it is protected.
    assert_eq!(unsafe { libc::mprotect(start.cast(), len, protection) }, 0);
}

/// An access that is not allowed, of the embedder's memory and of paged memory that has come: KVM
/// says no more than EFAULT, which is passed on, each time; and the guest goes on when the embedder
/// has mended it.
#[test]
fn an_error_without_an_address_is_the_embedders() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for paged in [false, true] {
        for (ring, code) in [
            (Ring::Three, MOV_RAX),
            (Ring::Three, MOV_TO),
            (Ring::Zero, MOV_RAX),
            (Ring::Zero, MOV_TO),
        ] {
            let case = format!("paged {paged} {ring:?} {code:x?}");
            // Before the machine, which lets go of it first.
            let other = Mapping::anonymous(4 * PAGE).unwrap();
            let guest = Guest::new(Config::default());
            // SAFETY: the mapping lives as long as the machine.
            unsafe { guest.vm.set_user_memory_region(memslot(7, OTHER, &other)) }.unwrap();
            let mut vcpu = guest.vcpu(0);
            vcpu.read(&guest, Ring::Three, 3 * PAGE);
            let (address, page) = if paged {
                (at(3 * PAGE), guest.region.kvm_view().range().skip(3 * PAGE).take(PAGE))
            } else {
                (OTHER + PAGE, other.range().skip(PAGE).take(PAGE))
            };
            protect(page, libc::PROT_NONE);
            let registers = Registers { rdi: address, rax: 9, ..Registers::default() };
            vcpu.prepare(&guest, ring, &code, registers);
            let before = vcpu.pager.stats();
            for round in 0..3 {
                match vcpu.pager.run(&mut vcpu.fd) {
                    Err(RunError::Kvm(error)) => {
                        assert_eq!(error.errno(), libc::EFAULT, "{case} {round}");
                    }
                    // Newer kernels may say where.
                    Ok(Exit::Kvm(VcpuExit::MemoryFault { gpa, .. })) => {
                        assert_eq!(gpa & !(PAGE - 1), address, "{case} {round}");
                    }
                    // Where ring 0 is emulated it is an access to a device, and for paged memory one
                    // that is made by hand, which the protection of KVM's view does not concern.
                    Ok(Exit::Kvm(VcpuExit::MmioRead(at, _) | VcpuExit::MmioWrite(at, _)))
                        if ring == Ring::Zero && !paged =>
                    {
                        assert_eq!(at, address, "{case} {round}");
                        break;
                    }
                    Ok(Exit::Kvm(VcpuExit::IoOut(DONE, _))) if ring == Ring::Zero && paged => {
                        let stats = vcpu.pager.stats();
                        assert_eq!(stats.mmio_reads + stats.mmio_writes, 1, "{case} {round}");
                        break;
                    }
                    other => panic!("{case} {round}: {other:?}"),
                }
                assert_eq!(vcpu.pager.stats(), before, "{case} {round}");
            }
            protect(page, libc::PROT_READ | libc::PROT_WRITE);
            vcpu.execute(&guest, ring, &code, registers);
            assert_eq!(guest.source.asked(), 1, "{case}");
        }
    }
}

/// A slot whose guest_memfd is gone: the one way to KVM_EXIT_MEMORY_FAULT that ordinary machines have
/// on kernels that are released. `None`, and says so, if the host does not have it.
fn dead_slot(guest: &Guest, slot: u32, address: u64, len: u64) -> Option<()> {
    const SHARED: u64 = 1 | 2; // GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED (Linux 6.18)
    let request = kvm_create_guest_memfd { size: len, flags: SHARED, ..Default::default() };
    let Ok(fd) = guest.vm.create_guest_memfd(request) else {
        println!("skipped: needs guest_memfd for ordinary machines, which say where they fail");
        return None;
    };
    // SAFETY: it has just been made, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let spare = Mapping::anonymous(len).unwrap();
    let region = kvm_userspace_memory_region2 {
        slot,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: address,
        memory_size: len,
        userspace_addr: spare.range().start().get(),
        guest_memfd: std::os::fd::AsRawFd::as_raw_fd(&fd) as u32,
        ..Default::default()
    };
    // SAFETY: a slot with a guest_memfd is used through that one only.
    unsafe { guest.vm.set_user_memory_region2(region) }.unwrap();
    Some(())
}

fn remove_slot(guest: &Guest, slot: u32, address: u64) {
    let removed = kvm_bindings::kvm_userspace_memory_region {
        slot,
        guest_phys_addr: address,
        ..Default::default()
    };
    // SAFETY: it takes memory away.
    unsafe { guest.vm.set_user_memory_region(removed) }.unwrap();
}

/// KVM says where: outside of the paged memory it is the embedder's, untouched.
#[test]
fn an_exit_with_an_address_in_no_region_is_the_embedders() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let guest = Guest::new(Config::default());
    if dead_slot(&guest, 7, OTHER, 4 * PAGE).is_none() {
        return;
    }
    let mut vcpu = guest.vcpu(0);
    let registers = Registers { rdi: OTHER + PAGE + 8, ..Registers::default() };
    vcpu.prepare(&guest, Ring::Three, &MOV_RAX, registers);
    for round in 0..3 {
        match vcpu.pager.run(&mut vcpu.fd) {
            Ok(Exit::Kvm(VcpuExit::MemoryFault { gpa, size, .. })) => {
                assert_eq!((gpa, size), (OTHER + PAGE, PAGE), "{round}");
            }
            other => panic!("{round}: {other:?}"),
        }
    }
    assert_eq!((guest.source.asked(), vcpu.pager.stats().exits()), (0, 0));
}

/// KVM says where, and it is paged memory that is absent: it is brought like for any other exit, and
/// the guest goes on. What fails once more although it is there is the embedder's.
#[test]
fn an_exit_with_an_address_of_ours_is_a_fault() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    for mended in [true, false] {
        let source = if mended { Source::holding() } else { Source::default() };
        let guest = Guest::new(Config { source, ..Config::default() });
        remove_slot(&guest, 0, BASE);
        if dead_slot(&guest, 0, BASE, PAGES * PAGE).is_none() {
            return;
        }
        let mut vcpu = guest.vcpu(0);
        let registers = Registers { rdi: at(3 * PAGE + 8), ..Registers::default() };
        vcpu.prepare(&guest, Ring::Three, &MOV_RAX, registers);
        if mended {
            thread::scope(|scope| {
                scope.spawn(|| {
                    wait_for("the vCPU to ask", || guest.source.asked() > 0);
                    remove_slot(&guest, 0, BASE);
                    let slot = memslot(0, BASE, guest.region.kvm_view());
                    // SAFETY: the region lives as long as the machine.
                    unsafe { guest.vm.set_user_memory_region(slot) }.unwrap();
                    guest.source.release();
                });
                assert_eq!(vcpu.finish().rax, Guest::expected(3 * PAGE + 8));
            });
        } else {
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::Kvm(VcpuExit::MemoryFault { gpa, size, .. })) => {
                    assert_eq!((gpa, size), (at(3 * PAGE), PAGE));
                }
                other => panic!("{other:?}"),
            }
        }
        let stats = vcpu.pager.stats();
        assert_eq!((guest.source.asked(), stats.memory_faults), (1, 1), "{stats:?}");
    }
}
