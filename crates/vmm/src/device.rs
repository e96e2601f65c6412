//! Device threads: threads of the host that read and write the guest's memory while it runs, as
//! the emulation of a device does.

use pageferry_memory::{GuestAddress, Layout, Mapping, PageSize, Region, State};
use pageferry_paging::Pager;

use crate::{
    Pattern,
    control::Control,
    memory::{self, DEVICE_OFFSET},
    pattern::{DEVICE_WRITTEN, WRITTEN},
    plan::{self, Plan},
    report::{DeviceReport, Mismatch},
};

const PAGE: u64 = PageSize::SIZE_4K.bytes();

/// What a device thread works with.
pub(crate) struct Device<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) plan: &'a Plan,
    pub(crate) pattern: Pattern,
    pub(crate) pager: Option<&'a Pager>,
    pub(crate) control: &'a Control,
    pub(crate) seed: u64,
}

impl Device<'_> {
    /// Goes once through all pages, beginning somewhere: reads a word that payloads change and one
    /// that none does, and writes one that none reads.
    pub(crate) fn run(&self) -> DeviceReport {
        let mut report = DeviceReport::default();
        let pages = self.layout.total_bytes() / PAGE;
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
        let Some((id, granule)) = self.layout.find_guest(address) else { return };
        let Some(region) = self.layout.get(id) else { return };
        if let Some(pager) = self.pager
            && memory::must_ask_first(region, pager.chosen().delivery)
        {
            let host = memory::host_address(self.layout, address);
            if !host.is_some_and(|host| pager.resolve(host)) {
                report.poisoned += 1;
                return;
            }
        } else if region.page_map().state(granule) == State::Poisoned {
            // Known before it is touched; a page that turns out to be poisoned when it is touched is
            // SIGBUS, as for the emulation of any device.
            report.poisoned += 1;
            return;
        }
        let view = View { region, view: region.guest_view() };
        let first = self.pattern.word(address);
        view.check(address, 0, &[first, first ^ WRITTEN], self.pattern, report);
        view.check(address, DEVICE_OFFSET + 8, &[], self.pattern, report);
        view.write(address, DEVICE_OFFSET, self.pattern);
        report.pages += 1;
    }

    fn address(&self, page: u64) -> GuestAddress {
        let per_unit = self.plan.unit.bytes() / PAGE;
        let start = self.plan.address(page / per_unit);
        GuestAddress::new(start.get() + page % per_unit * PAGE)
    }
}

struct View<'a> {
    region: &'a Region,
    view: &'a Mapping,
}

impl View<'_> {
    fn offset(&self, address: GuestAddress) -> u64 {
        address.get() - self.region.guest_base().get()
    }

    /// Compares a word with what it is at first, or with any of `others`.
    fn check(
        &self,
        page: GuestAddress,
        offset: u64,
        others: &[u64],
        pattern: Pattern,
        report: &mut DeviceReport,
    ) {
        let address = GuestAddress::new(page.get() + offset);
        let mut bytes = [0; 8];
        self.view.read_at(self.offset(address), &mut bytes).expect("inside the region");
        let (found, expected) = (u64::from_le_bytes(bytes), pattern.word(address));
        if found != expected && !others.contains(&found) {
            report.mismatches += 1;
            report.first_mismatch.get_or_insert(Mismatch { address, found, expected });
        }
    }

    fn write(&self, page: GuestAddress, offset: u64, pattern: Pattern) {
        let address = GuestAddress::new(page.get() + offset);
        let word = pattern.word(address) ^ DEVICE_WRITTEN;
        self.view.write_at(self.offset(address), &word.to_le_bytes()).expect("inside the region");
    }
}
