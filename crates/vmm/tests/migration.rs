//! Machines that are moved to another, as two processes do it, but within one.

mod common;

use std::sync::Arc;

use common::*;
use pageferry_migrate::{
    DestinationGuest, DestinationMigration, DeviceState, Endpoint, GuestError, MigrateOptions,
    Mode, Outcome, ReceiveOptions, SourceGuest, SourceMigration, core::RegionInfo,
};
use pageferry_paging::Delivery;
use pageferry_vmm::{
    Arrival, Behaviour, End, Machine, MachineDestination, MachineSource, Setup, VmConfig,
    WriteTracking,
};
use tempfile::TempDir;

const MEMORY: u64 = 8 << 20;

fn running(behaviour: Behaviour, setup: Setup, dirty_ring: Option<u32>) -> Arc<Machine> {
    let mut config = VmConfig::new(2, MEMORY);
    (config.payload, config.setup, config.dirty_ring) = (behaviour.into(), setup, dirty_ring);
    Arc::new(started(config))
}

/// Begins to move a machine over a Unix socket, which is in a directory.
fn begin(
    source: &Arc<MachineSource>,
    destination: &Arc<MachineDestination>,
    mode: Mode,
) -> (SourceMigration, DestinationMigration, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(directory.path().join("socket"));
    let listening = ReceiveOptions::default();
    let receiving =
        DestinationMigration::listen(Arc::clone(destination) as _, &endpoint, listening).unwrap();
    let mut options = MigrateOptions::default();
    options.mode = mode;
    let sending = SourceMigration::start(Arc::clone(source) as _, endpoint, options).unwrap();
    (sending, receiving, directory)
}

/// Moves a machine, and waits until it has got on there.
fn moved(machine: Arc<Machine>, how: WriteTracking, arrival: Arrival, mode: Mode) -> Arc<Machine> {
    let name = format!("{mode:?}, tracked by {how}, {arrival:?}");
    let destination = Arc::new(MachineDestination::new(arrival));
    let source = Arc::new(MachineSource::new(machine, how));
    let (sending, receiving, _directory) = begin(&source, &destination, mode);
    let outcome = sending.wait().unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(outcome, Outcome::Completed, "{name}");
    receiving.wait().unwrap_or_else(|error| panic!("{name}: {error}"));
    let report = source.take_report().unwrap().unwrap();
    assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped), "{name}: {report}");
    assert_eq!(report.mismatches(), 0, "{name}: {report}");
    let there = destination.machine().unwrap();
    wait_for_progress(there.vm());
    assert!(!source.machine().is_running());
    // What was before is counted on.
    let before: u64 = source.machine().vm().touches().iter().sum();
    assert!(there.vm().touches().iter().sum::<u64>() > before, "{name}");
    there
}

fn arrival(setup: Setup) -> Arrival {
    Arrival { setup, dirty_ring: None, ..Arrival::default() }
}

#[test]
fn a_machine_moves_by_pre_copy_whatever_it_does() {
    if !kvm() {
        return;
    }
    let _watch = watch(120);
    let rate = Some(50_000_000);
    let behaviours = [
        Behaviour::Idle,
        Behaviour::RandomRead,
        Behaviour::RandomWrite { rate },
        Behaviour::LinearWrite { rate },
    ];
    for (behaviour, setup) in behaviours.into_iter().zip(Setup::ALL) {
        let mut machine = running(behaviour, setup, None);
        // There, and back.
        for to in [Setup::Minor, setup] {
            machine = moved(machine, WriteTracking::Log, arrival(to), Mode::PreCopy);
        }
        stop_and_check(&machine);
    }
}

#[test]
fn a_machine_moves_in_every_mode_whatever_tracks_its_writes() {
    if !can_page() {
        return;
    }
    let _watch = watch(240);
    for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
        for how in WriteTracking::ALL {
            for setup in Setup::ALL {
                let ring = (how == WriteTracking::Ring).then_some(1 << 16);
                let behaviour = Behaviour::RandomWrite { rate: Some(50_000_000) };
                let machine = running(behaviour, setup, ring);
                let machine = moved(machine, how, arrival(setup), mode);
                stop_and_check(&machine);
            }
        }
    }
}

