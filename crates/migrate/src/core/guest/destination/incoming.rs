//! A device state, as it comes.

use crate::core::{ProtocolError, StateInfo};

/// What has come of it.
#[derive(Clone, Debug)]
pub(super) struct Incoming {
    pub(super) info: StateInfo,
    pub(super) hasher: blake3::Hasher,
    pub(super) bytes: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(info: StateInfo, limit: u64) -> Result<Self, ProtocolError> {
        if info.length > limit {
            let what = "bytes of a device state";
            return Err(ProtocolError::Limit { what, wanted: info.length, limit });
        }
        Ok(Self { info, hasher: blake3::Hasher::new(), bytes: Vec::new() })
    }

    /// Whether all of it has come, and is what was announced. True for ever once it is.
    pub(super) fn complete(&self) -> Result<(), ProtocolError> {
        if self.hasher.count() != self.info.length {
            Err(ProtocolError::BadState("not all of it has come"))
        } else if *self.hasher.finalize().as_bytes() != self.info.digest {
            Err(ProtocolError::BadState("what came is not what was sent"))
        } else {
            Ok(())
        }
    }
}
