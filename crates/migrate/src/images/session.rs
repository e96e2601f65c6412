//! One sender, as the thread that receives from it sees it.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use super::{
    ImageDescription, ReceiverOptions,
    queue::{Batch, Message, NotWanted, Part, Queue},
};
use crate::{
    MigrateError,
    core::{
        DataHeader, Encoder, Frame, ImageReceiverSession, Phase, ProtocolError, RefusalCode,
        WireSpan,
    },
    net::{FrameReader, Stop, Wire},
    peer::lock,
};

/// How often a thread that waits for the sink looks up.
const SLICE: Duration = Duration::from_millis(50);

/// What the two threads of a session share.
pub(super) struct Session<'a> {
    pub(super) wire: Wire,
    pub(super) machine: Mutex<ImageReceiverSession>,
    pub(super) queue: Queue,
    pub(super) options: &'a ReceiverOptions,
    pub(super) stop: &'a Stop,
}

/// Why receiving ends before the sender says goodbye.
enum Halt {
    NotWanted,
    Error(MigrateError),
}

impl From<NotWanted> for Halt {
    fn from(_: NotWanted) -> Self {
        Self::NotWanted
    }
}

impl From<MigrateError> for Halt {
    fn from(error: MigrateError) -> Self {
        Self::Error(error)
    }
}

impl From<ProtocolError> for Halt {
    fn from(error: ProtocolError) -> Self {
        Self::Error(error.into())
    }
}

/// The receiving thread: from the socket into the queue.
pub(super) struct Receiving<'a> {
    session: &'a Session<'a>,
    reader: FrameReader,
    batch: Option<Batch>,
    /// The sink has been told of the image, or will be.
    begun: bool,
    page_size: u64,
}

impl<'a> Receiving<'a> {
    pub(super) fn new(session: &'a Session<'a>, reader: FrameReader) -> Self {
        Self { session, reader, batch: None, begun: false, page_size: 0 }
    }