#[test]
fn what_is_absent_arrives_by_exit_too() {
    if !can_page() {
        return;
    }
    let _watch = watch(60);
    let machine = running(Behaviour::LinearWrite { rate: None }, Setup::Missing, None);
    let arrival = Arrival { delivery: Some(Delivery::Exit), ..arrival(Setup::MinorOwnView) };
    let machine = moved(machine, WriteTracking::Log, arrival, Mode::PostCopy);
    stop_and_check(&machine);
}

#[test]
fn pages_may_be_of_another_size_there() {
    if !can_page() {
        return;
    }
    let _watch = watch(60);
    let Some(_huge) = HugePages::reserve(4) else { return };
    let machine = running(Behaviour::RandomWrite { rate: Some(50_000_000) }, Setup::Minor, None);
    let arrival = Arrival { page_size: HUGE, ..arrival(Setup::Minor) };
    let machine = moved(machine, WriteTracking::Log, arrival, Mode::Hybrid);
    stop_and_check(&machine);
}

#[test]
fn what_cannot_be_taken_is_refused_and_the_machine_goes_on() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let machine = running(Behaviour::LinearWrite { rate: None }, Setup::Minor, None);
    let source = Arc::new(MachineSource::new(Arc::clone(&machine), WriteTracking::Log));
    // No ring has this size, which is found out when the machine is made: after its memory has
    // come.
    let odd = Arrival { dirty_ring: Some(1000), ..Arrival::default() };
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let destination = Arc::new(MachineDestination::new(odd.clone()));
        let (sending, receiving, _directory) = begin(&source, &destination, mode);
        let error = sending.wait().unwrap_err().to_string();
        assert!(receiving.wait().is_err(), "{mode:?}");
        assert!(destination.machine().is_none());
        println!("{mode:?}: {error}");
        wait_for_progress(machine.vm());
    }
    // And it can still move.
    let machine = moved(machine, WriteTracking::Log, Arrival::default(), Mode::PreCopy);
    stop_and_check(&machine);
}

#[test]
fn states_of_others_and_too_much_memory_are_refused_by_name() {
    if !kvm() {
        return;
    }
    let destination = MachineDestination::new(Arrival::default());
    let region = |length| RegionInfo {
        id: 0,
        flags: 0,
        guest_base: 1 << 30,
        length,
        granule: 4096,
        page_size: 4096,
    };
    let error = destination.prepare(&[region(1 << 60)]).unwrap_err();
    assert!(matches!(error, GuestError::Memory { bytes, .. } if bytes == 1 << 60), "{error}");
    let error = destination.prepare(&[region(1 << 63), region(1 << 63)]).unwrap_err();
    assert!(matches!(error, GuestError::Failed { .. }), "{error}");
    destination.prepare(&[region(MEMORY)]).unwrap();
    let machine = running(Behaviour::Idle, Setup::Minor, None);
    let state = MachineSource::new(machine, WriteTracking::Log).save().unwrap();
    let refused = |state: DeviceState| match destination.restore(&state) {
        Err(GuestError::State { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    let why = refused(DeviceState { name: "another".to_owned(), ..state.clone() });
    assert!(why.contains("known here is"), "{why}");
    let why = refused(DeviceState { version: 99, ..state.clone() });
    assert!(why.contains("known here is"), "{why}");
    let why = refused(DeviceState { bytes: state.bytes[..1000].to_vec(), ..state.clone() });
    assert!(why.contains("should have"), "{why}");
    // It has two regions, not one.
    let why = refused(state);
    assert!(why.contains("that should be at"), "{why}");
    assert!(destination.run(None).is_err(), "there is no machine");
}
