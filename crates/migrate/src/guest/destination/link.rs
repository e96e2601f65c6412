//! The connections of one meeting with the source, until it ends or is lost.

use std::{
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use pageferry_paging::PageSink;

use super::{
    Shared,
    pages::{Intake, Judge},
};
pub(super) use crate::core::Phase;
use crate::{
    MigrateError,
    core::{
        Channel, DestinationEvent, DestinationLane, DestinationLaneEvent, Encoder, Frame,
        GuestDestinationSession, Hello, Placement, ProtocolError, Refusal, RefusalCode, WireSpan,
    },
    net::{FrameReader, Wire},
    peer::lock,
};

/// A connection that has come, and said hello.
pub(super) struct Caller {
    pub(super) wire: Arc<Wire>,
    pub(super) reader: FrameReader,
    pub(super) hello: Hello,
}

/// A connection on which requests are sent.
struct Faults {
    wire: Arc<Wire>,
    state: Arc<Mutex<DestinationLane>>,
}

/// All connections.
pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) control: Arc<Wire>,
    /// Those that carry requests, by number.
    faults: Mutex<Vec<Option<Arc<Faults>>>>,
    others: Mutex<Vec<Arc<Wire>>>,
    /// The engine, once there is one.
    pub(super) attached: OnceLock<Arc<dyn PageSink>>,
    /// Requests that wait until the guest is this side's.
    pub(super) held: Mutex<Option<Vec<Frame>>>,
    over: AtomicBool,
    completed: AtomicBool,
    failure: Mutex<Option<MigrateError>>,
    pub(super) changing: Mutex<()>,
    pub(super) changed: Condvar,
    pub(super) waiting: AtomicUsize,
    threads: Mutex<Vec<JoinHandle<()>>>,
    order: Mutex<()>,
}

/// The control connection's part in pages.
struct OnControl<'a>(&'a Mutex<GuestDestinationSession>);

impl Judge for OnControl<'_> {
    fn next(&mut self, frame: &Frame) -> Result<Option<Placement>, MigrateError> {
        match lock(self.0).receive(frame)? {
            DestinationEvent::Page(placement) => Ok(Some(placement)),
            DestinationEvent::Left => Err(MigrateError::Left),
            _ => Ok(None),
        }
    }

    fn settle(&mut self) {
        lock(self.0).settle();
    }
}

struct OnLane<'a>(&'a Mutex<DestinationLane>);

impl Judge for OnLane<'_> {
    fn next(&mut self, frame: &Frame) -> Result<Option<Placement>, MigrateError> {
        match lock(self.0).receive(frame)? {
            DestinationLaneEvent::Page(placement) => Ok(Some(placement)),
            DestinationLaneEvent::Left => Err(MigrateError::Left),
            _ => Ok(None),
        }
    }

    fn settle(&mut self) {
        lock(self.0).settle();
    }
}

impl Link {
    pub(super) fn new(shared: &Arc<Shared>, control: Arc<Wire>, hello: &Hello) -> Self {
        let faults = (0..hello.lane.of).map(|_| None).collect();
        Self {
            shared: Arc::clone(shared),
            control,
            faults: Mutex::new(faults),
            others: Mutex::new(Vec::new()),
            attached: OnceLock::new(),
            held: Mutex::new(None),
            over: AtomicBool::new(false),
            completed: AtomicBool::new(false),
            failure: Mutex::new(None),
            changing: Mutex::new(()),
            changed: Condvar::new(),
            waiting: AtomicUsize::new(0),
            threads: Mutex::new(Vec::new()),
            order: Mutex::new(()),
        }
    }

    /// Whether it is over.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Whether both sides agree that all is there.
    pub(super) fn is_completed(&self) -> bool {
        self.completed.load(Ordering::Acquire)
    }

    pub(super) fn set_completed(&self) {
        self.completed.store(true, Ordering::Release);
        self.notify();
    }

    /// Wakes those in [`wait`](Self::wait).
    pub(super) fn notify(&self) {
        drop(lock(&self.changing));
        self.changed.notify_all();
    }