    /// Receives until the sender leaves, or something is wrong; the queue is told, and the sender
    /// where it can be.
    pub(super) fn run(mut self) {
        /// The other thread must not wait for a thread that has panicked.
        struct Guard<'a>(&'a Queue);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                self.0.finish(Err(MigrateError::Misuse("the receiving thread panicked")));
            }
        }
        let Session { wire, queue, .. } = self.session;
        let _guard = Guard(queue);
        let halt = loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(completed)) => {
                    queue.finish(Ok(completed));
                    wire.stream().shutdown();
                    return;
                }
                Err(halt) => break halt,
            }
        };
        match halt {
            Halt::Error(error) if !queue.is_refused() => {
                let refusal = refusal(&error).map(|code| (code, error.to_string()));
                queue.finish(Err(error));
                match refusal {
                    Some((code, text)) => wire.refuse(code, &text),
                    None => wire.stream().shutdown(),
                }
            }
            // Whoever stores has told the sender why. What it still sends is read away, so that
            // it can read that.
            Halt::NotWanted | Halt::Error(_) => {
                queue.finish(Err(MigrateError::Stopped));
                wire.linger();
            }
        }
    }

    /// One frame. Returns, once the sender has said goodbye, whether it had completed.
    fn step(&mut self) -> Result<Option<bool>, Halt> {
        let session = self.session;
        let frame = match self.reader.next(&mut |silent| idle(session, silent)) {
            Ok(frame) => frame,
            // Once both sides have agreed, the sender may leave as it likes.
            Err(MigrateError::Closed | MigrateError::Io { .. }) if self.is_completed() => {
                return Ok(Some(true));
            }
            Err(error) => return Err(error.into()),
        };
        let completed = self.is_completed();
        {
            let mut machine = lock(&session.machine);
            if let (Frame::ImageEnd(_), Some(batch)) = (&frame, &mut self.batch) {
                machine.payload(batch.undigested());
            }
            machine.receive(&frame)?;
        }
        match frame {
            Frame::ImageBegin(begin) => {
                self.page_size = begin.page_size;
                self.begin_if_described()?;
            }
            Frame::ImageMetadata { .. } | Frame::ImageMappings { .. } => {
                self.begin_if_described()?;
            }
            Frame::Data(data) => self.data(&data)?,
            Frame::Zero { span } => {
                let (address, count) = self.place(span);
                self.part(Part::Zero { address, count })?;
            }
            Frame::Poison { span } => {
                let (address, count) = self.place(span);
                self.part(Part::Poisoned { address, count })?;
            }
            Frame::Gone { span } => {
                let (address, count) = self.place(span);
                self.part(Part::Gone { address, count })?;
            }
            Frame::ImageEnd(_) => {
                self.flush()?;
                self.begun = false;
                self.push(Message::End)?;
            }
            Frame::ImageAbort { reason } => {
                if let Some(batch) = self.batch.take() {
                    session.queue.recycle(batch);
                }
                if std::mem::take(&mut self.begun) {
                    self.push(Message::Abort(reason))?;
                }
            }
            Frame::Complete(_) => {
                let totals = lock(&session.machine).totals();
                session.wire.send_frame(&Encoder::complete_ack(totals.into()))?;
            }
            Frame::Ping { nonce } => session.wire.send_frame(&Encoder::pong(nonce))?,
            Frame::Bye => return Ok(Some(completed)),
            _ => {}
        }
        Ok(None)
    }

    fn is_completed(&self) -> bool {
        lock(&self.session.machine).phase() == Phase::Completed
    }

    /// The address and the number of pages of a span that the machine has accepted.
    fn place(&self, span: WireSpan) -> (u64, u64) {
        (span.first * self.page_size, span.count.into())
    }

    fn begin_if_described(&mut self) -> Result<(), Halt> {
        let description = {
            let mut machine = lock(&self.session.machine);
            let Some(begin) = machine.image().copied().filter(|_| machine.described()) else {
                return Ok(());
            };
            let (metadata, mappings) = machine.take_description();
            ImageDescription {
                id: begin.id,
                parent: begin.parent,
                page_size: begin.page_size,
                metadata,
                mappings,
            }
        };
        self.begun = true;
        self.push(Message::Begin(description))
    }

    /// The payload of a data frame, from the socket into batches.
    fn data(&mut self, header: &DataHeader) -> Result<(), Halt> {
        let session = self.session;
        let (mut address, _) = self.place(header.span);
        let page_size = self.page_size as usize;
        loop {
            let due = self.reader.payload_remaining();
            if due == 0 {
                return Ok(());
            }
            let mut batch = self.take_batch()?;
            let room = batch.room(page_size);
            if room == 0 {
                self.hand_over(batch)?;
                continue;
            }
            let length = room.min(due);
            let place = batch.place(length);
            self.reader.payload(place, &mut |silent| idle(session, silent))?;
            batch.add_pages(address, length);
            address += length as u64;
            self.batch = Some(batch);
        }
    }

    /// Pages of which there are no bytes.
    fn part(&mut self, part: Part) -> Result<(), Halt> {
        let mut batch = self.take_batch()?;
        if batch.is_full() {
            self.hand_over(batch)?;
            batch = self.take_batch()?;
        }
        batch.add(part);
        self.batch = Some(batch);
        Ok(())
    }

    /// The batch that is being filled, or an empty one.
    fn take_batch(&mut self) -> Result<Batch, Halt> {
        if let Some(batch) = self.batch.take() {
            return Ok(batch);
        }
        let mut asked = Instant::now();
        loop {
            if let Some(batch) = self.session.queue.batch(SLICE)? {
                return Ok(batch);
            }
            self.stalled(&mut asked)?;
        }
    }

    /// A batch at a time is digested: single pages would take several times as long.
    fn hand_over(&self, mut batch: Batch) -> Result<(), Halt> {
        lock(&self.session.machine).payload(batch.undigested());
        self.push(Message::Batch(batch))
    }

    fn flush(&mut self) -> Result<(), Halt> {
        match self.batch.take() {
            Some(batch) if batch.is_empty() => {
                self.session.queue.recycle(batch);
                Ok(())
            }
            Some(batch) => self.hand_over(batch),
            None => Ok(()),
        }
    }

    fn push(&self, mut message: Message) -> Result<(), Halt> {
        let mut asked = Instant::now();
        while let Some(back) = self.session.queue.push(message, SLICE)? {
            message = back;
            self.stalled(&mut asked)?;
        }
        Ok(())
    }

    /// The sink takes its time. Nothing is read meanwhile, so the sender is told every now and
    /// then that somebody is here.
    fn stalled(&self, asked: &mut Instant) -> Result<(), Halt> {
        if self.session.stop.is_stopped() {
            return Err(MigrateError::Stopped.into());
        }
        if asked.elapsed() >= self.session.options.keepalive {
            *asked = Instant::now();
            self.session.wire.try_send_frame(&Encoder::ping(0));
        }
        Ok(())
    }
}

fn idle(session: &Session<'_>, silent: Duration) -> Result<(), MigrateError> {
    if session.queue.is_refused() {
        return Err(MigrateError::Stopped);
    }
    let after = session.options.idle_timeout;
    if silent >= after { Err(MigrateError::Silent { after }) } else { Ok(()) }
}

/// What to tell a sender of an error; nothing where it is gone, or knows already.
pub(super) fn refusal(error: &MigrateError) -> Option<RefusalCode> {
    match error {
        MigrateError::Protocol(ProtocolError::Refused(_)) => None,
        MigrateError::Protocol(error) => Some(error.code()),
        MigrateError::Silent { .. } | MigrateError::TimedOut { .. } => Some(RefusalCode::Silent),
        MigrateError::Stopped => Some(RefusalCode::Stopping),
        _ => None,
    }
}
