//! What neither end lets pass.

use super::*;

fn name(error: &ProtocolError) -> String {
    let debug = format!("{error:?}");
    debug.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}

type Make = fn() -> Pair;

/// After everything that came before the rounds; in the first round; with the state; all but the
/// switch; running.
fn copying() -> Pair {
    Pair::accepted(Lane::default())
}

fn in_round() -> Pair {
    let mut pair = copying();
    pair.say(&Frame::RoundBegin { round: 1, units: TOTAL });
    pair
}

fn ended() -> Pair {
    let mut pair = copying();
    pair.round(1, &[Frame::Zero { span: span(0, 0, 64) }]);
    pair
}

fn loading() -> Pair {
    let mut pair = copying();
    pair.say(&Frame::StateBegin(state()));
    pair
}

fn listing() -> Pair {
    let mut pair = loading();
    pair.say(&state_chunk());
    pair
}

fn running() -> Pair {
    Pair::serving(Lane::default())
}

/// What a destination refuses although the kind may come, by the error's name.
#[test]
fn frames_that_a_destination_refuses() {
    let chunk = |offset, bytes: &[u8]| Frame::State { offset, bytes: bytes.to_vec() };
    let missing = |region, runs: &[UnitRun]| Frame::Missing { region, runs: runs.to_vec() };
    let zero = |region, first, count| Frame::Zero { span: span(region, first, count) };
    let part = |first, count, offset, length| {
        Frame::Data(DataHeader { span: span(0, first, count), length, fragment: Some(offset) })
    };
    let long = StateInfo { length: (16 << 20) + 1, ..state() };
    let other = StateInfo { digest: [7; 32], ..state() };
    let cases: Vec<(Make, Vec<Frame>, &str)> = vec![
        (copying, vec![Frame::RoundBegin { round: 0, units: 1 }], "Round"),
        (copying, vec![Frame::RoundBegin { round: 2, units: 1 }], "Round"),
        (copying, vec![Frame::RoundBegin { round: 1, units: TOTAL + 1 }], "Units"),
        (copying, vec![zero(0, 0, 1)], "Unexpected"),
        (copying, vec![Frame::RoundEnd { round: 1, units: 0 }], "Unexpected"),
        (in_round, vec![Frame::RoundBegin { round: 2, units: 1 }], "Unexpected"),
        (in_round, vec![Frame::RoundEnd { round: 2, units: 0 }], "Round"),
        (in_round, vec![Frame::RoundEnd { round: 1, units: 1 }], "Units"),
        (in_round, vec![Frame::StateBegin(state())], "Unexpected"),
        (in_round, vec![zero(1, 0, 1)], "UnknownRegion"),
        (in_round, vec![zero(0, 0, 0)], "EmptySpan"),
        (in_round, vec![zero(0, 64, 1)], "OutOfRange"),
        (in_round, vec![zero(3, u64::MAX, 2)], "OutOfRange"),
        (in_round, vec![part(0, 1, 0, 100)], "NotWhole"),
        (in_round, vec![packed(span(0, 0, 1), Codec::Lz4, 4096)], "BadPacking"),
        (in_round, vec![packed(span(0, 0, 1), Codec::Delta, 9)], "BadPacking"),
        (in_round, vec![zero(0, 0, 1), packed(span(0, 0, 2), Codec::DeltaLz4, 9)], "BadPacking"),
        (in_round, vec![Frame::Poison { span: span(0, 0, 4) }], "Unexpected"),
        (ended, vec![zero(0, 0, 1)], "Unexpected"),
        (ended, vec![Frame::RoundBegin { round: 2, units: 1 }], "Unexpected"),
        (copying, vec![Frame::StateBegin(long)], "Limit"),
        (loading, vec![chunk(1, b"x")], "BadState"),
        (loading, vec![chunk(0, b"x"), chunk(0, b"x")], "BadState"),
        (loading, vec![chunk(0, b"states")], "BadState"),
        (loading, vec![chunk(0, b"")], "BadState"),
        (loading, vec![chunk(u64::MAX, b"x")], "BadState"),
        (loading, vec![chunk(0, b"stat"), missing(0, &[run(0, 4)])], "BadState"),
        (loading, vec![Frame::Switch { round: 0, missing: 0 }], "BadState"),
        (copying, vec![Frame::StateBegin(other), state_chunk(), sample(Kind::Switch)], "BadState"),
        (listing, vec![chunk(5, b"x")], "BadState"),
        (listing, vec![missing(1, &[run(0, 1)])], "UnknownRegion"),
        (listing, vec![missing(0, &[])], "EmptySpan"),
        (listing, vec![missing(0, &[run(0, 0)])], "BadRun"),
        (listing, vec![missing(0, &[run(60, 8)])], "BadRun"),
        (listing, vec![missing(0, &[run(u64::MAX, 4)])], "BadRun"),
        (listing, vec![missing(0, &[run(2, 4)])], "BadRun"),
        (listing, vec![missing(0, &[run(0, 2)])], "BadRun"),
        (listing, vec![missing(0, &[run(8, 4), run(0, 4)])], "BadRun"),
        (listing, vec![missing(0, &[run(0, 8), run(4, 8)])], "BadRun"),
        (listing, vec![missing(0, &[run(0, 4)]), missing(0, &[run(0, 4)])], "BadRun"),
        (listing, vec![missing(3, &[run(0, 1)]), missing(0, &[run(8, 4)])], "BadRun"),
        (listing, vec![Frame::Switch { round: 1, missing: 0 }], "Round"),
        (listing, vec![Frame::Switch { round: 0, missing: 1 }], "Units"),
        (listing, vec![Frame::Switch { round: 0, missing: 0 }], "NeverSent"),
        (
            listing,
            vec![missing(0, &[run(0, 64)]), Frame::Switch { round: 0, missing: 64 }],
            "NeverSent",
        ),
        (running, vec![zero(0, 2, 4)], "NotWhole"),
        (running, vec![zero(0, 0, 2)], "NotWhole"),
        (running, vec![zero(0, 0, 4), zero(0, 0, 4)], "Unsolicited"),
        (running, vec![zero(0, 8, 4), data(span(0, 0, 16))], "Unsolicited"),
        (running, vec![Frame::Poison { span: span(3, 0, 1) }, zero(3, 0, 2)], "Unsolicited"),
        (running, vec![packed(span(3, 0, 1), Codec::Delta, 9)], "BadPacking"),
        (running, vec![part(0, 4, 4096, 4096)], "Fragment"),
        (running, vec![part(0, 4, 0, 4096), part(0, 4, 0, 4096)], "Fragment"),
        (running, vec![part(0, 4, 0, 4096), zero(3, 0, 1)], "Fragment"),
        (running, vec![part(0, 4, 0, 4096), packed(span(3, 0, 1), Codec::Lz4, 9)], "Fragment"),
        (running, vec![part(0, 4, 0, 16385)], "PayloadLength"),
        (running, vec![part(0, 4, u64::MAX, 1)], "PayloadLength"),
        (running, vec![part(0, 8, 0, 4096)], "NotWhole"),
        (running, vec![part(1, 4, 0, 4096)], "NotWhole"),
    ];
    for (n, (make, frames, want)) in cases.into_iter().enumerate() {
        let mut pair = make();
        let (last, before) = frames.split_last().unwrap();
        for frame in before {
            pair.destination.receive(frame).unwrap_or_else(|error| panic!("{n}: {error}"));
            pair.destination.settle();
        }
        let error = pair.destination.receive(last).unwrap_err();
        assert_eq!(name(&error), want, "{n}: {last:?}: {error}");
        assert_eq!(pair.destination.phase(), Phase::Closed, "{n}");
        // The same frames do not leave a source either; it does not know what came, though.
        let known = ["NeverSent", "Unsolicited", "Limit"].contains(&want)
            || matches!(last, Frame::Packed(packed) if packed.codec == Codec::Delta)
            || last.kind() == Kind::Switch && want == "BadState"
            || matches!(last, Frame::Packed(packed) if packed.codec == Codec::DeltaLz4);
        let mut pair = make();
        let sent = frames.iter().try_for_each(|frame| pair.source.send(frame));
        if !known {
            assert_eq!(name(&sent.unwrap_err()), want, "{n}: sending {last:?}");
        }
    }
}

