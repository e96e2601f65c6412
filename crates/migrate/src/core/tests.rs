//! Tests of the core: tables, round trips, arbitrary bytes, and models.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn region(id: u16, granules: u64) -> RegionInfo {
    RegionInfo {
        id,
        flags: 0,
        guest_base: u64::from(id) << 40,
        length: granules * 4096,
        granule: 4096,
        page_size: 4096,
    }
}

fn geometry() -> Geometry {
    Geometry::new(vec![region(0, 64), region(3, 8)]).unwrap()
}

const ID: SessionId = SessionId(*b"0123456789abcdef");

fn span(region: u16, first: u64, count: u32) -> WireSpan {
    WireSpan { region, first, count }
}

/// One harmless frame of each kind.
fn sample(kind: Kind, channel: Channel) -> Frame {
    let span = span(0, 0, 1);
    match kind {
        Kind::Hello => Frame::Hello(Terms::default().offer(Role::Destination, channel, ID)),
        Kind::Regions => Frame::Regions(geometry().regions().to_vec()),
        Kind::Request => Frame::Request { span, prefetch: channel == Channel::Background },
        Kind::Expedite => Frame::Expedite { span },
        Kind::Data => Frame::Data(DataHeader { span, length: 4096, fragment: None }),
        Kind::Zero => Frame::Zero { span },
        Kind::Poison => Frame::Poison { span },
        Kind::Complete => Frame::Complete(Counts::default()),
        Kind::CompleteAck => Frame::CompleteAck(Counts::default()),
        Kind::Error => Frame::Error(Refusal::new(RefusalCode::Busy, "no room")),
        Kind::Bye => Frame::Bye,
        Kind::Ping => Frame::Ping { nonce: 7 },
        Kind::Pong => Frame::Pong { nonce: 7 },
        kind if kind as u8 >= Kind::Accept as u8 => guest::tests::sample(kind),
        image => images::tests::sample(image),
    }
}

/// A client session that has come to `phase` by legal frames, if that phase exists there.
fn client_at(channel: Channel, phase: Phase) -> Option<ClientSession> {
    let mut session = match channel {
        Channel::Demand => ClientSession::demand(Terms::default(), Role::Destination, ID),
        Channel::Background => ClientSession::background(Terms::default(), ID, geometry()),
        _ => return None,
    };
    let hello = Terms::default().answer(&session.offer()).unwrap();
    let mut steps = vec![Frame::Hello(hello)];
    if channel == Channel::Demand {
        steps.push(sample(Kind::Regions, channel));
    }
    for step in steps {
        if session.phase() == phase {
            return Some(session);
        }
        session.receive(&step).unwrap();
    }
    match (phase, channel) {
        (Phase::Active, _) => {}
        (Phase::Closed, _) => session.receive(&Frame::Bye).unwrap(),
        (Phase::Completing, Channel::Demand) => session.complete(Counts::default()).unwrap(),
        (Phase::Completed, Channel::Demand) => {
            session.complete(Counts::default()).unwrap();
            session.receive(&Frame::CompleteAck(Counts::default())).unwrap();
        }
        _ => return None,
    }
    assert_eq!(session.phase(), phase);
    Some(session)
}

fn server_at(channel: Channel, phase: Phase) -> Option<ServerSession> {
    let mut session = ServerSession::new(Terms::default(), geometry());
    if phase == Phase::Greeting {
        return (channel == Channel::Demand).then_some(session);
    }
    session.receive(&sample(Kind::Hello, channel)).unwrap();
    match (phase, channel) {
        (Phase::Active, _) => {}
        (Phase::Closed, _) => session.receive(&Frame::Bye).unwrap(),
        (Phase::Completed, Channel::Demand) => {
            session.receive(&Frame::Complete(Counts::default())).unwrap();
        }
        _ => return None,
    }
    assert_eq!(session.phase(), phase);
    Some(session)
}

