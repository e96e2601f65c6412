//! Address arithmetic against arithmetic in 128 bits: it never wraps, and panics only where it
//! says so.
#![cfg(not(loom))]

use pageferry_memory::{GranuleIndex, GranuleRange, GuestAddress, ImageOffset, PageSize};
use proptest::prelude::*;

/// Numbers around the borders as often as any others.
fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0_u64..3, u64::MAX - 2..=u64::MAX, 4094_u64..4099]
}

fn fits(number: u128) -> Option<u64> {
    u64::try_from(number).ok()
}

proptest! {
    #[test]
    fn positions(a in numbers(), b in numbers(), shift in 12_u32..64) {
        let page = PageSize::try_new(1 << shift).unwrap();
        let sum = fits(u128::from(a) + u128::from(b));
        prop_assert_eq!(GuestAddress::new(a).checked_add(b).map(GuestAddress::get), sum);
        prop_assert_eq!(ImageOffset::new(a).checked_add(b).map(ImageOffset::get), sum);
        prop_assert_eq!(GranuleIndex::new(a).checked_add(b).map(GranuleIndex::get), sum);
        let difference = (a >= b).then(|| a - b);
        prop_assert_eq!(GuestAddress::new(a).checked_sub(b).map(GuestAddress::get), difference);
        prop_assert_eq!(GuestAddress::new(a).offset_from(GuestAddress::new(b)), difference);
        let down = GuestAddress::new(a).align_down(page);
        prop_assert!(down.is_aligned(page) && down.get() <= a && a - down.get() < page.bytes());
    }

    #[test]
    fn page_sizes(bytes in numbers(), shift in 12_u32..64) {
        let page = PageSize::try_new(1 << shift).unwrap();
        let up = u128::from(bytes).next_multiple_of(1 << shift);
        prop_assert_eq!(page.round_up(bytes), fits(up));
        prop_assert_eq!(page.is_multiple(bytes), bytes % page.bytes() == 0);
        prop_assert_eq!(page.round_down(bytes), bytes - bytes % page.bytes());
        let valid = bytes.is_power_of_two() && bytes >= 4096;
        prop_assert_eq!(PageSize::try_new(bytes).is_some(), valid);
    }

    #[test]
    fn ranges(
        a in (numbers(), numbers()),
        b in (numbers(), numbers()),
        at in numbers(),
        index in numbers(),
    ) {
        let range = |(first, count): (u64, u64)| {
            let range = GranuleRange::try_new(GranuleIndex::new(first), count);
            assert_eq!(range.is_some(), first.checked_add(count).is_some());
            range
        };
        let (Some(a), Some(b)) = (range(a), range(b)) else { return Ok(()) };
        let (head, tail) = a.split_at(at);
        prop_assert_eq!(head.first(), a.first());
        prop_assert_eq!(head.end(), tail.first());
        prop_assert_eq!(tail.end(), a.end());
        prop_assert_eq!(head.count(), at.min(a.count()));
        let index = GranuleIndex::new(index);
        let common = a.intersection(b);
        prop_assert_eq!(a.overlaps(b), common.is_some());
        prop_assert_eq!(
            common.is_some_and(|common| common.contains(index)),
            a.contains(index) && b.contains(index)
        );
    }
}
