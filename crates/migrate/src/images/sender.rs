//! Sends images, each as it is made.

use std::{
    io,
    sync::{Arc, MutexGuard},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    ImageDescription, ImageStreamError,
    answers::{Shared, State, listen},
    unsent::Unsent,
};
use crate::{
    Endpoint, MigrateError, Stop,
    core::{
        DEFAULT_MAX_PAYLOAD, DataHeader, Encoder, Frame, ImageCounts, ImageId, ImageSenderSession,
        ImageTotals, MAX_CHUNK, Phase, ProtocolError, RefusalCode, Terms, WireSpan,
    },
    net::{FrameReader, Piece, Stream, Timeouts, Wire},
    peer::{lock, new_session},
};

/// Frames are collected up to this many bytes, payloads included.
const BUFFER: usize = 256 << 10;
/// Payloads from this size on are sent from where they lie. A copy of fewer bytes costs less than
/// a system call.
const IN_PLACE: usize = 64 << 10;
/// For the listening thread to find out why nothing can be sent any more.
const VERDICT: Duration = Duration::from_secs(1);

/// How patient a sender is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SenderOptions {
    /// For a connection and its handshake.
    pub connect_timeout: Duration,
    /// After this long without a byte, the receiver is asked whether it is there.
    pub keepalive: Duration,
    /// After this long without a byte, the receiver counts as gone.
    pub idle_timeout: Duration,
    /// For a receiver that is there, but neither takes a byte nor says that an image is stored.
    pub store_timeout: Duration,
    /// For the agreement on the counts.
    pub complete_timeout: Duration,
    /// Largest payload of one frame, in bytes; the receiver may ask for less.
    pub max_payload: u32,
    /// Ends everything when it is called for: what is being done fails with
    /// [`MigrateError::Stopped`].
    pub stop: Option<Stop>,
}

impl Default for SenderOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(30),
            store_timeout: Duration::from_secs(600),
            complete_timeout: Duration::from_secs(30),
            max_payload: DEFAULT_MAX_PAYLOAD,
            stop: None,
        }
    }
}

impl SenderOptions {
    /// The unit in which silence is measured.
    fn tick(&self) -> Duration {
        self.keepalive.min(self.idle_timeout).max(Duration::from_millis(1))
    }

    /// How often a sender that waits looks up.
    fn look_up(&self) -> Duration {
        self.tick().min(self.store_timeout).clamp(Duration::from_millis(1), Duration::from_secs(1))
    }
}

/// A connection to a receiver of images.
///
/// An image is [begun](Self::begin), its pages are sent by ascending address, and it is
/// [finished](Self::finish): then it is stored. Pages are sent in large writes; what has been
/// sent may still lie in a buffer of a few hundred KiB until the image is finished, or
/// [`flush`](Self::flush) is called.
///
/// A call that is refused because of its arguments changes nothing, and sends nothing. After any
/// other error the connection is of no use, and every call fails with the same error. Dropped
/// without [`close`](Self::close), it gives up the image begun.
#[derive(Debug)]
pub struct ImageSender {
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
    unsent: Unsent,
    max_payload: u32,
    /// Of the image begun.
    page_size: u64,
}

