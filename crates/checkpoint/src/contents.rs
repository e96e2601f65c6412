//! What of a process's memory belongs into an image, and reading it.

use std::fs::File;

use pageferry_image::{ImageMapping, MappingFlags as ImageFlags};
use pageferry_memory::{ImageOffset, PageSize};
use pageferry_process::{Mapping, MappingFlags, MappingName, Process, ProcessError};
use pageferry_uffd::{HostAddress, HostRange, Pagemap, PagemapEntry, PagemapError};
use rustix::{fs::SeekFrom, io::Errno};

use crate::destination::{DestinationError, InProgress};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;
/// Entries of the page map read at once.
const ENTRIES: usize = 1 << 13;

/// A mapping as an image keeps it.
pub(crate) fn described(mapping: &Mapping) -> ImageMapping {
    let mut flags = ImageFlags::empty();
    let mut set = |condition: bool, flag| flags.set(flag, condition);
    set(mapping.permissions.read, ImageFlags::READ);
    set(mapping.permissions.write, ImageFlags::WRITE);
    set(mapping.permissions.execute, ImageFlags::EXECUTE);
    set(mapping.shared, ImageFlags::SHARED);
    set(mapping.is_anonymous(), ImageFlags::ANONYMOUS);
    set(mapping.name == MappingName::Heap, ImageFlags::HEAP);
    set(mapping.name == MappingName::Stack, ImageFlags::STACK);
    set(matches!(mapping.name, MappingName::Kernel(_)), ImageFlags::KERNEL);
    let details = mapping.details.map(|details| details.flags).unwrap_or_default();
    set(details.contains(MappingFlags::HUGETLB), ImageFlags::HUGETLB);
    set(details.contains(MappingFlags::LOCKED), ImageFlags::LOCKED);
    set(details.contains(MappingFlags::NO_DUMP), ImageFlags::NO_DUMP);
    set(details.contains(MappingFlags::GROWS_DOWN), ImageFlags::GROWS_DOWN);
    ImageMapping {
        range: mapping.range.into(),
        flags,
        page_size: mapping.details.map_or_else(PageSize::base, |details| details.page_size),
        file_offset: mapping.offset,
        device: mapping.device,
        inode: mapping.inode,
        name: name(mapping),
    }
}

fn name(mapping: &Mapping) -> Vec<u8> {
    match &mapping.name {
        MappingName::Heap => b"[heap]".to_vec(),
        MappingName::Stack => b"[stack]".to_vec(),
        MappingName::Named(name) => [b"[anon:", name.as_slice(), b"]"].concat(),
        MappingName::File { path, deleted: false } => path.clone(),
        MappingName::File { path, deleted: true } => [path, b" (deleted)".as_slice()].concat(),
        MappingName::Kernel(name) => name.clone(),
        // Nothing, and whatever else comes without a name of its own.
        _ => Vec::new(),
    }
}

/// Where the pages of a mapping come from, when the process has not touched them.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Origin {
    /// Nowhere: they are zero.
    Zeros,
    /// A file with a name of its own, which has them still: only pages that the process changed
    /// are its own.
    File,
    /// Memory that others may share, which is there whether this process has mapped it or not.
    Shared,
}

fn origin(mapping: &Mapping) -> Origin {
    let of_file = matches!(mapping.name, MappingName::File { deleted: false, .. });
    let hugetlb = mapping.details.is_some_and(|d| d.flags.contains(MappingFlags::HUGETLB));
    match (mapping.shared, mapping.inode) {
        (false, 0) => Origin::Zeros,
        // Anonymous huge pages have a file only inside the kernel.
        (false, _) if hugetlb && !of_file => Origin::Zeros,
        // Shared memory and deleted files are gone when the last process that has them is; other
        // files stay where they are.
        (true, _) if of_file => Origin::File,
        (true, _) => Origin::Shared,
        (false, _) if of_file => Origin::File,
        // A private copy of a deleted file: its pages are nowhere else.
        (false, _) => Origin::Shared,
    }
}

