//! Whether a vCPU leaves KVM_RUN for a missing page, and goes on when it is there.

use kvm_ioctls::Kvm;

use super::{
    Answer,
    machine::{DATA, Machine, Ran, marked, on_a_thread},
};

/// Pages that the guest touches, one after the other.
const PAGES: u64 = 4;

pub(super) fn check(kvm: &Kvm) -> Answer {
    let machine = Machine::touching(kvm, PAGES)?;
    let data = machine.pages(DATA, PAGES);
    let uffd = marked(&machine, data)?;
    let faults = on_a_thread(machine, move |machine| {
        let mut codes = Vec::new();
        for n in 0..PAGES {
            let page = machine.page(DATA + n);
            machine.start(DATA + n, 1)?;
            match machine.run()? {
                Ran::Marker(address) if address == page.start() => {}
                Ran::Marker(address) => {
                    return Err(format!("the signal for the page at {page} says {address}"));
                }
                Ran::Out(_) => return Err("the guest read a page that is missing".to_owned()),
                other => return Err(format!("instead of a SIGBUS with the address: {other:?}")),
            }
            codes.push(machine.last_code());
            let byte = 0xa0 + n as u8;
            machine.install(uffd.uffd(), page, &[byte; 4096])?;
            match machine.run()? {
                Ran::Out(read) if read == byte => {}
                other => return Err(format!("{byte:#x} was installed, and then: {other:?}")),
            }
        }
        Ok(codes)
    })?;
    Ok(format!(
        "{} of {PAGES} markers (POISON) ended KVM_RUN with EINTR and a SIGBUS with the exact \
         address, si_code {}; COPY replaced them",
        faults.len(),
        faults[0],
    ))
}
