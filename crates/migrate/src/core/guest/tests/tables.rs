//! Every kind in every phase on every channel, received and sent, by the tables.

use super::*;

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum Side {
    Source,
    Destination,
}

use Side::{Destination, Source};

/// What is looked at.
#[derive(Copy, Clone, Debug)]
struct Case {
    side: Side,
    lanes: Lane,
    channel: Channel,
    phase: Phase,
    kind: Kind,
}

/// What a page of a round, or its end, looks like.
const IN_ROUND: &[Kind] = &[Kind::Data, Kind::Packed, Kind::Zero, Kind::RoundEnd];

impl Case {
    fn phase_of(&self, pair: &Pair) -> Phase {
        match self.side {
            Source => pair.source.phase(),
            Destination => pair.destination.phase(),
        }
    }

    /// A pair at the phase, in which the kind would be right if it may be; `None` if nobody is
    /// ever there.
    fn pair(&self) -> Option<Pair> {
        let pair = self.control()?;
        let there = match self.channel {
            Channel::Pages => !pair.pages.is_empty(),
            Channel::Faults => !pair.faults.is_empty(),
            _ => true,
        };
        there.then_some(pair)
    }

    fn control(&self) -> Option<Pair> {
        let Self { lanes, phase, kind, .. } = *self;
        let mut pair = Pair::new(lanes);
        macro_rules! stop_here {
            () => {
                if self.phase_of(&pair) == phase {
                    return Some(pair);
                }
            };
        }
        if self.channel == Channel::Control {
            stop_here!();
        }
        pair.greet();
        stop_here!();
        let regions = pair.source.regions();
        pair.say(&regions);
        stop_here!();
        pair.answer(&accept());
        pair.join();
        if phase == Phase::Greeting {
            // The phase of a further connection alone.
            return (self.side == Source).then_some(pair);
        }
        if self.phase_of(&pair) == phase {
            match kind {
                Kind::RoundAck => {
                    pair.round(1, &[]);
                }
                _ if IN_ROUND.contains(&kind) => {
                    pair.say(&Frame::RoundBegin { round: 1, units: TOTAL });
                }
                _ => {}
            }
            return Some(pair);
        }
        // The pages of the last round are late.
        let late = self.side == Destination
            && lanes.index > 0
            && (phase == Phase::Settling
                || self.channel == Channel::Pages && IN_ROUND.contains(&kind));
        if late {
            pair.say(&Frame::RoundBegin { round: 1, units: TOTAL });
            pair.pages[0].0.send(&sample(Kind::RoundEnd)).unwrap();
            pair.say(&sample(Kind::RoundEnd));
        } else if kind == Kind::RoundAck && !matches!(phase, Phase::Cancelling) {
            pair.round(1, &[]);
        }
        pair.say(&Frame::StateBegin(state()));
        if kind == Kind::State {
            stop_here!();
        }
        pair.say(&state_chunk());
        if kind == Kind::Missing {
            stop_here!();
        }
        missing_all().iter().for_each(|frame| {
            pair.say(frame);
        });
        stop_here!();
        let round = u64::from(late || kind == Kind::RoundAck && phase != Phase::Cancelling);
        pair.say(&Frame::Switch { round, missing: TOTAL });
        stop_here!();
        if late {
            pair.lane_ended(0, &sample(Kind::RoundEnd));
        }
        stop_here!();
        if matches!(phase, Phase::Cancelling | Phase::Dropping) {
            pair.say(&sample(Kind::Cancel));
            return (self.phase_of(&pair) == phase).then_some(pair);
        }
        let ready = pair.destination.ready().unwrap();
        pair.answer(&ready);
        stop_here!();
        if matches!(phase, Phase::Returning | Phase::Rejoining | Phase::Comparing) {
            self.come_back(&mut pair);
            return Some(pair);
        }
        if phase == Phase::Closed {
            pair.source.lost();
            pair.destination.lost();
            return Some(pair);
        }
        pair.say(&Frame::Run);
        stop_here!();
        pair.answer(&Frame::Running);
        if kind == Kind::Complete {
            pair.fill();
        }
        stop_here!();
        if kind != Kind::Complete {
            pair.fill();
        }
        let complete = pair.destination.completion().unwrap();
        pair.destination.send(&complete).unwrap();
        stop_here!();
        pair.source.receive(&complete).unwrap();
        stop_here!();
        pair.say(&Frame::CompleteAck(pair.source.counts()));
        (self.phase_of(&pair) == phase).then_some(pair)
    }

