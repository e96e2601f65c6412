//! KVM's dirty log and dirty ring behind the interface of all trackers.

use pageferry_dirty::{DirtyError, DirtySet, Harvested, Marker, Method, Tracked, Tracker};
use pageferry_memory::{HostAddress, HostRange, PageSize};

use super::{DirtyLog, DirtyRing, TRACKED_PAGE, TrackedSlot};
use crate::KvmError;

/// A [`DirtyLog`] or a [`DirtyRing`] as a [`Tracker`].
///
/// * Addresses are those of the mappings that the slots show to KVM
///   ([`Region::kvm_view`](pageferry_memory::Region::kvm_view)). A range may be a part of a slot, or reach
///   over several; what two slots show is found through either.
/// * KVM tracks whole slots, by 4 KiB, whatever the memory is made of. A range with larger pages
///   ([`Tracked::page`]) has every page dirty in which anything was written.
/// * [`arm`](Tracker::arm) sets KVM_MEM_LOG_DIRTY_PAGES in each slot that has any of the ranges, one
///   KVM_SET_USER_MEMORY_REGION each, which waits for all vCPUs to leave the old table of slots (some
///   milliseconds), and write-protects what the guest has mapped, huge pages split as they are
///   written. With [`LogMode::InitiallySet`](super::LogMode::InitiallySet) it only sets the flag, and
///   the first harvest reports every page. In a slot that was armed already it costs nothing, and
///   reports what was written there before, too.
/// * [`disarm`](Tracker::disarm) removes the flag, again one call a slot. KVM forgets what it knew and
///   makes huge pages again as the guest touches them. Nothing else of a slot is changed.
/// * [`harvest`](Tracker::harvest) reports what vCPUs and KVM wrote, and what is in the slots'
///   [`WriteMarks`](super::WriteMarks): writes by the process itself are in no log. Nor is what
///   `madvise` discards. What a vCPU writes just then, or has in its processor only
///   ([`DirtyRing`] says when), is for the next one.
/// * [`Harvested::whole`] has what is armed when KVM did not say which pages of it were written.
///   Nothing is ever gone: a slot that is removed is for the embedder to disarm before.
///
/// A ring's [`RingCollector`](super::RingCollector) is asked for before.
///
/// ```no_run
/// use pageferry_dirty::{DirtySet, Tracked, Tracker};
/// use pageferry_kvm::{VmPager, dirty::{DirtyLog, KvmTracker}};
///
/// # fn example(vm: &kvm_ioctls::VmFd, pager: &VmPager) -> Result<(), Box<dyn std::error::Error>> {
/// let slots = pager.slots().tracked();
/// let ranges: Vec<_> = slots.iter().map(|slot| Tracked::base(slot.view)).collect();
/// // SAFETY: the pager has been told of the slots as they are.
/// let log = unsafe { DirtyLog::new(vm, slots, DirtyLog::mode_of(vm)) }?;
/// let mut tracker: Box<dyn Tracker> = Box::new(KvmTracker::from(log));
/// tracker.arm(&ranges)?;
/// let dirty = DirtySet::new(&ranges)?;
/// tracker.harvest(&dirty)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct KvmTracker {
    kvm: Kvm,
    /// Where the slots show their memory, by their numbers.
    views: Box<[(u32, HostRange)]>,
    /// In ascending order.
    ranges: Vec<Tracked>,
}

#[derive(Debug)]
enum Kvm {
    Log(DirtyLog),
    Ring(DirtyRing),
}

/// What of it was armed before is armed no longer.
impl From<DirtyLog> for KvmTracker {
    fn from(mut log: DirtyLog) -> Self {
        let views = views(log.slots());
        disarm(&mut || log.disarm());
        Self { kvm: Kvm::Log(log), views, ranges: Vec::new() }
    }
}

/// What of it was armed before is armed no longer.
impl From<DirtyRing> for KvmTracker {
    fn from(mut ring: DirtyRing) -> Self {
        let views = views(&ring.slots());
        disarm(&mut || ring.disarm());
        Self { kvm: Kvm::Ring(ring), views, ranges: Vec::new() }
    }
}

fn views(slots: &[TrackedSlot]) -> Box<[(u32, HostRange)]> {
    let mut views: Vec<_> = slots.iter().map(|slot| (slot.slot, slot.view)).collect();
    views.sort_unstable_by_key(|(slot, _)| *slot);
    views.into()
}

/// A slot that stays armed costs time, and reports nothing wrong.
fn disarm(work: &mut dyn FnMut() -> Result<(), KvmError>) {
    if let Err(error) = work() {
        tracing::warn!("turning tracking off: {error}");
    }
}

impl KvmTracker {
    fn failed(&self) -> impl FnOnce(KvmError) -> DirtyError + use<> {
        let method = self.method();
        move |source| DirtyError::Other { method, source: Box::new(source) }
    }

    fn is_armed(&self) -> bool {
        match &self.kvm {
            Kvm::Log(log) => log.is_armed(),
            Kvm::Ring(ring) => ring.is_armed(),
        }
    }

