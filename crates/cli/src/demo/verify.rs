//! Comparing every page with the source, byte by byte, once all is done.

use std::sync::Arc;

use anyhow::Context as _;
use pageferry::{
    memory::{GranuleIndex, GranuleRange, GuestAddress, Layout, Mapping, Region, State},
    migrate::{Endpoint, PeerOptions, PeerReader, core::WireSpan},
    paging::Pager,
};
use pageferry_vmm::Vm;

use super::{guest::Left, pattern::PAGE};
use crate::exit::Failure;

/// What was compared, and what differed.
#[derive(Copy, Clone, Debug, Default)]
pub(super) struct Verified {
    pub(super) pages: u64,
    pub(super) wrong: u64,
    /// The first page that differs.
    pub(super) first_wrong: Option<u64>,
    /// Pages that differ from the source's, as they should.
    pub(super) written: u64,
}

/// What is verified.
pub(super) struct Subject {
    pub(super) layout: Layout,
    pub(super) left: Left,
    /// For a KVM guest.
    pub(super) vm: Option<Arc<Vm>>,
    /// Whom to ask for pages that may be absent still, where nobody would hear of it otherwise.
    pub(super) ask: Option<Arc<Pager>>,
}

impl Subject {
    /// Fetches everything again, over a connection of its own, and compares it with the memory:
    /// every byte must be the source's, but for what the guest made of it.
    pub(super) fn verify(
        &self,
        endpoint: &Endpoint,
        progress: impl Fn(u64),
    ) -> anyhow::Result<Verified> {
        let mut reader = PeerReader::connect(endpoint, PeerOptions::default())
            .map_err(|error| Failure::source_lost(format!("verifying: {error}")))?;
        let mut verified = Verified::default();
        for (id, region) in self.layout.iter() {
            let granule = region.granule().bytes();
            let at_once = ((1 << 20) / granule).max(1);
            let mut theirs = vec![0; (at_once * granule) as usize];
            let mut ours = vec![0; (at_once * granule) as usize];
            let mut first = 0;
            while first < region.granules() {
                let count = at_once.min(region.granules() - first);
                let len = (count * granule) as usize;
                let span = WireSpan { region: id.get(), first, count: u32::try_from(count)? };
                reader
                    .read(span, &mut theirs[..len])
                    .map_err(|error| Failure::source_lost(format!("verifying {span}: {error}")))?;
                let granules = GranuleRange::new(GranuleIndex::new(first), count);
                self.view(region, granules)?.read_at(first * granule, &mut ours[..len])?;
                let pages = theirs[..len].chunks_exact_mut(PAGE as usize);
                for (theirs, ours) in pages.zip(ours.chunks_exact(PAGE as usize)) {
                    self.compare(theirs, ours, &mut verified)?;
                }
                first += count;
                progress(verified.pages);
            }
        }
        self.compare_with_machine(&mut verified)?;
        Ok(verified)
    }