    /// A loss after which the kind is right.
    fn come_back(&self, pair: &mut Pair) {
        // Where the source has the guest, it does not resume, but may cancel.
        if (self.phase, self.kind) != (Phase::Rejoining, Kind::Cancel) {
            pair.source.send(&Frame::Run).unwrap();
        }
        if self.kind == Kind::Running {
            pair.destination.receive(&Frame::Run).unwrap();
            pair.destination.send(&Frame::Running).unwrap();
        }
        pair.lose();
        if self.kind == Kind::Dropped {
            pair.destination.drop_guest().unwrap();
        }
        pair.source.reconnect(self.lanes).unwrap();
        pair.destination.reconnect().unwrap();
        if self.phase == Phase::Returning {
            return;
        }
        pair.greet();
        pair.join();
        if self.phase == Phase::Rejoining {
            return;
        }
        pair.say(&Frame::Resume(Belief::Given));
        if matches!(self.kind, Kind::Ready | Kind::Running) {
            pair.answer(&Frame::HaveEnd { present: 0, poisoned: 0 });
        }
    }

    fn frame(&self, pair: &Pair, sent: bool) -> Frame {
        let to_destination = (self.side == Destination) != sent;
        let ready = Frame::Ready { missing: TOTAL };
        match self.kind {
            Kind::Hello if to_destination => Frame::Hello(pair.source.offer()),
            Kind::Hello => {
                let offer = match self.channel {
                    Channel::Pages | Channel::Faults => {
                        pair.source.lane(self.channel, 0).map(|lane| lane.offer()).ok()
                    }
                    _ => None,
                };
                let offer = offer.unwrap_or_else(|| pair.source.offer());
                Frame::Hello(Terms::guest().answer_as(Role::GuestDestination, &offer).unwrap())
            }
            Kind::Regions => pair.source.regions(),
            Kind::Request => Frame::Request { span: span(0, 4, 4), prefetch: false },
            Kind::Expedite => Frame::Expedite { span: span(0, 4, 4) },
            Kind::Data => data(span(0, 4, 4)),
            Kind::Zero => Frame::Zero { span: span(0, 4, 4) },
            Kind::Poison => Frame::Poison { span: span(0, 4, 4) },
            Kind::Complete => {
                let counts = Frame::Complete(Counts::default());
                pair.destination.completion().unwrap_or(counts)
            }
            Kind::CompleteAck => Frame::CompleteAck(pair.source.counts()),
            Kind::Error => Frame::Error(Refusal::new(RefusalCode::Memory, "no room")),
            Kind::Bye => Frame::Bye,
            Kind::Ping => Frame::Ping { nonce: 7 },
            Kind::Pong => Frame::Pong { nonce: 7 },
            Kind::Ready => ready,
            kind if (kind as u8) < Kind::Accept as u8 => images::tests::sample(kind),
            kind => sample(kind),
        }
    }

    /// What the table says.
    fn next(&self, sent: bool) -> Option<Phase> {
        let look = match (self.side, sent) {
            (Source, false) => guest_source_next,
            (Source, true) => guest_source_sends,
            (Destination, false) => guest_destination_next,
            (Destination, true) => guest_destination_sends,
        };
        look(self.lanes, self.channel, self.phase, self.kind)
    }

