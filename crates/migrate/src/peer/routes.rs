//! Which granule here is which granule there.

use pageferry_memory::{GranuleIndex, GranuleRange, Layout, RegionId};
use pageferry_paging::Span;

use crate::{
    MigrateError,
    core::{Geometry, REGION_IMAGE, RegionInfo, WireSpan},
};

#[derive(Copy, Clone, Debug)]
struct Route {
    region: RegionId,
    wire_region: u16,
    wire_first: u64,
    granules: u64,
}

/// The layout's regions and where each lies at the peer.
///
/// A region of memory is matched by id and must be the same there: base, length, granule. A
/// region that lies in an image is matched by its image offset.
#[derive(Debug)]
pub(super) struct Routes {
    /// By region id here.
    here: Vec<Route>,
    /// By place at the peer.
    there: Vec<Route>,
}

impl Routes {
    pub(super) fn new(geometry: &Geometry, layout: &Layout) -> Result<Self, MigrateError> {
        let image = geometry.regions().iter().find(|region| region.flags & REGION_IMAGE != 0);
        let mut here = Vec::new();
        for (id, region) in layout.iter() {
            let bad =
                |why: String| Err(MigrateError::Mismatch(format!("region {}: {why}", id.get())));
            let granule = region.granule().bytes();
            let wire: &RegionInfo = match image.or_else(|| geometry.region(id.get()).ok()) {
                Some(wire) => wire,
                None => return bad("the peer has no such region".into()),
            };
            if wire.granule != granule {
                return bad(format!(
                    "granules of {} bytes at the peer, of {granule} here",
                    wire.granule
                ));
            }
            let wire_first = if image.is_some() {
                let offset = region.image_offset().get();
                if !offset.is_multiple_of(granule) {
                    return bad(format!("its image offset {offset:#x} is within a granule"));
                }
                if offset.checked_add(region.len()).is_none_or(|end| end > wire.length) {
                    return bad(format!(
                        "ends at {:#x} of an image of {:#x} bytes",
                        offset.saturating_add(region.len()),
                        wire.length
                    ));
                }
                offset / granule
            } else {
                if wire.guest_base != region.guest_base().get() || wire.length != region.len() {
                    return bad(format!(
                        "{:#x} bytes at {:#x} at the peer, {:#x} at {:#x} here",
                        wire.length,
                        wire.guest_base,
                        region.len(),
                        region.guest_base().get()
                    ));
                }
                0
            };
            if here.len() != usize::from(id.get()) {
                return bad("region ids of a layout are consecutive".into());
            }
            here.push(Route {
                region: id,
                wire_region: wire.id,
                wire_first,
                granules: region.granules(),
            });
        }
        if image.is_none() && geometry.regions().len() != here.len() {
            return Err(MigrateError::Mismatch(format!(
                "the peer has {} regions, this side {}",
                geometry.regions().len(),
                here.len()
            )));
        }
        let mut there = here.clone();
        there.sort_by_key(|route| (route.wire_region, route.wire_first));
        for pair in there.windows(2) {
            if pair[0].wire_region == pair[1].wire_region
                && pair[0].wire_first + pair[0].granules > pair[1].wire_first
            {
                return Err(MigrateError::Mismatch(format!(
                    "regions {} and {} lie in the same part of the image",
                    pair[0].region.get(),
                    pair[1].region.get()
                )));
            }
        }
        Ok(Self { here, there })
    }

    /// Where `span` begins at the peer; `None` if it is not within its region.
    pub(super) fn to_wire(&self, span: Span) -> Option<(u16, u64)> {
        let route = self.here.get(usize::from(span.region.get()))?;
        (span.granules.end().get() <= route.granules)
            .then(|| (route.wire_region, route.wire_first + span.granules.first().get()))
    }

    /// What `span`, which lies within the peer's region, is here; `None` if it is not within one
    /// region here.
    pub(super) fn to_layout(&self, span: WireSpan) -> Option<Span> {
        let index = self
            .there
            .partition_point(|r| (r.wire_region, r.wire_first) <= (span.region, span.first));
        let route = self.there.get(index.checked_sub(1)?)?;
        let first = span.first.checked_sub(route.wire_first)?;
        let fits = route.wire_region == span.region
            && first.checked_add(u64::from(span.count))? <= route.granules;
        fits.then(|| Span {
            region: route.region,
            granules: GranuleRange::new(GranuleIndex::new(first), u64::from(span.count)),
        })
    }
}
