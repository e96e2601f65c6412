//! Which host addresses show which granules: one piece a view at first, more after `mremap` and
//! `munmap`.

use pageferry_memory::{GranuleIndex, GranuleRange, HostAddress, HostRange, Layout, RegionId};

/// Which of a region's mappings.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// Where everybody faults, but for the vCPUs if they have a view of their own.
    Guest,
    /// KVM's own.
    Vcpu,
}

/// A stretch of host addresses showing consecutive granules.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
struct Piece {
    host: HostRange,
    region: RegionId,
    view: View,
    first: GranuleIndex,
    granule_shift: u32,
}

impl Piece {
    fn granules(&self) -> GranuleRange {
        GranuleRange::new(self.first, self.host.len() >> self.granule_shift)
    }

    /// The part of this piece inside `range`, which may cut granules only at page boundaries that
    /// are granule boundaries too; a granule cut in two counts as inside.
    fn cut(&self, range: HostRange) -> Option<Piece> {
        let start = range.start().max(self.host.start());
        let end = range.end().min(self.host.end());
        if start >= end {
            return None;
        }
        let mask = (1u64 << self.granule_shift) - 1;
        let from = (start.get() - self.host.start().get()) & !mask;
        let to = (end.get() - self.host.start().get() + mask) & !mask;
        Some(self.slice(from, to.min(self.host.len())))
    }

    /// Bytes `from..to` of this piece.
    fn slice(&self, from: u64, to: u64) -> Piece {
        Piece {
            host: HostRange::new(HostAddress::new(self.host.start().get() + from), to - from),
            first: GranuleIndex::new(self.first.get() + (from >> self.granule_shift)),
            ..*self
        }
    }
}

/// The current placement of all regions.
#[derive(Clone, Debug)]
pub(crate) struct Views {
    /// Sorted by host address, not overlapping.
    pieces: Vec<Piece>,
}

impl Views {
    pub(crate) fn of(layout: &Layout) -> Self {
        let mut pieces: Vec<Piece> = layout
            .iter()
            .flat_map(|(id, region)| {
                let piece = move |host, view| Piece {
                    host,
                    region: id,
                    view,
                    first: GranuleIndex::new(0),
                    granule_shift: region.granule().shift(),
                };
                let vcpu = region.vcpu_view().map(|view| piece(view.range(), View::Vcpu));
                std::iter::once(piece(region.guest_view().range(), View::Guest)).chain(vcpu)
            })
            .collect();
        pieces.sort_by_key(|piece| piece.host.start());
        Self { pieces }
    }

    /// What `address` shows.
    pub(crate) fn find(&self, address: HostAddress) -> Option<(RegionId, GranuleIndex)> {
        let after = self.pieces.partition_point(|piece| piece.host.start() <= address);
        let piece = &self.pieces[after.checked_sub(1)?];
        let offset = address.offset_from(piece.host.start())?;
        (offset < piece.host.len()).then(|| {
            (piece.region, GranuleIndex::new(piece.first.get() + (offset >> piece.granule_shift)))
        })
    }

    /// Where the first granules of `run` are mapped in the guest view: the longest prefix that is
    /// contiguous. `None` when the first granule is mapped nowhere.
    pub(crate) fn place(
        &self,
        region: RegionId,
        run: GranuleRange,
    ) -> Option<(HostRange, GranuleRange)> {
        self.place_in(View::Guest, region, run)
    }

    /// As [`place`](Self::place), in this view.
    pub(crate) fn place_in(
        &self,
        view: View,
        region: RegionId,
        run: GranuleRange,
    ) -> Option<(HostRange, GranuleRange)> {
        // Regions are few and pieces more so; the common case is a hit at the first try.
        self.pieces.iter().find_map(|piece| {
            let granules = piece.granules();
            if piece.region != region || piece.view != view || !granules.contains(run.first()) {
                return None;
            }
            let skipped = run.first().get() - granules.first().get();
            let count = run.count().min(granules.count() - skipped);
            let from = skipped << piece.granule_shift;
            let host = piece.slice(from, from + (count << piece.granule_shift)).host;
            Some((host, GranuleRange::new(run.first(), count)))
        })
    }

