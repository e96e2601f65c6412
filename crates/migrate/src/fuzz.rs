//! One harness for unit tests, property tests and fuzzing of the protocol core.

use crate::core::{
    Channel, ClientSession, Decoder, Encoder, Frame, Geometry, Item, MIN_MAX_PAYLOAD, RegionInfo,
    Role, ServerSession, SessionId, Terms,
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
