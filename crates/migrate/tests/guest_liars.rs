//! Peers that lie: whatever they say, the other side ends with the guest where it was.

mod guest_common;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use guest_common::*;
use pageferry_memory::Backing;
use pageferry_migrate::{
    Mode, ReceiveOptions, Stage,
    core::{
        AcceptedRegion, Channel, Codec, Counts, DataHeader, Decoder, Encoder, Frame, Item, Lane,
        PackedHeader, RegionInfo, Role, SessionId, StateInfo, StateName, Terms, UnitRun, WireSpan,
    },
};
use pageferry_testing::{features, wait_for, watch};

const UNITS: u64 = 256;

fn able() -> bool {
    let needed = pageferry_uffd::Features::WP_ASYNC | pageferry_uffd::Features::POISON;
    features(needed)
}

/// What is sent: frames, and the bytes that follow one.
enum Say {
    Frame(Frame),
    Bytes(Vec<u8>),
}

use Say::{Bytes, Frame as F};

fn span(first: u64, count: u32) -> WireSpan {
    WireSpan { region: 0, first, count }
}

fn region(length: u64) -> RegionInfo {
    RegionInfo { id: 0, flags: 0, guest_base: 0, length, granule: PAGE, page_size: PAGE }
}

fn encode(said: Vec<Say>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for say in said {
        match say {
            F(Frame::Packed(packed)) => bytes.extend(Encoder::packed(&packed)),
            F(frame) => Encoder::encode(&frame, &mut bytes),
            Bytes(more) => bytes.extend(more),
        }
    }
    bytes
}

/// What is heard until the other side ends the connection.
fn hear(stream: &mut TcpStream) -> Vec<Frame> {
    let mut decoder = Decoder::new(4 << 20);
    let (mut frames, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            let Ok((taken, item)) = decoder.feed(rest) else { return frames };
            if let Some(Item::Frame(frame)) = item {
                frames.push(frame);
            }
            rest = &rest[taken..];
        }
    }
    frames
}

/// Plays a source that says these things after the regions; returns what it heard.
fn source_says(said: Vec<Say>) -> (Vec<Frame>, Arc<Destination>) {
    let lives = Arc::new(Lives::default());
    let destination = Destination::new(Backing::Anonymous, Load::IDLE, &lives);
    let mut options = ReceiveOptions::default();
    options.max_state = 4096;
    options.max_memory = UNITS * PAGE;
    let receiving = listen_with(&destination, options);
    let mut stream = TcpStream::connect(receiving.endpoint().unwrap().to_string()).unwrap();
    let mut hello = Terms::guest().offer(Role::GuestSource, Channel::Control, SessionId([7; 16]));
    hello.lane = Lane::default();
    let mut writer = stream.try_clone().unwrap();
    let writing = thread::spawn(move || {
        let bytes = encode(
            [F(Frame::Hello(hello)), F(Frame::Regions(vec![region(UNITS * PAGE)]))]
                .into_iter()
                .chain(said)
                .collect(),
        );
        // The other side may end it in the middle.
        let _ = writer.write_all(&bytes);
        let _ = writer.shutdown(Shutdown::Write);
    });
    let heard = hear(&mut stream);
    let over = |stage| matches!(stage, Stage::Paused | Stage::Failed);
    wait_for("the destination to see it", || over(receiving.status().stage));
    writing.join().unwrap();
    if receiving.status().stage == Stage::Paused {
        // It could run the guest, and cannot know whether it is to: it waits for its operator.
        receiving.drop_guest().unwrap();
    }
    assert!(receiving.wait().is_err());
    (heard, destination)
}

fn state() -> StateInfo {
    StateInfo::of(StateName::new("test-threads").unwrap(), 1, &[1, 2, 3])
}

fn stopped() -> Vec<Say> {
    vec![
        F(Frame::RoundBegin { round: 1, units: UNITS }),
        F(Frame::Zero { span: span(0, UNITS as u32) }),
        F(Frame::RoundEnd { round: 1, units: UNITS }),
        F(Frame::StateBegin(state())),
        F(Frame::State { offset: 0, bytes: vec![1, 2, 3] }),
    ]
}

