//! Writes of real guests, as KVM's dirty log and dirty rings report them.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::collections::BTreeSet;

use common::{tracker::*, *};
use kvm_ioctls::VcpuExit;
use pageferry_kvm::{
    Exit, KvmError, VmPagerOptions,
    dirty::{DirtyLog, LogMode, RingSize, TrackedSlot, WriteMarks, on_write},
};
use pageferry_memory::GuestAddress;

fn write(guest: &Guest, vcpu: &mut Vcpu, page: u64, value: u64) {
    let registers = Registers { rdi: at(page * PAGE + 8), rax: value, ..Registers::default() };
    vcpu.execute(guest, Ring::Three, &MOV_TO, registers);
}

/// What is written is told, and nothing else but what a vCPU touches for the first time: neither what it
/// reads, nor what arrives; again after each harvest, and not when tracking is over.
#[test]
fn each_write_is_told_once() {
    let _watch = watch(60);
    for method in METHODS {
        for delivery in deliveries() {
            let case = format!("{method:?} {delivery}");
            let config = Config { delivery, ..Config::default() };
            let Some((guest, mut vcpus, mut tracker)) = tracked(method, config, 1, None) else {
                continue;
            };
            let vcpu = &mut vcpus[0];
            assert!(matches!(tracker.harvest(&mut |_, _| {}), Err(KvmError::NotArmed)), "{case}");
            // Before it is armed: not told.
            write(&guest, vcpu, 50, 1);
            for page in 40..48 {
                vcpu.read(&guest, Ring::Three, page * PAGE);
            }
            tracker.arm().unwrap();
            tracker.arm().unwrap();
            let all: BTreeSet<u64> = (0..PAGES).collect();
            let first = tracker.pages();
            if method == Method::Log(LogMode::InitiallySet) {
                assert_eq!(first, all, "{case}");
            } else {
                assert_eq!(first, BTreeSet::new(), "{case}");
            }
            for round in 1..=3 {
                let written: BTreeSet<u64> = [0, 3, 4, 5, 50, 63, 20 + round].into();
                for (n, &page) in written.iter().enumerate() {
                    write(&guest, vcpu, page, round << 8 | n as u64);
                    vcpu.read(&guest, Ring::Three, (40 + n as u64) * PAGE);
                }
                // Somebody else looks at it; it arrives, and no vCPU has touched it.
                let elsewhere = guest.region.guest_view().range().skip((30 + round) * PAGE).start();
                assert!(guest.pager().resolve(elsewhere));
                // A new one is mapped for writing, though it is read.
                vcpu.read(&guest, Ring::Three, (10 + round) * PAGE);
                let mut told = tracker.pages();
                told.remove(&(10 + round));
                assert_eq!(told, written, "{case} {round}");
                assert_eq!(tracker.pages(), BTreeSet::new(), "{case} {round}");
                for (n, &page) in written.iter().enumerate() {
                    let word =
                        u64::from_le_bytes(guest.peek(page * PAGE + 8, 8).try_into().unwrap());
                    assert_eq!(word, round << 8 | n as u64, "{case} {round} {page}");
                }
            }
            write(&guest, vcpu, 9, 1);
            tracker.disarm().unwrap();
            let gone = guest.vm.get_dirty_log(0, (PAGES * PAGE) as usize);
            assert!(gone.is_err(), "{case}: the slot still has a log");
            write(&guest, vcpu, 10, 1);
        }
    }
}

/// Writes to each of these pages, one after the other.
const FILL: [u8; 15] = [
    0x48, 0x89, 0x07, // next: mov [rdi], rax
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, PAGE
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf1, // jnz next
];

