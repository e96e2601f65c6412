//! The connections of one meeting with the destination, until it ends or is lost.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use super::{Note, Shared, Told, answers};
use crate::{
    MigrateError,
    core::{
        Channel, Encoder, Frame, Hello, Lane as LaneNumbers, ProtocolError, SourceEvent, SourceLane,
    },
    guest::via::Via,
    net::{FrameReader, Stop, Timeouts, Wire},
    peer::lock,
};

/// A connection beside control.
pub(super) struct Lane {
    pub(super) wire: Arc<Wire>,
    pub(super) state: Mutex<SourceLane>,
}

/// All connections.
pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) control: Arc<Wire>,
    pub(super) pages: Vec<Arc<Lane>>,
    pub(super) faults: Vec<Arc<Lane>>,
    pub(super) max_payload: u32,
    /// Called for when it is over.
    stop: Stop,
    over: AtomicBool,
    /// Its number, and where it tells what happens.
    notes: (u64, mpsc::Sender<Told>),
    threads: Mutex<Vec<JoinHandle<()>>>,
    order: Mutex<()>,
}

/// What a new connection starts with, before it belongs to a [`Link`].
pub(super) struct Opened {
    pub(super) wire: Arc<Wire>,
    pub(super) reader: FrameReader,
    pub(super) answer: Hello,
}

impl Shared {
    fn tick(&self) -> Duration {
        self.options.keepalive.min(self.options.idle_timeout)
    }

    /// Makes a connection and sends `offer`; returns the answer unchecked.
    pub(super) fn open(&self, via: &mut Via, offer: Hello) -> Result<Opened, MigrateError> {
        self.open_until(via, offer, self.may_be_called_off())
    }

    /// The same, whatever ends it early.
    pub(super) fn open_until(
        &self,
        via: &mut Via,
        offer: Hello,
        stop: Option<&Stop>,
    ) -> Result<Opened, MigrateError> {
        let options = &self.options;
        let tick = self.tick().min(options.connect_timeout / 4);
        let timeouts = Timeouts { read: tick, write: options.write_timeout };
        let stream = via.open(options.connect_timeout, timeouts, stop)?;
        let wire = Arc::new(Wire::new(Arc::new(stream)));
        let mut hello = Vec::new();
        Encoder::encode(&Frame::Hello(offer), &mut hello);
        wire.send_frame(&hello)?;
        let mut reader = FrameReader::new(Arc::clone(wire.stream()), options.max_payload, tick);
        reader.set_deadline(Some(options.connect_timeout));
        let answer = match reader.next(&mut |_| Ok(()))? {
            Frame::Hello(answer) => answer,
            Frame::Error(refusal) => return Err(ProtocolError::Refused(refusal).into()),
            other => {
                return Err(ProtocolError::BadHello(match other {
                    Frame::Bye => "the peer left instead of saying hello",
                    _ => "the peer said something else first",
                })
                .into());
            }
        };
        reader.set_deadline(None);
        reader.set_max_payload(answer.max_payload);
        reader.set_tick(self.tick())?;
        Ok(Opened { wire, reader, answer })
    }

    /// Opens a lane of the session: greeted, and agreed upon.
    fn open_lane(
        &self,
        via: &mut Via,
        channel: Channel,
        index: u16,
    ) -> Result<(Lane, FrameReader), MigrateError> {
        let mut state = lock(&self.session).lane(channel, index)?;
        let opened = self.open(via, state.offer())?;
        state.receive(&Frame::Hello(opened.answer))?;
        Ok((Lane { wire: opened.wire, state: Mutex::new(state) }, opened.reader))
    }
}

/// The connections beside control, and what reads those on which something comes.
#[derive(Default)]
pub(super) struct Lanes {
    pub(super) pages: Vec<Arc<Lane>>,
    pub(super) faults: Vec<Arc<Lane>>,
    readers: Vec<FrameReader>,
}

impl Lanes {
    /// Opens as many as were announced.
    pub(super) fn open(
        shared: &Shared,
        via: &mut Via,
        numbers: LaneNumbers,
    ) -> Result<Self, MigrateError> {
        let mut lanes = Self::default();
        for index in 0..numbers.index {
            let (lane, _) = shared.open_lane(via, Channel::Pages, index)?;
            lanes.pages.push(Arc::new(lane));
        }
        for index in 0..numbers.of {
            let (lane, reader) = shared.open_lane(via, Channel::Faults, index)?;
            lanes.faults.push(Arc::new(lane));
            lanes.readers.push(reader);
        }
        Ok(lanes)
    }
}