    /// What to do while nothing comes on a connection that may be silent.
    pub(super) fn idle(&self) -> Result<(), MigrateError> {
        if self.is_over() { Err(MigrateError::Closed) } else { Ok(()) }
    }

    /// It is over because of `error`: everything that waits returns. The first reason is kept.
    pub(super) fn fail(&self, error: MigrateError) {
        if self.over.swap(true, Ordering::AcqRel) {
            return;
        }
        let (code, text) = match &error {
            MigrateError::Protocol(ProtocolError::Refused(_) | ProtocolError::Truncated(_)) => {
                (RefusalCode::Other(0), String::new())
            }
            MigrateError::Protocol(wrong) => (wrong.code(), wrong.to_string()),
            MigrateError::Guest(crate::GuestError::Memory { .. }) => {
                (RefusalCode::Memory, error.to_string())
            }
            MigrateError::Guest(_) | MigrateError::Pager(_) => {
                (RefusalCode::Device, error.to_string())
            }
            MigrateError::Mismatch(_) => (RefusalCode::Mismatch, error.to_string()),
            MigrateError::Packed(_) => (RefusalCode::Protocol, error.to_string()),
            MigrateError::Stopped => (RefusalCode::Stopping, error.to_string()),
            _ => (RefusalCode::Other(0), String::new()),
        };
        *lock(&self.failure) = Some(error);
        if code != RefusalCode::Other(0) && self.control.send_last(code, &text) {
            // A socket closed with unread bytes resets the connection, and the word is lost.
            self.control.linger();
        }
        self.shutdown();
        self.notify();
    }

    fn shutdown(&self) {
        self.control.stream().shutdown();
        for wire in lock(&self.others).iter() {
            wire.stream().shutdown();
        }
    }

