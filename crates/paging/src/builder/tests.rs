//! What is chosen when a pager starts.

use pageferry_memory::{GuestAddress, ImageOffset, PageSize, Region, RegionConfig};

use super::*;

#[test]
fn auto_does_not_split_what_may_be_moved() {
    let ours = Region::new(&RegionConfig::new(1 << 20, Backing::Anonymous)).unwrap();
    let view = Arc::new(Mapping::anonymous(1 << 20).unwrap());
    let (at, offset) = (GuestAddress::new(1 << 30), ImageOffset::new(1 << 30));
    let theirs = Region::external(view, None, PageSize::SIZE_4K, None, at, offset).unwrap();
    let ours = Layout::new(vec![Arc::new(ours)]).unwrap();
    let theirs = Layout::new(vec![Arc::new(theirs)]).unwrap();
    let (auto, split) = (Delivery::Auto, Delivery::Sharded(4));
    for (layout, asked, events, expected) in [
        (&theirs, auto, Events::Watch, Delivery::QueueN(4)),
        (&theirs, auto, Events::Ignore, split),
        (&theirs, split, Events::Watch, split),
        (&ours, auto, Events::Watch, split),
    ] {
        let builder = Builder::new(layout.clone()).delivery(asked).events(events);
        let (delivery, why) = builder.unsplit(split, "why".into());
        assert_eq!(delivery, expected, "{asked} {events:?}");
        assert_eq!(why.contains("may be moved"), delivery != split, "{why}");
    }
}
