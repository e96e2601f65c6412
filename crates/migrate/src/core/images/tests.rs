//! Tests of the two ends, against the tables and against each other.

mod bytes;
mod refused;

use proptest::prelude::*;

use super::*;
use crate::core::{
    Channel, Counts, DataHeader, Decoder, Encoder, Features, Frame, HEADER_LEN, Hello, Item, Kind,
    MIN_MAX_PAYLOAD, Phase, ProtocolError, Refusal, RefusalCode, Role, SessionId, Terms, WireSpan,
    guest, image_receiver_next, image_sender_next, tests::any_span,
};

const SESSION: SessionId = SessionId(*b"0123456789abcdef");
const ID: ImageId = ImageId(*b"the first image.");
const OTHER: ImageId = ImageId(*b"the second image");
const PAGE: u64 = 4096;

fn span(first: u64, count: u32) -> WireSpan {
    WireSpan { region: 0, first, count }
}

fn data(first: u64, count: u32) -> Frame {
    let length = count * PAGE as u32;
    Frame::Data(DataHeader { span: span(first, count), length, fragment: None })
}

fn begin(id: ImageId) -> ImageBegin {
    ImageBegin { id, parent: None, page_size: PAGE, metadata_len: 0, mappings_len: 0 }
}

/// A harmless frame of each kind that only images have.
pub(in crate::core) fn sample(kind: Kind) -> Frame {
    match kind {
        Kind::ImageBegin => Frame::ImageBegin(begin(ID)),
        Kind::ImageMetadata => Frame::ImageMetadata { offset: 0, bytes: vec![1] },
        Kind::ImageMappings => Frame::ImageMappings { offset: 0, bytes: vec![2] },
        Kind::Gone => Frame::Gone { span: span(5, 1) },
        Kind::ImageEnd => Frame::ImageEnd(ImageEnd {
            counts: ImageCounts::default(),
            frames: [0; 32],
            pages: [0; 32],
        }),
        Kind::ImageAbort => Frame::abort("no reason"),
        Kind::ImageStored => {
            Frame::ImageStored(ImageStored { id: ID, counts: ImageCounts::default() })
        }
        other => panic!("{other} is not about images alone"),
    }
}

/// Both ends, and what the sender sends received by the receiver at once.
struct Pair {
    sender: ImageSenderSession,
    receiver: ImageReceiverSession,
}

impl Pair {
    fn new() -> Self {
        Self::with(ImageLimits::default())
    }

    fn with(limits: ImageLimits) -> Self {
        let mut sender = ImageSenderSession::new(Terms::default(), SESSION);
        let mut receiver = ImageReceiverSession::new(Terms::default(), limits);
        receiver.receive(&Frame::Hello(sender.offer())).unwrap();
        sender.receive(&Frame::Hello(*receiver.agreed().unwrap())).unwrap();
        Self { sender, receiver }
    }

    fn say(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        self.sender.send(frame)?;
        self.hear(frame)
    }

    /// The receiver gets a frame, whatever the sender thinks of it.
    fn hear(&mut self, frame: &Frame) -> Result<(), ProtocolError> {
        self.receiver.receive(frame)?;
        if let Frame::Data(header) = frame {
            let payload = vec![header.span.first as u8; header.length as usize];
            self.sender.payload(&payload);
            self.receiver.payload(&payload);
        }
        Ok(())
    }

    fn end(&mut self) -> Frame {
        Frame::ImageEnd(self.sender.end().unwrap())
    }

    /// The receiver stores what has ended, and says so.
    fn store(&mut self) {
        let stored = self.receiver.stored(self.sender.counts()).unwrap();
        self.sender.receive(&Frame::ImageStored(stored)).unwrap();
    }

    /// Legal steps to `phase`, in which `kind` is to come; `None` if nobody is ever there.
    fn at(phase: Phase, kind: Kind) -> Option<Self> {
        let mut pair = Self::new();
        let described = |of| u32::from(kind == of);
        let image = Frame::ImageBegin(ImageBegin {
            metadata_len: described(Kind::ImageMetadata),
            mappings_len: described(Kind::ImageMappings),
            ..begin(ID)
        });
        match phase {
            Phase::Active => {}
            Phase::Describing => pair.say(&image).unwrap(),
            Phase::Filling => {
                pair.say(&Frame::ImageBegin(begin(ID))).unwrap();
                pair.say(&data(0, 1)).unwrap();
            }
            Phase::Storing => {
                pair.say(&Frame::ImageBegin(begin(ID))).unwrap();
                let end = pair.end();
                pair.say(&end).unwrap();
            }
            Phase::Completing | Phase::Completed => {
                pair.say(&Frame::Complete(Counts::default())).unwrap();
                if phase == Phase::Completed {
                    pair.sender.receive(&Frame::CompleteAck(Counts::default())).unwrap();
                }
            }
            Phase::Closed => {
                pair.sender.receive(&Frame::Bye).unwrap();
                pair.receiver.receive(&Frame::Bye).unwrap();
            }
            Phase::Greeting => {
                pair.sender = ImageSenderSession::new(Terms::default(), SESSION);
                pair.receiver = ImageReceiverSession::new(Terms::default(), ImageLimits::default());
            }
            _ => return None,
        }
        Some(pair)
    }

