//! What a server does with clients that break the protocol, or break off.

mod common;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use common::*;
use pageferry_migrate::{
    Endpoint, MemoryStore, PageServer, PeerOptions, PeerReader, ServerOptions,
    core::{
        Channel, Counts, Encoder, Features, Frame, HEADER_LEN, RefusalCode, Role, SessionId, Terms,
    },
};

const ID: [u8; 16] = *b"hostile client!!";

fn impatient_server() -> ServerOptions {
    let mut options = ServerOptions::default();
    options.handshake_timeout = Duration::from_millis(300);
    options.pair_timeout = Duration::from_millis(300);
    options.idle_timeout = Duration::from_millis(600);
    options.write_timeout = Duration::from_millis(400);
    options.max_sessions = 3;
    options.max_connections = 8;
    options.max_queued = 16;
    options
}

fn server(endpoint: &Endpoint, options: ServerOptions) -> PageServer {
    let memory = layout(&[(2_000, PAGE)]);
    fill(&memory);
    PageServer::bind(endpoint, Arc::new(MemoryStore::new(memory)), options).unwrap()
}

/// An honest client is still served.
fn still_serves(server: &PageServer) {
    let until = Instant::now() + Duration::from_secs(5);
    let mut reader = loop {
        match PeerReader::connect(server.local_endpoint(), PeerOptions::default()) {
            Ok(reader) => break reader,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        thread::yield_now();
    };
    let mut bytes = vec![0; PAGE as usize];
    reader.read(wire(0, 1, 1), &mut bytes).unwrap();
    assert!(bytes == pattern(0, 1, PAGE));
}

fn offer(role: Role, channel: Channel) -> Frame {
    Frame::Hello(Terms::default().offer(role, channel, SessionId(ID)))
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    Encoder::encode(frame, &mut bytes);
    bytes
}

type Script = fn(&mut Raw);

#[test]
fn bad_handshakes() {
    let cases: [(&str, Script, Option<RefusalCode>); 12] = [
        ("garbage", |raw| raw.send(&[7; 500]), Some(RefusalCode::Protocol)),
        (
            "a request before the hello",
            |raw| raw.send(&Encoder::request(wire(0, 0, 1), false)),
            Some(RefusalCode::Protocol),
        ),
        (
            "wrong magic",
            |raw| {
                let mut bytes = encoded(&offer(Role::Destination, Channel::Demand));
                bytes[HEADER_LEN + 3] = 0;
                raw.send(&bytes);
            },
            Some(RefusalCode::Hello),
        ),
        (
            "wrong version",
            |raw| {
                let mut bytes = encoded(&offer(Role::Destination, Channel::Demand));
                bytes[HEADER_LEN + 8] = 7;
                bytes[HEADER_LEN + 10] = 9;
                raw.send(&bytes);
            },
            Some(RefusalCode::Version),
        ),
        (
            "versions upside down",
            |raw| {
                let mut bytes = encoded(&offer(Role::Destination, Channel::Demand));
                bytes[HEADER_LEN + 8] = 4;
                raw.send(&bytes);
            },
            Some(RefusalCode::Version),
        ),
        (
            "another source",
            |raw| raw.send_frame(&offer(Role::Source, Channel::Demand)),
            Some(RefusalCode::Hello),
        ),
        (
            "a reader's background channel",
            |raw| raw.send_frame(&offer(Role::Reader, Channel::Background)),
            Some(RefusalCode::Hello),
        ),
        (
            "features nobody has",
            |raw| {
                let terms = Terms { features: Features(1 << 40), ..Terms::default() };
                let hello = terms.offer(Role::Reader, Channel::Demand, SessionId(ID));
                raw.send_frame(&Frame::Hello(hello));
            },
            Some(RefusalCode::Hello),
        ),
        (
            "the background of nothing",
            |raw| raw.send_frame(&offer(Role::Destination, Channel::Background)),
            Some(RefusalCode::UnknownSession),
        ),
        ("silence", |_| {}, Some(RefusalCode::Silent)),
        (
            "half a hello, then closes",
            |raw| {
                raw.send(&encoded(&offer(Role::Destination, Channel::Demand))[..50]);
                raw.end();
            },
            Some(RefusalCode::Protocol),
        ),
        ("closes", |raw| raw.end(), None),
    ];
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let server = server(&endpoint, impatient_server());
        for (what, script, want) in cases {
            let mut raw = Raw::connect(server.local_endpoint());
            script(&mut raw);
            let refusal = raw.refusal();
            assert_eq!(refusal.as_ref().map(|r| r.code), want, "{what}: {refusal:?}");
            still_serves(&server);
        }
    }
}

