//! Where things are in the guest's physical memory.
//!
//! ```text
//!           0  RAM: interrupt vectors (unused)
//!       0x500  descriptors of the boot
//!      0x7000  boot parameters ("zero page")
//!      0x9000  page tables of the boot: the first GiB, mapped one to one
//!     0x20000  command line
//!     0xe0000  ACPI tables, reserved; where firmware has them
//!    0x100000  RAM
//!   0x1000000  the kernel as it is in its file, then the room it asks for
//!         ...  the initramfs, as high as the kernel takes it
//!  0xd0000000  registers of virtio devices, a page each
//!  0xfec00000  I/O interrupt controller; 0xfee00000 local ones
//! 0x100000000  the rest of the RAM, if there are more than 3 GiB
//! ```

/// What firmware would keep for itself, below 1 MiB.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;
pub(crate) const GDT: u64 = 0x500;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const STACK: u64 = 0x8ff0;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// With the zero byte at its end.
pub(crate) const COMMAND_LINE_MAX: usize = 0x1000;
/// The first place where Linux looks for the tables' root.
pub(crate) const ACPI: u64 = 0xe_0000;
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
pub(crate) const KERNEL: u64 = 0x100_0000;

/// Where RAM below 4 GiB ends at the latest.
pub(crate) const HOLE: u64 = 3 << 30;
pub(crate) const HOLE_END: u64 = 4 << 30;

pub(crate) const DEVICES: u64 = 0xd000_0000;
pub(crate) const DEVICE_BYTES: u64 = 0x1000;
pub(crate) const MAX_DEVICES: u64 = 8;
/// What each device interrupts with: inputs of the I/O interrupt controller that no old device has.
pub(crate) const FIRST_INTERRUPT: u32 = 16;
pub(crate) const LAST_INTERRUPT: u32 = 23;

pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages for KVM's own use, and one, on some processors of Intel's.
pub(crate) const TSS: usize = 0xfffb_d000;
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;

/// The registers of ACPI's fixed hardware: events, then control.
pub(crate) const PM_EVENTS: u16 = 0x600;
pub(crate) const PM_CONTROL: u16 = 0x604;
/// The interrupt of ACPI, which nothing here raises.
pub(crate) const PM_INTERRUPT: u16 = 9;
/// Sleep type of "off", as the tables say and [`PM_CONTROL`] understands it.
pub(crate) const SLEEP_OFF: u8 = 5;
/// Writing [`RESET_VALUE`] there resets the machine: the keyboard controller's command port.
pub(crate) const RESET_PORT: u16 = 0x64;
pub(crate) const RESET_VALUE: u8 = 0xfe;
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_INTERRUPT: u32 = 4;

/// The parts of so much RAM on both sides of the hole: where they begin, and their lengths.
pub(crate) fn ram(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE);
    let parts = [(0, low), (HOLE_END, bytes - low)];
    parts.into_iter().filter(|(_, len)| *len > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram(HOLE), [(0, HOLE)]);
        assert_eq!(ram(HOLE + 4096), [(0, HOLE), (HOLE_END, 4096)]);
    }
}
