//! Machines that run in the background.

use std::sync::Arc;

use pageferry_testing::wait_for;
use pageferry_vmm::{End, Machine, Vm, VmConfig};

/// A machine whose memory is all there, running.
pub fn started(config: VmConfig) -> Machine {
    let machine = Machine::new(Arc::new(Vm::new(config).unwrap()), None);
    machine.vm().fill().unwrap();
    machine.start().unwrap();
    machine
}

/// Every vCPU has touched something more.
pub fn wait_for_progress(vm: &Vm) {
    let before = vm.touches();
    wait_for("every vCPU to get on", || {
        vm.touches().iter().zip(&before).all(|(now, before)| now > before)
    });
}

/// The machine stops, and nothing was wrong with its memory, which was all there.
#[track_caller]
pub fn stop_and_check(machine: &Machine) {
    let report = machine.stop().unwrap();
    let config = machine.vm().config();
    assert!(report.vcpus.iter().all(|vcpu| vcpu.end == End::Stopped), "{config:?}: {report}");
    assert_eq!(report.mismatches(), 0, "{config:?}: {report}");
    let verified = machine.vm().verify(false).unwrap();
    assert_eq!(verified.mismatches, 0, "{config:?}: {verified:?}");
    assert_eq!(verified.words, config.memory / 8, "{config:?}");
}