impl Link {
    /// Puts the connections together, and starts to listen to them.
    pub(super) fn start(
        shared: &Arc<Shared>,
        control: Opened,
        lanes: Lanes,
        notes: (u64, mpsc::Sender<Told>),
    ) -> Result<Arc<Self>, MigrateError> {
        let resources = |what| move |error: io::Error| MigrateError::Io { what, error };
        let link = Arc::new(Self {
            shared: Arc::clone(shared),
            control: control.wire,
            pages: lanes.pages,
            faults: lanes.faults,
            max_payload: control.answer.max_payload,
            stop: Stop::new().map_err(resources("making an eventfd"))?,
            over: AtomicBool::new(false),
            notes,
            threads: Mutex::new(Vec::new()),
            order: Mutex::new(()),
        });
        let listening = (|| {
            let this = Arc::clone(&link);
            link.spawn("pf-control", move || this.listen(control.reader))?;
            for (lane, reader) in link.faults.clone().into_iter().zip(lanes.readers) {
                let this = Arc::clone(&link);
                link.spawn("pf-faults", move || answers::serve(&this, &lane, reader))?;
            }
            Ok(())
        })();
        if let Err(error) = listening {
            link.end();
            return Err(resources("starting a thread")(error));
        }
        Ok(link)
    }

    /// Runs `body` until it is done; whatever goes wrong in it ends the link.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce() -> Result<(), MigrateError> + Send + 'static,
    ) -> io::Result<()> {
        /// A thread that panics must not leave the others waiting.
        struct Guard(Arc<Link>);
        impl Drop for Guard {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.fail(MigrateError::Sink("a thread of the migration panicked".into()));
                }
            }
        }
        let guard = Guard(Arc::clone(self));
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            if let Err(error) = body() {
                guard.0.fail(error);
            }
        })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// It is over because of `error`: everything that waits on a connection returns, and the
    /// driver is told of the first reason.
    pub(super) fn fail(&self, error: MigrateError) {
        if self.over.swap(true, Ordering::AcqRel) {
            return;
        }
        if let MigrateError::Protocol(wrong) = &error
            && !matches!(wrong, ProtocolError::Refused(_) | ProtocolError::Truncated(_))
        {
            self.control.send_last(wrong.code(), &wrong.to_string());
        }
        self.shutdown();
        self.tell(Note::Lost(error));
    }

    fn tell(&self, note: Note) {
        // A driver that has ended does not want to know.
        let _ = self.notes.1.send(Told(self.notes.0, note));
    }

    fn shutdown(&self) {
        self.stop.stop();
        self.control.stream().shutdown();
        for lane in self.pages.iter().chain(&self.faults) {
            lane.wire.stream().shutdown();
        }
    }

    /// Whether it is over.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Waits, unless the link ends before.
    pub(super) fn pause_for(&self, time: Duration) -> Result<(), MigrateError> {
        if self.shared.is_called_off() {
            return Err(MigrateError::Cancelled);
        }
        if !time.is_zero() {
            self.stop
                .wait(&[], rustix::event::PollFlags::IN, time)
                .map_err(|error| MigrateError::Io { what: "waiting for bandwidth", error })?;
        }
        if self.is_over() { Err(MigrateError::Closed) } else { Ok(()) }
    }

    /// Ends all connections, and waits for the threads that listen to them. Nobody is told.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::Release);
        self.shutdown();
        self.join();
    }

    /// Says goodbye such that it can be read, and ends.
    pub(super) fn leave(&self, last: &[Frame]) {
        let mut bytes = Vec::new();
        {
            let mut session = lock(&self.shared.session);
            for frame in last {
                if let Err(error) = session.send(frame) {
                    tracing::debug!(%error, "a last word is not sent");
                    continue;
                }
                Encoder::encode(frame, &mut bytes);
            }
        }
        self.over.store(true, Ordering::Release);
        if self.control.send_frame(&bytes).is_ok() {
            self.control.linger();
        }
        self.end();
    }

    fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of a migration panicked");
            }
        }
    }

    /// Sends a frame on control.
    pub(super) fn send(&self, frame: &Frame) -> Result<(), MigrateError> {
        // Frames go out in the order in which the session heard of them.
        let _order = lock(&self.order);
        lock(&self.shared.session).send(frame)?;
        let mut bytes = Vec::new();
        Encoder::encode(frame, &mut bytes);
        self.control.send_frame(&bytes)
    }

    /// Listens to control.
    fn listen(self: &Arc<Self>, mut reader: FrameReader) -> Result<(), MigrateError> {
        let options = &self.shared.options;
        let mut answerer = None;
        loop {
            let frame = reader.next(&mut |silent| {
                if silent >= options.idle_timeout {
                    return Err(MigrateError::Silent { after: silent });
                }
                self.send(&Frame::Ping { nonce: silent.as_millis() as u64 })
            })?;
            let event = lock(&self.shared.session).receive(&frame)?;
            match event {
                SourceEvent::Nothing => {
                    if let Frame::Ping { nonce } = frame {
                        self.send(&Frame::Pong { nonce })?;
                    }
                }
                SourceEvent::Lane(event) => {
                    let answerer =
                        answerer.get_or_insert_with(|| answers::Answerer::on_control(self));
                    answerer.hear(event)?;
                    if !reader.has_frame() {
                        answerer.flush()?;
                    }
                }
                event => {
                    let last = matches!(event, SourceEvent::Left);
                    self.tell(Note::Heard(event));
                    if last {
                        return Ok(());
                    }
                }
            }
        }
    }
}