    /// A frame of this kind that is right, where the kind is.
    fn frame(&self, kind: Kind, to_receiver: bool) -> Frame {
        match kind {
            Kind::Hello if to_receiver => Frame::Hello(self.sender.offer()),
            Kind::Hello => Frame::Hello(
                Terms::default().answer_as(Role::ImageReceiver, &self.sender.offer()).unwrap(),
            ),
            Kind::Regions => Frame::Regions(Vec::new()),
            Kind::Request => Frame::Request { span: span(5, 1), prefetch: false },
            Kind::Expedite => Frame::Expedite { span: span(5, 1) },
            Kind::Data => data(5, 1),
            Kind::Zero => Frame::Zero { span: span(5, 1) },
            Kind::Poison => Frame::Poison { span: span(5, 1) },
            Kind::Complete => Frame::Complete(Counts::default()),
            Kind::CompleteAck => Frame::CompleteAck(Counts::default()),
            Kind::Error => Frame::Error(Refusal::new(RefusalCode::Storage, "no room")),
            Kind::Bye => Frame::Bye,
            Kind::Ping => Frame::Ping { nonce: 7 },
            Kind::Pong => Frame::Pong { nonce: 7 },
            Kind::ImageEnd => self.sender.end().map_or_else(|| sample(kind), Frame::ImageEnd),
            kind if kind as u8 >= Kind::Accept as u8 => guest::tests::sample(kind),
            image => sample(image),
        }
    }
}

/// Every frame in every phase at both ends: either the table's next phase, or refused by name, and
/// closed.
#[test]
fn every_frame_in_every_phase() {
    let (mut legal, mut illegal) = (0, 0);
    let mut judge =
        |result: Result<(), ProtocolError>, now, next: Option<Phase>, kind, phase| match next {
            Some(Phase::Closed) if kind == Kind::Error => {
                assert!(matches!(result, Err(ProtocolError::Refused(_))), "{kind} in {phase}");
                assert_eq!(now, Phase::Closed);
            }
            Some(next) => {
                assert_eq!((result, now), (Ok(()), next), "{kind} in {phase}");
                legal += 1;
            }
            None => {
                let channel = Channel::Images;
                assert_eq!(result, Err(ProtocolError::Unexpected { kind, channel, phase }));
                assert_eq!(now, Phase::Closed);
                illegal += 1;
            }
        };
    for phase in Phase::ALL {
        for kind in Kind::ALL {
            // A receiver has no phase of its own between the counts and their answer.
            if let Some(mut pair) =
                Pair::at(phase, kind).filter(|pair| pair.receiver.phase() == phase)
            {
                let frame = pair.frame(kind, true);
                let result = pair.receiver.receive(&frame);
                let next = image_receiver_next(phase, kind);
                judge(result, pair.receiver.phase(), next, kind, phase);
            }
            if let Some(mut pair) = Pair::at(phase, kind) {
                assert_eq!(pair.sender.phase(), phase);
                let frame = pair.frame(kind, false);
                let result = pair.sender.receive(&frame);
                judge(result, pair.sender.phase(), image_sender_next(phase, kind), kind, phase);
            }
        }
    }
    // All rows of both tables, but those of errors.
    assert_eq!((legal, illegal), (50, 507));
}

