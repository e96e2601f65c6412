//! Whose memory is tracked, and what `/proc` says of it.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
};

use pageferry_memory::PageSize;
use pageferry_uffd::{Errno, HostAddress, HostRange, Pagemap, PagemapError};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

use crate::{DirtyError, Tracked};

/// Whose memory is tracked.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// That of this process.
    Own,
    /// That of the process with this id.
    Process(u32),
}

impl Target {
    /// The process id.
    pub fn pid(self) -> u32 {
        match self {
            Self::Own => std::process::id(),
            Self::Process(pid) => pid,
        }
    }

    pub(crate) fn path(self, file: &str) -> String {
        match self {
            Self::Own => format!("/proc/self/{file}"),
            Self::Process(pid) => format!("/proc/{pid}/{file}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("this process"),
            Self::Process(pid) => write!(f, "process {pid}"),
        }
    }
}

/// A target that is known to be the same all the time.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) target: Target,
    /// Of another process. Its id may be given to a new one after its end; this tells.
    pidfd: Option<OwnedFd>,
    /// Of this process, whose memory stays the same for as long as it runs.
    pagemap: Option<Pagemap>,
}

impl Watched {
    pub(crate) fn new(target: Target) -> Result<Self, DirtyError> {
        let pid = target.pid();
        let (pidfd, pagemap) = match target {
            Target::Own => (None, Some(Pagemap::open_self()?)),
            Target::Process(pid) => (Some(pidfd(pid)?), None),
        };
        let watched = Self { target, pidfd, pagemap };
        if watched.has_ended() { Err(DirtyError::ProcessGone { pid }) } else { Ok(watched) }
    }

    fn has_ended(&self) -> bool {
        self.pidfd.as_ref().is_some_and(has_ended)
    }

    /// The error, if the process has ended meanwhile: whatever failed then failed for that.
    pub(crate) fn alive(&self) -> Result<(), DirtyError> {
        if self.has_ended() {
            return Err(DirtyError::ProcessGone { pid: self.target.pid() });
        }
        Ok(())
    }

    /// The page map of the memory the target has now.
    ///
    /// It is opened anew for another process: an open one stays with the memory the process had
    /// when it was opened, and after an `execve` it says that nothing is written any more.
    pub(crate) fn with_pagemap<T>(
        &self,
        body: impl FnOnce(&Pagemap) -> Result<T, DirtyError>,
    ) -> Result<T, DirtyError> {
        if let Some(pagemap) = &self.pagemap {
            return body(pagemap);
        }
        let opened = Pagemap::open(self.target.pid());
        self.alive()?;
        match opened {
            Ok(pagemap) => body(&pagemap),
            Err(PagemapError::Open { errno: Errno::NOENT | Errno::SRCH, .. }) => {
                Err(DirtyError::ProcessGone { pid: self.target.pid() })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The mappings the target has now, in ascending order, those that have any of these ranges with
    /// their page size.
    ///
    /// Only huge pages of hugetlbfs have another than the base size, and its files say how large they
    /// are to whoever may look at what is mapped. To everybody else the kernel tells it in a file
    /// for which it walks all pages of all mappings.
    pub(crate) fn mappings_of(&self, ranges: &[Tracked]) -> Result<Vec<Vma>, DirtyError> {
        let mut vmas = self.mappings(Detail::Place)?;
        let wanted = |vma: &Vma| ranges.iter().any(|one| one.range.overlaps(vma.range));
        for vma in vmas.iter_mut().filter(|vma| wanted(vma)) {
            vma.page_size = PageSize::base().bytes();
            if !vma.file {
                continue;
            }
            let (start, end) = (vma.range.start().get(), vma.range.end().get());
            match rustix::fs::statfs(self.target.path(&format!("map_files/{start:x}-{end:x}"))) {
                Ok(found) if found.f_type.cast_unsigned() == HUGETLBFS => {
                    vma.page_size = found.f_bsize.cast_unsigned();
                }
                Ok(_) => {}
                Err(_) => return self.mappings(Detail::PageSize),
            }
        }
        Ok(vmas)
    }

    /// The mappings the target has now, in ascending order.
    pub(crate) fn mappings(&self, detail: Detail) -> Result<Vec<Vma>, DirtyError> {
        let path = self.target.path(detail.file());
        // With room for some hundred mappings from the start, since the kernel makes the text anew for
        // each call, and does not say how long it is.
        let mut text = String::with_capacity(64 << 10);
        let read = File::open(&path).and_then(|mut file| file.read_to_string(&mut text));
        self.alive()?;
        match read {
            Ok(_) => {}
            Err(error) if is_gone(&error) => {
                return Err(DirtyError::ProcessGone { pid: self.target.pid() });
            }
            Err(source) => return Err(DirtyError::Proc { path, source }),
        }
        parse(&text).ok_or_else(|| DirtyError::Proc { path, source: invalid() })
    }
}

/// `HUGETLBFS_MAGIC` of the kernel's `include/uapi/linux/magic.h`.
const HUGETLBFS: u64 = 0x9584_58f6;

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a line that is no mapping")
}

pub(crate) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Whether a process has ended, by its descriptor.
pub(crate) fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    // An error of `poll` says nothing about the process.
    matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(1))
}

pub(crate) fn pidfd(pid: u32) -> Result<OwnedFd, DirtyError> {
    let gone = DirtyError::ProcessGone { pid };
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Err(gone) };
    match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
        Ok(fd) => Ok(fd),
        Err(Errno::SRCH) => Err(gone),
        Err(errno) => {
            let path = format!("pidfd of process {pid}");
            Err(DirtyError::Proc { path, source: errno.into() })
        }
    }
}

