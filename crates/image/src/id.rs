//! What tells one image from another, and its bytes from altered ones.

use std::fmt;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The identity of an image: 16 random bytes, chosen when it is begun. All zero is no identity.
#[derive(
    Copy,
    Clone,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct ImageId([u8; 16]);

impl ImageId {
    /// The identity with these bytes; `None` if they are all zero.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Option<Self> {
        if u128::from_ne_bytes(bytes) == 0 { None } else { Some(Self(bytes)) }
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }

    /// A new one, from the kernel's random numbers; see getrandom(2).
    ///
    /// # Errors
    /// The kernel has no getrandom(2).
    pub fn random() -> Result<Self, Errno> {
        loop {
            let mut bytes = [0; 16];
            // So few bytes come whole or not at all.
            rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
            if let Some(id) = Self::new(bytes) {
                return Ok(id);
            }
        }
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageId({self})")
    }
}

/// A BLAKE3 digest of 32 bytes.
#[derive(
    Copy, Clone, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest that has these bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> [u8; 32] {
        self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities() {
        assert_eq!(ImageId::new([0; 16]), None);
        let id = ImageId::new(*b"0123456789abcdef").unwrap();
        assert_eq!(id.to_string(), "30313233343536373839616263646566");
        assert_ne!(ImageId::random().unwrap(), ImageId::random().unwrap());
    }

    #[test]
    fn digest_is_blake3() {
        // The first test vector published with BLAKE3: no input.
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(Digest::of(&[]).to_string(), empty);
    }
}
