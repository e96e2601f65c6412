//! The harness of a guest's migration, for unit tests, property tests and fuzzing.

use crate::core::{
    AcceptedRegion, Channel, Decoder, DestinationEvent, DestinationLane, DestinationLaneEvent,
    Frame, GuestDestinationSession, GuestLimits, GuestSourceSession, Hello, Hold, Item, Lane,
    MIN_MAX_PAYLOAD, Phase, RegionInfo, Role, SessionId, SourceEvent, SourceLane, StateInfo,
    StateName, Terms, UnitRun, WireSpan,
};

const UNITS: u64 = 64;
const SESSION: SessionId = SessionId(*b"fuzzfuzzfuzzfuzz");
const STATE_LIMIT: u64 = 1 << 16;

fn terms() -> Terms {
    Terms { max_payload: MIN_MAX_PAYLOAD, ..Terms::guest() }
}

fn regions() -> Vec<RegionInfo> {
    vec![RegionInfo {
        id: 0,
        flags: 0,
        guest_base: 0,
        length: UNITS * 4096,
        granule: 4096,
        page_size: 4096,
    }]
}

/// Decodes `data`, and hands its frames to a destination of a guest that has shaken hands and does
/// what it is told, and to a source that has got as far as it gets by itself. A `Ping`'s number
/// chooses the connection of the frames after it; a link that a frame ends is made anew where that
/// is possible.
///
/// # Panics
/// If the core breaks a promise: more is held or counted than there is, a guest runs that nobody
/// gave away, or is taken back that ran.
pub fn guests(data: &[u8]) {
    let lanes = match data.first().map(|byte| byte % 3) {
        Some(1) => Lane { index: 1, of: 1 },
        Some(2) => Lane { index: 1, of: 0 },
        _ => Lane::default(),
    };
    let mut destination = Destination::new(lanes);
    let mut source = Source::new(lanes);
    let mut channel = Channel::Control;
    let mut decoder = Decoder::new(MIN_MAX_PAYLOAD);
    let mut rest = data;
    // What remains after the last whole item is the beginning of one.
    while let Ok((taken, Some(item))) = decoder.feed(rest) {
        rest = &rest[taken..];
        let Item::Frame(frame) = item else { continue };
        if let Frame::Ping { nonce } = frame {
            channel = [Channel::Control, Channel::Pages, Channel::Faults][(nonce % 3) as usize];
        }
        destination.step(channel, &frame);
        source.step(channel, &frame);
    }
}

struct Destination {
    session: GuestDestinationSession,
    lanes: Lane,
    joined: Vec<DestinationLane>,
    told: bool,
}

impl Destination {
    fn new(lanes: Lane) -> Self {
        let mut limits = GuestLimits::default();
        (limits.state_bytes, limits.memory_bytes) = (STATE_LIMIT, 1 << 30);
        let session = GuestDestinationSession::new(terms(), limits);
        let mut this = Self { session, lanes, joined: Vec::new(), told: false };
        this.greet();
        this
    }

    fn greet(&mut self) {
        let source = GuestSourceSession::new(terms(), SESSION, self.lanes, regions());
        let offer = source.expect("these regions are in order").offer();
        assert_eq!(self.session.receive(&Frame::Hello(offer)), Ok(DestinationEvent::Agreed));
    }

    fn join(&mut self) {
        for (channel, of) in [(Channel::Pages, self.lanes.index), (Channel::Faults, self.lanes.of)]
        {
            let offer = terms().offer(Role::GuestSource, channel, SESSION);
            for index in 0..of {
                let offer = Hello { lane: Lane { index, of }, ..offer };
                self.joined.push(self.session.join(&offer).expect("it was announced"));
            }
        }
    }

    fn step(&mut self, channel: Channel, frame: &Frame) {
        let lane = self.joined.iter_mut().find(|lane| lane.agreed().channel == channel);
        let result = match lane {
            Some(lane) => lane.receive(frame).and_then(|event| {
                lane.settle();
                match event {
                    DestinationLaneEvent::RoundEnded(end) => self.session.lane_ended(end),
                    _ => Ok(DestinationEvent::Nothing),
                }
            }),
            None => {
                let before = self.session.phase();
                let result = self.session.receive(frame);
                assert!(before != Phase::Closed || result.is_err(), "accepted after the end");
                self.session.settle();
                result
            }
        };
        match result {
            Ok(event) => self.follow(&event),
            Err(_) => self.lose(),
        }
        self.check();
    }

    fn send(&mut self, frame: &Frame) {
        self.session.send(frame).unwrap_or_else(|error| panic!("{frame:?}: {error}"));
    }

    fn follow(&mut self, event: &DestinationEvent) {
        match event {
            DestinationEvent::Regions => {
                let regions = self.session.geometry().expect("they have come").regions();
                let granules = regions
                    .iter()
                    .map(|region| AcceptedRegion { id: region.id, granule: region.granule })
                    .collect();
                self.send(&Frame::Accept(granules));
                self.join();
            }
            DestinationEvent::RoundDone => {
                if let Some(ack) = self.session.round_ack() {
                    self.send(&ack);
                }
            }
            DestinationEvent::Switched => {
                let (info, bytes) = self.session.take_state().expect("it is complete");
                assert_eq!(info.digest, *blake3::hash(&bytes).as_bytes());
                assert!(bytes.len() as u64 <= STATE_LIMIT);
                let ready = self.session.ready().expect("nothing was asked for");
                self.send(&ready);
            }
            DestinationEvent::Run => {
                self.told = true;
                self.send(&Frame::Running);
            }
            DestinationEvent::Cancelled(_) => self.send(&Frame::Cancelled),
            DestinationEvent::Resumed(_) => {
                let have: Vec<Frame> = self.session.have().collect();
                have.iter().for_each(|frame| self.send(frame));
                let standing = self.session.standing().expect("it has said so before");
                self.send(&standing);
            }
            DestinationEvent::Left => self.lose(),
            _ => {}
        }
        if self.session.phase() == Phase::Running
            && let Some(complete) = self.session.completion()
        {
            self.send(&complete);
        }
    }