/// How much is to be known of a mapping.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Detail {
    /// Where it is.
    Place,
    /// Also its page size, for which the kernel walks all pages.
    PageSize,
}

impl Detail {
    fn file(self) -> &'static str {
        match self {
            Self::Place => "maps",
            Self::PageSize => "smaps",
        }
    }
}

/// A mapping of a process. Source: `proc_pid_maps(5)`, `proc_pid_smaps(5)`.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Vma {
    pub(crate) range: HostRange,
    pub(crate) shared: bool,
    /// Of a file, shared memory and huge pages included.
    pub(crate) file: bool,
    /// In bytes; 0 if it was not asked for.
    pub(crate) page_size: u64,
}

fn parse(text: &str) -> Option<Vec<Vma>> {
    let mut vmas: Vec<Vma> = Vec::new();
    for line in text.lines() {
        if let Some(size) = line.strip_prefix("KernelPageSize:") {
            let kib: u64 = size.trim().strip_suffix(" kB")?.parse().ok()?;
            vmas.last_mut()?.page_size = kib.checked_mul(1024)?;
        } else if line.starts_with(|first: char| matches!(first, '0'..='9' | 'a'..='f')) {
            let mut words = line.split(' ');
            let (start, end) = words.next()?.split_once('-')?;
            let address = |text| u64::from_str_radix(text, 16).ok().map(HostAddress::new);
            let range = HostRange::from_bounds(address(start)?, address(end)?)?;
            let shared = words.next()?.as_bytes().get(3) == Some(&b's');
            // Behind the offset and the device, the inode.
            let file = words.nth(2)? != "0";
            vmas.push(Vma { range, shared, file, page_size: 0 });
        }
    }
    Some(vmas)
}

/// The parts of `range` that are in no mapping.
pub(crate) fn unmapped(range: HostRange, vmas: &[Vma]) -> Vec<HostRange> {
    let mut parts = Vec::new();
    let mut position = range.start();
    let first = vmas.partition_point(|vma| vma.range.end() <= range.start());
    for vma in vmas[first..].iter().take_while(|vma| vma.range.start() < range.end()) {
        parts.extend(HostRange::from_bounds(position, vma.range.start()));
        position = vma.range.end();
    }
    parts.extend(HostRange::from_bounds(position, range.end()));
    parts.retain(|part| !part.is_empty());
    parts
}

/// The parts of `range` that are in mappings, each in one.
pub(crate) fn mapped(range: HostRange, vmas: &[Vma]) -> impl Iterator<Item = (HostRange, Vma)> {
    let first = vmas.partition_point(|vma| vma.range.end() <= range.start());
    vmas[first..]
        .iter()
        .take_while(move |vma| vma.range.start() < range.end())
        .filter_map(move |vma| Some((vma.range.intersection(range)?, *vma)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::from_bounds(HostAddress::new(start), HostAddress::new(end)).unwrap()
    }

    #[test]
    fn mappings_are_read() {
        let text = "00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/a b\n\
                    Size:                328 kB\n\
                    KernelPageSize:        4 kB\n\
                    VmFlags: rd ex mr mw me dw sd\n\
                    7f0000000000-7f0000400000 rw-s 00000000 00:0f 9 /anon_hugepage (deleted)\n\
                    KernelPageSize:     2048 kB\n\
                    ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";
        let vmas = parse(text).unwrap();
        let found: Vec<_> = vmas.iter().map(|vma| (vma.shared, vma.file, vma.page_size)).collect();
        assert_eq!(found, [(false, true, 4096), (true, true, 2 << 20), (false, false, 0)]);
        assert_eq!(vmas[1].range, range(0x7f00_0000_0000, 0x7f00_0040_0000));
        assert_eq!(parse("12-x rw-p"), None);
    }

    #[test]
    fn own_mappings_are_found() {
        let watched = Watched::new(Target::Own).unwrap();
        let local = 0_u64;
        let address = HostAddress::from_ptr(&local);
        for (detail, page) in [(Detail::Place, 0), (Detail::PageSize, 4096)] {
            let vmas = watched.mappings(detail).unwrap();
            assert!(vmas.is_sorted_by_key(|vma| vma.range.start()));
            let stack = vmas.iter().find(|vma| vma.range.contains(address)).unwrap();
            assert_eq!((stack.page_size, stack.shared), (page, false));
        }
    }

    #[test]
    fn what_is_mapped_and_what_is_not() {
        let vma =
            |start, end| Vma { range: range(start, end), shared: false, file: false, page_size: 0 };
        let vmas = [vma(10, 20), vma(20, 30), vma(40, 50)];
        for (wanted, gaps, parts) in [
            (range(12, 28), vec![], vec![range(12, 20), range(20, 28)]),
            (
                range(5, 45),
                vec![range(5, 10), range(30, 40)],
                vec![range(10, 20), range(20, 30), range(40, 45)],
            ),
            (range(30, 40), vec![range(30, 40)], vec![]),
            (range(45, 60), vec![range(50, 60)], vec![range(45, 50)]),
        ] {
            assert_eq!(unmapped(wanted, &vmas), gaps, "{wanted}");
            let found: Vec<_> = mapped(wanted, &vmas).map(|(part, _)| part).collect();
            assert_eq!(found, parts, "{wanted}");
        }
    }

    #[test]
    fn a_process_that_never_was_is_gone() {
        for pid in [u32::MAX, 0, i32::MAX as u32] {
            let error = Watched::new(Target::Process(pid)).unwrap_err();
            assert!(matches!(error, DirtyError::ProcessGone { .. }), "{error}");
        }
    }
}
