//! What a client does with a source that breaks the protocol, or breaks off.

mod common;

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use common::*;
use pageferry_migrate::{
    MigrateError, PeerReader, PeerSource,
    core::{
        Counts, DataHeader, Encoder, Frame, HEADER_LEN, ProtocolError, Refusal, RefusalCode,
        RegionInfo, Role, Terms,
    },
};
use pageferry_paging::{Completion, PageSource, Urgency};

/// `Variant`, or `Protocol(Variant)`, of an error.
fn name(error: &MigrateError) -> String {
    let text = match error {
        MigrateError::Protocol(error) => format!("Protocol {error:?}"),
        other => format!("{other:?}"),
    };
    let mut words = text.split([' ', '(', '{']);
    match (words.next(), words.next()) {
        (Some("Protocol"), Some(variant)) => format!("Protocol({variant})"),
        (Some(first), _) => first.to_owned(),
        _ => text,
    }
}

fn info() -> RegionInfo {
    regions(&layout(&[(16, PAGE)]))[0]
}

type Script = fn(&mut Raw);

#[test]
fn a_bad_handshake() {
    let cases: [(&str, Script, &str); 12] = [
        ("closes at once", |_| {}, "Closed"),
        ("garbage", |raw| raw.send(&[0xff; 64]), "Protocol(BadMagic)"),
        ("half a header, then closes", |raw| raw.send(b"PF\x01"), "Protocol(Truncated)"),
        (
            "wrong magic",
            |raw| {
                let Some(Frame::Hello(offer)) = raw.receive() else { panic!() };
                let mut bytes = Vec::new();
                Encoder::encode(
                    &Frame::Hello(Terms::default().answer(&offer).unwrap()),
                    &mut bytes,
                );
                bytes[HEADER_LEN] = b'Q';
                raw.send(&bytes);
            },
            "Protocol(HelloMagic)",
        ),
        (
            "wrong version",
            |raw| {
                let Some(Frame::Hello(offer)) = raw.receive() else { panic!() };
                let mut hello = Terms::default().answer(&offer).unwrap();
                (hello.version_min, hello.version_max) = (9, 9);
                raw.send_frame(&Frame::Hello(hello));
            },
            "Protocol(Version)",
        ),
        (
            "another destination",
            |raw| {
                let Some(Frame::Hello(offer)) = raw.receive() else { panic!() };
                raw.send_frame(&Frame::Hello(offer));
            },
            "Protocol(BadHello)",
        ),
        (
            "refuses",
            |raw| raw.send_frame(&Frame::Error(Refusal::new(RefusalCode::Busy, "full"))),
            "Protocol(Refused)",
        ),
        ("pages first", |raw| raw.send(&Encoder::zero(wire(0, 0, 1))), "Protocol(Unexpected)"),
        (
            "pages before the regions",
            |raw| {
                let Some(Frame::Hello(offer)) = raw.receive() else { panic!() };
                raw.send_frame(&Frame::Hello(Terms::default().answer(&offer).unwrap()));
                raw.send(&Encoder::zero(wire(0, 0, 1)));
            },
            "Protocol(Unexpected)",
        ),
        (
            "regions that cannot be",
            |raw| {
                raw.welcome(&[RegionInfo { granule: 4095, ..info() }]);
            },
            "Protocol(BadRegion)",
        ),
        (
            "too many regions",
            |raw| {
                let Some(Frame::Hello(offer)) = raw.receive() else { panic!() };
                raw.send_frame(&Frame::Hello(Terms::default().answer(&offer).unwrap()));
                let mut header = Encoder::zero(wire(0, 0, 5000));
                header[2] = 2;
                raw.send(&header);
            },
            "Protocol(TooManyRegions)",
        ),
        ("silence", |raw| while raw.receive().is_some() {}, "TimedOut"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        for (what, script, want) in cases {
            let (at, _joined) = fake_source(&endpoint, move |accept| {
                let mut demand = accept();
                script(&mut demand);
                // Otherwise closing with unread bytes would reset the connection, and what was
                // sent be lost.
                if what != "silence" {
                    demand.finish();
                }
            });
            let start = Instant::now();
            let error = PeerSource::connect(&at, impatient()).map(|_| ()).unwrap_err();
            assert_eq!(name(&error), want, "{what} at {at}: {error}");
            assert!(start.elapsed() < Duration::from_secs(5), "{what}");
        }
    }
}

/// What the source does once granules 0..8 are asked for on the demand channel, and the name of
/// the failure.
const VIOLATIONS: [(&str, Script, &str); 25] = [
    ("garbage", |raw| raw.send(&[0x55; 100]), "Protocol(BadMagic)"),
    ("unknown frame", |raw| raw.send(&patched(2, 99)), "Protocol(UnknownKind)"),
    ("unknown flag", |raw| raw.send(&patched(3, 4)), "Protocol(NotZero)"),
    ("unknown region", |raw| raw.send(&Encoder::zero(wire(7, 0, 1))), "Protocol(UnknownRegion)"),
    ("out of range", |raw| raw.send(&Encoder::zero(wire(0, 15, 2))), "Protocol(OutOfRange)"),
    (
        "far out of range",
        |raw| raw.send(&Encoder::poison(wire(0, u64::MAX, 1))),
        "Protocol(OutOfRange)",
    ),
    ("empty span", |raw| raw.send(&Encoder::zero(wire(0, 0, 0))), "Protocol(EmptySpan)"),
    ("never asked for", |raw| raw.send(&Encoder::zero(wire(0, 9, 1))), "Protocol(Unsolicited)"),
    ("too many", |raw| raw.send(&Encoder::zero(wire(0, 4, 5))), "Protocol(Unsolicited)"),
    (
        "the same twice",
        |raw| {
            raw.send(&Encoder::zero(wire(0, 1, 1)));
            raw.send(&Encoder::zero(wire(0, 1, 1)));
        },
        "Protocol(Unsolicited)",
    ),
    (
        "overlapping",
        |raw| {
            raw.send(&Encoder::zero(wire(0, 0, 4)));
            raw.send(&Encoder::poison(wire(0, 3, 3)));
        },
        "Protocol(Unsolicited)",
    ),
    ("too few bytes", |raw| data(raw, 0, 2, 4096, None), "Protocol(PayloadLength)"),
    ("too many bytes", |raw| data(raw, 0, 1, 8192, None), "Protocol(PayloadLength)"),
    ("more than the bound", |raw| data(raw, 0, 1, (4 << 20) + 1, None), "Protocol(PayloadLength)"),
    ("no bytes", |raw| data(raw, 0, 1, 0, None), "Protocol(PayloadLength)"),
    ("a part from the middle", |raw| data(raw, 0, 1, 1024, Some(1024)), "Protocol(Fragment)"),
    (
        "parts of two granules",
        |raw| {
            data(raw, 0, 1, 1024, Some(0));
            data(raw, 1, 1, 1024, Some(1024));
        },
        "Protocol(Fragment)",
    ),
    (
        "a page between parts",
        |raw| {
            data(raw, 0, 1, 1024, Some(0));
            raw.send(&Encoder::zero(wire(0, 1, 1)));
        },
        "Protocol(Fragment)",
    ),
    (
        "asks for pages",
        |raw| raw.send(&Encoder::request(wire(0, 0, 1), false)),
        "Protocol(Unexpected)",
    ),
    ("regions again", |raw| raw.send_frame(&Frame::Regions(vec![info()])), "Protocol(Unexpected)"),
    (
        "counts unasked",
        |raw| raw.send(&Encoder::complete_ack(Counts { filled: 8, poisoned: 0 })),
        "Protocol(Unexpected)",
    ),
    (
        "gives up",
        |raw| raw.send_frame(&Frame::Error(Refusal::new(RefusalCode::Stopping, "off"))),
        "Protocol(Refused)",
    ),
    (
        "half a payload, then closes",
        |raw| {
            let header = DataHeader { span: wire(0, 0, 1), length: 4096, fragment: None };
            raw.send(&Encoder::data(&header));
            raw.send(&[1; 1000]);
        },
        "Protocol(Truncated)",
    ),
    ("says goodbye", |raw| raw.send(&Encoder::bye()), "Left"),
    ("closes", |_| {}, "Closed"),
];

fn patched(at: usize, with: u8) -> [u8; HEADER_LEN] {
    let mut bytes = Encoder::zero(wire(0, 0, 1));
    bytes[at] = with;
    bytes
}

fn data(raw: &mut Raw, first: u64, count: u32, length: u32, fragment: Option<u64>) {
    raw.send(&Encoder::data(&DataHeader { span: wire(0, first, count), length, fragment }));
    raw.send(&vec![1; length as usize]);
}

/// Every violation, on each channel of each transport: the failure has the right name, the sink
/// hears of it once, and nothing hangs.
#[test]
fn violations() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        for urgency in [Urgency::Demand, Urgency::Prefetch] {
            for (what, script, want) in VIOLATIONS {
                // An acknowledgement means nothing on the background channel either.
                let (at, _joined) = fake_source(&endpoint, move |accept| {
                    let (mut demand, mut background) = (accept(), None);
                    demand.welcome(&[info()]);
                    let mut other = accept();
                    other.welcome(&[]);
                    let raw = match urgency {
                        Urgency::Demand => {
                            background = Some(other);
                            &mut demand
                        }
                        Urgency::Prefetch => background.insert(other),
                    };
                    let Some(Frame::Request { .. }) = raw.receive_real() else { panic!("{what}") };
                    script(raw);
                    raw.finish();
                    drop(background);
                });
                let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
                let source = PeerSource::connect(&at, impatient()).unwrap();
                source.attach(Arc::clone(&sink) as _).unwrap();
                request(&source, &sink, span(0, 0, 8), urgency);
                sink.wait_lost();
                let failure = source.failure().unwrap();
                assert_eq!(name(&failure), want, "{what}, {urgency:?} at {at}: {failure}");
                source.detach();
                let recorded = sink.recorded.lock().unwrap();
                assert_eq!(recorded.lost.len(), 1, "{what}");
                let text = &recorded.lost[0];
                let protocol = text.starts_with("page source sent something it must not");
                assert_eq!(protocol, want.starts_with("Protocol"), "{what}: {text}");
            }
        }
    }
}