    /// Lets the frame come, or be sent; returns what became of it and the phase after it.
    fn step(&self, pair: &mut Pair, sent: bool) -> (Result<(), ProtocolError>, Phase) {
        let frame = self.frame(pair, sent);
        let lane = match self.channel {
            Channel::Pages => pair.pages.first_mut(),
            Channel::Faults => pair.faults.first_mut(),
            _ => None,
        };
        match (lane, self.side, sent) {
            (Some((lane, _)), Source, true) => (lane.send(&frame), lane.phase()),
            (Some((lane, _)), Source, false) => (lane.receive(&frame).map(drop), lane.phase()),
            (Some((_, lane)), Destination, true) => (lane.send(&frame), lane.phase()),
            (Some((_, lane)), Destination, false) => (lane.receive(&frame).map(drop), lane.phase()),
            (None, Source, true) => (pair.source.send(&frame), pair.source.phase()),
            (None, Source, false) => (pair.source.receive(&frame).map(drop), pair.source.phase()),
            (None, Destination, true) => (pair.destination.send(&frame), pair.destination.phase()),
            (None, Destination, false) => {
                (pair.destination.receive(&frame).map(drop), pair.destination.phase())
            }
        }
    }

    /// Returns whether the frame is legal, or `None` if nobody is ever there.
    fn check(&self, sent: bool) -> Option<bool> {
        let expected = self.next(sent);
        let Some(mut pair) = self.pair() else {
            // Without pages connections, nothing is behind what control says.
            if self.phase != Phase::Settling || self.lanes.index > 0 {
                assert_eq!(expected, None, "{self:?}: a row for where nobody is ever");
            }
            return None;
        };
        if self.phase == Phase::Greeting && self.channel != Channel::Control {
            let lane = pair.source.lane(self.channel, 0).unwrap();
            let (_, destination) = match self.channel {
                Channel::Pages => pair.pages.remove(0),
                _ => pair.faults.remove(0),
            };
            let lanes =
                if self.channel == Channel::Pages { &mut pair.pages } else { &mut pair.faults };
            lanes.insert(0, (lane, destination));
        }
        let (result, now) = self.step(&mut pair, sent);
        match expected {
            Some(Phase::Closed) if self.kind == Kind::Error && !sent => {
                assert!(matches!(result, Err(ProtocolError::Refused(_))), "{self:?}: {result:?}");
                assert_eq!(now, Phase::Closed, "{self:?}");
            }
            Some(next) => {
                assert_eq!(result, Ok(()), "{self:?}, sent: {sent}");
                // A further connection is in the session's phase, and a destination whose pages
                // have all come goes on by itself.
                let by_itself = match next {
                    Phase::Active => pair.source.phase(),
                    Phase::Settling if now == Phase::Restoring => now,
                    next => next,
                };
                assert_eq!(now, by_itself, "{self:?}, sent: {sent}");
            }
            None => {
                let Self { channel, phase, kind, .. } = *self;
                let error = Err(ProtocolError::Unexpected { kind, channel, phase });
                assert_eq!(result, error, "{self:?}, sent: {sent}");
                let after = if sent { phase } else { Phase::Closed };
                assert_eq!(now, after, "{self:?}, sent: {sent}");
            }
        }
        Some(expected.is_some())
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let sides = [Source, Destination].into_iter();
    sides.flat_map(|side| {
        LANES.into_iter().flat_map(move |lanes| {
            let channels = [
                (Channel::Control, true),
                (Channel::Pages, lanes.index > 0),
                (Channel::Faults, lanes.of > 0),
            ];
            let channels = channels.into_iter().filter(|(_, there)| *there);
            channels.flat_map(move |(channel, _)| {
                Phase::ALL.into_iter().flat_map(move |phase| {
                    Kind::ALL.into_iter().map(move |kind| Case {
                        side,
                        lanes,
                        channel,
                        phase,
                        kind,
                    })
                })
            })
        })
    })
}

/// Every frame in every phase on every channel, at both ends, coming and going: either the table's
/// next phase, or refused by name. What is refused on its way out changes nothing.
#[test]
fn every_frame_in_every_phase() {
    let (mut legal, mut illegal, mut nowhere) = (0, 0, 0);
    for case in cases() {
        for sent in [false, true] {
            // The hellos are not sent through the session.
            if sent && case.kind == Kind::Hello {
                continue;
            }
            match case.check(sent) {
                Some(true) => legal += 1,
                Some(false) => illegal += 1,
                None => nowhere += 1,
            }
        }
    }
    assert!(legal > 800 && illegal > 10_000, "{legal} legal, {illegal} illegal, {nowhere} nowhere");
}

/// The core of the tables, written a second time by hand.
#[test]
fn what_the_tables_must_say() {
    for lanes in LANES {
        let channels = [Channel::Control, Channel::Pages, Channel::Faults];
        for channel in channels {
            for kind in Kind::ALL {
                for look in [
                    guest_source_next,
                    guest_source_sends,
                    guest_destination_next,
                    guest_destination_sends,
                ] {
                    assert_eq!(look(lanes, channel, Phase::Closed, kind), None);
                }
            }
            for phase in Phase::ALL {
                let next = |kind| guest_destination_next(lanes, channel, phase, kind);
                let prepared = (channel, phase) == (Channel::Control, Phase::Prepared);
                assert_eq!(next(Kind::Run).is_some(), prepared, "run once, when it was said");
                let sends = |kind| guest_source_sends(lanes, channel, phase, kind);
                let deciding = (channel, phase) == (Channel::Control, Phase::Deciding);
                assert_eq!(sends(Kind::Run).is_some(), deciding, "run once, when it is ready");
                let given = [Phase::Committing, Phase::Serving, Phase::Completed, Phase::Comparing];
                if given.contains(&phase) {
                    assert_eq!(sends(Kind::Cancel), None, "no way back");
                }
                if [Phase::Starting, Phase::Running, Phase::Completing].contains(&phase) {
                    assert_eq!(next(Kind::Cancel), None, "no way back");
                }
                for page in [Kind::Data, Kind::Packed, Kind::Zero, Kind::Poison] {
                    let over = [Phase::Prepared, Phase::Completing, Phase::Completed];
                    if over.contains(&phase) {
                        assert_eq!(next(page), None, "{page} in {phase}");
                    }
                    if channel == Channel::Pages && phase == Phase::Committing {
                        assert_eq!(sends(page), None, "the background waits until it runs");
                    }
                }
                assert!(
                    channel == Channel::Control || sends(Kind::Cancel).is_none(),
                    "control alone decides"
                );
            }
        }
    }
}

/// What one side may send, the other may receive in the phase that it is in then.
#[test]
fn sending_and_receiving_fit() {
    let together = [
        (Phase::Listing, Phase::Listing),
        (Phase::Offering, Phase::Allocating),
        (Phase::Copying, Phase::Receiving),
        (Phase::Stopping, Phase::Loading),
        (Phase::Switching, Phase::Restoring),
        (Phase::Deciding, Phase::Prepared),
        (Phase::Committing, Phase::Starting),
        (Phase::Serving, Phase::Running),
        (Phase::Serving, Phase::Completing),
        (Phase::Completed, Phase::Completing),
        (Phase::Completed, Phase::Completed),
        (Phase::Cancelling, Phase::Dropping),
        (Phase::Rejoining, Phase::Rejoining),
        (Phase::Comparing, Phase::Comparing),
    ];
    let mut fitting = 0;
    for (source, destination) in together {
        for lanes in LANES {
            for channel in [Channel::Control, Channel::Pages, Channel::Faults] {
                for kind in Kind::ALL {
                    // All that was missing has been sent: nobody sends pages then.
                    let last = (source, destination) == (Phase::Serving, Phase::Completing);
                    // And what was acknowledged is not acknowledged again.
                    let again = (kind, destination) == (Kind::CompleteAck, Phase::Completed);
                    let sends = guest_source_sends(lanes, channel, source, kind).is_some();
                    if sends && !last && !again {
                        let next = guest_destination_next(lanes, channel, destination, kind);
                        assert!(next.is_some(), "{kind} on {channel} to {destination}");
                        fitting += 1;
                    }
                    if guest_destination_sends(lanes, channel, destination, kind).is_some() {
                        let next = guest_source_next(lanes, channel, source, kind);
                        assert!(next.is_some(), "{kind} on {channel} to {source}");
                        fitting += 1;
                    }
                }
            }
        }
    }
    assert!(fitting > 600, "{fitting}");
}
