//! Where the guest has the memory: guest-physical addresses to regions and back.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::*},
    },
};

use pageferry_memory::{GranuleIndex, GuestAddress, HostAddress, HostRange, Layout, RegionId};

use crate::{
    KvmError,
    dirty::{TRACKED_PAGE, TrackedSlot},
};

/// A memslot that shows memory of a region.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Where the guest has its first byte.
    pub guest: GuestAddress,
    /// Its length in bytes.
    pub len: u64,
    /// Whose memory it shows.
    pub region: RegionId,
    /// Where it begins in the region, in bytes.
    pub offset: u64,
    /// Whether it is a KVM_MEM_READONLY slot: the guest's writes go to the embedder.
    pub read_only: bool,
}

/// A byte of guest memory.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Its region.
    pub region: RegionId,
    /// Its granule.
    pub granule: GranuleIndex,
    /// Where it is in the region, in bytes.
    pub offset: u64,
    /// Where KVM has it.
    pub host: HostAddress,
    /// How many bytes of the granule, from this one on, the slot shows.
    pub len: u64,
    /// Whether the slot is read-only for the guest.
    pub read_only: bool,
}

/// The memslots that show paged memory. An embedder that moves or removes memslots says so here:
/// before KVM learns of it when a slot is added, after it when one is removed.
///
/// Changes are rare and may take a lock; vCPUs look things up in a table of their own, which they
/// renew when the generation has changed.
#[derive(Debug)]
pub struct Slots {
    geometry: Box<[Geometry]>,
    table: Mutex<BTreeMap<u32, Slot>>,
    /// Counts changes of the table.
    generation: AtomicU64,
}

/// What is needed to know of a region.
#[derive(Copy, Clone, Debug)]
struct Geometry {
    host: HostAddress,
    len: u64,
    granule_shift: u32,
}

impl Slots {
    pub(crate) fn new(layout: &Layout) -> Self {
        let geometry = layout
            .iter()
            .map(|(_, region)| Geometry {
                host: region.kvm_view().range().start(),
                len: region.len(),
                granule_shift: region.granule().shift(),
            })
            .collect();
        let table = layout
            .iter()
            .map(|(id, region)| {
                let guest = region.guest_base();
                let len = region.len();
                let slot = Slot { guest, len, region: id, offset: 0, read_only: false };
                (u32::from(id.get()), slot)
            })
            .collect();
        Self { geometry, table: Mutex::new(table), generation: AtomicU64::new(0) }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<u32, Slot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a slot, or replaces the one of this number. At first there is one for each region, with
    /// its region's number, at the region's guest address.
    ///
    /// # Errors
    /// When it reaches beyond its region, or another slot has one of its addresses.
    pub fn set(&self, id: u32, slot: Slot) -> Result<(), KvmError> {
        let Slot { guest, len, region, offset, .. } = slot;
        let end = guest.checked_add(len);
        let inside = self
            .geometry
            .get(usize::from(region.get()))
            .is_some_and(|region| offset.checked_add(len).is_some_and(|end| end <= region.len));
        let (true, true, Some(end)) = (inside, len > 0, end) else {
            return Err(KvmError::SlotOutsideRegion { slot: id, guest, len, offset, region });
        };
        let mut table = self.table();
        let other = table.iter().find(|(other, there)| {
            // What is in the table does not wrap.
            **other != id && there.guest < end && guest.get() < there.guest.get() + there.len
        });
        if let Some((&other, _)) = other {
            return Err(KvmError::SlotsOverlap { slot: id, guest, other });
        }
        table.insert(id, slot);
        self.generation.fetch_add(1, Release);
        Ok(())
    }

    /// Removes the slot of this number. False when there is none.
    pub fn remove(&self, id: u32) -> bool {
        let mut table = self.table();
        let removed = table.remove(&id).is_some();
        self.generation.fetch_add(1, Release);
        removed
    }

    /// What the guest has at this address.
    pub fn find(&self, guest: GuestAddress) -> Option<Place> {
        self.snapshot().find(guest)
    }

    /// Where the guest has what KVM has at this address; the lowest, if it is at several.
    pub fn guest_address(&self, host: HostAddress) -> Option<GuestAddress> {
        self.snapshot().guest_address(host)
    }

    /// The slots as trackers of writes take them: their views are those that KVM has
    /// ([`Region::kvm_view`](pageferry_memory::Region::kvm_view)), their numbers those that were said
    /// here. Marks are still to be added, if somebody else than vCPUs writes.
    ///
    /// # Panics
    /// When a slot is no whole number of pages, which KVM takes none of.
    pub fn tracked(&self) -> Vec<TrackedSlot> {
        let table = self.table();
        let tracked = table.iter().map(|(&number, slot)| {
            let host = self.geometry[usize::from(slot.region.get())].host;
            // What is in the table lies in its region.
            let start = HostAddress::new(host.get() + slot.offset);
            assert!(slot.len % TRACKED_PAGE == 0, "slot {number} has {:#x} bytes", slot.len);
            let view = HostRange::new(start, slot.len);
            TrackedSlot { read_only: slot.read_only, ..TrackedSlot::new(number, slot.guest, view) }
        });
        tracked.collect()
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let table = self.table();
        let mut slots: Vec<(Slot, Geometry)> = table
            .values()
            .map(|slot| (*slot, self.geometry[usize::from(slot.region.get())]))
            .collect();
        slots.sort_unstable_by_key(|(slot, _)| slot.guest);
        // Under the lock: exactly this table's generation.
        Snapshot { slots: slots.into(), generation: self.generation.load(Acquire) }
    }
}

/// The table as it was at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    slots: Arc<[(Slot, Geometry)]>,
    generation: u64,
}

impl Snapshot {
    /// Renews it if the table has changed.
    pub(crate) fn renew(&mut self, slots: &Slots) {
        if slots.generation.load(Acquire) != self.generation {
            *self = slots.snapshot();
        }
    }

    pub(crate) fn find(&self, guest: GuestAddress) -> Option<Place> {
        let above = self.slots.partition_point(|(slot, _)| slot.guest <= guest);
        let (slot, region) = self.slots[..above].last()?;
        let into = guest.offset_from(slot.guest)?;
        if into >= slot.len {
            return None;
        }
        let offset = slot.offset + into;
        let granule = offset >> region.granule_shift;
        let left_of_granule = ((granule + 1) << region.granule_shift) - offset;
        Some(Place {
            region: slot.region,
            granule: GranuleIndex::new(granule),
            offset,
            host: region.host.checked_add(offset)?,
            len: left_of_granule.min(slot.len - into),
            read_only: slot.read_only,
        })
    }

    pub(crate) fn guest_address(&self, host: HostAddress) -> Option<GuestAddress> {
        self.slots.iter().find_map(|(slot, region)| {
            let in_region = host.offset_from(region.host)?;
            let into = in_region.checked_sub(slot.offset)?;
            (in_region < region.len && into < slot.len)
                .then(|| slot.guest.checked_add(into))
                .flatten()
        })
    }
}

#[cfg(test)]
mod tests;