    /// Every place of a region, in all views.
    pub(crate) fn places(&self, region: RegionId) -> impl Iterator<Item = HostRange> + '_ {
        let pieces = self.pieces.iter().filter(move |piece| piece.region == region);
        pieces.map(|piece| piece.host)
    }

    /// The granules shown in `range`.
    pub(crate) fn shown(
        &self,
        range: HostRange,
    ) -> impl Iterator<Item = (RegionId, GranuleRange)> + '_ {
        let parts = self.pieces.iter().filter_map(move |piece| piece.cut(range));
        parts.map(|part| (part.region, part.granules()))
    }

    /// `range` shows nothing any more. Returns what is gone for everybody: what only the vCPUs
    /// cannot see any more is still in the guest view.
    pub(crate) fn unmap(&mut self, range: HostRange) -> Vec<(RegionId, GranuleRange)> {
        let gone = self.take(range).into_iter().filter(|piece| piece.view == View::Guest);
        gone.map(|piece| (piece.region, piece.granules())).collect()
    }

    /// What `from` showed is shown at `to` from now on.
    pub(crate) fn remap(&mut self, from: HostRange, to: HostAddress) {
        let moved = self.take(from);
        // What the kernel mapped over is gone.
        if let Some(target) = HostRange::try_new(to, from.len()) {
            self.take(target);
        }
        for piece in moved {
            let offset = piece.host.start().get() - from.start().get();
            let Some(start) = to.checked_add(offset) else { continue };
            let Some(host) = HostRange::try_new(start, piece.host.len()) else { continue };
            self.pieces.push(Piece { host, ..piece });
        }
        self.pieces.sort_by_key(|piece| piece.host.start());
    }

    fn take(&mut self, range: HostRange) -> Vec<Piece> {
        let mut taken = Vec::new();
        let mut kept = Vec::new();
        for piece in &self.pieces {
            let Some(part) = piece.cut(range) else {
                kept.push(*piece);
                continue;
            };
            taken.push(part);
            let from = part.host.start().get() - piece.host.start().get();
            let to = from + part.host.len();
            if from > 0 {
                kept.push(piece.slice(0, from));
            }
            if to < piece.host.len() {
                kept.push(piece.slice(to, piece.host.len()));
            }
        }
        self.pieces = kept;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views() -> Views {
        let piece = |start: u64, pages: u64, region| Piece {
            host: HostRange::new(HostAddress::new(start), pages << 12),
            region: RegionId::new(region),
            view: View::Guest,
            first: GranuleIndex::new(0),
            granule_shift: 12,
        };
        Views { pieces: vec![piece(0x10000, 16, 0), piece(0x40000, 8, 1)] }
    }

    fn run(first: u64, count: u64) -> GranuleRange {
        GranuleRange::new(GranuleIndex::new(first), count)
    }

    fn pages(start: u64, count: u64) -> HostRange {
        HostRange::new(HostAddress::new(start), count << 12)
    }

    #[test]
    fn finds_what_is_mapped_and_nothing_else() {
        let views = views();
        let find = |address| views.find(HostAddress::new(address));
        assert_eq!(find(0x10000), Some((RegionId::new(0), GranuleIndex::new(0))));
        assert_eq!(find(0x1ffff), Some((RegionId::new(0), GranuleIndex::new(15))));
        assert_eq!(find(0x20000), None);
        assert_eq!(find(0x41fff), Some((RegionId::new(1), GranuleIndex::new(1))));
        assert_eq!(find(0xffff), None);
    }

    #[test]
    fn a_granule_has_a_place_in_each_view() {
        let mut views = views();
        let vcpu = HostRange::new(HostAddress::new(0x90000), 8 << 12);
        views.pieces.push(Piece { host: vcpu, view: View::Vcpu, ..views.pieces[1] });
        let found = views.find(HostAddress::new(0x93000));
        assert_eq!(found, Some((RegionId::new(1), GranuleIndex::new(3))));
        assert_eq!(views.place(RegionId::new(1), run(3, 1)).unwrap().0, pages(0x43000, 1));
        let place = |views: &Views| views.place_in(View::Vcpu, RegionId::new(1), run(3, 1));
        assert_eq!(place(&views).unwrap().0, pages(0x93000, 1));
        assert_eq!(views.place_in(View::Vcpu, RegionId::new(0), run(3, 1)), None);
        assert_eq!(views.unmap(pages(0x92000, 2)), [], "the guest view still shows it");
        assert_eq!(place(&views), None);
        assert_eq!(views.find(HostAddress::new(0x43000)), found);
    }

    #[test]
    fn unmapping_the_middle_leaves_both_ends() {
        let mut views = views();
        assert_eq!(views.unmap(pages(0x14000, 4)), [(RegionId::new(0), run(4, 4))]);
        assert_eq!(views.find(HostAddress::new(0x15000)), None);
        let (host, part) = views.place(RegionId::new(0), run(2, 10)).unwrap();
        assert_eq!((host, part), (pages(0x12000, 2), run(2, 2)));
        assert_eq!(views.place(RegionId::new(0), run(5, 1)), None);
        let (host, _) = views.place(RegionId::new(0), run(8, 8)).unwrap();
        assert_eq!(host, pages(0x18000, 8));
    }

    #[test]
    fn remapping_moves_granules_with_their_numbers() {
        let mut views = views();
        views.remap(pages(0x12000, 2), HostAddress::new(0x80000));
        assert_eq!(
            views.find(HostAddress::new(0x81000)),
            Some((RegionId::new(0), GranuleIndex::new(3)))
        );
        assert_eq!(views.find(HostAddress::new(0x12000)), None);
        let (host, part) = views.place(RegionId::new(0), run(0, 16)).unwrap();
        assert_eq!((host, part), (pages(0x10000, 2), run(0, 2)));
        let (host, part) = views.place(RegionId::new(0), run(2, 14)).unwrap();
        assert_eq!((host, part), (pages(0x80000, 2), run(2, 2)));
    }

    #[test]
    fn remapping_over_another_region_hides_it() {
        let mut views = views();
        views.remap(pages(0x10000, 2), HostAddress::new(0x40000));
        assert_eq!(
            views.find(HostAddress::new(0x40000)),
            Some((RegionId::new(0), GranuleIndex::new(0)))
        );
        assert_eq!(views.place(RegionId::new(1), run(0, 1)), None);
        assert!(views.place(RegionId::new(1), run(2, 6)).is_some());
    }
}
