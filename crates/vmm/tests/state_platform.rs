//! States of machines with interrupt controllers and timer in the kernel, as one that boots an
//! operating system has them: without a guest, by KVM alone.

mod common;

use common::kvm;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_mp_state, kvm_msr_entry, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pageferry_vmm::state::{
    DeviceBlob, MachineState, PlatformPart, Restorer, Saver, StateError, VcpuPart,
};

const VCPUS: u64 = 3;

struct Machine {
    kvm: Kvm,
    // Dropped before the machine.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
}

/// `None` where KVM has no such controllers for its guests.
fn machine(chips: bool) -> Option<Machine> {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    if chips {
        let made = vm.create_irq_chip().and_then(|()| vm.create_pit2(kvm_pit_config::default()));
        if let Err(error) = made {
            println!("skipped: needs interrupt controllers in the kernel: {error}");
            return None;
        }
    }
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    let vcpus = (0..VCPUS).map(|number| vm.create_vcpu(number).unwrap()).collect::<Vec<_>>();
    for vcpu in &vcpus {
        vcpu.set_cpuid2(&cpuid).unwrap();
    }
    Some(Machine { kvm, vcpus, vm })
}

impl Machine {
    fn save(&self) -> MachineState {
        let saver = Saver::new(&self.kvm, &self.vm).unwrap();
        MachineState {
            vcpus: self.vcpus.iter().map(|vcpu| saver.vcpu(vcpu).unwrap()).collect(),
            platform: saver.platform(&self.vm).unwrap(),
            devices: vec![DeviceBlob { name: "none".to_owned(), ..DeviceBlob::default() }],
        }
    }

    fn restore(&self, state: &MachineState) -> Result<(), StateError> {
        let mut restorer = Restorer::new(&self.kvm, &self.vm)?;
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            restorer.vcpu(vcpu, state)?;
        }
        restorer.platform(&self.vm, &state.platform)
    }
}

/// Sets what a new machine does not have.
fn change(machine: &Machine) {
    for (number, vcpu) in (0..).zip(&machine.vcpus) {
        let mut registers = vcpu.get_regs().unwrap();
        (registers.rax, registers.r15) = (number, 0x1234_5678_9abc_def0);
        vcpu.set_regs(&registers).unwrap();
        let mut debug = vcpu.get_debug_regs().unwrap();
        debug.db[0] = 0x1000 + number;
        vcpu.set_debug_regs(&debug).unwrap();
        let entries = [
            // SYSENTER's stack, and the clock of a guest that has turned it on.
            kvm_msr_entry { index: 0x175, data: 0x5000 + number, ..Default::default() },
            kvm_msr_entry { index: 0x4b56_4d01, data: 0x6001 + 64 * number, ..Default::default() },
        ];
        let msrs = kvm_bindings::Msrs::from_entries(&entries).unwrap();
        assert_eq!(vcpu.set_msrs(&msrs).unwrap(), 2);
        let mut lapic = vcpu.get_lapic().unwrap();
        // The local vector for LINT0: an interrupt from outside, not masked.
        lapic.regs[0x350..0x352].copy_from_slice(&[0, 7]);
        vcpu.set_lapic(&lapic).unwrap();
    }
    // Halted, as a processor is that waits for an interrupt.
    machine.vcpus[1].set_mp_state(kvm_mp_state { mp_state: 3 }).unwrap();
    let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    machine.vm.get_irqchip(&mut ioapic).unwrap();
    // SAFETY: KVM has filled in this member, and any bytes are valid for it.
    let table = unsafe { &mut ioapic.chip.ioapic.redirtbl };
    table[4].bits = 1 << 56 | 1 << 16 | 0x34;
    machine.vm.set_irqchip(&ioapic).unwrap();
    let mut pit = machine.vm.get_pit2().unwrap();
    (pit.channels[2].count, pit.channels[2].mode) = (0x1234, 3);
    machine.vm.set_pit2(&pit).unwrap();
}

/// Without what goes on by itself.
fn standing_still(state: &MachineState) -> Vec<(String, Vec<u8>)> {
    let vcpus = state.vcpus.iter().enumerate().flat_map(|(number, vcpu)| {
        let parts = vcpu.parts().filter(|(part, _)| *part != VcpuPart::Tsc);
        parts.map(move |(part, bytes)| (format!("{number}: {part}"), bytes.to_vec()))
    });
    let platform = state.platform.parts().filter(|(part, _)| *part != PlatformPart::Clock);
    let platform = platform.map(|(part, bytes)| {
        let mut bytes = bytes.to_vec();
        if part == PlatformPart::Pit {
            // When each channel was loaded: a time of the host's, set anew when the timer is.
            bytes.chunks_exact_mut(24).take(3).for_each(|channel| channel[16..].fill(0));
        }
        (part.to_string(), bytes)
    });
    vcpus.chain(platform).collect()
}

