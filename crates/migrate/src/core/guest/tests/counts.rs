//! Whole sessions: what is counted, compared, and known of the memory.

use super::*;

fn claim_all(pair: &Pair) -> Vec<(usize, UnitRun)> {
    let set = pair.source.to_send();
    let mut found = Vec::new();
    for (index, units) in [(0, 64), (1, 8)] {
        while let Some(run) = set.claim(index, run(0, units)) {
            found.push((index, run));
        }
    }
    found
}

/// Pre-copy that brings everything: nothing is missing at the switch.
#[test]
fn pre_copy_alone() {
    for lanes in LANES {
        let mut pair = Pair::accepted(lanes);
        let first = [
            data(span(0, 0, 16)),
            packed(span(0, 16, 16), Codec::Lz4, 9),
            packed(span(0, 32, 31), Codec::Zstd, 9),
            Frame::Zero { span: span(0, 63, 1) },
            Frame::Zero { span: span(3, 0, 8) },
        ];
        assert_eq!(pair.round(1, &first), DestinationEvent::RoundDone);
        assert_eq!(pair.source.totals(), TOTAL);
        pair.acknowledge();
        // Units that were written, singly, and as differences.
        let second =
            [packed(span(0, 5, 1), Codec::Delta, 7), packed(span(3, 7, 1), Codec::DeltaLz4, 7)];
        assert_eq!(pair.round(2, &second), DestinationEvent::RoundDone);
        pair.acknowledge();
        // The last round is not waited for.
        assert_eq!(pair.round(3, &[data(span(0, 1, 1))]), DestinationEvent::RoundDone);
        assert_eq!(pair.source.totals(), TOTAL + 3);
        assert_eq!(pair.switch(&[], 3), DestinationEvent::Switched);
        assert_eq!(pair.destination.round_ack(), None, "Ready says it");
        let (info, bytes) = pair.destination.take_state().unwrap();
        assert_eq!((info, &bytes[..]), (state(), STATE));
        assert_eq!(pair.destination.missing().total(), 0);
        assert_eq!(pair.destination.ready(), Some(Frame::Ready { missing: 0 }));
        assert_eq!(pair.answer(&Frame::Ready { missing: 0 }), SourceEvent::Ready);
        assert_eq!((pair.source.may_run(), pair.destination.may_run()), (true, false));
        pair.source.send(&Frame::Run).unwrap();
        assert_eq!((pair.source.may_run(), pair.destination.may_run()), (false, false));
        assert_eq!(pair.destination.receive(&Frame::Run), Ok(DestinationEvent::Run));
        assert_eq!((pair.source.may_run(), pair.destination.may_run()), (false, true));
        assert_eq!(pair.answer(&Frame::Running), SourceEvent::Running);
        let complete = pair.destination.completion().unwrap();
        assert_eq!(complete, Frame::Complete(Counts::default()));
        assert_eq!(pair.answer(&complete), SourceEvent::Completed(Counts::default()));
        let ack = Frame::CompleteAck(Counts::default());
        assert_eq!(pair.say(&ack), DestinationEvent::Completed);
        assert_eq!(pair.say(&Frame::Bye), DestinationEvent::Left);
        assert_eq!(pair.lose(), (AfterLoss::Nothing, AfterLoss::Nothing));
    }
}

/// Rounds, then the rest after the switch, with a request from the device state.
#[test]
fn hybrid() {
    for lanes in LANES {
        let mut pair = Pair::accepted(lanes);
        pair.round(1, &[Frame::Zero { span: span(0, 0, 62) }]);
        pair.acknowledge();
        let missing = [
            Frame::Missing { region: 0, runs: vec![run(4, 8), run(60, 4)] },
            Frame::Missing { region: 3, runs: vec![run(0, 3), run(3, 5)] },
        ];
        assert_eq!(pair.switch(&missing, 1), DestinationEvent::Switched);
        assert_eq!(pair.destination.due().total(), 20);

        // The device state needs a granule before the guest may run.
        let request = Frame::Request { span: span(0, 60, 4), prefetch: false };
        let asked = match pair.faults.first_mut() {
            Some((source, destination)) => {
                destination.send(&request).unwrap();
                source.receive(&request).unwrap()
            }
            None => match pair.answer(&request) {
                SourceEvent::Lane(event) => event,
                other => panic!("{other:?}"),
            },
        };
        assert_eq!(asked, SourceLaneEvent::Request { span: span(0, 60, 4), prefetch: false });
        assert_eq!(pair.destination.ready(), None, "something is awaited");
        let claimed = pair.source.to_send().claim(0, run(60, 4));
        assert_eq!(claimed, Some(run(60, 4)));
        pair.page(&data(span(0, 60, 4)), true);
        assert_eq!(pair.destination.ready(), Some(Frame::Ready { missing: 16 }));
        pair.answer(&Frame::Ready { missing: 16 });
        pair.say(&Frame::Run);
        pair.answer(&Frame::Running);

        assert_eq!(pair.source.to_send().claim(0, run(60, 4)), None, "once only");
        pair.source.to_send().claim(1, run(2, 1)).unwrap();
        pair.page(&Frame::Poison { span: span(3, 2, 1) }, true);
        assert_eq!(pair.destination.completion(), None);
        pair.fill();
        let counts = Counts { filled: 19, poisoned: 1 };
        assert_eq!((pair.source.counts(), pair.destination.counts()), (counts, counts));
        let complete = pair.destination.completion().unwrap();
        assert_eq!(pair.answer(&complete), SourceEvent::Completed(counts));
        pair.say(&Frame::CompleteAck(counts));
    }
}