    /// All of it must be shown by slots, of whole pages, and be armed by nobody.
    fn check(&self, new: &[Tracked]) -> Result<(), DirtyError> {
        for (n, &Tracked { range, page }) in new.iter().enumerate() {
            let whole = page.is_multiple(range.start().get()) && page.is_multiple(range.len());
            if range.is_empty() || !whole {
                return Err(DirtyError::Unaligned { range, page });
            }
            let mut others = self.ranges.iter().chain(&new[..n]).map(|other| other.range);
            if let Some(other) = others.find(|other| other.overlaps(range)) {
                return Err(DirtyError::Overlaps { range, other });
            }
            if !self.shows(range) {
                return Err(DirtyError::NotOwned { range });
            }
        }
        Ok(())
    }

    /// Whether slots, together, show all of it.
    fn shows(&self, range: HostRange) -> bool {
        let mut start = range.start();
        while start < range.end() {
            let ends = self.views.iter().filter(|(_, view)| view.contains(start));
            let Some(end) = ends.map(|(_, view)| view.end()).max() else { return false };
            start = end;
        }
        true
    }
}

/// Notes what slots report, where it is armed.
struct Noting<'a> {
    views: &'a [(u32, HostRange)],
    ranges: &'a [Tracked],
    marker: Marker<'a>,
    /// The slot of the last word, and the armed range: most often those of the next.
    last: Option<(u32, HostRange)>,
    armed: HostRange,
}

impl<'a> Noting<'a> {
    fn new(views: &'a [(u32, HostRange)], ranges: &'a [Tracked], into: &'a DirtySet) -> Self {
        let armed = HostRange::new(HostAddress::new(0), 0);
        Self { views, ranges, marker: into.marker(), last: None, armed }
    }

    fn note(&mut self, slot: u32, first: u64, bits: u64) {
        let view = match self.last {
            Some((last, view)) if last == slot => view,
            _ => {
                let found = self.views.binary_search_by_key(&slot, |(slot, _)| *slot);
                let Ok(found) = found else { return };
                self.last = Some(self.views[found]);
                self.views[found].1
            }
        };
        let Some(highest) = bits.checked_ilog2() else { return };
        let word = view.skip(first * TRACKED_PAGE).take((u64::from(highest) + 1) * TRACKED_PAGE);
        if !self.armed.contains_range(word) {
            let at = self.ranges.partition_point(|armed| armed.range.end() <= word.start());
            match self.ranges.get(at) {
                Some(armed) if armed.range.contains_range(word) => self.armed = armed.range,
                Some(_) => return self.note_parts(word, bits),
                None => return,
            }
        }
        self.marker.mark_word(word.start(), PageSize::SIZE_4K, bits);
    }

    /// How many pages were noted.
    fn finish(self) -> u64 {
        self.marker.finish()
    }

    /// A word of which a part is armed.
    fn note_parts(&mut self, word: HostRange, bits: u64) {
        for page in (0..u64::BITS).filter(|page| bits >> page & 1 == 1) {
            let page = word.skip(u64::from(page) * TRACKED_PAGE).take(TRACKED_PAGE);
            let at = self.ranges.partition_point(|armed| armed.range.end() <= page.start());
            if self.ranges.get(at).is_some_and(|armed| armed.range.contains_range(page)) {
                self.marker.mark(page);
            }
        }
    }
}

impl Tracker for KvmTracker {
    fn method(&self) -> Method {
        match self.kvm {
            Kvm::Log(_) => Method::KvmLog,
            Kvm::Ring(_) => Method::KvmRing,
        }
    }

    fn ranges(&self) -> &[Tracked] {
        &self.ranges
    }

    fn arm(&mut self, ranges: &[Tracked]) -> Result<(), DirtyError> {
        self.check(ranges)?;
        let wanted = |slot: &TrackedSlot| ranges.iter().any(|new| new.range.overlaps(slot.view));
        let armed = match &mut self.kvm {
            Kvm::Log(log) => log.arm_slots(&wanted),
            Kvm::Ring(ring) => ring.arm_slots(&wanted),
        };
        armed.map_err(self.failed())?;
        self.ranges.extend_from_slice(ranges);
        self.ranges.sort_unstable_by_key(|tracked| tracked.range.start());
        Ok(())
    }

    fn harvest(&mut self, into: &DirtySet) -> Result<Harvested, DirtyError> {
        if let Some(armed) = self.ranges.iter().find(|armed| !into.covers(armed.range)) {
            return Err(DirtyError::NotInSet { range: armed.range });
        }
        let mut harvested = Harvested::default();
        if self.ranges.is_empty() {
            return Ok(harvested);
        }
        let mut noting = Noting::new(&self.views, &self.ranges, into);
        let told = &mut |slot, first, bits| noting.note(slot, first, bits);
        let result = match &mut self.kvm {
            Kvm::Log(log) => log.harvest_words(told),
            Kvm::Ring(ring) => ring.harvest_words(told),
        };
        harvested.pages = noting.finish();
        match result {
            Ok(found) => {
                harvested.calls = found.calls;
                if found.whole {
                    harvested.whole = self.ranges.iter().map(|armed| armed.range).collect();
                }
                Ok(harvested)
            }
            Err(error) => {
                if !self.is_armed() {
                    // It could not be armed again, and what was written meanwhile is not known.
                    for armed in self.ranges.drain(..) {
                        into.mark(armed.range);
                    }
                }
                Err(self.failed()(error))
            }
        }
    }

    fn disarm(&mut self) -> Result<(), DirtyError> {
        self.ranges.clear();
        let disarmed = match &mut self.kvm {
            Kvm::Log(log) => log.disarm(),
            Kvm::Ring(ring) => ring.disarm(),
        };
        disarmed.map_err(self.failed())
    }
}