impl ImageSender {
    /// Connects to a receiver and shakes hands.
    ///
    /// # Errors
    /// [`MigrateError::Connect`], [`MigrateError::TimedOut`], [`MigrateError::Stopped`];
    /// [`MigrateError::Protocol`] if the receiver is none, is too old to know of images, or
    /// serves somebody else.
    pub fn connect(endpoint: &Endpoint, options: SenderOptions) -> Result<Self, MigrateError> {
        let handshake_tick = options.tick().min(options.connect_timeout / 4);
        let timeouts = Timeouts { read: handshake_tick, write: options.look_up() };
        let limit = options.connect_timeout;
        let stream =
            Stream::connect(endpoint, limit, timeouts, options.stop.as_ref()).map_err(|error| {
                match error.kind() {
                    io::ErrorKind::Interrupted => MigrateError::Stopped,
                    _ => MigrateError::Connect { endpoint: endpoint.clone(), error },
                }
            })?;
        let stream = Arc::new(stream);
        let terms = Terms { max_payload: options.max_payload, ..Terms::default() };
        let mut session = ImageSenderSession::new(terms, new_session()?);
        let mut hello = Vec::new();
        Encoder::encode(&Frame::Hello(session.offer()), &mut hello);
        let wire = Wire::new(Arc::clone(&stream));
        wire.send_frame(&hello)?;
        let mut reader = FrameReader::new(stream, options.max_payload, handshake_tick);
        if let Some(stop) = &options.stop {
            reader.set_stop(stop.clone());
        }
        reader.set_deadline(Some(options.connect_timeout));
        while session.phase() == Phase::Greeting {
            let frame = reader.next(&mut |_| Ok(()))?;
            session.receive(&frame)?;
        }
        reader.set_deadline(None);
        reader.set_tick(options.tick())?;
        let max_payload = session.agreed().map_or(terms.max_payload, |agreed| agreed.max_payload);
        let shared = Arc::new(Shared::new(wire, options, session));
        let listening = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("pf-answers".into())
                .spawn(move || listen(&shared, reader))
                .map_err(|error| MigrateError::Io { what: "starting a thread", error })?
        };
        Ok(Self {
            shared,
            listening: Some(listening),
            unsent: Unsent::default(),
            max_payload,
            page_size: 1,
        })
    }

    /// Begins an image.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] if one has begun, [`ProtocolError::BadImage`] if this one
    /// cannot be; and if the connection has failed.
    pub fn begin(&mut self, image: &ImageDescription) -> Result<(), ImageStreamError> {
        let begin = image.begin().map_err(|error| self.misuse(error))?;
        self.frame(&Frame::ImageBegin(begin))?;
        self.page_size = begin.page_size;
        let chunks = |bytes: &[u8]| -> Vec<(u64, Vec<u8>)> {
            let size = MAX_CHUNK as usize;
            bytes.chunks(size).zip(0..).map(|(c, n)| (n * size as u64, c.to_vec())).collect()
        };
        for (offset, bytes) in chunks(&image.metadata) {
            self.frame(&Frame::ImageMetadata { offset, bytes })?;
        }
        for (offset, bytes) in chunks(&image.mappings) {
            self.frame(&Frame::ImageMappings { offset, bytes })?;
        }
        Ok(())
    }

    /// Sends the bytes of pages from `address` on, a whole number of them, above all that was said
    /// of the image before.
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] and [`ProtocolError`]s if they cannot be in the image now; and if
    /// the connection has failed.
    pub fn pages(&mut self, address: u64, bytes: &[u8]) -> Result<(), ImageStreamError> {
        let mut first = self.page(address)?;
        if !(bytes.len() as u64).is_multiple_of(self.page_size) {
            return Err(self.misuse(MigrateError::Misuse("not a whole number of pages")));
        }
        // A page fits into a frame: the image has been checked for that.
        let page_size = self.page_size as usize;
        let most = (self.max_payload as usize / page_size).max(1) * page_size;
        for payload in bytes.chunks(most) {
            let count = (payload.len() / page_size) as u32;
            let span = WireSpan { region: 0, first, count };
            let data = DataHeader { span, length: payload.len() as u32, fragment: None };
            {
                let mut state = self.state()?;
                let noted = state.session.send(&Frame::Data(data));
                noted.map_err(|error| failed(&state, Arc::new(error.into())))?;
            }
            self.unsent.frames.extend_from_slice(&Encoder::data(&data));
            if payload.len() < IN_PLACE {
                self.unsent.add_payload(payload);
                self.flush_if_full()?;
            } else {
                self.send(payload)?;
            }
            first += u64::from(count);
        }
        Ok(())
    }

    /// Says that `count` pages from `address` on are all zero.
    ///
    /// # Errors
    /// As [`pages`](Self::pages).
    pub fn zero(&mut self, address: u64, count: u64) -> Result<(), ImageStreamError> {
        self.spans(address, count, |span| Frame::Zero { span })
    }

    /// Says that `count` pages from `address` on could not be read.
    ///
    /// # Errors
    /// As [`pages`](Self::pages).
    pub fn poisoned(&mut self, address: u64, count: u64) -> Result<(), ImageStreamError> {
        self.spans(address, count, |span| Frame::Poison { span })
    }

    /// Says that `count` pages from `address` on are no longer memory, whatever the image's
    /// ancestors say.
    ///
    /// # Errors
    /// As [`pages`](Self::pages).
    pub fn gone(&mut self, address: u64, count: u64) -> Result<(), ImageStreamError> {
        self.spans(address, count, |span| Frame::Gone { span })
    }

    /// Ends the image, and waits until the receiver has stored it for good. Returns how many pages
    /// it has, on which both sides agree.
    ///
    /// # Errors
    /// [`ProtocolError::Refused`] with the receiver's reason if it could not store the image;
    /// and as [`pages`](Self::pages).
    pub fn finish(&mut self) -> Result<ImageCounts, ImageStreamError> {
        self.unsent.digest(&mut lock(&self.shared.state).session);
        let end = {
            let mut state = self.state()?;
            let Some(end) = state.session.end() else {
                return Err(failed(&state, Arc::new(MigrateError::Misuse("no image has begun"))));
            };
            let noted = state.session.send(&Frame::ImageEnd(end));
            noted.map_err(|error| failed(&state, Arc::new(error.into())))?;
            state.ended = true;
            end
        };
        Encoder::encode(&Frame::ImageEnd(end), &mut self.unsent.frames);
        self.flush()?;
        let limit = self.shared.options.store_timeout;
        self.wait_for(Phase::Active, limit, "storing the image")?;
        Ok(end.counts)
    }

    /// Gives up the image begun, for `reason`, which the receiver is told. Another one may be
    /// begun.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] if none has begun; and if the connection has failed.
    pub fn abort(&mut self, reason: &str) -> Result<(), ImageStreamError> {
        self.frame(&Frame::abort(reason))?;
        self.flush()
    }

    /// Sends what is in the buffer.
    ///
    /// # Errors
    /// If the connection has failed.
    pub fn flush(&mut self) -> Result<(), ImageStreamError> {
        drop(self.state()?);
        self.send(&[])
    }

    /// Leaves, once both sides have [agreed](Self::complete) on the images.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn close(mut self) -> Result<ImageTotals, ImageStreamError> {
        self.complete()
    }

    /// No image follows: both sides agree on how many there were. Returns that. What is left to do
    /// is to drop the sender, which ends the connection.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] if an image has begun, [`ProtocolError::ImagesMismatch`] if
    /// the receiver counted otherwise; and if the connection has failed. What is stored stays.
    pub fn complete(&mut self) -> Result<ImageTotals, ImageStreamError> {
        let totals = self.state()?.session.totals();
        self.frame(&Frame::Complete(totals.into()))?;
        self.flush()?;
        let limit = self.shared.options.complete_timeout;
        self.wait_for(Phase::Completed, limit, "the agreement on the images")?;
        Ok(totals)
    }

    /// Pages sent of the image begun.
    #[must_use]
    pub fn counts(&self) -> ImageCounts {
        lock(&self.shared.state).session.counts()
    }

    /// The last image that the receiver has stored.
    #[must_use]
    pub fn last_stored(&self) -> Option<ImageId> {
        lock(&self.shared.state).session.last_stored()
    }

    /// What is shared with the listening thread, if the connection has not failed.
    fn state(&self) -> Result<MutexGuard<'_, State>, ImageStreamError> {
        let state = lock(&self.shared.state);
        match &state.failure {
            Some(error) => Err(failed(&state, Arc::clone(error))),
            None => Ok(state),
        }
    }

    fn misuse(&self, error: MigrateError) -> ImageStreamError {
        failed(&lock(&self.shared.state), Arc::new(error))
    }

    fn page(&self, address: u64) -> Result<u64, ImageStreamError> {
        if address.is_multiple_of(self.page_size) {
            Ok(address / self.page_size)
        } else {
            Err(self.misuse(MigrateError::Misuse("an address within a page")))
        }
    }

    fn spans(
        &mut self,
        address: u64,
        count: u64,
        frame: impl Fn(WireSpan) -> Frame,
    ) -> Result<(), ImageStreamError> {
        let mut first = self.page(address)?;
        let mut left = count;
        loop {
            let count = u32::try_from(left).unwrap_or(u32::MAX);
            self.frame(&frame(WireSpan { region: 0, first, count }))?;
            left -= u64::from(count);
            if left == 0 {
                return Ok(());
            }
            first = first.saturating_add(count.into());
        }
    }

    /// Notes a frame, and puts it into the buffer.
    fn frame(&mut self, frame: &Frame) -> Result<(), ImageStreamError> {
        {
            let mut state = self.state()?;
            let noted = state.session.send(frame);
            noted.map_err(|error| failed(&state, Arc::new(error.into())))?;
        }
        Encoder::encode(frame, &mut self.unsent.frames);
        self.flush_if_full()
    }

    fn flush_if_full(&mut self) -> Result<(), ImageStreamError> {
        if self.unsent.len() >= BUFFER { self.send(&[]) } else { Ok(()) }
    }

    /// Sends what has not been sent, and `payload`, the last frame's, after it.
    fn send(&mut self, payload: &[u8]) -> Result<(), ImageStreamError> {
        let Self { shared, unsent, .. } = self;
        {
            let mut state = lock(&shared.state);
            unsent.digest(&mut state.session);
            state.session.payload(payload);
        }
        let mut pieces = unsent.pieces();
        pieces.push(Piece::from(payload));
        let after = shared.options.store_timeout;
        let sent = shared.wire.send_patiently(&mut pieces, &mut |stalled| {
            // The listening thread finds out whether there still is a receiver.
            if lock(&shared.state).failure.is_some() {
                Err(MigrateError::Stopped)
            } else if stalled >= after {
                Err(MigrateError::TimedOut { what: "sending pages", after })
            } else {
                Ok(())
            }
        });
        unsent.clear();
        shared.pay();
        sent.map_err(|error| self.fail(error))
    }

    /// Waits until the receiver has brought the session to `phase`.
    fn wait_for(
        &self,
        phase: Phase,
        limit: Duration,
        what: &'static str,
    ) -> Result<(), ImageStreamError> {
        let until = Instant::now() + limit;
        let mut state = self.state()?;
        loop {
            if state.session.phase() == phase {
                return Ok(());
            }
            if let Some(error) = &state.failure {
                return Err(failed(&state, Arc::clone(error)));
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                drop(state);
                return Err(self.fail(MigrateError::TimedOut { what, after: limit }));
            };
            state = self.shared.wait(state, left);
        }
    }

    /// The connection has failed on this side. What the receiver says, or that it has gone, is the
    /// better reason where both are known.
    fn fail(&self, error: MigrateError) -> ImageStreamError {
        let until = Instant::now() + VERDICT;
        let mut state = lock(&self.shared.state);
        if matches!(error, MigrateError::Io { .. }) {
            while state.failure.is_none()
                && !state.over
                && let Some(left) = until.checked_duration_since(Instant::now())
            {
                state = self.shared.wait(state, left);
            }
        }
        let error = Arc::clone(state.failure.get_or_insert_with(|| Arc::new(error)));
        let failed = failed(&state, error);
        drop(state);
        self.shared.wire.stream().shutdown();
        failed
    }
}

