//! Writes as they happen, in a buffer of limited size.

use std::{
    collections::VecDeque,
    num::NonZeroUsize,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use pageferry_uffd::{HostAddress, HostRange};
use rustix::time::{ClockId, clock_gettime};

/// The first write to a page since it was protected.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub struct WriteEvent {
    /// What was written to: the exact address where the kernel tells
    /// (`UFFD_FEATURE_EXACT_ADDRESS`), else that of the page.
    pub address: HostAddress,
    /// When it was noticed, by `CLOCK_MONOTONIC`.
    pub time: Duration,
    /// The thread that wrote, where the kernel tells (`UFFD_FEATURE_THREAD_ID`).
    pub thread: Option<u32>,
}

impl WriteEvent {
    pub(crate) fn now(address: HostAddress, thread: Option<u32>) -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        // The monotonic clock begins at 0 when the machine starts.
        let time = Duration::new(now.tv_sec.cast_unsigned(), now.tv_nsec as u32);
        Self { address, time, thread }
    }
}

/// What a stream of writes says.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Notice {
    /// A write.
    Write(WriteEvent),
    /// There was no room for writes in this armed range: any page of it may have been written since
    /// the last notice about it. Only with [`Overflow::WholeRange`].
    Whole(HostRange),
}

/// What happens to a write that finds the buffer full.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
pub enum Overflow {
    /// The thread that writes waits for room, and behind it all others that write for the first
    /// time to a page. So whoever takes events out must not itself write to tracked memory.
    Wait,
    /// The write goes on without an event, and [`Notice::Whole`] follows those that are in the
    /// buffer.
    WholeRange,
}

/// Writes as they happen. Dropping it ends the stream, not the tracking.
///
/// What a harvest reports is complete whether or not there is a stream, or room in it.
#[derive(Debug)]
pub struct WriteEvents {
    queue: Arc<Queue>,
}

/// Why there is no notice.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoNotice {
    /// None has come so far.
    #[error("no write so far")]
    Empty,
    /// None will come any more: the tracker has been dropped, or has another stream.
    #[error("the stream of writes has ended")]
    Ended,
}

impl WriteEvents {
    /// A stream, and the end of it to put events in.
    pub(crate) fn new(capacity: NonZeroUsize, overflow: Overflow) -> (Self, Arc<Queue>) {
        let state = State {
            events: VecDeque::with_capacity(capacity.get()),
            whole: Vec::new(),
            ended: false,
            abandoned: false,
        };
        let queue = Arc::new(Queue {
            capacity: capacity.get(),
            overflow,
            state: Mutex::new(state),
            came: Condvar::new(),
            room: Condvar::new(),
        });
        (Self { queue: Arc::clone(&queue) }, queue)
    }

    /// The next notice, if there is one.
    ///
    /// # Errors
    ///
    /// [`NoNotice`].
    pub fn try_next(&self) -> Result<Notice, NoNotice> {
        self.queue.lock().take(&self.queue)
    }

