//! KVM's dirty log and dirty ring as trackers like all others: host addresses, ranges that are armed
//! one by one, sets of dirty pages.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use std::sync::Arc;

use common::{load::*, tracker::*, *};
use kvm_ioctls::VmFd;
use pageferry_dirty::{self as dirty, DirtyError, DirtySet, Tracked, Tracker};
use pageferry_kvm::{
    KvmError, Place, Slot,
    dirty::{
        DirtyLog, DirtyRing, KvmTracker, LogMode, RingCollector, RingSize, TrackedSlot, WriteMarks,
    },
};
use pageferry_memory::{GuestAddress, HostRange, Mapping, PageSize, RegionId};

const METHODS: [Method; 4] = [
    Method::Log(LogMode::Automatic),
    Method::Log(LogMode::Manual),
    Method::Ring(0),
    Method::Ring(64 << 10),
];

/// A vCPU and the tracker of these slots, with what empties the ring; or says what is missing.
fn tracker(
    method: Method,
    machine: &Machine,
    slots: Vec<TrackedSlot>,
) -> Option<(Bare, Box<dyn Tracker>, Option<RingCollector>)> {
    let ring = match method {
        Method::Log(_) => None,
        Method::Ring(0) => Some(enable_smallest(machine)),
        Method::Ring(bytes) => Some(RingSize::enable(&machine.vm, bytes)),
    };
    let vcpu = |vm: &VmFd| Bare(vm.create_vcpu(0).unwrap());
    let made = match (method, ring) {
        (Method::Log(mode), _) => {
            // SAFETY: the caller has made the slots so.
            let log = unsafe { DirtyLog::new(&machine.vm, slots, mode) };
            log.map(|log| (vcpu(&machine.vm), KvmTracker::from(log), None))
        }
        (_, Some(Ok(size))) => {
            let vcpu = vcpu(&machine.vm);
            // SAFETY: as above; and it is the machine's only vCPU.
            let ring = unsafe { DirtyRing::new(&machine.vm, size, slots, [&vcpu.0]) };
            ring.map(|ring| {
                let collector = ring.collector();
                (vcpu, KvmTracker::from(ring), Some(collector))
            })
        }
        (_, Some(Err(error))) => Err(error),
        (_, None) => unreachable!(),
    };
    match made {
        Ok((vcpu, tracker, collector)) => Some((vcpu, Box::new(tracker), collector)),
        Err(error @ (KvmError::NoLogMode { .. } | KvmError::NoDirtyRing { .. })) => {
            println!("skipped: needs {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A part of what a guest's slot shows.
fn pages(view: &Mapping, first: u64, count: u64) -> HostRange {
    let part = view.range().skip(first * PAGE).take(count * PAGE);
    assert_eq!(part.len(), count * PAGE);
    part
}

fn base(view: &Mapping, first: u64, count: u64) -> Tracked {
    Tracked { range: pages(view, first, count), page: PageSize::SIZE_4K }
}

fn write(machine: &Machine, vcpu: &mut Bare, guest: u64) {
    let registers = Registers { rdi: guest, rax: 1, ..Registers::default() };
    vcpu.execute(machine, Ring::Three, &MOV_TO, registers);
}

fn harvest(tracker: &mut dyn Tracker, set: &DirtySet) -> Vec<HostRange> {
    let harvested = tracker.harvest(set).unwrap();
    assert_eq!((&harvested.whole, &harvested.gone), (&vec![], &vec![]));
    assert!(harvested.pages >= set.count());
    set.take()
}

fn has_log(machine: &Machine, slot: u32, view: &Mapping) -> bool {
    machine.vm.get_dirty_log(slot, view.range().len() as usize).is_ok()
}

/// Two slots, one of them in parts, one of them at two places.
#[test]
fn ranges_are_parts_of_slots() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for method in METHODS {
        let machine = Machine::new();
        let low = Mapping::anonymous(64 * PAGE).unwrap();
        let high = Mapping::anonymous(16 * PAGE).unwrap();
        let marks = WriteMarks::new(64 * PAGE);
        const HIGH: [u64; 2] = [0x2000_0000, 0x3000_0000];
        for (slot, guest, view) in [(5, BASE, &low), (1, HIGH[0], &high), (2, HIGH[1], &high)] {
            machine.show(slot, guest, view);
        }
        let slot = |number, guest, view: &Mapping| {
            TrackedSlot::new(number, GuestAddress::new(guest), view.range())
        };
        let slots = vec![
            slot(5, BASE, &low).marked(marks.clone()),
            slot(1, HIGH[0], &high),
            slot(2, HIGH[1], &high),
        ];
        let Some((mut vcpu, mut tracker, _)) = tracker(method, &machine, slots) else { continue };
        let expected = match method {
            Method::Log(_) => dirty::Method::KvmLog,
            Method::Ring(_) => dirty::Method::KvmRing,
        };
        assert_eq!(tracker.method(), expected);
        let none = DirtySet::new(&[]).unwrap();
        assert_eq!(harvest(&mut *tracker, &none), [], "{method:?}: nothing is armed");
        // So that each page has been touched.
        for page in 0..16 {
            write(&machine, &mut vcpu, BASE + page * PAGE);
        }
        let mut write = |guest| write(&machine, &mut vcpu, guest);

        // A part of one slot: nothing else is told, and the other slots are left alone.
        tracker.arm(&[base(&low, 4, 4)]).unwrap();
        assert_eq!(tracker.ranges(), [base(&low, 4, 4)]);
        if matches!(method, Method::Log(_)) {
            assert!(has_log(&machine, 5, &low) && !has_log(&machine, 1, &high));
        }
        let refused = tracker.harvest(&none).unwrap_err();
        assert!(matches!(refused, DirtyError::NotInSet { .. }), "{method:?}: {refused}");
        let all = [base(&low, 0, 64), base(&high, 0, 16)];
        let set = DirtySet::new(&all).unwrap();
        for page in [3, 4, 6, 7, 8] {
            write(BASE + page * PAGE);
        }
        // A device's.
        marks.mark(5 * PAGE, 8);
        marks.mark(12 * PAGE, 8);
        assert_eq!(harvest(&mut *tracker, &set), [pages(&low, 4, 4)], "{method:?}");
        assert_eq!(harvest(&mut *tracker, &set), [], "{method:?}");

        // More, beside what is armed, which keeps what was written to it.
        write(BASE + 5 * PAGE);
        write(HIGH[0] + 5 * PAGE);
        tracker.arm(&[base(&high, 0, 16), base(&low, 8, 2)]).unwrap();
        assert_eq!(tracker.ranges().len(), 3);
        for guest in [HIGH[0] + PAGE, HIGH[1] + 3 * PAGE, HIGH[1] + PAGE, BASE + 9 * PAGE] {
            write(guest);
        }
        let told = harvest(&mut *tracker, &set);
        for range in [pages(&low, 5, 1), pages(&low, 9, 1), pages(&high, 1, 1), pages(&high, 3, 1)]
        {
            assert!(told.contains(&range), "{method:?}: {range} of {told:?}");
        }
        assert_eq!(told.len(), 4, "{method:?}: {told:?}");

        let half = HostRange::new(low.range().start(), PAGE / 2);
        let outside = Mapping::anonymous(PAGE).unwrap();
        for (range, what) in [
            (base(&low, 9, 2), "overlaps"),
            (Tracked { range: half, ..all[0] }, "not a whole, positive number of pages"),
            (base(&low, 20, 0), "not a whole, positive number of pages"),
            (base(&outside, 0, 1), "not inside the memory"),
        ] {
            // Beside one that could be: it is not armed either.
            let error = tracker.arm(&[base(&low, 30, 1), range]).unwrap_err().to_string();
            assert!(error.contains(what), "{method:?}: {error}");
            assert_eq!(tracker.ranges().len(), 3);
        }

        // Again from the beginning: what was written meanwhile is not told.
        write(BASE + 4 * PAGE);
        tracker.disarm().unwrap();
        assert_eq!(tracker.ranges(), []);
        assert!(!has_log(&machine, 5, &low) && !has_log(&machine, 1, &high), "{method:?}");
        write(BASE + 4 * PAGE);
        marks.mark(6 * PAGE, 1);
        tracker.arm(&all).unwrap();
        assert_eq!(harvest(&mut *tracker, &set), [], "{method:?}");
        write(BASE + 5 * PAGE);
        assert_eq!(harvest(&mut *tracker, &set), [pages(&low, 5, 1)], "{method:?}");
        drop(tracker);
        assert!(!has_log(&machine, 5, &low), "{method:?}: the slot still has a log");
        for (slot, guest, view) in [(5, BASE, &low), (1, HIGH[0], &high), (2, HIGH[1], &high)] {
            let mut gone = memslot(slot, guest, view);
            gone.memory_size = 0;
            // SAFETY: it takes memory away.
            unsafe { machine.vm.set_user_memory_region(gone) }.unwrap();
        }
    }
}

/// A range over two slots whose memory is one mapping, as below and above a hole; in pages of 2 MiB,
/// of which a write to any part counts.
#[test]
fn ranges_reach_over_slots_and_pages_may_be_large() {
    const LARGE: u64 = 2 << 20;
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for method in METHODS {
        let machine = Machine::new();
        let memory = Mapping::anonymous(4 * LARGE).unwrap();
        let skipped =
            memory.range().start().get().next_multiple_of(LARGE) - memory.range().start().get();
        // Three, wherever the mapping is.
        let aligned = memory.range().skip(skipped).take(3 * LARGE);
        let (low, high) = (aligned.take(LARGE / 2), aligned.skip(LARGE / 2));
        const PLACES: [u64; 2] = [0x1000_0000, 0x2000_0000];
        let slots: Vec<TrackedSlot> = (0..)
            .zip(PLACES)
            .zip([low, high])
            .map(|((slot, guest), view)| TrackedSlot::new(slot, GuestAddress::new(guest), view))
            .collect();
        for slot in &slots {
            let region = kvm_bindings::kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.guest.get(),
                memory_size: slot.view.len(),
                userspace_addr: slot.view.start().get(),
            };
            // SAFETY: the mapping lives as long as the machine is used.
            unsafe { machine.vm.set_user_memory_region(region) }.unwrap();
        }
        let Some((mut vcpu, mut tracker, _)) = tracker(method, &machine, slots) else { continue };
        let page = PageSize::SIZE_2M;
        let ranges = [Tracked { range: aligned, page }];
        tracker.arm(&ranges).unwrap();
        let set = DirtySet::new(&ranges).unwrap();
        // The first and the third: by the second slot.
        write(&machine, &mut vcpu, PLACES[0] + 4 * PAGE);
        write(&machine, &mut vcpu, PLACES[1] + LARGE / 2 + LARGE + 77 * PAGE);
        let expected = [aligned.take(LARGE), aligned.skip(2 * LARGE)];
        assert_eq!(harvest(&mut *tracker, &set), expected, "{method:?}");
        write(&machine, &mut vcpu, PLACES[1] + 4 * PAGE);
        assert_eq!(harvest(&mut *tracker, &set), [aligned.take(LARGE)], "{method:?}: again");
    }
}

#[test]
fn a_pagers_slots_are_tracked() {
    let Some(&delivery) = deliveries().first() else { return };
    let _watch = watch(30);
    for setup in [Setup::Minor, Setup::MinorOwnView] {
        let guest = Guest::new(Config { setup, delivery, ..Config::default() });
        let slots = guest.vm_pager.slots();
        let view = Arc::clone(guest.region.kvm_view());
        let tracked = slots.tracked();
        assert_eq!(tracked.len(), 1);
        assert_eq!(
            (tracked[0].slot, tracked[0].guest.get(), tracked[0].view),
            (0, BASE, view.range())
        );
        // SAFETY: it is so.
        let log = unsafe { DirtyLog::new(&guest.vm, tracked, DirtyLog::mode_of(&guest.vm)) };
        let mut tracker: Box<dyn Tracker> = Box::new(KvmTracker::from(log.unwrap()));
        let ranges = [Tracked::base(view.range())];
        tracker.arm(&ranges).unwrap();
        let set = DirtySet::new(&ranges).unwrap();
        let mut vcpu = guest.vcpu(0);
        // It arrives, and is written.
        let registers = Registers { rdi: at(7 * PAGE), rax: 1, ..Registers::default() };
        vcpu.execute(&guest, Ring::Three, &MOV_TO, registers);
        let Place { host, .. } = slots.find(GuestAddress::new(at(7 * PAGE))).unwrap();
        assert_eq!(harvest(&mut *tracker, &set), [HostRange::new(host, PAGE)], "{setup:?}");
        // A part of the region elsewhere, read-only.
        let slot = Slot {
            guest: GuestAddress::new(0x2000_0000),
            len: 4 * PAGE,
            region: RegionId::new(0),
            offset: 8 * PAGE,
            read_only: true,
        };
        slots.set(9, slot).unwrap();
        let tracked = slots.tracked();
        assert_eq!(tracked[1].view, view.range().skip(8 * PAGE).take(4 * PAGE));
        assert!(tracked[1].read_only && !tracked[0].read_only && tracked[1].slot == 9);
    }
}

/// The transaction test: vCPUs write, and threads of the process that mark what they wrote.
#[test]
fn nothing_is_lost() {
    if !kvm() {
        return;
    }
    let _watch = watch(240);
    for method in METHODS {
        let machine = Machine::new();
        let memory = Mapping::anonymous(256 * PAGE).unwrap();
        machine.show(0, BASE, &memory);
        let marks = WriteMarks::new(256 * PAGE);
        let slot = TrackedSlot::new(0, GuestAddress::new(BASE), memory.range());
        let slots = vec![slot.marked(marks.clone())];
        let Some((mut vcpu, mut tracker, collector)) = tracker(method, &machine, slots) else {
            continue;
        };
        machine.load(&adding(256, 12));
        let adder: Adder<'_> = Box::new(move |rax| {
            let registers = Registers { rax, rcx: ADDITIONS, rdi: at(0), ..Registers::default() };
            enter(&vcpu.0, Ring::Three, CODE, registers);
            vcpu.finish(&mut || collector.as_ref().expect("a ring").collect().unwrap());
            vcpu.0.get_regs().unwrap().rax
        });
        let load = Load {
            case: format!("{method:?}"),
            ranges: vec![Tracked::base(memory.range())],
            memory: &memory,
            marks: Some(marks),
            first: &|_| 0,
            present: &|_| true,
        };
        load.nothing_is_lost(&mut *tracker, vec![adder]);
    }
}
