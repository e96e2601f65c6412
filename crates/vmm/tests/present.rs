//! All memory is there: the payloads alone, and what reaches them from outside.

mod common;

use std::{
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    thread,
    time::Duration,
};

use common::*;
use pageferry_memory::{GuestAddress, PageSize, RegionId};
use pageferry_vmm::{
    End, Mismatch, Operation, Order, Pattern, Ring, RunOptions, Share, Vm, VmConfig, VmError,
    WRITTEN, expected_word,
};

const QUIET: RunOptions<'static> = RunOptions { devices: 0, progress: None };

/// A machine whose memory is all there.
fn filled(config: VmConfig) -> Vm {
    let vm = Vm::new(config).unwrap();
    vm.fill().unwrap();
    vm
}

/// A guest that runs until it is stopped, for all practical purposes.
fn endless(vcpus: u16) -> VmConfig {
    let mut config = VmConfig::new(vcpus, 256 << 12);
    config.payload.rounds = u64::MAX;
    config
}

#[test]
fn every_payload_comes_to_its_end() {
    if !kvm() {
        return;
    }
    let _watch = watch(120);
    for (order, operation, ring) in payloads() {
        for share in [Share::Own, Share::All] {
            let mut config = config(order, operation, ring, share, 2, pages(ring) << 12);
            config.payload.pattern = Pattern { zero_every: 8 };
            let name = format!("{:?}", config.payload);
            let touches = if share == Share::All { 2 * pages(ring) } else { pages(ring) };
            let vm = filled(config);
            let report = vm.run(None, &QUIET).unwrap();
            assert!(report.is_good(), "{name}: {report}");
            assert_eq!(report.touches(), touches, "{name}");
            let verified = vm.verify(false).unwrap();
            assert_eq!(verified.mismatches, 0, "{name}: {verified:?}");
            assert_eq!(verified.words, pages(ring) * 512, "{name}");
            for vcpu in &report.vcpus {
                assert_eq!(vcpu.times.count, vcpu.touches, "{name}");
                assert!(vcpu.times.min <= vcpu.times.max, "{name}");
            }
        }
    }
}

#[test]
fn one_vcpu_to_the_most_there_can_be() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for vcpus in [1, 3, VmConfig::MAX_VCPUS] {
        let mut config = VmConfig::new(vcpus, 512 << 12);
        config.payload.operation = Operation::ReadModifyWrite;
        config.payload.order = Order::Random;
        let vm = filled(config);
        let report = vm.run(None, &QUIET).unwrap();
        assert!(report.is_good(), "{report}");
        assert_eq!(report.vcpus.len(), usize::from(vcpus));
        assert_eq!(report.touches(), 512);
        assert_eq!(vm.verify(false).unwrap().mismatches, 0);
    }
}

#[test]
fn units_may_be_larger_than_pages_and_rounds_repeated() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for operation in Operation::ALL {
        let mut config = VmConfig::new(2, 16 << 20);
        config.payload.unit = PageSize::SIZE_2M;
        config.payload.operation = operation;
        config.payload.rounds = 3;
        config.payload.units_per_vcpu = Some(2);
        let vm = filled(config);
        assert_eq!(vm.granules_touched(), 2 * 2 * 9);
        let report = vm.run(None, &QUIET).unwrap();
        assert!(report.is_good(), "{operation:?}: {report}");
        assert_eq!(report.touches(), 3 * 2 * 2);
        let verified = vm.verify(false).unwrap();
        assert_eq!((verified.mismatches, verified.granules), (0, 4096), "{operation:?}");
    }
}

/// What is wrong, what the guest says of it, and what the host finds afterwards.
#[test]
fn one_wrong_word_is_noticed() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let page = 17 << 12;
    // Offset in the page, whether the guest looks at it.
    for (offset, looks) in [(0, true), (512 * 5, true), (4088, true), (8, false)] {
        for operation in [Operation::ReadVerify, Operation::ReadModifyWrite] {
            let mut config = VmConfig::new(2, 256 << 12);
            config.payload.operation = operation;
            let vm = filled(config);
            let layout = vm.layout();
            let region = layout.get(RegionId::new(1)).unwrap();
            let address = region.guest_base().checked_add(page + offset).unwrap();
            let found = expected_word(address) ^ 1;
            region.guest_view().write_at(page + offset, &found.to_le_bytes()).unwrap();
            let report = vm.run(None, &QUIET).unwrap();
            let first =
                looks.then_some(Mismatch { address, found, expected: expected_word(address) });
            assert_eq!(report.is_good(), !looks, "{offset}");
            assert_eq!(report.mismatches(), u64::from(looks), "{offset}");
            assert_eq!(report.vcpus[1].first_mismatch, first, "{offset}");
            assert_eq!(report.vcpus[0].first_mismatch, None);
            let verified = vm.verify(false).unwrap();
            assert_eq!(verified.mismatches, 1, "{offset}");
            let host = verified.first.unwrap();
            assert_eq!((host.address, host.found), (address, found));
        }
    }
}

