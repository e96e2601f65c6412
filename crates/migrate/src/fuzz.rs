//! One harness for unit tests, property tests and fuzzing of the protocol core.

mod guests;

pub use guests::guests;

use crate::core::{
    Channel, ClientSession, Decoder, Encoder, Frame, Geometry, ImageEnd, ImageLimits,
    ImageReceiverSession, ImageSenderSession, Item, Kind, MIN_MAX_PAYLOAD, Phase, ProtocolError,
    RegionInfo, Role, ServerSession, SessionId, Terms,
};

/// Decodes `data`, in splits that `data` itself chooses, and hands every frame to both state
/// machines.
///
/// # Panics
/// If the core breaks a promise: the decoded frames depend on the splits, a frame encodes to
/// other bytes than it came from, or a state machine accepts a frame after it closed.
pub fn decode(data: &[u8]) {
    let whole = frames(data, usize::MAX);
    let step = data.first().map_or(1, |byte| usize::from(*byte % 61) + 1);
    assert_eq!(whole, frames(data, step), "the splits change what is decoded");

    let regions = vec![RegionInfo {
        id: 0,
        flags: 0,
        guest_base: 0,
        length: 64 * 4096,
        granule: 4096,
        page_size: 4096,
    }];
    let geometry = Geometry::new(regions).expect("these regions are in order");
    let session = SessionId(*b"fuzzfuzzfuzzfuzz");
    let mut client = ClientSession::demand(Terms::default(), Role::Destination, session);
    let mut background = ClientSession::background(Terms::default(), session, geometry.clone());
    let mut server = ServerSession::new(Terms::default(), geometry);
    if let Some(Frame::Hello(_)) = whole.0.first() {
        // Lets the input drive a destination beyond its greeting as well.
        let hello = Terms::default()
            .answer(&Terms::default().offer(Role::Destination, Channel::Demand, session))
            .expect("the default terms agree with themselves");
        assert!(client.receive(&Frame::Hello(hello)).is_ok());
    }
    let (mut client_open, mut background_open, mut server_open) = (true, true, true);
    for frame in &whole.0 {
        client_open = step_machine(client_open, client.receive(frame).is_ok());
        background_open = step_machine(background_open, background.receive(frame).is_ok());
        server_open = step_machine(server_open, server.receive(frame).is_ok());
    }
}

/// Decodes `data`, and hands it to a receiver of images that has shaken hands, as far as it goes;
/// every image that ends is stored. An `ImageEnd` whose digest of pages is all zero is made to fit, so that
/// the input can get beyond one.
///
/// # Panics
/// If the core breaks a promise: a receiver accepts what a sender would not send, or refuses what
/// one would, or they count differently, or more is held than was announced.
pub fn images(data: &[u8]) {
    let session = SessionId(*b"fuzzfuzzfuzzfuzz");
    let terms = Terms { max_payload: MIN_MAX_PAYLOAD, ..Terms::default() };
    let limits = ImageLimits { images: 50, image_bytes: 1 << 19, ..ImageLimits::default() };
    let mut receiver = ImageReceiverSession::new(terms, limits);
    let mut sender = ImageSenderSession::new(terms, session);
    assert_eq!(receiver.receive(&Frame::Hello(sender.offer())), Ok(()));
    let answer = *receiver.agreed().expect("a hello has come");
    assert_eq!(sender.receive(&Frame::Hello(answer)), Ok(()));
    // A second sender, which hears what the input says in place of a receiver.
    let mut hearing = ImageSenderSession::new(terms, session);
    assert_eq!(hearing.receive(&Frame::Hello(answer)), Ok(()));

    let mut decoder = Decoder::new(MIN_MAX_PAYLOAD);
    let mut rest = data;
    // What remains after the last whole item is the beginning of one.
    while let Ok((taken, Some(item))) = decoder.feed(rest) {
        rest = &rest[taken..];
        match item {
            Item::Payload(bytes) => {
                receiver.payload(bytes);
                sender.payload(bytes);
            }
            Item::Frame(mut frame) => {
                if let (Frame::ImageEnd(end), Some(right)) = (&mut frame, sender.end())
                    && *end == (ImageEnd { pages: [0; 32], ..*end })
                {
                    *end = right;
                }
                listen(&mut hearing, &frame);
                if !exchange(&mut sender, &mut receiver, &frame) {
                    return;
                }
            }
        }
    }
}

