//! What is mapped in a process, and what of it a checkpoint can take.
//!
//! Source: `Documentation/filesystems/proc.rst`, `/proc/PID/maps` and `/proc/PID/smaps`.

mod parse;

use std::fmt;

use bitflags::bitflags;
use pageferry_memory::PageSize;
use pageferry_uffd::HostRange;

pub(crate) use parse::parse;

/// How much is to be found out of the mappings of a process.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Detail {
    /// What `/proc/PID/maps` says. Takes microseconds.
    Names,
    /// What `/proc/PID/smaps` says: [`Mapping::details`] too. The kernel looks at every page for
    /// it, which takes milliseconds for each GiB.
    Full,
}

/// What a process may do in a mapping.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Permissions {
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Execute.
    pub execute: bool,
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (can, letter) in [(self.read, "r"), (self.write, "w"), (self.execute, "x")] {
            f.write_str(if can { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// What a mapping is of.
///
/// Names are bytes as the kernel gives them; they need not be text. A file whose own name ends in
/// ` (deleted)` cannot be told from a deleted one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum MappingName {
    /// Nothing: anonymous memory.
    None,
    /// Anonymous memory that the process has given a name (`PR_SET_VMA_ANON_NAME`).
    Named(Vec<u8>),
    /// The memory that `brk` grows.
    Heap,
    /// The stack of the first thread.
    Stack,
    /// A file, or shared memory, which is a deleted file: `/memfd:NAME`, `/dev/zero`, `/SYSV…`.
    File {
        /// Its path, as the process sees it.
        path: Vec<u8>,
        /// Whether it has been deleted.
        deleted: bool,
    },
    /// Something of the kernel's: `[vdso]`, `[vvar]`, `[vsyscall]`, `[uprobes]`, …
    Kernel(Vec<u8>),
}

bitflags! {
    /// What else is to be known of a mapping (`VmFlags`); only flags that matter to tracking and
    /// checkpoints.
    #[derive(Copy, Clone, PartialEq, Eq, Hash, Debug, Default)]
    pub struct MappingFlags: u32 {
        /// Memory of a device (`io`).
        const IO = 1 << 0;
        /// Page frames without anything behind them that the kernel knows (`pf`).
        const FRAMES = 1 << 1;
        /// Locked into memory (`lo`).
        const LOCKED = 1 << 2;
        /// Not to be part of core dumps (`dd`). A virtual machine's memory often is not.
        const NO_DUMP = 1 << 3;
        /// Not to be inherited by children (`dc`).
        const NO_FORK = 1 << 4;
        /// Children get zeros (`wf`).
        const WIPE_ON_FORK = 1 << 5;
        /// Of huge pages (`ht`).
        const HUGETLB = 1 << 6;
        /// Transparent huge pages are asked for (`hg`).
        const HUGE_PAGES = 1 << 7;
        /// Transparent huge pages are declined (`nh`).
        const NO_HUGE_PAGES = 1 << 8;
        /// It grows downwards when touched below (`gd`).
        const GROWS_DOWN = 1 << 9;
        /// Equal pages may be merged (`mg`).
        const MERGEABLE = 1 << 10;
        /// No commit charge is made for it (`nr`).
        const NO_RESERVE = 1 << 11;
        /// Somebody's userfaultfd is told of missing pages (`um`).
        const USERFAULTFD_MISSING = 1 << 12;
        /// Somebody's userfaultfd is told of writes (`uw`).
        const USERFAULTFD_WP = 1 << 13;
        /// Somebody's userfaultfd is told of pages that are not mapped (`ui`).
        const USERFAULTFD_MINOR = 1 << 14;
        /// Soft-dirty: all of it counts as written (`sd`).
        const SOFT_DIRTY = 1 << 15;
        /// It can be neither unmapped nor changed (`sl`).
        const SEALED = 1 << 16;
        /// A shadow stack (`ss`).
        const SHADOW_STACK = 1 << 17;
    }
}

impl MappingFlags {
    /// The registrations of a userfaultfd. A range can have one userfaultfd only.
    pub const USERFAULTFD: Self =
        Self::USERFAULTFD_MISSING.union(Self::USERFAULTFD_WP).union(Self::USERFAULTFD_MINOR);
}

/// What takes a look at every page to be known.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct Details {
    /// The size of its pages (`KernelPageSize`). Transparent huge pages do not count.
    pub page_size: PageSize,
    /// Bytes in memory (`Rss`, and for huge pages `Shared_Hugetlb` and `Private_Hugetlb`).
    pub resident: u64,
    /// Bytes in memory that are not of a file (`Anonymous`).
    pub anonymous: u64,
    /// Bytes in swap (`Swap`).
    pub swapped: u64,
    /// Flags.
    pub flags: MappingFlags,
}

/// One mapping.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Mapping {
    /// The addresses, in the process.
    pub range: HostRange,
    /// What the process may do there.
    pub permissions: Permissions,
    /// Whether writes are seen by whoever maps the same, instead of being its own.
    pub shared: bool,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The device of the file, major and minor; 0 and 0 without one.
    pub device: (u32, u32),
    /// The number of the file on its device; 0 without one.
    pub inode: u64,
    /// What it is of.
    pub name: MappingName,
    /// With [`Detail::Full`].
    pub details: Option<Details>,
}

/// Why a checkpoint cannot take a mapping.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum NotTaken {
    /// It is the kernel's, and differs with kernel and boot: `[vdso]`, `[vvar]`, …
    Kernel,
    /// It is a device's memory: reading it may do something, or fail.
    Device,
    /// It cannot be told without [`Mapping::details`].
    Unexamined,
}

impl fmt::Display for NotTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "it belongs to the kernel",
            Self::Device => "it is a device's memory",
            Self::Unexamined => "its details were not read",
        })
    }
}

impl Mapping {
    /// Whether no file is behind it: what is there is only the process's, or shared with those it
    /// came from. Shared memory counts as a file.
    pub fn is_anonymous(&self) -> bool {
        self.inode == 0
            && matches!(
                self.name,
                MappingName::None | MappingName::Named(_) | MappingName::Heap | MappingName::Stack
            )
    }

    /// Whether a checkpoint can take it: its bytes can be read, and are of the process or of a file.
    ///
    /// That it may not be read *by the process* (`---`, a guard page) does not count, nor that it
    /// is not for core dumps.
    ///
    /// # Errors
    ///
    /// The reason why not.
    pub fn takeable(&self) -> Result<(), NotTaken> {
        if matches!(self.name, MappingName::Kernel(_)) {
            return Err(NotTaken::Kernel);
        }
        let details = self.details.ok_or(NotTaken::Unexamined)?;
        if details.flags.intersects(MappingFlags::IO | MappingFlags::FRAMES) {
            return Err(NotTaken::Device);
        }
        Ok(())
    }

    /// Whether `other` is the same mapping, or a part of it, or it a part of that: of the same
    /// thing at the same place. Details that were read of one may then be taken for the other,
    /// counts aside; so they need not be read in a stop.
    pub fn is_part_of_same(&self, other: &Self) -> bool {
        // The place in the file from which address 0 would be mapped.
        let base = |mapping: &Self| mapping.offset.wrapping_sub(mapping.range.start().get());
        self.range.overlaps(other.range)
            && self.shared == other.shared
            && (self.device, self.inode) == (other.device, other.inode)
            && self.name == other.name
            && (self.inode == 0 || base(self) == base(other))
    }
}
