//! Host-virtual addresses and ranges of them.

use std::fmt;

const _: () = assert!(
    size_of::<usize>() == size_of::<u64>(),
    "pageferry-uffd supports 64-bit hosts only: the kernel's structures carry addresses as u64"
);

/// A host-virtual address: an address in the address space of some process on this host, not
/// necessarily this one, and not necessarily mapped.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug, Default)]
#[repr(transparent)]
pub struct HostAddress(u64);

impl HostAddress {
    /// The address with this numeric value.
    #[inline]
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The numeric value.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `pointer` points to. Its provenance is exposed, so that [`as_ptr`] may give it
    /// back.
    ///
    /// [`as_ptr`]: Self::as_ptr
    #[inline]
    pub fn from_ptr<T: ?Sized>(pointer: *const T) -> Self {
        Self(pointer.cast::<u8>().expose_provenance() as u64)
    }

    /// The address as a pointer. Dereferencing it is up to the caller's proof that something is
    /// mapped there, in this process.
    #[inline]
    pub fn as_ptr(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }

    /// `self + bytes`, unless that leaves the address space.
    #[inline]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// `self - bytes`, unless that is below zero.
    #[inline]
    pub const fn checked_sub(self, bytes: u64) -> Option<Self> {
        match self.0.checked_sub(bytes) {
            Some(difference) => Some(Self(difference)),
            None => None,
        }
    }

    /// The distance in bytes from `base` up to `self`; `None` when `base` lies above `self`.
    #[inline]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// The highest multiple of `alignment` not above `self`.
    ///
    /// # Panics
    ///
    /// When `alignment` is not a power of two.
    #[inline]
    pub const fn align_down(self, alignment: u64) -> Self {
        assert!(alignment.is_power_of_two(), "alignment is not a power of two");
        Self(self.0 & !(alignment - 1))
    }

    /// Whether the address is a multiple of `alignment`.
    ///
    /// # Panics
    ///
    /// When `alignment` is not a power of two.
    #[inline]
    pub const fn is_aligned(self, alignment: u64) -> bool {
        assert!(alignment.is_power_of_two(), "alignment is not a power of two");
        self.0 & (alignment - 1) == 0
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A range of host-virtual addresses, `[start, start + len)`, that does not wrap. It may be empty.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug, Default)]
pub struct HostRange {
    start: HostAddress,
    len: u64,
}

impl HostRange {
    /// The range of `len` bytes from `start`; `None` when its end is not an address.
    #[inline]
    pub const fn try_new(start: HostAddress, len: u64) -> Option<Self> {
        match start.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range of `len` bytes from `start`.
    ///
    /// # Panics
    ///
    /// When the range wraps around the end of the address space. Use [`try_new`](Self::try_new)
    /// for numbers that come from elsewhere.
    #[inline]
    pub const fn new(start: HostAddress, len: u64) -> Self {
        match Self::try_new(start, len) {
            Some(range) => range,
            None => panic!("host range wraps around the end of the address space"),
        }
    }

    /// The range from `start` up to, but not including, `end`; `None` when `end` is below `start`.
    #[inline]
    pub const fn from_bounds(start: HostAddress, end: HostAddress) -> Option<Self> {
        match end.offset_from(start) {
            Some(len) => Some(Self { start, len }),
            None => None,
        }
    }

    /// First address.
    #[inline]
    pub const fn start(self) -> HostAddress {
        self.start
    }

    /// Length in bytes.
    #[inline]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// One past the last address.
    #[inline]
    pub const fn end(self) -> HostAddress {
        HostAddress(self.start.0 + self.len)
    }

    /// Whether the range has no bytes.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether `address` lies in the range.
    #[inline]
    pub const fn contains(self, address: HostAddress) -> bool {
        match address.offset_from(self.start) {
            Some(offset) => offset < self.len,
            None => false,
        }
    }

    /// Whether all of `other` lies in the range. An empty `other` does when both its bounds do not
    /// lie outside.
    #[inline]
    pub const fn contains_range(self, other: Self) -> bool {
        other.start.0 >= self.start.0 && other.end().0 <= self.end().0
    }

    /// Whether the two share at least one byte.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }

    /// The bytes both have; `None` when there are none.
    #[inline]
    pub const fn intersection(self, other: Self) -> Option<Self> {
        let start = if self.start.0 > other.start.0 { self.start } else { other.start };
        let end = if self.end().0 < other.end().0 { self.end() } else { other.end() };
        match end.offset_from(start) {
            Some(len) if len > 0 => Some(Self { start, len }),
            _ => None,
        }
    }

    /// What is left after the first `bytes` bytes; empty, at the end, when there are no more.
    #[inline]
    pub const fn skip(self, bytes: u64) -> Self {
        self.split_at(bytes).1
    }

    /// The first `bytes` bytes, or the whole range when it has fewer.
    #[inline]
    pub const fn take(self, bytes: u64) -> Self {
        self.split_at(bytes).0
    }

    /// The first `bytes` bytes and the rest. Splitting beyond the end leaves the rest empty.
    #[inline]
    pub const fn split_at(self, bytes: u64) -> (Self, Self) {
        let bytes = if bytes < self.len { bytes } else { self.len };
        let middle = HostAddress(self.start.0 + bytes);
        (Self { start: self.start, len: bytes }, Self { start: middle, len: self.len - bytes })
    }
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
