//! Instructions that KVM emulates, on memory that is missing. A host that emulates ring 0 shows
//! them as KVM_EXIT_MMIO; on any other the same programs run natively, and have to come out the
//! same.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::sync::{Arc, Mutex};

use common::*;
use kvm_bindings::kvm_regs;
use pageferry_kvm::{VcpuStats, VmPagerOptions};
use pageferry_memory::GuestAddress;

fn guest() -> Guest {
    Guest::new(Config { len: 512 * PAGE, ..Config::default() })
}

/// Says so if the host made none of the exits that the test is about.
fn saw(what: &str, count: u64) {
    if count == 0 {
        println!("skipped: needs a host that emulates ring 0 ({what})");
    }
}

impl Guest {
    /// The eight bytes from this offset on, `word` having been written at another one.
    fn peek_expected(&self, offset: u64, at: u64, word: u64) -> Vec<u8> {
        let mut bytes = Self::contents(offset, 8);
        for (n, byte) in word.to_le_bytes().into_iter().enumerate() {
            if let Some(into) = (at + n as u64).checked_sub(offset).filter(|into| *into < 8) {
                bytes[into as usize] = byte;
            }
        }
        bytes
    }
}

fn value(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Offsets in pages that nobody has touched: the beginning, the end, odd ones, and every way to lie
/// across a boundary.
fn offsets(len: u64) -> Vec<u64> {
    let across = (1..len).map(|before| PAGE - before);
    let inside = [0, 1, 2, 4, 8, 12, 100, 2047, PAGE - len];
    inside.into_iter().chain(across).enumerate().map(|(n, at)| 2 * n as u64 * PAGE + at).collect()
}

#[test]
fn reads_of_every_size() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    // mov al, ax, eax, rax from [rdi]
    let sizes: [(u64, &[u8]); 4] = [
        (1, &[0x8a, 0x07]),
        (2, &[0x66, 0x8b, 0x07]),
        (4, &[0x8b, 0x07]),
        (8, &[0x48, 0x8b, 0x07]),
    ];
    let mut reads = 0;
    for (len, code) in sizes {
        let guest = guest();
        let mut vcpu = guest.vcpu(0);
        for offset in offsets(len) {
            let registers = Registers { rdi: at(offset), ..Registers::default() };
            let rax = vcpu.execute(&guest, Ring::Zero, code, registers).rax;
            let expected = value(&Guest::contents(offset, len as usize));
            assert_eq!(rax, expected, "{len} bytes at {offset:#x}");
        }
        let stats = vcpu.pager.stats();
        assert_eq!(stats.mmio_writes, 0, "{stats:?}");
        reads += stats.mmio_reads;
    }
    saw("reads", reads);
}

#[test]
fn writes_of_every_size() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let pattern = 0x8877_6655_4433_2211_u64;
    // mov [rdi], al, ax, eax, rax
    let sizes: [(u64, &[u8]); 4] = [
        (1, &[0x88, 0x07]),
        (2, &[0x66, 0x89, 0x07]),
        (4, &[0x89, 0x07]),
        (8, &[0x48, 0x89, 0x07]),
    ];
    let mut writes = 0;
    for (len, code) in sizes {
        let told = Arc::new(Mutex::new(Vec::new()));
        let listener = Arc::clone(&told);
        let options = VmPagerOptions {
            guest_page_tables_resident: true,
            on_write: Some(Arc::new(move |guest: GuestAddress, len| {
                listener.lock().unwrap().push((guest.get(), len));
            })),
            ..VmPagerOptions::default()
        };
        let guest = Guest::new(Config { len: 512 * PAGE, options, ..Config::default() });
        let mut vcpu = guest.vcpu(0);
        for offset in offsets(len) {
            let registers = Registers { rdi: at(offset), rax: pattern, ..Registers::default() };
            vcpu.execute(&guest, Ring::Zero, code, registers);
            // What was written, and not a byte more, on either side.
            let mut expected = Guest::contents(offset & !7, 24);
            let into = (offset & 7) as usize;
            expected[into..into + len as usize]
                .copy_from_slice(&pattern.to_le_bytes()[..len as usize]);
            // All of the pages have to be there to be looked at.
            for end in [offset & !7, (offset & !7) + 16] {
                vcpu.read(&guest, Ring::Zero, end);
            }
            assert_eq!(guest.peek(offset & !7, 24), expected, "{len} bytes at {offset:#x}");
        }
        let stats = vcpu.pager.stats();
        writes += stats.mmio_writes;
        // Every write by our hand is told, and none else.
        let told = told.lock().unwrap();
        assert_eq!(told.len() as u64, stats.mmio_writes);
        let mut bytes: u64 = 0;
        for (guest, len) in told.iter() {
            assert!(*guest >= BASE && (1..=8).contains(len), "{guest:#x} {len}");
            bytes += len;
        }
        assert!(bytes <= offsets(len).len() as u64 * len);
    }
    saw("writes", writes);
}