/// A sender sends what its receiver may receive, and nothing else; what it does not send changes
/// nothing.
#[test]
fn a_sender_keeps_to_the_receivers_table() {
    let of_images = [
        Kind::ImageBegin,
        Kind::ImageMetadata,
        Kind::ImageMappings,
        Kind::Data,
        Kind::Zero,
        Kind::Poison,
        Kind::Gone,
        Kind::ImageEnd,
        Kind::ImageAbort,
        Kind::Complete,
    ];
    let mut sent = 0;
    for phase in Phase::ALL {
        for kind in of_images {
            let Some(mut pair) = Pair::at(phase, kind) else { continue };
            let frame = pair.frame(kind, true);
            match (pair.sender.send(&frame), image_receiver_next(phase, kind)) {
                (Ok(()), Some(next)) => {
                    let waits = if kind == Kind::Complete { Phase::Completing } else { next };
                    assert_eq!(pair.sender.phase(), waits, "{kind} in {phase}");
                    pair.receiver.receive(&frame).unwrap();
                    assert_eq!(pair.receiver.phase(), next, "{kind} in {phase}");
                    sent += 1;
                }
                (Err(ProtocolError::Unexpected { .. }), None) => {
                    assert_eq!(pair.sender.phase(), phase);
                }
                other => panic!("{kind} in {phase}: {other:?}"),
            }
        }
    }
    assert_eq!(sent, 16);
}

/// The core of the tables, written a second time by hand.
#[test]
fn what_the_tables_must_say() {
    let pages = [Kind::Data, Kind::Zero, Kind::Poison, Kind::Gone];
    for kind in Kind::ALL {
        assert_eq!(image_receiver_next(Phase::Closed, kind), None);
        assert_eq!(image_sender_next(Phase::Closed, kind), None);
    }
    for kind in pages {
        for phase in [Phase::Active, Phase::Storing, Phase::Completed] {
            assert_eq!(image_receiver_next(phase, kind), None, "pages outside an image");
        }
        assert_eq!(image_sender_next(Phase::Filling, kind), None);
    }
    for phase in [Phase::Describing, Phase::Filling, Phase::Storing, Phase::Completed] {
        assert_eq!(image_receiver_next(phase, Kind::ImageBegin), None, "a second begin");
        assert_eq!(image_receiver_next(phase, Kind::Complete), None, "complete in an image");
    }
    for phase in [Phase::Describing, Phase::Filling] {
        assert_eq!(image_sender_next(phase, Kind::ImageStored), None, "stored before its end");
    }
    assert_eq!(image_sender_next(Phase::Active, Kind::ImageStored), None, "stored twice");
    assert_eq!(image_receiver_next(Phase::Filling, Kind::ImageMetadata), None);
    assert_eq!(image_receiver_next(Phase::Filling, Kind::Bye), None);
    assert_eq!(image_receiver_next(Phase::Active, Kind::Request), None);
}

#[test]
fn a_session_of_two_images() {
    let mut pair = Pair::new();
    let image = ImageBegin { metadata_len: 3, mappings_len: 5, ..begin(ID) };
    let metadata = |offset, bytes: &[u8]| Frame::ImageMetadata { offset, bytes: bytes.to_vec() };
    let mappings = |offset, bytes: &[u8]| Frame::ImageMappings { offset, bytes: bytes.to_vec() };
    pair.say(&Frame::ImageBegin(image)).unwrap();
    for frame in [metadata(0, b"ab"), metadata(2, b"c"), mappings(0, b"1234"), mappings(4, b"5")] {
        assert!(!pair.receiver.described());
        pair.say(&frame).unwrap();
    }
    assert!(pair.receiver.described());
    assert_eq!(pair.receiver.take_description(), (b"abc".to_vec(), b"12345".to_vec()));
    for frame in [
        data(3, 2),
        Frame::Zero { span: span(5, u32::MAX) },
        Frame::Poison { span: span(1 << 40, 1) },
        Frame::Gone { span: span((1 << 40) + 1, 7) },
        data((1 << 52) - 2, 1),
    ] {
        pair.say(&frame).unwrap();
    }
    let counts = ImageCounts { data: 3, zero: u32::MAX.into(), poisoned: 1, gone: 7 };
    assert_eq!(pair.sender.counts(), counts);
    let end = pair.end();
    pair.say(&end).unwrap();
    assert_eq!(pair.receiver.image(), Some(&image));
    pair.store();
    assert_eq!((pair.sender.last_stored(), pair.receiver.last_stored()), (Some(ID), Some(ID)));
    assert_eq!((pair.sender.image(), pair.receiver.image()), (None, None));

    // One that is given up, and may then be sent after all.
    let child = ImageBegin { parent: Some(ID), ..begin(OTHER) };
    pair.say(&Frame::ImageBegin(child)).unwrap();
    pair.say(&data(0, 1)).unwrap();
    pair.say(&Frame::abort("changed my mind")).unwrap();
    pair.say(&Frame::ImageBegin(child)).unwrap();
    let end = pair.end();
    pair.say(&end).unwrap();
    pair.store();

    let totals = ImageTotals { stored: 2, aborted: 1 };
    assert_eq!((pair.sender.totals(), pair.receiver.totals()), (totals, totals));
    pair.say(&Frame::Complete(totals.into())).unwrap();
    pair.sender.receive(&Frame::CompleteAck(totals.into())).unwrap();
    assert_eq!(pair.sender.phase(), Phase::Completed);
    pair.receiver.receive(&Frame::Bye).unwrap();
}

