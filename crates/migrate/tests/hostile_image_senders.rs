//! What a receiver of images does with senders that break the protocol.

mod common;

use std::{thread, time::Duration};

use common::{
    images::{
        FIRST, RawSender, Recorder, SECOND, Served, THIRD, data, impatient_receiver, page, pages,
        plain, serve,
    },
    *,
};
use pageferry_migrate::{
    ImageSender, MigrateError, ReceiverOptions, SenderOptions,
    core::{
        Channel, Counts, DataHeader, Encoder, Frame, HEADER_LEN, ImageBegin, ImageCounts, ImageEnd,
        ImageId, ImageStored, RefusalCode, Role, SessionId, Terms,
    },
};

fn offer(role: Role, channel: Channel) -> Frame {
    Frame::Hello(Terms::default().offer(role, channel, SessionId([9; 16])))
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::encode(frame, &mut bytes);
    bytes
}

type Script = fn(&mut Raw);

#[test]
fn bad_handshakes() {
    let cases: [(&str, Script, Option<RefusalCode>); 8] = [
        ("garbage", |raw| raw.send(&[7; 500]), Some(RefusalCode::Protocol)),
        (
            "an image before the hello",
            |raw| raw.send_frame(&Frame::abort("")),
            Some(RefusalCode::Protocol),
        ),
        (
            "somebody who wants pages",
            |raw| raw.send_frame(&offer(Role::Destination, Channel::Demand)),
            Some(RefusalCode::Hello),
        ),
        (
            "another receiver",
            |raw| raw.send_frame(&offer(Role::ImageReceiver, Channel::Images)),
            Some(RefusalCode::Hello),
        ),
        (
            "version 1 alone",
            |raw| {
                let mut bytes = encoded(&offer(Role::ImageSender, Channel::Images));
                bytes[HEADER_LEN + 8..HEADER_LEN + 12].copy_from_slice(&[1, 0, 1, 0]);
                raw.send(&bytes);
            },
            Some(RefusalCode::Hello),
        ),
        (
            "later versions alone",
            |raw| {
                let mut bytes = encoded(&offer(Role::ImageSender, Channel::Images));
                bytes[HEADER_LEN + 8..HEADER_LEN + 12].copy_from_slice(&[4, 0, 9, 0]);
                raw.send(&bytes);
            },
            Some(RefusalCode::Version),
        ),
        ("silence", |_| {}, Some(RefusalCode::Silent)),
        ("closes", |raw| raw.end(), None),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (t, endpoint) in (0..).zip(transports(folder.path())) {
        let mut options = impatient_receiver();
        options.busy_timeout = Duration::from_secs(5);
        let served = serve(&endpoint, options, Recorder::default());
        for (n, (what, script, want)) in (0..).zip(&cases) {
            let mut raw = Raw::connect(&served.endpoint);
            script(&mut raw);
            let refusal = raw.refusal();
            assert_eq!(refusal.as_ref().map(|r| r.code), *want, "{what}: {refusal:?}");
            assert_eq!(served.wait(what, |seen| seen.turned_away.len() > n).outcomes.len(), n);
            served.still_serves(ImageId([10 + n as u8 + 100 * t; 16]));
            drop(served.wait("the honest sender's end", |seen| seen.outcomes.len() > n));
        }
    }
}

fn zero(first: u64, count: u32) -> Frame {
    Frame::Zero { span: wire(0, first, count) }
}

fn begin(id: ImageId) -> ImageBegin {
    ImageBegin { id, parent: None, page_size: PAGE, metadata_len: 0, mappings_len: 0 }
}

/// After a first image that is stored: what a sender does wrong, the code it gets, what the text
/// says, and whether an image was begun then.
type Violation = (&'static str, fn(&mut RawSender), RefusalCode, &'static str, Option<ImageId>);

const VIOLATIONS: [Violation; 24] = [
    ("garbage", |s| s.raw.send(&[9; 64]), RefusalCode::Protocol, "magic", None),
    (
        "pages outside an image",
        |s| s.raw.send_frame(&zero(0, 1)),
        RefusalCode::Protocol,
        "Zero frame on the images channel while Active",
        None,
    ),
    (
        "a request",
        |s| s.raw.send(&Encoder::request(wire(0, 0, 1), false)),
        RefusalCode::Protocol,
        "Request frame",
        None,
    ),
    (
        "a second hello",
        |s| s.raw.send_frame(&offer(Role::ImageSender, Channel::Images)),
        RefusalCode::Protocol,
        "Hello frame",
        None,
    ),
    (
        "the same image again",
        |s| s.raw.send_frame(&Frame::ImageBegin(begin(FIRST))),
        RefusalCode::Protocol,
        "stored already",
        None,
    ),
    (
        "an acknowledgement",
        |s| {
            let stored = ImageStored { id: FIRST, counts: ImageCounts::default() };
            s.raw.send_frame(&Frame::ImageStored(stored));
        },
        RefusalCode::Protocol,
        "ImageStored frame",
        None,
    ),
    (
        "wrong totals",
        |s| s.raw.send(&Encoder::complete(Counts { filled: 2, poisoned: 0 })),
        RefusalCode::Counts,
        "this side counted 1 images stored",
        None,
    ),
    (
        "a second begin",
        |s| {
            s.begin(SECOND);
            s.say(&data(0, 3));
            s.raw.send_frame(&Frame::ImageBegin(begin(THIRD)));
        },
        RefusalCode::Protocol,
        "ImageBegin frame on the images channel while Filling",
        Some(SECOND),
    ),
    (
        "an overlap",
        |s| {
            s.begin(SECOND);
            s.say(&data(5, 3));
            s.raw.send_frame(&zero(7, 1));
        },
        RefusalCode::Protocol,
        "all below page 8 have passed",
        Some(SECOND),
    ),
    (
        "out of order",
        |s| {
            s.begin(SECOND);
            s.say(&zero(5, 3));
            s.raw.send_frame(&data(2, 1));
        },
        RefusalCode::Protocol,
        "Data frame for pages 2+1",
        Some(SECOND),
    ),
    (
        "beyond the address space",
        |s| {
            s.begin(SECOND);
            s.raw.send_frame(&zero(u64::MAX / PAGE, 2));
        },
        RefusalCode::Protocol,
        "beyond the address space",
        Some(SECOND),
    ),
    (
        "fewer bytes than pages",
        |s| {
            s.begin(SECOND);
            let header = DataHeader { span: wire(0, 0, 2), length: 4096, fragment: None };
            s.raw.send_frame(&Frame::Data(header));
        },
        RefusalCode::Protocol,
        "its pages have 8192",
        Some(SECOND),
    ),
    (
        "wrong counts",
        |s| {
            s.begin(SECOND);
            s.say(&data(5, 3));
            let mut end = s.session.end().unwrap();
            end.counts.data = 4;
            s.raw.send_frame(&Frame::ImageEnd(end));
        },
        RefusalCode::Counts,
        "this side counted 3 data",
        Some(SECOND),
    ),
    (
        "a wrong digest",
        |s| {
            s.begin(SECOND);
            s.say(&data(5, 3));
            let mut end = s.session.end().unwrap();
            end.pages[7] ^= 4;
            s.raw.send_frame(&Frame::ImageEnd(end));
        },
        RefusalCode::Counts,
        "digest",
        Some(SECOND),
    ),
    (
        "a bit that fell over on the way",
        |s| {
            s.begin(SECOND);
            let Frame::Data(header) = data(5, 1) else { unreachable!() };
            s.session.send(&Frame::Data(header)).unwrap();
            s.raw.send_frame(&Frame::Data(header));
            let mut bytes = page(5);
            s.session.payload(&bytes);
            bytes[1_000] ^= 0x10;
            s.raw.send(&bytes);
            s.end();
        },
        RefusalCode::Counts,
        "digest",
        Some(SECOND),
    ),
    (
        "an end without an image",
        |s| {
            let end = ImageEnd { counts: ImageCounts::default(), frames: [0; 32], pages: [0; 32] };
            s.raw.send_frame(&Frame::ImageEnd(end));
        },
        RefusalCode::Protocol,
        "ImageEnd frame on the images channel while Active",
        None,
    ),
    (
        "a goodbye in an image",
        |s| {
            s.begin(SECOND);
            s.raw.send(&Encoder::bye());
        },
        RefusalCode::Protocol,
        "Bye frame",
        Some(SECOND),
    ),
    (
        "a complete in an image",
        |s| {
            s.begin(SECOND);
            s.raw.send(&Encoder::complete(Counts { filled: 1, poisoned: 0 }));
        },
        RefusalCode::Protocol,
        "Complete frame",
        Some(SECOND),
    ),
    (
        "metadata that was not announced",
        |s| {
            s.begin(SECOND);
            s.raw.send_frame(&Frame::ImageMetadata { offset: 0, bytes: vec![1] });
        },
        RefusalCode::Protocol,
        "ImageMetadata frame of 1 bytes at 0",
        Some(SECOND),
    ),
    (
        "pages in place of the mappings",
        |s| {
            let image = ImageBegin { mappings_len: 8, ..begin(SECOND) };
            s.raw.send_frame(&Frame::ImageBegin(image));
            s.raw.send_frame(&zero(0, 1));
        },
        RefusalCode::Protocol,
        "8 bytes of the image's description",
        Some(SECOND),
    ),
    (
        "more metadata than is taken",
        |s| {
            let image = ImageBegin { metadata_len: u32::MAX, ..begin(SECOND) };
            s.raw.send_frame(&Frame::ImageBegin(image));
        },
        RefusalCode::Limit,
        "bytes of metadata: 4294967295, but at most 1000",
        None,
    ),
    (
        "more pages than are taken",
        |s| {
            s.begin(SECOND);
            s.say(&data(0, 100));
            s.raw.send_frame(&data(100, 200));
        },
        RefusalCode::Limit,
        "bytes of an image",
        Some(SECOND),
    ),
    (
        "more runs than are taken",
        |s| {
            s.begin(SECOND);
            for n in 0..40_000 {
                s.raw.send_frame(&zero(2 * n, 1));
            }
        },
        RefusalCode::Limit,
        "bytes of an image",
        Some(SECOND),
    ),
    (
        "half a frame",
        |s| {
            s.begin(SECOND);
            s.raw.send(b"PF\x05");
            s.raw.end();
        },
        RefusalCode::Protocol,
        "in the middle of a frame",
        Some(SECOND),
    ),
];

fn limited() -> ReceiverOptions {
    let mut options = ReceiverOptions::default();
    options.limits.metadata = 1_000;
    options.limits.image_bytes = 1 << 20;
    options
}

#[test]
fn violations() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        for (what, script, code, text, image) in VIOLATIONS {
            let served = serve(&endpoint, limited(), Recorder::default());
            let mut sender = RawSender::connect(&served.endpoint);
            sender.image(FIRST);
            script(&mut sender);
            let refusal = sender.raw.refusal().unwrap_or_else(|| panic!("{what}: not refused"));
            assert_eq!(refusal.code, code, "{what}: {refusal}");
            assert!(refusal.text.contains(text), "{what}: {refusal}");
            let error = served.outcome(0).unwrap_err();
            assert!(error.error.to_string().contains(text), "{what}: {error}");
            assert_eq!((error.image, error.last_stored), (image, Some(FIRST)), "{what}: {error}");
            served.still_serves(THIRD);
            let stored: Vec<ImageId> =
                served.images().iter().map(|image| image.description.id).collect();
            assert_eq!(stored, [FIRST, THIRD], "{what}");
        }
    }
}