/// Bytes that keep coming, but never make a hello.
#[test]
fn a_handshake_that_trickles() {
    let server = server(&"127.0.0.1:0".parse().unwrap(), impatient_server());
    let mut raw = Raw::connect(server.local_endpoint());
    let start = Instant::now();
    for byte in encoded(&offer(Role::Destination, Channel::Demand)) {
        raw.send(&[byte]);
        thread::sleep(Duration::from_millis(20));
        if start.elapsed() > Duration::from_millis(900) {
            break;
        }
    }
    assert_eq!(raw.refusal().map(|r| r.code), Some(RefusalCode::Silent));
}

#[test]
fn violations() {
    let cases: [(&str, Channel, Script, RefusalCode, &str); 16] = [
        ("garbage", Channel::Demand, |raw| raw.send(&[9; 64]), RefusalCode::Protocol, "magic"),
        ("garbage", Channel::Background, |raw| raw.send(&[9; 64]), RefusalCode::Protocol, "magic"),
        (
            "out of range",
            Channel::Demand,
            |raw| raw.send(&Encoder::request(wire(0, 1_999, 2), false)),
            RefusalCode::Protocol,
            "outside the region",
        ),
        (
            "wrapping",
            Channel::Background,
            |raw| raw.send(&Encoder::request(wire(0, u64::MAX, 1), true)),
            RefusalCode::Protocol,
            "outside the region",
        ),
        (
            "nothing",
            Channel::Demand,
            |raw| raw.send(&Encoder::request(wire(0, 0, 0), false)),
            RefusalCode::Protocol,
            "empty span",
        ),
        (
            "no such region",
            Channel::Demand,
            |raw| raw.send(&Encoder::expedite(wire(1, 0, 1))),
            RefusalCode::Protocol,
            "does not exist",
        ),
        (
            "prefetch in the fast lane",
            Channel::Demand,
            |raw| raw.send(&Encoder::request(wire(0, 0, 1), true)),
            RefusalCode::Protocol,
            "other urgency",
        ),
        (
            "demand in the slow lane",
            Channel::Background,
            |raw| raw.send(&Encoder::request(wire(0, 0, 1), false)),
            RefusalCode::Protocol,
            "other urgency",
        ),
        (
            "asks twice at once",
            Channel::Background,
            |raw| {
                raw.send(&Encoder::request(wire(0, 0, 2_000), true));
                raw.send(&Encoder::request(wire(0, 1_999, 1), true));
            },
            RefusalCode::Protocol,
            "still queued",
        ),
        (
            "sends pages",
            Channel::Demand,
            |raw| raw.send(&Encoder::zero(wire(0, 0, 1))),
            RefusalCode::Protocol,
            "Zero frame",
        ),
        (
            "says hello again",
            Channel::Demand,
            |raw| raw.send_frame(&offer(Role::Destination, Channel::Demand)),
            RefusalCode::Protocol,
            "Hello frame",
        ),
        (
            "completes in the background",
            Channel::Background,
            |raw| raw.send(&Encoder::complete(Counts::default())),
            RefusalCode::Protocol,
            "Complete frame",
        ),
        (
            "lies about what it got",
            Channel::Demand,
            |raw| {
                raw.send(&Encoder::request(wire(0, 0, 3), false));
                assert!(matches!(raw.receive(), Some(Frame::Data(data)) if data.span.count == 3));
                raw.send(&Encoder::complete(Counts { filled: 4, poisoned: 0 }));
            },
            RefusalCode::Counts,
            "counted 3 filled and 0 poisoned, the peer 4",
        ),
        (
            "asks after completing",
            Channel::Demand,
            |raw| {
                raw.send(&Encoder::complete(Counts::default()));
                raw.send(&Encoder::request(wire(0, 0, 1), false));
            },
            RefusalCode::Protocol,
            "while Completed",
        ),
        ("silence", Channel::Demand, |_| {}, RefusalCode::Silent, "nothing heard"),
        (
            "half a frame, then closes",
            Channel::Demand,
            |raw| {
                raw.send(&Encoder::request(wire(0, 0, 1), false)[..20]);
                raw.end();
            },
            RefusalCode::Protocol,
            "in the middle of a frame",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let mut options = impatient_server();
        // Long enough for a doubled request to find the first one in the queue.
        options.delay = Duration::from_millis(40);
        let delayed = server(&endpoint, options);
        for (what, channel, script, code, text) in cases {
            let mut demand = Raw::connect(delayed.local_endpoint());
            demand.greet(Role::Destination, Channel::Demand, ID);
            let mut background = Raw::connect(delayed.local_endpoint());
            background.greet(Role::Destination, Channel::Background, ID);
            let raw = match channel {
                Channel::Demand => &mut demand,
                Channel::Background => &mut background,
                _ => unreachable!("a source has no such channel"),
            };
            // Only the demand channel is silent in that case.
            script(raw);
            let refusal = raw.refusal().unwrap_or_else(|| panic!("{what}: no refusal"));
            assert_eq!(refusal.code, code, "{what}: {refusal}");
            assert!(refusal.text.contains(text), "{what}: {refusal}");
            // The session is over as a whole.
            demand.refusal();
            background.refusal();
            wait_for_no_session(&delayed);
            still_serves(&delayed);
        }
    }
}

fn wait_for_no_session(server: &PageServer) {
    let until = Instant::now() + Duration::from_secs(5);
    while server.stats().sessions > 0 {
        assert!(Instant::now() < until, "{:?}", server.stats());
        thread::yield_now();
    }
}

#[test]
fn channels_that_do_not_pair() {
    let server = server(&"127.0.0.1:0".parse().unwrap(), impatient_server());
    let at = server.local_endpoint();
    let mut demand = Raw::connect(at);
    demand.greet(Role::Destination, Channel::Demand, ID);
    let mut second = Raw::connect(at);
    second.send_frame(&offer(Role::Destination, Channel::Demand));
    assert_eq!(second.refusal().map(|r| r.code), Some(RefusalCode::DuplicateChannel));
    let mut background = Raw::connect(at);
    background.greet(Role::Destination, Channel::Background, ID);
    let mut second = Raw::connect(at);
    second.send_frame(&offer(Role::Destination, Channel::Background));
    assert_eq!(second.refusal().map(|r| r.code), Some(RefusalCode::DuplicateChannel));
    // The first pair is unharmed.
    demand.send(&Encoder::request(wire(0, 1, 1), false));
    assert!(matches!(demand.receive(), Some(Frame::Data(_))));
    demand.send(&Encoder::bye());
    drop((demand, background));
    wait_for_no_session(&server);

    let mut alone = Raw::connect(at);
    alone.greet(Role::Destination, Channel::Demand, ID);
    let start = Instant::now();
    assert_eq!(alone.refusal().map(|r| r.code), Some(RefusalCode::Unpaired));
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());

    let mut reader = Raw::connect(at);
    reader.greet(Role::Reader, Channel::Demand, ID);
    let mut background = Raw::connect(at);
    background.send_frame(&offer(Role::Destination, Channel::Background));
    assert_eq!(background.refusal().map(|r| r.code), Some(RefusalCode::UnknownSession));
    reader.send(&Encoder::complete(Counts::default()));
    assert_eq!(reader.refusal().map(|r| r.code), Some(RefusalCode::Protocol));
    still_serves(&server);
}

