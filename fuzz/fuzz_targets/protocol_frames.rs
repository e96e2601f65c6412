//! What a peer sends who knows the protocol: frames that are well formed, in any order and with
//! any numbers, of which some bytes may then be changed. Reaches the state machines, to which
//! random bytes hardly ever get.
#![no_main]

mod choices;

use choices::near;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use pageferry_migrate::{
    core::{
        Channel, Counts, DataHeader, Encoder, Features, Frame, Hello, Refusal, RefusalCode,
        RegionInfo, Role, SessionId, Terms, WireSpan,
    },
    fuzz,
};

const PAGE: u64 = 4096;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut choices = Unstructured::new(data);
    let mut bytes = Vec::new();
    while !choices.is_empty() && bytes.len() < 1 << 20 {
        // Out of choices in the middle of a frame: what there is by then is sent.
        if append(&mut choices, &mut bytes).is_err() {
            break;
        }
    }
    fuzz::decode(&bytes);
});

/// One frame, or a change to what was sent before.
fn append(choices: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    let frame = match choices.int_in_range(0..=15_u8)? {
        0 => Frame::Hello(hello(choices)?),
        1 => {
            let count = choices.int_in_range(0..=3)?;
            Frame::Regions((0..count).map(|id| region(choices, id)).collect::<Result<_>>()?)
        }
        2 | 3 => Frame::Request { span: span(choices)?, prefetch: choices.arbitrary()? },
        4 => Frame::Expedite { span: span(choices)? },
        5..=7 => {
            let span = span(choices)?;
            let whole = u64::from(span.count).wrapping_mul(PAGE) as u32;
            let length = if choices.ratio(7, 8)? { whole } else { choices.arbitrary()? };
            let fragment = if choices.ratio(1, 4)? { Some(near(choices, PAGE)?) } else { None };
            let header = DataHeader { span, length, fragment };
            bytes.extend(Encoder::data(&header));
            return choices::payload(choices, length, bytes);
        }
        8 => Frame::Zero { span: span(choices)? },
        9 => Frame::Poison { span: span(choices)? },
        10 => Frame::Complete(counts(choices)?),
        11 => Frame::CompleteAck(counts(choices)?),
        12 => Frame::Error(Refusal::new(
            RefusalCode::Other(choices.arbitrary()?),
            choices.arbitrary()?,
        )),
        13 => Frame::Bye,
        14 => Frame::Ping { nonce: choices.arbitrary()? },
        _ => {
            if !bytes.is_empty() {
                let at = choices.choose_index(bytes.len())?;
                bytes[at] = choices.arbitrary()?;
            }
            return Ok(());
        }
    };
    Encoder::encode(&frame, bytes);
    Ok(())
}

fn span(choices: &mut Unstructured<'_>) -> Result<WireSpan> {
    let region = if choices.ratio(15, 16)? { 0 } else { choices.arbitrary()? };
    Ok(WireSpan { region, first: near(choices, 64)?, count: near(choices, 16)? as u32 })
}

fn counts(choices: &mut Unstructured<'_>) -> Result<Counts> {
    Ok(Counts { filled: near(choices, 64)?, poisoned: near(choices, 64)? })
}

fn hello(choices: &mut Unstructured<'_>) -> Result<Hello> {
    let role = *choices.choose(&[
        Role::Source,
        Role::Destination,
        Role::Reader,
        Role::ImageSender,
        Role::ImageReceiver,
    ])?;
    let channel = *choices.choose(&[Channel::Demand, Channel::Background, Channel::Images])?;
    let session = SessionId(*b"fuzzfuzzfuzzfuzz");
    let mut hello = Terms::default().offer(role, channel, session);
    if choices.ratio(1, 4)? {
        hello.version_min = choices.arbitrary()?;
        hello.version_max = choices.arbitrary()?;
        hello.features = Features(choices.arbitrary()?);
        hello.max_payload = choices.arbitrary()?;
    }
    Ok(hello)
}

fn region(choices: &mut Unstructured<'_>, id: u16) -> Result<RegionInfo> {
    let granule = 1 << choices.int_in_range(11..=31_u8)?;
    Ok(RegionInfo {
        id,
        flags: choices.int_in_range(0..=2)?,
        guest_base: near(choices, u64::from(id) << 32)?,
        length: near(choices, 64)?.wrapping_mul(granule),
        granule,
        page_size: if choices.ratio(3, 4)? { PAGE } else { choices.arbitrary()? },
    })
}