/// Pages that come after an image has ended, while it is being stored, are refused; the image,
/// which had come whole, is stored all the same.
#[test]
fn pages_after_the_end() {
    let (go_on, going_on) = std::sync::mpsc::channel::<()>();
    let hook = Box::new(move |step| {
        if step == common::images::Step::Finish {
            // The test lets go of its end.
            let _ = going_on.recv();
        }
    });
    let sink = Recorder { hook: Some(hook), ..Recorder::default() };
    let served = serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), sink);
    let mut sender = RawSender::connect(&served.endpoint);
    sender.begin(FIRST);
    sender.end();
    sender.raw.send_frame(&zero(9, 1));
    let refusal = sender.raw.refusal().unwrap();
    assert_eq!(refusal.text, "Zero frame on the images channel while Storing");
    drop(go_on);
    let error = served.outcome(0).unwrap_err();
    assert_eq!((error.image, error.last_stored), (None, Some(FIRST)), "{error}");
    assert_eq!(served.images().len(), 1);
}

/// A sender that goes silent in an image, and one that fills the connection with pings alone.
#[test]
fn a_silent_sender() {
    let served = serve(&"127.0.0.1:0".parse().unwrap(), impatient_receiver(), Recorder::default());
    let mut sender = RawSender::connect(&served.endpoint);
    sender.begin(FIRST);
    sender.say(&data(0, 1));
    let refusal = sender.raw.refusal().unwrap();
    assert_eq!(refusal.code, RefusalCode::Silent, "{refusal}");
    let error = served.outcome(0).unwrap_err();
    assert!(matches!(&*error.error, MigrateError::Silent { .. }), "{error}");
    assert_eq!(error.image, Some(FIRST));

    let mut sender = RawSender::connect(&served.endpoint);
    for nonce in 0..1_000 {
        sender.raw.send(&Encoder::ping(nonce));
        assert_eq!(sender.raw.receive(), Some(Frame::Pong { nonce }));
    }
    sender.image(SECOND);
}

/// A sink that panics takes the server with it, and not just its thread.
#[test]
fn a_sink_that_panics() {
    let hook = Box::new(|step| assert_ne!(step, common::images::Step::Pages, "on purpose"));
    let sink = Recorder { hook: Some(hook), ..Recorder::default() };
    let served: Served = serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), sink);
    let mut sender = ImageSender::connect(&served.endpoint, SenderOptions::default()).unwrap();
    sender.begin(&plain(FIRST, None)).unwrap();
    let bytes = pages(0, 1_000);
    let error = (0..1_000).find_map(|n| sender.pages(n * 1_000 * PAGE, &bytes).err()).unwrap();
    assert_eq!(error.image, Some(FIRST), "{error}");
    let panicked = thread::spawn(move || drop(served)).join();
    assert!(panicked.is_err(), "serving went on");
}
