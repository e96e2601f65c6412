//! Invariant 1 with transparent huge pages: no page is seen half filled, however much the kernel
//! is asked to use huge pages for memory that arrives in small ones.

mod common;

use std::{sync::Arc, time::Duration};

use common::*;
use pageferry_memory::{Advice, Backing, Layout, Region, RegionConfig, Thp};
use pageferry_paging::{Delivery, Events, InstallMethod, Pager, Prefetch, Status};

fn eager_for_huge_pages(backing: Backing) -> Layout {
    let config = RegionConfig { thp: Thp::Always, ..RegionConfig::new(8 << 20, backing) };
    Layout::new(vec![Arc::new(Region::new(&config).unwrap())]).unwrap()
}

#[test]
fn memory_eager_for_huge_pages_arrives_page_by_page() {
    if !userfaultfd() {
        return;
    }
    for (backing, install) in [
        (Backing::Anonymous, InstallMethod::Copy),
        (Backing::Anonymous, InstallMethod::Move),
        (Backing::Memfd, InstallMethod::Copy),
        (Backing::Memfd, InstallMethod::Continue),
    ]
    .into_iter()
    .filter(|(_, install)| available(*install))
    {
        for delivery in [Delivery::Queue, Delivery::Sharded(2), Delivery::Signal] {
            for prefetch in [Prefetch::NONE, Prefetch::default()] {
                let pager = Pager::builder(eager_for_huge_pages(backing))
                    .delivery(delivery)
                    .install(Some(install))
                    .prefetch(prefetch)
                    .events(Events::Ignore)
                    .start(Arc::new(Pattern::default()))
                    .unwrap();
                let region = Arc::clone(pager.layout().get(REGION).unwrap());
                // The first granule of each huge page, then the kernel's best try at making huge
                // pages of what is there: it must refuse, or leave the rest absent.
                for offset in (0..region.len()).step_by(2 << 20) {
                    assert_eq!(peek(pager.layout(), offset), word(REGION, offset));
                }
                for view in std::iter::once(region.guest_view()).chain(region.fill_view()) {
                    // Refusal is as good as success here: what counts is what the guest reads.
                    let _ = view.advise(view.range(), Advice::Collapse);
                }
                touch_at_random(pager.layout(), 3);
                verify_all(pager.layout());
                let status = pager.wait_complete(Duration::from_secs(10));
                assert!(matches!(status, Status::Complete(_)), "{backing} {install:?} {status:?}");
            }
        }
    }
}
