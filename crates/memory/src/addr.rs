//! Addresses, offsets, granule indices and page sizes as distinct types, so that one is never
//! taken for another. Arithmetic is checked: nothing here wraps.

use std::fmt;

use pageferry_uffd::{position_type, range_type};

position_type! {
    /// An address the guest uses: guest-physical for a virtual machine; for an ordinary process,
    /// the address at which the memory is known to its source.
    pub address GuestAddress in bytes
}

position_type! {
    /// A position in a memory image, in bytes from its beginning.
    pub address ImageOffset in bytes
}

macro_rules! aligned_to_pages {
    ($($name:ident),*) => {$(
        impl $name {
            /// Rounds down to a multiple of `page`.
            #[inline]
            pub const fn align_down(self, page: PageSize) -> Self {
                Self(page.round_down(self.0))
            }

            /// Whether this is a multiple of `page`.
            #[inline]
            pub const fn is_aligned(self, page: PageSize) -> bool {
                page.is_multiple(self.0)
            }
        }
    )*};
}

aligned_to_pages!(GuestAddress, ImageOffset);

position_type! {
    /// Which granule of a region, counted from 0.
    ///
    /// A granule is the unit in which presence is tracked and bytes are fetched.
    pub struct GranuleIndex in granules
}

impl fmt::Display for GranuleIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A page or granule size: a power of two, at least 4 KiB.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash)]
pub struct PageSize {
    shift: u8,
}

impl PageSize {
    /// 4 KiB, the base page of x86-64.
    pub const SIZE_4K: Self = Self { shift: 12 };
    /// 2 MiB, a huge page of x86-64.
    pub const SIZE_2M: Self = Self { shift: 21 };
    /// 1 GiB, a gigantic page of x86-64.
    pub const SIZE_1G: Self = Self { shift: 30 };

    /// The size of the pages this host's kernel manages memory in.
    #[inline]
    pub fn base() -> Self {
        Self::try_new(rustix::param::page_size() as u64)
            .expect("Linux's page size is a power of two, at least 4096 on every architecture")
    }

    /// The size of `bytes` bytes; `None` unless that is a power of two and at least 4096.
    #[inline]
    pub const fn try_new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= Self::SIZE_4K.bytes() {
            // At most 63: it fits.
            Some(Self { shift: bytes.trailing_zeros() as u8 })
        } else {
            None
        }
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The binary logarithm of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }

    /// Whether `bytes` is a multiple of this size.
    #[inline]
    pub const fn is_multiple(self, bytes: u64) -> bool {
        bytes & (self.bytes() - 1) == 0
    }

    /// The least multiple of this size that is not below `bytes`, unless it does not fit into
    /// 64 bits.
    #[inline]
    pub const fn round_up(self, bytes: u64) -> Option<u64> {
        match bytes.checked_add(self.bytes() - 1) {
            Some(sum) => Some(self.round_down(sum)),
            None => None,
        }
    }

    /// The greatest multiple of this size that is not above `bytes`.
    #[inline]
    pub const fn round_down(self, bytes: u64) -> u64 {
        bytes & !(self.bytes() - 1)
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let unit = (self.shift as usize / 10).min(UNITS.len() - 1);
        write!(f, "{} {}", self.bytes() >> (10 * unit), UNITS[unit])
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSize({self})")
    }
}

range_type! {
    /// Consecutive granules: `count` of them from `first` on. It never wraps, and may be empty.
    pub struct GranuleRange { first: GranuleIndex, count: u64 } in granules
}

impl GranuleRange {
    /// The range of one granule.
    ///
    /// # Panics
    ///
    /// When the index is `u64::MAX`, which is no granule of any memory.
    #[inline]
    pub const fn one(granule: GranuleIndex) -> Self {
        Self::new(granule, 1)
    }

    /// The granules in ascending order.
    #[inline]
    pub fn iter(self) -> impl DoubleEndedIterator<Item = GranuleIndex> + Clone {
        (self.first.0..self.end().0).map(GranuleIndex)
    }
}

impl fmt::Display for GranuleRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "granules {}..{}", self.first, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_powers_of_two_from_4096() {
        for (bytes, valid) in [
            (0, false),
            (1, false),
            (2048, false),
            (4096, true),
            (4097, false),
            (12288, false),
            (2 << 20, true),
            (1 << 63, true),
            (u64::MAX, false),
        ] {
            assert_eq!(PageSize::try_new(bytes).map(PageSize::bytes), valid.then_some(bytes));
        }
        assert_eq!(PageSize::SIZE_4K.shift(), 12);
    }

    #[test]
    fn page_sizes_print_in_their_unit() {
        for (size, text) in [
            (PageSize::SIZE_4K, "4 KiB"),
            (PageSize::try_new(64 << 10).unwrap(), "64 KiB"),
            (PageSize::SIZE_2M, "2 MiB"),
            (PageSize::SIZE_1G, "1 GiB"),
            (PageSize::try_new(1 << 63).unwrap(), "8192 PiB"),
        ] {
            assert_eq!(size.to_string(), text);
        }
    }

    #[test]
    fn rounding_is_checked() {
        let page = PageSize::SIZE_4K;
        assert_eq!(page.round_up(0), Some(0));
        assert_eq!(page.round_up(1), Some(4096));
        assert_eq!(page.round_up(4096), Some(4096));
        assert_eq!(page.round_up(u64::MAX), None);
        assert_eq!(page.round_up(u64::MAX - 4095), Some(u64::MAX - 4095));
        assert_eq!(page.round_down(u64::MAX), u64::MAX - 4095);
    }

    #[test]
    fn granule_ranges_do_not_wrap() {
        assert!(GranuleRange::try_new(GranuleIndex::new(u64::MAX), 1).is_none());
        assert!(GranuleRange::try_new(GranuleIndex::new(u64::MAX), 0).is_some());
        let range = GranuleRange::new(GranuleIndex::new(5), 10);
        let (head, tail) = range.split_at(99);
        assert_eq!(head, range);
        assert!(tail.is_empty());
        assert_eq!(tail.first(), range.end());
        assert_eq!(
            range.iter().map(GranuleIndex::get).collect::<Vec<_>>(),
            [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
        );
    }

    #[test]
    fn intersection_is_what_both_have() {
        let range = |first, count| GranuleRange::new(GranuleIndex::new(first), count);
        for (a, b, common) in [
            (range(0, 4), range(4, 4), None),
            (range(0, 5), range(4, 4), Some(range(4, 1))),
            (range(2, 9), range(3, 2), Some(range(3, 2))),
            (range(2, 9), range(3, 0), None),
        ] {
            assert_eq!(a.intersection(b), common);
            assert_eq!(b.intersection(a), common);
            assert_eq!(a.overlaps(b), common.is_some());
        }
    }
}
