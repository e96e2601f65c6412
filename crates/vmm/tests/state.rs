//! Machines that are saved, and go on in others.

mod common;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_dirty::DirtySet;
use pageferry_memory::PageSize;
use pageferry_vmm::{
    Behaviour, End, Machine, Operation, Order, Payload, Ring, Setup, Vm, VmConfig, VmError,
    WriteTracking,
    state::{MachineState, PlatformPart, StateError, VcpuPart},
};

/// Memory for each vCPU to have hundreds of pages.
const MEMORY: u64 = 6 << 20;

/// Copies all memory of one machine into the other's, and declares it present there.
fn copy_memory(from: &Vm, to: &Vm) {
    let (from, to) = (from.layout(), to.layout());
    for ((_, from), (_, to)) in from.iter().zip(to.iter()) {
        assert_eq!((from.guest_base(), from.len()), (to.guest_base(), to.len()));
        let into = to.fill_view().unwrap_or(to.guest_view());
        let mut bytes = vec![0; from.len() as usize];
        from.guest_view().read_at(0, &mut bytes).unwrap();
        into.write_at(0, &bytes).unwrap();
        to.page_map().set_present(to.all_granules());
    }
}

/// Another machine that is to take the state.
fn another(state: &MachineState, setup: Setup) -> Arc<Vm> {
    let mut config = VmConfig::of_state(state).unwrap();
    config.setup = setup;
    Arc::new(Vm::new(config).unwrap())
}

/// Pauses the machine, has another take its state and memory, and has that go on.
fn hand_over(machine: Machine, setup: Setup) -> Machine {
    machine.vm().pause();
    let bytes = machine.vm().save().unwrap().encode();
    let touches = machine.vm().touches();
    let state = MachineState::decode(&bytes).unwrap();
    let next = Machine::new(another(&state, setup), None);
    next.vm().restore(&state).unwrap();
    copy_memory(machine.vm(), next.vm());
    assert_eq!(next.vm().touches(), touches);
    // It has not gone on meanwhile.
    assert_eq!(machine.vm().touches(), touches);
    next.start().unwrap();
    next
}

#[test]
fn a_machine_goes_on_in_another_fifty_times_whatever_it_does() {
    if !kvm() {
        return;
    }
    let _watch = watch(300);
    for behaviour in Behaviour::ALL {
        for vcpus in [1, 2, 5, 8] {
            let mut config = VmConfig::new(vcpus, MEMORY);
            config.payload = behaviour.into();
            if behaviour == Behaviour::Idle {
                // Some pages in the time of a test.
                config.payload.rate = Some(4 << 20);
            }
            let mut machine = started(config);
            for setup in Setup::ALL.into_iter().cycle().take(13) {
                wait_for_progress(machine.vm());
                machine = hand_over(machine, setup);
            }
            wait_for_progress(machine.vm());
            stop_and_check(&machine);
        }
    }
}

#[test]
fn rings_and_finite_payloads_go_on_as_well() {
    if !kvm() {
        return;
    }
    let _watch = watch(120);
    for (order, operation, ring) in payloads() {
        let mut config =
            config(order, operation, ring, pageferry_vmm::Share::Own, 3, pages(ring) << 12);
        config.payload.rounds = if operation == Operation::ReadVerify { 4 } else { 1 };
        let mut machine = started(config);
        // At whatever moment, also after some or all have ended.
        for setup in Setup::ALL {
            machine = hand_over(machine, setup);
        }
        let report = machine.wait().unwrap();
        assert!(report.is_good(), "{order:?} {operation:?} {ring:?}: {report}");
        let verified = machine.vm().verify(false).unwrap();
        assert_eq!(verified.mismatches, 0, "{order:?} {operation:?} {ring:?}: {verified:?}");
    }
}