/// What an error means for the images.
fn failed(state: &State, error: Arc<MigrateError>) -> ImageStreamError {
    // Only what the receiver says of the image itself tells that it is not stored.
    let judged = matches!(
        &*error,
        MigrateError::Protocol(ProtocolError::Refused(refusal)) if matches!(
            refusal.code,
            RefusalCode::Storage | RefusalCode::Counts | RefusalCode::Limit
        )
    );
    ImageStreamError {
        image: state.session.image(),
        in_doubt: state.session.image().is_some() && state.ended && !judged,
        last_stored: state.session.last_stored(),
        error,
    }
}

impl Drop for ImageSender {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.leaving = true;
        // Behind what is still in the buffer, without which it would not be understood.
        let mut last = self.unsent.to_bytes();
        let abort = Frame::abort("the sender leaves");
        if state.failure.is_none() && state.session.send(&abort).is_ok() {
            Encoder::encode(&abort, &mut last);
        }
        let polite = state.failure.is_none()
            && matches!(state.session.phase(), Phase::Active | Phase::Completed);
        drop(state);
        if polite {
            last.extend(Encoder::bye());
            // If there is no room for that, the receiver sees an end all the same.
            self.shared.wire.send_last_frames(&last);
        }
        self.shared.wire.stream().shutdown();
        if let Some(listening) = self.listening.take()
            && listening.join().is_err()
        {
            tracing::error!("the listening thread of an image sender panicked");
        }
    }
}