/// A granule larger than a payload comes in parts, and may be poisoned in the middle.
#[test]
fn granules_in_parts() {
    let terms = Terms { max_payload: 64 << 10, ..Terms::guest() };
    for poisoned in [false, true] {
        let big = 32 * UNIT;
        let mut pair = Pair::new(Lane { index: 1, of: 0 });
        pair.destination = GuestDestinationSession::new(terms, GuestLimits::default());
        pair.greet();
        let regions = pair.source.regions();
        pair.say(&regions);
        pair.answer(&Frame::Accept(vec![
            AcceptedRegion { id: 0, granule: big },
            AcceptedRegion { id: 3, granule: UNIT },
        ]));
        pair.join();
        pair.switch(&missing_all(), 0);
        let ready = pair.destination.ready().unwrap();
        pair.answer(&ready);
        pair.say(&Frame::Run);
        pair.answer(&Frame::Running);
        assert_eq!(pair.source.to_send().claim(0, run(32, 32)), Some(run(32, 32)));
        let part = |offset: u64| {
            let length = 64 << 10;
            let header = DataHeader { span: span(0, 32, 32), length, fragment: Some(offset) };
            Frame::Data(header)
        };
        pair.page(&part(0), false);
        assert_eq!(pair.destination.due().total(), TOTAL - 32);
        assert_eq!(pair.destination.counts(), Counts::default(), "not whole");
        if poisoned {
            pair.page(&Frame::Poison { span: span(0, 32, 32) }, false);
        } else {
            pair.page(&part(64 << 10), false);
        }
        let n = u64::from(poisoned) * 32;
        let counts = Counts { filled: 32 - n, poisoned: n };
        assert_eq!((pair.source.counts(), pair.destination.counts()), (counts, counts));
        pair.fill();
        assert!(pair.destination.completion().is_some());
        // What came in part when the link broke is missing again.
        let mut pair = Pair::serving(Lane { index: 1, of: 0 });
        let (source, destination) = &mut pair.pages[0];
        pair.source.to_send().claim(0, run(0, 4)).unwrap();
        let header = DataHeader { span: span(0, 0, 4), length: 4096, fragment: Some(0) };
        source.send(&Frame::Data(header)).unwrap();
        destination.receive(&Frame::Data(header)).unwrap();
        destination.settle();
        assert_eq!(pair.destination.due().total(), TOTAL - 4);
        pair.lose();
        assert_eq!(pair.destination.due().total(), TOTAL);
    }
}

/// A round is whole when every connection has said so, in whatever order; and the switch waits for
/// it.
#[test]
fn rounds_over_several_connections() {
    let lanes = Lane { index: 3, of: 2 };
    let mut pair = Pair::accepted(lanes);
    pair.say(&Frame::RoundBegin { round: 1, units: TOTAL });
    let parts = [(0, 40), (40, 20), (60, 4)];
    for (n, (first, count)) in parts.into_iter().enumerate() {
        let (source, destination) = &mut pair.pages[n];
        let zero = Frame::Zero { span: span(0, first, count) };
        source.send(&zero).unwrap();
        destination.receive(&zero).unwrap();
    }
    assert_eq!(pair.end_lane(1, 1), DestinationEvent::Nothing);
    assert_eq!(pair.end_lane(0, 1), DestinationEvent::Nothing);
    let late = Frame::RoundEnd { round: 1, units: 4 };
    pair.pages[2].0.send(&late).unwrap();
    let end = Frame::RoundEnd { round: 1, units: 64 };
    assert_eq!(pair.say(&end), DestinationEvent::Nothing);
    assert_eq!(pair.destination.round_ack(), None);
    // One connection is late, and control goes on.
    let missing = [Frame::Missing { region: 3, runs: vec![run(0, 8)] }];
    assert_eq!(pair.switch(&missing, 1), DestinationEvent::Nothing);
    assert_eq!(pair.destination.phase(), Phase::Settling);
    assert_eq!(pair.lane_ended(2, &late), DestinationEvent::Switched);
    assert_eq!(pair.destination.phase(), Phase::Restoring);
}

