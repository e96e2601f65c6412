//! What a machine refuses, and what it is before it runs: for this no kernel has to run.

use std::{io::Write, sync::Arc, time::Duration};

use pageferry_vmm::{
    linux::{Disk, LinuxConfig, LinuxEnd, LinuxError, LinuxVm},
    state::MachineState,
};

const MEMORY: u64 = LinuxConfig::MIN_MEMORY;

fn make(config: LinuxConfig) -> Result<LinuxVm, LinuxError> {
    LinuxVm::new(config, Box::new(std::io::sink()))
}

/// A machine that is never booted, or `None`, having said so, where there is no KVM.
pub fn idle(vcpus: u16) -> Option<LinuxVm> {
    if let Err(error) = kvm_ioctls::Kvm::new() {
        println!("skipped: needs /dev/kvm: {error}");
        return None;
    }
    let mut config = LinuxConfig::new("/nowhere", MEMORY);
    config.vcpus = vcpus;
    Some(make(config).unwrap())
}

#[test]
fn configurations() {
    type Change = fn(&mut LinuxConfig);
    let disk = || Disk { path: "/nowhere".into(), read_only: true };
    let cases: [(Change, &str); 6] = [
        (|config| config.vcpus = 0, "0 vCPUs"),
        (|config| config.vcpus = 65, "65 vCPUs"),
        (|config| config.memory = MEMORY / 2, "or more"),
        (|config| config.memory = MEMORY + 1, "or more"),
        (|config| config.memory = 2 << 40, "1 TiB"),
        (|config| config.page_size = pageferry_memory::PageSize::SIZE_1G, "4 KiB or 2 MiB"),
    ];
    for (change, why) in cases {
        let mut config = LinuxConfig::new("/nowhere", MEMORY);
        change(&mut config);
        let error = make(config).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let mut config = LinuxConfig::new("/nowhere", MEMORY);
    config.disks = (0..8).map(|_| disk()).collect();
    assert!(make(config.clone()).unwrap_err().to_string().contains("8 disks"));
    if idle(1).is_some() {
        config.disks = vec![disk()];
        assert!(make(config).unwrap_err().to_string().contains("opening the disk /nowhere"));
    }
}

#[test]
fn regions_of_other_machines() {
    let Some(vm) = idle(1) else { return };
    let regions: Vec<_> = vm.layout().iter().map(|(_, region)| Arc::clone(region)).collect();
    let with = |memory, regions| {
        let config = LinuxConfig::new("/nowhere", memory);
        LinuxVm::with_regions(config, regions, Box::new(std::io::sink()))
    };
    for (memory, regions) in
        [(MEMORY, vec![]), (2 * MEMORY, regions.clone()), (4 << 30, regions.clone())]
    {
        assert!(matches!(with(memory, regions), Err(LinuxError::Config { .. })));
    }
    with(MEMORY, regions).unwrap();
}

#[test]
fn what_is_no_kernel() {
    let Some(vm) = idle(1) else { return };
    assert!(vm.boot().unwrap_err().to_string().contains("opening the kernel /nowhere"));
    let header = |magic: &[u8], version: u16, xloadflags: u16| {
        let mut bytes = vec![0_u8; 0x1000];
        bytes[0x1f1] = 4;
        bytes[0x202..0x206].copy_from_slice(magic);
        bytes[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        bytes[0x211] = 1; // loaded high
        bytes[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        bytes[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes()); // room to unpack
        bytes
    };
    for (bytes, why) in [
        (vec![], "loading the kernel"),
        (vec![0; 0x1000], "loading the kernel"),
        (header(b"HdrS", 0x100, 1), "loading the kernel"),
        (header(b"HdrS", 0x20f, 0), "64-bit mode"),
        (header(b"HdrS", 0x20f, 1), "does not fit"),
    ] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let vm = make(LinuxConfig::new(file.path(), MEMORY)).unwrap();
        let error = vm.boot().unwrap_err().to_string();
        assert!(error.contains(why), "{error}, not {why}");
    }
}

#[test]
fn what_comes_too_early_or_twice() {
    let Some(vm) = idle(1) else { return };
    let refused = |result: Result<(), LinuxError>| {
        assert!(matches!(result, Err(LinuxError::Sequence { .. })), "{result:?}");
    };
    refused(vm.start(None));
    let state = vm.save().unwrap();
    vm.restore(&state).unwrap();
    refused(vm.restore(&state));
    refused(vm.boot());
    vm.pause();
    vm.start(None).unwrap();
    refused(vm.start(None));
    assert_eq!(vm.wait(Duration::ZERO), None);
    vm.stop();
    assert_eq!(vm.wait(Duration::ZERO), Some(LinuxEnd::Stopped));
}

#[test]
fn states_of_other_machines() {
    let (Some(one), Some(two)) = (idle(1), idle(2)) else { return };
    let state = one.save().unwrap();
    let vm = || idle(1).unwrap();
    assert!(two.restore(&state).unwrap_err().to_string().contains("1 of them, and here 2"));
    let mut changed = state.clone();
    changed.devices.pop();
    assert!(matches!(vm().restore(&changed), Err(LinuxError::State { .. })));
    for device in 0..state.devices.len() {
        let mut changed = state.clone();
        changed.devices[device].version += 1;
        assert!(matches!(vm().restore(&changed), Err(LinuxError::State { .. })));
        let mut changed = state.clone();
        changed.devices[device].bytes.pop();
        assert!(matches!(vm().restore(&changed), Err(LinuxError::State { .. })));
        let mut changed = state.clone();
        changed.devices[device].name.push('x');
        assert!(matches!(vm().restore(&changed), Err(LinuxError::State { .. })));
    }
    vm().restore(&MachineState::decode(&state.encode()).unwrap()).unwrap();
}

/// Devices are the same afterwards, with what was typed and not read.
#[test]
fn an_idle_machine_is_the_same_afterwards() {
    let Some(vm) = idle(2) else { return };
    assert_eq!(vm.input(b"typed"), 5);
    let state = vm.save().unwrap();
    let other = idle(2).unwrap();
    assert_ne!(other.save().unwrap().devices, state.devices);
    other.restore(&state).unwrap();
    let again = other.save().unwrap();
    assert_eq!(again.devices, state.devices);
    assert_eq!(again.vcpus.len(), 2);
}
