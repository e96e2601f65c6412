//! Write protection of another process's memory, by a userfaultfd that it has opened.

use std::{fmt, sync::Arc};

use pageferry_process::{Detail, Mapping, MappingFlags, Process, ProcessError};
use pageferry_uffd::{Errno, Features, HostRange, Pagemap, PagemapError, Userfaultfd};

use super::{
    ProcessTrackError,
    look::{Before, Sight, discarded, page_size},
    pages::Looker,
    runs::Runs,
};
use crate::{
    DirtyError, Tracked,
    protect::{OtherProcess, Protection as Protected, Protector},
    reader::Reader,
    scan::{Failed, Scanner},
};

/// Up to so many bytes of memory that is not there, in one mapping, each page of it is marked as
/// protected. That takes 2 MiB of the target's page tables; a mapping of which more is not there is
/// a reservation, and marking all of it could take more than its memory does.
pub(super) const MARKED_UP_TO: u64 = 1 << 30;

/// Ranges that were registered are put together when there are so many.
const MANY: usize = 1 << 14;

pub(super) struct Protection {
    uffd: Arc<Userfaultfd>,
    protector: OtherProcess,
    /// All that was registered, there still or not.
    registered: Vec<HostRange>,
    /// With the blocking method.
    reader: Option<Reader>,
    process: Process,
    scanner: Scanner,
    looker: Looker,
    calls: u64,
}

impl Protection {
    /// `blocking`: whether the descriptor reports writes, which somebody has to answer then.
    #[allow(unsafe_code, reason = "which process a descriptor serves cannot be found out")]
    pub(super) fn new(
        uffd: Userfaultfd,
        process: &Process,
        blocking: bool,
    ) -> Result<Self, DirtyError> {
        let pid = process.pid();
        let uffd = Arc::new(uffd);
        let reader = blocking.then(|| Reader::start(Arc::clone(&uffd))).transpose()?;
        // SAFETY: the descriptor was opened in the name of that process, which `Process` does not
        // let be this one.
        let protector = unsafe {
            OtherProcess::new(Arc::clone(&uffd), pid.as_raw_nonzero().get().unsigned_abs())
        };
        Ok(Self {
            uffd,
            protector,
            registered: Vec::new(),
            reader,
            process: process.clone(),
            scanner: Scanner::new(),
            looker: Looker::new(),
            calls: 0,
        })
    }

    /// Calls of the kernel so far.
    pub(super) fn calls(&self) -> u64 {
        self.calls + self.scanner.calls + self.looker.calls()
    }

    /// Whether it matters what the kernel says of each mapping now.
    pub(super) fn needs_flags(&self) -> bool {
        self.reader.is_some()
    }