/// But for what time does to it.
fn without_time(state: &MachineState) -> Vec<(usize, VcpuPart, Vec<u8>)> {
    let parts = state.vcpus.iter().enumerate().flat_map(|(number, vcpu)| {
        vcpu.parts().map(move |(part, bytes)| {
            let mut bytes = bytes.to_vec();
            if part == VcpuPart::Xsave {
                // XSTATE_BV: a processor may take what is as it is at first for in use, or not.
                bytes[512..520].fill(0);
            }
            (number, part, bytes)
        })
    });
    parts.filter(|(_, part, _)| *part != VcpuPart::Tsc).collect()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn what_is_restored_is_what_was_saved() {
    if !kvm() {
        return;
    }
    let mut config = VmConfig::new(3, MEMORY);
    config.payload = Behaviour::RandomWrite { rate: None }.into();
    let machine = started(config);
    wait_for_progress(machine.vm());
    machine.vm().pause();
    let first = machine.vm().save().unwrap();
    let next = another(&first, Setup::Minor);
    next.restore(&first).unwrap();
    let second = next.save().unwrap();
    let (saved, again) = (without_time(&first), without_time(&second));
    assert_eq!(saved.len(), again.len());
    for ((vcpu, part, before), (_, _, after)) in saved.iter().zip(&again) {
        let differ = before.iter().zip(after).position(|(before, after)| before != after);
        assert_eq!(differ, None, "{part} of vCPU {vcpu}: {before:?}, {after:?}");
        assert_eq!(before.len(), after.len(), "{part} of vCPU {vcpu}");
    }
    assert_eq!(first.devices, second.devices);
    // The clocks have gone on, and not by what the host has been up.
    let clock = |state: &MachineState| word(state.platform.part(PlatformPart::Clock).unwrap(), 0);
    let passed = clock(&second).checked_sub(clock(&first)).expect("the clock has jumped back");
    assert!(passed < 60_000_000_000, "{passed} ns");
    let tsc = |state: &MachineState, vcpu: usize| {
        let bytes = state.vcpus[vcpu].part(VcpuPart::Tsc).unwrap();
        (word(bytes, 0) as u32, word(bytes, 8), word(bytes, 16))
    };
    for vcpu in 0..3 {
        let ((khz, before, _), (_, after, _)) = (tsc(&first, vcpu), tsc(&second, vcpu));
        let passed = after.checked_sub(before).expect("a counter has jumped back");
        assert!(passed < 60_000 * u64::from(khz), "{passed} ticks of {khz} kHz");
        let distance = |state| tsc(state, vcpu).2.wrapping_sub(tsc(state, 0).2);
        assert_eq!(distance(&first), distance(&second), "{vcpu}");
    }
    // The first machine goes on as if nothing had been.
    machine.vm().resume();
    wait_for_progress(machine.vm());
    stop_and_check(&machine);
}

#[test]
fn what_is_not_this_machines_is_refused() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let mut config = VmConfig::new(2, MEMORY);
    config.payload = Behaviour::RandomRead.into();
    let machine = started(config.clone());
    let unstarted = Vm::new(config.clone()).unwrap();
    assert!(matches!(unstarted.save(), Err(VmError::NotStarted)));
    let state = machine.vm().save().unwrap();
    assert!(matches!(machine.vm().restore(&state), Err(VmError::Running)));
    assert!(matches!(machine.start(), Err(VmError::Running)));

    let refused = |state: &MachineState| match another(state, Setup::Minor).restore(state) {
        Err(VmError::State(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let mut other = config.clone();
    other.payload.seed += 1;
    let other = Vm::new(other).unwrap();
    let error = other.restore(&state).unwrap_err();
    assert!(matches!(error, VmError::State(StateError::OtherMachine { .. })), "{error}");
    let changed = |change: &dyn Fn(&mut MachineState)| {
        let mut state = state.clone();
        change(&mut state);
        state
    };
    let error = refused(&changed(&|state| drop(state.vcpus.pop())));
    assert!(error.contains("1 vCPUs, not 2"), "{error}");
    let error = refused(&changed(&|state| {
        state.devices.push(pageferry_vmm::state::DeviceBlob {
            name: "net".to_owned(),
            ..Default::default()
        });
    }));
    assert!(error.contains("a device net"), "{error}");
    let error = refused(&changed(&|state| drop(state.devices.pop())));
    assert!(error.contains("no device boot-memory"), "{error}");
    let error = refused(&changed(&|state| state.devices[1].version = 9));
    assert!(error.contains("boot-memory: version 9"), "{error}");
    let error = refused(&changed(&|state| state.devices[1].bytes.truncate(5000)));
    assert!(error.contains("5000 bytes are no pages"), "{error}");
    let error = refused(&changed(&|state| state.devices[1].bytes[..4].fill(0xff)));
    assert!(error.contains("out of order"), "{error}");
    for bytes in [0, 127, 129] {
        let state = changed(&|state| state.devices[0].bytes.resize(bytes, 0));
        assert!(VmConfig::of_state(&state).is_err(), "{bytes}");
    }
    for at in 0..16 {
        let state = changed(&|state| state.devices[0].bytes[8 * at..8 * at + 8].fill(0xfe));
        // Whatever it is now: no machine, or another.
        assert!(VmConfig::of_state(&state).is_err() || other.restore(&state).is_err(), "{at}");
    }
    stop_and_check(&machine);
}

#[test]
fn what_the_host_lacks_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let mut config = VmConfig::new(1, MEMORY);
    config.payload = Behaviour::RandomRead.into();
    let machine = started(config);
    let bytes = machine.vm().save().unwrap().encode();
    // Found in the encoding, whose digest is made anew by decoding what is valid otherwise.
    let change = |name: &[u8], change: &dyn Fn(&mut [u8])| {
        let mut bytes = bytes.clone();
        let mut wanted = [0; 24];
        wanted[..name.len()].copy_from_slice(name);
        let at = bytes.windows(24).position(|window| window == wanted).unwrap();
        let len = u32::from_le_bytes(bytes[at + 28..at + 32].try_into().unwrap()) as usize;
        change(&mut bytes[at + 32..at + 32 + len]);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..32]).update(&bytes[64..]);
        bytes[32..64].copy_from_slice(hasher.finalize().as_bytes());
        let state = MachineState::decode(&bytes).unwrap();
        match another(&state, Setup::Minor).restore(&state) {
            Err(VmError::State(error)) => error,
            other => panic!("{}: {other:?}", name.escape_ascii()),
        }
    };
    // A feature that nobody has: all of them.
    let error = change(b"cpuid", &|entries| {
        for entry in entries.chunks_exact_mut(40).filter(|entry| entry[..4] == [7, 0, 0, 0]) {
            entry[12..28].fill(0xff);
        }
    });
    assert!(matches!(error, StateError::Feature { leaf: 7, .. }), "{error}");
    // A register that nobody has.
    let error =
        change(b"msrs", &|entries| entries[..4].copy_from_slice(&0xdead_beef_u32.to_le_bytes()));
    assert!(
        matches!(error, StateError::Register { index: 0xdead_beef, here: None, .. }),
        "{error}"
    );
    // Protected mode without protection: KVM says no.
    let error = change(b"sregs2", &|bytes| bytes.fill(0xff));
    assert!(matches!(error, StateError::Refused { part: "sregs2", .. }), "{error}");
    let error = change(b"tsc", &|bytes| bytes[..4].copy_from_slice(&1_u32.to_le_bytes()));
    assert!(matches!(error, StateError::TscFrequency { wanted: 1, .. }), "{error}");
    stop_and_check(&machine);
}

