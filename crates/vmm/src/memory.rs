//! The guest's memory: the paged regions for each set-up, their first contents, and what must be
//! in them after a run.
//!
//! | who | through which view |
//! |---|---|
//! | KVM | each region's `kvm_view`: the guest view, or its own |
//! | loading the boot memory (`boot.rs`) | the guest view: it is never paged |
//! | device threads (`device.rs`) | the guest view, where they fault as the guest does |
//! | filling and comparing the paged memory (here) | the fill view, where nothing faults; the guest view of anonymous memory, which has no other, and where only what is present is touched |

use std::sync::Arc;

use pageferry_memory::{
    Backing, GranuleIndex, GuestAddress, PageSize, Region, RegionConfig, State,
    adapter::{self, AdapterError, RegionMemory, View},
};
use pageferry_paging::Delivery;
use vm_memory::{Bytes, GuestMemoryBackend, GuestRegionCollection};

use crate::{
    Operation, Pattern, Setup, VmConfig, VmError,
    pattern::{DEVICE_WRITTEN, ROUND, WRITTEN},
    plan::{Counted, HIGH_BASE, LOW_BASE, Plan},
    report::Mismatch,
};

/// Where in a page a device thread writes: no word of any payload's.
pub(crate) const DEVICE_OFFSET: u64 = 72;

const PAGE: u64 = PageSize::SIZE_4K.bytes();

/// The memory of a machine by guest address, as `vm-memory` and what builds on it use it.
pub type GuestMemory = GuestRegionCollection<RegionMemory>;

/// The paged regions in a view in which memory that is present can be accessed without waiting.
pub(crate) fn contents(
    config: &VmConfig,
    regions: &[Arc<Region>],
) -> Result<GuestMemory, AdapterError> {
    let view = if has_fill_view(config) { View::Fill } else { View::Guest };
    adapter::guest_memory(regions, view)
}

fn has_fill_view(config: &VmConfig) -> bool {
    config.setup != Setup::Missing
}

/// The regions on both sides of the hole, as the set-up has them. Every granule is absent.
pub(crate) fn regions(config: &VmConfig, plan: &Plan) -> Result<Vec<Arc<Region>>, VmError> {
    [(LOW_BASE, plan.split.low), (HIGH_BASE, plan.split.high)]
        .into_iter()
        .filter(|(_, len)| *len > 0)
        .map(|(base, len)| Ok(Arc::new(Region::new(&region(config, base, len))?)))
        .collect()
}

/// Whether these regions are what [`regions`] would have made, but for the kind of their memory.
pub(crate) fn check_regions(
    config: &VmConfig,
    plan: &Plan,
    regions: &[Arc<Region>],
) -> Result<(), VmError> {
    let wanted = [(LOW_BASE, plan.split.low), (HIGH_BASE, plan.split.high)];
    let wanted = wanted.into_iter().filter(|(_, len)| *len > 0);
    let are = regions.iter().map(|region| (region.guest_base().get(), region.len()));
    if !wanted.clone().eq(are.clone()) {
        let [wanted, are] =
            [wanted.collect(), are.collect()].map(|ranges: Vec<_>| format!("{ranges:#x?}"));
        return Err(VmError::Config { why: format!("memory at {are} that should be at {wanted}") });
    }
    for region in regions {
        let views = (region.fill_view().is_some(), region.vcpu_view().is_some());
        if views != (has_fill_view(config), config.setup == Setup::MinorOwnView) {
            let why = format!("a region without the views of set-up {}", config.setup);
            return Err(VmError::Config { why });
        }
    }
    Ok(())
}

