//! The side that the guest comes to.

mod arrival;
mod arrivals;
mod door;
mod driver;
mod link;
mod pages;

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use pageferry_memory::Layout;
use pageferry_paging::{Pager, Statistics};

use self::{
    door::{Listening, greet},
    driver::Driver,
    link::{Caller, Link},
};
use crate::{
    Endpoint, MigrateError, Stop,
    core::{Frame, GuestDestinationSession, GuestLimits, SessionId, Terms, UnitSet},
    guest::{
        DestinationGuest,
        memory::Memory,
        options::ReceiveOptions,
        status::{DestinationCounts, Ended, Journal, LiveDestination, Stage},
        via::Via,
    },
    net::Timeouts,
    peer::lock,
};

/// The memory made for the guest.
struct Place {
    layout: Layout,
    memory: Memory,
    /// Units that were written to before the guest runs.
    touched: UnitSet,
    /// Units that were written to, and cleared again.
    cleared: UnitSet,
}

/// What all threads of a migration share.
struct Shared {
    guest: Arc<dyn DestinationGuest>,
    options: ReceiveOptions,
    session: Mutex<GuestDestinationSession>,
    /// Whose session it is, once it has begun.
    id: Mutex<Option<SessionId>>,
    place: OnceLock<Place>,
    pager: Mutex<Option<Arc<Pager>>>,
    link: Mutex<Option<Arc<Link>>>,
    counts: LiveDestination,
    journal: Journal,
    /// Units that the round in progress was announced with.
    announced: AtomicU64,
    running: AtomicBool,
    notes: Mutex<mpsc::Sender<Note>>,
    stop: Stop,
}

impl Shared {
    fn place(&self) -> Result<&Place, MigrateError> {
        self.place.get().ok_or(MigrateError::Misuse("no room has been made for the guest"))
    }

    fn tell(&self, note: Note) {
        // A driver that has ended does not need to know.
        let _ = lock(&self.notes).send(note);
    }

    fn tick(&self) -> Duration {
        self.options.keepalive.min(self.options.idle_timeout)
    }
}

/// What the driver is told.
enum Note {
    /// A source is there, for the first time or again.
    Caller(Box<Caller>),
    /// The guest is not to be waited for any longer.
    Drop,
    /// What is missing of it will never come.
    Abandon,
}

/// How a migration goes at its destination.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DestinationStatus {
    /// Where it stands.
    pub stage: Stage,
    /// Since the migration was started here, until it ended.
    pub elapsed: Duration,
    /// From the guest's standing still, as it was heard of here, to its running here.
    pub downtime: Option<Duration>,
    /// Bytes of the guest's memory, once they are known.
    pub memory: u64,
    /// Units of 4 KiB that are missing, once the guest runs here.
    pub missing: u64,
    /// What was counted.
    pub counts: DestinationCounts,
    /// What the pager did: faults, and how long they took.
    pub paging: Option<Statistics>,
}

/// A migration as its destination sees it: it goes on by itself, in threads of its own. It takes
/// one guest.
///
/// Dropping it before the guest runs drops the guest; afterwards it waits for the end.
pub struct DestinationMigration {
    shared: Arc<Shared>,
    listener: Mutex<Option<Listening>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: Arc<Ended<()>>,
}

impl std::fmt::Debug for DestinationMigration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DestinationMigration")
            .field("stage", &self.shared.journal.stage())
            .finish_non_exhaustive()
    }
}

impl DestinationMigration {
    /// Waits for a source at `endpoint`.
    ///
    /// # Errors
    /// [`MigrateError::Bind`], or no resources to begin with. All that goes wrong later comes out
    /// of [`wait`](Self::wait).
    pub fn listen(
        guest: Arc<dyn DestinationGuest>,
        endpoint: &Endpoint,
        options: ReceiveOptions,
    ) -> Result<Self, MigrateError> {
        let migration = Self::begin(guest, options)?;
        migration.relisten(endpoint)?;
        Ok(migration)
    }

