//! What a machine for Linux is to be.

use std::path::PathBuf;

use pageferry_memory::{Backing, GuestAddress, ImageOffset, PageSize, RegionConfig};

use super::{Disk, LinuxError, layout};
use crate::Setup;

/// What a machine for Linux is to be.
///
/// A state is restored into a machine of the same number of vCPUs, the same memory, and the same
/// disks. Kernel, initramfs and command line matter for booting only.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LinuxConfig {
    /// A bzImage that begins in 64-bit mode.
    pub kernel: PathBuf,
    /// What the kernel unpacks as its first file system.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// RAM in bytes: a multiple of the page size, [`LinuxConfig::MIN_MEMORY`] or more.
    pub memory: u64,
    /// How many vCPUs it has, 1 to [`LinuxConfig::MAX_VCPUS`].
    pub vcpus: u16,
    /// At most seven.
    pub disks: Vec<Disk>,
    /// How the memory is mapped.
    pub setup: Setup,
    /// The size of the memory's pages: 4 KiB or 2 MiB.
    pub page_size: PageSize,
}

impl LinuxConfig {
    /// The least memory in which a distribution's kernel comes far enough to complain.
    pub const MIN_MEMORY: u64 = 128 << 20;
    /// The most vCPUs there can be.
    pub const MAX_VCPUS: u16 = 64;
    /// The serial console; reboot as soon as something is wrong; no PCI bus, which is not there.
    pub const COMMAND_LINE: &str = "console=ttyS0 panic=-1 pci=off";

    /// One vCPU, no disk, set-up (b) with pages of 4 KiB, [`COMMAND_LINE`](Self::COMMAND_LINE).
    pub fn new(kernel: impl Into<PathBuf>, memory: u64) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: None,
            command_line: Self::COMMAND_LINE.to_owned(),
            memory,
            vcpus: 1,
            disks: Vec::new(),
            setup: Setup::Minor,
            page_size: PageSize::SIZE_4K,
        }
    }

    pub(crate) fn check(&self) -> Result<(), LinuxError> {
        let Self { vcpus, memory, page_size, .. } = *self;
        let why = if vcpus == 0 || vcpus > Self::MAX_VCPUS {
            format!("{vcpus} vCPUs: there can be 1 to {}", Self::MAX_VCPUS)
        } else if ![PageSize::SIZE_4K, PageSize::SIZE_2M].contains(&page_size) {
            format!("pages of {page_size}: they are 4 KiB or 2 MiB")
        } else if memory < Self::MIN_MEMORY || !page_size.is_multiple(memory) {
            let least = Self::MIN_MEMORY;
            format!("{memory:#x} bytes of memory: {least:#x} or more, in pages of {page_size}")
        } else if memory > 1 << 40 {
            format!("{memory:#x} bytes of memory: there can be 1 TiB")
        } else if self.disks.len() as u64 >= layout::MAX_DEVICES {
            format!("{} disks: there can be {}", self.disks.len(), layout::MAX_DEVICES - 1)
        } else {
            return Ok(());
        };
        Err(LinuxError::Config { why })
    }

    /// The regions of its memory.
    pub(crate) fn regions(&self) -> Vec<RegionConfig> {
        let backing = match (self.page_size == PageSize::SIZE_4K, self.setup) {
            (true, Setup::Missing) => Backing::Anonymous,
            (true, _) => Backing::Memfd,
            (false, _) => Backing::Hugetlb(self.page_size),
        };
        let mut image_offset = 0;
        let mut regions = Vec::new();
        for (start, len) in layout::ram(self.memory) {
            let mut region = RegionConfig::new(len, backing);
            region.guest_base = GuestAddress::new(start);
            region.fill_view = self.setup != Setup::Missing;
            region.vcpu_view = self.setup == Setup::MinorOwnView;
            region.image_offset = ImageOffset::new(image_offset);
            image_offset += len;
            regions.push(region);
        }
        regions
    }
}
