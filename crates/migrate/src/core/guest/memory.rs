//! What all connections of one side of a session share: the guest's memory as it is known, and
//! where the session stands.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use super::{AcceptedRegion, UnitRun, UnitSet};
use crate::core::{
    Counts, DataHeader, Frame, Geometry, Hello, Kind, MIN_MAX_PAYLOAD, PackedHeader, Phase,
    ProtocolError, REGION_IMAGE, WireSpan, parts::Parts,
};

/// The largest granule, in bytes.
const MAX_GRANULE: u64 = 1 << 40;

/// Checks that a guest can have these regions, of at most `limit` bytes in all.
pub(super) fn check_regions(geometry: &Geometry, limit: u64) -> Result<(), ProtocolError> {
    let bad = |id, why| Err(ProtocolError::BadRegion { id, why });
    let mut bytes = 0_u64;
    for region in geometry.regions() {
        if region.flags & REGION_IMAGE != 0 {
            return bad(region.id, "a guest's memory is no image");
        }
        if region.granule > MIN_MAX_PAYLOAD.into() {
            return bad(region.id, "its unit is larger than the smallest bound on payloads");
        }
        bytes = bytes.saturating_add(region.length);
    }
    if bytes == 0 {
        return bad(0, "a guest without memory");
    }
    if bytes > limit {
        let what = "bytes of a guest's memory";
        return Err(ProtocolError::Limit { what, wanted: bytes, limit });
    }
    Ok(())
}

/// The memory, and who has what of it.
///
/// Bits are taken by whoever brings or sends a granule, and numbers only grow while a link lasts,
/// so that the connections need no lock among each other.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) geometry: Geometry,
    pub(super) granules: Vec<AcceptedRegion>,
    /// The link's number, and in the low 8 bits the phase.
    state: AtomicU64,
    /// Further connections in use.
    pub(super) lanes: AtomicUsize,
    /// Units carried by rounds.
    pub(super) units: AtomicU64,
    /// Destination: units that came in any round.
    pub(super) come: UnitSet,
    /// Units the destination did not have at the switch.
    pub(super) missing: UnitSet,
    /// Units of those that have not been sent, or have not come.
    pub(super) due: Arc<UnitSet>,
    /// Destination: units asked for that are not in place.
    pub(super) asked: UnitSet,
    /// Destination: units that have come and are not in place.
    pub(super) unsettled: AtomicU64,
    filled: AtomicU64,
    poisoned: AtomicU64,
    /// Source: a request has come after the guest was given away.
    pub(super) proof: AtomicBool,
}

impl Memory {
    /// The memory of a destination (`receives`) or a source, with the destination's granules.
    pub(super) fn new(
        geometry: &Geometry,
        granules: &[AcceptedRegion],
        receives: bool,
    ) -> Result<Self, ProtocolError> {
        let regions = geometry.regions();
        let bad = |id, why| Err(ProtocolError::BadAccept { id, why });
        if granules.len() != regions.len() {
            return bad(granules.len() as u16, "not as many as there are");
        }
        for (region, granule) in regions.iter().zip(granules) {
            if region.id != granule.id {
                return bad(granule.id, "not the region that is due");
            }
            let bytes = granule.granule;
            if !bytes.is_power_of_two() || bytes < region.granule || bytes > MAX_GRANULE {
                return bad(granule.id, "its granule is no power of two from the unit on");
            }
            if !region.length.is_multiple_of(bytes) {
                return bad(granule.id, "its length is not a whole number of granules");
            }
        }
        let set = |wanted: bool| {
            UnitSet::new(regions.iter().filter(|_| wanted).map(|region| region.granules()))
        };
        Ok(Self {
            geometry: geometry.clone(),
            granules: granules.to_vec(),
            state: AtomicU64::new(0),
            lanes: AtomicUsize::new(0),
            units: AtomicU64::new(0),
            come: set(receives),
            missing: set(true),
            due: Arc::new(set(true)),
            asked: set(receives),
            unsettled: AtomicU64::new(0),
            filled: AtomicU64::new(0),
            poisoned: AtomicU64::new(0),
            proof: AtomicBool::new(false),
        })
    }

    /// A memory of its own in the same state, without further connections.
    #[cfg(test)]
    pub(super) fn fork(&self) -> Self {
        let number = |from: &AtomicU64| AtomicU64::new(from.load(Ordering::Acquire));
        Self {
            geometry: self.geometry.clone(),
            granules: self.granules.clone(),
            state: number(&self.state),
            lanes: AtomicUsize::new(0),
            units: number(&self.units),
            come: self.come.fork(),
            missing: self.missing.fork(),
            due: Arc::new(self.due.fork()),
            asked: self.asked.fork(),
            unsettled: number(&self.unsettled),
            filled: number(&self.filled),
            poisoned: number(&self.poisoned),
            proof: AtomicBool::new(self.proof.load(Ordering::Acquire)),
        }
    }

