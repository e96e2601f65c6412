//! Tests of the two ends, against the tables and against each other.

mod bytes;
mod counts;
mod model;
mod refused;
mod tables;
mod units;

use proptest::prelude::*;

use super::*;
use crate::core::{
    Channel, Counts, DataHeader, Features, Frame, Hello, Kind, Lane, Phase, ProtocolError, Refusal,
    RefusalCode, RegionInfo, Role, SessionId, Terms, WireSpan, images, tests::any_span,
};

const SESSION: SessionId = SessionId(*b"0123456789abcdef");
const UNIT: u64 = 4096;
const STATE: &[u8] = b"state";

/// All combinations of having connections of their own for pages and for faults.
const LANES: [Lane; 4] = [
    Lane { index: 0, of: 0 },
    Lane { index: 1, of: 0 },
    Lane { index: 0, of: 1 },
    Lane { index: 1, of: 1 },
];

fn span(region: u16, first: u64, count: u32) -> WireSpan {
    WireSpan { region, first, count }
}

fn run(first: u64, count: u64) -> UnitRun {
    UnitRun { first, count }
}

fn region(id: u16, units: u64) -> RegionInfo {
    RegionInfo {
        id,
        flags: 0,
        guest_base: u64::from(id) << 40,
        length: units * UNIT,
        granule: UNIT,
        page_size: UNIT,
    }
}

/// 64 units and 8 units, and all of them.
fn regions() -> Vec<RegionInfo> {
    vec![region(0, 64), region(3, 8)]
}

const TOTAL: u64 = 72;

/// Granules of 4 units and of one.
fn accept() -> Frame {
    Frame::Accept(vec![
        AcceptedRegion { id: 0, granule: 4 * UNIT },
        AcceptedRegion { id: 3, granule: UNIT },
    ])
}

fn missing_all() -> [Frame; 2] {
    [
        Frame::Missing { region: 0, runs: vec![run(0, 64)] },
        Frame::Missing { region: 3, runs: vec![run(0, 8)] },
    ]
}

fn state() -> StateInfo {
    StateInfo::of(StateName::new("test").unwrap(), 1, STATE)
}

fn data(span: WireSpan) -> Frame {
    let length = span.count * UNIT as u32;
    Frame::Data(DataHeader { span, length, fragment: None })
}

fn packed(span: WireSpan, codec: Codec, length: u32) -> Frame {
    Frame::Packed(PackedHeader { span, codec, length })
}

fn state_chunk() -> Frame {
    Frame::State { offset: 0, bytes: STATE.to_vec() }
}

/// A harmless frame of each kind that only guests have.
pub(in crate::core) fn sample(kind: Kind) -> Frame {
    match kind {
        Kind::Accept => accept(),
        Kind::RoundBegin => Frame::RoundBegin { round: 1, units: 5 },
        Kind::RoundEnd => Frame::RoundEnd { round: 1, units: 0 },
        Kind::RoundAck => Frame::RoundAck { round: 1, units: 0 },
        Kind::Packed => packed(span(0, 0, 4), Codec::Lz4, 100),
        Kind::StateBegin => Frame::StateBegin(state()),
        Kind::State => state_chunk(),
        Kind::Missing => Frame::Missing { region: 0, runs: vec![run(0, 64)] },
        Kind::Switch => Frame::Switch { round: 0, missing: TOTAL },
        Kind::Ready => Frame::Ready { missing: TOTAL },
        Kind::Run => Frame::Run,
        Kind::Running => Frame::Running,
        Kind::Cancel => Frame::Cancel(Refusal::new(RefusalCode::Asked, "changed my mind")),
        Kind::Cancelled => Frame::Cancelled,
        Kind::Resume => Frame::Resume(Belief::Given),
        Kind::Dropped => Frame::Dropped,
        Kind::Have => Frame::Have { region: 0, runs: vec![run(0, 4)] },
        Kind::HaveEnd => Frame::HaveEnd { present: 0, poisoned: 0 },
        other => panic!("{other} is not about guests alone"),
    }
}

/// Both ends with all their connections, and what one sends received by the other at once.
struct Pair {
    source: GuestSourceSession,
    destination: GuestDestinationSession,
    pages: Vec<(SourceLane, DestinationLane)>,
    faults: Vec<(SourceLane, DestinationLane)>,
}