/// A lane of a link that is gone says nothing any more.
#[test]
fn late_connections() {
    let lanes = Lane { index: 1, of: 0 };
    let mut pair = Pair::accepted(lanes);
    pair.say(&Frame::RoundBegin { round: 1, units: TOTAL });
    let (source, destination) = &mut pair.pages[0];
    let end = Frame::RoundEnd { round: 1, units: 0 };
    source.send(&end).unwrap();
    let Ok(DestinationLaneEvent::RoundEnded(end)) = destination.receive(&end) else {
        panic!("not ended");
    };
    assert_eq!(pair.destination.lost(), AfterLoss::Drop);
    assert_eq!(pair.destination.lane_ended(end), Ok(DestinationEvent::Nothing));
    assert_eq!(destination.phase(), Phase::Closed);
    let zero = Frame::Zero { span: span(0, 0, 1) };
    let phase = Phase::Closed;
    assert!(matches!(
        destination.receive(&zero),
        Err(ProtocolError::Unexpected { phase: found, .. }) if found == phase
    ));
    assert!(pair.destination.reconnect().is_err(), "there is nothing to go on with");
    // Nor is a new link made while connections of the old one are in use.
    let mut pair = Pair::serving(lanes);
    assert_eq!(pair.source.lost(), AfterLoss::Reconnect);
    assert_eq!(pair.destination.lost(), AfterLoss::Reconnect);
    assert!(matches!(pair.source.reconnect(lanes), Err(ProtocolError::BadLane { .. })));
    assert!(matches!(pair.destination.reconnect(), Err(ProtocolError::BadLane { .. })));
    pair.pages.clear();
    pair.reconnect(Lane::default());
    assert_eq!(pair.resume(), SourceEvent::Running);
}

/// Ten losses, each with something sent that never came: what the destination says that it has is
/// what the source does not send again, and nothing is lost or sent twice.
#[test]
fn recovered_ten_times() {
    let lanes = Lane { index: 1, of: 1 };
    let mut pair = Pair::serving(lanes);
    for n in 0..10 {
        let granule = run(n * 4, 4);
        assert_eq!(pair.source.to_send().claim(0, granule), Some(granule));
        let page = data(span(0, n * 4, 4));
        if n % 3 == 0 {
            pair.page(&Frame::Poison { span: span(0, n * 4, 4) }, true);
        } else {
            pair.page(&page, n % 2 == 0);
        }
        // And one that is lost on the way; and one whose request is.
        let lost = pair.source.to_send().claim(1, run(0, 8)).unwrap();
        let zero = Frame::Zero { span: span(3, lost.first, lost.count as u32) };
        pair.pages[0].0.send(&zero).unwrap();
        let request = Frame::Request { span: span(0, 60, 4), prefetch: false };
        pair.faults[0].1.send(&request).unwrap();
        assert_eq!(pair.lose(), (AfterLoss::Reconnect, AfterLoss::Reconnect));
        pair.reconnect(lanes);
        assert_eq!(pair.resume(), SourceEvent::Running);
        assert_eq!(pair.source.to_send().total(), TOTAL - 4 * (n + 1));
        assert_eq!(pair.source.counts(), pair.destination.counts());
        let asked = pair.destination.asked().unwrap();
        assert_eq!(asked.runs(0, true).collect::<Vec<_>>(), [run(60, 4)], "ask again");
    }
    pair.fill();
    let complete = pair.destination.completion().unwrap();
    let counts = Counts { filled: TOTAL - 16, poisoned: 16 };
    assert_eq!(pair.answer(&complete), SourceEvent::Completed(counts));
    // And a loss when all is there: the source has not heard of it.
    let mut pair = Pair::serving(lanes);
    pair.fill();
    let complete = pair.destination.completion().unwrap();
    pair.destination.send(&complete).unwrap();
    assert_eq!(pair.lose(), (AfterLoss::Reconnect, AfterLoss::Reconnect));
    pair.reconnect(Lane::default());
    assert_eq!(pair.resume(), SourceEvent::Running);
    assert!(claim_all(&pair).is_empty());
    assert!(matches!(pair.answer(&complete), SourceEvent::Completed(_)));
}