/// Every frame in every phase on every channel: either the table's next phase, or refused by
/// name, and closed.
#[test]
fn every_frame_in_every_phase() {
    let (mut legal, mut illegal) = (0, 0);
    for channel in [Channel::Demand, Channel::Background] {
        for phase in Phase::ALL {
            for kind in Kind::ALL {
                let expected = ProtocolError::Unexpected { kind, channel, phase };
                if let Some(mut client) = client_at(channel, phase) {
                    let frame = if kind == Kind::Hello {
                        Frame::Hello(Terms::default().answer(&client.offer()).unwrap())
                    } else {
                        sample(kind, channel)
                    };
                    let result = client.receive(&frame);
                    match client_next(channel, phase, kind) {
                        Some(next) if kind != Kind::Error => {
                            assert_eq!((result, client.phase()), (Ok(()), next));
                            legal += 1;
                        }
                        Some(_) => assert!(matches!(result, Err(ProtocolError::Refused(_)))),
                        None => {
                            assert_eq!(result, Err(expected.clone()));
                            assert_eq!(client.phase(), Phase::Closed);
                            illegal += 1;
                        }
                    }
                }
                if let Some(mut server) = server_at(channel, phase) {
                    let result = server.receive(&sample(kind, channel));
                    match server_next(channel, phase, kind) {
                        Some(next) if kind != Kind::Error => {
                            assert_eq!((result, server.phase()), (Ok(()), next));
                            legal += 1;
                        }
                        Some(_) => assert!(matches!(result, Err(ProtocolError::Refused(_)))),
                        None => {
                            assert_eq!(result, Err(expected));
                            assert_eq!(server.phase(), Phase::Closed);
                            illegal += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(legal >= 30 && illegal >= 100, "{legal} legal, {illegal} illegal");
}

/// The core of the table, written a second time by hand.
#[test]
fn what_the_tables_must_say() {
    use Channel::{Background, Demand};
    for kind in Kind::ALL {
        for channel in [Demand, Background] {
            assert_eq!(client_next(channel, Phase::Closed, kind), None);
            assert_eq!(server_next(channel, Phase::Closed, kind), None);
        }
    }
    for answer in [Kind::Data, Kind::Zero, Kind::Poison] {
        assert_eq!(client_next(Demand, Phase::Completed, answer), None, "pages after completion");
        assert_eq!(client_next(Demand, Phase::Completing, answer), None);
        assert_eq!(server_next(Demand, Phase::Active, answer), None);
    }
    assert_eq!(server_next(Demand, Phase::Completed, Kind::Request), None);
    assert_eq!(server_next(Background, Phase::Active, Kind::Expedite), None);
    assert_eq!(server_next(Background, Phase::Active, Kind::Complete), None);
    assert_eq!(server_next(Demand, Phase::Active, Kind::Hello), None, "a second hello");
    assert_eq!(client_next(Demand, Phase::Active, Kind::CompleteAck), None, "unasked");
    for asking in [Kind::Request, Kind::Expedite, Kind::Complete] {
        assert_eq!(client_next(Demand, Phase::Active, asking), None);
    }
}

#[test]
fn spans_and_sizes_are_checked() {
    let data = |span, length, fragment| Frame::Data(DataHeader { span, length, fragment });
    let name = |frame: &Frame| {
        let error = client_at(Channel::Demand, Phase::Active).unwrap().receive(frame).unwrap_err();
        format!("{error:?}").split([' ', '(', '{']).next().unwrap_or_default().to_owned()
    };
    for (frame, want) in [
        (Frame::Zero { span: span(1, 0, 1) }, "UnknownRegion"),
        (Frame::Zero { span: span(0, 0, 0) }, "EmptySpan"),
        (Frame::Zero { span: span(0, 64, 1) }, "OutOfRange"),
        (Frame::Zero { span: span(0, u64::MAX, 2) }, "OutOfRange"),
        (Frame::Poison { span: span(3, 7, 2) }, "OutOfRange"),
        (data(span(0, 63, 2), 8192, None), "OutOfRange"),
        (data(span(0, 0, 2), 4096, None), "PayloadLength"),
        (data(span(0, 0, 1), 8192, None), "PayloadLength"),
        (data(span(0, 0, 2), 4096, Some(0)), "PayloadLength"),
        (data(span(0, 0, 1), 4097, Some(0)), "PayloadLength"),
        (data(span(0, 0, 1), 1024, Some(4096)), "PayloadLength"),
        (data(span(0, 0, 1), 1024, Some(1024)), "Fragment"),
    ] {
        assert_eq!(name(&frame), want, "{frame:?}");
    }
    let mut server = server_at(Channel::Demand, Phase::Active).unwrap();
    let wrong = server.receive(&Frame::Request { span: span(0, 0, 1), prefetch: true });
    assert_eq!(wrong, Err(ProtocolError::WrongChannel(Channel::Demand)));
    let mut server = server_at(Channel::Background, Phase::Active).unwrap();
    let wrong = server.receive(&Frame::Request { span: span(3, 8, 1), prefetch: true });
    assert!(matches!(wrong, Err(ProtocolError::OutOfRange { .. })));
}

#[test]
fn parts_of_a_granule() {
    let part = |granule, offset, length| {
        Frame::Data(DataHeader { span: span(0, granule, 1), length, fragment: Some(offset) })
    };
    let whole = Frame::Data(DataHeader { span: span(0, 9, 1), length: 4096, fragment: None });
    let start = || {
        let mut session = client_at(Channel::Demand, Phase::Active).unwrap();
        session.receive(&part(5, 0, 1024)).unwrap();
        session
    };
    let mut session = start();
    for step in [part(5, 1024, 1024), Frame::Pong { nonce: 0 }, part(5, 2048, 2048), whole.clone()]
    {
        session.receive(&step).unwrap();
    }
    assert!(!session.in_fragment());
    let mut session = start();
    session.receive(&Frame::Poison { span: span(0, 5, 1) }).unwrap();
    session.receive(&whole).unwrap();
    for bad in [
        whole,
        part(5, 2048, 1024),
        part(5, 0, 1024),
        part(6, 1024, 1024),
        Frame::Zero { span: span(0, 5, 1) },
        Frame::Poison { span: span(0, 6, 1) },
        Frame::Poison { span: span(0, 5, 2) },
    ] {
        let result = start().receive(&bad);
        assert!(matches!(result, Err(ProtocolError::Fragment { .. })), "{bad:?}: {result:?}");
    }
}

#[test]
fn counts_must_agree() {
    let ours = Counts { filled: 5, poisoned: 1 };
    for theirs in [Counts { filled: 4, poisoned: 1 }, Counts { filled: 5, poisoned: 0 }] {
        let mut session = client_at(Channel::Demand, Phase::Active).unwrap();
        session.complete(ours).unwrap();
        assert_eq!(
            session.receive(&Frame::CompleteAck(theirs)),
            Err(ProtocolError::CompletionMismatch { ours, theirs })
        );
    }
}

#[test]
fn hellos() {
    let terms = Terms::default();
    let offer = terms.offer(Role::Destination, Channel::Demand, ID);
    let bad = |change: &dyn Fn(&mut Hello)| {
        let mut hello = offer;
        change(&mut hello);
        terms.answer(&hello)
    };
    assert!(matches!(bad(&|h| h.role = Role::Source), Err(ProtocolError::BadHello(_))));
    assert!(matches!(bad(&|h| h.max_payload = 1), Err(ProtocolError::BadHello(_))));
    assert!(matches!(
        bad(&|h| (h.version_min, h.version_max) = (7, 9)),
        Err(ProtocolError::Version { their_min: 7, their_max: 9, .. })
    ));
    assert_eq!(bad(&|h| h.features.0 = 1 | 1 << 63), Err(ProtocolError::RequiredFeatures(1 << 63)));
    // A peer that also speaks later versions and has optional features: the common part.
    let later = bad(&|h| (h.version_max, h.features.0) = (9, 0xff)).unwrap();
    assert_eq!((later.version_min, later.version_max, later.features.0), (3, 3, 0));

    let answer = terms.answer(&offer).unwrap();
    assert_eq!(terms.accept(&offer, &answer), Ok(()));
    let lies: [&dyn Fn(&mut Hello); 6] = [
        &|h| h.role = Role::Destination,
        &|h| h.channel = Channel::Background,
        &|h| h.session.0[3] ^= 1,
        &|h| h.max_payload = u32::MAX,
        &|h| h.max_payload = 0,
        &|h| h.features.0 = 2,
    ];
    for (n, lie) in lies.iter().enumerate() {
        let mut hello = answer;
        lie(&mut hello);
        assert!(matches!(terms.accept(&offer, &hello), Err(ProtocolError::BadHello(_))), "{n}");
    }
}

#[test]
fn a_longer_hello_of_a_later_version_is_understood() {
    let hello = Terms::default().offer(Role::Reader, Channel::Demand, ID);
    let mut bytes = Vec::new();
    Encoder::encode(&Frame::Hello(hello), &mut bytes);
    bytes.extend([0xee; 40]);
    bytes[12..16].copy_from_slice(&(HELLO_LEN as u32 + 40).to_le_bytes());
    let (taken, item) = Decoder::new(1).feed(&bytes).unwrap();
    assert_eq!((taken, item), (bytes.len(), Some(Item::Frame(Frame::Hello(hello)))));
}

#[test]
fn regions_that_cannot_be() {
    let with = |change: &dyn Fn(&mut RegionInfo)| {
        let mut bad = region(3, 8);
        change(&mut bad);
        Geometry::new(vec![region(0, 64), bad])
    };
    assert!(with(&|_| {}).is_ok());
    let changes: [&dyn Fn(&mut RegionInfo); 8] = [
        &|r| r.id = 0,
        &|r| r.granule = 12288,
        &|r| r.granule = 512,
        &|r| r.page_size = 0,
        &|r| r.length = 4097,
        &|r| r.length = 0,
        &|r| r.guest_base = u64::MAX - 4096,
        &|r| r.guest_base = 63 * 4096,
    ];
    for (n, change) in changes.iter().enumerate() {
        assert!(matches!(with(change), Err(ProtocolError::BadRegion { .. })), "{n}");
    }
    let many = (0..=MAX_REGIONS as u16).map(|id| region(id, 1)).collect();
    assert_eq!(Geometry::new(many), Err(ProtocolError::TooManyRegions(MAX_REGIONS + 1)));
}

/// The bytes themselves, so that a change of the format cannot go unseen.
#[test]
fn golden_bytes() {
    let request = Encoder::request(span(0x0102, 0x1122_3344_5566_7788, 0x0a0b_0c0d), true);
    assert_eq!(
        request,
        [
            b'P', b'F', 3, 1, 2, 1, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0, 0x88, 0x77, 0x66,
            0x55, 0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    let data = Encoder::data(&DataHeader { span: span(1, 2, 1), length: 9, fragment: Some(3) });
    assert_eq!(
        data,
        [
            b'P', b'F', 5, 1, 1, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0,
            0, 0, 0, 0, 0
        ]
    );
    let mut hello = Vec::new();
    let offer = Terms::default().offer(Role::Destination, Channel::Background, ID);
    Encoder::encode(&Frame::Hello(offer), &mut hello);
    assert_eq!(hello.len(), HEADER_LEN + HELLO_LEN);
    assert_eq!(&hello[HEADER_LEN..][..16], b"PGFERRY\0\x01\0\x03\0\x02\x02\0\0");
    assert_eq!(&hello[HEADER_LEN + 24..][..20], b"0123456789abcdef\0\0\x40\0");
}

#[test]
fn headers_that_must_not_be() {
    let good = Encoder::request(span(0, 1, 1), false);
    let feed = |change: &dyn Fn(&mut [u8; HEADER_LEN])| {
        let mut bytes = good;
        change(&mut bytes);
        Decoder::new(MIN_MAX_PAYLOAD).feed(&bytes).map(|_| ()).unwrap_err()
    };
    assert_eq!(feed(&|b| b[0] = 0), ProtocolError::BadMagic { got: 0x4600 });
    assert_eq!(feed(&|b| b[2] = 0), ProtocolError::UnknownKind(0));
    assert_eq!(feed(&|b| b[2] = 39), ProtocolError::UnknownKind(39));
    for (at, kind) in [
        (3, 3),
        (6, 3),
        (24, 3),
        (8, 11),
        (16, 11),
        (4, 8),
        (3, 5),
        (24, 5),
        (3, 14),
        (24, 14),
        (8, 15),
        (16, 16),
        (24, 17),
        (24, 18),
        (8, 19),
        (4, 20),
        (24, 21),
        (8, 22),
        (4, 23),
        (4, 24),
        (3, 25),
        (16, 26),
        (8, 27),
        (24, 28),
        (8, 29),
        (24, 30),
        (24, 31),
        (16, 32),
        (16, 33),
        (4, 34),
        (16, 35),
        (24, 36),
        (16, 37),
        (8, 38),
    ] {
        let error = feed(&|b| {
            *b = [0; HEADER_LEN];
            b[..2].copy_from_slice(b"PF");
            b[2] = kind;
            b[at] = 0x40;
        });
        assert!(matches!(error, ProtocolError::NotZero { .. }), "byte {at} of {kind}: {error}");
    }
    for (kind, length) in [
        (3, 1),
        (5, 0),
        (5, MIN_MAX_PAYLOAD + 1),
        (1, 63),
        (2, 48),
        (10, 1025),
        (14, 63),
        (14, 65),
        (15, 0),
        (15, MAX_CHUNK + 1),
        (16, 0),
        (17, 1),
        (18, 0),
        (19, 1025),
        (20, 49),
        (21, 16),
        (22, 1),
        (23, 1),
        (24, 1),
        (25, 0),
        (25, MIN_MAX_PAYLOAD + 1),
        (26, 63),
        (27, 0),
        (27, MAX_CHUNK + 1),
        (28, 16),
        (29, 1),
        (30, 1),
        (31, 1),
        (32, 1),
        (33, 1025),
        (34, 1),
        (35, 1),
        (36, 1),
        (37, 16),
        (38, 1),
    ] {
        let error = feed(&|b| {
            *b = [0; HEADER_LEN];
            b[..2].copy_from_slice(b"PF");
            b[2] = kind;
            b[12..16].copy_from_slice(&length.to_le_bytes());
        });
        assert!(
            matches!(error, ProtocolError::PayloadLength { .. }),
            "{length} of {kind}: {error}"
        );
    }
}

#[test]
fn refusal_texts_are_bounded_and_clean() {
    let refusal = Refusal::new(RefusalCode::Other(999), &"ü\n".repeat(5000));
    assert!(refusal.text.len() <= MAX_TEXT as usize && !refusal.text.contains('\n'));
    for number in 0..30 {
        assert_eq!(RefusalCode::from_wire(number).to_wire(), number);
    }
}

pub(super) fn any_span() -> impl Strategy<Value = WireSpan> {
    (any::<u16>(), any::<u64>(), any::<u32>()).prop_map(|(r, f, c)| span(r, f, c))
}

/// Bytes of pages that follow a frame.
fn payload_len(frame: &Frame) -> usize {
    match frame {
        Frame::Data(data) => data.length as usize,
        Frame::Packed(packed) => packed.length as usize,
        _ => 0,
    }
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let hello = (1u16..4, any::<u64>(), any::<[u8; 16]>(), any::<u32>(), 0..6usize).prop_map(
        |(extra, features, session, max_payload, which)| {
            let role = [Role::Source, Role::Destination, Role::Reader][which % 3];
            let channel = [Channel::Demand, Channel::Background][which % 2];
            let offer = Terms { max_payload, features: Features(features) }.offer(
                role,
                channel,
                SessionId(session),
            );
            Frame::Hello(Hello { version_max: extra, ..offer })
        },
    );
    let info = (any::<(u16, u16)>(), any::<(u64, u64, u64, u64)>()).prop_map(|((id, flags), n)| {
        RegionInfo { id, flags, guest_base: n.0, length: n.1, granule: n.2, page_size: n.3 }
    });
    let counts = || any::<(u64, u64)>().prop_map(|(filled, poisoned)| Counts { filled, poisoned });
    prop_oneof![
        hello,
        prop::collection::vec(info, 0..5).prop_map(Frame::Regions),
        (any_span(), any::<bool>()).prop_map(|(span, prefetch)| Frame::Request { span, prefetch }),
        any_span().prop_map(|span| Frame::Expedite { span }),
        (any_span(), 1..2000u32, any::<Option<u64>>()).prop_map(|(span, length, fragment)| {
            Frame::Data(DataHeader { span, length, fragment })
        }),
        any_span().prop_map(|span| Frame::Zero { span }),
        any_span().prop_map(|span| Frame::Poison { span }),
        counts().prop_map(Frame::Complete),
        counts().prop_map(Frame::CompleteAck),
        (any::<u16>(), any::<String>())
            .prop_map(|(n, text)| Frame::Error(Refusal::new(RefusalCode::from_wire(n), &text))),
        Just(Frame::Bye),
        any::<u64>().prop_map(|nonce| Frame::Ping { nonce }),
        any::<u64>().prop_map(|nonce| Frame::Pong { nonce }),
        images::tests::any_frame(),
        guest::tests::any_frame(),
    ]
}

proptest! {
    /// What is encoded is decoded again, in whatever splits it arrives.
    #[test]
    fn round_trip(frames in prop::collection::vec(any_frame(), 0..12), splits in prop::collection::vec(1..70usize, 1..40)) {
        let mut bytes = Vec::new();
        let mut sent = Vec::new();
        for (n, frame) in frames.iter().enumerate() {
            Encoder::encode(frame, &mut bytes);
            let payload = vec![n as u8; payload_len(frame)];
            bytes.extend(&payload);
            sent.extend(payload);
        }
        let mut decoder = Decoder::new(MIN_MAX_PAYLOAD);
        let (mut got, mut received) = (Vec::new(), Vec::new());
        let mut rest = &bytes[..];
        let mut splits = splits.iter().cycle();
        while !rest.is_empty() {
            let n = splits.next().copied().unwrap_or(1).min(rest.len());
            let (mut piece, tail) = rest.split_at(n);
            rest = tail;
            loop {
                let (taken, item) = decoder.feed(piece).unwrap();
                piece = &piece[taken..];
                match item {
                    Some(Item::Frame(frame)) => got.push(frame),
                    Some(Item::Payload(bytes)) => received.extend_from_slice(bytes),
                    None => break,
                }
            }
        }
        prop_assert!(decoder.at_boundary());
        prop_assert_eq!(got, frames);
        prop_assert_eq!(received, sent);
    }

    /// Arbitrary bytes never panic.
    #[test]
    fn arbitrary_bytes(data in prop::collection::vec(any::<u8>(), 0..600)) {
        crate::fuzz::decode(&data);
        crate::fuzz::guests(&data);
    }

    /// Nor do frames that are legal in themselves, in any order, with a byte changed.
    #[test]
    fn damaged_frames(frames in prop::collection::vec(any_frame(), 1..8), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut bytes = Vec::new();
        for frame in &frames {
            Encoder::encode(frame, &mut bytes);
            bytes.resize(bytes.len() + payload_len(frame), 0);
        }
        let at = at.index(bytes.len());
        bytes[at] = with;
        crate::fuzz::decode(&bytes);
        crate::fuzz::guests(&bytes);
    }

    /// The queue against a set of granules: nothing is lost, doubled or invented.
    #[test]
    fn queue_model(ops in prop::collection::vec((0..4u8, 0..100u64, 1..20u32), 1..80)) {
        let mut queue = RequestQueue::default();
        let mut model = BTreeSet::new();
        let granules = |s: WireSpan| s.first..s.first + u64::from(s.count);
        for (op, first, count) in ops {
            let wanted = span(0, first, count);
            match op {
                0 | 1 => {
                    let overlaps = granules(wanted).any(|g| model.contains(&g));
                    prop_assert_eq!(queue.push(wanted, ()).is_err(), overlaps);
                    if !overlaps {
                        model.extend(granules(wanted));
                    }
                }
                2 => match queue.pop(|_| count) {
                    None => prop_assert!(model.is_empty()),
                    Some((got, ())) => {
                        prop_assert!(got.count <= count);
                        for g in granules(got) {
                            prop_assert!(model.remove(&g));
                        }
                    }
                },
                _ => {
                    let mut out = Vec::new();
                    queue.take(wanted, &mut out);
                    let got: Vec<u64> = out.iter().flat_map(|(s, ())| granules(*s)).collect();
                    let want: Vec<u64> = granules(wanted).filter(|g| model.contains(g)).collect();
                    prop_assert_eq!(&got, &want);
                    want.iter().for_each(|g| { model.remove(g); });
                }
            }
            prop_assert_eq!(queue.is_empty(), model.is_empty());
        }
    }

    /// What is owed against a set of granules.
    #[test]
    fn outstanding_model(ops in prop::collection::vec((any::<bool>(), 0..190u64, 1..70u64), 1..40)) {
        let owed = Outstanding::new([10, 260]);
        let mut model = BTreeSet::new();
        for (ask, first, count) in ops {
            let range = first..first + count;
            if ask {
                // Only what is not owed yet: the page map sees to that.
                for g in range.filter(|g| model.insert(*g)) {
                    owed.owe(1, g, 1);
                }
                continue;
            }
            let missing = range.clone().find(|g| !model.contains(g));
            let result = owed.take(1, first, count);
            match missing {
                None => {
                    prop_assert_eq!(result, Ok(()));
                    owed.settled(count);
                    range.for_each(|g| { model.remove(&g); });
                }
                Some(granule) => {
                    prop_assert_eq!(result, Err(granule));
                    return Ok(());
                }
            }
            prop_assert_eq!(owed.total(), model.len() as u64);
        }
    }
}

#[test]
fn expedited_before_it_came() {
    let mut queue = RequestQueue::default();
    queue.push(span(0, 0, 4), 'a').unwrap();
    queue.take(span(0, 20, 1), &mut Vec::new());
    queue.push(span(0, 10, 4), 'b').unwrap();
    queue.push(span(0, 18, 4), 'c').unwrap();
    let order: Vec<char> = std::iter::from_fn(|| queue.pop(|_| 100)).map(|(_, tag)| tag).collect();
    assert_eq!(order, ['c', 'a', 'b']);
}