impl Pair {
    /// Nothing has been said.
    fn new(lanes: Lane) -> Self {
        let source = GuestSourceSession::new(Terms::guest(), SESSION, lanes, regions()).unwrap();
        let destination = GuestDestinationSession::new(Terms::guest(), GuestLimits::default());
        Self { source, destination, pages: Vec::new(), faults: Vec::new() }
    }

    /// The hellos on control.
    fn greet(&mut self) {
        self.destination.receive(&Frame::Hello(self.source.offer())).unwrap();
        let answer = *self.destination.agreed().unwrap();
        assert_eq!(self.source.receive(&Frame::Hello(answer)), Ok(SourceEvent::Agreed));
    }

    /// All further connections.
    fn join(&mut self) {
        let Lane { index, of } = self.source.offer().lane;
        for (channel, n) in [(Channel::Pages, index), (Channel::Faults, of)] {
            for index in 0..n {
                let mut source = self.source.lane(channel, index).unwrap();
                let destination = self.destination.join(&source.offer()).unwrap();
                let answer = Frame::Hello(*destination.agreed());
                assert_eq!(source.receive(&answer), Ok(SourceLaneEvent::Agreed));
                let lanes =
                    if channel == Channel::Pages { &mut self.pages } else { &mut self.faults };
                lanes.push((source, destination));
            }
        }
    }

    /// To where rounds can begin.
    fn accepted(lanes: Lane) -> Self {
        let mut pair = Self::new(lanes);
        pair.greet();
        let regions = pair.source.regions();
        pair.say(&regions);
        pair.answer(&accept());
        pair.join();
        pair
    }

    fn say(&mut self, frame: &Frame) -> DestinationEvent {
        self.source.send(frame).unwrap();
        let event = self.destination.receive(frame).unwrap();
        self.destination.settle();
        event
    }

    fn answer(&mut self, frame: &Frame) -> SourceEvent {
        self.destination.send(frame).unwrap();
        self.source.receive(frame).unwrap()
    }

    /// A page, on the first connection that has pages; on the one for faults, if `fault`.
    fn page(&mut self, frame: &Frame, fault: bool) {
        let lanes = if fault { &mut self.faults } else { &mut self.pages };
        match lanes.first_mut() {
            None => {
                assert!(matches!(self.say(frame), DestinationEvent::Page(_)));
            }
            Some((source, destination)) => {
                source.send(frame).unwrap();
                let event = destination.receive(frame).unwrap();
                assert!(matches!(event, DestinationLaneEvent::Page(_)));
                destination.settle();
            }
        }
    }

    /// A round that carries these; not acknowledged.
    fn round(&mut self, number: u64, pages: &[Frame]) -> DestinationEvent {
        self.say(&Frame::RoundBegin { round: number, units: TOTAL });
        pages.iter().for_each(|page| self.page(page, false));
        let units = self.source.totals();
        let mut event = self.say(&Frame::RoundEnd { round: number, units });
        for n in 0..self.pages.len() {
            event = self.end_lane(n, number);
        }
        event
    }

    fn end_lane(&mut self, n: usize, round: u64) -> DestinationEvent {
        let source = &mut self.pages[n].0;
        let frame = Frame::RoundEnd { round, units: source.units() };
        source.send(&frame).unwrap();
        self.lane_ended(n, &frame)
    }

    fn lane_ended(&mut self, n: usize, frame: &Frame) -> DestinationEvent {
        let event = self.pages[n].1.receive(frame).unwrap();
        let DestinationLaneEvent::RoundEnded(end) = event else { panic!("{event:?}") };
        self.destination.lane_ended(end).unwrap()
    }

    fn acknowledge(&mut self) {
        let ack = self.destination.round_ack().unwrap();
        self.answer(&ack);
    }

    /// The state, and these as missing, and the switch.
    fn switch(&mut self, missing: &[Frame], round: u64) -> DestinationEvent {
        self.say(&Frame::StateBegin(state()));
        self.say(&state_chunk());
        missing.iter().for_each(|frame| {
            self.say(frame);
        });
        let missing = self.source.to_send().total();
        self.say(&Frame::Switch { round, missing })
    }

    /// Everything is missing, and the guest runs at the destination.
    fn serving(lanes: Lane) -> Self {
        let mut pair = Self::accepted(lanes);
        assert_eq!(pair.switch(&missing_all(), 0), DestinationEvent::Switched);
        let ready = pair.destination.ready().unwrap();
        pair.answer(&ready);
        pair.say(&Frame::Run);
        pair.answer(&Frame::Running);
        pair
    }