/// A write that is lost is noticed by the host.
#[test]
fn a_lost_write_is_noticed() {
    if !kvm() {
        return;
    }
    let mut config = VmConfig::new(1, 16 << 12);
    config.payload.operation = Operation::Write;
    let vm = filled(config);
    assert!(vm.run(None, &QUIET).unwrap().is_good());
    let layout = vm.layout();
    let region = layout.get(RegionId::new(0)).unwrap();
    let address = region.guest_base();
    region.guest_view().write_at(0, &expected_word(address).to_le_bytes()).unwrap();
    let first = vm.verify(false).unwrap().first.unwrap();
    assert_eq!(first.expected, expected_word(address) ^ WRITTEN);
}

#[test]
fn an_address_without_memory_is_reported() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for ring in Ring::ALL {
        let stray = GuestAddress::new(0xd000_0010);
        let mut config = VmConfig::new(2, 16 << 12);
        config.payload.ring = ring;
        config.payload.stray = Some(stray);
        let report = filled(config).run(None, &QUIET).unwrap();
        for vcpu in &report.vcpus {
            assert_eq!(vcpu.end, End::NoMemory { address: stray, write: false }, "{ring:?}");
            assert_eq!(vcpu.touches, 8);
        }
    }
}

/// An address that the guest's page tables do not map is the guest's own mistake.
#[test]
fn an_exception_is_reported() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for ring in Ring::ALL {
        let stray = 500 << 30;
        let mut config = VmConfig::new(1, 16 << 12);
        config.payload.ring = ring;
        config.payload.stray = Some(GuestAddress::new(stray));
        let report = filled(config).run(None, &QUIET).unwrap();
        let user = if ring == Ring::Three { 0b100 } else { 0 };
        let End::Exception { vector: 14, error_code, fault_address, .. } = report.vcpus[0].end
        else {
            panic!("{ring:?}: {report}")
        };
        assert_eq!((error_code, fault_address), (user, stray), "{ring:?}");
    }
}

#[test]
fn device_threads_see_what_vcpus_see() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    for operation in Operation::ALL {
        let mut config = VmConfig::new(2, 512 << 12);
        config.payload.operation = operation;
        let vm = filled(config);
        let report = vm.run(None, &RunOptions { devices: 2, ..RunOptions::default() }).unwrap();
        assert!(report.is_good(), "{report}");
        assert_eq!(report.devices.iter().map(|device| device.pages).sum::<u64>(), 2 * 512);
        assert_eq!(vm.verify(true).unwrap().mismatches, 0);
        assert_eq!(vm.verify(false).unwrap().mismatches, 512, "what the devices wrote");
    }
}

#[test]
fn nothing_runs_during_a_pause() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let mut config = endless(4);
    config.payload.progress_every = 1;
    let vm = filled(config);
    let touches = AtomicU64::new(0);
    let progress = |_, _| {
        touches.fetch_add(1, SeqCst);
    };
    thread::scope(|scope| {
        let options = RunOptions { progress: Some(&progress), ..RunOptions::default() };
        let run = scope.spawn(|| vm.run(None, &{ options }).unwrap());
        for _ in 0..20 {
            let before = touches.load(SeqCst);
            wait_for("progress", || touches.load(SeqCst) > before);
            vm.pause();
            let paused = touches.load(SeqCst);
            thread::sleep(Duration::from_millis(2));
            assert_eq!(touches.load(SeqCst), paused);
            vm.resume();
        }
        vm.stop();
        let report = run.join().unwrap();
        assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped), "{report}");
        assert_eq!(report.mismatches(), 0);
    });
}

#[test]
fn a_kick_interrupts_and_nothing_else() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let mut config = VmConfig::new(2, 256 << 12);
    config.payload.rounds = 20_000;
    let vm = filled(config);
    thread::scope(|scope| {
        let run = scope.spawn(|| vm.run(None, &QUIET).unwrap());
        while !run.is_finished() {
            vm.kick();
        }
        let report = run.join().unwrap();
        assert!(report.is_good(), "{report}");
        assert_eq!(report.touches(), 20_000 * 256);
        assert!(report.vcpus.iter().any(|vcpu| vcpu.kicks > 0), "{report}");
    });
}

