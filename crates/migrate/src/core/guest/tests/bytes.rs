//! The bytes themselves, and what version 2 makes of this one.

use super::*;
use crate::core::{Decoder, Encoder, HEADER_LEN, Item, VERSION_MAX};

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::encode(frame, &mut bytes);
    bytes
}

/// The bytes themselves, so that a change of the format cannot go unseen.
#[test]
fn golden_bytes() {
    let header = |kind: u8, length: u8, set: &[(usize, u8)]| {
        let mut bytes = vec![b'P', b'F', kind];
        bytes.resize(HEADER_LEN, 0);
        bytes[12] = length;
        set.iter().for_each(|(at, with)| bytes[*at] = *with);
        bytes
    };
    let mut accepted = header(21, 16, &[(8, 1)]);
    accepted.extend(*b"\x03\0\0\0\0\0\0\0\0\0\x20\0\0\0\0\0");
    let granules = vec![AcceptedRegion { id: 3, granule: 2 << 20 }];
    assert_eq!(encoded(&Frame::Accept(granules)), accepted);
    let mut missing = header(28, 16, &[(4, 3), (8, 1)]);
    missing.extend(*b"\x04\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0");
    assert_eq!(encoded(&Frame::Missing { region: 3, runs: vec![run(4, 8)] }), missing);
    missing[2] = 37;
    assert_eq!(encoded(&Frame::Have { region: 3, runs: vec![run(4, 8)] }), missing);
    let mut state = header(26, 64, &[]);
    state.extend(*b"test\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0");
    state.extend(blake3::hash(STATE).as_bytes());
    assert_eq!(encoded(&sample(Kind::StateBegin)), state);
    let mut part = header(27, 5, &[]);
    part.extend(STATE);
    assert_eq!(encoded(&state_chunk()), part);
    let pack = [(4, 2), (8, 4), (13, 1), (16, 9), (24, 4)];
    let frame = packed(span(2, 9, 4), Codec::DeltaLz4, 256);
    assert_eq!(encoded(&frame), header(25, 0, &pack));
    for (kind, frame, set) in [
        (22, Frame::RoundBegin { round: 1, units: 2 }, vec![(16, 2), (24, 1)]),
        (23, Frame::RoundEnd { round: 1, units: 2 }, vec![(16, 2), (24, 1)]),
        (24, Frame::RoundAck { round: 1, units: 2 }, vec![(16, 2), (24, 1)]),
        (29, Frame::Switch { round: 1, missing: 2 }, vec![(16, 2), (24, 1)]),
        (30, Frame::Ready { missing: 2 }, vec![(16, 2)]),
        (31, Frame::Run, vec![]),
        (32, Frame::Running, vec![]),
        (33, Frame::Cancel(Refusal::new(RefusalCode::Asked, "")), vec![(24, 16)]),
        (34, Frame::Cancelled, vec![]),
        (35, Frame::Resume(Belief::Running), vec![(24, 2)]),
        (36, Frame::Dropped, vec![]),
        (38, Frame::HaveEnd { present: 2, poisoned: 1 }, vec![(16, 2), (24, 1)]),
    ] {
        assert_eq!(encoded(&frame), header(kind, 0, &set), "{frame:?}");
    }
    let mut offer = Terms::guest().offer(Role::GuestSource, Channel::Faults, SESSION);
    offer.lane = Lane { index: 1, of: 2 };
    let hello = encoded(&Frame::Hello(offer));
    let want = b"PGFERRY\0\x03\0\x03\0\x06\x06\0\0\x07\0\0\0\0\0\0\0";
    assert_eq!(&hello[HEADER_LEN..][..24], want);
    assert_eq!(&hello[HEADER_LEN + 40..][..8], b"\0\0\x40\0\x01\0\x02\0");
}

/// Peers of version 2, by the bytes they send: pages and images go on, guests do not.
#[test]
fn version_2_is_still_spoken() {
    let hello = |min: u8, max: u8, role: u8, channel: u8| {
        let mut bytes = encoded(&Frame::Hello(Terms::default().offer(
            Role::Destination,
            Channel::Demand,
            SESSION,
        )));
        bytes[HEADER_LEN + 8] = min;
        bytes[HEADER_LEN + 10] = max;
        (bytes[HEADER_LEN + 12], bytes[HEADER_LEN + 13]) = (role, channel);
        // What a version 2 has no name for is nothing there.
        bytes[HEADER_LEN + 44] = 9;
        match Decoder::new(1).feed(&bytes).unwrap() {
            (_, Some(Item::Frame(Frame::Hello(hello)))) => hello,
            other => panic!("{other:?}"),
        }
    };
    let terms = Terms::default();
    for (role, channel) in [(2, 1), (2, 2), (3, 1)] {
        let answer = terms.answer(&hello(1, 2, role, channel)).unwrap();
        assert_eq!((answer.version_min, answer.version_max), (2, 2));
        assert_eq!(answer.lane, Lane::default());
    }
    let images = terms.answer_as(Role::ImageReceiver, &hello(2, 2, 4, 3)).unwrap();
    assert_eq!((images.version_min, images.version_max), (2, 2));
    // The other way round: this side offers, and a version 2 answers.
    for (role, channel, answer) in [
        (Role::Destination, Channel::Demand, hello(2, 2, 1, 1)),
        (Role::Reader, Channel::Demand, hello(2, 2, 1, 1)),
        (Role::ImageSender, Channel::Images, hello(2, 2, 5, 3)),
    ] {
        let offer = terms.offer(role, channel, SESSION);
        assert!(offer.version_min <= 2 && offer.version_max == VERSION_MAX);
        assert_eq!(terms.accept(&offer, &answer), Ok(()), "{role:?}");
    }
    // Nobody who only knows version 2 takes a guest's hello for anything else, nor gives one.
    let guest = Terms::guest().offer(Role::GuestSource, Channel::Control, SESSION);
    assert_eq!((guest.version_min, guest.version_max), (3, 3));
    assert!(matches!(
        Terms::guest().accept(&guest, &hello(2, 2, 7, 4)),
        Err(ProtocolError::Version { their_max: 2, .. })
    ));
    assert!(matches!(
        Terms::guest().answer_as(Role::GuestDestination, &hello(2, 2, 6, 4)),
        Err(ProtocolError::BadHello(_))
    ));
}
