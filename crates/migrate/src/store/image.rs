//! A raw memory image as what a server serves.

use pageferry_image::RawImage;

use super::{PageKind, PageStore, Placement, is_zero};
use crate::{
    MigrateError,
    core::{Geometry, REGION_IMAGE, RegionInfo, WireSpan},
};

/// A [`RawImage`] as one region: the whole file, addressed by offset. A destination's regions
/// take the parts at their image offsets.
#[derive(Debug)]
pub struct ImageStore {
    image: RawImage,
    regions: [RegionInfo; 1],
}

impl ImageStore {
    /// Serves `image` in granules of `granule` bytes. A last granule that the file does not fill
    /// is served as poisoned.
    ///
    /// # Errors
    /// [`MigrateError::Protocol`] if the granule is no power of two from 4 KiB on, or the image
    /// is empty.
    pub fn new(image: RawImage, granule: u64) -> Result<Self, MigrateError> {
        let region = RegionInfo {
            id: 0,
            flags: REGION_IMAGE,
            guest_base: 0,
            length: image.length().checked_next_multiple_of(granule).unwrap_or(0),
            granule,
            page_size: granule,
        };
        Geometry::new(vec![region])?;
        Ok(Self { image, regions: [region] })
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &RawImage {
        &self.image
    }

    /// Reads `bytes` from `offset` on, which holds whole granules.
    fn read_run(&self, offset: u64, bytes: &mut [u8], kinds: &mut Vec<PageKind>) {
        let granule = self.regions[0].granule as usize;
        let kind = |bytes: &[u8]| if is_zero(bytes) { PageKind::Zero } else { PageKind::Data };
        if self.image.read_at(offset, bytes).is_ok() {
            kinds.extend(bytes.chunks(granule).map(kind));
            return;
        }
        // Something in it cannot be read: which?
        for (n, one) in bytes.chunks_mut(granule).enumerate() {
            kinds.push(match self.image.read_at(offset + (n * granule) as u64, one) {
                Ok(()) => kind(one),
                Err(error) => {
                    tracing::warn!(%error, "served as poisoned");
                    PageKind::Poisoned
                }
            });
        }
    }
}

impl PageStore for ImageStore {
    fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    fn load<'a>(
        &'a self,
        span: WireSpan,
        buffer: &mut Vec<u8>,
        kinds: &mut Vec<PageKind>,
    ) -> Placement<'a> {
        let granule = self.regions[0].granule;
        let mut offset = span.first * granule;
        let mut left = u64::from(span.count);
        while left > 0 {
            let (hole, alike) = self.image.holes(offset, granule, left);
            // A hole's last granule may be cut short by the end of the file; reading tells.
            let whole = self.image.length().saturating_sub(offset) / granule;
            let (zero, n) =
                if hole && whole > 0 { (true, alike.min(whole)) } else { (false, alike) };
            let start = buffer.len();
            buffer.resize(start + (n * granule) as usize, 0);
            if zero {
                kinds.extend((0..n).map(|_| PageKind::Zero));
            } else {
                self.read_run(offset, &mut buffer[start..], kinds);
            }
            offset += n * granule;
            left -= n;
        }
        Placement::Buffer
    }

    fn probe(&self, _region: u16, granule: u64) -> PageKind {
        let size = self.regions[0].granule;
        let offset = granule * size;
        if self.image.length() < offset + size {
            PageKind::Poisoned
        } else if self.image.holes(offset, size, 1).0 {
            PageKind::Zero
        } else {
            PageKind::Data
        }
    }

    fn load_part<'a>(
        &'a self,
        _region: u16,
        granule: u64,
        offset: u64,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Option<Placement<'a>> {
        let start = buffer.len();
        buffer.resize(start + length, 0);
        let at = granule * self.regions[0].granule + offset;
        match self.image.read_at(at, &mut buffer[start..]) {
            Ok(()) => Some(Placement::Buffer),
            Err(error) => {
                tracing::warn!(%error, "granule served as poisoned");
                buffer.truncate(start);
                None
            }
        }
    }
}
