//! Whether a guest's write of a register that names memory leaves KVM_RUN, and is completed when the
//! register has been set.

use kvm_ioctls::Kvm;

use super::{
    Answer, doing,
    machine::{Machine, PAGE, PORT, Ran, on_a_thread},
};
use crate::areas;

const PAGES: u64 = 4;
/// The clock, in page 3, and on.
const KVMCLOCK: u32 = 0x4b56_4d01;
const VALUE: u64 = (3 * PAGE) | 1;

/// Real mode, from page 1 on.
const PROGRAM: [u8; 20] = [
    0x66, 0xb9, 0x01, 0x4d, 0x56, 0x4b, // mov ecx, KVMCLOCK
    0x66, 0xb8, 0x01, 0x30, 0x00, 0x00, // mov eax, VALUE
    0x66, 0x31, 0xd2, // xor edx, edx
    0x0f, 0x30, // wrmsr
    0xe6, PORT, // out PORT, al
    0xf4, // hlt
];

pub(super) fn check(kvm: &Kvm) -> Answer {
    let machine = Machine::real_mode(kvm, PAGES, &PROGRAM, (0, 0))?;
    areas::filter(machine.vm()).map_err(|error| error.to_string())?;
    on_a_thread(machine, |machine| {
        match machine.run()? {
            Ran::SetsRegister(KVMCLOCK, VALUE) => {}
            other => return Err(format!("a write of kvmclock's register: {other:?}")),
        }
        machine.set_register(KVMCLOCK, VALUE).map_err(doing("KVM_SET_MSRS"))?;
        match machine.run()? {
            Ran::Out(0x01) => {}
            other => return Err(format!("after kvmclock's register had been set: {other:?}")),
        }
        Ok("a filter for kvmclock's register ended KVM_RUN, and the guest went on".to_owned())
    })
    .map_err(Into::into)
}