    /// Sends everything that is still to be sent, as zeros.
    fn fill(&mut self) {
        for (index, id) in [(0, 0), (1, 3)] {
            let all = run(0, [64, 8][index]);
            while let Some(found) = self.source.to_send().claim(index, all) {
                let span = span(id, found.first, found.count as u32);
                self.page(&Frame::Zero { span }, false);
            }
        }
    }

    /// The link breaks, and both sides notice.
    fn lose(&mut self) -> (AfterLoss, AfterLoss) {
        let after = (self.source.lost(), self.destination.lost());
        (self.pages, self.faults) = (Vec::new(), Vec::new());
        after
    }

    /// A new link, up to the hellos.
    fn reconnect(&mut self, lanes: Lane) {
        self.source.reconnect(lanes).unwrap();
        self.destination.reconnect().unwrap();
        self.greet();
        self.join();
    }

    /// The source resumes, and the destination says what it has and where it stands.
    fn resume(&mut self) -> SourceEvent {
        let belief = self.source.belief().unwrap();
        assert_eq!(self.say(&Frame::Resume(belief)), DestinationEvent::Resumed(belief));
        let have: Vec<Frame> = self.destination.have().collect();
        have.iter().for_each(|frame| {
            self.answer(frame);
        });
        let standing = self.destination.standing().unwrap();
        self.answer(&standing)
    }
}

pub(in crate::core) fn any_frame() -> impl Strategy<Value = Frame> {
    let number = any::<u64>;
    let refusal = (any::<u16>(), any::<String>())
        .prop_map(|(code, text)| Refusal::new(RefusalCode::from_wire(code), &text));
    let runs = || {
        let run = (number(), number()).prop_map(|(first, count)| run(first, count));
        prop::collection::vec(run, 0..20)
    };
    let accepted =
        (any::<u16>(), number()).prop_map(|(id, granule)| AcceptedRegion { id, granule });
    let info = ("[!-~]{1,16}", any::<u32>(), number(), any::<[u8; 32]>()).prop_map(
        |(name, version, length, digest)| {
            let name = StateName::new(&name).unwrap();
            Frame::StateBegin(StateInfo { name, version, length, digest })
        },
    );
    let simple = prop::sample::select(vec![
        Frame::Run,
        Frame::Running,
        Frame::Cancelled,
        Frame::Dropped,
        Frame::Resume(Belief::Given),
        Frame::Resume(Belief::Running),
    ]);
    let hello = (any::<(u16, u16, u32)>(), 0..6_usize).prop_map(|((index, of, bound), which)| {
        let role = [Role::GuestSource, Role::GuestDestination][which % 2];
        let channel = [Channel::Control, Channel::Pages, Channel::Faults][which % 3];
        let terms = Terms { max_payload: bound, ..Terms::guest() };
        Frame::Hello(Hello { lane: Lane { index, of }, ..terms.offer(role, channel, SESSION) })
    });
    prop_oneof![
        hello,
        prop::collection::vec(accepted, 0..5).prop_map(Frame::Accept),
        (0..3_u8, number(), number()).prop_map(|(which, round, units)| match which {
            0 => Frame::RoundBegin { round, units },
            1 => Frame::RoundEnd { round, units },
            _ => Frame::RoundAck { round, units },
        }),
        (any_span(), prop::sample::select(Codec::ALL.to_vec()), 1..2000_u32)
            .prop_map(|(span, codec, length)| packed(span, codec, length)),
        info,
        (number(), prop::collection::vec(any::<u8>(), 1..100))
            .prop_map(|(offset, bytes)| Frame::State { offset, bytes }),
        (any::<u16>(), runs()).prop_map(|(region, runs)| Frame::Missing { region, runs }),
        (any::<u16>(), runs()).prop_map(|(region, runs)| Frame::Have { region, runs }),
        (number(), number()).prop_map(|(round, missing)| Frame::Switch { round, missing }),
        number().prop_map(|missing| Frame::Ready { missing }),
        (number(), number()).prop_map(|(present, poisoned)| Frame::HaveEnd { present, poisoned }),
        refusal.prop_map(Frame::Cancel),
        simple,
    ]
}
