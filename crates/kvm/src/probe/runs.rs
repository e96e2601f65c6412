//! The smallest guest: it adds two numbers, stores the sum, sends it through a port and halts.

use kvm_ioctls::Kvm;

use super::{
    Answer, Shortfall,
    machine::{Machine, PAGE, PORT, Ran, on_a_thread},
};

const PAGES: u64 = 4;
const DATA_PAGE: u64 = 3;

/// Real mode, from page 1 on.
const PROGRAM: [u8; 9] = [
    0x00, 0xd8, // add al, bl
    0xa2, 0x00, 0x30, // mov [0x3000], al: page 3
    0xe6, PORT, // out PORT, al
    0xf4, // hlt
    0x90,
];

pub(super) fn check(kvm: &Kvm) -> Answer {
    let machine = Machine::real_mode(kvm, PAGES, &PROGRAM, (2, 3))?;
    on_a_thread(machine, |machine| {
        match machine.run()? {
            Ran::Out(5) => {}
            other => return Err(format!("expected 5 at a port, got {other:?}")),
        }
        match machine.run()? {
            Ran::Halt => {}
            other => return Err(format!("expected a halt, got {other:?}")),
        }
        let stored = machine.read_page(DATA_PAGE)[0];
        if stored != 5 {
            return Err(format!("the guest's store is not in memory: {stored}"));
        }
        let map = machine.dirty_log((PAGES * PAGE) as usize)?;
        if map & 1 << DATA_PAGE == 0 {
            return Err(format!("the page written is not in the dirty log: {map:#b}"));
        }
        if map & 1 << (DATA_PAGE - 1) != 0 {
            return Err(format!("a page nobody touched is in the dirty log: {map:#b}"));
        }
        Ok("I/O exit, halt, store and dirty log as they should be".to_owned())
    })
    .map_err(Shortfall::Missing)
}