    /// The next notice, waiting for it as long as this.
    ///
    /// # Errors
    ///
    /// [`NoNotice::Empty`] after this time, [`NoNotice::Ended`].
    pub fn next_within(&self, patience: Duration) -> Result<Notice, NoNotice> {
        let end = Instant::now() + patience;
        let mut state = self.queue.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match state.take(&self.queue) {
                Err(NoNotice::Empty) if !left.is_zero() => {}
                answer => return answer,
            }
            let waited = self.queue.came.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Until the stream ends.
impl Iterator for WriteEvents {
    type Item = Notice;

    fn next(&mut self) -> Option<Notice> {
        let mut state = self.queue.lock();
        loop {
            match state.take(&self.queue) {
                Ok(notice) => return Some(notice),
                Err(NoNotice::Ended) => return None,
                Err(NoNotice::Empty) => {}
            }
            state = self.queue.came.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for WriteEvents {
    fn drop(&mut self) {
        self.queue.lock().abandoned = true;
        self.queue.room.notify_all();
    }
}

/// The buffer between the thread that answers faults and whoever takes events out.
#[derive(Debug)]
pub(crate) struct Queue {
    capacity: usize,
    overflow: Overflow,
    state: Mutex<State>,
    came: Condvar,
    room: Condvar,
}

#[derive(Debug)]
struct State {
    events: VecDeque<WriteEvent>,
    /// Of these, events are missing.
    whole: Vec<HostRange>,
    /// No event will come any more.
    ended: bool,
    /// Nobody takes any event out any more.
    abandoned: bool,
}

impl State {
    fn take(&mut self, queue: &Queue) -> Result<Notice, NoNotice> {
        if let Some(event) = self.events.pop_front() {
            queue.room.notify_one();
            return Ok(Notice::Write(event));
        }
        match self.whole.pop() {
            Some(range) => Ok(Notice::Whole(range)),
            None if self.ended => Err(NoNotice::Ended),
            None => Err(NoNotice::Empty),
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a write into the buffer, which is one in this armed range, or does what is to be done
    /// when there is no room.
    pub(crate) fn push(&self, event: WriteEvent, range: HostRange) {
        let mut state = self.lock();
        loop {
            if state.abandoned || state.ended || state.whole.contains(&range) {
                // It is part of what will be reported as a whole.
                return;
            }
            if state.events.len() < self.capacity {
                state.events.push_back(event);
                break;
            }
            match self.overflow {
                Overflow::Wait => {
                    state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Overflow::WholeRange => {
                    state.whole.push(range);
                    break;
                }
            }
        }
        drop(state);
        self.came.notify_one();
    }

    /// No event comes any more; who waits for room goes on.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.came.notify_all();
        self.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    fn range(number: u64) -> HostRange {
        HostRange::new(HostAddress::new(number << 20), 1 << 20)
    }

    fn event(number: u64) -> WriteEvent {
        WriteEvent::now(range(number).start(), None)
    }

    fn stream(capacity: usize, overflow: Overflow) -> (WriteEvents, Arc<Queue>) {
        WriteEvents::new(NonZeroUsize::new(capacity).unwrap(), overflow)
    }

    #[test]
    fn what_has_no_room_is_told_as_a_whole_once_and_after_the_rest() {
        let (events, queue) = stream(2, Overflow::WholeRange);
        let (first, second) = (event(1), event(2));
        queue.push(first, range(1));
        queue.push(second, range(2));
        for _ in 0..3 {
            queue.push(event(1), range(1));
        }
        assert_eq!(events.try_next(), Ok(Notice::Write(first)));
        // There is room for it now, but it would come before the notice of what is missing.
        queue.push(event(1), range(1));
        let third = event(3);
        queue.push(third, range(3));
        assert_eq!(events.try_next(), Ok(Notice::Write(second)));
        assert_eq!(events.try_next(), Ok(Notice::Write(third)));
        assert_eq!(events.try_next(), Ok(Notice::Whole(range(1))));
        assert_eq!(events.try_next(), Err(NoNotice::Empty));
        let last = event(1);
        queue.push(last, range(1));
        queue.end();
        assert_eq!(events.collect::<Vec<_>>(), [Notice::Write(last)]);
    }

    #[test]
    fn a_write_waits_for_room() {
        let (events, queue) = stream(1, Overflow::Wait);
        queue.push(event(1), range(1));
        thread::scope(|scope| {
            let (say, said) = mpsc::channel();
            let queue = &queue;
            scope.spawn(move || {
                queue.push(event(2), range(2));
                say.send(()).unwrap();
            });
            // However slow the machine: it cannot go on.
            assert!(said.recv_timeout(Duration::from_millis(30)).is_err());
            let address = |notice| match notice {
                Ok(Notice::Write(event)) => event.address,
                other => panic!("{other:?}"),
            };
            assert_eq!(address(events.try_next()), range(1).start());
            said.recv_timeout(Duration::from_secs(60)).unwrap();
            assert_eq!(address(events.next_within(Duration::ZERO)), range(2).start());
        });
    }

    #[test]
    fn whoever_waits_for_room_goes_on_at_the_end() {
        type End = fn(WriteEvents, &Queue);
        let ends: [End; 2] = [
            |events, queue| {
                queue.end();
                assert_eq!(events.count(), 1);
            },
            |events, _| drop(events),
        ];
        for end in ends {
            let (events, queue) = stream(1, Overflow::Wait);
            queue.push(event(1), range(1));
            let (say, said) = mpsc::channel();
            let waiting = Arc::clone(&queue);
            thread::spawn(move || {
                waiting.push(event(2), range(2));
                say.send(()).unwrap();
            });
            assert!(said.recv_timeout(Duration::from_millis(30)).is_err());
            end(events, &queue);
            said.recv_timeout(Duration::from_secs(60)).unwrap();
        }
    }

    #[test]
    fn waiting_for_a_notice_ends_in_time_and_with_the_stream() {
        let (events, queue) = stream(1, Overflow::Wait);
        assert_eq!(events.next_within(Duration::from_millis(1)), Err(NoNotice::Empty));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| events.next_within(Duration::from_secs(60)));
            queue.end();
            assert_eq!(waiting.join().unwrap(), Err(NoNotice::Ended));
        });
    }
}