    /// Ends all connections and waits for their threads; returns what went wrong first.
    pub(super) fn end(&self) -> Option<MigrateError> {
        self.over.store(true, Ordering::Release);
        self.shutdown();
        self.notify();
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of a migration panicked");
            }
        }
        lock(&self.faults).clear();
        lock(&self.failure).take()
    }

    /// Sends a frame on control.
    pub(super) fn send(&self, frame: &Frame) -> Result<(), MigrateError> {
        self.send_what(|_| Some(frame.clone())).map(|_| ())
    }

    /// Sends the frame on control that is due, if one is; tells whether.
    pub(super) fn send_what(
        &self,
        due: impl FnOnce(&GuestDestinationSession) -> Option<Frame>,
    ) -> Result<bool, MigrateError> {
        // Frames go out in the order in which the session heard of them.
        let _order = lock(&self.order);
        let mut bytes = Vec::new();
        {
            let mut session = lock(&self.shared.session);
            let Some(frame) = due(&session) else { return Ok(false) };
            session.send(&frame)?;
            Encoder::encode(&frame, &mut bytes);
        }
        self.control.send_frame(&bytes)?;
        Ok(true)
    }

    /// Sends a request where its answer is to come.
    pub(super) fn ask(&self, request: &Frame) -> Result<(), MigrateError> {
        let Frame::Request { span, prefetch } = request else {
            return Err(MigrateError::Misuse("not a request"));
        };
        let lane = self.lane_for(*span);
        let bytes = Encoder::request(*span, *prefetch);
        match lane {
            None => {
                lock(&self.shared.session).send(request)?;
                self.control.send_frame(&bytes)
            }
            Some(lane) => {
                lock(&lane.state).send(request)?;
                lane.wire.send_frame(&bytes)
            }
        }
    }

    /// Requests are spread over what carries them.
    fn lane_for(&self, span: WireSpan) -> Option<Arc<Faults>> {
        let faults = lock(&self.faults);
        let granule = span.first / u64::from(span.count.max(1));
        let index = granule.checked_rem(faults.len() as u64)?;
        faults.get(index as usize)?.clone()
    }

    /// The guest is this side's: what was held back is asked for now.
    pub(super) fn release(&self) -> Result<(), MigrateError> {
        let held = lock(&self.held).take();
        held.unwrap_or_default().iter().try_for_each(|request| self.ask(request))
    }

    /// Whoever waits for a page that is on its way waits for all that is before it: from now on
    /// that is to be little.
    pub(super) fn shorten_queues(&self) {
        lock(&self.others).iter().for_each(|wire| wire.stream().shorten_queue());
    }

    /// Takes a further connection of the session, and listens to it on a thread of its own.
    pub(super) fn join(self: &Arc<Self>, caller: Caller) -> Result<(), MigrateError> {
        let lane = lock(&self.shared.session).join(&caller.hello)?;
        let answer = *lane.agreed();
        let Caller { wire, mut reader, hello } = caller;
        let mut bytes = Vec::new();
        Encoder::encode(&Frame::Hello(answer), &mut bytes);
        reader.set_max_payload(answer.max_payload);
        let state = Arc::new(Mutex::new(lane));
        lock(&self.others).push(Arc::clone(&wire));
        if hello.channel == Channel::Faults
            && let Some(place) = lock(&self.faults).get_mut(usize::from(hello.lane.index))
        {
            *place = Some(Arc::new(Faults { wire: Arc::clone(&wire), state: Arc::clone(&state) }));
        }
        if self.is_over() {
            return Err(MigrateError::Closed);
        }
        // Only now: the first request must find its place.
        wire.send_frame(&bytes)?;
        self.notify();
        let this = Arc::clone(self);
        self.spawn(format!("pf-{}", hello.channel), move || this.listen(&state, reader))
    }

    /// Runs `body` on a thread that the link waits for when it ends; what goes wrong in it ends the
    /// link.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: String,
        body: impl FnOnce() -> Result<(), MigrateError> + Send + 'static,
    ) -> Result<(), MigrateError> {
        let guard = Guard(Arc::clone(self));
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || {
                if let Err(error) = body() {
                    guard.0.fail(error);
                }
            })
            .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Listens to a further connection.
    fn listen(
        self: &Arc<Self>,
        state: &Mutex<DestinationLane>,
        mut reader: FrameReader,
    ) -> Result<(), MigrateError> {
        let mut intake = Intake::new();
        loop {
            // Whether the other side is there, control finds out.
            let frame = reader.next(&mut |_| self.idle())?;
            let event = lock(state).receive(&frame)?;
            match event {
                DestinationLaneEvent::Page(placement) => {
                    let mut judge = OnLane(state);
                    intake.page(self, &mut reader, &mut judge, (&frame, placement))?;
                }
                DestinationLaneEvent::RoundEnded(end) => {
                    let event = lock(&self.shared.session).lane_ended(end)?;
                    self.handle(event)?;
                }
                DestinationLaneEvent::Left => return Ok(()),
                DestinationLaneEvent::Nothing => {}
            }
        }
    }

    /// Listens to control, until the link is over; returns how that came.
    pub(super) fn attend(self: &Arc<Self>, mut reader: FrameReader) -> Result<End, MigrateError> {
        let options = &self.shared.options;
        let mut intake = Intake::new();
        loop {
            let frame = reader.next(&mut |silent| {
                self.idle()?;
                if silent >= options.idle_timeout {
                    return Err(MigrateError::Silent { after: silent });
                }
                self.send(&Frame::Ping { nonce: silent.as_millis() as u64 })
            })?;
            let event = lock(&self.shared.session).receive(&frame)?;
            match event {
                DestinationEvent::Page(placement) => {
                    let mut judge = OnControl(&self.shared.session);
                    intake.page(self, &mut reader, &mut judge, (&frame, placement))?;
                }
                DestinationEvent::Nothing => {
                    if let Frame::Ping { nonce } = frame {
                        self.send(&Frame::Pong { nonce })?;
                    }
                }
                event => {
                    if let Some(end) = self.handle(event)? {
                        return Ok(end);
                    }
                }
            }
        }
    }
}

/// How a meeting ended, if not by a loss.
#[derive(Debug)]
pub(super) enum End {
    Completed,
    CalledOff(Refusal),
    /// The guest could not be started, and the source knows.
    Dropped(MigrateError),
}

/// A thread that panics must not leave the others waiting.
struct Guard(Arc<Link>);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(MigrateError::Sink("a thread of the migration panicked".into()));
        }
    }
}
