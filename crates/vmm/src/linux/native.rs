//! Whether this host runs a kernel in a guest, or only pretends to, an instruction at a time.

use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use pageferry_memory::Mapping;

use crate::VmError;

/// How fast a guest's kernel mode is here.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Native {
    /// What one instruction took, of two that did nothing but count.
    pub instruction: Duration,
}

impl Native {
    /// A kernel boots in some 10^9 instructions. An emulated processor takes nanoseconds for each, and
    /// where KVM emulates kernel mode each takes microseconds.
    pub const TOO_SLOW: Duration = Duration::from_nanos(500);

    /// Whether a kernel can be run: not in hours.
    pub fn is_native(&self) -> bool {
        self.instruction < Self::TOO_SLOW
    }
}

/// Counted down by a loop of two instructions.
const ROUNDS: u32 = 20_000;
const PAGE: u64 = 4096;

/// Finds out by running a small loop in a guest's kernel mode, the best of three times.
///
/// # Errors
/// When there is no KVM here, or the tiny machine does not do what it should.
pub fn native() -> Result<Native, VmError> {
    // mov ecx, ROUNDS; 1: dec ecx; jnz 1b; hlt: in real mode, with a prefix for 32 bits.
    let mut code = vec![0x66, 0xb9];
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0x66, 0x49, 0x75, 0xfc, 0xf4]);
    let failed = |why: String| VmError::Config { why: format!("a tiny machine's memory: {why}") };
    let memory = Mapping::anonymous(PAGE).map_err(|error| failed(error.to_string()))?;
    memory.write_at(0, &code).map_err(|error| failed(error.to_string()))?;
    let kvm = Kvm::new().map_err(VmError::kvm("opening /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: PAGE,
        userspace_addr: memory.range().start().get(),
    };
    // SAFETY: the mapping outlives the machine, and no Rust reference to its bytes exists.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    let mut best = Duration::MAX;
    for number in 0..3 {
        best = best.min(time_loop(&vm, number)?);
    }
    // Whatever is measured of a machine lives as long as it.
    drop(vm);
    drop(memory);
    Ok(Native { instruction: best / (2 * ROUNDS) })
}

fn time_loop(vm: &VmFd, number: u64) -> Result<Duration, VmError> {
    let mut vcpu = vm.create_vcpu(number).map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
    let mut system = vcpu.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
    (system.cs.base, system.cs.selector) = (0, 0);
    vcpu.set_sregs(&system).map_err(VmError::kvm("KVM_SET_SREGS"))?;
    let registers = kvm_regs { rip: 0, rflags: 2, ..Default::default() };
    vcpu.set_regs(&registers).map_err(VmError::kvm("KVM_SET_REGS"))?;
    let start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(start.elapsed()),
            Ok(other) => {
                let why = format!("a loop in kernel mode ended with {other:?}");
                return Err(VmError::Config { why });
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(VmError::kvm("KVM_RUN of a tiny machine")(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_comes_to_its_end() {
        if let Err(error) = Kvm::new() {
            println!("skipped: needs /dev/kvm: {error}");
            return;
        }
        let native = native().unwrap();
        assert!(native.instruction < Duration::from_millis(1), "{native:?}");
        println!("{:?} an instruction in kernel mode", native.instruction);
    }
}