    /// The number of the link that is up.
    pub(super) fn link(&self) -> u64 {
        self.state.load(Ordering::Acquire) >> 8
    }

    /// Where the session stands, for a connection that belongs to `link`.
    pub(super) fn phase(&self, link: u64) -> Phase {
        let state = self.state.load(Ordering::Acquire);
        let phase = Phase::ALL[(state & 0xff) as usize];
        if state >> 8 == link { phase } else { Phase::Closed }
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.state.store(self.link() << 8 | phase as u64, Ordering::Release);
    }

    /// Cuts off every connection there is.
    pub(super) fn next_link(&self) {
        self.state.store((self.link() + 1) << 8 | Phase::Closed as u64, Ordering::Release);
    }

    /// How what was missing at the switch has been answered.
    pub(super) fn counts(&self) -> Counts {
        Counts {
            filled: self.filled.load(Ordering::Acquire),
            poisoned: self.poisoned.load(Ordering::Acquire),
        }
    }

    pub(super) fn set_counts(&self, counts: Counts) {
        self.filled.store(counts.filled, Ordering::Release);
        self.poisoned.store(counts.poisoned, Ordering::Release);
    }

    pub(super) fn count(&self, units: u64, poisoned: bool) {
        let counter = if poisoned { &self.poisoned } else { &self.filled };
        counter.fetch_add(units, Ordering::AcqRel);
    }

    /// Units of a granule of the region with this index.
    fn granule(&self, index: usize) -> u64 {
        self.granules[index].granule / self.geometry.regions()[index].granule
    }

    /// Checks that a span lies within its region; returns the region's index and the run.
    fn within(&self, kind: Kind, span: WireSpan) -> Result<(usize, UnitRun), ProtocolError> {
        self.geometry.check(kind, span)?;
        let index = self.geometry.index(span.region)?;
        Ok((index, UnitRun { first: span.first, count: span.count.into() }))
    }

    /// Checks that a span is whole granules within its region.
    pub(super) fn whole(
        &self,
        kind: Kind,
        span: WireSpan,
    ) -> Result<(usize, UnitRun), ProtocolError> {
        let (index, run) = self.within(kind, span)?;
        let granule = self.granule(index);
        if run.first.is_multiple_of(granule) && run.count.is_multiple_of(granule) {
            Ok((index, run))
        } else {
            Err(ProtocolError::NotWhole { kind, span, granule })
        }
    }
}

/// Lists of runs: ascending whole granules, region by region, in any number of frames.
#[derive(Clone, Debug, Default)]
pub(super) struct RunOrder {
    next: (usize, u64),
}

impl RunOrder {
    /// Checks the runs of one frame, and puts them into `sets`.
    pub(super) fn note(
        &mut self,
        kind: Kind,
        (region, runs): (u16, &[UnitRun]),
        memory: &Memory,
        sets: &[&UnitSet],
    ) -> Result<(), ProtocolError> {
        let index = memory.geometry.index(region)?;
        let (units, granule) = (memory.geometry.regions()[index].granules(), memory.granule(index));
        if runs.is_empty() {
            return Err(ProtocolError::EmptySpan(kind));
        }
        for UnitRun { first, count } in runs.iter().copied() {
            let end = first.checked_add(count).filter(|end| *end <= units);
            let why = if count == 0 {
                "a run of nothing"
            } else if end.is_none() {
                "it lies outside the region"
            } else if (index, first) < self.next {
                "runs must ascend"
            } else if !first.is_multiple_of(granule) || !count.is_multiple_of(granule) {
                "not whole granules of the destination"
            } else {
                self.next = (index, first + count);
                for set in sets {
                    set.insert(index, UnitRun { first, count });
                }
                continue;
            };
            return Err(ProtocolError::BadRun { kind, region, first, count, why });
        }
        Ok(())
    }
}

/// What a frame of pages is about.
#[derive(Copy, Clone, Debug)]
pub(super) struct Page {
    pub(super) index: usize,
    pub(super) run: UnitRun,
    /// Nothing of these units came before on this connection.
    pub(super) first: bool,
    /// Nothing more of these units follows.
    pub(super) last: bool,
    pub(super) poisoned: bool,
}

/// Checks the pages that pass by on one connection, whichever way.
#[derive(Clone, Debug, Default)]
pub(super) struct Carrier {
    parts: Parts,
    /// Units carried by rounds on this connection.
    pub(super) units: u64,
    /// The last round that ended on it.
    ended: u64,
}