/// What a source refuses although the kind may come.
#[test]
fn frames_that_a_source_refuses() {
    fn offering() -> Pair {
        let mut pair = Pair::new(Lane::default());
        pair.greet();
        let regions = pair.source.regions();
        pair.say(&regions);
        pair
    }
    fn switching() -> Pair {
        let mut pair = copying();
        pair.switch(&missing_all(), 0);
        pair
    }
    /// A round that the destination has not yet spoken of.
    fn unacknowledged() -> Pair {
        let mut pair = ended();
        pair.say(&Frame::StateBegin(state()));
        pair
    }
    fn comparing() -> Pair {
        let mut pair = running();
        pair.lose();
        pair.reconnect(Lane::default());
        pair.say(&Frame::Resume(Belief::Running));
        pair
    }
    fn given() -> Pair {
        let mut pair = switching();
        pair.answer(&Frame::Ready { missing: TOTAL });
        pair.source.send(&Frame::Run).unwrap();
        pair.lose();
        pair.reconnect(Lane::default());
        pair.say(&Frame::Resume(Belief::Given));
        pair
    }
    let accepted = |regions: &[(u16, u64)]| {
        let region = |(id, granule): &(u16, u64)| AcceptedRegion { id: *id, granule: *granule };
        Frame::Accept(regions.iter().map(region).collect())
    };
    let have = |region, runs: &[UnitRun]| Frame::Have { region, runs: runs.to_vec() };
    let none = Frame::HaveEnd { present: 0, poisoned: 0 };
    let cases: Vec<(Make, Vec<Frame>, &str)> = vec![
        (offering, vec![accepted(&[])], "BadAccept"),
        (offering, vec![accepted(&[(0, 4096)])], "BadAccept"),
        (offering, vec![accepted(&[(0, 4096), (1, 4096)])], "BadAccept"),
        (offering, vec![accepted(&[(3, 4096), (0, 4096)])], "BadAccept"),
        (offering, vec![accepted(&[(0, 2048), (3, 4096)])], "BadAccept"),
        (offering, vec![accepted(&[(0, 12288), (3, 4096)])], "BadAccept"),
        (offering, vec![accepted(&[(0, 4096), (3, 65536)])], "BadAccept"),
        (offering, vec![accepted(&[(0, 0), (3, 4096)])], "BadAccept"),
        (copying, vec![Frame::RoundAck { round: 1, units: 0 }], "Unexpected"),
        (unacknowledged, vec![Frame::RoundAck { round: 2, units: 64 }], "Round"),
        (unacknowledged, vec![Frame::RoundAck { round: 1, units: 63 }], "Units"),
        (
            unacknowledged,
            vec![Frame::RoundAck { round: 1, units: 64 }, Frame::RoundAck { round: 1, units: 64 }],
            "Unexpected",
        ),
        (switching, vec![Frame::Ready { missing: TOTAL - 1 }], "Units"),
        (switching, vec![Frame::Request { span: span(0, 1, 4), prefetch: false }], "NotWhole"),
        (switching, vec![Frame::Request { span: span(9, 0, 4), prefetch: false }], "UnknownRegion"),
        (running, vec![Frame::Expedite { span: span(0, 64, 4) }], "OutOfRange"),
        (running, vec![Frame::Complete(Counts { filled: TOTAL, poisoned: 0 })], "Units"),
        (comparing, vec![Frame::Running], "Contradiction"),
        (comparing, vec![Frame::Dropped], "Contradiction"),
        (comparing, vec![none.clone(), Frame::Ready { missing: TOTAL }], "Contradiction"),
        (comparing, vec![Frame::HaveEnd { present: 1, poisoned: 0 }], "Units"),
        (comparing, vec![Frame::HaveEnd { present: 0, poisoned: 1 }], "Units"),
        (comparing, vec![have(0, &[run(1, 4)])], "BadRun"),
        (comparing, vec![have(0, &[run(0, 4)]), have(0, &[run(0, 4)])], "BadRun"),
        (comparing, vec![have(1, &[run(0, 4)])], "UnknownRegion"),
        (comparing, vec![none.clone(), none.clone()], "Unexpected"),
        (comparing, vec![none.clone(), have(0, &[run(0, 4)])], "Unexpected"),
        (given, vec![Frame::Ready { missing: TOTAL }], "Contradiction"),
        (given, vec![none, Frame::Ready { missing: 0 }], "Units"),
    ];
    for (n, (make, frames, want)) in cases.into_iter().enumerate() {
        let mut pair = make();
        let hold = pair.source.hold();
        let (last, before) = frames.split_last().unwrap();
        for frame in before {
            pair.source.receive(frame).unwrap_or_else(|error| panic!("{n}: {error}"));
        }
        let error = pair.source.receive(last).unwrap_err();
        assert_eq!(name(&error), want, "{n}: {last:?}: {error}");
        assert_eq!(pair.source.phase(), Phase::Closed, "{n}");
        assert_eq!(pair.source.hold(), hold, "{n}: a lie moves no guest");
    }
    // What was never missing cannot be gone: the destination lies about its memory.
    let mut pair = copying();
    pair.round(1, &[Frame::Zero { span: span(0, 0, 64) }, Frame::Zero { span: span(3, 0, 8) }]);
    pair.switch(&[], 1);
    pair.answer(&Frame::Ready { missing: 0 });
    pair.source.send(&Frame::Run).unwrap();
    pair.lose();
    pair.reconnect(Lane::default());
    pair.say(&Frame::Resume(Belief::Given));
    pair.source.receive(&have(0, &[run(0, 64)])).unwrap();
    let error = pair.source.receive(&Frame::HaveEnd { present: 64, poisoned: 0 }).unwrap_err();
    assert_eq!(error, ProtocolError::NeverSent { region: 3, unit: 0 });
}

