//! The side that has the guest and sends it away.

mod answers;
mod background;
mod driver;
mod link;
mod rounds;
mod sender;
mod serve;
mod switch;

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use self::driver::Driver;
use crate::{
    MigrateError, Stop,
    core::{
        Belief, GuestSourceSession, Hold, Lane as LaneNumbers, RegionInfo, SourceEvent, Terms,
        UnitSet,
    },
    guest::{
        SourceGuest,
        bucket::Bucket,
        memory::Memory,
        options::MigrateOptions,
        status::{Ended, Journal, LiveSource, SourceStatus, Stage},
        via::Via,
    },
    peer::{lock, new_session},
};

/// What all threads of a migration share.
struct Shared {
    guest: Arc<dyn SourceGuest>,
    options: MigrateOptions,
    memory: Memory,
    /// Connections beside control: how many carry pages, and how many what is waited for.
    lanes: LaneNumbers,
    session: Mutex<GuestSourceSession>,
    /// Before the guest moves: what the destination does not have as it is now.
    dirty: UnitSet,
    /// What was found not to be readable.
    unreadable: UnitSet,
    counts: LiveSource,
    journal: Journal,
    precopy: Bucket,
    background: Bucket,
    last_fault: AtomicU64,
    /// The guest is to move after this round, however much is left.
    hurry: AtomicBool,
    cancelled: Stop,
    /// The guest is given away, or about to be: too late to be cancelled.
    committed: AtomicBool,
    grains: OnceLock<Vec<u64>>,
}

impl Shared {
    /// Units that a granule of the destination has, by region.
    fn grains(&self) -> Vec<u64> {
        self.grains.get().cloned().unwrap_or_else(|| vec![1; self.memory.len()])
    }

    /// What ends waiting when somebody wants it called off, as long as that can be done. Whoever
    /// is too late must not be in the way of what follows.
    fn may_be_called_off(&self) -> Option<&Stop> {
        (!self.committed.load(Ordering::SeqCst)).then_some(&self.cancelled)
    }

    /// Whether it is to be called off, and can be.
    fn is_called_off(&self) -> bool {
        self.may_be_called_off().is_some_and(Stop::is_stopped)
    }

    /// After the guest has moved: what is still to be sent.
    fn to_send(&self) -> Arc<UnitSet> {
        Arc::clone(lock(&self.session).to_send())
    }
}

/// What the driver is told.
enum Note {
    /// The destination said something.
    Heard(SourceEvent),
    /// The connection is of no use any more.
    Lost(MigrateError),
    /// The time is up.
    TimedOut,
    /// Somebody wants it called off.
    Cancel,
    /// The destination can be reached like this now.
    Recover(Via),
    /// The destination is gone for good, and never said that the guest runs there.
    Reclaim,
    /// The destination is gone for good, and the guest with it.
    GiveUp,
}

/// Who says so: a link, by its number; 0 for the one who started the migration.
struct Told(u64, Note);

/// What a migration came to.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The guest runs at the destination, with all of its memory.
    Completed,
    /// It was called off: the guest runs here.
    Cancelled,
}

/// A migration as its source sees it: it goes on by itself, in threads of its own.
///
/// Dropping it cancels it, if that is still possible, and otherwise waits for its end.
pub struct SourceMigration {
    shared: Arc<Shared>,
    notes: Mutex<mpsc::Sender<Told>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: Arc<Ended<Outcome>>,
}

impl std::fmt::Debug for SourceMigration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceMigration").field("stage", &self.stage()).finish_non_exhaustive()
    }
}

impl SourceMigration {
    /// Begins to send `guest` away.
    ///
    /// # Errors
    /// When the guest's memory is not what can be sent, or there are no resources to begin with.
    /// All that goes wrong later comes out of [`wait`](Self::wait).
    pub fn start(
        guest: Arc<dyn SourceGuest>,
        via: impl Into<Via>,
        options: MigrateOptions,
    ) -> Result<Self, MigrateError> {
        let via = via.into();
        let memory = Memory::new(&guest.layout());
        let regions: Vec<RegionInfo> = memory.stated()?;
        let (pages, faults) = match via.is_single() {
            true => (0, 0),
            false => (options.connections, options.demand_connections),
        };
        let lanes = LaneNumbers { index: pages, of: faults };
        let terms = Terms { max_payload: options.max_payload, ..Terms::guest() };
        let session = GuestSourceSession::new(terms, new_session()?, lanes, regions)?;
        let resources = |what| move |error| MigrateError::Io { what, error };
        let shared = Arc::new(Shared {
            session: Mutex::new(session),
            dirty: UnitSet::new(memory.lens()),
            unreadable: UnitSet::new(memory.lens()),
            counts: LiveSource::default(),
            journal: Journal::new(options.observer.clone()),
            precopy: Bucket::new(options.precopy_bandwidth),
            background: Bucket::new(options.background_bandwidth),
            last_fault: AtomicU64::new(0),
            hurry: AtomicBool::new(false),
            cancelled: Stop::new().map_err(resources("making an eventfd"))?,
            committed: AtomicBool::new(false),
            grains: OnceLock::new(),
            guest,
            options,
            memory,
            lanes,
        });
        let (sender, receiver) = mpsc::channel();
        let ended = Arc::new(Ended::default());
        let driver = Driver::new(Arc::clone(&shared), receiver, sender.clone());
        let done = EndGuard { shared: Arc::clone(&shared), ended: Arc::clone(&ended) };
        let thread = std::thread::Builder::new()
            .name("pf-migrate".into())
            .spawn(move || {
                let result = driver.run(via);
                done.end(result);
            })
            .map_err(resources("starting a thread"))?;
        Ok(Self { shared, notes: Mutex::new(sender), thread: Mutex::new(Some(thread)), ended })
    }

