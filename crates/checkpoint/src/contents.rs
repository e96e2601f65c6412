//! What of a process's memory belongs into an image, and reading it.

use std::fs::File;

use pageferry_image::{ImageMapping, MappingFlags as ImageFlags};
use pageferry_memory::{ImageOffset, PageSize};
use pageferry_process::{Mapping, MappingFlags, MappingName, Process, ProcessError};
use pageferry_uffd::{HostAddress, HostRange, Pagemap, PagemapEntry, PagemapError};
use rustix::{fs::SeekFrom, io::Errno};

use crate::{
    destination::{DestinationError, InProgress},
    populated::Populated,
    ranges::{clip, union},
};

/// Bytes read at once.
const PIECE: u64 = 1 << 20;

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
    /// What the memory behind the mapping has there.
    Behind,
}

fn kind(origin: Origin, entry: PagemapEntry) -> Kind {
    let own = entry.swapped() || entry.present() && !entry.file();
    match origin {
        Origin::Zeros if entry.present() || entry.swapped() => Kind::Bytes,
        Origin::Zeros => Kind::Zero,
        Origin::File if own => Kind::Bytes,
        Origin::File => Kind::File,
        // A private copy lies over what others may share.
        Origin::Shared if own => Kind::Bytes,
        Origin::Shared => Kind::Behind,
    }
}

/// Copies memory of a process into images.
pub(crate) struct Reader<'a> {
    process: &'a Process,
    stands_still: bool,
    pagemap: Pagemap,
    populated: Populated,
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
    /// What had bytes.
    pub(crate) had: Vec<HostRange>,
    /// Ranges that could not be read: of a running process they may have gone.
    pub(crate) unread: Vec<HostRange>,
}

