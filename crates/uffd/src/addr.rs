//! Host-virtual addresses and ranges of them.

mod macros;

use std::fmt;

use crate::{position_type, range_type};

const _: () = assert!(
    size_of::<usize>() == size_of::<u64>(),
    "pageferry-uffd supports 64-bit hosts only: the kernel's structures carry addresses as u64"
);

position_type! {
    /// A host-virtual address: an address in the address space of some process on this host, not
    /// necessarily this one, and not necessarily mapped.
    pub address HostAddress in bytes
}

impl HostAddress {
    /// The address `pointer` points to. Its provenance is exposed, so that [`as_ptr`] may give it
    /// back.
    ///
    /// [`as_ptr`]: Self::as_ptr
    #[inline]
    pub fn from_ptr<T: ?Sized>(pointer: *const T) -> Self {
        Self::new(pointer.cast::<u8>().expose_provenance() as u64)
    }

    /// The address as a pointer. Dereferencing it is up to the caller's proof that something is
    /// mapped there, in this process.
    #[inline]
    pub fn as_ptr(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.get() as usize)
    }

    /// The highest multiple of `alignment` not above `self`.
    ///
    /// # Panics
    ///
    /// When `alignment` is not a power of two.
    #[inline]
    pub const fn align_down(self, alignment: u64) -> Self {
        assert!(alignment.is_power_of_two(), "alignment is not a power of two");
        Self::new(self.get() & !(alignment - 1))
    }

    /// Whether the address is a multiple of `alignment`.
    ///
    /// # Panics
    ///
    /// When `alignment` is not a power of two.
    #[inline]
    pub const fn is_aligned(self, alignment: u64) -> bool {
        assert!(alignment.is_power_of_two(), "alignment is not a power of two");
        self.get() & (alignment - 1) == 0
    }
}

range_type! {
    /// A range of host-virtual addresses, `[start, start + len)`, that does not wrap. It may be
    /// empty.
    pub struct HostRange { start: HostAddress, len: u64 } in bytes
}

impl fmt::Display for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{} ({} bytes)", self.start, self.end(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> HostRange {
        HostRange::new(HostAddress::new(start), len)
    }

    #[test]
    fn addresses_do_not_wrap() {
        let top = HostAddress::new(u64::MAX);
        assert_eq!(top.checked_add(0), Some(top));
        assert_eq!(top.checked_add(1), None);
        assert_eq!(HostAddress::new(0).checked_sub(1), None);
        assert_eq!(HostAddress::new(3).offset_from(HostAddress::new(4)), None);
        assert_eq!(HostAddress::new(4).offset_from(HostAddress::new(4)), Some(0));
    }

    #[test]
    fn alignment() {
        let address = HostAddress::new(0x12fff);
        assert_eq!(address.align_down(0x1000), HostAddress::new(0x12000));
        assert!(!address.is_aligned(2));
        assert!(address.align_down(0x1000).is_aligned(0x1000));
        assert_eq!(address.align_down(1), address);
    }

    #[test]
    fn pointers_survive_the_round_trip() {
        let mut byte = 7_u8;
        let pointer: *mut u8 = &mut byte;
        assert_eq!(HostAddress::from_ptr(pointer).as_ptr(), pointer);
    }

    #[test]
    fn a_range_never_wraps() {
        assert_eq!(HostRange::try_new(HostAddress::new(u64::MAX), 1), None);
        let last = range(u64::MAX - 1, 1);
        assert_eq!(last.end().get(), u64::MAX);
        assert_eq!(HostRange::from_bounds(HostAddress::new(2), HostAddress::new(1)), None);
    }

    #[test]
    fn relations_of_ranges() {
        let whole = range(0x1000, 0x3000);
        // other, contained, intersection
        let cases = [
            (range(0x1000, 0x3000), true, Some(range(0x1000, 0x3000))),
            (range(0x2000, 0x1000), true, Some(range(0x2000, 0x1000))),
            (range(0x0, 0x1000), false, None),
            (range(0x4000, 0x1000), false, None),
            (range(0x0, 0x1001), false, Some(range(0x1000, 1))),
            (range(0x3fff, 0x1000), false, Some(range(0x3fff, 1))),
            (range(0x0, 0x9000), false, Some(whole)),
            (range(0x2000, 0), true, None),
            (range(0x4000, 0), true, None),
            (range(0x4001, 0), false, None),
        ];
        for (other, contained, common) in cases {
            assert_eq!(whole.contains_range(other), contained, "{other}");
            assert_eq!(whole.intersection(other), common, "{other}");
            assert_eq!(other.intersection(whole), common, "{other}");
            assert_eq!(whole.overlaps(other), common.is_some(), "{other}");
        }
        assert!(whole.contains(HostAddress::new(0x3fff)));
        assert!(!whole.contains(HostAddress::new(0x4000)));
        assert!(!whole.contains(HostAddress::new(0xfff)));
    }

    #[test]
    fn splitting_saturates() {
        let whole = range(0x1000, 0x3000);
        assert_eq!(whole.split_at(0x1000), (range(0x1000, 0x1000), range(0x2000, 0x2000)));
        assert_eq!(whole.skip(0x3000), range(0x4000, 0));
        assert_eq!(whole.skip(u64::MAX), range(0x4000, 0));
        assert_eq!(whole.take(u64::MAX), whole);
        assert!(whole.take(0).is_empty());
    }

    #[test]
    fn display() {
        assert_eq!(range(0x1000, 0x2000).to_string(), "0x1000..0x3000 (8192 bytes)");
    }
}
