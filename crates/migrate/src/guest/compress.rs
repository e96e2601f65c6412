//! Compression on the wire: the codecs, and when one pays.

use std::time::Duration;

use crate::{MigrateError, core::Codec};

/// How pages are compressed.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Compression {
    /// lz4 while it makes the link faster: what compressing costs and saves is measured, again and
    /// again.
    #[default]
    Auto,
    /// Never.
    None,
    /// lz4, always.
    Lz4,
    /// zstd of level 1, always.
    Zstd,
}

const ZSTD_LEVEL: i32 = 1;
/// Less than one part in so many saved is not worth the unpacking.
const WORTH: usize = 16;

/// Packs `bytes` with `codec` (lz4 or zstd) onto the end of `out`; false, with `out` as it was, if
/// that does not make them much smaller.
pub(crate) fn pack(codec: Codec, bytes: &[u8], out: &mut Vec<u8>) -> bool {
    let begin = out.len();
    let room = match codec {
        Codec::Zstd => zstd::zstd_safe::compress_bound(bytes.len()),
        _ => lz4_flex::block::get_maximum_output_size(bytes.len()),
    };
    out.resize(begin + room, 0);
    let place = &mut out[begin..];
    let packed = match codec {
        Codec::Zstd => zstd::bulk::compress_to_buffer(bytes, place, ZSTD_LEVEL).ok(),
        _ => lz4_flex::block::compress_into(bytes, place).ok(),
    };
    // An error would be one of too little room, which has been made.
    match packed {
        Some(length) if length <= bytes.len() - bytes.len() / WORTH => {
            out.truncate(begin + length);
            true
        }
        _ => {
            out.truncate(begin);
            false
        }
    }
}

/// Unpacks `packed` into `place`, which it must fill exactly. For a delta `place` holds what it is
/// of.
pub(crate) fn unpack(codec: Codec, packed: &[u8], place: &mut [u8]) -> Result<(), MigrateError> {
    let bad = |why: String| Err(MigrateError::Packed(why));
    let exactly = |got: usize, place: &[u8]| match got {
        n if n == place.len() => Ok(()),
        n => Err(MigrateError::Packed(format!("{n} bytes unpacked where {} belong", place.len()))),
    };
    match codec {
        Codec::Lz4 => match lz4_flex::block::decompress_into(packed, place) {
            Ok(length) => exactly(length, place),
            Err(error) => bad(error.to_string()),
        },
        Codec::Zstd => match zstd::bulk::decompress_to_buffer(packed, place) {
            Ok(length) => exactly(length, place),
            Err(error) => bad(error.to_string()),
        },
        Codec::Delta => super::delta::apply(packed, place).or_else(|error| bad(error.to_string())),
        Codec::DeltaLz4 => {
            // A delta that is longer than the pages themselves is never sent.
            let mut delta = vec![0; place.len()];
            match lz4_flex::block::decompress_into(packed, &mut delta) {
                Ok(length) => super::delta::apply(&delta[..length], place)
                    .or_else(|error| bad(error.to_string())),
                Err(error) => bad(error.to_string()),
            }
        }
    }
}

/// Decides, for one connection, whether compressing pays: one sample in [`EVERY`] is compressed
/// and timed, and compared with what sending takes.
#[derive(Debug)]
pub(crate) struct Chooser {
    wanted: Compression,
    /// Nanoseconds to send a byte, while the link takes them.
    sending: Average,
    /// Nanoseconds to compress a byte.
    packing: Average,
    /// Bytes that are left of one.
    ratio: Average,
    pieces: u32,
}

/// A moving average.
#[derive(Copy, Clone, Debug, Default)]
struct Average(Option<f64>);

impl Average {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |old| old * 0.75 + value * 0.25));
    }
}

/// One piece in so many is compressed to see what that would give.
const EVERY: u32 = 32;

impl Chooser {
    pub(crate) fn new(wanted: Compression) -> Self {
        Self {
            wanted,
            sending: Average::default(),
            packing: Average::default(),
            ratio: Average::default(),
            pieces: 0,
        }
    }

