//! Frames from a stream, and payloads straight from it to where they belong.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Place, Stop, Stream, Woken};
use crate::{
    MigrateError,
    core::{Decoder, Frame, HEADER_LEN, Item, ProtocolError},
};

/// Read-ahead: a header and the smallest granule's bytes, so that the answer to a demand for one
/// small page takes one system call. A copy of so few bytes costs less than a second call; of a
/// long payload all the rest goes straight to its place.
const READ_AHEAD: usize = HEADER_LEN + 4096;

/// What to do when nothing has come for this long; an error ends the read.
pub(crate) type Idle<'a> = dyn FnMut(Duration) -> Result<(), MigrateError> + 'a;

/// The receiving end of a connection.
#[derive(Debug)]
pub(crate) struct FrameReader {
    stream: Arc<Stream>,
    decoder: Decoder,
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    /// The stream's read timeout, which is the unit in which silence is measured.
    tick: Duration,
    silent: Duration,
    deadline: Option<(Instant, Duration)>,
    stop: Option<Stop>,
}

impl FrameReader {
    /// Reads from `stream`, whose read timeout is `tick`.
    pub(crate) fn new(stream: Arc<Stream>, max_payload: u32, tick: Duration) -> Self {
        Self {
            stream,
            decoder: Decoder::new(max_payload),
            ahead: vec![0; READ_AHEAD].into_boxed_slice(),
            start: 0,
            end: 0,
            tick,
            silent: Duration::ZERO,
            deadline: None,
            stop: None,
        }
    }

    /// Ends every read with [`MigrateError::Stopped`] once `stop` is called for.
    pub(crate) fn set_stop(&mut self, stop: Stop) {
        self.stop = Some(stop);
    }

    /// Reads ahead up to `bytes`: for many small payloads, all of which are wanted.
    pub(crate) fn with_read_ahead(mut self, bytes: usize) -> Self {
        self.ahead = vec![0; bytes].into_boxed_slice();
        self
    }

    /// Everything must have come within `limit` from now, however lively the peer; `None` lifts
    /// that again.
    pub(crate) fn set_deadline(&mut self, limit: Option<Duration>) {
        self.deadline = limit.map(|limit| (Instant::now() + limit, limit));
    }

    pub(crate) fn set_max_payload(&mut self, max_payload: u32) {
        self.decoder.set_max_payload(max_payload);
    }

    /// Changes the stream's read timeout.
    pub(crate) fn set_tick(&mut self, tick: Duration) -> Result<(), MigrateError> {
        self.tick = tick;
        self.stream
            .set_read_timeout(tick)
            .map_err(|error| MigrateError::Io { what: "setting a read timeout", error })
    }

    /// Whether a frame without payload has been read and not yet been looked at.
    pub(crate) fn has_frame(&self) -> bool {
        self.end - self.start >= HEADER_LEN
    }

    /// Bytes of the current data payload still to come.
    pub(crate) fn payload_remaining(&self) -> usize {
        self.decoder.payload_remaining() as usize
    }

    /// The next frame. The payload of the last one must have been read.
    pub(crate) fn next(&mut self, idle: &mut Idle<'_>) -> Result<Frame, MigrateError> {
        assert_eq!(self.decoder.payload_remaining(), 0, "a payload has not been read");
        loop {
            let (taken, item) = self.decoder.feed(&self.ahead[self.start..self.end])?;
            self.start += taken;
            match item {
                Some(Item::Frame(frame)) => return Ok(frame),
                Some(Item::Payload(_)) => unreachable!("no payload was due"),
                None => {}
            }
            self.read(Place::Bytes(&mut []), idle)?;
        }
    }

    /// Fills `place` from the current data payload, which must have that many bytes left.
    pub(crate) fn payload(
        &mut self,
        place: &mut [u8],
        idle: &mut Idle<'_>,
    ) -> Result<(), MigrateError> {
        self.payload_to(Place::Bytes(place), idle)
    }

    /// As [`payload`](Self::payload), wherever it belongs.
    pub(crate) fn payload_to(
        &mut self,
        mut place: Place<'_>,
        idle: &mut Idle<'_>,
    ) -> Result<(), MigrateError> {
        let mut done = 0;
        while done < place.len() {
            let buffered = &self.ahead[self.start..self.end];
            let mut rest = place.rest(done);
            let n = if buffered.is_empty() {
                self.read(rest, idle)?
            } else {
                let n = buffered.len().min(rest.len());
                rest.put(&buffered[..n]);
                self.start += n;
                n
            };
            self.decoder.payload_taken(n as u32);
            done += n;
        }
        Ok(())
    }

    /// One read into `place` and then into the empty read-ahead; returns how much of `place`
    /// was filled.
    fn read(&mut self, mut place: Place<'_>, idle: &mut Idle<'_>) -> Result<usize, MigrateError> {
        debug_assert_eq!(self.start, self.end);
        loop {
            if let Some((until, after)) = self.deadline
                && Instant::now() >= until
            {
                return Err(MigrateError::TimedOut { what: "the handshake", after });
            }
            let wanted = place.len();
            let read = match self.wait() {
                Ok(Woken::Ready) => self.stream.read(place.rest(0), &mut self.ahead),
                Ok(Woken::TimedOut) => Ok(None),
                Ok(Woken::Stopped) => return Err(MigrateError::Stopped),
                Err(error) => Err(error),
            };
            match read {
                Ok(Some(0)) if self.decoder.at_boundary() => return Err(MigrateError::Closed),
                Ok(Some(0)) => {
                    return Err(ProtocolError::Truncated("in the middle of a frame").into());
                }
                Ok(Some(n)) => {
                    self.silent = Duration::ZERO;
                    let filled = n.min(wanted);
                    (self.start, self.end) = (0, n - filled);
                    return Ok(filled);
                }
                Ok(None) => {
                    self.silent += self.tick;
                    idle(self.silent)?;
                }
                Err(error) => return Err(MigrateError::Io { what: "receiving", error }),
            }
        }
    }

    /// Waits for something to read, if there is a stop to look at; otherwise the read waits.
    fn wait(&self) -> io::Result<Woken> {
        match &self.stop {
            Some(stop) => self.stream.wait_readable(stop, self.tick),
            None => Ok(Woken::Ready),
        }
    }
}