#[test]
fn counts_that_differ() {
    let mut pair = running();
    pair.fill();
    let ours = Counts { filled: TOTAL, poisoned: 0 };
    let theirs = Counts { filled: TOTAL - 1, poisoned: 1 };
    let expected = Err(ProtocolError::CompletionMismatch { ours, theirs });
    assert_eq!(pair.source.receive(&Frame::Complete(theirs)), expected);
    let mut pair = running();
    pair.fill();
    let complete = pair.destination.completion().unwrap();
    assert_eq!(complete, Frame::Complete(ours));
    let early = running().destination.send(&complete).unwrap_err();
    assert_eq!(name(&early), "Contradiction");
    pair.destination.send(&complete).unwrap();
    let expected = Err(ProtocolError::CompletionMismatch { ours, theirs });
    assert_eq!(pair.destination.receive(&Frame::CompleteAck(theirs)), expected);
    // A pages connection that counts otherwise, or ends another round.
    for (round, units, want) in [(1, 1, "Units"), (2, 0, "Round"), (0, 0, "Round")] {
        let mut pair = Pair::accepted(Lane { index: 1, of: 0 });
        pair.say(&Frame::RoundBegin { round: 1, units: 1 });
        let end = Frame::RoundEnd { round, units };
        assert_eq!(name(&pair.pages[0].0.send(&end).unwrap_err()), want);
        assert_eq!(name(&pair.pages[0].1.receive(&end).unwrap_err()), want);
    }
    // Control that counts otherwise than all connections together.
    let mut pair = Pair::accepted(Lane { index: 1, of: 0 });
    pair.say(&Frame::RoundBegin { round: 1, units: 1 });
    pair.destination.receive(&Frame::RoundEnd { round: 1, units: 5 }).unwrap();
    let (_, lane) = &mut pair.pages[0];
    let end = lane.receive(&Frame::RoundEnd { round: 1, units: 0 }).unwrap();
    let DestinationLaneEvent::RoundEnded(end) = end else { panic!("{end:?}") };
    let error = pair.destination.lane_ended(end).unwrap_err();
    assert_eq!(error, ProtocolError::Units { kind: Kind::RoundEnd, ours: 0, theirs: 5 });
    assert_eq!(pair.destination.phase(), Phase::Closed);
}

