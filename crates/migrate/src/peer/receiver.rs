//! A receiving thread: answers from one connection to the sink.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use pageferry_paging::{SinkError, SourceError, Span};

use super::{Attached, Inner, lock};
use crate::{
    MigrateError,
    core::{
        Channel, DataHeader, Encoder, Frame, Phase, ProtocolError, Refusal, ServerSession, WireSpan,
    },
    net::FrameReader,
};

/// Bytes that the sink does not want are read away in pieces of this size.
const BIN: usize = 64 << 10;

pub(super) struct Receiver {
    inner: Arc<Inner>,
    channel: Channel,
    reader: FrameReader,
}

/// Whether to go on receiving.
#[derive(PartialEq, Eq)]
enum Flow {
    On,
    Stop,
}

impl Receiver {
    pub(super) fn new(inner: Arc<Inner>, channel: Channel, reader: FrameReader) -> Self {
        Self { inner, channel, reader }
    }

    pub(super) fn run(mut self) {
        /// A thread that panics must not leave the guest waiting without a word.
        struct Guard(Arc<Inner>);
        impl Drop for Guard {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.fail(MigrateError::Sink("a receiving thread panicked".into()));
                }
            }
        }
        let guard = Guard(Arc::clone(&self.inner));
        loop {
            match self.step() {
                Ok(Flow::On) => {}
                Ok(Flow::Stop) => break,
                // Once both sides have agreed, the peer may leave as it likes.
                Err(error) if self.inner.completed() && leaving(&error) => break,
                Err(error) => {
                    self.tell_peer(&error);
                    self.inner.fail(error);
                    break;
                }
            }
        }
        drop(guard);
    }

    fn tell_peer(&self, error: &MigrateError) {
        let MigrateError::Protocol(error) = error else { return };
        if matches!(error, ProtocolError::Refused(_) | ProtocolError::Truncated(_)) {
            return;
        }
        let mut frame = Vec::new();
        let refusal = Refusal::new(ServerSession::code(error), &error.to_string());
        Encoder::encode(&Frame::Error(refusal), &mut frame);
        self.inner.link(self.channel).send_last(&frame);
    }

    fn step(&mut self) -> Result<Flow, MigrateError> {
        let (inner, channel) = (&*self.inner, self.channel);
        let frame = self.reader.next(&mut |silent| idle(inner, channel, silent))?;
        accept(inner, channel, &frame)?;
        match frame {
            Frame::Data(data) => self.data(data),
            Frame::Zero { span } => {
                let (attached, here) = self.owed(span)?;
                inner.filled.fetch_add(u64::from(span.count), Ordering::AcqRel);
                let answer = attached.sink.zero(here);
                self.settle(span.count, answer)
            }
            Frame::Poison { span } => {
                let (attached, here) = self.owed(span)?;
                inner.poisoned.fetch_add(u64::from(span.count), Ordering::AcqRel);
                let answer = attached.sink.poison(here);
                self.settle(span.count, answer)
            }
            Frame::Bye => Err(MigrateError::Left),
            other => control(inner, channel, &other).map(|()| Flow::On),
        }
    }

    /// The answered span in this side's terms, taken off what the peer owes.
    fn owed(&self, span: WireSpan) -> Result<(&Attached, Span), MigrateError> {
        let attached = self.inner.attached.get().ok_or(MigrateError::Misuse("not attached"))?;
        let here = attached
            .routes
            .to_layout(span)
            .ok_or(ProtocolError::Unsolicited { span, granule: span.first })?;
        let (first, count) = (here.granules.first().get(), here.granules.count());
        attached.owed.take(usize::from(here.region.get()), first, count).map_err(|granule| {
            ProtocolError::Unsolicited { span, granule: span.first + (granule - first) }
        })?;
        Ok((attached, here))
    }

    /// The answer has gone to the sink: what came of it?
    fn settle(&self, count: u32, answer: Result<(), SinkError>) -> Result<Flow, MigrateError> {
        if let Some(attached) = self.inner.attached.get()
            && attached.owed.settled(u64::from(count))
        {
            self.inner.notify();
        }
        match answer {
            Ok(()) => Ok(Flow::On),
            Err(SinkError::Stopped) => Ok(Flow::Stop),
            Err(SinkError::Install { span, why }) => {
                tracing::warn!(%span, why, "an answer could not be installed");
                Ok(Flow::On)
            }
            Err(error) => Err(MigrateError::Sink(error.to_string())),
        }
    }

    /// A data frame: its payload goes from the socket to where the sink wants it.
    fn data(&mut self, data: DataHeader) -> Result<Flow, MigrateError> {
        let count = data.span.count;
        let (_, here) = self.owed(data.span)?;
        let inner = Arc::clone(&self.inner);
        let attached = inner.attached.get().ok_or(MigrateError::Misuse("not attached"))?;
        inner.filled.fetch_add(u64::from(count), Ordering::AcqRel);
        let granule = inner.geometry.region(data.span.region)?.granule;
        let mut incoming = Incoming {
            inner: &inner,
            channel: self.channel,
            reader: &mut self.reader,
            remaining: u64::from(count) * granule,
            failure: None,
            poisoned: false,
        };
        let mut answer = attached.sink.fill(here, &mut |piece| incoming.take(piece));
        incoming.drain();
        if let Some(failure) = incoming.failure {
            return Err(failure);
        }
        if incoming.poisoned {
            inner.filled.fetch_sub(1, Ordering::AcqRel);
            inner.poisoned.fetch_add(1, Ordering::AcqRel);
            answer = attached.sink.poison(here);
        }
        self.settle(count, answer)
    }
}

