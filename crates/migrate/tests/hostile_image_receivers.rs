//! What a sender of images does with receivers that break the protocol, or are none.

mod common;

use std::time::Duration;

use common::{
    images::{FIRST, Recorder, SECOND, impatient_sender, pages, plain, serve},
    *,
};
use pageferry_migrate::{
    Endpoint, ImageSender, ImageStreamError, MemoryStore, PageServer, PeerReader, ReceiverOptions,
    SenderOptions, ServerOptions,
    core::{
        Channel, Counts, Encoder, Frame, HEADER_LEN, ImageCounts, ImageEnd, ImageId, ImageStored,
        Refusal, RefusalCode, Role, SessionId, Terms, VERSION_IMAGES, VERSION_MAX,
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

fn zero(first: u64, count: u32) -> Frame {
    Frame::Zero { span: wire(0, first, count) }
}

/// A receiver that follows a script after the hello; what the sender makes of it while it sends
/// an image, which has no end unless `ends`, and another one after it.
fn with_receiver(
    endpoint: &Endpoint,
    ends: bool,
    script: impl FnOnce(&mut Raw) + Send + 'static,
) -> ImageStreamError {
    let (endpoint, _receiver) = fake_source(endpoint, |accept| {
        let mut raw = accept();
        let Some(Frame::Hello(offer)) = raw.receive() else { panic!("no hello") };
        let answer = Terms::default().answer_as(Role::ImageReceiver, &offer).unwrap();
        raw.send_frame(&Frame::Hello(answer));
        script(&mut raw);
    });
    let mut sender = ImageSender::connect(&endpoint, impatient_sender()).unwrap();
    let bytes = pages(0, 20);
    let mut image = |id, parent| {
        sender.begin(&plain(id, parent))?;
        for n in 0.. {
            sender.pages(20 * n * PAGE, &bytes)?;
            sender.flush()?;
            if ends {
                break;
            }
        }
        sender.finish()
    };
    image(FIRST, None)
        .and_then(|_| image(SECOND, Some(FIRST)))
        .map_or_else(Some, |_| sender.close().err())
        .expect("such a receiver")
}

/// Receives until an image has ended.
fn until_end(raw: &mut Raw) -> ImageEnd {
    loop {
        match raw.receive() {
            Some(Frame::ImageEnd(end)) => return end,
            Some(_) => {}
            None => panic!("no end came"),
        }
    }
}

fn stored(id: ImageId, counts: ImageCounts) -> Frame {
    Frame::ImageStored(ImageStored { id, counts })
}

#[test]
fn hostile_receivers() {
    type Case = (&'static str, Script, Option<ImageId>, bool, Option<ImageId>, &'static str);
    let first = Some(FIRST);
    let cases: [Case; 12] = [
        (
            "acknowledges another image",
            |raw| {
                let end = until_end(raw);
                raw.send_frame(&stored(SECOND, end.counts));
                raw.finish();
            },
            first,
            true,
            None,
            "acknowledged, where image 0101",
        ),
        (
            "acknowledges other counts",
            |raw| {
                let mut end = until_end(raw);
                end.counts.data -= 1;
                raw.send_frame(&stored(FIRST, end.counts));
                raw.finish();
            },
            first,
            true,
            None,
            "this side counted 20 data",
        ),
        (
            "acknowledges in an image",
            |raw| {
                let Some(Frame::ImageBegin(_)) = raw.receive_real() else { panic!() };
                raw.send_frame(&stored(FIRST, ImageCounts::default()));
                raw.finish();
            },
            first,
            false,
            None,
            "ImageStored frame on the images channel while Filling",
        ),
        (
            "acknowledges the image before",
            |raw| {
                let end = until_end(raw);
                raw.send_frame(&stored(FIRST, end.counts));
                until_end(raw);
                raw.send_frame(&stored(FIRST, end.counts));
                raw.finish();
            },
            Some(SECOND),
            true,
            first,
            "acknowledged, where image 0202",
        ),
        (
            "sends pages back in an image",
            |raw| {
                let Some(Frame::ImageBegin(_)) = raw.receive_real() else { panic!() };
                raw.send_frame(&zero(0, 1));
                raw.finish();
            },
            first,
            false,
            None,
            "Zero frame",
        ),
        (
            "garbage",
            |raw| {
                until_end(raw);
                raw.send(&[0xff; 64]);
                raw.finish();
            },
            first,
            true,
            None,
            "magic",
        ),
        (
            "cannot store",
            |raw| {
                until_end(raw);
                let refusal = Refusal::new(RefusalCode::Storage, "the shelf has fallen down");
                raw.send_frame(&Frame::Error(refusal));
                raw.finish();
            },
            first,
            false,
            None,
            "the shelf has fallen down",
        ),
        (
            "closes in an image",
            |raw| {
                let Some(Frame::ImageBegin(_)) = raw.receive_real() else { panic!() };
                raw.end();
            },
            first,
            false,
            None,
            "",
        ),
        (
            "closes instead of acknowledging",
            |raw| {
                until_end(raw);
            },
            first,
            true,
            None,
            "the peer closed the connection",
        ),
        (
            "says goodbye after an image",
            |raw| {
                let end = until_end(raw);
                raw.send_frame(&stored(FIRST, end.counts));
                until_end(raw);
                raw.send(&Encoder::bye());
                raw.finish();
            },
            Some(SECOND),
            true,
            first,
            "the peer left",
        ),
        (
            "counts other images",
            |raw| {
                for id in [FIRST, SECOND] {
                    let end = until_end(raw);
                    raw.send_frame(&stored(id, end.counts));
                }
                let Some(Frame::Complete(_)) = raw.receive_real() else { panic!() };
                raw.send(&Encoder::complete_ack(Counts { filled: 3, poisoned: 0 }));
                raw.finish();
            },
            None,
            false,
            Some(SECOND),
            "this side counted 2 images stored",
        ),
        (
            "says nothing more",
            |raw| {
                until_end(raw);
                // Until the sender has had enough, and hangs up.
                while raw.receive().is_some() {}
            },
            first,
            true,
            None,
            "nothing heard from the peer for 400ms",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        for (what, script, image, in_doubt, last, text) in cases {
            let ends = !what.ends_with("in an image");
            let error = with_receiver(&endpoint, ends, script);
            assert!(error.error.to_string().contains(text), "{what}: {error}");
            assert_eq!(error.last_stored, last, "{what}: {error}");
            assert_eq!((error.image, error.in_doubt), (image, in_doubt), "{what}: {error}");
        }
    }
}

/// Receivers that read nothing: one says nothing either, one pings for ever.
#[test]
fn receivers_that_do_not_read() {
    let mut options = impatient_sender();
    options.store_timeout = Duration::from_millis(900);
    for (pings, text) in [(false, "nothing heard"), (true, "sending pages took longer than 900ms")]
    {
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let (endpoint, _receiver) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
            let mut raw = accept();
            let Some(Frame::Hello(offer)) = raw.receive() else { panic!("no hello") };
            let answer = Terms::default().answer_as(Role::ImageReceiver, &offer).unwrap();
            raw.send_frame(&Frame::Hello(answer));
            let tick = Duration::from_millis(50);
            while is_done.recv_timeout(tick) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                if pings {
                    raw.send(&Encoder::ping(1));
                }
            }
        });
        let mut sender = ImageSender::connect(&endpoint, options.clone()).unwrap();
        sender.begin(&plain(FIRST, None)).unwrap();
        let bytes = pages(0, 1_000);
        let error = (0..10_000).find_map(|n| sender.pages(n * 1_000 * PAGE, &bytes).err()).unwrap();
        assert!(error.error.to_string().contains(text), "{error}");
        assert_eq!((error.image, error.in_doubt), (Some(FIRST), false), "{error}");
        drop(done);
    }
}