#[test]
fn more_clients_than_there_is_room_for() {
    let mut options = impatient_server();
    options.handshake_timeout = Duration::from_secs(60);
    options.idle_timeout = Duration::from_secs(60);
    let server = server(&"127.0.0.1:0".parse().unwrap(), options);
    let at = server.local_endpoint();
    let mut readers: Vec<Raw> = (0..3)
        .map(|n| {
            let mut raw = Raw::connect(at);
            raw.greet(Role::Reader, Channel::Demand, [n; 16]);
            raw
        })
        .collect();
    let mut fourth = Raw::connect(at);
    fourth.send_frame(&offer(Role::Reader, Channel::Demand));
    assert_eq!(fourth.refusal().map(|r| r.code), Some(RefusalCode::Busy));
    readers.iter_mut().for_each(|raw| raw.send(&Encoder::bye()));
    drop(readers);
    still_serves(&server);
}

/// Connections that never say hello fill the server up, but not for long.
#[test]
fn more_connections_than_there_is_room_for() {
    let mut options = impatient_server();
    options.max_connections = 2;
    let server = server(&"127.0.0.1:0".parse().unwrap(), options);
    // Connections are accepted in the order in which they come.
    let waiting = [(); 2].map(|()| Raw::connect(server.local_endpoint()));
    let mut third = Raw::connect(server.local_endpoint());
    assert_eq!(third.refusal().map(|r| r.code), Some(RefusalCode::Busy));
    assert_eq!(server.stats().refused, 1);
    still_serves(&server);
    drop(waiting);
}