/// A source that holds the line and says nothing: noticed, because it answers no ping.
#[test]
fn silence() {
    for half in [false, true] {
        let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
            let mut demand = accept();
            demand.welcome(&[info()]);
            let mut background = accept();
            background.welcome(&[]);
            let Some(Frame::Request { .. }) = demand.receive_real() else { panic!() };
            if half {
                let header = DataHeader { span: wire(0, 0, 1), length: 4096, fragment: None };
                demand.send(&Encoder::data(&header));
                demand.send(&[1; 100]);
            }
            let mut pings = 0;
            while let Some(frame) = demand.receive() {
                pings += u32::from(matches!(frame, Frame::Ping { .. }));
            }
            assert!(pings > 0, "it was not asked whether it is there");
        });
        let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
        let source = PeerSource::connect(&at, impatient()).unwrap();
        source.attach(Arc::clone(&sink) as _).unwrap();
        let start = Instant::now();
        request(&source, &sink, span(0, 0, 1), Urgency::Demand);
        sink.wait_lost();
        let failure = source.failure().unwrap();
        assert_eq!(name(&failure), "Silent", "half a frame {half}: {failure}");
        assert!(start.elapsed() >= Duration::from_millis(250), "{:?}", start.elapsed());
    }
}

/// A source that answers pings but has nothing to send is no loss.
#[test]
fn an_idle_source_that_answers_pings_is_kept() {
    let (done, finished) = mpsc::channel::<()>();
    let (go, gone) = mpsc::channel::<()>();
    let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
        let mut demand = accept();
        demand.welcome(&[info()]);
        let mut background = accept();
        background.welcome(&[]);
        let until = Instant::now() + Duration::from_millis(900);
        std::thread::scope(|scope| {
            for raw in [&mut demand, &mut background] {
                scope.spawn(|| {
                    while Instant::now() < until {
                        match raw.receive() {
                            Some(Frame::Ping { nonce }) => raw.send(&Encoder::pong(nonce)),
                            Some(_) => {}
                            None => return,
                        }
                    }
                });
            }
        });
        done.send(()).unwrap();
        gone.recv().unwrap_err();
    });
    let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
    let source = PeerSource::connect(&at, impatient()).unwrap();
    source.attach(Arc::clone(&sink) as _).unwrap();
    request(&source, &sink, span(0, 0, 1), Urgency::Demand);
    let kept = finished.recv_timeout(Duration::from_secs(5)).is_ok();
    let failure = source.failure();
    drop(go);
    assert!(kept && failure.is_none(), "{failure:?}");
}