    /// The view in which these granules can be read.
    fn view<'a>(&self, region: &'a Region, granules: GranuleRange) -> anyhow::Result<&'a Mapping> {
        let Some(pager) = &self.ask else { return Ok(region.guest_view()) };
        for granule in (0..granules.count()).map(|n| GranuleIndex::new(granules.first().get() + n))
        {
            if region.page_map().state(granule) == State::Present {
                continue;
            }
            let address = region.host_range(GranuleRange::new(granule, 1)).start();
            anyhow::ensure!(pager.resolve(address), "granule {granule} can never come");
        }
        Ok(region.fill_view().unwrap_or_else(|| region.guest_view()))
    }

    /// Compares a page with the source's, which may be changed for that.
    fn compare(&self, theirs: &mut [u8], ours: &[u8], all: &mut Verified) -> anyhow::Result<()> {
        let page = all.pages;
        let written = theirs != ours;
        match &self.left {
            Left::Counted(increments) => {
                let counted = theirs.len() - 8;
                let word: [u8; 8] =
                    theirs[counted..].try_into().context("a page ends in a word")?;
                let word = u64::from_le_bytes(word).wrapping_add(increments.of(page));
                theirs[counted..].copy_from_slice(&word.to_le_bytes());
            }
            Left::Turned(difference) if written => {
                let difference = difference.to_le_bytes();
                for (theirs, ours) in theirs.chunks_exact_mut(8).zip(ours.chunks_exact(8)) {
                    if theirs != ours {
                        theirs.iter_mut().zip(difference).for_each(|(byte, bits)| *byte ^= bits);
                    }
                }
            }
            Left::Turned(_) => {}
        }
        if theirs != ours {
            all.wrong += 1;
            all.first_wrong.get_or_insert(page);
        } else if written {
            all.written += 1;
        }
        all.pages += 1;
        Ok(())
    }

    /// The machine knows which words its vCPUs turned: no other may be, and none may be left out.
    fn compare_with_machine(&self, all: &mut Verified) -> anyhow::Result<()> {
        let Some(vm) = &self.vm else { return Ok(()) };
        let compared = vm.verify(false).context("comparing what the vCPUs left")?;
        if compared.mismatches > 0 {
            let first = compared.first.and_then(|first| self.page_of(first.address));
            // As many words; pages are at least one.
            all.wrong = all.wrong.max(1);
            all.first_wrong = all.first_wrong.into_iter().chain(first).min();
        }
        Ok(())
    }

    /// The number of the page with this address, counted through all regions.
    fn page_of(&self, address: GuestAddress) -> Option<u64> {
        let mut before = 0;
        for (_, region) in self.layout.iter() {
            if let Some(offset) = address.offset_from(region.guest_base())
                && offset < region.len()
            {
                return Some((before + offset) / PAGE);
            }
            before += region.len();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use pageferry::memory::{Backing, RegionConfig};

    use super::*;

    fn subject(left: Left) -> Subject {
        let region = |base, pages| {
            let mut config = RegionConfig::new(pages * PAGE, Backing::Anonymous);
            config.guest_base = GuestAddress::new(base);
            Arc::new(Region::new(&config).unwrap())
        };
        let layout = Layout::new(vec![region(0x10000, 2), region(0x40000, 4)]).unwrap();
        Subject { layout, left, vm: None, ask: None }
    }

    #[test]
    fn only_the_difference_that_the_guest_makes_is_right() {
        const DIFFERENCE: u64 = 0xff00;
        let theirs: Vec<u8> = (0..PAGE).map(|n| n as u8).collect();
        let with = |change: &dyn Fn(&mut [u8])| {
            let mut page = theirs.clone();
            change(&mut page);
            page
        };
        // Ours; whether it is right, and whether it was written.
        let cases = [
            (with(&|_| ()), true, false),
            (with(&|page| page[9] ^= 0xff), true, true),
            (with(&|page| page[PAGE as usize - 7] ^= 0xff), true, true),
            (with(&|page| page[8] ^= 0xff), false, false),
            (with(&|page| page[9] ^= 0x7f), false, false),
            (with(&|page| page.fill(0)), false, false),
            (with(&|page| page.rotate_left(8)), false, false),
        ];
        let subject = subject(Left::Turned(DIFFERENCE));
        let mut all = Verified::default();
        for (case, (ours, right, written)) in cases.iter().enumerate() {
            let before = all;
            subject.compare(&mut theirs.clone(), ours, &mut all).unwrap();
            assert_eq!(all.pages, before.pages + 1);
            assert_eq!(all.wrong == before.wrong, *right, "case {case}");
            assert_eq!(all.written > before.written, *written, "case {case}");
        }
        assert_eq!(all.first_wrong, Some(3));
    }

    #[test]
    fn pages_are_counted_through_all_regions() {
        let subject = subject(Left::Turned(0));
        let cases = [
            (0x10000, Some(0)),
            (0x11fff, Some(1)),
            (0x12000, None),
            (0x40000, Some(2)),
            (0x43008, Some(5)),
            (0x44000, None),
        ];
        for (address, page) in cases {
            assert_eq!(subject.page_of(GuestAddress::new(address)), page, "{address:#x}");
        }
    }
}
