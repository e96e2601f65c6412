//! The bytes of a device's state: its version, then what serde makes of it.

use serde::{Serialize, de::DeserializeOwned};

use super::LinuxError;

/// More than any device's state is long.
const LONGEST: usize = 1 << 20;

pub(crate) fn encode<T: Serialize>(version: u16, state: &T) -> Vec<u8> {
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend(postcard::to_stdvec(state).expect("plain data, which any format can hold"));
    bytes
}

/// What [`encode`] was given. It refuses another version, an end that comes too early, and bytes
/// beyond the end; what the values mean is the caller's to check.
pub(crate) fn decode<T: DeserializeOwned>(
    device: &'static str,
    version: u16,
    bytes: &[u8],
) -> Result<T, LinuxError> {
    if bytes.len() > LONGEST {
        return Err(LinuxError::state(device, format!("{} bytes", bytes.len())));
    }
    let Some((found, rest)) = bytes.split_first_chunk() else {
        return Err(LinuxError::state(device, "shorter than its version"));
    };
    let found = u16::from_le_bytes(*found);
    if found != version {
        let why = format!("version {found}, and only {version} is known");
        return Err(LinuxError::state(device, why));
    }
    let (state, rest) = postcard::take_from_bytes(rest)
        .map_err(|error| LinuxError::state(device, error.to_string()))?;
    if !rest.is_empty() {
        return Err(LinuxError::state(device, format!("{} bytes too many", rest.len())));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_encoded() {
        let state = (7_u32, vec![1_u8, 2, 3]);
        let bytes = encode(3, &state);
        let decode = |version, bytes: &[u8]| decode::<(u32, Vec<u8>)>("it", version, bytes);
        assert_eq!(decode(3, &bytes).unwrap(), state);
        for cut in 0..bytes.len() {
            assert!(decode(3, &bytes[..cut]).is_err(), "{cut} of {} bytes", bytes.len());
        }
        assert!(decode(3, &[&bytes[..], &[0]].concat()).is_err());
        assert_eq!(
            decode(2, &bytes).unwrap_err().to_string(),
            "state of it: version 3, and only 2 is known"
        );
        // A length that no such state has is refused before anything is allocated for it.
        assert!(decode(3, &[3, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]).is_err());
    }
}