#[test]
fn every_part_is_restored_byte_for_byte() {
    if !kvm() {
        return;
    }
    let (Some(first), Some(next)) = (machine(true), machine(true)) else { return };
    change(&first);
    let state = first.save();
    for part in PlatformPart::ALL {
        assert!(state.platform.part(part).is_some(), "{part}");
    }
    for vcpu in &state.vcpus {
        assert!(vcpu.part(VcpuPart::Lapic).is_some());
    }
    let decoded = MachineState::decode(&state.encode()).unwrap();
    assert_eq!(decoded, state);
    assert_ne!(standing_still(&next.save()), standing_still(&state), "nothing was changed");
    next.restore(&decoded).unwrap();
    let again = next.save();
    assert_eq!(standing_still(&again), standing_still(&state));
    // And into one that has another state already.
    first.restore(&next.save()).unwrap();
    assert_eq!(standing_still(&first.save()), standing_still(&state));
}

#[test]
fn the_clock_and_the_counters_never_go_back() {
    if !kvm() {
        return;
    }
    let Some(mut from) = machine(false) else { return };
    let clock = |state: &MachineState| {
        let bytes = state.platform.part(PlatformPart::Clock).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    };
    let counter = |state: &MachineState, vcpu: usize| {
        let bytes = state.vcpus[vcpu].part(VcpuPart::Tsc).unwrap();
        u64::from_le_bytes(bytes[8..16].try_into().unwrap())
    };
    let begun = std::time::Instant::now();
    let first = from.save();
    let khz = u64::from(from.vcpus[0].get_tsc_khz().unwrap());
    let mut before = first.clone();
    for _ in 0..20 {
        let to = machine(false).unwrap();
        to.restore(&before).unwrap();
        let after = to.save();
        assert!(clock(&after) >= clock(&before), "the clock");
        for vcpu in 0..VCPUS as usize {
            assert!(counter(&after, vcpu) >= counter(&before, vcpu), "the counter of vCPU {vcpu}");
        }
        (before, from) = (after, to);
    }
    drop(from);
    // Time stood still between, and did not run away.
    let most = begun.elapsed().as_nanos() as u64;
    assert!(clock(&before) - clock(&first) <= most, "the clock");
    let passed = (counter(&before, 0) - counter(&first, 0)) * 1000 / khz * 1000;
    // To a microsecond for each time, and what the frequency is inexact by.
    assert!(passed <= most + most / 100 + 20_000, "{passed} of {most} ns");
}

#[test]
fn controllers_on_one_side_only_are_refused() {
    if !kvm() {
        return;
    }
    let (Some(with), Some(without)) = (machine(true), machine(false)) else { return };
    let error = without.restore(&with.save()).unwrap_err();
    assert!(matches!(error, StateError::Refused { part: "lapic", .. }), "{error}");
    let error = with.restore(&without.save()).unwrap_err();
    assert!(matches!(error, StateError::Lacking("lapic")), "{error}");
    let platform = without.save().platform;
    let restorer = Restorer::new(&with.kvm, &with.vm).unwrap();
    let error = restorer.platform(&with.vm, &platform).unwrap_err();
    assert!(matches!(error, StateError::Lacking("pic0")), "{error}");
}

#[test]
fn a_guest_that_is_a_hypervisor_is_not_saved() {
    if !kvm() {
        return;
    }
    let Some(machine) = machine(false) else { return };
    let vcpu = &machine.vcpus[0];
    let mut system = vcpu.get_sregs().unwrap();
    system.efer |= 1 << 12;
    let vmx = || {
        let mut system = vcpu.get_sregs().unwrap();
        system.cr4 |= 1 << 13;
        vcpu.set_sregs(&system)
    };
    if vcpu.set_sregs(&system).is_err() && vmx().is_err() {
        println!("skipped: needs nested virtualization");
        return;
    }
    let saver = Saver::new(&machine.kvm, &machine.vm).unwrap();
    let error = saver.vcpu(vcpu).unwrap_err();
    assert!(matches!(error, StateError::Nested { .. }), "{error}");
}
