//! Device threads: threads of the host that read and write the guest's memory while it runs, as
//! the emulation of a device does: by guest address, through [`GuestMemory`], in the guest view.

use pageferry_memory::{GuestAddress, HostAddress, PageSize, State};
use pageferry_paging::Pager;
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::{
    GuestMemory, Pattern,
    control::Control,
    memory::{self, DEVICE_OFFSET},
    pattern::{DEVICE_WRITTEN, WRITTEN},
    plan::{self, Plan},
    report::{DeviceReport, Mismatch},
    vm::Marks,
};

const PAGE: u64 = PageSize::SIZE_4K.bytes();

/// What a device thread works with.
pub(crate) struct Device<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) plan: &'a Plan,
    pub(crate) pattern: Pattern,
    pub(crate) marks: &'a Marks,
    pub(crate) pager: Option<&'a Pager>,
    pub(crate) control: &'a Control,
    pub(crate) seed: u64,
}

impl Device<'_> {
    /// Goes once through all pages, beginning somewhere: reads a word that payloads change and one
    /// that none does, and writes one that none reads.
    pub(crate) fn run(&self) -> DeviceReport {
        let mut report = DeviceReport::default();
        let pages = self.plan.total_units() * self.plan.unit.bytes() / PAGE;
        let begin = plan::mix(self.seed) % pages;
        for page in (begin..pages).chain(0..begin) {
            if self.control.is_stopped() {
                break;
            }
            self.page(page, &mut report);
        }
        report
    }

    fn page(&self, page: u64, report: &mut DeviceReport) {
        let address = self.address(page);
        if !self.can_come(address) {
            report.poisoned += 1;
            return;
        }
        let first = self.pattern.word(address);
        self.check(address, 0, &[first, first ^ WRITTEN], report);
        self.check(address, DEVICE_OFFSET + 8, &[], report);
        self.write(address, DEVICE_OFFSET);
        report.pages += 1;
    }

    /// Makes sure that an access waits for the page at worst.
    fn can_come(&self, address: GuestAddress) -> bool {
        let region =
            self.memory.find_region(address.into()).expect("in the guest's memory").region();
        if let Some(pager) = self.pager
            && memory::must_ask_first(region, pager.chosen().delivery)
        {
            let host = self.memory.get_host_address(address.into()).expect("in the guest's memory");
            return pager.resolve(HostAddress::from_ptr(host));
        }
        // Known before it is touched; a page that turns out to be poisoned when it is touched is
        // SIGBUS, as for the emulation of any device.
        let granule = region.granule_at_guest(address).expect("in its region");
        region.page_map().state(granule) != State::Poisoned
    }

    fn address(&self, page: u64) -> GuestAddress {
        let per_unit = self.plan.unit.bytes() / PAGE;
        let start = self.plan.address(page / per_unit);
        GuestAddress::new(start.get() + page % per_unit * PAGE)
    }

    /// Compares a word with what it is at first, or with any of `others`.
    fn check(&self, page: GuestAddress, offset: u64, others: &[u64], report: &mut DeviceReport) {
        let address = GuestAddress::new(page.get() + offset);
        let found = self.memory.read_obj(address.into()).expect("in the guest's memory");
        let expected = self.pattern.word(address);
        if found != expected && !others.contains(&found) {
            report.mismatches += 1;
            report.first_mismatch.get_or_insert(Mismatch { address, found, expected });
        }
    }

    fn write(&self, page: GuestAddress, offset: u64) {
        let address = GuestAddress::new(page.get() + offset);
        let word = self.pattern.word(address) ^ DEVICE_WRITTEN;
        self.memory.write_obj(word, address.into()).expect("in the guest's memory");
        self.marks.mark(address, 8);
    }
}