/// A source whose socket takes nothing more cannot block a fault for ever.
#[test]
fn a_source_that_does_not_read() {
    let (done, finished) = mpsc::channel::<()>();
    let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
        let mut demand = accept();
        demand.welcome(&[info()]);
        let mut background = accept();
        background.welcome(&[]);
        finished.recv().unwrap_err();
    });
    let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
    let mut options = impatient();
    // Silence must not be noticed first.
    options.idle_timeout = Duration::from_secs(60);
    options.keepalive = Duration::from_secs(60);
    let source = PeerSource::connect(&at, options).unwrap();
    source.attach(Arc::clone(&sink) as _).unwrap();
    let start = Instant::now();
    while source.expedite(span(0, 0, 1)).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(20), "the socket takes everything");
    }
    sink.wait_lost();
    let failure = source.failure().unwrap();
    assert!(failure.to_string().starts_with("sending a request"), "{failure}");
    drop(done);
}

/// Completion: lying counts, refused counts, silence, and pages afterwards.
#[test]
fn completions_gone_wrong() {
    let cases: [(&str, Script, &str); 4] = [
        (
            "lies",
            |raw| raw.send(&Encoder::complete_ack(Counts { filled: 7, poisoned: 1 })),
            "counted 8 filled and 0 poisoned, the peer 7 filled and 1 poisoned",
        ),
        (
            "refuses",
            |raw| raw.send_frame(&Frame::Error(Refusal::new(RefusalCode::Counts, "mine differ"))),
            "mine differ",
        ),
        ("says nothing", |_| {}, "waiting for the peer's counts took longer"),
        (
            "sends a page instead",
            |raw| raw.send(&Encoder::zero(wire(0, 0, 1))),
            "Zero frame on the Demand channel while Completing",
        ),
    ];
    for (what, script, want) in cases {
        let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
            let mut demand = accept();
            demand.welcome(&[info()]);
            let mut background = accept();
            background.welcome(&[]);
            let Some(Frame::Request { .. }) = demand.receive_real() else { panic!() };
            demand.send(&Encoder::zero(wire(0, 0, 8)));
            let Some(Frame::Complete(counts)) = demand.receive_real() else { panic!() };
            assert_eq!(counts, Counts { filled: 8, poisoned: 0 });
            script(&mut demand);
            while let Some(frame) = demand.receive() {
                if let Frame::Ping { nonce } = frame {
                    demand.send(&Encoder::pong(nonce));
                }
            }
        });
        let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
        let mut options = impatient();
        options.idle_timeout = Duration::from_secs(60);
        let source = PeerSource::connect(&at, options).unwrap();
        source.attach(Arc::clone(&sink) as _).unwrap();
        request(&source, &sink, span(0, 0, 8), Urgency::Demand);
        sink.wait_answered(8);
        let counts = Completion { granules_from_source: 8, granules_poisoned: 0 };
        let error = source.complete(counts).unwrap_err().to_string();
        assert!(error.to_lowercase().contains(&want.to_lowercase()), "{what}: {error}");
        source.detach();
    }
}