/// Peers that serve pages, of this version and of the one before, are no receivers, and say so.
#[test]
fn peers_that_are_no_receivers() {
    let memory = layout(&[(4, PAGE)]);
    fill(&memory);
    let server = PageServer::bind(
        &"127.0.0.1:0".parse().unwrap(),
        std::sync::Arc::new(MemoryStore::new(memory)),
        ServerOptions::default(),
    )
    .unwrap();
    let error =
        ImageSender::connect(server.local_endpoint(), SenderOptions::default()).unwrap_err();
    assert!(error.to_string().contains("pages are served here"), "{error}");
    // And a receiver serves no pages.
    let served =
        serve(&"127.0.0.1:0".parse().unwrap(), ReceiverOptions::default(), Recorder::default());
    let error = PeerReader::connect(&served.endpoint, impatient()).unwrap_err();
    assert!(error.to_string().contains("images are taken here"), "{error}");

    // Version 1 looked at the versions before all else.
    let answers: [(Script, &str); 2] = [
        (
            |raw| {
                let text = "peer speaks versions 2 to 2, this side 1 to 1";
                raw.send_frame(&Frame::Error(Refusal::new(RefusalCode::Version, text)));
            },
            "Version: peer speaks versions 2 to 2, this side 1 to 1",
        ),
        (
            |raw| {
                let mut bytes = encoded(&offer(Role::Source, Channel::Demand));
                bytes[HEADER_LEN + 8..HEADER_LEN + 12].copy_from_slice(&[1, 0, 1, 0]);
                raw.send(&bytes);
            },
            "peer speaks versions 1 to 1, this side 2 to 3",
        ),
    ];
    for (answer, text) in answers {
        let (endpoint, _old) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
            let mut raw = accept();
            let Some(Frame::Hello(offer)) = raw.receive() else { panic!("no hello") };
            assert_eq!((offer.version_min, offer.version_max), (VERSION_IMAGES, VERSION_MAX));
            answer(&mut raw);
            raw.finish();
        });
        let error = ImageSender::connect(&endpoint, SenderOptions::default()).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
}