/// A program, its registers, and what has to be in registers and memory afterwards.
fn run(guest: &Guest, code: &[u8], registers: Registers) -> (kvm_regs, VcpuStats) {
    let mut vcpu = guest.vcpu(0);
    let result = vcpu.execute(guest, Ring::Zero, code, registers);
    (result, vcpu.pager.stats())
}

#[test]
fn several_in_a_row() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let guest = guest();
    let (from, to, len) = (3 * PAGE - 20, 9 * PAGE - 13, 2 * PAGE + 40);
    let registers = Registers { rsi: at(from), rdi: at(to), rcx: len, ..Registers::default() };
    // rep movsb
    let (result, stats) = run(&guest, &[0xf3, 0xa4], registers);
    assert_eq!(result.rcx, 0);
    assert_eq!(guest.peek(to, len as usize), Guest::contents(from, len as usize));
    assert_eq!(guest.peek(to - 8, 8), Guest::contents(to - 8, 8));
    assert_eq!(guest.peek(to + len, 8), Guest::contents(to + len, 8));
    saw("reads and writes", stats.mmio_reads.min(stats.mmio_writes));
}

/// Copies between a device and memory that is missing are emulated on every host, in ring 3, too.
#[test]
fn copies_from_and_to_a_device() {
    use kvm_ioctls::VcpuExit;
    use pageferry_kvm::Exit;
    if !exits() {
        return;
    }
    let _watch = watch(30);
    const DEVICE: u64 = 0x1000_0000;
    const VALUE: u64 = 0x8877_6655_4433_2211;
    for ring in [Ring::Three, Ring::Zero] {
        let guest = guest();
        let mut vcpu = guest.vcpu(0);
        for (n, offset) in offsets(8).into_iter().enumerate() {
            // From the device: movsq. Where it is missing, and again where it is there.
            for again in 0..2 {
                let registers = Registers { rsi: DEVICE, rdi: at(offset), ..Registers::default() };
                vcpu.prepare(&guest, ring, &[0x48, 0xa5], registers);
                match vcpu.pager.run(&mut vcpu.fd) {
                    Ok(Exit::Kvm(VcpuExit::MmioRead(DEVICE, data))) => {
                        data.copy_from_slice(&(VALUE + again).to_le_bytes());
                    }
                    other => panic!("{ring:?} {offset:#x}: {other:?}"),
                }
                let registers = vcpu.finish();
                assert_eq!(registers.rdi, at(offset) + 8);
                let written = value(&guest.peek(offset, 8));
                assert_eq!(written, VALUE + again, "{ring:?} {offset:#x} {again}");
            }
            // To the device, from pages of which every other has not been touched yet.
            let from = (offset + PAGE).min(512 * PAGE - 8);
            let expected = value(&guest.peek_expected(from, offset, VALUE + 1));
            let registers = Registers { rsi: at(from), rdi: DEVICE, ..Registers::default() };
            vcpu.prepare(&guest, ring, &[0x48, 0xa5], registers);
            match vcpu.pager.run(&mut vcpu.fd) {
                Ok(Exit::Kvm(VcpuExit::MmioWrite(DEVICE, data))) => {
                    assert_eq!(value(data), expected, "{ring:?} {n} {from:#x}");
                }
                other => panic!("{ring:?} {from:#x}: {other:?}"),
            }
            vcpu.finish();
        }
        let stats = vcpu.pager.stats();
        assert!(stats.mmio_writes + stats.poison > 0, "{ring:?}: {stats:?}");
        println!("{ring:?}: {} reads, {} writes", stats.mmio_reads, stats.mmio_writes);
    }
}

#[test]
fn read_modify_write() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    // add, lock add, lock xadd, xchg, lock cmpxchg of what is there (rax) against rcx; all [rdi]
    let expected = |offset| Guest::expected(offset);
    type Case = (&'static str, &'static [u8], fn(u64, u64) -> u64);
    let cases: [Case; 5] = [
        ("add", &[0x48, 0x01, 0x0f], |old, rcx| old.wrapping_add(rcx)),
        ("lock add", &[0xf0, 0x48, 0x01, 0x0f], |old, rcx| old.wrapping_add(rcx)),
        ("lock xadd", &[0xf0, 0x48, 0x0f, 0xc1, 0x0f], |old, rcx| old.wrapping_add(rcx)),
        ("xchg", &[0x48, 0x87, 0x0f], |_, rcx| rcx),
        ("lock cmpxchg", &[0xf0, 0x48, 0x0f, 0xb1, 0x0f], |_, rcx| rcx),
    ];
    for (name, code, after) in cases {
        for offset in [8, 5 * PAGE - 8] {
            let guest = guest();
            let (old, rcx) = (expected(offset), 0x1111_2222_3333_4444);
            let registers = Registers { rdi: at(offset), rcx, rax: old, ..Registers::default() };
            run(&guest, code, registers);
            let new = value(&guest.peek(offset, 8));
            assert_eq!(new, after(old, rcx), "{name} at {offset:#x}");
        }
    }
}