#[test]
fn regions_that_no_guest_has() {
    let with = |change: fn(&mut RegionInfo)| {
        let mut bad = region(3, 8);
        change(&mut bad);
        vec![region(0, 64), bad]
    };
    let lanes = Lane::default();
    for (n, regions) in [
        with(|region| region.flags = 1),
        with(|region| (region.granule, region.length) = (128 << 10, 128 << 10)),
        with(|region| region.length = 0),
        Vec::new(),
    ]
    .into_iter()
    .enumerate()
    {
        let made = GuestSourceSession::new(Terms::guest(), SESSION, lanes, regions.clone());
        assert_eq!(name(&made.unwrap_err()), "BadRegion", "{n}");
        let mut pair = Pair::new(lanes);
        pair.greet();
        let error = pair.destination.receive(&Frame::Regions(regions)).unwrap_err();
        assert_eq!(name(&error), "BadRegion", "{n}");
    }
    let mut pair = Pair::new(lanes);
    let limits = GuestLimits { memory_bytes: TOTAL * UNIT - 1, ..GuestLimits::default() };
    pair.destination = GuestDestinationSession::new(Terms::guest(), limits);
    pair.greet();
    let error = pair.destination.receive(&pair.source.regions()).unwrap_err();
    assert_eq!(name(&error), "Limit");
    // A guest of all there is: nothing is allocated until somebody accepts it.
    let mut huge = region(0, 1);
    huge.length = 1 << 62;
    let made = GuestSourceSession::new(Terms::guest(), SESSION, lanes, vec![huge]);
    assert_eq!(made.unwrap().phase(), Phase::Greeting);
}

