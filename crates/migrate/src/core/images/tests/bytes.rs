//! The bytes themselves, and what two versions make of each other.

use super::*;

#[test]
fn the_digest_is_of_the_frames() {
    let mut pair = Pair::new();
    let image = ImageBegin { parent: Some(OTHER), metadata_len: 1, ..begin(ID) };
    let (mut frames, mut pages) = (Vec::new(), Vec::new());
    for frame in [
        Frame::ImageBegin(image),
        sample(Kind::ImageMetadata),
        data(7, 1),
        Frame::Poison { span: span(9, 1) },
        data(10, 2),
    ] {
        pair.say(&frame).unwrap();
        Encoder::encode(&frame, &mut frames);
        if let Frame::Data(header) = &frame {
            pages.resize(pages.len() + header.length as usize, header.span.first as u8);
        }
        // Neither is of the image.
        pair.receiver.receive(&Frame::Ping { nonce: 1 }).unwrap();
        pair.sender.receive(&Frame::Pong { nonce: 1 }).unwrap();
    }
    let end = pair.sender.end().unwrap();
    assert_eq!(end.frames, *blake3::hash(&frames).as_bytes());
    assert_eq!(end.pages, *blake3::hash(&pages).as_bytes());
}

/// Roles and versions that go together, and those that do not.
#[test]
fn hellos() {
    let terms = Terms::default();
    let images = terms.offer(Role::ImageSender, Channel::Images, SESSION);
    // Nobody who only knows version 1 takes it for anything else: that version is not offered.
    assert_eq!((images.version_min, images.version_max), (2, 3));
    let answer = terms.answer_as(Role::ImageReceiver, &images).unwrap();
    assert_eq!(terms.accept(&images, &answer), Ok(()));
    assert_eq!((answer.role, answer.version_max), (Role::ImageReceiver, 3));

    let offer = |role, channel| terms.offer(role, channel, SESSION);
    for (role, offer) in [
        (Role::Source, images),
        (Role::Source, offer(Role::Source, Channel::Demand)),
        (Role::Source, offer(Role::ImageReceiver, Channel::Images)),
        (Role::Source, offer(Role::Destination, Channel::Images)),
        (Role::Source, offer(Role::Reader, Channel::Background)),
        (Role::ImageReceiver, offer(Role::Destination, Channel::Demand)),
        (Role::ImageReceiver, offer(Role::Reader, Channel::Demand)),
        (Role::ImageReceiver, offer(Role::ImageSender, Channel::Demand)),
        (Role::ImageReceiver, offer(Role::ImageReceiver, Channel::Images)),
        (Role::ImageReceiver, Hello { version_min: 1, version_max: 1, ..images }),
    ] {
        let result = terms.answer_as(role, &offer);
        assert!(matches!(result, Err(ProtocolError::BadHello(_))), "{offer:?}: {result:?}");
    }
    for lie in [
        Hello { role: Role::Source, ..answer },
        Hello { channel: Channel::Demand, ..answer },
        Hello { features: Features(1), ..answer },
    ] {
        let result = terms.accept(&images, &lie);
        assert!(matches!(result, Err(ProtocolError::BadHello(_))), "{lie:?}: {result:?}");
    }
}

/// Peers of version 1, by the bytes they sent.
#[test]
fn version_1_is_still_spoken() {
    let mut bytes = *b"PF\x01\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
        PGFERRY\0\x01\0\x01\0\x02\x01\0\0\0\0\0\0\0\0\0\x000123456789abcdef\0\0\x40\0\0\0\0\0\
        \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let decode = |bytes: &[u8]| match Decoder::new(MIN_MAX_PAYLOAD).feed(bytes).unwrap() {
        (taken, Some(Item::Frame(Frame::Hello(hello)))) if taken == bytes.len() => hello,
        other => panic!("{other:?}"),
    };
    let terms = Terms::default();
    let old = decode(&bytes);
    assert_eq!((old.role, old.channel), (Role::Destination, Channel::Demand));
    let answer = terms.answer(&old).unwrap();
    assert_eq!((answer.version_min, answer.version_max), (1, 1));
    // The same peer as a source, answering this side's offer.
    bytes[HEADER_LEN + 12] = 1;
    let offer = terms.offer(Role::Destination, Channel::Demand, SESSION);
    assert_eq!(terms.accept(&offer, &decode(&bytes)), Ok(()));
    // It cannot agree to images.
    let images = terms.offer(Role::ImageSender, Channel::Images, SESSION);
    assert!(matches!(
        terms.accept(&images, &decode(&bytes)),
        Err(ProtocolError::Version { our_min: 2, our_max: 3, their_min: 1, their_max: 1 })
    ));
}

/// The bytes themselves, so that a change of the format cannot go unseen.
#[test]
fn golden_bytes() {
    let encoded = |frame: &Frame| {
        let mut bytes = Vec::new();
        Encoder::encode(frame, &mut bytes);
        bytes
    };
    let header = |kind: u8, flags: u8, length: u8| {
        let mut bytes = vec![b'P', b'F', kind, flags];
        bytes.extend([0; 28]);
        bytes[12] = length;
        bytes
    };
    let image = ImageBegin {
        parent: Some(OTHER),
        page_size: 0x0001_0000,
        metadata_len: 0x0102_0304,
        mappings_len: 0x0506_0708,
        ..begin(ID)
    };
    let mut want = header(14, 1, 64);
    want.extend(
        b"the first image.the second image\0\0\x01\0\0\0\0\0\x04\x03\x02\x01\x08\x07\x06\x05",
    );
    want.extend([0; 16]);
    assert_eq!(encoded(&Frame::ImageBegin(image)), want);

    let mut want = header(15, 0, 2);
    want[24] = 9;
    want.extend(b"ab");
    let part = Frame::ImageMetadata { offset: 9, bytes: b"ab".to_vec() };
    assert_eq!(encoded(&part), want);
    want[2] = 16;
    assert_eq!(encoded(&Frame::ImageMappings { offset: 9, bytes: b"ab".to_vec() }), want);

    let mut want = header(17, 0, 0);
    (want[8], want[16]) = (3, 2);
    assert_eq!(encoded(&Frame::Gone { span: span(2, 3) }), want);

    let counts = ImageCounts { data: 1, zero: 2, poisoned: 3, gone: 4 };
    let counted = b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0";
    let mut want = header(18, 0, 96);
    want.extend(counted);
    want.extend([0xd5; 32]);
    want.extend([0xe6; 32]);
    assert_eq!(
        encoded(&Frame::ImageEnd(ImageEnd { counts, frames: [0xd5; 32], pages: [0xe6; 32] })),
        want
    );

    let mut want = header(19, 0, 3);
    want.extend(b"why");
    assert_eq!(encoded(&Frame::abort("why")), want);

    let mut want = header(20, 0, 48);
    want.extend(ID.0);
    want.extend(counted);
    assert_eq!(encoded(&Frame::ImageStored(ImageStored { id: ID, counts })), want);

    // What is reserved, and a parent of an image without one.
    for at in [16, 31, 48, 63] {
        let mut bytes = encoded(&Frame::ImageBegin(begin(ID)));
        bytes[HEADER_LEN + at] = 1;
        let error = Decoder::new(MIN_MAX_PAYLOAD).feed(&bytes).map(|_| ()).unwrap_err();
        assert!(matches!(error, ProtocolError::NotZero { .. }), "{at}: {error}");
    }
}