/// Whether an image has contents of this mapping, or only mentions it.
pub(crate) fn is_taken(mapping: &Mapping) -> bool {
    // What is shared with a file that stays is the file's, whoever writes it.
    mapping.takeable().is_ok() && !(mapping.shared && origin(mapping) == Origin::File)
}

/// Why contents could not be brought into an image.
#[derive(Debug)]
pub(crate) enum Trouble {
    Process(ProcessError),
    Pagemap(PagemapError),
    Destination(DestinationError),
    /// Another userfaultfd serves this range: its absent pages cannot be had.
    Served(HostRange),
    Stopped,
}

impl From<ProcessError> for Trouble {
    fn from(error: ProcessError) -> Self {
        Self::Process(error)
    }
}

impl From<PagemapError> for Trouble {
    fn from(error: PagemapError) -> Self {
        Self::Pagemap(error)
    }
}

impl From<DestinationError> for Trouble {
    fn from(error: DestinationError) -> Self {
        Self::Destination(error)
    }
}

/// What of a page goes into the image.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Kind {
    /// Its bytes.
    Bytes,
    /// That it is zero.
    Zero,
    /// That it is the file's.
    File,
}

fn kind(origin: Origin, entry: PagemapEntry) -> Kind {
    let own = entry.swapped() || entry.present() && !entry.file();
    match origin {
        Origin::Zeros if entry.present() || entry.swapped() => Kind::Bytes,
        Origin::Zeros => Kind::Zero,
        Origin::File if own => Kind::Bytes,
        Origin::File => Kind::File,
        Origin::Shared => Kind::Bytes,
    }
}

/// Copies memory of a process into images.
pub(crate) struct Reader<'a> {
    process: &'a Process,
    stands_still: bool,
    pagemap: Pagemap,
    entries: Vec<PagemapEntry>,
    buffer: Vec<u8>,
    /// Of the mapping read last.
    extents: Option<Extents>,
}

/// What came of copying.
#[derive(Clone, Default, Debug)]
pub(crate) struct Copied {
    /// Bytes read from the process.
    pub(crate) bytes: u64,
    /// Bytes of broken memory.
    pub(crate) broken: u64,
    /// Private memory that had bytes.
    pub(crate) own: Vec<HostRange>,
    /// Ranges that could not be read: of a running process they may have gone.
    pub(crate) unread: Vec<HostRange>,
}

impl<'a> Reader<'a> {
    /// `stands_still`: the process is stopped, and stays so while it is read.
    pub(crate) fn new(process: &'a Process, stands_still: bool) -> Result<Self, PagemapError> {
        Ok(Self {
            process,
            stands_still,
            pagemap: Pagemap::open(process.pid().as_raw_nonzero().get().unsigned_abs())?,
            entries: vec![PagemapEntry::from_bits(0); ENTRIES],
            buffer: vec![0; PIECE as usize],
            extents: None,
        })
    }

