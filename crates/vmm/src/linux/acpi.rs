//! ACPI tables: the processors, the interrupt controllers, how to power off, and the devices.
//!
//! Source: the ACPI specification 6.5, sections 5.2 (tables) and 4.8 (fixed hardware). Debian's kernel
//! has no other way to learn of several processors (no CONFIG_X86_MPPARSE) or of virtio-mmio devices
//! (no CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES).

use acpi_tables::{
    Aml,
    aml::{Device, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope, ZERO},
    facs::FACS,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{LinuxError, layout};

const OEM: [u8; 6] = *b"PAGEFY";
const OEM_TABLE: [u8; 8] = *b"PAGEFYVM";

/// A virtio device as the tables tell of it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// Where its registers are, a page of them.
    pub(crate) base: u64,
    /// The input of the I/O interrupt controller that it raises.
    pub(crate) interrupt: u32,
}

/// Writes all tables, the root first, at [`layout::ACPI`].
pub(crate) fn write<M: GuestMemoryBackend>(
    memory: &M,
    vcpus: u16,
    devices: &[Place],
) -> Result<(), LinuxError> {
    let mut next = layout::ACPI + Rsdp::len() as u64;
    let mut place = |bytes: &[u8]| -> Result<u64, LinuxError> {
        // The one called FACS has to be aligned to 64 bytes, the others to none.
        let address = next.next_multiple_of(64);
        next = address + bytes.len() as u64;
        let limit = layout::HIGH_RAM;
        if next > limit {
            return Err(LinuxError::NoRoom {
                what: "an ACPI table",
                bytes: bytes.len() as u64,
                limit,
            });
        }
        let failed = LinuxError::write("an ACPI table", address);
        memory.write_slice(bytes, GuestAddress(address)).map_err(failed)?;
        Ok(address)
    };
    let dsdt = place(definitions(devices).as_slice())?;
    let facs = place(&bytes(&FACS::new()))?;
    let fadt = place(fixed(dsdt, facs).as_slice())?;
    let madt = place(processors(vcpus).as_slice())?;
    let mut root = XSDT::new(OEM, OEM_TABLE, 1);
    root.add_entry(fadt);
    root.add_entry(madt);
    let root = place(&bytes(&root))?;
    memory
        .write_slice(&bytes(&Rsdp::new(OEM, root)), GuestAddress(layout::ACPI))
        .map_err(LinuxError::write("the root of the ACPI tables", layout::ACPI))
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

fn table(signature: &[u8; 4], len: u32, revision: u8) -> Sdt {
    Sdt::new(*signature, len, revision, OEM, OEM_TABLE, 1)
}

/// The fixed hardware: no mode to be entered, sleep control for power-off, a reset register.
fn fixed(dsdt: u64, facs: u64) -> Sdt {
    const REVISION: u8 = 6;
    const LEN: u32 = 276;
    // Serial and timers are where PCs have them; there is no VGA and no CMOS clock, nor, as the first
    // flag's neighbour is clear, a keyboard.
    const BOOT: u16 = 1 | 1 << 2 | 1 << 5;
    // WBINVD works; no fixed power and sleep buttons; a reset register.
    const FLAGS: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 10;
    let mut fadt = table(b"FACP", LEN, REVISION);
    fadt.write_u32(36, facs as u32);
    fadt.write_u32(40, dsdt as u32);
    fadt.write_u16(46, layout::PM_INTERRUPT);
    fadt.write_u32(56, layout::PM_EVENTS.into());
    fadt.write_u32(64, layout::PM_CONTROL.into());
    fadt.write_u8(88, 4); // bytes of the events
    fadt.write_u8(89, 2); // bytes of the control
    // No sleep states with wake-up latencies that could be used.
    fadt.write_u16(96, 0xffff);
    fadt.write_u16(98, 0xffff);
    fadt.write_u16(109, BOOT);
    fadt.write_u32(112, FLAGS);
    // A generic address: in the space of I/O ports, of 8 bits, accessed as bytes.
    fadt.write_bytes(116, &[1, 8, 0, 1]);
    fadt.write_u64(120, layout::RESET_PORT.into());
    fadt.write_u8(128, layout::RESET_VALUE);
    fadt.write_u64(140, dsdt);
    fadt
}

/// The interrupt controllers.
fn processors(vcpus: u16) -> Sdt {
    const PICS: u32 = 1;
    let mut madt = table(b"APIC", 44, 5);
    madt.write_u32(36, layout::LOCAL_APIC);
    madt.write_u32(40, PICS);
    for number in 0..vcpus as u8 {
        // Type and length; processor, its controller's number; enabled.
        madt.append_slice(&[0, 8, number, number, 1, 0, 0, 0]);
    }
    let mut controller = vec![1, 12, 0, 0];
    controller.extend(layout::IO_APIC.to_le_bytes());
    controller.extend(0_u32.to_le_bytes());
    madt.append_slice(&controller);
    // The timer's interrupt is input 2, as KVM has it, and ACPI's is a level, active when high.
    let (as_the_bus_has_it, level_high) = (0_u16, 0xd_u16);
    for (from, to, flags) in [
        (0, 2, as_the_bus_has_it),
        (layout::PM_INTERRUPT as u8, u32::from(layout::PM_INTERRUPT), level_high),
    ] {
        let mut entry = vec![2, 10, 0, from];
        entry.extend(to.to_le_bytes());
        entry.extend(flags.to_le_bytes());
        madt.append_slice(&entry);
    }
    // The non-maskable interrupt of all processors is their input 1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt
}

/// The devices, and the sleep type of power-off.
fn definitions(devices: &[Place]) -> Sdt {
    let mut code = Vec::new();
    for (number, place) in devices.iter().enumerate() {
        let registers = Memory32Fixed::new(true, place.base as u32, layout::DEVICE_BYTES as u32);
        let interrupt = Interrupt::new(true, true, false, false, place.interrupt);
        let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
        let id = Name::new("_HID".into(), &"LNRO0005");
        let number_name = Name::new("_UID".into(), &(number as u8));
        let resources = Name::new("_CRS".into(), &resources);
        let device =
            Device::new(Path::new(&format!("V{number:03}")), vec![&id, &number_name, &resources]);
        Scope::new("\\_SB_".into(), vec![&device]).to_aml_bytes(&mut code);
    }
    let off = layout::SLEEP_OFF;
    let package = Package::new(vec![&off, &off, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &package).to_aml_bytes(&mut code);
    let mut dsdt = table(b"DSDT", 36, 6);
    dsdt.append_slice(&code);
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    type Memory = vm_memory::GuestMemoryMmap<()>;

    #[test]
    fn the_tables_lead_to_each_other_and_add_up() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let devices = [
            Place { base: layout::DEVICES, interrupt: 16 },
            Place { base: layout::DEVICES + layout::DEVICE_BYTES, interrupt: 17 },
        ];
        write(&memory, 3, &devices).unwrap();
        let word = |address: u64| memory.read_obj::<u32>(GuestAddress(address)).unwrap();
        let long = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        let sum = |address: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        };
        let checked = |signature: &[u8; 4], address: u64| {
            assert_eq!(word(address).to_le_bytes(), *signature);
            assert_eq!(sum(address, word(address + 4) as usize), 0, "{signature:?}");
        };
        let root = layout::ACPI;
        assert_eq!((sum(root, 20), sum(root, 36)), (0, 0));
        let list = long(root + 24);
        checked(b"XSDT", list);
        let (fadt, madt) = (long(list + 36), long(list + 44));
        checked(b"FACP", fadt);
        checked(b"APIC", madt);
        // 44 bytes, three processors, a controller, two overrides, an input.
        assert_eq!(word(madt + 4), 44 + 3 * 8 + 12 + 2 * 10 + 6);
        let dsdt = long(fadt + 140);
        assert_eq!(u64::from(word(fadt + 40)), dsdt);
        checked(b"DSDT", dsdt);
        let facs = u64::from(word(fadt + 36));
        assert_eq!((word(facs).to_le_bytes(), facs % 64), (*b"FACS", 0));
    }
}