    /// Takes the guest from a source at the other end of a stream.
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] if that is an endpoint; or what went wrong with the stream.
    pub fn from_stream(
        guest: Arc<dyn DestinationGuest>,
        via: Via,
        options: ReceiveOptions,
    ) -> Result<Self, MigrateError> {
        let migration = Self::begin(guest, options)?;
        migration.recover(via)?;
        Ok(migration)
    }

    fn begin(
        guest: Arc<dyn DestinationGuest>,
        options: ReceiveOptions,
    ) -> Result<Self, MigrateError> {
        let resources = |what| move |error| MigrateError::Io { what, error };
        let terms = Terms { max_payload: options.max_payload, ..Terms::guest() };
        let limits =
            GuestLimits { state_bytes: options.max_state, memory_bytes: options.max_memory };
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            guest,
            session: Mutex::new(GuestDestinationSession::new(terms, limits)),
            id: Mutex::new(None),
            place: OnceLock::new(),
            pager: Mutex::new(None),
            link: Mutex::new(None),
            counts: LiveDestination::default(),
            journal: Journal::new(options.observer.clone()),
            announced: AtomicU64::new(0),
            running: AtomicBool::new(false),
            notes: Mutex::new(sender),
            stop: Stop::new().map_err(resources("making an eventfd"))?,
            options,
        });
        let ended = Arc::new(Ended::default());
        let driver =
            Driver { shared: Arc::clone(&shared), notes: receiver, ended: Arc::clone(&ended) };
        let done = EndGuard(Arc::clone(&shared), Arc::clone(&ended));
        let thread = std::thread::Builder::new()
            .name("pf-receive".into())
            .spawn(move || done.end(driver.run()))
            .map_err(resources("starting a thread"))?;
        Ok(Self { shared, listener: Mutex::new(None), thread: Mutex::new(Some(thread)), ended })
    }

    /// Waits for the source here instead, from now on: after a loss, say.
    ///
    /// # Errors
    /// [`MigrateError::Bind`]; it is waited for where it was before, then.
    pub fn relisten(&self, endpoint: &Endpoint) -> Result<Endpoint, MigrateError> {
        let listening = Listening::begin(&self.shared, endpoint)?;
        let at = listening.at.clone();
        drop(lock(&self.listener).replace(listening));
        Ok(at)
    }

    /// Where it listens, with the port that the kernel chose.
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        lock(&self.listener).as_ref().map(|listening| listening.at.clone())
    }

    /// The source is, or will be, at the other end of this stream.
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] if it is an endpoint, for which there is
    /// [`relisten`](Self::relisten); or what went wrong with the stream.
    pub fn recover(&self, mut via: Via) -> Result<(), MigrateError> {
        if !via.is_single() {
            return Err(MigrateError::Misuse("a destination waits, and does not connect"));
        }
        let options = &self.shared.options;
        let stream = via.open(
            options.connect_timeout,
            Timeouts { read: self.shared.tick(), write: options.write_timeout },
            Some(&self.shared.stop),
        )?;
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("pf-greet".into())
            .spawn(move || greet(&shared, stream))
            .map_err(|error| MigrateError::Io { what: "starting a thread", error })?;
        Ok(())
    }

    /// How it goes.
    #[must_use]
    pub fn status(&self) -> DestinationStatus {
        let shared = &self.shared;
        let course = shared.journal.course();
        let session = lock(&shared.session);
        let missing = if session.may_run() { session.due().total() } else { 0 };
        drop(session);
        let pager = lock(&shared.pager).clone();
        DestinationStatus {
            stage: course.stage,
            elapsed: course.elapsed,
            downtime: course.downtime,
            memory: shared.place.get().map_or(0, |place| place.memory.bytes()),
            missing,
            counts: shared.counts.snapshot(),
            paging: pager.map(|pager| pager.statistics()),
        }
    }

    /// The memory of the guest that has come.
    #[must_use]
    pub fn layout(&self) -> Option<Layout> {
        self.shared.place.get().map(|place| place.layout.clone())
    }

    /// Gives up on a guest that does not run yet. A source that has given it away already has to
    /// be told, or will not be able to take it back by itself; where that is not connected, it is
    /// for its operator.
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] if the guest runs.
    pub fn drop_guest(&self) -> Result<(), MigrateError> {
        let shared = &self.shared;
        if lock(&shared.session).drop_guest().is_err() {
            return Err(MigrateError::Misuse("the guest runs here"));
        }
        shared.stop.stop();
        shared.tell(Note::Drop);
        let link = lock(&shared.link).clone();
        if let Some(link) = link {
            // Where nothing of it was promised, the refusal says as much.
            if let Err(error) = link.send(&Frame::Dropped) {
                tracing::debug!(%error, "the source is not told that the guest was dropped");
            }
            link.fail(MigrateError::Stopped);
        }
        Ok(())
    }

    /// Gives up on what is missing of a guest that runs here, because the source is gone for good:
    /// whoever touches it sees a memory error. [`wait`](Self::wait) returns
    /// [`MigrateError::Abandoned`].
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] if the guest does not run here.
    pub fn abandon(&self) -> Result<(), MigrateError> {
        let shared = &self.shared;
        if !shared.running.load(Ordering::Acquire) {
            return Err(MigrateError::Misuse("the guest does not run here"));
        }
        shared.tell(Note::Abandon);
        let link = lock(&shared.link).clone();
        if let Some(link) = link {
            link.fail(MigrateError::Stopped);
        }
        Ok(())
    }

    /// Waits for the end: until the guest runs here with all of its memory.
    ///
    /// # Errors
    /// Why there is no guest here. A source that had not given it away has it still.
    pub fn wait(&self) -> Result<(), Arc<MigrateError>> {
        self.ended.wait()
    }
}

impl Drop for DestinationMigration {
    fn drop(&mut self) {
        // One that runs is waited for.
        if let Err(error) = self.drop_guest() {
            tracing::debug!(%error, "waiting for the guest's memory");
            self.shared.tell(Note::Drop);
        }
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a migration panicked");
        }
    }
}

/// Says how it ended, even if the driver panics.
struct EndGuard(Arc<Shared>, Arc<Ended<()>>);

impl EndGuard {
    fn end(&self, result: Result<(), MigrateError>) {
        self.0.journal.enter(match &result {
            Ok(()) => Stage::Completed,
            Err(MigrateError::CalledOff(_)) => Stage::Cancelled,
            Err(_) => Stage::Failed,
        });
        self.1.set(result);
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.end(Err(MigrateError::Misuse("the migration's thread panicked")));
        }
    }
}