#[test]
fn a_stop_is_for_one_run() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let vm = filled(VmConfig::new(2, 16 << 12));
    vm.stop();
    let report = vm.run(None, &QUIET).unwrap();
    assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped), "{report}");
    assert_eq!(report.touches(), 0);
    // The guest begins anew each time.
    for _ in 0..2 {
        let report = vm.run(None, &QUIET).unwrap();
        assert!(report.is_good(), "{report}");
        assert_eq!(report.touches(), 16);
    }
}

#[test]
fn it_runs_once_at_a_time() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let mut config = endless(1);
    config.payload.progress_every = 1;
    let vm = filled(config);
    let runs = AtomicU64::new(0);
    let progress = |_, _| runs.store(1, SeqCst);
    thread::scope(|scope| {
        let options = RunOptions { progress: Some(&progress), ..RunOptions::default() };
        scope.spawn(|| vm.run(None, &{ options }).unwrap());
        wait_for("the guest", || runs.load(SeqCst) == 1);
        assert!(matches!(vm.run(None, &QUIET), Err(VmError::Running)));
        vm.stop();
    });
}

#[test]
fn a_vcpu_whose_thread_panics_does_not_disturb_the_others() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let mut config = VmConfig::new(3, 48 << 12);
    config.payload.progress_every = 4;
    let vm = filled(config);
    let progress = |vcpu, touches| assert!(vcpu != 1 || touches < 8, "on purpose");
    let options = RunOptions { progress: Some(&progress), ..RunOptions::default() };
    let report = vm.run(None, &options).unwrap();
    assert_eq!(report.vcpus[1].end, End::Panicked("on purpose".to_owned()));
    assert_eq!(report.vcpus[1].touches, 8);
    for vcpu in [0, 2] {
        assert_eq!(report.vcpus[vcpu].end, End::Finished);
        assert_eq!(report.vcpus[vcpu].touches, 16);
    }
    assert!(!report.is_good());
    // Nobody is missed at a pause, and it can run again.
    vm.pause();
    vm.resume();
    assert!(vm.run(None, &QUIET).unwrap().is_good());
}

#[test]
fn a_memslot_moves_and_the_guest_finds_its_memory() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let vm = filled(VmConfig::new(2, 64 << 12));
    for (region, to) in [(0, 20), (1, 21), (0, 1), (1, 4)] {
        vm.move_slot(RegionId::new(region), GuestAddress::new(to << 30), None).unwrap();
        let report = vm.run(None, &QUIET).unwrap();
        assert!(report.is_good(), "{report}");
    }
    let odd = vm.move_slot(RegionId::new(0), GuestAddress::new(1 << 20), None);
    assert!(matches!(odd, Err(VmError::Move { .. })));
    assert!(matches!(vm.remove_slot(RegionId::new(2), None), Err(VmError::NoRegion(_))));
    vm.remove_slot(RegionId::new(0), None).unwrap();
    let report = vm.run(None, &QUIET).unwrap();
    let address = GuestAddress::new(1 << 30);
    assert_eq!(report.vcpus[0].end, End::NoMemory { address, write: false });
    assert_eq!(report.vcpus[1].end, End::Finished);
    vm.restore_slot(RegionId::new(0), None).unwrap();
    assert!(vm.run(None, &QUIET).unwrap().is_good());
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let good = || VmConfig::new(2, 16 << 12);
    let changed = |change: fn(&mut VmConfig)| {
        let mut config = good();
        change(&mut config);
        config
    };
    let bad = [
        changed(|config| config.vcpus = 0),
        changed(|config| config.vcpus = 65),
        changed(|config| config.vcpus = 17),
        changed(|config| config.memory = 0),
        changed(|config| config.memory = 4097),
        changed(|config| config.memory = 1 << 40),
        changed(|config| config.page_size = PageSize::SIZE_2M),
        changed(|config| config.page_size = PageSize::try_new(1 << 16).unwrap()),
        changed(|config| config.payload.unit = PageSize::SIZE_2M),
        changed(|config| config.payload.rounds = 0),
        changed(|config| config.payload.units_per_vcpu = Some(0)),
        changed(|config| config.payload.pattern.zero_every = 3),
    ];
    for config in bad {
        let error = Vm::new(config.clone()).unwrap_err();
        assert!(matches!(error, VmError::Config { .. }), "{config:?}: {error}");
    }
}