/// Connections that do not belong.
#[test]
fn lanes_that_do_not_belong() {
    let lanes = Lane { index: 2, of: 1 };
    let mut pair = Pair::new(lanes);
    pair.greet();
    let hello = |channel, index, of| {
        let offer = Terms::guest().offer(Role::GuestSource, channel, SESSION);
        Hello { lane: Lane { index, of }, ..offer }
    };
    let early = pair.destination.join(&hello(Channel::Pages, 0, 2)).unwrap_err();
    assert_eq!(name(&early), "BadLane");
    let regions = pair.source.regions();
    pair.say(&regions);
    pair.answer(&accept());
    assert_eq!(name(&pair.source.lane(Channel::Pages, 2).unwrap_err()), "BadLane");
    assert_eq!(name(&pair.source.lane(Channel::Control, 0).unwrap_err()), "BadLane");
    let other = Hello { session: SessionId([1; 16]), ..hello(Channel::Pages, 0, 2) };
    for (offer, want) in [
        (hello(Channel::Pages, 0, 1), "BadLane"),
        (hello(Channel::Pages, 2, 2), "BadLane"),
        (hello(Channel::Pages, 0, 33), "BadLane"),
        (hello(Channel::Faults, 0, 2), "BadLane"),
        (other, "BadLane"),
        (hello(Channel::Control, 2, 1), "BadHello"),
        (Hello { role: Role::Destination, ..hello(Channel::Pages, 0, 2) }, "BadHello"),
        (Hello { channel: Channel::Images, ..hello(Channel::Pages, 0, 2) }, "BadHello"),
    ] {
        let error = pair.destination.join(&offer).unwrap_err();
        assert_eq!(name(&error), want, "{offer:?}: {error}");
    }
    let first = pair.destination.join(&hello(Channel::Pages, 1, 2)).unwrap();
    let again = pair.destination.join(&hello(Channel::Pages, 1, 2)).unwrap_err();
    assert_eq!(name(&again), "BadLane");
    drop(first);
    // Numbers that no session has.
    for lane in [Lane { index: 33, of: 0 }, Lane { index: 0, of: 33 }] {
        let made = GuestSourceSession::new(Terms::guest(), SESSION, lane, super::regions());
        assert_eq!(name(&made.unwrap_err()), "BadLane");
        let offer = Hello { lane, ..pair.source.offer() };
        let mut other = GuestDestinationSession::new(Terms::guest(), GuestLimits::default());
        let error = other.receive(&Frame::Hello(offer)).unwrap_err();
        assert_eq!(name(&error), "BadLane");
    }
    // Nor does a session begin with anything but control.
    let mut other = GuestDestinationSession::new(Terms::guest(), GuestLimits::default());
    let error = other.receive(&Frame::Hello(hello(Channel::Pages, 0, 2))).unwrap_err();
    assert_eq!(name(&error), "BadHello");
}

