//! What the receiver says, heard on a thread of its own: acknowledgements, and why it gives up,
//! at once and not only when the next page is sent.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use super::{SenderOptions, session::refusal};
use crate::{
    MigrateError,
    core::{Encoder, Frame, ImageSenderSession, Phase},
    net::{FrameReader, Wire},
    peer::lock,
};

/// What a sender and its listening thread share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) wire: Wire,
    pub(super) options: SenderOptions,
    pub(super) state: Mutex<State>,
    pub(super) changed: Condvar,
    /// The nonce of a ping that could not be answered because a frame was being sent.
    owed: Mutex<Option<u64>>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) session: ImageSenderSession,
    /// The end of the image begun was sent.
    pub(super) ended: bool,
    /// This side is leaving: whatever the receiver does is right.
    pub(super) leaving: bool,
    /// The first failure; later ones are its consequences.
    pub(super) failure: Option<Arc<MigrateError>>,
    /// The listening thread has ended.
    pub(super) over: bool,
}

impl Shared {
    pub(super) fn new(wire: Wire, options: SenderOptions, session: ImageSenderSession) -> Self {
        let state = State { session, ended: false, leaving: false, failure: None, over: false };
        Self {
            wire,
            options,
            state: Mutex::new(state),
            changed: Condvar::new(),
            owed: Mutex::new(None),
        }
    }

    /// Waits for a change, at most for `limit`.
    pub(super) fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        limit: Duration,
    ) -> MutexGuard<'a, State> {
        match self.changed.wait_timeout(state, limit) {
            Ok((state, _)) => state,
            Err(poison) => poison.into_inner().0,
        }
    }

    /// Answers what could not be answered before. Called whenever sending has ended.
    pub(super) fn pay(&self) {
        let mut owed = lock(&self.owed);
        if let Some(nonce) = *owed
            && self.wire.try_send_frame(&Encoder::pong(nonce))
        {
            *owed = None;
        }
    }

    fn owe(&self, nonce: u64) {
        *lock(&self.owed) = Some(nonce);
        self.pay();
    }
}

/// The listening thread.
pub(super) fn listen(shared: &Shared, mut reader: FrameReader) {
    /// Whoever waits for an answer must not wait for a thread that has panicked.
    struct Guard<'a>(&'a Shared);
    impl Drop for Guard<'_> {
        fn drop(&mut self) {
            let mut state = lock(&self.0.state);
            if std::thread::panicking() {
                let error = MigrateError::Misuse("the listening thread panicked");
                state.failure.get_or_insert(Arc::new(error));
            }
            state.over = true;
            drop(state);
            self.0.changed.notify_all();
            self.0.wire.stream().shutdown();
        }
    }
    let guard = Guard(shared);
    let error = loop {
        if let Err(error) = step(shared, &mut reader) {
            break error;
        }
    };
    let mut state = lock(&shared.state);
    let agreed = state.session.phase() == Phase::Completed;
    if !(state.leaving || agreed && ended_well(&error)) && state.failure.is_none() {
        tracing::debug!(%error, "the receiver of images is lost");
        if let Some(code) = refusal(&error) {
            shared.wire.send_last(code, &error.to_string());
        }
        state.failure = Some(Arc::new(error));
    }
    drop(state);
    drop(guard);
}

/// Once both sides have agreed, the receiver may leave as it likes.
fn ended_well(error: &MigrateError) -> bool {
    matches!(error, MigrateError::Left | MigrateError::Closed | MigrateError::Io { .. })
}

fn step(shared: &Shared, reader: &mut FrameReader) -> Result<(), MigrateError> {
    let frame = reader.next(&mut |silent| idle(shared, silent))?;
    let mut state = lock(&shared.state);
    state.session.receive(&frame)?;
    if matches!(frame, Frame::ImageStored(_)) {
        state.ended = false;
    }
    drop(state);
    match frame {
        Frame::Ping { nonce } => shared.owe(nonce),
        Frame::Bye => return Err(MigrateError::Left),
        _ => shared.changed.notify_all(),
    }
    Ok(())
}

fn idle(shared: &Shared, silent: Duration) -> Result<(), MigrateError> {
    let after = shared.options.idle_timeout;
    if silent >= after {
        return Err(MigrateError::Silent { after });
    }
    if silent >= shared.options.keepalive {
        // Not while something else is being sent, which is a sign of life as well.
        shared.wire.try_send_frame(&Encoder::ping(0));
    }
    Ok(())
}