#[test]
fn stacks_too() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let guest = guest();
    // mov rsp, rdi; push rax; push rcx; pop rsi; call +0; pop rdi
    let code = [0x48, 0x89, 0xfc, 0x50, 0x51, 0x5e, 0xe8, 0, 0, 0, 0, 0x5f];
    let registers =
        Registers { rdi: at(7 * PAGE), rax: 0xaaaa, rcx: 0xcccc, ..Registers::default() };
    let (result, _) = run(&guest, &code, registers);
    assert_eq!((result.rsi, result.rdi), (0xcccc, CODE + 11));
    assert_eq!(value(&guest.peek(7 * PAGE - 8, 8)), 0xaaaa);
}

/// Code that is missing, in one page and across two, in both rings.
#[test]
fn instructions() {
    if !exits() {
        return;
    }
    let _watch = watch(30);
    // The program is the same at the end of every page, and goes over to the next with its
    // ten-byte instruction: mov rax, 0x1122334455667788; out DONE, al; jmp to itself
    const PROGRAM: [u8; 14] =
        [0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xe6, DONE as u8, 0xeb, 0xfe];
    const BEFORE: u64 = 5;
    fn contents(_: pageferry_memory::RegionId, offset: u64, bytes: &mut [u8]) {
        for (n, byte) in bytes.iter_mut().enumerate() {
            let into = (offset + n as u64 + BEFORE) % PAGE;
            *byte = PROGRAM.get(into as usize).copied().unwrap_or(0x0b);
        }
    }
    let mut fetches = 0;
    for ring in [Ring::Zero, Ring::Three] {
        let source = Source { contents, ..Source::default() };
        let guest = Guest::new(Config { source, ..Config::default() });
        let mut vcpu = guest.vcpu(0);
        for page in [3, 10, 11, 30] {
            vcpu.enter(ring, at(page * PAGE - BEFORE), Registers::default());
            assert_eq!(vcpu.finish().rax, 0x1122_3344_5566_7788, "{ring:?} page {page}");
        }
        assert_eq!(guest.source.asked(), 7, "9 and 11 are each two pages' neighbour, once");
        fetches += vcpu.pager.stats().fetches;
    }
    saw("instruction fetches", fetches);
}

/// An instruction that KVM cannot emulate for another reason is the embedder's, once.
#[test]
fn what_cannot_be_emulated_is_not_tried_for_ever() {
    use kvm_ioctls::VcpuExit;
    use pageferry_kvm::Exit;
    if !exits() {
        return;
    }
    let _watch = watch(30);
    fn contents(_: pageferry_memory::RegionId, _: u64, bytes: &mut [u8]) {
        // vaddps zmm0, zmm0, zmm0, which no emulator knows
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc0, 0x90, 0x90]);
        }
    }
    let source = Source { contents, ..Source::default() };
    let guest = Guest::new(Config { source, ..Config::default() });
    let mut vcpu = guest.vcpu(0);
    vcpu.enter(Ring::Zero, at(0), Registers::default());
    match vcpu.pager.run(&mut vcpu.fd) {
        Ok(Exit::Kvm(VcpuExit::InternalError)) => {}
        // Where it runs natively: no such instruction, or no handler that returns.
        Ok(Exit::Kvm(VcpuExit::IoOut(VECTOR, &[vector]))) => assert!(vector == 6 || vector == 7),
        other => panic!("{other:?}"),
    }
}

/// A device's registers and holes stay the embedder's, between and beyond the memory.
#[test]
fn what_is_no_memory_is_a_device() {
    use kvm_ioctls::VcpuExit;
    use pageferry_kvm::Exit;
    if !exits() {
        return;
    }
    let _watch = watch(30);
    let guest = Guest::new(Config { len: 2 * PAGE, ..Config::default() });
    let mut vcpu = guest.vcpu(0);
    for offset in [2 * PAGE, 0x1000_0000] {
        let registers = Registers { rdi: at(offset), ..Registers::default() };
        vcpu.prepare(&guest, Ring::Zero, &[0x48, 0x8b, 0x07], registers);
        match vcpu.pager.run(&mut vcpu.fd) {
            Ok(Exit::Kvm(VcpuExit::MmioRead(address, data))) => {
                assert_eq!((address, data.len()), (at(offset), 8));
                data.copy_from_slice(&77_u64.to_le_bytes());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(vcpu.finish().rax, 77);
    }
    assert_eq!((guest.source.asked(), vcpu.pager.stats().exits()), (0, 0));
}