    /// Whether, and with what, the next piece is to be compressed.
    pub(crate) fn next(&mut self) -> Option<Codec> {
        self.pieces = self.pieces.wrapping_add(1);
        match self.wanted {
            Compression::None => None,
            Compression::Lz4 => Some(Codec::Lz4),
            Compression::Zstd => Some(Codec::Zstd),
            Compression::Auto => (self.pays() || self.pieces % EVERY == 1).then_some(Codec::Lz4),
        }
    }

    /// Whether compressing and sending what is left takes less than sending all.
    fn pays(&self) -> bool {
        match (self.sending.0, self.packing.0, self.ratio.0) {
            (Some(sending), Some(packing), Some(ratio)) => packing + ratio * sending < sending,
            _ => false,
        }
    }

    /// So many bytes were compressed to so many, in this time.
    pub(crate) fn packed(&mut self, bytes: usize, to: usize, took: Duration) {
        if bytes > 0 {
            self.packing.add(took.as_nanos() as f64 / bytes as f64);
            self.ratio.add(to as f64 / bytes as f64);
        }
    }

    /// So many bytes were sent in this time, waiting included.
    pub(crate) fn sent(&mut self, bytes: usize, took: Duration) {
        // Of small sends most is overhead.
        if bytes >= 64 << 10 {
            self.sending.add(took.as_nanos() as f64 / bytes as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn unpacked_it_is_what_it_was(seed in any::<u8>(), length in 1_usize..20_000) {
            let bytes: Vec<u8> = (0..length).map(|n| seed.wrapping_add((n / 50) as u8)).collect();
            for codec in [Codec::Lz4, Codec::Zstd] {
                let mut out = vec![1, 2];
                if pack(codec, &bytes, &mut out) {
                    prop_assert!(out.len() - 2 < bytes.len());
                    let mut back = vec![0; length];
                    unpack(codec, &out[2..], &mut back).unwrap();
                    prop_assert!(back == bytes);
                    // Neither more room nor less is taken for granted.
                    prop_assert!(unpack(codec, &out[2..], &mut vec![0; length + 1]).is_err());
                    prop_assert!(unpack(codec, &out[2..], &mut vec![0; length - 1]).is_err());
                } else {
                    prop_assert_eq!(&out, &[1, 2]);
                }
            }
        }

        #[test]
        fn anything_may_come(packed in prop::collection::vec(any::<u8>(), 0..200)) {
            for codec in [Codec::Lz4, Codec::Zstd, Codec::Delta, Codec::DeltaLz4] {
                let _ = unpack(codec, &packed, &mut [0; 256]);
            }
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_left() {
        let mut random = pageferry_testing::Random::new(1);
        let bytes: Vec<u8> = (0..4096).map(|_| random.next() as u8).collect();
        let mut out = Vec::new();
        assert!(!pack(Codec::Lz4, &bytes, &mut out) && !pack(Codec::Zstd, &bytes, &mut out));
        assert!(out.is_empty());
    }

    #[test]
    fn a_slow_link_is_compressed_for_and_a_fast_one_is_not() {
        let second = Duration::from_secs(1);
        for (link, pays) in [(50_000_000, true), (5_000_000_000, false)] {
            let mut chooser = Chooser::new(Compression::Auto);
            let mut compressed = 0;
            for _ in 0..640 {
                if chooser.next().is_some() {
                    compressed += 1;
                    chooser.packed(500_000_000, 200_000_000, second);
                }
                chooser.sent(link, second);
            }
            let most = 640 / EVERY as usize + 1;
            assert_eq!(compressed > most, pays, "{link}: {compressed} of 640");
        }
    }

    #[test]
    fn what_was_asked_for_is_not_decided() {
        assert_eq!(Chooser::new(Compression::None).next(), None);
        assert_eq!(Chooser::new(Compression::Lz4).next(), Some(Codec::Lz4));
        assert_eq!(Chooser::new(Compression::Zstd).next(), Some(Codec::Zstd));
    }
}
