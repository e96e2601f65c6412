//! What is wrong with the memory of a machine that goes on in another, on purpose: the guest and
//! the host both notice.

mod common;

use std::sync::Arc;

use common::*;
use pageferry_memory::RegionId;
use pageferry_vmm::{Behaviour, End, Machine, Vm, VmConfig, state::MachineState};

const MEMORY: u64 = 64 << 12;

/// A guest that counts, stopped where it is, with its state and the memory of its first region.
fn saved() -> (MachineState, Vec<Vec<u8>>) {
    let mut config = VmConfig::new(1, MEMORY);
    config.payload = Behaviour::LinearWrite { rate: None }.into();
    let machine = started(config);
    // Every page has been written more than once.
    wait_for("three rounds", || machine.vm().touches()[0] > 3 * 64);
    machine.vm().pause();
    let state = machine.vm().save().unwrap();
    let layout = machine.vm().layout();
    let memory = layout.iter().map(|(_, region)| {
        let mut bytes = vec![0; region.len() as usize];
        region.guest_view().read_at(0, &mut bytes).unwrap();
        bytes
    });
    (state, memory.collect())
}

/// Has another machine take the state, and this memory.
fn restored(state: &MachineState, memory: &[Vec<u8>]) -> Machine {
    let vm = Vm::new(VmConfig::of_state(state).unwrap()).unwrap();
    vm.restore(state).unwrap();
    for ((_, region), bytes) in vm.layout().iter().zip(memory) {
        region.fill_view().unwrap().write_at(0, bytes).unwrap();
        region.page_map().set_present(region.all_granules());
    }
    Machine::new(Arc::new(vm), None)
}

/// Both notice: the host before the guest goes on, the guest as it does.
#[track_caller]
fn assert_noticed(machine: &Machine, what: &str) {
    let verified = machine.vm().verify(false).unwrap();
    assert!(verified.mismatches > 0, "{what}: {verified:?}");
    let before = machine.vm().touches()[0];
    machine.start().unwrap();
    wait_for("a round", || machine.vm().touches()[0] > before + 64);
    let report = machine.stop().unwrap();
    assert_eq!(report.vcpus[0].end, End::Stopped, "{what}: {report}");
    assert!(report.mismatches() > 0, "{what}: {report}");
}

#[test]
fn a_page_that_is_lost_or_stale_is_noticed() {
    if !kvm() {
        return;
    }
    let _watch = watch(60);
    let (state, memory) = saved();
    let machine = restored(&state, &memory);
    machine.start().unwrap();
    wait_for_progress(machine.vm());
    stop_and_check(&machine);

    // One that is not the page in which the guest stands.
    let page = |memory: &mut Vec<Vec<u8>>, change: &dyn Fn(&mut [u8])| {
        for page in [3, 20] {
            change(&mut memory[0][page << 12..(page + 1) << 12]);
        }
    };
    let mut zero = memory.clone();
    page(&mut zero, &|page| page.fill(0));
    assert_noticed(&restored(&state, &zero), "a zero page");

    // As it was some rounds later, or earlier.
    let machine = restored(&state, &memory);
    let before = machine.vm().touches()[0];
    machine.start().unwrap();
    wait_for("two rounds", || machine.vm().touches()[0] > before + 2 * 64);
    machine.vm().pause();
    let layout = machine.vm().layout();
    let region = layout.get(RegionId::new(0)).unwrap();
    let later = machine.vm().save().unwrap();
    let mut stale = Vec::new();
    for (_, region) in layout.iter() {
        let mut bytes = vec![0; region.len() as usize];
        region.guest_view().read_at(0, &mut bytes).unwrap();
        stale.push(bytes);
    }
    assert_eq!(region.len(), memory[0].len() as u64);
    for number in [3, 20] {
        let range = number << 12..(number + 1) << 12;
        stale[0][range.clone()].copy_from_slice(&memory[0][range]);
    }
    assert_noticed(&restored(&later, &stale), "a stale page");
}
