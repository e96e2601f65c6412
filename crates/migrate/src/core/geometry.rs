//! The regions a session is about, and whether a span lies within them.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

use super::{DataHeader, Kind, MAX_REGIONS, ProtocolError, WireSpan};

/// Bytes of one region in a `Regions` frame.
pub const REGION_LEN: usize = 48;
/// [`RegionInfo::flags`]: the region is a whole image file, addressed by offset; a destination
/// may take any part of it.
pub const REGION_IMAGE: u16 = 1;

const MIN_GRANULE: u64 = 4096;
const MAX_GRANULE: u64 = 1 << 40;

/// One region as the source states it.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct RegionInfo {
    /// Its name in every span.
    pub id: u16,
    /// [`REGION_IMAGE`] or 0.
    pub flags: u16,
    /// Guest-physical address of its first byte.
    pub guest_base: u64,
    /// Bytes, a multiple of `granule`.
    pub length: u64,
    /// Bytes of a granule, a power of two.
    pub granule: u64,
    /// Page size of the source's backing, for information.
    pub page_size: u64,
}

/// A region as it lies on the wire.
#[derive(Copy, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRegion {
    id: U16,
    flags: U16,
    reserved0: U32,
    guest_base: U64,
    length: U64,
    granule: U64,
    page_size: U64,
    reserved1: U64,
}

const _: () = assert!(size_of::<RawRegion>() == REGION_LEN);

impl RegionInfo {
    /// Number of granules.
    #[must_use]
    pub fn granules(&self) -> u64 {
        self.length / self.granule
    }

    pub(super) fn to_bytes(self) -> [u8; REGION_LEN] {
        let raw = RawRegion {
            id: self.id.into(),
            flags: self.flags.into(),
            reserved0: 0.into(),
            guest_base: self.guest_base.into(),
            length: self.length.into(),
            granule: self.granule.into(),
            page_size: self.page_size.into(),
            reserved1: 0.into(),
        };
        zerocopy::transmute!(raw)
    }

    pub(super) fn from_bytes(bytes: &[u8; REGION_LEN]) -> Self {
        let raw: RawRegion = zerocopy::transmute!(*bytes);
        Self {
            id: raw.id.get(),
            flags: raw.flags.get(),
            guest_base: raw.guest_base.get(),
            length: raw.length.get(),
            granule: raw.granule.get(),
            page_size: raw.page_size.get(),
        }
    }
}

/// A checked set of regions: ids ascend, sizes are whole, nothing wraps or overlaps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Geometry {
    regions: Vec<RegionInfo>,
}

impl Geometry {
    /// Checks `regions`.
    ///
    /// # Errors
    /// The first region that cannot be, and why.
    pub fn new(regions: Vec<RegionInfo>) -> Result<Self, ProtocolError> {
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        if count > MAX_REGIONS {
            return Err(ProtocolError::TooManyRegions(count));
        }
        let mut last_id = None;
        for region in &regions {
            let bad = |why| Err(ProtocolError::BadRegion { id: region.id, why });
            if last_id.is_some_and(|last| region.id <= last) {
                return bad("ids must ascend");
            }
            last_id = Some(region.id);
            if !region.granule.is_power_of_two()
                || !(MIN_GRANULE..=MAX_GRANULE).contains(&region.granule)
            {
                return bad("granule must be a power of two from 4 KiB to 1 TiB");
            }
            if !region.page_size.is_power_of_two() {
                return bad("page size must be a power of two");
            }
            if region.length == 0 || !region.length.is_multiple_of(region.granule) {
                return bad("length must be a whole, positive number of granules");
            }
            if region.guest_base.checked_add(region.length).is_none() {
                return bad("it wraps around the address space");
            }
        }
        let mut by_address: Vec<&RegionInfo> = regions.iter().collect();
        by_address.sort_by_key(|region| region.guest_base);
        for pair in by_address.windows(2) {
            if pair[0].guest_base + pair[0].length > pair[1].guest_base {
                return Err(ProtocolError::BadRegion {
                    id: pair[1].id,
                    why: "it overlaps another region",
                });
            }
        }
        Ok(Self { regions })
    }

    /// The regions, by ascending id.
    #[must_use]
    pub fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    /// The region with this id.
    ///
    /// # Errors
    /// [`ProtocolError::UnknownRegion`].
    pub fn region(&self, id: u16) -> Result<&RegionInfo, ProtocolError> {
        self.index(id).map(|index| &self.regions[index])
    }

    /// The place of the region with this id among [`regions`](Self::regions).
    ///
    /// # Errors
    /// [`ProtocolError::UnknownRegion`].
    pub fn index(&self, id: u16) -> Result<usize, ProtocolError> {
        // Ids are nearly always 0..n, so the first guess hits.
        let guess = usize::from(id);
        if self.regions.get(guess).is_some_and(|region| region.id == id) {
            return Ok(guess);
        }
        self.regions
            .binary_search_by_key(&id, |region| region.id)
            .map_err(|_| ProtocolError::UnknownRegion(id))
    }

    /// Checks that `span` of a frame of `kind` is not empty and lies within its region.
    ///
    /// # Errors
    /// [`ProtocolError::UnknownRegion`], [`ProtocolError::EmptySpan`],
    /// [`ProtocolError::OutOfRange`].
    pub fn check(&self, kind: Kind, span: WireSpan) -> Result<&RegionInfo, ProtocolError> {
        let region = self.region(span.region)?;
        if span.count == 0 {
            return Err(ProtocolError::EmptySpan(kind));
        }
        let granules = region.granules();
        match span.end() {
            Some(end) if end <= granules => Ok(region),
            _ => Err(ProtocolError::OutOfRange { kind, span, granules }),
        }
    }

    /// Checks a `Data` header: its span, and that the payload has exactly the bytes that it says.
    ///
    /// # Errors
    /// As [`check`](Self::check), and [`ProtocolError::PayloadLength`].
    pub fn check_data(&self, data: &DataHeader) -> Result<&RegionInfo, ProtocolError> {
        let region = self.check(Kind::Data, data.span)?;
        let got = u64::from(data.length);
        let wrong =
            |expected| Err(ProtocolError::PayloadLength { kind: Kind::Data, got, expected });
        match data.fragment {
            None => {
                let expected = u128::from(data.span.count) * u128::from(region.granule);
                if u128::from(got) != expected {
                    return wrong(format!("the span has {expected}"));
                }
            }
            Some(offset) => {
                if data.span.count != 1 {
                    return wrong("a part belongs to exactly one granule".into());
                }
                let room = region.granule.saturating_sub(offset);
                if got == 0 || got > room {
                    return wrong(format!("the granule has {room} left at {offset}"));
                }
            }
        }
        Ok(region)
    }
}
