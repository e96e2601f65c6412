//! The sending end of a connection.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::{Piece, Stream};
use crate::{
    MigrateError,
    core::{Encoder, Frame, Refusal, RefusalCode},
    peer::lock,
};

/// How long a refused peer has to fetch the refusal.
const LINGER: Duration = Duration::from_millis(200);

/// The sending end of a connection: whole frames, one after the other.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: Arc<Stream>,
    write: Mutex<()>,
}

impl Wire {
    pub(crate) fn new(stream: Arc<Stream>) -> Self {
        Self { stream, write: Mutex::new(()) }
    }

    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Sends frames with their payloads, using `pieces` up.
    pub(crate) fn send(&self, pieces: &mut [Piece<'_>]) -> Result<(), MigrateError> {
        let _writing = lock(&self.write);
        self.stream
            .send_pieces(pieces)
            .map_err(|error| MigrateError::Io { what: "sending answers", error })
    }

    /// As [`send`](Self::send), but a peer that takes nothing for a while is waited for, as long
    /// as `stalled`, which is told for how long it has not, wants to.
    pub(crate) fn send_patiently(
        &self,
        pieces: &mut [Piece<'_>],
        stalled: &mut dyn FnMut(Duration) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        let left = |pieces: &[Piece<'_>]| pieces.iter().map(Piece::len).sum::<usize>();
        let _writing = lock(&self.write);
        let (mut before, mut since) = (left(pieces), Instant::now());
        loop {
            match self.stream.send_pieces(pieces) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    let now = left(pieces);
                    if now < before {
                        (before, since) = (now, Instant::now());
                    }
                    stalled(since.elapsed())?;
                }
                Err(error) => return Err(MigrateError::Io { what: "sending", error }),
            }
        }
    }

    /// Sends a small frame if nobody is sending and there is room for it; tells whether.
    pub(crate) fn try_send_frame(&self, bytes: &[u8]) -> bool {
        self.write
            .try_lock()
            .is_ok_and(|_writing| self.stream.has_room() && self.stream.send(bytes).is_ok())
    }

    pub(crate) fn send_frame(&self, bytes: &[u8]) -> Result<(), MigrateError> {
        self.send(&mut [Piece::from(bytes)])
    }

    /// Says why it is over, if that can be done at once; tells whether it could.
    pub(crate) fn send_last(&self, code: RefusalCode, text: &str) -> bool {
        let mut frame = Vec::new();
        Encoder::encode(&Frame::Error(Refusal::new(code, text)), &mut frame);
        self.send_last_frames(&frame)
    }

    /// Sends frames after which the connection is ended, if that can be done at once; tells
    /// whether it could.
    pub(crate) fn send_last_frames(&self, frames: &[u8]) -> bool {
        // In the middle of somebody's frame they would only be taken for payload.
        self.write.try_lock().is_ok_and(|_writing| self.stream.send_last(frames).is_ok())
    }

    /// Says why it is over; tells whether it could. The connection is still to be ended.
    pub(crate) fn send_error(&self, code: RefusalCode, text: &str) -> bool {
        let mut frame = Vec::new();
        Encoder::encode(&Frame::Error(Refusal::new(code, text)), &mut frame);
        self.send_frame(&frame).is_ok()
    }

    /// Ends the connection such that the peer can read what was sent to it last.
    pub(crate) fn linger(&self) {
        self.stream.linger(LINGER);
        self.stream.shutdown();
    }

    /// Says why it is over, makes sure that it can be read, and ends the connection. Takes no
    /// longer than a stuck write does.
    pub(crate) fn refuse(&self, code: RefusalCode, text: &str) {
        if self.send_error(code, text) {
            self.linger();
        } else {
            self.stream.shutdown();
        }
    }
}