/// The bytes of an answer: of one frame, or of a large granule's parts one after the other.
struct Incoming<'a> {
    inner: &'a Inner,
    channel: Channel,
    reader: &'a mut FrameReader,
    remaining: u64,
    failure: Option<MigrateError>,
    poisoned: bool,
}

impl Incoming<'_> {
    fn take(&mut self, piece: &mut [u8]) -> Result<(), SourceError> {
        if self.poisoned || self.failure.is_some() {
            return Err(SourceError::Lost("no more bytes of this answer".into()));
        }
        match self.read(piece) {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.poisoned = true;
                self.remaining = 0;
                Err(SourceError::Lost("the granule turned out poisoned".into()))
            }
            Err(error) => {
                let same = error.to_source_error();
                self.failure = Some(error);
                Err(same)
            }
        }
    }

    /// Fills `place`; false if the peer broke off because the rest cannot be read.
    fn read(&mut self, place: &mut [u8]) -> Result<bool, MigrateError> {
        if place.len() as u64 > self.remaining {
            return Err(MigrateError::Sink("it asks for more bytes than the span has".into()));
        }
        let (inner, channel) = (self.inner, self.channel);
        let mut idle = |silent| idle(inner, channel, silent);
        let mut done = 0;
        while done < place.len() {
            let here = self.reader.payload_remaining().min(place.len() - done);
            if here > 0 {
                self.reader.payload(&mut place[done..done + here], &mut idle)?;
                done += here;
                self.remaining -= here as u64;
                continue;
            }
            let frame = self.reader.next(&mut idle)?;
            // The session lets nothing pass here but the next part, poison, and control frames.
            accept(inner, channel, &frame)?;
            match frame {
                Frame::Data(_) => {}
                Frame::Poison { .. } => return Ok(false),
                Frame::Bye => return Err(MigrateError::Left),
                other => control(inner, channel, &other)?,
            }
        }
        Ok(true)
    }

    /// Reads away what the sink did not take, so that the next frame can be found.
    fn drain(&mut self) {
        if self.remaining == 0 || self.failure.is_some() {
            return;
        }
        let mut bin = vec![0; BIN];
        while self.remaining > 0 && self.failure.is_none() {
            let n = self.remaining.min(BIN as u64) as usize;
            // Both ways in which this can end early are kept in `self`.
            let _ = self.take(&mut bin[..n]);
        }
    }
}

/// Whether the connection ended, rather than that something came which must not.
fn leaving(error: &MigrateError) -> bool {
    match error {
        MigrateError::Protocol(error) => {
            matches!(error, ProtocolError::Refused(_) | ProtocolError::Truncated(_))
        }
        _ => true,
    }
}

fn accept(inner: &Inner, channel: Channel, frame: &Frame) -> Result<(), MigrateError> {
    let mut session = lock(&inner.link(channel).session);
    session.receive(frame)?;
    let completed = session.phase() == Phase::Completed;
    drop(session);
    if completed && !inner.completed.swap(true, Ordering::AcqRel) {
        inner.notify();
    }
    Ok(())
}

/// A frame that is no answer and that the session has accepted.
fn control(inner: &Inner, channel: Channel, frame: &Frame) -> Result<(), MigrateError> {
    if let Frame::Ping { nonce } = frame {
        send(inner, channel, &Encoder::pong(*nonce))?;
    }
    Ok(())
}

/// Nothing has come for `silent`: asks, and at last gives up.
fn idle(inner: &Inner, channel: Channel, silent: Duration) -> Result<(), MigrateError> {
    if inner.closing.load(Ordering::Acquire) {
        return Err(MigrateError::Stopped);
    }
    if silent >= inner.options.idle_timeout {
        return Err(MigrateError::Silent { after: silent });
    }
    send(inner, channel, &Encoder::ping(silent.as_millis() as u64))
}

fn send(inner: &Inner, channel: Channel, frame: &[u8]) -> Result<(), MigrateError> {
    inner
        .link(channel)
        .send(frame)
        .map_err(|error| MigrateError::Io { what: "sending a keep-alive", error: error.into() })
}