pub(in crate::core) fn any_frame() -> impl Strategy<Value = Frame> {
    let id = || any::<[u8; 16]>().prop_map(ImageId);
    let counts = || {
        any::<(u64, u64, u64, u64)>().prop_map(|(data, zero, poisoned, gone)| ImageCounts {
            data,
            zero,
            poisoned,
            gone,
        })
    };
    let chunk = || (any::<u64>(), prop::collection::vec(any::<u8>(), 1..100));
    let begin = (id(), prop::option::of(id()), any::<(u64, u32, u32)>());
    prop_oneof![
        begin.prop_map(|(id, parent, (page_size, metadata_len, mappings_len))| {
            Frame::ImageBegin(ImageBegin { id, parent, page_size, metadata_len, mappings_len })
        }),
        chunk().prop_map(|(offset, bytes)| Frame::ImageMetadata { offset, bytes }),
        chunk().prop_map(|(offset, bytes)| Frame::ImageMappings { offset, bytes }),
        any_span().prop_map(|span| Frame::Gone { span }),
        (counts(), any::<[u8; 32]>(), any::<[u8; 32]>()).prop_map(|(counts, frames, pages)| {
            Frame::ImageEnd(ImageEnd { counts, frames, pages })
        }),
        any::<String>().prop_map(|text| Frame::abort(&text)),
        (id(), counts()).prop_map(|(id, counts)| Frame::ImageStored(ImageStored { id, counts })),
    ]
}

proptest! {
    /// Both ends agree on every frame: what one sends the other takes, what one refuses to send
    /// the other would have refused, for the same reason; and they count alike.
    #[test]
    fn both_ends_agree(spans in prop::collection::vec((0..4_u8, 0..60_u64, 0..5_u32), 0..40)) {
        let mut pair = Pair::new();
        pair.say(&Frame::ImageBegin(begin(ID))).unwrap();
        let mut model = ImageCounts::default();
        let mut next = 0;
        for (kind, first, count) in spans {
            let frame = match kind {
                0 => data(first, count),
                1 => Frame::Zero { span: span(first, count) },
                2 => Frame::Poison { span: span(first, count) },
                _ => Frame::Gone { span: span(first, count) },
            };
            let fits = count > 0 && first >= next;
            let sent = pair.sender.send(&frame);
            prop_assert_eq!(sent.is_ok(), fits);
            if let Err(refused) = sent {
                // To be asked without closing the session that goes on.
                let mut other = Pair::new();
                other.say(&Frame::ImageBegin(begin(ID))).unwrap();
                if next > 0 {
                    other.hear(&Frame::Gone { span: span(next - 1, 1) }).unwrap();
                }
                prop_assert_eq!(other.receiver.receive(&frame), Err(refused));
                continue;
            }
            pair.hear(&frame).unwrap();
            next = first + u64::from(count);
            *[&mut model.data, &mut model.zero, &mut model.poisoned, &mut model.gone][usize::from(kind)] += u64::from(count);
        }
        prop_assert_eq!(pair.sender.counts(), model);
        let end = pair.end();
        pair.say(&end).unwrap();
        pair.store();
        prop_assert_eq!(pair.receiver.totals(), ImageTotals { stored: 1, aborted: 0 });
    }

    /// Frames of images in any order, some of them right, never break what the two ends promise.
    #[test]
    fn frames_in_any_order(
        steps in prop::collection::vec((0..12_u8, 0..20_u64, 1..4_u32, any_frame()), 1..60),
    ) {
        let mut bytes = Vec::new();
        for (n, (what, first, count, any)) in steps.into_iter().enumerate() {
            let frame = match what {
                0 | 1 => Frame::ImageBegin(begin(ImageId([n as u8 + 1; 16]))),
                2..=4 => data(n as u64 * 4 + first, count),
                5 => Frame::Zero { span: span(n as u64 * 4 + first, count) },
                6 | 7 => sample(Kind::ImageEnd),
                8 => Frame::abort("why not"),
                9 => Frame::Ping { nonce: 3 },
                _ => any,
            };
            Encoder::encode(&frame, &mut bytes);
            if let Frame::Data(header) = &frame {
                bytes.resize(bytes.len() + header.length as usize, n as u8);
            }
        }
        crate::fuzz::images(&bytes);
        crate::fuzz::decode(&bytes);
    }
}
