//! From the thread that receives to the one that stores: buffers of pages, and what is between
//! them.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex},
    time::Duration,
};

use super::ImageDescription;
use crate::{MigrateError, peer::lock};

/// Bytes of pages in one batch.
const BATCH: usize = 1 << 20;
/// Parts of a batch.
const PARTS: usize = 4096;
/// Batches that there are: one is being filled, one stored, the others wait.
const BATCHES: usize = 4;
/// Messages that may wait.
const MESSAGES: usize = BATCHES + 2;

/// One thing to tell the sink.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// These bytes of the batch.
    Pages {
        address: u64,
        bytes: std::ops::Range<usize>,
    },
    Zero {
        address: u64,
        count: u64,
    },
    Poisoned {
        address: u64,
        count: u64,
    },
    Gone {
        address: u64,
        count: u64,
    },
}

/// What came between two moments, in order.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    used: usize,
    /// Of the bytes used, those that the digest knows.
    digested: usize,
    parts: Vec<Part>,
}

impl Batch {
    /// Bytes of whole pages that there is room for. Of an empty batch, at least a page.
    pub(super) fn room(&mut self, page_size: usize) -> usize {
        // Filled with zeros once: the same few batches go round.
        if self.bytes.len() < BATCH.max(page_size) {
            self.bytes.resize(BATCH.max(page_size), 0);
        }
        let room = self.bytes.len() - self.used;
        if self.parts.len() < PARTS { room - room % page_size } else { 0 }
    }

    /// Whether another part that has no bytes fits.
    pub(super) fn is_full(&self) -> bool {
        self.parts.len() >= PARTS
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The first `length` bytes of the room.
    pub(super) fn place(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.used..self.used + length]
    }

    /// The first `length` bytes of the room have become pages from `address` on.
    pub(super) fn add_pages(&mut self, address: u64, length: usize) {
        let range = self.used..self.used + length;
        self.used = range.end;
        if let Some(Part::Pages { address: last, bytes }) = self.parts.last_mut()
            && bytes.end == range.start
            && *last + bytes.len() as u64 == address
        {
            bytes.end = range.end;
            return;
        }
        self.parts.push(Part::Pages { address, bytes: range });
    }

    pub(super) fn add(&mut self, part: Part) {
        self.parts.push(part);
    }

    /// The bytes that the digest does not know yet; from now on it does.
    pub(super) fn undigested(&mut self) -> &[u8] {
        let range = self.digested..self.used;
        self.digested = self.used;
        &self.bytes[range]
    }

    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub(super) fn bytes(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    fn clear(&mut self) {
        (self.used, self.digested) = (0, 0);
        self.parts.clear();
    }
}

#[derive(Debug)]
pub(super) enum Message {
    Begin(ImageDescription),
    Batch(Batch),
    /// The image has come whole.
    End,
    /// The sender gave the image up.
    Abort(String),
    /// Nothing more comes: the sender said goodbye, having completed or not, or it went wrong.
    Over(Result<bool, MigrateError>),
}

/// Storing has failed, or has been given up: nothing more is wanted.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(super) struct NotWanted;

#[derive(Default)]
struct State {
    messages: VecDeque<Message>,
    /// Batches that are empty, and how many there are in all.
    free: Vec<Batch>,
    made: usize,
    unwanted: bool,
    over: bool,
}

/// A bounded queue with one thread at each end.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    work: Condvar,
    room: Condvar,
}

impl Queue {
    /// An empty batch, or none after `limit`.
    pub(super) fn batch(&self, limit: Duration) -> Result<Option<Batch>, NotWanted> {
        let mut state = lock(&self.state);
        if !state.unwanted && state.free.is_empty() && state.made >= BATCHES {
            state = self.wait(state, limit);
        }
        if state.unwanted {
            return Err(NotWanted);
        }
        if let Some(batch) = state.free.pop() {
            return Ok(Some(batch));
        }
        if state.made >= BATCHES {
            return Ok(None);
        }
        state.made += 1;
        Ok(Some(Batch::default()))
    }

    /// Hands `message` over; gives it back if there is no room for it within `limit`.
    pub(super) fn push(
        &self,
        message: Message,
        limit: Duration,
    ) -> Result<Option<Message>, NotWanted> {
        // A description may be large, so there is never more than one of them in the queue.
        let most = if matches!(message, Message::Begin(_)) { 1 } else { MESSAGES };
        let mut state = lock(&self.state);
        if !state.unwanted && state.messages.len() >= most {
            state = self.wait(state, limit);
        }
        if state.unwanted {
            return Err(NotWanted);
        }
        if state.messages.len() >= most {
            return Ok(Some(message));
        }
        state.messages.push_back(message);
        drop(state);
        self.work.notify_one();
        Ok(None)
    }

    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, State>,
        limit: Duration,
    ) -> std::sync::MutexGuard<'a, State> {
        match self.room.wait_timeout(state, limit) {
            Ok((state, _)) => state,
            Err(poison) => poison.into_inner().0,
        }
    }

    /// The last message. There is always room for it, and it comes but once.
    pub(super) fn finish(&self, how: Result<bool, MigrateError>) {
        let mut state = lock(&self.state);
        if !state.over {
            state.over = true;
            state.messages.push_back(Message::Over(how));
        }
        drop(state);
        self.work.notify_one();
    }

    /// The next message, waiting for it. After `Over` there is none.
    pub(super) fn pop(&self) -> Message {
        let mut state = lock(&self.state);
        loop {
            if let Some(message) = state.messages.pop_front() {
                drop(state);
                self.room.notify_one();
                return message;
            }
            state = self.work.wait(state).unwrap_or_else(|poison| poison.into_inner());
        }
    }

    /// Gives an emptied batch back.
    pub(super) fn recycle(&self, mut batch: Batch) {
        batch.clear();
        lock(&self.state).free.push(batch);
        self.room.notify_one();
    }

    /// Storing is over, whatever may still come.
    pub(super) fn refuse(&self) {
        lock(&self.state).unwanted = true;
        self.room.notify_one();
    }

    pub(super) fn is_refused(&self) -> bool {
        lock(&self.state).unwanted
    }
}