    /// Copies `range`, which lies inside `mapping`. `progress` is told how many bytes were looked
    /// at, and says whether to go on.
    pub(crate) fn copy(
        &mut self,
        mapping: &Mapping,
        range: HostRange,
        image: &mut dyn InProgress,
        copied: &mut Copied,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Trouble> {
        let origin = origin(mapping);
        if origin == Origin::Shared {
            return self.copy_file(mapping, range, image, copied, progress);
        }
        let page = PageSize::base().bytes();
        let mut at = range.start();
        while at < range.end() {
            let rest = HostRange::new(at, range.end().get() - at.get());
            let count = self.pagemap.read_entries(rest, &mut self.entries)?;
            if count == 0 {
                // Beyond the end of the address space.
                copied.unread.push(rest);
                return Ok(());
            }
            let kinds: Vec<Kind> =
                self.entries[..count].iter().map(|entry| kind(origin, *entry)).collect();
            for run in kinds.chunk_by(|a, b| a == b) {
                let run_range = HostRange::new(at, run.len() as u64 * page);
                match run[0] {
                    Kind::Zero => {
                        self.check_served(mapping, run_range)?;
                        image.zero(run_range.into())?;
                    }
                    Kind::File => image.gone(run_range.into())?,
                    Kind::Bytes => {
                        copied.own.push(run_range);
                        self.bytes(run_range, image, copied)?;
                    }
                }
                at = run_range.end();
                if !progress(run_range.len()) {
                    return Err(Trouble::Stopped);
                }
            }
        }
        Ok(())
    }

    /// Adds the pages of `range` that are not there to `found`.
    pub(crate) fn find_absent(
        &mut self,
        range: HostRange,
        found: &mut Vec<HostRange>,
    ) -> Result<(), PagemapError> {
        let page = PageSize::base().bytes();
        let mut at = range.start();
        while at < range.end() {
            let rest = HostRange::new(at, range.end().get() - at.get());
            let count = self.pagemap.read_entries(rest, &mut self.entries)?;
            if count == 0 {
                return Ok(());
            }
            let is_absent = |entry: &PagemapEntry| !entry.present() && !entry.swapped();
            for run in self.entries[..count].chunk_by(|a, b| is_absent(a) == is_absent(b)) {
                let run_range = HostRange::new(at, run.len() as u64 * page);
                if is_absent(&run[0]) {
                    found.push(run_range);
                }
                at = run_range.end();
            }
        }
        Ok(())
    }

    /// Copies a range that is a file's, from the file's extents: holes are zero, and reading them
    /// would fill them.
    fn copy_file(
        &mut self,
        mapping: &Mapping,
        range: HostRange,
        image: &mut dyn InProgress,
        copied: &mut Copied,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), Trouble> {
        // Ranges come in order: what is known of the mapping serves for all of them.
        if self.extents.as_ref().is_none_or(|known| known.of != mapping.range) {
            self.extents = Some(Extents::of(self.process, mapping));
        }
        let mut at = range.start();
        while at < range.end() {
            let rest = HostRange::new(at, range.end().get() - at.get());
            let known = self.extents.as_mut().map(|extents| extents.at(mapping, rest));
            let (has_data, len) = known.unwrap_or((true, rest.len()));
            let run = HostRange::new(at, len.min(if has_data { PIECE } else { u64::MAX }));
            if has_data {
                self.bytes(run, image, copied)?;
            } else {
                self.check_served(mapping, run)?;
                image.zero(run.into())?;
            }
            at = run.end();
            if !progress(run.len()) {
                return Err(Trouble::Stopped);
            }
        }
        Ok(())
    }

    /// What could not be read of a process that stands still: there, it is broken memory; not
    /// there, it is no memory, as behind the end of a file.
    fn settle(
        &mut self,
        page: HostRange,
        image: &mut dyn InProgress,
        copied: &mut Copied,
    ) -> Result<(), Trouble> {
        let mut entry = [PagemapEntry::from_bits(0)];
        let known = self.pagemap.read_entries(page, &mut entry)?;
        if known == 1 && (entry[0].present() || entry[0].swapped()) {
            image.poison(page.into())?;
            copied.broken += page.len();
        } else {
            image.gone(page.into())?;
        }
        Ok(())
    }

    /// An absent page that somebody would bring when it is touched is not zero.
    fn check_served(&self, mapping: &Mapping, range: HostRange) -> Result<(), Trouble> {
        let served = MappingFlags::USERFAULTFD_MISSING;
        match mapping.details {
            Some(details) if details.flags.intersects(served) => Err(Trouble::Served(range)),
            _ => Ok(()),
        }
    }

    fn bytes(
        &mut self,
        range: HostRange,
        image: &mut dyn InProgress,
        copied: &mut Copied,
    ) -> Result<(), Trouble> {
        let page = PageSize::base().bytes();
        let mut at = range.start();
        while at < range.end() {
            let want = (range.end().get() - at.get()).min(PIECE) as usize;
            let got = match self.process.read_memory(at, &mut self.buffer[..want]) {
                Ok(got) => got as u64 / page * page,
                Err(ProcessError::Unreadable { .. }) => 0,
                Err(error) => return Err(error.into()),
            };
            if got == 0 {
                // One page at a time, until something can be read again.
                let unread = HostRange::new(at, page);
                if self.stands_still {
                    self.settle(unread, image, copied)?;
                } else {
                    copied.unread.push(unread);
                }
                at = unread.end();
                continue;
            }
            image.write(ImageOffset::new(at.get()), &self.buffer[..got as usize])?;
            copied.bytes += got;
            at = HostAddress::new(at.get() + got);
        }
        Ok(())
    }
}

/// Where the file behind a mapping has data.
struct Extents {
    of: HostRange,
    /// None where the kernel does not let it be opened: it takes `CAP_CHECKPOINT_RESTORE`. All of
    /// it is read then.
    file: Option<File>,
    /// What was asked last, in the file. Finding the end of an extent takes a look at each of its
    /// pages, so it is found once.
    last: Option<Extent>,
}

#[derive(Copy, Clone)]
struct Extent {
    start: u64,
    end: u64,
    has_data: bool,
}

impl Extents {
    fn of(process: &Process, mapping: &Mapping) -> Self {
        let (start, end) = (mapping.range.start().get(), mapping.range.end().get());
        let pid = process.pid().as_raw_nonzero();
        let file = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")).ok();
        Self { of: mapping.range, file, last: None }
    }

