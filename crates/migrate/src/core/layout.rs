//! What each kind of frame uses of its header, and how long its payload may be.

use super::{
    Kind, MAX_CHUNK, MAX_REGIONS, MAX_RUNS, MAX_TEXT, ProtocolError, REGION_LEN,
    frame::{FLAG_FRAGMENT, FLAG_PARENT, FLAG_PREFETCH, FRAME_MAGIC, RawHeader},
    guest::{ACCEPT_LEN, RUN_LEN, STATE_BEGIN_LEN},
    hello::{HELLO_LEN, HELLO_MAX},
    images::{IMAGE_BEGIN_LEN, IMAGE_END_LEN, IMAGE_STORED_LEN},
};

/// A set of header fields.
type Fields = u8;

const REGION: Fields = 1;
const FIRST: Fields = 2;
const COUNT: Fields = 4;
const AUX: Fields = 8;
const SPAN: Fields = REGION | FIRST | COUNT;

/// How long a payload may be, in bytes.
#[derive(Copy, Clone)]
enum Payload {
    None,
    Exactly(usize),
    Within(u32, u32),
    /// As many entries of this length as the count says, of which there may be this many.
    Entries(usize, u32),
    /// Bytes of pages: from one to as many as the two hellos agreed on.
    Pages,
}

fn layout(kind: Kind, flags: u8) -> (Fields, u8, Payload) {
    let chunk = Payload::Within(1, MAX_CHUNK);
    let text = Payload::Within(0, MAX_TEXT);
    match kind {
        Kind::Hello => (0, 0, Payload::Within(HELLO_LEN as u32, HELLO_MAX)),
        Kind::Regions => (COUNT, 0, Payload::Entries(REGION_LEN, MAX_REGIONS)),
        Kind::Request => (SPAN, FLAG_PREFETCH, Payload::None),
        Kind::Expedite | Kind::Zero | Kind::Poison | Kind::Gone => (SPAN, 0, Payload::None),
        Kind::Data if flags & FLAG_FRAGMENT != 0 => (SPAN | AUX, FLAG_FRAGMENT, Payload::Pages),
        Kind::Data => (SPAN, FLAG_FRAGMENT, Payload::Pages),
        Kind::Packed => (SPAN | AUX, 0, Payload::Pages),
        Kind::Complete
        | Kind::CompleteAck
        | Kind::RoundBegin
        | Kind::RoundEnd
        | Kind::RoundAck
        | Kind::Switch
        | Kind::HaveEnd => (FIRST | AUX, 0, Payload::None),
        Kind::Ready => (FIRST, 0, Payload::None),
        Kind::Error | Kind::Cancel => (AUX, 0, text),
        Kind::ImageAbort => (0, 0, text),
        Kind::Bye | Kind::Run | Kind::Running | Kind::Cancelled | Kind::Dropped => {
            (0, 0, Payload::None)
        }
        Kind::Ping | Kind::Pong | Kind::Resume => (AUX, 0, Payload::None),
        Kind::ImageMetadata | Kind::ImageMappings | Kind::State => (AUX, 0, chunk),
        Kind::ImageBegin => (0, FLAG_PARENT, Payload::Exactly(IMAGE_BEGIN_LEN)),
        Kind::ImageEnd => (0, 0, Payload::Exactly(IMAGE_END_LEN)),
        Kind::ImageStored => (0, 0, Payload::Exactly(IMAGE_STORED_LEN)),
        Kind::StateBegin => (0, 0, Payload::Exactly(STATE_BEGIN_LEN)),
        Kind::Accept => (COUNT, 0, Payload::Entries(ACCEPT_LEN, MAX_REGIONS)),
        Kind::Missing | Kind::Have => (REGION | COUNT, 0, Payload::Entries(RUN_LEN, MAX_RUNS)),
    }
}

/// Checks everything about a header that needs no region, with payloads of pages of at most
/// `max_payload` bytes.
pub(super) fn check_header(header: &RawHeader, max_payload: u32) -> Result<Kind, ProtocolError> {
    if header.magic.get() != FRAME_MAGIC {
        return Err(ProtocolError::BadMagic { got: header.magic.get() });
    }
    let kind = Kind::from_wire(header.kind).ok_or(ProtocolError::UnknownKind(header.kind))?;
    let (fields, flags, payload) = layout(kind, header.flags);
    for (unused, value, field) in [
        (true, header.reserved.get().into(), "the reserved field"),
        (true, u64::from(header.flags & !flags), "an unknown flag"),
        (fields & REGION == 0, header.region.get().into(), "the region"),
        (fields & FIRST == 0, header.first.get(), "the first granule"),
        (fields & COUNT == 0, header.count.get().into(), "the count"),
        (fields & AUX == 0, header.aux.get(), "the auxiliary field"),
    ] {
        if unused && value != 0 {
            return Err(ProtocolError::NotZero { kind, field });
        }
    }

    let length = header.length.get();
    let expected = match payload {
        Payload::None if length != 0 => "none allowed".into(),
        Payload::Exactly(n) if length as usize != n => format!("exactly {n} needed"),
        Payload::Within(least, most) if !(least..=most).contains(&length) => {
            format!("{least} to {most} allowed")
        }
        Payload::Pages if !(1..=max_payload).contains(&length) => {
            format!("1 to {max_payload} allowed")
        }
        Payload::Entries(each, most) => {
            let count = header.count.get();
            if count > most {
                return Err(too_many(kind, count, most));
            }
            let whole = count * each as u32;
            if length == whole {
                return Ok(kind);
            }
            format!("its {count} entries have {whole}")
        }
        _ => return Ok(kind),
    };
    Err(ProtocolError::PayloadLength { kind, got: u64::from(length), expected })
}

fn too_many(kind: Kind, count: u32, most: u32) -> ProtocolError {
    match kind {
        Kind::Regions => ProtocolError::TooManyRegions(count),
        _ => ProtocolError::Limit {
            what: "entries of a frame",
            wanted: count.into(),
            limit: most.into(),
        },
    }
}
