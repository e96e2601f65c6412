//! What targets that build frames choose alike.

use libfuzzer_sys::arbitrary::{Result, Unstructured};

/// More than one frame of payload is never accepted.
pub const MOST_PAYLOAD: u32 = 128 << 10;

/// A number at and around the interesting ones, or any.
pub fn near(choices: &mut Unstructured<'_>, edge: u64) -> Result<u64> {
    Ok(match choices.int_in_range(0..=3_u8)? {
        0 => choices.int_in_range(0..=8)?,
        1 => edge.wrapping_sub(2).wrapping_add(choices.int_in_range(0..=4)?),
        2 => choices.int_in_range(0..=edge)?,
        _ => choices.arbitrary()?,
    })
}

/// Appends a payload: usually as long as was said.
pub fn payload(choices: &mut Unstructured<'_>, length: u32, bytes: &mut Vec<u8>) -> Result<()> {
    let sent = if choices.ratio(15, 16)? { length } else { choices.arbitrary()? };
    let filling = choices.arbitrary()?;
    bytes.resize(bytes.len() + sent.min(MOST_PAYLOAD) as usize, filling);
    Ok(())
}