#[test]
fn pages_after_completion() {
    let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
        let mut demand = accept();
        demand.welcome(&[info()]);
        let mut background = accept();
        background.welcome(&[]);
        let Some(Frame::Complete(counts)) = demand.receive_real() else { panic!() };
        demand.send(&Encoder::complete_ack(counts));
        demand.send(&Encoder::zero(wire(0, 0, 1)));
        demand.finish();
    });
    let sink = RecordingSink::arc(&layout(&[(16, PAGE)]));
    let source = PeerSource::connect(&at, impatient()).unwrap();
    source.attach(Arc::clone(&sink) as _).unwrap();
    source.complete(Completion::default()).unwrap();
    sink.wait_lost();
    let failure = source.failure().unwrap();
    assert_eq!(name(&failure), "Protocol(Unexpected)", "{failure}");
}

/// The blocking reader checks as much.
#[test]
fn a_reader_of_a_lying_source() {
    for (what, script, want) in VIOLATIONS {
        let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
            let mut raw = accept();
            raw.welcome(&[info()]);
            let Some(Frame::Request { .. }) = raw.receive_real() else { panic!("{what}") };
            script(&mut raw);
            raw.finish();
        });
        let mut reader = PeerReader::connect(&at, impatient()).unwrap();
        let mut bytes = vec![0; 8 * PAGE as usize];
        let error = reader.read(wire(0, 0, 8), &mut bytes).unwrap_err();
        assert_eq!(name(&error), want, "{what}: {error}");
    }
    let error = PeerReader::connect(&"127.0.0.1:1".parse().unwrap(), impatient()).unwrap_err();
    assert_eq!(name(&error), "Connect", "{error}");
}

/// A destination that asked for another role is never served by mistake.
#[test]
fn roles() {
    let (at, _joined) = fake_source(&"127.0.0.1:0".parse().unwrap(), move |accept| {
        let mut raw = accept();
        let offer = raw.welcome(&[info()]);
        assert_eq!(offer.role, Role::Reader);
        raw.finish();
    });
    let reader = PeerReader::connect(&at, impatient()).unwrap();
    assert_eq!(reader.regions(), [info()]);
    assert!(ProtocolError::HelloMagic.to_string().contains("magic"));
}
