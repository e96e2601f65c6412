//! All regions of one guest, and which of them an address belongs to.

use std::fmt;
use std::sync::Arc;

use crate::{GranuleIndex, GuestAddress, HostAddress, HostRange, Region};

/// Which region of a [`Layout`], counted from 0 in the order they were given.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug, Default)]
#[repr(transparent)]
pub struct RegionId(u16);

impl RegionId {
    /// The region with this number.
    #[inline]
    pub const fn new(id: u16) -> Self {
        Self(id)
    }

    /// The number of the region.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Why regions do not make a [`Layout`].
#[derive(Copy, Clone, Eq, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There are more regions than a [`RegionId`] can tell apart.
    #[error("{count} regions are more than {}", u16::MAX)]
    TooMany {
        /// How many regions there are.
        count: usize,
    },
    /// Two regions claim the same guest addresses.
    #[error("regions {first} and {second} overlap at guest address {at}")]
    GuestOverlap {
        /// The region that begins lower.
        first: RegionId,
        /// The region that begins inside it.
        second: RegionId,
        /// The first address that both have.
        at: GuestAddress,
    },
    /// Two views of regions share host addresses.
    #[error("views of regions {first} and {second} overlap at host address {at}")]
    HostOverlap {
        /// The region whose view begins lower.
        first: RegionId,
        /// The region whose view begins inside it.
        second: RegionId,
        /// The first address that both have.
        at: HostAddress,
    },
}

/// The regions of one guest. It never changes.
#[derive(Clone, Debug)]
pub struct Layout {
    regions: Vec<Arc<Region>>,
    /// Guest views in ascending order.
    by_host: Vec<(HostRange, RegionId)>,
    /// First and last guest address of each region, in ascending order.
    by_guest: Vec<(GuestAddress, GuestAddress, RegionId)>,
}

impl Layout {
    /// Puts the regions together. Their order gives them their ids.
    ///
    /// # Errors
    ///
    /// [`LayoutError`] when there are more than `u16::MAX` regions, or two of them overlap in the
    /// guest's address space or, with any of their views, in the host's.
    pub fn new(regions: Vec<Arc<Region>>) -> Result<Self, LayoutError> {
        if regions.len() > usize::from(u16::MAX) {
            return Err(LayoutError::TooMany { count: regions.len() });
        }
        let with_ids = || (0..).map(RegionId).zip(&regions);

        let mut by_guest: Vec<_> = with_ids()
            .map(|(id, region)| {
                let base = region.guest_base();
                // Cannot wrap: the region is not empty, and its end fits.
                (base, GuestAddress::new(base.get() + (region.len() - 1)), id)
            })
            .collect();
        by_guest.sort_unstable();
        for pair in by_guest.windows(2) {
            let ((_, last, first), (at, _, second)) = (pair[0], pair[1]);
            if at <= last {
                return Err(LayoutError::GuestOverlap { first, second, at });
            }
        }

        let mut views: Vec<_> = with_ids()
            .flat_map(|(id, region)| {
                let fill = region.fill_view().map(|view| (view.range(), id));
                std::iter::once((region.guest_view().range(), id)).chain(fill)
            })
            .collect();
        views.sort_unstable_by_key(|(range, _)| range.start());
        for pair in views.windows(2) {
            let ((lower, first), (higher, second)) = (pair[0], pair[1]);
            if lower.overlaps(higher) {
                return Err(LayoutError::HostOverlap { first, second, at: higher.start() });
            }
        }

        let mut by_host: Vec<_> =
            with_ids().map(|(id, region)| (region.guest_view().range(), id)).collect();
        by_host.sort_unstable_by_key(|(range, _)| range.start());
        Ok(Self { regions, by_host, by_guest })
    }

    /// How many regions there are.
    #[inline]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there is no region.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The region with this id.
    #[inline]
    pub fn get(&self, id: RegionId) -> Option<&Arc<Region>> {
        self.regions.get(usize::from(id.0))
    }

    /// The regions, in the order of their ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (RegionId, &Arc<Region>)> {
        // There are at most `u16::MAX` regions, so every index is an id.
        self.regions.iter().enumerate().map(|(id, region)| (RegionId(id as u16), region))
    }

    /// Which granule of which region has this address in its guest view.
    #[inline]
    pub fn find_host(&self, address: HostAddress) -> Option<(RegionId, GranuleIndex)> {
        let above = self.by_host.partition_point(|(range, _)| range.start() <= address);
        let (_, id) = self.by_host[..above].last()?;
        Some((*id, self.get(*id)?.granule_at(address)?))
    }

    /// Which granule of which region the guest has at this address.
    #[inline]
    pub fn find_guest(&self, address: GuestAddress) -> Option<(RegionId, GranuleIndex)> {
        let above = self.by_guest.partition_point(|(base, _, _)| *base <= address);
        let (_, _, id) = self.by_guest[..above].last()?;
        Some((*id, self.get(*id)?.granule_at_guest(address)?))
    }

    /// How many bytes all regions have together.
    pub fn total_bytes(&self) -> u64 {
        // Cannot wrap: the regions do not overlap in an address space of 2^64 bytes.
        self.regions.iter().map(|region| region.len()).sum()
    }

    /// How many granules, of whatever size, all regions have together.
    pub fn total_granules(&self) -> u64 {
        self.regions.iter().map(|region| region.granules()).sum()
    }

    /// How many granules, of all regions, have still to come: absent or requested. Exact when no
    /// other thread changes any.
    pub fn remaining(&self) -> u64 {
        self.regions.iter().map(|region| region.page_map().remaining()).sum()
    }
}