/// Codecs that were not agreed on.
#[test]
fn codecs_are_agreed_on() {
    for (features, codec, fits) in [
        (Features::GUEST, Codec::Lz4, true),
        (Features::LZ4, Codec::Lz4, true),
        (Features::ZSTD, Codec::Lz4, false),
        (Features::LZ4, Codec::Zstd, false),
        (Features::DELTA, Codec::DeltaLz4, false),
        (Features(5), Codec::DeltaLz4, true),
        (Features(0), Codec::Delta, false),
    ] {
        let mut pair = Pair::new(Lane::default());
        let terms = Terms { features, ..Terms::guest() };
        pair.destination = GuestDestinationSession::new(terms, GuestLimits::default());
        pair.greet();
        let regions = pair.source.regions();
        pair.say(&regions);
        pair.answer(&accept());
        pair.say(&Frame::RoundBegin { round: 1, units: 2 });
        pair.say(&Frame::Zero { span: span(0, 0, 4) });
        let frame = packed(span(0, 0, 4), codec, 99);
        assert_eq!(pair.source.send(&frame).is_ok(), fits, "{codec:?} with {features:?}");
        assert_eq!(pair.destination.receive(&frame).is_ok(), fits);
    }
}

/// Who has the guest, and what nobody may say.
#[test]
fn who_has_the_guest() {
    let lanes = Lane { index: 0, of: 1 };
    let ready = |lanes| {
        let mut pair = Pair::accepted(lanes);
        pair.switch(&missing_all(), 0);
        pair.answer(&Frame::Ready { missing: TOTAL });
        pair
    };
    // Before Run, the guest is the source's, whatever happens.
    let mut pair = ready(lanes);
    assert_eq!(pair.lose(), (AfterLoss::Keep, AfterLoss::Reconnect));
    assert!(pair.source.may_run() && !pair.destination.may_run());
    pair.reconnect(lanes);
    assert_eq!(pair.source.belief(), None);
    for belief in [Belief::Given, Belief::Running] {
        assert_eq!(name(&pair.source.send(&Frame::Resume(belief)).unwrap_err()), "Contradiction");
    }
    let cancel = sample(Kind::Cancel);
    assert!(matches!(pair.say(&cancel), DestinationEvent::Cancelled(_)));
    assert_eq!(pair.answer(&Frame::Cancelled), SourceEvent::Cancelled);
    assert_eq!(pair.lose(), (AfterLoss::Keep, AfterLoss::Nothing));

    // After Run, nobody's until somebody is heard.
    let mut pair = ready(lanes);
    pair.source.send(&Frame::Run).unwrap();
    assert_eq!(pair.source.hold(), Hold::Unknown);
    assert_eq!(name(&pair.source.send(&cancel).unwrap_err()), "Unexpected");
    assert_eq!(pair.lose(), (AfterLoss::Reconnect, AfterLoss::Reconnect));
    pair.reconnect(lanes);
    assert_eq!(name(&pair.source.send(&cancel).unwrap_err()), "Contradiction");
    assert_eq!(pair.resume(), SourceEvent::Ready);
    assert_eq!(pair.source.hold(), Hold::Ours, "it was never read");
    // The operator knows that the destination is gone.
    pair.source.send(&Frame::Run).unwrap();
    pair.source.reclaim().unwrap();
    assert!(pair.source.may_run());
    assert_eq!(pair.source.phase(), Phase::Closed);

    // A request proves that the guest runs, though nobody has said so.
    let mut pair = ready(lanes);
    pair.say(&Frame::Run);
    let request = Frame::Request { span: span(0, 0, 4), prefetch: false };
    pair.faults[0].1.send(&request).unwrap();
    pair.faults[0].0.receive(&request).unwrap();
    assert_eq!((pair.source.phase(), pair.source.hold()), (Phase::Committing, Hold::Theirs));
    assert_eq!(name(&pair.source.reclaim().unwrap_err()), "Contradiction");
    assert_eq!(name(&pair.source.receive(&Frame::Dropped).unwrap_err()), "Contradiction");

    // Starting the guest failed: it is the source's again.
    let mut pair = ready(lanes);
    pair.say(&Frame::Run);
    assert_eq!(pair.answer(&Frame::Dropped), SourceEvent::Dropped);
    assert!(pair.source.may_run() && !pair.destination.may_run());
    assert_eq!(pair.lose(), (AfterLoss::Keep, AfterLoss::Nothing));

    // A destination whose operator gives up while nobody is there tells it later.
    let mut pair = ready(lanes);
    pair.source.send(&Frame::Run).unwrap();
    pair.lose();
    pair.destination.drop_guest().unwrap();
    pair.reconnect(lanes);
    assert_eq!(pair.resume(), SourceEvent::Dropped);
    assert!(pair.source.may_run() && !pair.destination.may_run());

    // Once it runs, it cannot be dropped, and the source cannot believe less than it knows.
    let mut pair = Pair::serving(lanes);
    assert_eq!(name(&pair.destination.drop_guest().unwrap_err()), "Contradiction");
    assert_eq!(name(&pair.source.reclaim().unwrap_err()), "Contradiction");
    pair.lose();
    pair.reconnect(lanes);
    let given = Frame::Resume(Belief::Given);
    assert_eq!(name(&pair.source.send(&given).unwrap_err()), "Contradiction");
    assert_eq!(name(&pair.destination.receive(&cancel).unwrap_err()), "Contradiction");
    // A destination that never ran the guest does not believe a source that has heard of it.
    let mut pair = ready(lanes);
    pair.lose();
    pair.reconnect(lanes);
    let running = Frame::Resume(Belief::Running);
    assert_eq!(name(&pair.destination.receive(&running).unwrap_err()), "Contradiction");
    // And a stranger with another session does not take over.
    pair.lose();
    pair.destination.reconnect().unwrap();
    let stranger = Hello { session: SessionId([9; 16]), ..pair.source.offer() };
    let error = pair.destination.receive(&Frame::Hello(stranger)).unwrap_err();
    assert_eq!(name(&error), "BadHello");
    assert_eq!(pair.destination.lost(), AfterLoss::Reconnect, "the guest is still there");
}

