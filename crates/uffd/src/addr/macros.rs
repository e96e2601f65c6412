//! What all positions and all ranges of them have in common, for every crate that needs a position
//! that is not mistaken for another.
//!
//! Macros and not generic types: a crate can add methods only to types of its own, and those of a
//! trait cannot be `const` in stable Rust.

/// Defines a position in something: a type of its own around a `u64`, whose arithmetic is checked.
///
/// The name after `in` is the unit, in the plural, as it appears in the documentation and as the
/// name of parameters. A position that is declared with `address` in place of `struct` has
/// `Display` and `LowerHex` too, both in hexadecimal; another one is displayed as its crate likes.
///
/// ```
/// pageferry_uffd::position_type! {
///     /// A place on a shelf, counted from 0.
///     pub struct Place in books
/// }
/// pageferry_uffd::position_type! {
///     /// An address on some bus.
///     pub address BusAddress in bytes
/// }
///
/// assert_eq!(Place::new(3).checked_add(2), Some(Place::new(5)));
/// assert_eq!(Place::new(3).checked_sub(4), None);
/// assert_eq!(Place::new(7).offset_from(Place::new(3)), Some(4));
/// assert_eq!(BusAddress::new(0x1000).to_string(), "0x1000");
/// ```
#[macro_export]
macro_rules! position_type {
    ($(#[$attribute:meta])* $visibility:vis struct $name:ident in $unit:ident) => {
        $(#[$attribute])*
        #[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug, Default)]
        #[repr(transparent)]
        $visibility struct $name(u64);

        impl $name {
            #[doc = concat!("The position with this number, in ", stringify!($unit), " from 0.")]
            #[inline]
            pub const fn new($unit: u64) -> Self {
                Self($unit)
            }

            #[doc = concat!("The number, in ", stringify!($unit), " from 0.")]
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            #[doc = concat!("`self` plus so many ", stringify!($unit), ", unless that does not")]
            /// fit into 64 bits.
            #[inline]
            pub const fn checked_add(self, $unit: u64) -> Option<Self> {
                match self.0.checked_add($unit) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            #[doc = concat!("`self` minus so many ", stringify!($unit), ", unless that is below")]
            /// zero.
            #[inline]
            pub const fn checked_sub(self, $unit: u64) -> Option<Self> {
                match self.0.checked_sub($unit) {
                    Some(difference) => Some(Self(difference)),
                    None => None,
                }
            }

            #[doc = concat!("The distance in ", stringify!($unit), " from `base` up to `self`;")]
            /// `None` when `base` lies above `self`.
            #[inline]
            pub const fn offset_from(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }
        }
    };
    ($(#[$attribute:meta])* $visibility:vis address $name:ident in $unit:ident) => {
        $crate::position_type! { $(#[$attribute])* $visibility struct $name in $unit }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl ::std::fmt::LowerHex for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                ::std::fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

/// Defines a range of positions, `[start, start + length)`, that does not wrap and may be empty.
///
/// The names of the fields become the names of the getters. The type of the first is one that
/// [`position_type!`] defined; the name after `in` is the unit, in the plural, as it appears in the
/// documentation and as the name of parameters.
///
/// ```
/// pageferry_uffd::position_type! {
///     /// A place on a shelf, counted from 0.
///     pub struct Place in books
/// }
/// pageferry_uffd::range_type! {
///     /// Books that stand side by side.
///     pub struct Books { first: Place, count: u64 } in books
/// }
///
/// let books = Books::new(Place::new(3), 4);
/// let (head, tail) = books.split_at(1);
/// assert_eq!((head.count(), tail.first(), tail.end()), (1, Place::new(4), Place::new(7)));
/// assert_eq!(Books::try_new(Place::new(u64::MAX), 1), None);
/// ```
#[macro_export]
macro_rules! range_type {
    (
        $(#[$attribute:meta])*
        $visibility:vis struct $name:ident { $start:ident: $position:ty, $length:ident: u64 }
        in $unit:ident
    ) => {
        $(#[$attribute])*
        #[derive(Copy, Clone, Eq, PartialEq, Hash, Debug, Default)]
        $visibility struct $name {
            $start: $position,
            $length: u64,
        }

        impl $name {
            #[doc = concat!("The range of so many ", stringify!($unit), " from a position on;")]
            /// `None` when its end does not fit into 64 bits.
            #[inline]
            pub const fn try_new($start: $position, $length: u64) -> Option<Self> {
                match $start.checked_add($length) {
                    Some(_) => Some(Self { $start, $length }),
                    None => None,
                }
            }

            #[doc = concat!("The range of so many ", stringify!($unit), " from a position on.")]
            ///
            /// # Panics
            ///
            /// When its end does not fit into 64 bits. Use [`try_new`](Self::try_new) for numbers
            /// that come from elsewhere.
            #[inline]
            pub const fn new($start: $position, $length: u64) -> Self {
                match Self::try_new($start, $length) {
                    Some(range) => range,
                    None => panic!(concat!(stringify!($name), " whose end exceeds 64 bits")),
                }
            }

            /// The range up to, but not including, `end`; `None` when `end` is below the start.
            #[inline]
            pub const fn from_bounds($start: $position, end: $position) -> Option<Self> {
                match end.offset_from($start) {
                    Some($length) => Some(Self { $start, $length }),
                    None => None,
                }
            }

            /// The first position (of an empty range: where it stands).
            #[inline]
            pub const fn $start(self) -> $position {
                self.$start
            }

            #[doc = concat!("How many ", stringify!($unit), " it has.")]
            #[inline]
            pub const fn $length(self) -> u64 {
                self.$length
            }

            /// One past the last position.
            #[inline]
            pub const fn end(self) -> $position {
                <$position>::new(self.$start.get() + self.$length)
            }

            #[doc = concat!("Whether the range has no ", stringify!($unit), ".")]
            #[inline]
            pub const fn is_empty(self) -> bool {
                self.$length == 0
            }

            /// Whether `position` lies in the range.
            #[inline]
            pub const fn contains(self, position: $position) -> bool {
                match position.offset_from(self.$start) {
                    Some(offset) => offset < self.$length,
                    None => false,
                }
            }

            /// Whether all of `other` lies in the range. An empty `other` does when both its
            /// bounds do not lie outside.
            #[inline]
            pub const fn contains_range(self, other: Self) -> bool {
                other.$start.get() >= self.$start.get() && other.end().get() <= self.end().get()
            }

            #[doc = concat!("Whether the two have any ", stringify!($unit), " in common.")]
            #[inline]
            pub const fn overlaps(self, other: Self) -> bool {
                self.intersection(other).is_some()
            }

            #[doc = concat!("The ", stringify!($unit), " both have; `None` when there are none.")]
            #[inline]
            pub const fn intersection(self, other: Self) -> Option<Self> {
                let later = self.$start.get() < other.$start.get();
                let start = if later { other.$start } else { self.$start };
                let end = if self.end().get() < other.end().get() { self } else { other }.end();
                match Self::from_bounds(start, end) {
                    Some(common) if !common.is_empty() => Some(common),
                    _ => None,
                }
            }

            #[doc = concat!("What is left after the first so many ", stringify!($unit), "; empty,")]
            /// at the end, when there are no more.
            #[inline]
            pub const fn skip(self, $unit: u64) -> Self {
                self.split_at($unit).1
            }

            #[doc = concat!("The first so many ", stringify!($unit), ", or the whole range when")]
            /// it has fewer.
            #[inline]
            pub const fn take(self, $unit: u64) -> Self {
                self.split_at($unit).0
            }

            #[doc = concat!("The first so many ", stringify!($unit), " and the rest.")]
            /// Splitting beyond the end leaves the rest empty.
            #[inline]
            pub const fn split_at(self, $unit: u64) -> (Self, Self) {
                let head = if $unit < self.$length { $unit } else { self.$length };
                let middle = <$position>::new(self.$start.get() + head);
                let rest = self.$length - head;
                (
                    Self { $start: self.$start, $length: head },
                    Self { $start: middle, $length: rest },
                )
            }
        }
    };
}
