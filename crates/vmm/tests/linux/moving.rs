//! Machines that are moved by the protocol; what needs no kernel of it.

use std::{sync::Arc, time::Duration};

use pageferry_migrate::{
    DestinationGuest, DestinationMigration, DeviceState, Endpoint, GuestError, MigrateOptions,
    Mode, Outcome, ReceiveOptions, SourceGuest, SourceMigration, core::RegionInfo,
};
use pageferry_testing::{fill_pattern, userfaultfd};
use pageferry_vmm::linux::{
    ConsoleOut, LinuxConfig, LinuxDestination, LinuxEnd, LinuxSource, LinuxVm,
};

use crate::{machine::Memory, refusals::idle};

/// Moves a machine over a Unix socket, until all of it is there. How it was stopped is the caller's to
/// look at.
pub fn migrated(
    vm: &Arc<LinuxVm>,
    config: &LinuxConfig,
    console: ConsoleOut,
    mode: Mode,
) -> Arc<LinuxVm> {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix(directory.path().join("socket"));
    let destination = Arc::new(LinuxDestination::new(config.clone(), console));
    let guest = Arc::clone(&destination) as Arc<dyn DestinationGuest>;
    let receiving = DestinationMigration::listen(guest, &endpoint, ReceiveOptions::default());
    let receiving = receiving.unwrap();
    let source = Arc::new(LinuxSource::new(Arc::clone(vm)));
    let mut options = MigrateOptions::default();
    options.mode = mode;
    let sending = SourceMigration::start(source, endpoint, options).unwrap();
    assert_eq!(sending.wait().unwrap(), Outcome::Completed);
    receiving.wait().unwrap();
    destination.vm().unwrap()
}

/// One that stands still, with a pattern in its memory.
fn standing() -> Option<Arc<LinuxVm>> {
    let vm = idle(2)?;
    vm.restore(&vm.save().unwrap()).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for (id, region) in vm.layout().iter() {
        // The rest is zeros.
        fill_pattern(id, 0, &mut bytes);
        region.guest_view().write_at(region.len() / 2, &bytes).unwrap();
        region.page_map().set_present(region.all_granules());
    }
    assert_eq!(vm.input(b"typed"), 5);
    vm.pause();
    vm.start(None).unwrap();
    Some(Arc::new(vm))
}

#[test]
fn a_machine_that_stands_still_moves() {
    if !userfaultfd() {
        return;
    }
    for mode in [Mode::PreCopy, Mode::PostCopy, Mode::Hybrid] {
        let Some(vm) = standing() else { return };
        let devices = vm.save().unwrap().devices;
        let config = LinuxConfig::new("/nowhere", LinuxConfig::MIN_MEMORY);
        let there = migrated(&vm, &config, Box::new(std::io::sink()), mode);
        assert_eq!(vm.wait(Duration::ZERO), Some(LinuxEnd::Stopped), "{mode:?}");
        // There it runs, and finds nothing that could be run.
        there.stop();
        assert_eq!(Memory(vm).first_difference(&there), None, "{mode:?}");
        assert_eq!(there.save().unwrap().devices, devices, "{mode:?}");
    }
}

#[test]
fn what_may_not_come() {
    let Some(vm) = idle(1) else { return };
    let destination =
        || LinuxDestination::new(LinuxConfig::new("/nowhere", 1), Box::new(std::io::sink()));
    let region = |guest_base, length| RegionInfo {
        id: 0,
        flags: 0,
        guest_base,
        length,
        granule: 4096,
        page_size: 4096,
    };
    let good = region(0, LinuxConfig::MIN_MEMORY);
    for regions in [
        vec![],
        vec![region(0, 4096)],
        vec![region(4096, LinuxConfig::MIN_MEMORY)],
        vec![good, region(4 << 30, 4096)],
        vec![region(0, u64::MAX - 4095), good],
    ] {
        let refused = destination().prepare(&regions);
        assert!(matches!(refused, Err(GuestError::Failed { .. })), "{regions:?}");
    }
    // As much as a host has not.
    let huge = [region(0, 3 << 30), region(4 << 30, (1 << 40) - (3 << 30))];
    assert!(matches!(destination().prepare(&huge), Err(GuestError::Memory { .. })));

    let state = LinuxSource::new(Arc::new(vm)).save().unwrap();
    type Change = fn(&mut DeviceState);
    let changes: [Change; 3] = [
        |state| state.name.push('x'),
        |state| state.version += 1,
        |state| state.bytes.truncate(100),
    ];
    for change in changes {
        let destination = destination();
        destination.prepare(&[good]).unwrap();
        let mut changed = state.clone();
        change(&mut changed);
        let refused = destination.restore(&changed);
        assert!(matches!(refused, Err(GuestError::State { .. })), "{refused:?}");
        assert!(destination.run(None).is_err(), "it has no state");
        assert!(destination.vm().is_none());
    }
    let destination = destination();
    destination.prepare(&[good]).unwrap();
    destination.restore(&state).unwrap();
    assert!(destination.vm().is_none(), "it does not run");
    destination.drop_guest();
    assert!(destination.run(None).is_err());
}
