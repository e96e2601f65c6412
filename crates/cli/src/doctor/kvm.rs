//! KVM: whether it runs a guest, how it pages, and what it reports.

mod guest;

use std::{fs, io, path::Path};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, kvm_create_guest_memfd, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm};
use rustix::{
    fd::{FromRawFd as _, OwnedFd},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use super::finding::{Finding, Group};

const GROUP: Group = Group::Kvm;

pub(super) fn findings() -> Vec<Finding> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return vec![no_device(error.into())],
    };
    let mut findings = vec![version(&kvm), vendor(), paging_mode(), runs_a_guest(&kvm)];
    findings.push(capability(
        &kvm,
        Cap::MemoryFaultInfo,
        ("kvm-memory-fault-info", "memory-fault information"),
        "an access that KVM cannot resolve comes back without its address",
    ));
    findings.push(dirty_ring(&kvm));
    findings.push(manual_protect(&kvm));
    findings.push(guest_memfd(&kvm));
    findings
}

fn no_device(error: io::Error) -> Finding {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => "add the user to the device's group (often `kvm`)",
        _ => "load kvm_intel or kvm_amd; in a virtual machine, enable nested virtualization",
    };
    Finding::missing(GROUP, "kvm", "/dev/kvm", error.to_string())
        .costs("no KVM guests here; processes and their memory are served all the same")
        .remedy(remedy)
}

fn version(kvm: &Kvm) -> Finding {
    let (id, what) = ("kvm", "/dev/kvm");
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => {
            Finding::works(GROUP, id, what).detail(format!("API version {version}"))
        }
        version => Finding::missing(GROUP, id, what, format!("API version {version}"))
            .costs("no KVM guests here")
            .remedy("a kernel whose KVM has API version 12, as every one since 2.6.22 has"),
    }
}

/// The modules that drive the processor, and the parameter that says whether the hardware
/// translates guest-physical addresses itself.
const VENDORS: [(&str, Option<&str>); 3] =
    [("kvm_intel", Some("ept")), ("kvm_amd", Some("npt")), ("kvm_pvm", None)];

fn loaded() -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
    VENDORS.into_iter().filter(|(module, _)| Path::new("/sys/module").join(module).is_dir())
}

fn vendor() -> Finding {
    let modules: Vec<&str> = loaded().map(|(module, _)| module).collect();
    let (id, what) = ("kvm-vendor", "vendor module");
    if modules.is_empty() {
        return Finding::untested(GROUP, id, what, "none of the known ones is in /sys/module");
    }
    Finding::fact(GROUP, id, what, modules.join(", "))
}

fn paging_mode() -> Finding {
    let (id, what) = ("kvm-two-dimensional", "two-dimensional paging");
    let mut why = Vec::new();
    for (module, parameter) in loaded() {
        let Some(parameter) = parameter else {
            why.push(format!("{module} has shadow paging only"));
            continue;
        };
        let path = format!("/sys/module/{module}/parameters/{parameter}");
        match fs::read_to_string(&path) {
            Ok(value) if matches!(value.trim(), "Y" | "1") => {
                return Finding::works(GROUP, id, what).detail(format!("{module} {parameter}=Y"));
            }
            Ok(value) => why.push(format!("{module} {parameter}={}", value.trim())),
            Err(error) => why.push(format!("{path}: {error}")),
        }
    }
    if why.is_empty() {
        return Finding::untested(GROUP, id, what, "no known vendor module");
    }
    Finding::missing(GROUP, id, what, why.join("; "))
        .costs("shadow paging: faults of guest page tables cannot leave through the vCPU, exits are dear")
        .remedy("a host with EPT or NPT, or nested virtualization that passes it on")
}