/// A sender that hears `frame` acknowledges no image but the one it has sent.
fn listen(hearing: &mut ImageSenderSession, frame: &Frame) {
    let (before, closed) = (hearing.totals(), hearing.phase() == Phase::Closed);
    let accepted = hearing.receive(frame).is_ok();
    assert!(!(closed && accepted), "a frame was accepted after the session closed");
    assert_eq!(hearing.totals(), before, "no image was sent");
}

/// A frame from `sender` to `receiver`, if the one would send it and the other takes it; returns
/// whether to go on.
fn exchange(
    sender: &mut ImageSenderSession,
    receiver: &mut ImageReceiverSession,
    frame: &Frame,
) -> bool {
    let kind = frame.kind();
    let received = receiver.receive(frame);
    // What is no image's affair is not noted by the sender's machine.
    let sent = match kind {
        Kind::Hello | Kind::Ping | Kind::Pong | Kind::Bye | Kind::Error => {
            return received.is_ok() && receiver.phase() != Phase::Closed;
        }
        _ => sender.send(frame),
    };
    if kind == Kind::Complete && received.is_ok() {
        let totals = receiver.totals();
        assert_eq!(sender.receive(&Frame::CompleteAck(totals.into())), Ok(()));
    }
    match (sent, &received) {
        (Ok(()), Ok(())) => {}
        (Ok(()), Err(ProtocolError::Limit { .. } | ProtocolError::BadImage { .. })) => {}
        (Err(ours), Err(theirs)) if ours == *theirs => {}
        // Limits are looked at first.
        (Err(_), Err(ProtocolError::Limit { .. } | ProtocolError::BadImage { .. })) => {}
        other => panic!("{frame:?}: {other:?}"),
    }
    if received.is_err() {
        assert_eq!(receiver.phase(), Phase::Closed);
        return false;
    }
    if receiver.described() && kind != Kind::ImageEnd {
        let begin = *receiver.image().expect("it is described");
        let (metadata, mappings) = receiver.take_description();
        let most = (begin.metadata_len as usize, begin.mappings_len as usize);
        assert!(metadata.len() <= most.0 && mappings.len() <= most.1);
    }
    if receiver.phase() == Phase::Storing {
        let stored = receiver.stored(sender.counts()).expect("both counted alike");
        assert_eq!(sender.receive(&Frame::ImageStored(stored)), Ok(()));
        assert_eq!(sender.totals(), receiver.totals());
    }
    true
}

fn step_machine(open: bool, accepted: bool) -> bool {
    assert!(open || !accepted, "a frame was accepted after the session closed");
    accepted
}

/// The frames, the payload bytes, and whether it ended in a violation.
fn frames(data: &[u8], step: usize) -> (Vec<Frame>, Vec<u8>, Option<String>) {
    let mut decoder = Decoder::new(MIN_MAX_PAYLOAD);
    let (mut frames, mut payload) = (Vec::new(), Vec::new());
    for piece in data.chunks(step.min(data.len().max(1))) {
        let mut rest = piece;
        loop {
            match decoder.feed(rest) {
                Err(error) => {
                    assert_eq!(decoder.feed(&[0]), Err(error.clone()), "the violation is kept");
                    return (frames, payload, Some(error.to_string()));
                }
                Ok((taken, item)) => {
                    rest = &rest[taken..];
                    match item {
                        None => break,
                        Some(Item::Payload(bytes)) => payload.extend_from_slice(bytes),
                        Some(Item::Frame(frame)) => {
                            reencode(&frame);
                            frames.push(frame);
                        }
                    }
                }
            }
        }
        assert!(rest.is_empty(), "the decoder asks for more without taking all");
    }
    (frames, payload, None)
}

/// A decoded frame survives encoding and decoding.
fn reencode(frame: &Frame) {
    let mut bytes = Vec::new();
    Encoder::encode(frame, &mut bytes);
    let again = Decoder::new(u32::MAX).feed(&bytes);
    assert_eq!(again, Ok((bytes.len(), Some(Item::Frame(frame.clone())))));
}