/// Copies what is dirty, round by round while the guest writes, and the rest when it is paused.
#[test]
fn every_way_of_tracking_loses_no_write() {
    if !kvm() {
        return;
    }
    let _watch = watch(120);
    for how in WriteTracking::ALL {
        if how == WriteTracking::Protection && !userfaultfd() {
            continue;
        }
        for setup in Setup::ALL {
            let mut config = VmConfig::new(2, MEMORY);
            config.setup = setup;
            config.payload = Behaviour::RandomWrite { rate: Some(200_000_000) }.into();
            config.dirty_ring = (how == WriteTracking::Ring).then_some(1 << 16);
            let machine = started(config);
            let vm = machine.vm();
            let mut tracker = match vm.tracker(how) {
                Ok(tracker) => tracker,
                Err(error) => panic!("{how} on {setup}: {error}"),
            };
            tracker.arm(&vm.tracked()).unwrap();
            let dirty = DirtySet::new(&vm.tracked()).unwrap();
            // What has to be copied at first is all of it.
            let state = vm.save().unwrap();
            let next = another(&state, setup);
            copy_memory(vm, &next);
            for round in 0..8 {
                wait_for_progress(vm);
                if round == 7 {
                    vm.pause();
                }
                tracker.harvest(&dirty).unwrap();
                let runs = dirty.take();
                assert!(round == 7 || !runs.is_empty(), "{how} on {setup}: nothing was written");
                for run in runs {
                    copy_run(vm, &next, run);
                }
            }
            let state = vm.save().unwrap();
            tracker.disarm().unwrap();
            next.restore(&state).unwrap();
            let verified = next.verify(false).unwrap();
            assert_eq!(verified.mismatches, 0, "{how} on {setup}: {verified:?}");
            let next = Machine::new(next, None);
            next.start().unwrap();
            wait_for_progress(next.vm());
            stop_and_check(&next);
        }
    }
}

fn copy_run(from: &Vm, to: &Vm, run: pageferry_memory::HostRange) {
    let (from, to) = (from.layout(), to.layout());
    for ((_, from), (_, to)) in from.iter().zip(to.iter()) {
        let Some(part) = from.kvm_view().range().intersection(run) else { continue };
        let offset = part.start().get() - from.kvm_view().range().start().get();
        let mut bytes = vec![0; part.len() as usize];
        from.guest_view().read_at(offset, &mut bytes).unwrap();
        to.fill_view().unwrap_or(to.guest_view()).write_at(offset, &bytes).unwrap();
    }
}