    /// Before these mappings are looked at: how large the pages are that writers may wait for.
    pub(super) fn expect<'a>(&self, mappings: impl Iterator<Item = &'a Mapping>) {
        if let Some(reader) = &self.reader {
            let tracked =
                |mapping: &Mapping| Tracked { range: mapping.range, page: page_size(mapping) };
            reader.set_armed(&mappings.map(tracked).collect::<Vec<_>>());
        }
    }

    /// Finds out what was written in a mapping, and protects that again; or registers and protects
    /// it as a whole.
    pub(super) fn look(
        &mut self,
        pagemap: &Pagemap,
        mapping: &Mapping,
        before: &Before,
    ) -> Result<Sight, ProcessTrackError> {
        let was_tracked = !before.tracked.is_empty();
        if was_tracked && self.may_be_registered(mapping) {
            let new = Runs::from(mapping.range).without(&before.tracked);
            let again = if mapping.shared {
                self.shared(pagemap, mapping, &new)
            } else {
                self.private(pagemap, mapping, before, &new)
            };
            match again {
                Ok(sight) => return Ok(sight),
                Err(Interrupted::Failed(error)) => return Err(error),
                Err(Interrupted::Changed) => {}
            }
        }
        match self.start(pagemap, mapping) {
            Ok(Some(own)) if was_tracked => Ok(Sight::Replaced { own }),
            Ok(Some(own)) => Ok(Sight::Tracked { changed: Runs::default(), own }),
            Ok(None) => Ok(Sight::Untracked),
            Err(Interrupted::Changed) => Ok(Sight::Unsure),
            Err(Interrupted::Failed(error)) => Err(error),
        }
    }

    /// Whether a mapping may be the one that was registered here. One that is not has replaced it,
    /// or was next to where the target moved a mapping: as the kernel puts the two together, both
    /// lose their registration. Protected pages still look protected then, and are not.
    ///
    /// The asynchronous method is told so when it scans. For the other one the mappings are read
    /// with their flags each time.
    fn may_be_registered(&self, mapping: &Mapping) -> bool {
        self.reader.is_none()
            || mapping
                .details
                .is_some_and(|details| details.flags.contains(MappingFlags::USERFAULTFD_WP))
    }

    /// Registers a mapping and protects all of it; answers which pages are the process's own, or
    /// `None` when it is not for us to register.
    fn start(&mut self, pagemap: &Pagemap, mapping: &Mapping) -> Result<Option<Runs>, Interrupted> {
        let range = mapping.range;
        self.calls += 1;
        if self.registered.len() >= MANY {
            self.registered = Runs::of(std::mem::take(&mut self.registered)).into_vec();
        }
        match self.protector.register(Tracked { range, page: page_size(mapping) }) {
            Ok(()) => self.registered.push(range),
            Err(DirtyError::Register { source, .. }) if is_refusal(source.errno()) => {
                return Ok(None);
            }
            Err(error) => return Err(Interrupted::Failed(error.into())),
        }
        let all = Runs::from(range);
        if mapping.shared || is_marked(mapping, &all) {
            self.protect(&all)?;
            return Ok(Some(if mapping.shared { Runs::default() } else { all }));
        }
        let looked = self.looker.own(pagemap, range, false);
        let own = looked.map_err(|error| self.interrupted(error))?;
        let own = own.present.or(&own.swapped);
        // Also what looks protected: it may be writable all the same.
        self.protect(&own)?;
        Ok(Some(own))
    }

    /// Looks again at a private mapping.
    fn private(
        &mut self,
        pagemap: &Pagemap,
        mapping: &Mapping,
        before: &Before,
        new: &Runs,
    ) -> Result<Sight, Interrupted> {
        if is_marked(mapping, new) {
            self.protect(new)?;
        }
        let by_scan = self.reader.is_none();
        let looked = self.looker.own(pagemap, mapping.range, by_scan);
        let own = looked.map_err(|error| self.interrupted(error))?;
        if !by_scan {
            self.protect(&own.written)?;
        }
        let mut discarded = discarded(mapping, before, &own, true);
        if mapping.details.is_some_and(|details| details.flags.contains(MappingFlags::HUGETLB)) {
            let unwritten = own.present.and(&before.own).without(&own.written);
            discarded = discarded.or(&self.zeros(mapping, &unwritten)?);
        }
        let mut now = own.present.or(&own.swapped);
        if mapping.inode == 0 {
            // Whoever copies what is reported may find a page there again, which must then be told
            // from none, should it be discarded, too.
            self.protect(&discarded)?;
            now = now.or(&discarded);
        }
        Ok(Sight::Tracked { changed: own.written.or(&discarded), own: now })
    }

    /// The huge pages among these that begin with zeros.
    ///
    /// One that is discarded leaves a mark, by which it comes back protected when it is read: all
    /// that tells of it is that it is zeros then. A page that begins so is reported each time,
    /// until it is written to.
    fn zeros(&mut self, mapping: &Mapping, pages: &Runs) -> Result<Runs, Interrupted> {
        const SAMPLE: u64 = 256;
        const AT_ONCE: usize = 512;
        let size = page_size(mapping).bytes();
        let pages: Vec<HostRange> = pages
            .iter()
            .flat_map(|run| (0..run.len() / size).map(move |page| run.skip(page * size).take(size)))
            .collect();
        let mut bytes = vec![0; SAMPLE as usize * AT_ONCE.min(pages.len())];
        let mut zeros = Runs::default();
        for pages in pages.chunks(AT_ONCE) {
            let samples: Vec<_> = pages.iter().map(|page| page.take(SAMPLE)).collect();
            let bytes = &mut bytes[..SAMPLE as usize * pages.len()];
            self.calls += 1;
            match self.process.read_scattered(&samples, bytes) {
                Ok(read) if read == bytes.len() => {}
                Ok(_) | Err(ProcessError::Unreadable { .. }) => return Err(Interrupted::Changed),
                Err(error) => return Err(Interrupted::Failed(error.into())),
            }
            for (page, sample) in pages.iter().zip(bytes.chunks(SAMPLE as usize)) {
                if sample.iter().all(|byte| *byte == 0) {
                    zeros.push(*page);
                }
            }
        }
        Ok(zeros)
    }

    /// Looks again at a shared mapping. Every page of it is marked: one that is not there may be so
    /// because the kernel has reclaimed it, after it was written.
    fn shared(
        &mut self,
        pagemap: &Pagemap,
        mapping: &Mapping,
        new: &Runs,
    ) -> Result<Sight, Interrupted> {
        self.protect(new)?;
        let (range, mut changed) = (mapping.range, Runs::default());
        let by_scan = self.reader.is_none();
        let looked = self.scanner.unprotected(pagemap, range, by_scan, |run| changed.push(run));
        looked.map_err(|Failed { error, .. }| self.interrupted(error))?;
        if !by_scan {
            self.protect(&changed)?;
        }
        if self.scanner.must_look_for_holes(page_size(mapping)) {
            let mut holes = Runs::default();
            let looked = self.scanner.holes(pagemap, range, |run| holes.push(run));
            looked.map_err(|Failed { error, .. }| self.interrupted(error))?;
            self.protect(&holes)?;
            changed = changed.or(&holes);
        }
        Ok(Sight::Tracked { changed, own: Runs::default() })
    }

    /// Ends all registrations, and with them all protection; whoever waits goes on.
    ///
    /// Closing the descriptor does so, too, unless there is a copy of it: as in a child of this
    /// process that has not executed its program yet.
    pub(super) fn release(&mut self) -> Result<(), ProcessTrackError> {
        let registered = Runs::of(std::mem::take(&mut self.registered));
        if registered.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for mapping in self.process.mappings(Detail::Names)? {
            // As a whole: a registered mapping may have grown.
            let range = mapping.range;
            if registered.within(range).is_empty() {
                continue;
            }
            match self.uffd.unregister_raw(range) {
                Ok(()) => {}
                // It has gone just now, or what is there has never been ours.
                Err(error) if error.errno() == Some(Errno::INVAL) => {}
                Err(source) => {
                    result = Err(DirtyError::Release { range, source }.into());
                }
            }
        }
        result
    }

    fn protect(&mut self, runs: &Runs) -> Result<(), Interrupted> {
        for run in runs.iter() {
            self.calls += 1;
            match self.protector.protect(run) {
                Ok(Protected::Done) => {}
                Ok(Protected::Gone) => return Err(Interrupted::Changed),
                Err(error) => return Err(Interrupted::Failed(error.into())),
            }
        }
        Ok(())
    }

    fn interrupted(&self, error: PagemapError) -> Interrupted {
        match error {
            // Not all of it is registered any more.
            PagemapError::Scan { errno: Errno::PERM, .. } => Interrupted::Changed,
            source => {
                Interrupted::Failed(ProcessTrackError::Pagemap { pid: self.process.pid(), source })
            }
        }
    }
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protection")
            .field("protector", &self.protector)
            .field("reader", &self.reader)
            .finish_non_exhaustive()
    }
}

enum Interrupted {
    Changed,
    Failed(ProcessTrackError),
}

/// Whether a mapping is not for us to register: it belongs to another userfaultfd, is of a kind
/// that cannot be, can never be written through, or has gone just now.
fn is_refusal(errno: Option<Errno>) -> bool {
    matches!(errno, Some(Errno::BUSY | Errno::INVAL | Errno::PERM))
}

/// Whether pages that are not there are to be marked as protected, in what is new of a private
/// mapping.
///
/// Of a file there are none: what is not there is the file's.
fn is_marked(mapping: &Mapping, new: &Runs) -> bool {
    let resident = mapping.details.map_or(0, |details| details.resident + details.swapped);
    let can = mapping.permissions;
    mapping.inode == 0
        && (can.read || can.write || can.execute)
        && new.bytes().saturating_sub(resident) <= MARKED_UP_TO
}

/// The features that a userfaultfd must have.
pub(super) fn features(blocking: bool) -> Features {
    if blocking { crate::WpBlocking::FEATURES } else { crate::WpAsync::FEATURES }
}
