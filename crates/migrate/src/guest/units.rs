//! Runs of units of a guest's memory.

use crate::core::{UnitRun, WireSpan};

/// Bytes of a unit.
pub(crate) const UNIT: u64 = 4096;

/// Consecutive units of one region, by the region's index.
#[derive(Copy, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Units {
    pub(crate) region: usize,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

impl Units {
    pub(crate) fn new(region: usize, run: UnitRun) -> Self {
        Self { region, first: run.first, count: run.count }
    }

    pub(crate) fn end(self) -> u64 {
        self.first + self.count
    }

    /// How many bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.count * UNIT
    }

    pub(crate) fn run(self) -> UnitRun {
        UnitRun { first: self.first, count: self.count }
    }

    /// The run that the other side names, which is within its region.
    pub(crate) fn of_wire(span: WireSpan) -> Self {
        Self { region: span.region.into(), first: span.first, count: span.count.into() }
    }

    /// As the other side names it: of at most as many units as a span can have.
    pub(crate) fn to_wire(self) -> WireSpan {
        let region = u16::try_from(self.region).expect("regions are counted in 16 bits");
        let count = u32::try_from(self.count).expect("runs are sent in pieces");
        WireSpan { region, first: self.first, count }
    }

    /// The run widened to whole multiples of `granule` units, within a region whose units are such
    /// a multiple themselves.
    pub(crate) fn widened(self, granule: u64) -> Self {
        let first = self.first - self.first % granule;
        let end = self.end().next_multiple_of(granule);
        Self { first, count: end - first, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widened_to_granules() {
        let units = Units { region: 0, first: 513, count: 512 };
        assert_eq!(units.widened(512), Units { region: 0, first: 512, count: 1024 });
        assert_eq!(units.widened(1), units);
    }
}
