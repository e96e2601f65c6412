//! The kernel, its initramfs and its command line, put into memory as a boot loader does. Source: the
//! kernel's `Documentation/arch/x86/boot.rst`, of the 64-bit boot protocol, and `zero-page.rst`.

use std::{fs::File, io::Seek, path::Path};

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params, setup_header},
    cmdline::Cmdline,
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::{BzImage, KernelLoader, load_cmdline},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{LinuxConfig, LinuxError, layout};

/// Where the 64-bit entry is in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
/// In `xloadflags`: the kernel has that entry.
const XLF_KERNEL_64: u16 = 1;
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Where the first vCPU begins.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) instruction: u64,
}

/// Writes all of it but the ACPI tables.
pub(crate) fn load<M: GuestMemoryBackend>(
    memory: &M,
    config: &LinuxConfig,
) -> Result<Entry, LinuxError> {
    let low_end = config.memory.min(layout::HOLE);
    let path = &config.kernel;
    let mut file = File::open(path).map_err(LinuxError::file("opening the kernel", path))?;
    let bytes = file.seek(std::io::SeekFrom::End(0));
    let bytes = bytes.map_err(LinuxError::file("finding the length of", path))?;
    let no_room = |what, bytes, limit| LinuxError::NoRoom { what, bytes, limit };
    if bytes > low_end.saturating_sub(layout::KERNEL) {
        return Err(no_room("the kernel", bytes, low_end));
    }
    let loaded = BzImage::load(
        memory,
        Some(GuestAddress(layout::KERNEL)),
        &mut file,
        Some(GuestAddress(layout::HIGH_RAM)),
    );
    let loaded = loaded.map_err(|source| LinuxError::Kernel { path: path.clone(), source })?;
    let not_such = |why| LinuxError::NotSuch { path: path.clone(), why };
    let mut header = loaded.setup_header.ok_or_else(|| not_such("it has no header"))?;
    let xloadflags = header.xloadflags;
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(not_such("it does not begin in 64-bit mode"));
    }
    // It unpacks itself in the room that it asks for.
    let kernel_bytes = u64::from(header.init_size).max(bytes);
    let kernel_end = layout::KERNEL + kernel_bytes;
    if kernel_end > low_end {
        return Err(no_room("the kernel when it is unpacked", kernel_bytes, low_end));
    }
    header.type_of_loader = LOADER_UNDEFINED;
    if let Some(path) = &config.initramfs {
        let highest = u64::from(header.initrd_addr_max).saturating_add(1).min(low_end);
        let (address, bytes) = load_initramfs(memory, path, kernel_end, highest)?;
        header.ramdisk_image = address as u32;
        header.ramdisk_size = bytes as u32;
    }
    load_command_line(memory, &config.command_line, &mut header)?;
    write_zero_page(memory, config.memory, header)?;
    write_page_tables(memory)?;
    Ok(Entry { instruction: loaded.kernel_load.0 + ENTRY_64 })
}

/// Puts the file below `highest`, but not below `lowest`.
fn load_initramfs<M: GuestMemoryBackend>(
    memory: &M,
    path: &Path,
    lowest: u64,
    highest: u64,
) -> Result<(u64, u64), LinuxError> {
    const PAGE: u64 = 4096;
    let mut file = File::open(path).map_err(LinuxError::file("opening the initramfs", path))?;
    let metadata = file.metadata().map_err(LinuxError::file("finding the length of", path))?;
    let bytes = metadata.len();
    let address = highest
        .checked_sub(bytes)
        .map(|address| address / PAGE * PAGE)
        .filter(|address| *address >= lowest)
        .ok_or(LinuxError::NoRoom { what: "the initramfs", bytes, limit: highest })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, bytes as usize)
        .map_err(LinuxError::write("the initramfs", address))?;
    Ok((address, bytes))
}

fn load_command_line<M: GuestMemoryBackend>(
    memory: &M,
    text: &str,
    header: &mut setup_header,
) -> Result<(), LinuxError> {
    let refuse = |error: &dyn std::fmt::Display| LinuxError::CommandLine(error.to_string());
    let longest = layout::COMMAND_LINE_MAX.min((header.cmdline_size as usize).saturating_add(1));
    let line = Cmdline::try_from(text, longest).map_err(|error| refuse(&error))?;
    load_cmdline(memory, GuestAddress(layout::COMMAND_LINE), &line)
        .map_err(|error| refuse(&error))?;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    Ok(())
}

fn write_zero_page<M: GuestMemoryBackend>(
    memory: &M,
    ram: u64,
    header: setup_header,
) -> Result<(), LinuxError> {
    let mut parameters =
        boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    let reserved = (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END, E820_RESERVED);
    let mut map = vec![(0, layout::LOW_RAM_END, E820_RAM), reserved];
    map.extend(layout::ram(ram).into_iter().map(|(start, len)| match start {
        0 => (layout::HIGH_RAM, len - layout::HIGH_RAM, E820_RAM),
        start => (start, len, E820_RAM),
    }));
    parameters.e820_entries = map.len() as u8;
    for (entry, (addr, size, r#type)) in parameters.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type };
    }
    let parameters = BootParams::new(&parameters, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&parameters, memory).map_err(|error| {
        LinuxError::Config { why: format!("boot parameters at {:#x}: {error}", layout::ZERO_PAGE) }
    })
}

/// The first GiB in pages of 2 MiB, and the descriptors that the entry has to find.
fn write_page_tables<M: GuestMemoryBackend>(memory: &M) -> Result<(), LinuxError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let put = |address: u64, word: u64| {
        let failed = LinuxError::write("page tables and descriptors", address);
        memory.write_obj(word, GuestAddress(address)).map_err(failed)
    };
    let (level_4, level_3, level_2) =
        (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    put(level_4, level_3 | PRESENT_WRITABLE)?;
    put(level_3, level_2 | PRESENT_WRITABLE)?;
    for index in 0..512 {
        put(level_2 + 8 * index, index << 21 | LARGE | PRESENT_WRITABLE)?;
    }
    // Two of nothing, then code and data, as the protocol numbers them: flat, and code of 64 bits.
    for (index, descriptor) in (0..).zip([0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]) {
        put(layout::GDT + 8 * index, descriptor)?;
    }
    Ok(())
}