#[test]
fn a_source_that_lies_is_refused_and_nothing_of_its_guest_stays() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let begin = || F(Frame::RoundBegin { round: 1, units: UNITS });
    let packed = |codec, count, bytes: &[u8]| {
        vec![
            begin(),
            F(Frame::Packed(PackedHeader {
                span: span(0, count),
                codec,
                length: bytes.len() as u32,
            })),
            Bytes(bytes.to_vec()),
        ]
    };
    let with_switch = |more: Vec<Say>| stopped().into_iter().chain(more).collect::<Vec<_>>();
    let mut short = stopped();
    short.truncate(4);
    short.push(F(Frame::Switch { round: 1, missing: 0 }));
    let mut unsent = stopped();
    unsent[1] = F(Frame::Zero { span: span(0, UNITS as u32 - 1) });
    unsent[2] = F(Frame::RoundEnd { round: 1, units: UNITS - 1 });
    unsent.push(F(Frame::Switch { round: 1, missing: 0 }));
    let cases: Vec<(&str, Vec<Say>)> = vec![
        ("lz4 that is none", packed(Codec::Lz4, 1, &[0xff; 40])),
        ("lz4 of too few bytes", packed(Codec::Lz4, 2, &[0x10, 7])),
        ("zstd that is none", packed(Codec::Zstd, 1, &[9; 40])),
        ("a delta of what never came", packed(Codec::Delta, 1, &[0, 1, 1])),
        ("pages outside", vec![begin(), F(Frame::Zero { span: span(UNITS, 1) })]),
        ("pages outside any round", vec![F(Frame::Zero { span: span(0, 1) })]),
        ("a wrong count", vec![begin(), F(Frame::RoundEnd { round: 1, units: 5 })]),
        ("a state without an end", short),
        ("memory that never came", unsent),
        (
            "a state that is too long",
            vec![F(Frame::StateBegin(StateInfo { length: 4097, ..state() }))],
        ),
        ("another state than announced", {
            let mut said = stopped();
            said[4] = F(Frame::State { offset: 0, bytes: vec![1, 2, 4] });
            said.push(F(Frame::Switch { round: 1, missing: 0 }));
            said
        }),
        (
            "missing memory miscounted",
            with_switch(vec![
                F(Frame::Missing { region: 0, runs: vec![UnitRun { first: 0, count: 2 }] }),
                F(Frame::Switch { round: 1, missing: 3 }),
            ]),
        ),
        ("a guest given before all is said", with_switch(vec![F(Frame::Run)])),
        ("more memory than is taken", vec![F(Frame::Regions(vec![region(UNITS * PAGE)]))]),
        (
            "pages after all has come",
            with_switch(vec![
                F(Frame::Switch { round: 1, missing: 0 }),
                F(Frame::Zero { span: span(0, 1) }),
            ]),
        ),
        ("completion out of the blue", vec![F(Frame::CompleteAck(Counts::default()))]),
    ];
    for (what, said) in cases {
        let (heard, destination) = source_says(said);
        let Some(Frame::Error(refusal)) = heard.last() else {
            panic!("{what}: no refusal in {heard:?}")
        };
        assert!(!refusal.text.is_empty(), "{what}");
        destination.assert_dropped();
    }
}

#[test]
fn a_destination_that_lies_does_not_get_the_guest() {
    if !able() {
        return;
    }
    let _watch = watch(60);
    let bytes = 1 << 20;
    let accept =
        |granule| F(Frame::Accept([0, 1].map(|id| AcceptedRegion { id, granule }).to_vec()));
    let data = DataHeader { span: span(0, 1), length: 4096, fragment: None };
    let cases: Vec<(&str, Vec<Say>)> = vec![
        ("granules of no size", vec![accept(0)]),
        ("granules larger than the region", vec![accept(1 << 30)]),
        (
            "one region for two",
            vec![F(Frame::Accept(vec![AcceptedRegion { id: 0, granule: PAGE }]))],
        ),
        (
            "a round that was not sent",
            vec![accept(PAGE), F(Frame::RoundAck { round: 2, units: 9 })],
        ),
        ("ready before anything", vec![accept(PAGE), F(Frame::Ready { missing: 0 })]),
        ("running before it was told to", vec![accept(PAGE), F(Frame::Running)]),
        ("complete before it runs", vec![accept(PAGE), F(Frame::Complete(Counts::default()))]),
        ("pages", vec![accept(PAGE), F(Frame::Data(data)), Bytes(vec![1; 4096])]),
        ("nothing more", vec![accept(PAGE)]),
    ];
    for (what, said) in cases {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().into();
        let liar = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut decoder = Decoder::new(4 << 20);
            let mut buffer = [0; 4096];
            let offer = loop {
                let n = stream.read(&mut buffer).unwrap();
                if let (_, Some(Item::Frame(Frame::Hello(offer)))) =
                    decoder.feed(&buffer[..n]).unwrap()
                {
                    break offer;
                }
            };
            let answer = Terms::guest().answer_as(Role::GuestDestination, &offer).unwrap();
            let said = std::iter::once(F(Frame::Hello(answer))).chain(said).collect();
            // The other side may end it in the middle.
            let _ = stream.write_all(&encode(said));
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let lives = Arc::new(Lives::default());
        let source = Source::new(layout(Backing::Anonymous, bytes), Load::BUSY, &lives);
        let mut options = options(Mode::Hybrid);
        (options.connections, options.demand_connections) = (0, 0);
        assert!(start(&source, endpoint, options).wait().is_err(), "{what}");
        source.assert_goes_on();
        liar.join().unwrap();
    }
}
