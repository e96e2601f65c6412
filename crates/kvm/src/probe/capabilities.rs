//! What is announced, and enabled on a machine made for it.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    kvm_create_guest_memfd, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm};

use super::{Answer, Shortfall, doing, machine};

fn missing(reason: impl Into<String>) -> Answer {
    Err(Shortfall::Missing(reason.into()))
}

pub(super) fn memory_fault_info(kvm: &Kvm) -> Answer {
    match kvm.check_extension_int(Cap::MemoryFaultInfo) {
        value if value > 0 => Ok("announced".to_owned()),
        _ => missing("not announced"),
    }
}

/// Enables `cap` on a machine made for it.
fn enable(kvm: &Kvm, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    kvm.create_vm()?.enable_cap(&kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}

pub(super) fn dirty_ring(kvm: &Kvm) -> (Answer, Option<u32>) {
    let mut why = "not announced".to_owned();
    for (cap, name) in [
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, "acquire/release"),
        (KVM_CAP_DIRTY_LOG_RING, "total store order"),
    ] {
        let largest = kvm.check_extension_raw(cap.into());
        let Ok(bytes @ 1..) = u32::try_from(largest) else { continue };
        match enable(kvm, cap, u64::from(bytes.min(64 << 10))) {
            Ok(()) => {
                let size = format!("enabled: {name}, up to {} KiB a vCPU", bytes / 1024);
                return (Ok(size), Some(bytes));
            }
            Err(error) => why = format!("{name}: enabling it: {error}"),
        }
    }
    (missing(why), None)
}

pub(super) fn manual_protect(kvm: &Kvm) -> Answer {
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    match kvm.check_extension_raw(cap.into()) {
        modes if modes > 0 => match enable(kvm, cap, modes as u64) {
            Ok(()) => Ok(format!("enabled: modes {modes:#x}")),
            Err(error) => missing(format!("enabling it: {error}")),
        },
        _ => missing("not announced"),
    }
}

/// KVM_CAP_GUEST_MEMFD_FLAGS (Linux 6.18).
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;
/// `GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED` (Linux 6.18).
const GUEST_MEMFD_SHARED: u64 = 1 | 2;

pub(super) fn guest_memfd(kvm: &Kvm) -> (Answer, Option<u64>) {
    let flags = u64::try_from(kvm.check_extension_raw(KVM_CAP_GUEST_MEMFD_FLAGS))
        .ok()
        .filter(|flags| *flags > 0);
    let answer = match map_guest_memfd(kvm) {
        Ok(()) => Ok(match flags {
            Some(flags) => format!("made and mapped; flags {flags:#x} are known"),
            None => "made and mapped".to_owned(),
        }),
        Err(why) => missing(why),
    };
    (answer, flags)
}

fn map_guest_memfd(kvm: &Kvm) -> Result<(), String> {
    if !kvm.check_extension(Cap::GuestMemfd) {
        return Err("not announced".to_owned());
    }
    let size = rustix::param::page_size() as u64;
    let vm = kvm.create_vm().map_err(doing("creating a machine"))?;
    let request = kvm_create_guest_memfd { size, flags: GUEST_MEMFD_SHARED, ..Default::default() };
    let fd = vm.create_guest_memfd(request).map_err(doing("creating one"))?;
    machine::map_guest_memfd(fd, size)
}