/// Nobody harvests, and the ring is too small: it is emptied by the pager, with memory missing and with
/// all of it there, or by the embedder, and every page is told in the end.
#[test]
fn a_full_ring_is_emptied() {
    let Some(&delivery) = deliveries().first() else { return };
    let _watch = watch(60);
    // More than twice as many as the smallest ring of any processor has entries.
    const PAGES: u64 = 4096;
    for (handled, present) in [(true, false), (true, true), (false, false), (false, true)] {
        let case = format!("handled {handled} present {present}");
        let config = Config { len: PAGES * PAGE, delivery, ..Config::default() };
        let Some((guest, mut vcpus, mut tracker)) = tracked(Method::Ring(0), config, 1, None)
        else {
            return;
        };
        let vcpu = &mut vcpus[0];
        let registers = Registers { rdi: at(0), rcx: PAGES, rax: 7, ..Registers::default() };
        if present {
            vcpu.execute(&guest, Ring::Three, &FILL, registers);
            wait_for("the pager to be complete", || guest.pager().remaining() == 0);
        }
        let Tracker::Ring(ring) = &mut tracker else { unreachable!() };
        ring.arm().unwrap();
        let collector = ring.collector();
        vcpu.prepare(&guest, Ring::Three, &FILL, registers);
        let mut full = 0;
        if handled {
            guest.vm_pager.collect_full_rings(Some(collector));
            vcpu.finish();
            full = vcpu.pager.stats().rings_full;
            guest.vm_pager.collect_full_rings(None);
        } else {
            loop {
                match vcpu.pager.run(&mut vcpu.fd) {
                    Ok(Exit::Kvm(VcpuExit::Unsupported(RING_FULL))) => full += 1,
                    Ok(Exit::Kvm(VcpuExit::IoOut(DONE, _))) => break,
                    other => panic!("{case}: {other:?}"),
                }
                // Once more without having emptied it: it stays full.
                match vcpu.pager.run(&mut vcpu.fd) {
                    Ok(Exit::Kvm(VcpuExit::Unsupported(RING_FULL))) => {}
                    other => panic!("{case}: {other:?}"),
                }
                collector.collect().unwrap();
            }
            assert_eq!(vcpu.pager.stats().rings_full, 0, "{case}");
        }
        assert!(full >= 2, "{case}: the ring was full {full} times");
        assert_eq!(tracker.pages(), (0..PAGES).collect(), "{case}");
        assert_eq!(guest.source.asked(), PAGES, "{case}");
    }
}

/// What others write is in the same harvest, if it is marked: a device's writes, and those that the
/// pager makes for an emulated instruction.
#[test]
fn marks_are_merged() {
    let Some(&delivery) = deliveries().first() else { return };
    let _watch = watch(60);
    for method in METHODS {
        let marks = WriteMarks::new(PAGES * PAGE);
        let options = VmPagerOptions {
            guest_page_tables_resident: true,
            on_write: Some(on_write([(GuestAddress::new(BASE), marks.clone())])),
            ..VmPagerOptions::default()
        };
        let config = Config { options, delivery, ..Config::default() };
        let Some((guest, mut vcpus, mut tracker)) = tracked(method, config, 1, Some(marks.clone()))
        else {
            continue;
        };
        let vcpu = &mut vcpus[0];
        marks.mark(60 * PAGE, 1);
        tracker.arm().unwrap();
        tracker.pages();
        // A device, a vCPU in ring 3, and one in ring 0, each where nothing is yet.
        marks.mark(7 * PAGE - 1, 2);
        write(&guest, vcpu, 7, 1);
        let registers = Registers { rdi: at(10 * PAGE - 4), rax: 1, ..Registers::default() };
        vcpu.execute(&guest, Ring::Zero, &MOV_TO, registers);
        let registers = Registers { rdi: at(20 * PAGE), ..Registers::default() };
        vcpu.execute(&guest, Ring::Zero, &MOV_RAX, registers);
        let mut told = tracker.pages();
        if vcpu.pager.stats().mmio_writes == 0 {
            println!("skipped: needs a host that emulates ring 0 (writes made by the pager)");
            // It has been mapped for writing.
            told.remove(&20);
        }
        assert_eq!(told, [6, 7, 9, 10].into(), "{method:?}");
        assert_eq!(tracker.pages(), BTreeSet::new(), "{method:?}");
    }
}

