//! A guest's memory in units of 4 KiB, read and written in place.
#![allow(unsafe_code)]

use std::sync::Arc;

use pageferry_memory::{GranuleIndex, Layout, OutOfRange, Region, RegionId, State};

use rustix::{fs::SeekFrom, io::Errno};

use super::units::{UNIT, Units};
use crate::{MigrateError, Piece, core::RegionInfo, net::Place};

/// The regions of a layout.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    regions: Vec<Arc<Region>>,
    /// Whether a region has poisoned granules: what cannot be read.
    poisoned: Vec<bool>,
}

/// Where pages that are not zero differ from it most often: looked at before the whole page is.
const PROBES: [u64; 3] = [0, 2048, 4088];

impl Memory {
    pub(crate) fn new(layout: &Layout) -> Self {
        let regions: Vec<_> = layout.iter().map(|(_, region)| Arc::clone(region)).collect();
        let poisoned =
            regions.iter().map(|region| region.page_map().count(State::Poisoned) > 0).collect();
        Self { regions, poisoned }
    }

    pub(crate) fn region(&self, region: usize) -> &Arc<Region> {
        &self.regions[region]
    }

    /// How many regions there are.
    pub(crate) fn len(&self) -> usize {
        self.regions.len()
    }

    /// Units of a region.
    pub(crate) fn units(&self, region: usize) -> u64 {
        self.regions[region].len() / UNIT
    }

    /// Units of each region.
    pub(crate) fn lens(&self) -> impl Iterator<Item = u64> + '_ {
        self.regions.iter().map(|region| region.len() / UNIT)
    }

    /// Bytes of all regions.
    pub(crate) fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.len()).sum()
    }

    /// The regions as a source states them.
    pub(crate) fn stated(&self) -> Result<Vec<RegionInfo>, MigrateError> {
        (0_u16..)
            .zip(&self.regions)
            .map(|(id, region)| {
                if !region.len().is_multiple_of(UNIT) {
                    return Err(MigrateError::Mismatch(format!(
                        "region {id} has {:#x} bytes, not a whole number of units of {UNIT}",
                        region.len()
                    )));
                }
                Ok(RegionInfo {
                    id,
                    flags: 0,
                    guest_base: region.guest_base().get(),
                    length: region.len(),
                    granule: UNIT,
                    page_size: region.page_size().bytes(),
                })
            })
            .collect()
    }

    /// The units that a run of a layout's granules has.
    pub(crate) fn units_of(&self, id: RegionId, first: u64, count: u64) -> Option<Units> {
        let region = usize::from(id.get());
        let units = Units { region, first, count };
        let len = self.regions.get(region)?.len() / UNIT;
        first.checked_add(count).is_some_and(|end| end <= len).then_some(units)
    }

    /// Whether any byte of the unit cannot be read.
    pub(crate) fn is_poisoned(&self, region: usize, unit: u64) -> bool {
        self.poisoned[region] && {
            let region = &self.regions[region];
            let granule = (unit * UNIT) >> region.granule().shift();
            region.page_map().state(GranuleIndex::new(granule)) == State::Poisoned
        }
    }

    /// Copies units out. They may be written meanwhile: see
    /// [`Mapping::read_at`](pageferry_memory::Mapping::read_at).
    pub(crate) fn read(&self, units: Units, bytes: &mut [u8]) -> Result<(), OutOfRange> {
        self.regions[units.region].guest_view().read_at(units.first * UNIT, bytes)
    }

    /// Whether there is nothing behind any of the units, as of now: zeros. Reading them through
    /// the mapping would fill the memory file.
    pub(crate) fn is_hole(&self, units: Units) -> bool {
        let Some(file) = self.regions[units.region].file().filter(|_| !self.poisoned[units.region])
        else {
            return false;
        };
        let begin = units.first * UNIT;
        match rustix::fs::seek(file.fd(), SeekFrom::Data(begin)) {
            Ok(data) => data >= begin + units.bytes(),
            // No data from there on.
            Err(Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    /// Whether a unit is all zero, as of now.
    pub(crate) fn is_zero(
        &self,
        region: usize,
        unit: u64,
        scratch: &mut [u8; UNIT as usize],
    ) -> Result<bool, OutOfRange> {
        let view = self.regions[region].guest_view();
        for probe in PROBES {
            let mut word = [0; 8];
            view.read_at(unit * UNIT + probe, &mut word)?;
            if word != [0; 8] {
                return Ok(false);
            }
        }
        view.read_at(unit * UNIT, scratch)?;
        Ok(is_zero(scratch))
    }

    /// Units to be sent from where they lie.
    pub(crate) fn piece(&self, units: Units) -> Result<Piece<'_>, OutOfRange> {
        let view = self.regions[units.region].guest_view();
        let (offset, length) = (units.first * UNIT, units.count * UNIT);
        let end = offset.checked_add(length).filter(|end| *end <= view.range().len());
        if end.is_none() {
            return Err(OutOfRange { offset, len: length, mapping: view.range() });
        }
        let start = view.as_ptr().wrapping_add(offset as usize);
        // SAFETY: inside the view, as was just checked, which stays mapped while `self` has it;
        // the lifetime is that of the borrow.
        Ok(unsafe { Piece::from_raw(start, length as usize) })
    }

    /// Where units are to be received.
    pub(crate) fn place(&self, units: Units) -> Result<Place<'_>, OutOfRange> {
        let view = self.regions[units.region].guest_view();
        Place::memory(view, units.first * UNIT, (units.count * UNIT) as usize)
    }

    /// Writes units.
    pub(crate) fn write(&self, units: Units, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.regions[units.region].guest_view().write_at(units.first * UNIT, bytes)
    }
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