impl<'a> Reader<'a> {
    /// `stands_still`: the process is stopped, and stays so while it is read.
    pub(crate) fn new(process: &'a Process, stands_still: bool) -> Result<Self, ProcessError> {
        Ok(Self {
            process,
            stands_still,
            pagemap: process.pagemap()?,
            populated: Populated::default(),
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
        if origin == Origin::Shared && mapping.shared {
            return self.copy_file(mapping, range, image, copied, progress);
        }
        let beyond = self.runs(
            range,
            |entry| kind(origin, entry),
            |reader, kind, run| {
                match kind {
                    Kind::Zero => {
                        reader.check_served(mapping, run)?;
                        image.zero(run.into())?;
                    }
                    Kind::File => image.gone(run.into())?,
                    Kind::Behind => {
                        return reader.copy_file(mapping, run, image, copied, progress);
                    }
                    Kind::Bytes => {
                        copied.had.push(run);
                        reader.bytes(mapping, run, image, copied)?;
                    }
                }
                if progress(run.len()) { Ok(()) } else { Err(Trouble::Stopped) }
            },
        )?;
        copied.unread.extend(beyond);
        Ok(())
    }

    /// Adds to `found` what of `range`, whose bytes were copied once, may be discarded now.
    pub(crate) fn find_discarded(
        &mut self,
        mapping: &Mapping,
        range: HostRange,
        found: &mut Vec<HostRange>,
    ) -> Result<(), PagemapError> {
        if mapping.shared {
            // What was discarded from memory that is shared is a hole in the file behind it.
            let mut at = range.start();
            while at < range.end() {
                let rest = HostRange::new(at, range.end().get() - at.get());
                let extents = self.extents(mapping);
                let (has_data, len) = extents.at(mapping, rest);
                let run = HostRange::new(at, len);
                found.extend((!has_data || extents.file.is_none()).then_some(run));
                at = run.end();
            }
            return Ok(());
        }
        let is_discarded: fn(PagemapEntry) -> bool = match origin(mapping) {
            Origin::Zeros => |entry| !entry.present() && !entry.swapped(),
            // The mark of a tracker reads like a page that is swapped out and protected.
            Origin::File | Origin::Shared => |entry| {
                let here = entry.present() && !entry.file();
                !here && (!entry.swapped() || entry.uffd_wp())
            },
        };
        self.runs(range, is_discarded, |_, discarded, run| {
            found.extend(discarded.then_some(run));
            Ok(())
        })
        .map(drop)
    }

    /// Tells `each` the stretches of `range` whose pages are of one kind, in order. Answers with
    /// what lies beyond the end of the address space.
    fn runs<K: Copy + PartialEq, E: From<PagemapError>>(
        &mut self,
        range: HostRange,
        kind: impl Fn(PagemapEntry) -> K,
        mut each: impl FnMut(&mut Self, K, HostRange) -> Result<(), E>,
    ) -> Result<Option<HostRange>, E> {
        let mut at = range.start();
        let mut found: Vec<(PagemapEntry, HostRange)> = Vec::new();
        while at < range.end() {
            let rest = HostRange::new(at, range.end().get() - at.get());
            found.clear();
            at = self.populated.look(&self.pagemap, rest, &mut found)?;
            if at == rest.start() {
                return Ok(Some(rest));
            }
            for run in found.chunk_by(|a, b| kind(a.0) == kind(b.0)) {
                let (start, end) = (run[0].1.start(), run[run.len() - 1].1.end());
                each(self, kind(run[0].0), HostRange::new(start, end.get() - start.get()))?;
            }
        }
        Ok(None)
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
        let mut at = range.start();
        while at < range.end() {
            let rest = HostRange::new(at, range.end().get() - at.get());
            let (has_data, len) = self.extents(mapping).at(mapping, rest);
            let run = HostRange::new(at, len.min(if has_data { PIECE } else { u64::MAX }));
            if has_data {
                copied.had.push(run);
                self.bytes(mapping, run, image, copied)?;
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

    /// What is behind the mapping. Ranges come in order: it serves for all of a mapping.
    fn extents(&mut self, mapping: &Mapping) -> &mut Extents {
        let known = self.extents.take().filter(|known| known.of == mapping.range);
        self.extents.insert(known.unwrap_or_else(|| Extents::of(self.process, mapping)))
    }

    /// What could not be read of a process that stands still: there, it is broken memory; not
    /// there, it is no memory, as behind the end of a file.
    fn settle(
        &mut self,
        mapping: &Mapping,
        page: HostRange,
        image: &mut dyn InProgress,
        copied: &mut Copied,
    ) -> Result<(), Trouble> {
        let mut entry = [PagemapEntry::from_bits(0)];
        let known = self.pagemap.read_entries(page, &mut entry)?;
        let present = known == 1 && entry[0].present();
        // Behind the end of a file there is no page, but there may be the mark of a tracker, which
        // reads as a page that is swapped out.
        let swapped = known == 1 && entry[0].swapped();
        let swapped =
            swapped && !(mapping.inode != 0 && self.extents(mapping).ends_before(mapping, page));
        if present || swapped {
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
        mapping: &Mapping,
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
                    self.settle(mapping, unread, image, copied)?;
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

    /// Whether the file is known to end before `range`.
    fn ends_before(&self, mapping: &Mapping, range: HostRange) -> bool {
        let offset = mapping.offset + (range.start().get() - mapping.range.start().get());
        let length = self.file.as_ref().and_then(|file| file.metadata().ok());
        length.is_some_and(|metadata| metadata.len() <= offset)
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

/// What of `ranges` lies in mappings that images have contents of. Both are in ascending order.
pub(crate) fn taken_of(mappings: &[Mapping], ranges: &[HostRange]) -> Vec<HostRange> {
    let taken = mappings.iter().filter(|mapping| is_taken(mapping));
    taken.flat_map(|mapping| clip(ranges, mapping.range)).collect()
}

/// Whether others may write to what an image has of this mapping.
pub(crate) fn is_others_too(mapping: &Mapping) -> bool {
    is_taken(mapping) && origin(mapping) == Origin::Shared
}

/// `changed`, and the same pages of files wherever else they are mapped: what is written through
/// one shared mapping is changed in all of them, and in private ones where they have no copy yet.
pub(crate) fn with_aliases(mappings: &[Mapping], changed: Vec<HostRange>) -> Vec<HostRange> {
    let all_of: Vec<&Mapping> = mappings.iter().filter(|mapping| is_others_too(mapping)).collect();
    let same = |a: &Mapping, b: &Mapping| (a.device, a.inode) == (b.device, b.inode);
    let mut all = changed.clone();
    for mapping in all_of.iter().filter(|mapping| mapping.shared) {
        for other in all_of.iter().filter(|other| other.range != mapping.range) {
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
    fn what_is_written_here_is_changed_there() {
        // The same file twice, at different offsets, and another one.
        let mappings = [shared(0, 10, 0, 7), shared(100, 110, 5, 7), shared(200, 210, 0, 8)];
        let changed = with_aliases(&mappings, vec![range(4, 7), range(200, 201)]);
        assert_eq!(changed, [range(4, 7), range(100, 102), range(200, 201)]);
        let back = with_aliases(&mappings, vec![range(104, 110)]);
        assert_eq!(back, [range(9, 10), range(104, 110)]);
        // A private mapping shows what is written through a shared one, and not the other way.
        let private = Mapping { shared: false, ..shared(300, 310, 0, 7) };
        let mappings = [shared(0, 10, 0, 7), private];
        let changed = with_aliases(&mappings, vec![range(4, 5), range(306, 307)]);
        assert_eq!(changed, [range(4, 5), range(304, 305), range(306, 307)]);
    }
}