    /// The link is over; if there is something to go on with, a new one begins.
    fn lose(&mut self) {
        self.session.lost();
        self.joined.clear();
        if self.session.reconnect().is_ok() {
            self.greet();
            self.join();
        }
    }

    fn check(&self) {
        assert!(self.told || !self.session.may_run(), "nobody gave the guest away");
        if self.session.granules().is_empty() {
            return;
        }
        let (counts, missing) = (self.session.counts(), self.session.missing().total());
        let due = self.session.due().total();
        // What has come in part is neither.
        assert!(counts.filled + counts.poisoned + due <= missing, "units are invented");
        if self.joined.is_empty() && self.session.phase() == Phase::Comparing {
            assert_eq!(counts.filled + counts.poisoned + due, missing, "units are lost");
        }
    }
}

struct Source {
    session: GuestSourceSession,
    joined: Vec<SourceLane>,
    ran: bool,
}

impl Source {
    /// A source that has offered its regions.
    fn new(lanes: Lane) -> Self {
        let session = GuestSourceSession::new(terms(), SESSION, lanes, regions())
            .expect("these regions are in order");
        let mut this = Self { session, joined: Vec::new(), ran: false };
        this.greet();
        let regions = this.session.regions();
        this.send(&regions);
        this
    }

    fn greet(&mut self) {
        let answer = terms()
            .answer_as(Role::GuestDestination, &self.session.offer())
            .expect("the terms agree with themselves");
        assert_eq!(self.session.receive(&Frame::Hello(answer)), Ok(SourceEvent::Agreed));
    }

    fn send(&mut self, frame: &Frame) {
        self.session.send(frame).unwrap_or_else(|error| panic!("{frame:?}: {error}"));
    }

    fn step(&mut self, channel: Channel, frame: &Frame) {
        if self.session.phase() == Phase::Closed {
            return;
        }
        let lane = self.joined.iter_mut().find(|lane| lane.offer().channel == channel);
        let result = match lane {
            Some(lane) => lane.receive(frame).map(|_| SourceEvent::Nothing),
            None => self.session.receive(frame),
        };
        match result {
            Ok(event) => self.follow(&event, frame),
            Err(_) => self.lose(),
        }
        let hold = self.session.hold();
        self.ran |= hold == Hold::Theirs;
        assert!(!self.ran || hold == Hold::Theirs, "a guest that ran elsewhere was taken back");
    }

    fn follow(&mut self, event: &SourceEvent, frame: &Frame) {
        match event {
            SourceEvent::Accepted => {
                let lanes = self.session.offer().lane;
                for (channel, of) in [(Channel::Pages, lanes.index), (Channel::Faults, lanes.of)] {
                    for index in 0..of {
                        let lane = self.session.lane(channel, index);
                        self.joined.push(lane.expect("it was announced"));
                    }
                }
                self.stop();
            }
            SourceEvent::Ready => self.send(&Frame::Run),
            SourceEvent::Running => self.serve(),
            SourceEvent::Completed(counts) => {
                assert_eq!(*frame, Frame::Complete(*counts));
                self.send(&Frame::CompleteAck(*counts));
            }
            SourceEvent::Left => self.lose(),
            _ => {}
        }
    }

    /// The guest stops, and nothing of it has been sent.
    fn stop(&mut self) {
        let name = StateName::new("fuzz").expect("it is short");
        self.send(&Frame::StateBegin(StateInfo::of(name, 1, b"x")));
        self.send(&Frame::State { offset: 0, bytes: b"x".to_vec() });
        let runs = vec![UnitRun { first: 0, count: UNITS }];
        self.send(&Frame::Missing { region: 0, runs });
        self.send(&Frame::Switch { round: 0, missing: UNITS });
    }

    fn serve(&mut self) {
        let all = UnitRun { first: 0, count: UNITS };
        while let Some(run) = self.session.to_send().claim(0, all) {
            let span = WireSpan { region: 0, first: run.first, count: run.count as u32 };
            let zero = Frame::Zero { span };
            // Lanes whose hello has not come send nothing.
            let ready = |lane: &&mut SourceLane| {
                lane.offer().channel == Channel::Pages && lane.agreed().is_some()
            };
            match self.joined.iter_mut().find(ready) {
                Some(lane) => lane.send(&zero).expect("the guest runs at the destination"),
                None if self.session.offer().lane.index == 0 => self.send(&zero),
                None => return,
            }
        }
    }

    fn lose(&mut self) {
        self.session.lost();
        self.joined.clear();
        let lanes = self.session.offer().lane;
        let Some(belief) = self.session.belief() else { return };
        if self.session.reconnect(lanes).is_ok() {
            self.greet();
            self.send(&Frame::Resume(belief));
        }
    }
}
