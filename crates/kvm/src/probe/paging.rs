//! How the host translates guest-physical addresses.

use std::{fs, path::Path};

use kvm_ioctls::Kvm;

use super::{
    Answer, Shortfall,
    machine::{Machine, Ran, TABLE, marked, on_a_thread},
};

/// How the host translates guest-physical addresses.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Paging {
    /// The processor walks the guest's page tables, and a second set of the host's (EPT, NPT): a
    /// missing page of either kind is a fault that KVM handles.
    TwoDimensional,
    /// KVM reads the guest's page tables and makes the processor's from them. One that is missing
    /// is, for KVM, one that maps nothing: the guest sees a page fault.
    Shadow,
    /// It could not be found out.
    Unknown,
}

/// The modules that drive the processor, and the parameter that says whether the hardware
/// translates guest-physical addresses itself.
const VENDORS: [(&str, Option<&str>); 3] =
    [("kvm_intel", Some("ept")), ("kvm_amd", Some("npt")), ("kvm_pvm", None)];

fn loaded() -> impl Iterator<Item = (&'static str, Option<&'static str>)> {
    VENDORS.into_iter().filter(|(module, _)| Path::new("/sys/module").join(module).is_dir())
}

/// The modules that are there; empty when none is known.
pub(super) fn vendors() -> String {
    loaded().map(|(module, _)| module).collect::<Vec<_>>().join(", ")
}

/// By doing, if that says anything, and otherwise by what the modules claim.
pub(super) fn find(kvm: &Kvm) -> (Paging, Answer) {
    let tried = match by_doing(kvm) {
        Ok((Paging::TwoDimensional, how)) => return (Paging::TwoDimensional, Ok(how)),
        Ok((paging, how)) => return (paging, Err(Shortfall::Missing(how))),
        Err(why) => why,
    };
    let (paging, claim) = by_claim();
    let how = format!("{claim}; not found by doing: {tried}");
    let answer = match paging {
        Paging::TwoDimensional => Ok(how),
        Paging::Shadow => Err(Shortfall::Missing(how)),
        Paging::Unknown => Err(Shortfall::Untested(how)),
    };
    (paging, answer)
}

/// A guest with a missing page table: either its vCPU leaves for it, as for any other page, or the
/// guest gets a page fault, which this one has no handler for.
fn by_doing(kvm: &Kvm) -> Result<(Paging, String), String> {
    let machine = Machine::touching(kvm, 1)?;
    let tables = machine.page(TABLE);
    let table = machine.read_page(TABLE);
    let uffd = marked(&machine, tables)?;
    on_a_thread(machine, move |machine| {
        match machine.run()? {
            Ran::Marker(address) if tables.contains(address) => {}
            Ran::Shutdown => {
                let how = "a missing page of a guest's page tables is a page fault in the guest";
                return Ok((Paging::Shadow, how.to_owned()));
            }
            other => return Err(format!("a missing page of page tables: {other:?}")),
        }
        machine.install(uffd.uffd(), tables, &table)?;
        match machine.run()? {
            Ran::Out(_) => {}
            other => return Err(format!("after a page of page tables had come: {other:?}")),
        }
        let how = "a missing page of a guest's page tables leaves KVM_RUN as any other";
        Ok((Paging::TwoDimensional, how.to_owned()))
    })
}

fn by_claim() -> (Paging, String) {
    let mut why = Vec::new();
    for (module, parameter) in loaded() {
        let Some(parameter) = parameter else {
            why.push(format!("{module} has shadow paging only"));
            continue;
        };
        let path = format!("/sys/module/{module}/parameters/{parameter}");
        match fs::read_to_string(&path) {
            Ok(value) if matches!(value.trim(), "Y" | "1") => {
                return (Paging::TwoDimensional, format!("{module} {parameter}=Y"));
            }
            Ok(value) => why.push(format!("{module} {parameter}={}", value.trim())),
            Err(error) => why.push(format!("{path}: {error}")),
        }
    }
    if why.is_empty() {
        return (Paging::Unknown, "no known vendor module".to_owned());
    }
    (Paging::Shadow, why.join("; "))
}
