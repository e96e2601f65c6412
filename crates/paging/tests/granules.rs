//! Granules that are not single pages.

mod common;

use std::sync::Arc;

use common::*;
use pageferry_memory::{Backing, Layout, PageSize, Region, RegionConfig};
use pageferry_paging::{Events, InstallMethod, Pager, Prefetch, StartError, Status};

fn layout_of(backing: Backing, bytes: u64, granule: u64) -> Layout {
    let granule = PageSize::try_new(granule);
    assert!(granule.is_some());
    let config = RegionConfig { granule, ..RegionConfig::new(bytes, backing) };
    Layout::new(vec![Arc::new(Region::new(&config).unwrap())]).unwrap()
}

#[test]
fn granules_of_several_pages_come_whole() {
    if !userfaultfd() {
        return;
    }
    let _watch = watch(60);
    for delivery in DELIVERIES {
        for (backing, install) in [
            (Backing::Anonymous, InstallMethod::Copy),
            (Backing::Anonymous, InstallMethod::Move),
            (Backing::Memfd, InstallMethod::Copy),
            (Backing::Memfd, InstallMethod::Continue),
        ]
        .into_iter()
        .filter(|(_, install)| available(*install))
        {
            for granule in [8 << 10, 512 << 10] {
                for prefetch in [Prefetch::NONE, Prefetch::default()] {
                    let case = format!("{delivery} {backing} {install:?} {granule} {prefetch:?}");
                    let layout = layout_of(backing, 2 << 20, granule);
                    let granules = (2 << 20) / granule;
                    let (ledger, source) = Ledger::new(granules, Answers::Inline).source();
                    let pager = Pager::builder(layout)
                        .delivery(delivery)
                        .install(Some(install))
                        .prefetch(prefetch)
                        .events(Events::Ignore)
                        .start(source)
                        .unwrap_or_else(|error| panic!("{case}: {error}"));
                    touch_at_random(pager.layout(), 3);
                    let status = pager.wait_complete(PATIENCE);
                    assert!(matches!(status, Status::Complete(_)), "{case}: {status:?}");
                    ledger.check_once();
                    let counts = pager.statistics().counts;
                    assert_eq!((counts.installed, counts.eexist), (granules, 0), "{case}");
                }
            }
        }
    }
}

#[test]
fn granules_that_do_not_fit_are_refused_and_said() {
    if !userfaultfd() {
        return;
    }
    let refused = |layout, events| {
        let source = Arc::new(Pattern::default());
        let error = Pager::builder(layout).events(events).start(source).err();
        match error {
            Some(StartError::Install { region: 0, why }) => why,
            other => panic!("{other:?}"),
        }
    };
    // Removing a page of an absent granule would lose the rest of it.
    let why = refused(layout_of(Backing::Anonymous, 1 << 20, 64 << 10), Events::Watch);
    assert!(why.contains("several pages"), "{why}");
    if huge_pages(1) {
        let why = refused(layout_of(HUGE, 2 << 20, 4096), Events::Ignore);
        assert!(why.contains("come whole"), "{why}");
    }
}
