//! What is announced, and made.

use kvm_bindings::kvm_create_guest_memfd;
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