/// Lists longer than a frame.
#[test]
fn having_much() {
    let units = 40_000;
    let regions = vec![region(0, units), region(1, 4), region(2, units)];
    let granule = |id| AcceptedRegion { id, granule: UNIT };
    let lanes = Lane::default();
    let mut pair = Pair::new(lanes);
    pair.source = GuestSourceSession::new(Terms::guest(), SESSION, lanes, regions).unwrap();
    pair.greet();
    let regions = pair.source.regions();
    pair.say(&regions);
    pair.answer(&Frame::Accept(vec![granule(0), granule(1), granule(2)]));
    let missing = [0, 1, 2].map(|id| {
        let count = if id == 1 { 4 } else { units };
        Frame::Missing { region: id, runs: vec![run(0, count)] }
    });
    pair.switch(&missing, 0);
    let ready = pair.destination.ready().unwrap();
    pair.answer(&ready);
    pair.say(&Frame::Run);
    pair.answer(&Frame::Running);
    for unit in (0..units).step_by(2) {
        pair.source.to_send().claim(2, run(unit, 1)).unwrap();
        pair.page(&Frame::Zero { span: span(2, unit, 1) }, false);
    }
    pair.lose();
    pair.reconnect(lanes);
    let frames = pair.destination.have().count();
    assert_eq!(frames, 20_000_usize.div_ceil(MAX_RUNS as usize) + 1);
    assert_eq!(pair.resume(), SourceEvent::Running);
    assert_eq!(pair.source.to_send().total(), units + 4 + units / 2);
}

/// A migration's frames of one side, with others among them: neither side breaks its promises.
fn likely_frame() -> impl Strategy<Value = Frame> {
    let whole = (0..16_u64, 1..4_u32)
        .prop_map(|(first, count)| span(0, first * 4, (count * 4).min(64 - first as u32 * 4)));
    let list = vec![
        Frame::Regions(vec![region(0, 64)]),
        Frame::Accept(vec![AcceptedRegion { id: 0, granule: 4 * UNIT }]),
        Frame::RoundBegin { round: 1, units: 64 },
        Frame::RoundEnd { round: 1, units: 64 },
        Frame::StateBegin(state()),
        state_chunk(),
        Frame::Missing { region: 0, runs: vec![run(0, 64)] },
        Frame::Switch { round: 0, missing: 64 },
        Frame::Switch { round: 1, missing: 0 },
        Frame::Ready { missing: 64 },
        Frame::Run,
        Frame::Running,
        Frame::Dropped,
        Frame::Bye,
        Frame::HaveEnd { present: 0, poisoned: 0 },
        Frame::Resume(Belief::Given),
        Frame::Resume(Belief::Running),
        Frame::Complete(Counts { filled: 64, poisoned: 0 }),
        Frame::CompleteAck(Counts { filled: 64, poisoned: 0 }),
        sample(Kind::Cancel),
    ];
    prop_oneof![
        4 => prop::sample::select(list),
        2 => whole.prop_map(|span| Frame::Zero { span }),
        1 => (0..16_u64).prop_map(|first| Frame::Poison { span: span(0, first * 4, 4) }),
        1 => (0..3_u64).prop_map(|nonce| Frame::Ping { nonce }),
        1 => any_frame(),
    ]
}

proptest! {
    #[test]
    fn frames_in_any_order(
        before in prop::sample::select(vec![0, 2, 5, 7, 8, 9]),
        others in prop::collection::vec(likely_frame(), 0..25),
    ) {
        let zero = Frame::Zero { span: span(0, 0, 16) };
        let destinations = [
            Frame::Regions(vec![region(0, 64)]),
            Frame::StateBegin(state()),
            state_chunk(),
            Frame::Missing { region: 0, runs: vec![run(0, 64)] },
            Frame::Switch { round: 0, missing: 64 },
            Frame::Run,
            zero.clone(),
            Frame::Bye,
            Frame::Resume(Belief::Running),
        ];
        let sources = [
            Frame::Accept(vec![AcceptedRegion { id: 0, granule: 4 * UNIT }]),
            Frame::Ready { missing: 64 },
            Frame::Bye,
            Frame::HaveEnd { present: 0, poisoned: 0 },
            Frame::Ready { missing: 64 },
            Frame::Running,
            Frame::Bye,
            Frame::HaveEnd { present: 0, poisoned: 0 },
            Frame::Running,
        ];
        for script in [&destinations, &sources] {
            let mut bytes = Vec::new();
            for frame in script.iter().take(before).chain(&others) {
                crate::core::Encoder::encode(frame, &mut bytes);
                if let Frame::Packed(packed) = frame {
                    bytes.resize(bytes.len() + packed.length as usize, 1);
                }
            }
            crate::fuzz::guests(&bytes);
        }
    }
}