fn runs_a_guest(kvm: &Kvm) -> Finding {
    let (id, what) = ("kvm-runs", "a guest runs, its writes are in the dirty log");
    match guest::run(kvm) {
        Ok(report) => Finding::works(GROUP, id, what).detail(report),
        Err(error) => Finding::missing(GROUP, id, what, error.to_string())
            .costs("no KVM guests here")
            .remedy("see the kernel log; in a virtual machine, check nested virtualization"),
    }
}

fn capability(kvm: &Kvm, cap: Cap, (id, what): (&str, &str), costs: &str) -> Finding {
    match kvm.check_extension_int(cap) {
        value if value > 0 => Finding::works(GROUP, id, what).detail("announced"),
        _ => {
            Finding::missing(GROUP, id, what, "not announced").costs(costs).remedy("a newer kernel")
        }
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

fn dirty_ring(kvm: &Kvm) -> Finding {
    let (id, what) = ("kvm-dirty-ring", "dirty ring");
    let mut why = "not announced".to_owned();
    for (cap, name) in [
        (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, "acquire/release"),
        (KVM_CAP_DIRTY_LOG_RING, "total store order"),
    ] {
        let largest = kvm.check_extension_raw(cap.into());
        if largest <= 0 {
            continue;
        }
        match enable(kvm, cap, (largest as u64).min(64 << 10)) {
            Ok(()) => {
                let size = format!("{name}, up to {} KiB a vCPU", largest / 1024);
                return Finding::works(GROUP, id, what).detail(size);
            }
            Err(error) => why = format!("{name}: enabling it: {error}"),
        }
    }
    Finding::missing(GROUP, id, what, why)
        .costs("a harvest reads the whole bitmap however little was written")
        .remedy("a kernel with CONFIG_HAVE_KVM_DIRTY_RING (5.11 and later on x86-64)")
}

fn manual_protect(kvm: &Kvm) -> Finding {
    let (id, what) = ("kvm-manual-protect", "dirty log cleared in ranges");
    let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let modes = kvm.check_extension_raw(cap.into());
    let result = match modes {
        modes if modes > 0 => {
            enable(kvm, cap, modes as u64).map_err(|e| format!("enabling it: {e}"))
        }
        _ => Err("not announced".to_owned()),
    };
    match result {
        Ok(()) => Finding::works(GROUP, id, what).detail(format!("modes {modes:#x}")),
        Err(why) => Finding::missing(GROUP, id, what, why)
            .costs("every harvest protects the whole slot again")
            .remedy("a newer kernel (5.0 and later)"),
    }
}

/// `GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED` (Linux 6.18).
const GUEST_MEMFD_SHARED: u64 = 1 | 2;

fn guest_memfd(kvm: &Kvm) -> Finding {
    let (id, what) = ("kvm-guest-memfd", "guest_memfd that the host can map");
    match map_guest_memfd(kvm) {
        Ok(()) => Finding::works(GROUP, id, what),
        Err(why) => Finding::missing(GROUP, id, what, why)
            .costs("guest memory is a memfd or anonymous; nothing that is here today needs more")
            .remedy("Linux 6.18 or later"),
    }
}

fn map_guest_memfd(kvm: &Kvm) -> Result<(), String> {
    if !kvm.check_extension(Cap::GuestMemfd) {
        return Err("not announced".to_owned());
    }
    let size = rustix::param::page_size();
    let vm = kvm.create_vm().map_err(|e| format!("creating a machine: {e}"))?;
    let request = kvm_create_guest_memfd {
        size: size as u64,
        flags: GUEST_MEMFD_SHARED,
        ..Default::default()
    };
    let fd = vm.create_guest_memfd(request).map_err(|e| format!("creating one: {e}"))?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a null hint makes a mapping of its own, which is unmapped before anybody else
    // learns its address.
    unsafe {
        let start = mmap(std::ptr::null_mut(), size, protection, MapFlags::SHARED, &fd, 0)
            .map_err(|e| format!("mapping it: {e}"))?;
        start.cast::<u8>().write_volatile(1);
        munmap(start, size).map_err(|e| format!("unmapping it: {e}"))
    }
}