    /// Whether there is data at the start of `range`, and for how many bytes of it that holds.
    fn at(&mut self, mapping: &Mapping, range: HostRange) -> (bool, u64) {
        let offset = mapping.offset + (range.start().get() - mapping.range.start().get());
        let extent = match self.last {
            Some(last) if (last.start..last.end).contains(&offset) => last,
            _ => match &self.file {
                Some(file) => extent(file, offset),
                None => Extent { start: offset, end: u64::MAX, has_data: true },
            },
        };
        self.last = Some(extent);
        (extent.has_data, range.len().min(extent.end - offset))
    }
}

/// What is at an offset of a file, in whole pages. What nobody knows is taken for data: reading
/// finds out.
fn extent(file: &File, offset: u64) -> Extent {
    let page = PageSize::base().bytes();
    let unknown = Extent { start: offset, end: u64::MAX, has_data: true };
    let known = |end: u64, has_data| Extent { start: offset, end, has_data };
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data / page > offset / page => known(data / page * page, false),
        Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(offset)) {
            // A page that is partly data is data.
            Ok(hole) => known(hole.next_multiple_of(page).max(offset + page), true),
            Err(_) => unknown,
        },
        // No data from here on: a hole, or the end of the file, behind which nothing can be read.
        Err(Errno::NXIO) => match rustix::fs::seek(file, SeekFrom::End(0)) {
            Ok(length) if length > offset => known(length.next_multiple_of(page), false),
            _ => unknown,
        },
        Err(_) => unknown,
    }
}

/// The parts of `ranges` (ascending, not overlapping) inside `within`.
pub(crate) fn clip(ranges: &[HostRange], within: HostRange) -> impl Iterator<Item = HostRange> {
    let first = ranges.partition_point(|range| range.end() <= within.start());
    ranges[first..]
        .iter()
        .take_while(move |range| range.start() < within.end())
        .filter_map(move |range| {
            let start = range.start().max(within.start());
            HostRange::from_bounds(start, range.end().min(within.end()))
        })
        .filter(|range| !range.is_empty())
}

/// What of `ranges` lies in mappings that images have contents of. Both are in ascending order.
pub(crate) fn taken_of(mappings: &[Mapping], ranges: &[HostRange]) -> Vec<HostRange> {
    let taken = mappings.iter().filter(|mapping| is_taken(mapping));
    taken.flat_map(|mapping| clip(ranges, mapping.range)).collect()
}

/// What of `before` is not in `now` any more. Both are ascending and do not overlap.
pub(crate) fn lost(before: &[HostRange], now: &[HostRange]) -> Vec<HostRange> {
    let mut lost = Vec::new();
    for range in before {
        let mut at = range.start();
        for kept in clip(now, *range) {
            if at < kept.start() {
                lost.push(HostRange::new(at, kept.start().get() - at.get()));
            }
            at = kept.end();
        }
        if at < range.end() {
            lost.push(HostRange::new(at, range.end().get() - at.get()));
        }
    }
    lost
}