#[test]
fn a_vcpu_that_waits_for_memory_in_an_instruction_is_not_saved() {
    if !can_page() {
        return;
    }
    let _watch = watch(60);
    for ring in Ring::ALL {
        let case = Case {
            delivery: pageferry_paging::Delivery::Exit,
            setup: Setup::Minor,
            page_size: SMALL,
        };
        let mut config = VmConfig::new(1, 64 << 12);
        config.payload = Behaviour::LinearWrite { rate: None }.into();
        config.payload.ring = ring;
        let held = pageferry_vmm::PatternOptions { held: true, ..Default::default() };
        let paged = Paged::new(case, config, held);
        let report = thread::scope(|scope| {
            let run = scope.spawn(|| paged.run(&pageferry_vmm::RunOptions::default()));
            wait_for("a page to be wanted", || paged.source.requests() > 0);
            paged.vm.pause();
            // It depends on the host whether KVM emulates what the guest does.
            match paged.vm.save() {
                Err(VmError::MidInstruction { vcpu: 0 }) => {}
                Ok(state) => {
                    let next = another(&state, Setup::Minor);
                    next.restore(&state).unwrap();
                }
                Err(error) => panic!("{error}"),
            }
            paged.source.release().unwrap();
            let saved = loop {
                paged.vm.resume();
                // Until it is in no such instruction at a pause.
                wait_for_progress(&paged.vm);
                paged.vm.pause();
                match paged.vm.save() {
                    Ok(saved) => break saved,
                    Err(VmError::MidInstruction { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            };
            let next = another(&saved, Setup::Minor);
            next.restore(&saved).unwrap();
            paged.vm.stop();
            run.join().unwrap()
        });
        assert_eq!(
            (&report.vcpus[0].end, report.mismatches()),
            (&End::Stopped, 0),
            "{ring:?}: {report}"
        );
        paged.check_contents(false);
    }
}

#[test]
fn a_rate_is_kept_and_a_throttle_felt() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let rate = 20 << 20;
    let mut config = VmConfig::new(2, MEMORY);
    config.payload = Behaviour::LinearWrite { rate: Some(rate) }.into();
    let machine = started(config.clone());
    let total = |machine: &Machine| machine.vm().touches().iter().sum::<u64>();
    let begun = Instant::now();
    wait_for("some megabytes", || total(&machine) > 2000);
    let bytes = total(&machine) * 4096;
    let allowed = rate as f64 * (begun.elapsed().as_secs_f64() + 0.3);
    assert!((bytes as f64) < allowed, "{bytes} bytes in {:?}", begun.elapsed());
    stop_and_check(&machine);

    config.payload.rate = None;
    let machine = started(config);
    let in_a_while = || {
        let before = total(&machine);
        thread::sleep(Duration::from_millis(300));
        total(&machine) - before
    };
    let mut most = [0, 0];
    // The best of some, on a host that does other things.
    for _ in 0..3 {
        for (most, percent) in most.iter_mut().zip([0, 90]) {
            machine.vm().throttle(percent);
            *most = in_a_while().max(*most);
        }
    }
    assert!(most[1] > 0 && most[1] < most[0] / 2, "{most:?}");
    // A pause does not wait for a rest to end, nor a stop.
    machine.vm().throttle(99);
    for _ in 0..20 {
        machine.vm().pause();
        machine.vm().resume();
    }
    machine.vm().throttle(0);
    wait_for_progress(machine.vm());
    stop_and_check(&machine);
}

#[test]
fn a_machine_is_made_from_a_state_whatever_its_pages() {
    if !kvm() {
        return;
    }
    let _huge = HugePages::reserve(8);
    for page_size in [PageSize::SIZE_4K, PageSize::SIZE_2M] {
        let mut config = VmConfig::new(2, 6 << 20);
        config.page_size = page_size;
        config.payload =
            Payload { order: Order::Random, rate: Some(1 << 30), ..Payload::default() };
        let machine = Machine::new(
            Arc::new(match Vm::new(config) {
                Ok(vm) => vm,
                Err(error) => {
                    println!("skipped: needs 2 MiB huge pages: {error}");
                    continue;
                }
            }),
            None,
        );
        machine.vm().fill().unwrap();
        machine.start().unwrap();
        let state = machine.vm().save().unwrap();
        machine.wait().unwrap();
        let layout = machine.vm().layout();
        let config = VmConfig::of_state(&state).unwrap();
        let is = |config: &VmConfig| (config.vcpus, config.memory, config.page_size);
        // 3 MiB are no whole huge pages: the split tells.
        assert_eq!(is(&config), is(machine.vm().config()));
        let regions = layout.iter().map(|(_, region)| Arc::clone(region)).collect();
        let same = Vm::with_regions(config.clone(), regions).unwrap();
        same.restore(&state).unwrap();
        let mut other = config;
        other.memory *= 2;
        let regions = layout.iter().map(|(_, region)| Arc::clone(region)).collect();
        assert!(matches!(Vm::with_regions(other, regions), Err(VmError::Config { .. })));
    }
}