/// A client that asks for much and reads nothing is dropped, and holds nobody up.
#[test]
fn a_client_that_does_not_read() {
    let folder = tempfile::tempdir().unwrap();
    for endpoint in transports(folder.path()) {
        let server = server(&endpoint, impatient_server());
        let mut demand = Raw::connect(server.local_endpoint());
        demand.greet(Role::Reader, Channel::Demand, ID);
        for _ in 0..50 {
            demand.send(&Encoder::request(wire(0, 0, 2_000), false));
        }
        still_serves(&server);
        wait_for_no_session(&server);
        assert_eq!(server.stats().failed, 1);
    }
}

/// More requests than the queue holds: not refused, but read more slowly, and all answered.
#[test]
fn a_flood_of_requests() {
    let mut options = impatient_server();
    options.idle_timeout = Duration::from_secs(10);
    let server = server(&"127.0.0.1:0".parse().unwrap(), options);
    let mut demand = Raw::connect(server.local_endpoint());
    demand.greet(Role::Destination, Channel::Demand, ID);
    let mut background = Raw::connect(server.local_endpoint());
    background.greet(Role::Destination, Channel::Background, ID);
    let flood: Vec<u8> =
        (0..2_000).flat_map(|granule| Encoder::request(wire(0, granule, 1), true)).collect();
    background.send(&flood);
    let mut answered = 0;
    while answered < 2_000 {
        match background.receive() {
            Some(Frame::Data(data)) => answered += data.span.count,
            Some(Frame::Zero { span }) => answered += span.count,
            other => panic!("{other:?} after {answered}"),
        }
    }
    demand.send(&Encoder::complete(Counts { filled: 2_000, poisoned: 0 }));
    assert!(matches!(demand.receive(), Some(Frame::CompleteAck(_))));
}

#[test]
fn listening_where_it_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let endpoint = Endpoint::Unix(path.clone());
    let first = server(&endpoint, impatient_server());
    let store = || Arc::new(MemoryStore::new(layout(&[(1, PAGE)])));
    let error = PageServer::bind(&endpoint, store(), ServerOptions::default()).unwrap_err();
    assert!(error.to_string().contains("unix:"), "{error}");
    still_serves(&first);
    drop(first);
    assert!(!path.exists());
    // A file left behind by a killed server is replaced; any other file is not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    still_serves(&server(&endpoint, impatient_server()));
    std::fs::write(&path, "not a socket").unwrap();
    assert!(PageServer::bind(&endpoint, store(), ServerOptions::default()).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "not a socket");
}