    /// Where it stands.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.shared.journal.stage()
    }

    /// How it goes.
    #[must_use]
    pub fn status(&self) -> SourceStatus {
        let course = self.shared.journal.course();
        let moved = matches!(course.stage, Stage::PostCopy | Stage::Paused | Stage::Completed);
        SourceStatus {
            stage: course.stage,
            elapsed: course.elapsed,
            downtime: course.downtime,
            memory: self.shared.memory.bytes(),
            remaining: if moved {
                self.shared.to_send().total()
            } else {
                self.shared.dirty.total()
            },
            rounds: course.rounds,
            counts: self.shared.counts.snapshot(),
        }
    }

    /// Calls it off: the guest stays here. Returns whether that is still possible; what came of
    /// it says [`wait`](Self::wait).
    pub fn cancel(&self) -> bool {
        if self.shared.committed.load(Ordering::Acquire) {
            return false;
        }
        self.shared.cancelled.stop();
        self.tell(Note::Cancel);
        true
    }

    /// Lets the guest move after the round in progress, and the rest come after it.
    pub fn post_copy_now(&self) {
        self.shared.hurry.store(true, Ordering::Release);
    }

    /// After a loss in post-copy: the destination can be reached like this now. A loss that has
    /// not been noticed is noticed by it.
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] while the guest has not moved.
    pub fn recover(&self, via: impl Into<Via>) -> Result<(), MigrateError> {
        if !self.shared.committed.load(Ordering::Acquire) {
            return Err(MigrateError::Misuse(
                "the guest is still here: there is nothing to recover",
            ));
        }
        self.tell(Note::Recover(via.into()));
        Ok(())
    }

    /// After a loss: states that the destination is gone for good. The guest goes on here if the
    /// destination never said that it runs there; otherwise it may have written to its memory,
    /// its state is gone with the destination, and this is refused.
    ///
    /// It is the caller's word that the destination does not run the guest, and never will:
    /// nothing can prove that from here.
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] if the guest was not given away, or runs at the destination.
    pub fn reclaim(&self) -> Result<(), MigrateError> {
        let session = lock(&self.shared.session);
        match (session.hold(), session.belief()) {
            (Hold::Unknown, belief) if belief != Some(Belief::Running) => {}
            (Hold::Ours, _) => return Err(MigrateError::Misuse("the guest is still here")),
            _ => {
                return Err(MigrateError::Misuse(
                    "the guest has run at the destination: it cannot be taken back",
                ));
            }
        }
        drop(session);
        self.tell(Note::Reclaim);
        Ok(())
    }

    /// After a loss: states that the destination is gone for good, and the guest with it: what it
    /// did there since it moved cannot be had back. The memory that is still here is kept as it is,
    /// for whoever wants to look at it; [`wait`](Self::wait) returns [`MigrateError::Gone`].
    ///
    /// # Errors
    /// [`MigrateError::Misuse`] if the guest was not given away.
    pub fn give_up(&self) -> Result<(), MigrateError> {
        if !self.shared.committed.load(Ordering::Acquire) {
            return Err(MigrateError::Misuse("the guest is still here"));
        }
        self.tell(Note::GiveUp);
        Ok(())
    }

    fn tell(&self, note: Note) {
        // A driver that has ended does not need to know.
        let _ = lock(&self.notes).send(Told(0, note));
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why it failed. If the guest had not been given away it goes on here as if nothing had
    /// been; otherwise the error says so.
    pub fn wait(&self) -> Result<Outcome, Arc<MigrateError>> {
        self.ended.wait()
    }
}

impl Drop for SourceMigration {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a migration panicked");
        }
    }
}

/// Says how it ended, even if the driver panics.
struct EndGuard {
    shared: Arc<Shared>,
    ended: Arc<Ended<Outcome>>,
}

impl EndGuard {
    fn end(&self, result: Result<Outcome, MigrateError>) {
        self.shared.journal.enter(match &result {
            Ok(Outcome::Completed) => Stage::Completed,
            Ok(Outcome::Cancelled) | Err(MigrateError::Cancelled) => Stage::Cancelled,
            Err(_) => Stage::Failed,
        });
        self.ended.set(result);
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.end(Err(MigrateError::Misuse("the migration's thread panicked")));
        }
    }
}