impl Carrier {
    /// Checks a frame of pages; `stopped`: it comes after the switch.
    pub(super) fn page(
        &mut self,
        memory: &Memory,
        agreed: &Hello,
        stopped: bool,
        frame: &Frame,
    ) -> Result<Page, ProtocolError> {
        let kind = frame.kind();
        let place = |span| {
            if stopped { memory.whole(kind, span) } else { memory.within(kind, span) }
        };
        let page = |(index, run)| Page { index, run, first: true, last: true, poisoned: false };
        match frame {
            Frame::Data(data) if data.fragment.is_some() => {
                self.part(memory, stopped, data, place(data.span)?)
            }
            Frame::Data(data) => {
                let found = place(data.span)?;
                memory.geometry.check_data(data)?;
                self.parts.data(data, 0)?;
                Ok(page(found))
            }
            Frame::Packed(packed) => {
                let found = place(packed.span)?;
                let unit = memory.geometry.regions()[found.0].granule;
                check_packed(packed, agreed, stopped, found.1.count * unit)?;
                // A source keeps no record of what came.
                let recorded = packed.codec.is_delta() && memory.come.capacity() > 0;
                if recorded && memory.come.absent(found.0, found.1).is_some() {
                    let why = "a difference to bytes that never came";
                    return Err(ProtocolError::BadPacking { span: packed.span, why });
                }
                self.parts.zero()?;
                Ok(page(found))
            }
            Frame::Zero { span } => {
                let found = place(*span)?;
                self.parts.zero()?;
                Ok(page(found))
            }
            Frame::Poison { span } => {
                let found = place(*span)?;
                let ends = self.parts.poison(*span)?;
                Ok(Page { first: !ends, poisoned: true, ..page(found) })
            }
            _ => unreachable!("only frames of pages are asked about"),
        }
    }

    /// Checks a part of a granule.
    fn part(
        &mut self,
        memory: &Memory,
        stopped: bool,
        data: &DataHeader,
        (index, run): (usize, UnitRun),
    ) -> Result<Page, ProtocolError> {
        let offset = data.fragment.unwrap_or_default();
        if !stopped || run.count != memory.granule(index) {
            let granule = if stopped { memory.granule(index) } else { 1 };
            return Err(ProtocolError::NotWhole { kind: Kind::Data, span: data.span, granule });
        }
        let bytes = memory.granules[index].granule;
        let room = bytes.saturating_sub(offset);
        if u64::from(data.length) > room {
            return Err(ProtocolError::PayloadLength {
                kind: Kind::Data,
                got: data.length.into(),
                expected: format!("the granule has {room} left at {offset}"),
            });
        }
        let first = !self.parts.begun();
        self.parts.data(data, bytes)?;
        Ok(Page { index, run, first, last: !self.parts.begun(), poisoned: false })
    }

    /// Counts a page of a round.
    pub(super) fn carried(&mut self, memory: &Memory, run: UnitRun) {
        self.units += run.count;
        memory.units.fetch_add(run.count, Ordering::AcqRel);
    }

    /// A round ends on this connection, after as many units as the other side says.
    pub(super) fn end(&mut self, round: u64, units: u64) -> Result<(), ProtocolError> {
        let kind = Kind::RoundEnd;
        if round != self.ended + 1 {
            return Err(ProtocolError::Round { kind, got: round, due: self.ended + 1 });
        }
        if units != self.units {
            return Err(ProtocolError::Units { kind, ours: self.units, theirs: units });
        }
        self.ended = round;
        Ok(())
    }
}

/// Checks packed bytes, which are `bytes` once they are unpacked.
fn check_packed(
    packed: &PackedHeader,
    agreed: &Hello,
    stopped: bool,
    bytes: u64,
) -> Result<(), ProtocolError> {
    let why = if !agreed.features.contains(packed.codec.needs()) {
        "the codec was not agreed on"
    } else if stopped && packed.codec.is_delta() {
        "a difference after the switch"
    } else if bytes > agreed.max_payload.into() {
        "unpacked, it is longer than a payload may be"
    } else if u64::from(packed.length) >= bytes {
        "unpacked, it is no longer than packed"
    } else {
        return Ok(());
    };
    Err(ProtocolError::BadPacking { span: packed.span, why })
}

/// Whether pages come one by one for a guest that has stopped at the source.
pub(super) fn stopped(phase: Phase) -> bool {
    !matches!(phase, Phase::Copying | Phase::Receiving | Phase::Loading | Phase::Settling)
}