/// Bytes that no guest's frame has.
#[test]
fn bytes_that_must_not_be() {
    use crate::core::{Decoder, Encoder, HEADER_LEN};
    let refused = |frame: &Frame, at: usize, with: u8| {
        let mut bytes = Vec::new();
        Encoder::encode(frame, &mut bytes);
        bytes[at] = with;
        name(&Decoder::new(64 << 10).feed(&bytes).map(|_| ()).unwrap_err())
    };
    for (frame, at, with, want) in [
        (accept(), HEADER_LEN + 2, 1, "NotZero"),
        (accept(), HEADER_LEN + 7, 1, "NotZero"),
        (accept(), 9, 0x11, "Limit"),
        (sample(Kind::StateBegin), HEADER_LEN + 20, 1, "NotZero"),
        (sample(Kind::StateBegin), HEADER_LEN, 0, "BadState"),
        (sample(Kind::StateBegin), HEADER_LEN, 0x80, "BadState"),
        (sample(Kind::StateBegin), HEADER_LEN + 15, b'x', "BadState"),
        (sample(Kind::Resume), 24, 0, "Contradiction"),
        (sample(Kind::Resume), 24, 3, "Contradiction"),
        (sample(Kind::Packed), 24, 0, "UnknownCodec"),
        (sample(Kind::Packed), 24, 5, "UnknownCodec"),
        (sample(Kind::Packed), 31, 1, "UnknownCodec"),
        (sample(Kind::Cancel), 26, 1, "NotZero"),
        (sample(Kind::Missing), 9, 0x11, "Limit"),
        (sample(Kind::Have), 8, 2, "PayloadLength"),
    ] {
        assert_eq!(refused(&frame, at, with), want, "byte {at} of {frame:?}");
    }
    for name in ["", "seventeen letters", "a name", "\u{fc}ber", "a\0b"] {
        assert_eq!(StateName::new(name), None, "{name:?}");
    }
    assert_eq!(StateName::new("sixteen-letters!").unwrap().as_str(), "sixteen-letters!");
}
