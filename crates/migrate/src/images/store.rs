//! One sender, as the thread that stores its images sees it.

use std::{error::Error, sync::Arc};

use super::{
    ImageDescription, ImageInProgress, ImageSink, ImageStreamError, ReceiveEvent, ReceivedImages,
    SinkFailure,
    queue::{Batch, Message, Part},
    session::Session,
};
use crate::{
    MigrateError,
    core::{Encoder, Frame, ImageCounts, ImageId, ProtocolError, RefusalCode},
    peer::lock,
};

/// Whom to tell what happens.
pub(super) type Observe<'a> = dyn FnMut(ReceiveEvent<'_>) + 'a;

/// The storing thread: from the queue into the sink.
pub(super) struct Storing<'a> {
    session: &'a Session<'a>,
    observe: &'a mut Observe<'a>,
    stored: u64,
    last: Option<ImageId>,
}

/// How the sender went.
type Over = Result<bool, MigrateError>;

impl<'a> Storing<'a> {
    pub(super) fn new(session: &'a Session<'a>, observe: &'a mut Observe<'a>) -> Self {
        Self { session, observe, stored: 0, last: None }
    }

    /// Stores what comes until the sender is gone.
    pub(super) fn run(
        mut self,
        sink: &mut dyn ImageSink,
    ) -> Result<ReceivedImages, ImageStreamError> {
        /// A sink that panics must not leave the other thread waiting.
        struct Guard<'a>(&'a Session<'a>);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.queue.refuse();
                    self.0.wire.stream().shutdown();
                }
            }
        }
        let _guard = Guard(self.session);
        let over = loop {
            match self.session.queue.pop() {
                Message::Begin(description) => match self.image(&description, sink) {
                    Ok(None) => {}
                    Ok(Some(over)) => break over,
                    Err(error) => break self.fail(&description, error),
                },
                Message::Over(over) => break over,
                Message::Batch(_) | Message::End | Message::Abort(_) => {
                    unreachable!("an image begins before anything else of it comes")
                }
            }
        };
        let machine = lock(&self.session.machine);
        match over {
            Ok(completed) => Ok(ReceivedImages {
                stored: self.stored,
                aborted: machine.totals().aborted,
                last: self.last,
                completed,
            }),
            Err(error) => Err(ImageStreamError {
                image: machine.image().map(|image| image.id).filter(|id| Some(*id) != self.last),
                in_doubt: false,
                last_stored: self.last,
                error: Arc::new(error),
            }),
        }
    }

    /// One image. Returns how the sender went, if it has gone.
    fn image(
        &mut self,
        description: &ImageDescription,
        sink: &mut dyn ImageSink,
    ) -> Result<Option<Over>, MigrateError> {
        let queue = &self.session.queue;
        let id = description.id;
        (self.observe)(ReceiveEvent::Begun { image: description });
        let mut image = sink.begin(description).map_err(|failure| in_words(&failure))?;
        let mut counts = ImageCounts::default();
        loop {
            match queue.pop() {
                Message::Batch(batch) => {
                    store(&mut *image, &batch, description.page_size, &mut counts)
                        .map_err(|failure| in_words(&failure))?;
                    queue.recycle(batch);
                    (self.observe)(ReceiveEvent::Progress { image: id, counts });
                }
                Message::End => {
                    let counts = image.finish().map_err(|failure| in_words(&failure))?;
                    self.stored(id, counts)?;
                    return Ok(None);
                }
                Message::Abort(reason) => {
                    let why = format!("given up by the sender: {reason}");
                    image.abort(&why);
                    (self.observe)(ReceiveEvent::Dropped { image: id, why: &why });
                    return Ok(None);
                }
                Message::Over(over) => {
                    let why = match &over {
                        Ok(_) => "the sender left".to_owned(),
                        Err(error) => error.to_string(),
                    };
                    image.abort(&why);
                    (self.observe)(ReceiveEvent::Dropped { image: id, why: &why });
                    return Ok(Some(over));
                }
                Message::Begin(_) => unreachable!("an image ends before another begins"),
            }
        }
    }

    /// An image is stored for good: the sender hears of it.
    fn stored(&mut self, id: ImageId, counts: ImageCounts) -> Result<(), MigrateError> {
        let stored = lock(&self.session.machine).stored(counts);
        if let Err(error @ ProtocolError::ImageMismatch { .. }) = stored {
            return Err(error.into());
        }
        self.stored += 1;
        self.last = Some(id);
        (self.observe)(ReceiveEvent::Stored { image: id, counts });
        // Not acknowledged where the session is closed already, and a failure to send is the
        // receiving thread's to find: the image stays in either case.
        if let Ok(stored) = stored {
            let mut frame = Vec::new();
            Encoder::encode(&Frame::ImageStored(stored), &mut frame);
            if let Err(error) = self.session.wire.send_frame(&frame) {
                tracing::debug!(image = %id, %error, "an image could not be acknowledged");
            }
        }
        Ok(())
    }

    /// An image cannot be stored: the sender is told why, and nothing more is taken from it.
    fn fail(&mut self, description: &ImageDescription, error: MigrateError) -> Over {
        let code = match &error {
            MigrateError::Protocol(error) => error.code(),
            _ => RefusalCode::Storage,
        };
        let why = error.to_string();
        // Before the other thread hears of it, which then ends the connection.
        if !self.session.wire.send_error(code, &why) {
            tracing::debug!(image = %description.id, "the sender could not be told: {why}");
        }
        self.session.queue.refuse();
        (self.observe)(ReceiveEvent::Dropped { image: description.id, why: &why });
        loop {
            if let Message::Over(_) = self.session.queue.pop() {
                return Err(error);
            }
        }
    }
}

/// Hands a batch to the sink.
fn store(
    image: &mut dyn ImageInProgress,
    batch: &Batch,
    page_size: u64,
    counts: &mut ImageCounts,
) -> Result<(), SinkFailure> {
    for part in batch.parts() {
        match part {
            Part::Pages { address, bytes } => {
                let bytes = batch.bytes(bytes.clone());
                image.pages(*address, bytes)?;
                counts.data += bytes.len() as u64 / page_size;
            }
            Part::Zero { address, count } => {
                image.zero(*address, *count)?;
                counts.zero += count;
            }
            Part::Poisoned { address, count } => {
                image.poisoned(*address, *count)?;
                counts.poisoned += count;
            }
            Part::Gone { address, count } => {
                image.gone(*address, *count)?;
                counts.gone += count;
            }
        }
    }
    Ok(())
}

/// All that a failure has to say: it is shown to somebody who sees nothing else of it.
fn in_words(failure: &SinkFailure) -> MigrateError {
    let mut text = failure.to_string();
    let mut source: Option<&(dyn Error + 'static)> = failure.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    MigrateError::Store(text)
}
