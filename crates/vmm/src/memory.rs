//! The paged memory: its regions for each set-up, its first contents, and what must be in it after
//! a run.

use std::sync::Arc;

use pageferry_memory::{
    Backing, GranuleIndex, GuestAddress, HostAddress, Layout, Mapping, PageSize, Region,
    RegionConfig, State,
};

use pageferry_paging::Delivery;

use crate::{
    Operation, Pattern, Setup, VmConfig, VmError,
    pattern::{DEVICE_WRITTEN, WRITTEN},
    plan::{HIGH_BASE, LOW_BASE, Plan},
    report::Mismatch,
};

/// Where in a page a device thread writes: no word of any payload's.
pub(crate) const DEVICE_OFFSET: u64 = 72;

const PAGE: u64 = PageSize::SIZE_4K.bytes();

/// The regions on both sides of the hole, as the set-up has them. Every granule is absent.
pub(crate) fn regions(config: &VmConfig, plan: &Plan) -> Result<Vec<Arc<Region>>, VmError> {
    [(LOW_BASE, plan.split.low), (HIGH_BASE, plan.split.high)]
        .into_iter()
        .filter(|(_, len)| *len > 0)
        .map(|(base, len)| Ok(Arc::new(Region::new(&region(config, base, len))?)))
        .collect()
}

fn region(config: &VmConfig, base: u64, len: u64) -> RegionConfig {
    let huge = config.page_size != PageSize::SIZE_4K;
    let backing = match (config.setup, huge) {
        (Setup::Missing, false) => Backing::Anonymous,
        (_, false) => Backing::Memfd,
        (_, true) => Backing::Hugetlb(config.page_size),
    };
    let mut region = RegionConfig::new(len, backing);
    region.guest_base = GuestAddress::new(base);
    region.fill_view = config.setup != Setup::Missing;
    region.vcpu_view = config.setup == Setup::MinorOwnView;
    region
}

/// Whether a thread of the host asks for a granule before it touches it in the guest view. With
/// exits, nobody would hear of it otherwise: if KVM has the guest view, what makes a vCPU exit
/// is a memory error for anybody else, and if it has not, only a hybrid delivery reads the queue.
pub(crate) fn must_ask_first(region: &Region, delivery: Delivery) -> bool {
    match delivery {
        Delivery::Hybrid(_) => region.vcpu_view().is_none(),
        delivery => delivery.exits(),
    }
}

/// A view in which memory that is present can be accessed without waiting.
fn view(region: &Region) -> &Mapping {
    region.fill_view().unwrap_or_else(|| region.guest_view())
}

/// Writes the first contents and declares them present: the memory of a machine without a pager.
pub(crate) fn fill(layout: &[Arc<Region>], pattern: Pattern) -> Result<(), VmError> {
    let mut bytes = vec![0; 1 << 20];
    for region in layout {
        let mut offset = 0;
        while offset < region.len() {
            let piece = bytes.len().min((region.len() - offset) as usize);
            let address = GuestAddress::new(region.guest_base().get() + offset);
            pattern.fill(address, &mut bytes[..piece]);
            view(region).write_at(offset, &bytes[..piece])?;
            offset += piece as u64;
        }
        region.page_map().set_present(region.all_granules());
    }
    Ok(())
}

/// Where the host has a guest address in the guest view.
pub(crate) fn host_address(layout: &Layout, guest: GuestAddress) -> Option<HostAddress> {
    let (id, _) = layout.find_guest(guest)?;
    let region = layout.get(id)?;
    let offset = guest.offset_from(region.guest_base())?;
    region.guest_view().range().start().checked_add(offset)
}

/// What comparing all of the memory found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Words compared.
    pub words: u64,
    /// Granules that are present.
    pub granules: u64,
    /// Words that are not what they should be.
    pub mismatches: u64,
    /// The first of them.
    pub first: Option<Mismatch>,
}

/// What each word should be after a run that came to its end.
pub(crate) struct Expectation<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) operation: Operation,
    pub(crate) pattern: Pattern,
    /// Whether device threads wrote to the units that vCPUs touched.
    pub(crate) devices: bool,
}

impl Expectation<'_> {
    /// What a page should be, all of it.
    fn page(&self, start: GuestAddress, offset_in_unit: u64, touched: bool, page: &mut [u8]) {
        self.pattern.fill(start, page);
        let mut turn = |offset: u64, bits: u64| {
            let word = &mut page[offset as usize..offset as usize + 8];
            for (byte, bits) in word.iter_mut().zip(bits.to_le_bytes()) {
                *byte ^= bits;
            }
        };
        if touched && self.operation != Operation::ReadVerify {
            for offset in (0..PAGE).step_by(8) {
                if self.plan.is_accessed(offset_in_unit + offset) {
                    turn(offset, WRITTEN);
                }
            }
        }
        if self.devices {
            turn(DEVICE_OFFSET, DEVICE_WRITTEN);
        }
    }

    /// Compares every word of every granule that is present.
    pub(crate) fn compare(&self, layout: &[Arc<Region>]) -> Result<Verified, VmError> {
        let touched = self.plan.touched();
        let unit_bytes = self.plan.unit.bytes();
        let mut verified = Verified::default();
        let (mut found, mut expected) = ([0; PAGE as usize], [0; PAGE as usize]);
        let mut units_before = 0;
        for region in layout {
            let granule_bytes = region.granule().bytes();
            for granule in (0..region.granules()).map(GranuleIndex::new) {
                if region.page_map().state(granule) != State::Present {
                    continue;
                }
                verified.granules += 1;
                let start = granule.get() * granule_bytes;
                for offset in (start..start + granule_bytes).step_by(PAGE as usize) {
                    let touched = touched[(units_before + offset / unit_bytes) as usize];
                    let address = GuestAddress::new(region.guest_base().get() + offset);
                    self.page(address, offset % unit_bytes, touched, &mut expected);
                    view(region).read_at(offset, &mut found)?;
                    verified.add_page(address, &found, &expected);
                }
            }
            units_before += region.len() / unit_bytes;
        }
        Ok(verified)
    }
}

impl Verified {
    fn add_page(&mut self, start: GuestAddress, found: &[u8], expected: &[u8]) {
        self.words += found.len() as u64 / 8;
        if found == expected {
            return;
        }
        let words = |bytes: &'_ [u8]| -> Vec<u64> {
            let word = |word: &[u8]| u64::from_le_bytes(word.try_into().expect("eight bytes"));
            bytes.chunks_exact(8).map(word).collect()
        };
        for (index, (found, expected)) in (0..).zip(words(found).into_iter().zip(words(expected))) {
            if found != expected {
                self.mismatches += 1;
                let address = GuestAddress::new(start.get() + 8 * index);
                self.first.get_or_insert(Mismatch { address, found, expected });
            }
        }
    }
}