/// The last word of the log, whose bits are more than the slot has pages, and of a clear that ends
/// there; several slots.
#[test]
fn slots_of_odd_lengths() {
    let Some(&delivery) = deliveries().first() else { return };
    let _watch = watch(30);
    for mode in [LogMode::Automatic, LogMode::Manual, LogMode::InitiallySet] {
        let guest = Guest::new(Config { len: 67 * PAGE, delivery, ..Config::default() });
        let other = pageferry_memory::Mapping::anonymous(3 * PAGE).unwrap();
        // SAFETY: it is removed before the mapping goes.
        unsafe { guest.vm.set_user_memory_region(memslot(7, 0x2000_0000, &other)) }.unwrap();
        let slots = vec![
            TrackedSlot::new(7, GuestAddress::new(0x2000_0000), other.range()),
            TrackedSlot::new(0, GuestAddress::new(BASE), guest.region.kvm_view().range()),
        ];
        // SAFETY: they are as they have just been set.
        let mut log = match unsafe { DirtyLog::new(&guest.vm, slots, mode) } {
            Ok(log) => log,
            Err(KvmError::NoLogMode { .. }) => {
                println!("skipped: needs a dirty log in mode {mode:?}");
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        log.set_chunk(1);
        log.arm().unwrap();
        let mut vcpu = guest.vcpu(0);
        let harvest = |log: &mut DirtyLog| {
            let mut told = Vec::new();
            log.harvest(&mut |slot, run| told.push((slot, run.first().get(), run.count())))
                .unwrap();
            told
        };
        let first = harvest(&mut log);
        if mode == LogMode::InitiallySet {
            assert_eq!(first, [(7, 0, 3), (0, 0, 67)]);
        } else {
            assert_eq!(first, []);
        }
        for page in [66, 63, 64, 0] {
            write(&guest, &mut vcpu, page, 1);
        }
        let registers = Registers { rdi: 0x2000_2000, ..Registers::default() };
        vcpu.execute(&guest, Ring::Three, &MOV_TO, registers);
        let expected = [(7, 2, 1), (0, 0, 1), (0, 63, 2), (0, 66, 1)];
        assert_eq!(harvest(&mut log), expected, "{mode:?}");
        assert_eq!(harvest(&mut log), [], "{mode:?}");
        log.disarm().unwrap();
        let mut removed = memslot(7, 0x2000_0000, &other);
        removed.memory_size = 0;
        // SAFETY: it takes memory away.
        unsafe { guest.vm.set_user_memory_region(removed) }.unwrap();
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let Some(&delivery) = deliveries().first() else { return };
    let _watch = watch(30);
    let guest = Guest::new(Config { delivery, ..Config::default() });
    let range = guest.region.kvm_view().range();
    let slot = || TrackedSlot::new(0, GuestAddress::new(BASE), range);
    let log = |slots| {
        // SAFETY: those that are described wrongly are refused.
        unsafe { DirtyLog::new(&guest.vm, slots, LogMode::Automatic) }
    };
    assert!(matches!(log(vec![slot(), slot()]), Err(KvmError::SlotTwice { slot: 0 })));
    let few = slot().marked(WriteMarks::new((PAGES - 1) * PAGE));
    assert!(matches!(log(vec![few]), Err(KvmError::TooFewMarks { marks: 63, .. })));
    // A slot that is not so: the first is not tracked either.
    let wrong = TrackedSlot::new(100, GuestAddress::new(0), range.take(PAGE));
    let mut both = log(vec![slot(), wrong]).unwrap();
    match both.arm() {
        Err(KvmError::DirtyTracking { slot: 100, what, .. }) => {
            assert_eq!(what, "KVM_SET_USER_MEMORY_REGION");
        }
        other => panic!("{other:?}"),
    }
    assert!(guest.vm.get_dirty_log(0, (PAGES * PAGE) as usize).is_err());
    assert!(matches!(both.harvest(&mut |_, _| {}), Err(KvmError::NotArmed)));
    // Dropped while armed, it is disarmed.
    let mut armed = log(vec![slot()]).unwrap();
    armed.arm().unwrap();
    assert!(guest.vm.get_dirty_log(0, (PAGES * PAGE) as usize).is_ok());
    drop(armed);
    assert!(guest.vm.get_dirty_log(0, (PAGES * PAGE) as usize).is_err());

    for bytes in [0, 1, 4095, 3 << 12, 1 << 30] {
        match RingSize::enable(&guest.vm, bytes) {
            Err(KvmError::NoDirtyRing { bytes: told, why }) => {
                assert!(told == bytes && !why.is_empty(), "{bytes}: {why}");
            }
            other => panic!("{bytes}: {other:?}"),
        }
    }
    let Ok(_) = enable_smallest(&guest) else {
        println!("skipped: needs dirty rings");
        return;
    };
    // A machine with rings has no log.
    let mut none = log(vec![slot()]).unwrap();
    match none.arm() {
        Err(KvmError::DirtyTracking { slot: 0, what, .. }) => {
            assert_eq!(what, "KVM_GET_DIRTY_LOG");
        }
        other => panic!("{other:?}"),
    }
    // Nor can it have rings when it has vCPUs.
    let late = Guest::new(Config { delivery, ..Config::default() });
    let _vcpu = late.vcpu(0);
    assert!(matches!(enable_smallest(&late), Err(KvmError::NoDirtyRing { .. })));
}

#[cfg(feature = "vm-memory")]
#[test]
fn a_vmms_memory_marks_by_itself() {
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

    let address = |address| vm_memory::GuestAddress(address);
    let ranges = [(address(0), 8 * PAGE as usize), (address(BASE), 4 * PAGE as usize)];
    let memory = GuestMemoryMmap::<WriteMarks>::from_ranges(&ranges).unwrap();
    memory.write_obj(5_u64, address(3 * PAGE - 4)).unwrap();
    memory.write_slice(&[1; 4097], address(BASE + PAGE)).unwrap();
    memory.read_obj::<u64>(address(0)).unwrap();
    let marked: Vec<Vec<u64>> = memory
        .iter()
        .map(|region| {
            let marks: WriteMarks = region.bitmap();
            (0..region.len() / PAGE).filter(|page| marks.is_marked(page * PAGE)).collect()
        })
        .collect();
    assert_eq!(marked, [vec![2, 3], vec![1, 2]]);
}