/// A region as the set-up has it.
pub(crate) fn region(config: &VmConfig, base: u64, len: u64) -> RegionConfig {
    let huge = config.page_size != PageSize::SIZE_4K;
    let backing = match (config.setup, huge) {
        (Setup::Missing, false) => Backing::Anonymous,
        (_, false) => Backing::Memfd,
        (_, true) => Backing::Hugetlb(config.page_size),
    };
    let mut region = RegionConfig::new(len, backing);
    region.guest_base = GuestAddress::new(base);
    region.fill_view = has_fill_view(config);
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

/// Writes the first contents and declares them present: the memory of a machine without a pager.
pub(crate) fn fill(contents: &GuestMemory, pattern: Pattern) -> Result<(), VmError> {
    let mut bytes = vec![0; 1 << 20];
    for region in contents.iter().map(RegionMemory::region) {
        let mut offset = 0;
        while offset < region.len() {
            let piece = bytes.len().min((region.len() - offset) as usize);
            let address = GuestAddress::new(region.guest_base().get() + offset);
            pattern.fill(address, &mut bytes[..piece]);
            contents.write_slice(&bytes[..piece], address.into())?;
            offset += piece as u64;
        }
        region.page_map().set_present(region.all_granules());
    }
    Ok(())
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

/// What has become of a unit.
#[derive(Copy, Clone)]
enum Unit {
    AsAtFirst,
    Written,
    Counted(Counted),
}

/// What each word should be after a run that came to its end.
pub(crate) struct Expectation<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) operation: Operation,
    pub(crate) pattern: Pattern,
    /// Whether device threads wrote to the units that vCPUs touched.
    pub(crate) devices: bool,
    /// How far it came in each unit, if the payload counts.
    pub(crate) counted: Option<Vec<Counted>>,
}

impl Expectation<'_> {
    /// What a page should be, all of it, where `found` is there.
    fn page(
        &self,
        start: GuestAddress,
        offset_in_unit: u64,
        unit: Unit,
        found: &[u8],
        page: &mut [u8],
    ) {
        self.pattern.fill(start, page);
        let mut turn = |offset: u64, bits: u64| {
            let word = &mut page[offset as usize..offset as usize + 8];
            for (byte, bits) in word.iter_mut().zip(bits.to_le_bytes()) {
                *byte ^= bits;
            }
        };
        for offset in (0..PAGE).step_by(8) {
            if !self.plan.is_accessed(offset_in_unit + offset) {
                continue;
            }
            let first = self.pattern.word(GuestAddress::new(start.get() + offset));
            match unit {
                Unit::Counted(Counted { rounds, perhaps_more }) => {
                    let bits = |rounds: u64| rounds.wrapping_mul(ROUND);
                    let more = (first ^ bits(rounds + 1)).to_le_bytes();
                    let at = offset as usize;
                    let is_more = perhaps_more && found[at..at + 8] == more;
                    turn(offset, bits(rounds + u64::from(is_more)));
                }
                Unit::Written => turn(offset, WRITTEN),
                Unit::AsAtFirst => {}
            }
        }
        if self.devices {
            turn(DEVICE_OFFSET, DEVICE_WRITTEN);
        }
    }

    /// Compares every word of every granule that is present.
    pub(crate) fn compare(&self, contents: &GuestMemory) -> Result<Verified, VmError> {
        let touched = self.plan.touched();
        let unit = |number: usize| match &self.counted {
            Some(counted) => Unit::Counted(counted[number]),
            None if touched[number] && self.operation != Operation::ReadVerify => Unit::Written,
            None => Unit::AsAtFirst,
        };
        let unit_bytes = self.plan.unit.bytes();
        let mut verified = Verified::default();
        let (mut found, mut expected) = ([0; PAGE as usize], [0; PAGE as usize]);
        let mut units_before = 0;
        for region in contents.iter().map(RegionMemory::region) {
            let granule_bytes = region.granule().bytes();
            for granule in (0..region.granules()).map(GranuleIndex::new) {
                if region.page_map().state(granule) != State::Present {
                    continue;
                }
                verified.granules += 1;
                let start = granule.get() * granule_bytes;
                for offset in (start..start + granule_bytes).step_by(PAGE as usize) {
                    let unit = unit((units_before + offset / unit_bytes) as usize);
                    let address = GuestAddress::new(region.guest_base().get() + offset);
                    contents.read_slice(&mut found, address.into())?;
                    self.page(address, offset % unit_bytes, unit, &found, &mut expected);
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