/// `changed`, and the same pages of files wherever else they are mapped shared: what is written
/// through one mapping is changed in all of them.
pub(crate) fn with_aliases(mappings: &[Mapping], changed: Vec<HostRange>) -> Vec<HostRange> {
    let shared: Vec<&Mapping> =
        mappings.iter().filter(|mapping| mapping.shared && is_taken(mapping)).collect();
    let same = |a: &Mapping, b: &Mapping| (a.device, a.inode) == (b.device, b.inode);
    let mut all = changed.clone();
    for mapping in &shared {
        for other in shared.iter().filter(|other| other.range != mapping.range) {
            if !same(mapping, other) {
                continue;
            }
            for run in clip(&changed, mapping.range) {
                // From an address to the file, and from the file to an address.
                let in_file = run.start().get() - mapping.range.start().get() + mapping.offset;
                let end = in_file + run.len();
                let low = in_file.max(other.offset);
                let high = end.min(other.offset.saturating_add(other.range.len()));
                if low < high {
                    let start = other.range.start().get() + (low - other.offset);
                    all.push(HostRange::new(HostAddress::new(start), high - low));
                }
            }
        }
    }
    union(all)
}

/// Ascending, not overlapping, and no two of them adjacent.
pub(crate) fn union(mut ranges: Vec<HostRange>) -> Vec<HostRange> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start());
    let mut united: Vec<HostRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match united.last_mut() {
            Some(last) if range.start() <= last.end() => {
                let end = last.end().max(range.end());
                *last = HostRange::new(last.start(), end.get() - last.start().get());
            }
            _ => united.push(range),
        }
    }
    united
}

#[cfg(test)]
mod tests {
    use pageferry_process::Permissions;

    use super::*;

    fn range(start: u64, end: u64) -> HostRange {
        HostRange::new(HostAddress::new(start << 12), (end - start) << 12)
    }

    fn shared(start: u64, end: u64, offset: u64, inode: u64) -> Mapping {
        Mapping {
            range: range(start, end),
            permissions: Permissions { read: true, write: true, execute: false },
            shared: true,
            offset: offset << 12,
            device: (0, 1),
            inode,
            name: MappingName::File { path: b"/memfd:x".to_vec(), deleted: true },
            details: Some(pageferry_process::Details {
                page_size: PageSize::base(),
                resident: 0,
                anonymous: 0,
                swapped: 0,
                flags: MappingFlags::empty(),
            }),
        }
    }

    #[test]
    fn clipped_and_united() {
        let ranges = [range(2, 4), range(6, 8), range(9, 12)];
        let inside: Vec<_> = clip(&ranges, range(3, 10)).collect();
        assert_eq!(inside, [range(3, 4), range(6, 8), range(9, 10)]);
        assert_eq!(clip(&ranges, range(4, 6)).count(), 0);
        let mixed = vec![range(6, 8), range(1, 3), range(3, 5), range(7, 9), range(20, 20)];
        assert_eq!(union(mixed), [range(1, 5), range(6, 9)]);
    }

    #[test]
    fn what_is_gone_is_found() {
        let before = [range(0, 10), range(20, 30), range(40, 41)];
        let now = [range(2, 4), range(6, 25), range(28, 50)];
        assert_eq!(lost(&before, &now), [range(0, 2), range(4, 6), range(25, 28)]);
        assert_eq!(lost(&now, &now), []);
        assert_eq!(lost(&before, &[]).len(), 3);
    }

    #[test]
    fn what_is_written_here_is_changed_there() {
        // The same file twice, at different offsets, and another one.
        let mappings = [shared(0, 10, 0, 7), shared(100, 110, 5, 7), shared(200, 210, 0, 8)];
        let changed = with_aliases(&mappings, vec![range(4, 7), range(200, 201)]);
        assert_eq!(changed, [range(4, 7), range(100, 102), range(200, 201)]);
        let back = with_aliases(&mappings, vec![range(104, 110)]);
        assert_eq!(back, [range(9, 10), range(104, 110)]);
    }
}
