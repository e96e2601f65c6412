//! What neither end lets pass.

use super::*;

/// What neither end lets pass; `name` is the error's.
#[test]
fn frames_that_do_not_fit() {
    let whole = || -> Vec<Frame> { vec![Frame::ImageBegin(begin(ID)), data(10, 4)] };
    let with = |change: &dyn Fn(&mut ImageBegin)| {
        let mut image = begin(ID);
        change(&mut image);
        vec![Frame::ImageBegin(image)]
    };
    let then = |mut frames: Vec<Frame>, frame| {
        frames.push(frame);
        frames
    };
    let header = |span, length, fragment| Frame::Data(DataHeader { span, length, fragment });
    let zero = |first, count| Frame::Zero { span: span(first, count) };
    let metadata = |offset, length| Frame::ImageMetadata { offset, bytes: vec![0; length] };
    let mappings = |offset, length| Frame::ImageMappings { offset, bytes: vec![0; length] };
    let cases: Vec<(&str, Vec<Frame>, &str)> = vec![
        ("no identity", with(&|b| b.id = ImageId([0; 16])), "BadImage"),
        ("a parent without one", with(&|b| b.parent = Some(ImageId([0; 16]))), "BadImage"),
        ("its own parent", with(&|b| b.parent = Some(ID)), "BadImage"),
        ("pages of 0", with(&|b| b.page_size = 0), "BadImage"),
        ("pages of 2 KiB", with(&|b| b.page_size = 2048), "BadImage"),
        ("pages of 12 KiB", with(&|b| b.page_size = 12288), "BadImage"),
        ("pages of 8 MiB", with(&|b| b.page_size = 8 << 20), "BadImage"),
        ("the same page", then(whole(), zero(13, 1)), "PageOrder"),
        ("an overlap", then(whole(), data(13, 2)), "PageOrder"),
        ("pages before", then(whole(), zero(0, 1)), "PageOrder"),
        ("pages around", then(whole(), zero(0, 100)), "PageOrder"),
        ("no pages", then(whole(), zero(20, 0)), "EmptySpan"),
        ("beyond the end", then(whole(), zero((1 << 52) - 2, 2)), "BadPages"),
        ("wrapping bytes", then(whole(), zero(1 << 60, 1)), "BadPages"),
        ("wrapping pages", then(whole(), zero(u64::MAX, 2)), "BadPages"),
        ("a part", then(whole(), header(span(20, 1), 4096, Some(0))), "BadPages"),
        ("too few bytes", then(whole(), header(span(20, 2), 4096, None)), "PayloadLength"),
        ("too many bytes", then(whole(), header(span(20, 1), 8192, None)), "PayloadLength"),
        (
            "a region",
            then(whole(), Frame::Gone { span: WireSpan { region: 1, first: 20, count: 1 } }),
            "UnknownRegion",
        ),
        ("unannounced", then(with(&|_| {}), metadata(0, 1)), "Description"),
        ("too much", then(with(&|b| b.metadata_len = 4), metadata(0, 5)), "Description"),
        ("a gap", then(with(&|b| b.metadata_len = 4), metadata(1, 1)), "Description"),
        ("far away", then(with(&|b| b.metadata_len = 4), metadata(u64::MAX, 1)), "Description"),
        (
            "twice",
            then(then(with(&|b| b.mappings_len = 4), mappings(0, 2)), mappings(0, 2)),
            "Description",
        ),
        (
            "mappings first",
            then(with(&|b| (b.metadata_len, b.mappings_len) = (1, 1)), mappings(0, 1)),
            "Undescribed",
        ),
        ("pages too early", then(with(&|b| b.mappings_len = 1), data(0, 1)), "Undescribed"),
        (
            "an end too early",
            then(with(&|b| b.metadata_len = 1), sample(Kind::ImageEnd)),
            "Undescribed",
        ),
    ];
    for (what, frames, name) in cases {
        let (last, before) = frames.split_last().unwrap();
        let mut pair = Pair::new();
        for frame in before {
            pair.say(frame).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let phase = pair.sender.phase();
        let refused = pair.sender.send(last).unwrap_err();
        assert!(format!("{refused:?}").starts_with(name), "{what}: {refused:?}");
        assert_eq!(pair.sender.phase(), phase, "{what}: not sending it changes nothing");
        assert_eq!(pair.receiver.receive(last), Err(refused), "{what}");
        assert_eq!(pair.receiver.phase(), Phase::Closed, "{what}");
        // And the image goes on as if it had never been tried.
        if phase == Phase::Filling {
            let end = pair.end();
            pair.sender.send(&end).unwrap();
        }
    }
}

/// Counts and digest: whatever differs between what was sent and what came is found.
#[test]
fn ends_that_do_not_fit() {
    let start = || {
        let mut pair = Pair::new();
        pair.say(&Frame::ImageBegin(begin(ID))).unwrap();
        pair.say(&data(1, 2)).unwrap();
        pair.say(&Frame::Zero { span: span(8, 2) }).unwrap();
        pair
    };
    let lies: [fn(&mut ImageEnd); 6] = [
        |end| end.counts.data -= 1,
        |end| end.counts.zero += 1,
        |end| end.counts.poisoned = 1,
        |end| end.counts.gone = u64::MAX,
        |end| end.frames[0] ^= 1,
        |end| end.pages[31] ^= 0x80,
    ];
    for (n, lie) in lies.iter().enumerate() {
        let mut pair = start();
        let mut end = pair.sender.end().unwrap();
        lie(&mut end);
        let sent = pair.sender.send(&Frame::ImageEnd(end)).unwrap_err();
        let received = pair.receiver.receive(&Frame::ImageEnd(end)).unwrap_err();
        assert_eq!(sent, received, "{n}");
        let digest = matches!(received, ProtocolError::ImageDigest { image: ID, .. });
        let counts = matches!(received, ProtocolError::ImageMismatch { image: ID, .. });
        assert!(if n < 4 { counts } else { digest }, "{n}: {received}");
        assert_eq!(received.code(), RefusalCode::Counts);
    }
    // What differs in the pages and their places, with the same counts.
    let others: [fn(&mut Pair); 4] = [
        |pair| pair.receiver.payload(&[1]),
        |pair| pair.receiver.receive(&data(20, 1)).unwrap(),
        |pair| pair.receiver.receive(&Frame::Zero { span: span(21, 1) }).unwrap(),
        |pair| {
            pair.receiver = ImageReceiverSession::new(Terms::default(), ImageLimits::default());
            pair.receiver.receive(&Frame::Hello(pair.sender.offer())).unwrap();
            pair.receiver.receive(&Frame::ImageBegin(begin(OTHER))).unwrap();
        },
    ];
    for (n, other) in others.iter().enumerate() {
        let mut pair = start();
        other(&mut pair);
        // The sender's page is another one, or another kind of page.
        let counts = match n {
            1 => ImageCounts { data: 3, zero: 2, ..ImageCounts::default() },
            2 => ImageCounts { data: 2, zero: 3, ..ImageCounts::default() },
            3 => ImageCounts::default(),
            _ => pair.sender.counts(),
        };
        let end = ImageEnd { counts, ..pair.sender.end().unwrap() };
        let received = pair.receiver.receive(&Frame::ImageEnd(end)).unwrap_err();
        assert!(matches!(received, ProtocolError::ImageDigest { .. }), "{n}: {received}");
    }
}

#[test]
fn limits() {
    let frames = |n: u64| -> Vec<Frame> {
        let images = (0..n).map(|n| ImageId([n as u8 + 1; 16]));
        images.flat_map(|id| [Frame::ImageBegin(begin(id)), data(0, 4), Frame::abort("")]).collect()
    };
    let image = Frame::ImageBegin(ImageBegin { metadata_len: 9, mappings_len: 99, ..begin(ID) });
    let (one, header) = (64 + 4 * PAGE, HEADER_LEN as u64);
    type Change = fn(&mut ImageLimits, u64);
    let cases: [(&str, Change, Vec<Frame>, u64); 5] = [
        ("metadata", |l, n| l.metadata = n as u32, vec![image.clone()], 9),
        ("mappings", |l, n| l.mappings = n as u32, vec![image], 99),
        ("bytes of an image", |l, n| l.image_bytes = n, frames(2), one + 2 * header),
        ("session's", |l, n| l.session_bytes = n, frames(2), 2 * (one + 2 * header)),
        ("images in a session", |l, n| l.images = n, frames(3), 3),
    ];
    for (what, set, frames, least) in cases {
        for (limit, fits) in [(least, true), (least - 1, false)] {
            let mut limits = ImageLimits::default();
            set(&mut limits, limit);
            let mut pair = Pair::with(limits);
            let result = frames.iter().try_for_each(|frame| pair.say(frame));
            match result {
                Ok(()) => assert!(fits, "{what}"),
                Err(error @ ProtocolError::Limit { .. }) => {
                    assert!(!fits, "{what}: {error}");
                    assert!(error.to_string().contains(what), "{error}");
                    assert_eq!(error.code(), RefusalCode::Limit);
                }
                Err(other) => panic!("{what}: {other}"),
            }
        }
    }
}

#[test]
fn acknowledgements_that_do_not_fit() {
    let storing = || Pair::at(Phase::Storing, Kind::Ping).unwrap();
    let counts = ImageCounts { data: 1, ..ImageCounts::default() };
    let mut pair = storing();
    let wrong = Frame::ImageStored(ImageStored { id: OTHER, counts: ImageCounts::default() });
    let expected = ProtocolError::WrongImage { ours: ID, theirs: OTHER };
    assert_eq!(pair.sender.receive(&wrong), Err(expected));
    assert_eq!(pair.sender.last_stored(), None);
    let mut pair = storing();
    let result = pair.sender.receive(&Frame::ImageStored(ImageStored { id: ID, counts }));
    assert!(matches!(result, Err(ProtocolError::ImageMismatch { image: ID, .. })), "{result:?}");
    // A receiver whose own store has miscounted.
    let mut pair = storing();
    let result = pair.receiver.stored(counts);
    assert!(matches!(result, Err(ProtocolError::ImageMismatch { image: ID, .. })), "{result:?}");
    assert_eq!((pair.receiver.phase(), pair.receiver.last_stored()), (Phase::Closed, None));
    // Nothing has ended.
    for phase in [Phase::Active, Phase::Filling, Phase::Completed] {
        let mut pair = Pair::at(phase, Kind::Ping).unwrap();
        let counts = pair.sender.counts();
        let result = pair.receiver.stored(counts);
        assert!(matches!(result, Err(ProtocolError::Unexpected { .. })), "{phase}: {result:?}");
    }
    // An image that is stored cannot come again.
    let mut pair = storing();
    pair.store();
    let result = pair.receiver.receive(&Frame::ImageBegin(begin(ID)));
    assert!(matches!(result, Err(ProtocolError::BadImage { image: ID, .. })), "{result:?}");
    // Totals.
    let one = Counts { filled: 1, poisoned: 0 };
    let mut pair = Pair::new();
    assert!(matches!(
        pair.receiver.receive(&Frame::Complete(one)),
        Err(ProtocolError::ImagesMismatch { .. })
    ));
    let mut pair = Pair::at(Phase::Completing, Kind::Ping).unwrap();
    assert!(matches!(
        pair.sender.receive(&Frame::CompleteAck(one)),
        Err(ProtocolError::ImagesMismatch { .. })
    ));
}
