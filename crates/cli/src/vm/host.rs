//! The process that has a guest: what it has, who may do what with it, and how it ends.

use std::{
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, bail};
use pageferry::migrate::{DestinationMigration, DestinationStatus, SourceMigration, Stage, Stop};
use pageferry_vmm::{End, MachineSource, Report, WriteTracking};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    connection,
    line::{Ended, Line, Progress},
    place::{Control, Name},
    protocol::Status,
};
use crate::{
    Context,
    exit::{Exit, Failure},
};

/// Connections at a time; others are turned away.
const CONNECTIONS: usize = 32;
/// How often it is looked whether the guest still runs.
const LOOK: Duration = Duration::from_millis(250);

/// A process that has a guest, or waits for one.
pub(super) struct Host {
    pub(super) name: Name,
    pub(super) tracking: WriteTracking,
    /// For how long a guest was waited for before it began to come.
    waited: OnceLock<Duration>,
    state: Mutex<State>,
    /// The process is to end.
    ending: Stop,
    finished: Condvar,
}

#[derive(Default)]
struct State {
    guest: Option<Arc<MachineSource>>,
    outgoing: Outgoing,
    /// Until all of the guest's memory is here.
    incoming: Option<Arc<DestinationMigration>>,
    /// How the last migration ended.
    last: Option<Ended>,
    /// The guest is to be stopped as soon as that can be done.
    stopping: bool,
    fate: Option<Fate>,
    /// What the guest came to here, when nothing of it is left.
    finished: Option<Finished>,
}

#[derive(Default)]
enum Outgoing {
    #[default]
    None,
    /// One is about to begin.
    Starting,
    Active(Arc<SourceMigration>),
}

/// Why the process ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    /// The guest was stopped.
    Stopped,
    /// It runs elsewhere.
    Moved,
    /// Its vCPUs have ended: it went wrong.
    ByItself,
    /// It was moved to a destination that has gone.
    Lost(String),
    /// It never came; whether that is because the source is gone.
    NeverCame { why: String, peer_lost: bool },
}

/// What the guest came to here.
#[derive(Clone, Debug, Default)]
pub(super) struct Finished {
    pub(super) touches: u64,
    pub(super) mismatches: u64,
}

impl Host {
    pub(super) fn new(name: Name, tracking: WriteTracking) -> anyhow::Result<Self> {
        let ending = Stop::new().context("making an eventfd")?;
        let (waited, state, finished) = (OnceLock::new(), Mutex::default(), Condvar::new());
        Ok(Self { name, tracking, waited, state, ending, finished })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable once the process is to end.
    pub(super) fn ending(&self) -> &Stop {
        &self.ending
    }

    /// The guest is here.
    pub(super) fn runs(&self, guest: Arc<MachineSource>) {
        self.lock().guest = Some(guest);
    }

    pub(super) fn has_guest(&self) -> bool {
        self.lock().guest.is_some()
    }

    /// A guest is waited for.
    pub(super) fn awaits(&self, migration: Arc<DestinationMigration>) {
        self.lock().incoming = Some(migration);
    }

    /// For how long a guest has been waited for that has begun to come, or not yet.
    pub(super) fn waited(&self, status: &DestinationStatus) -> Duration {
        if status.memory == 0 && status.stage == Stage::Connecting {
            return status.elapsed;
        }
        *self.waited.get_or_init(|| status.elapsed)
    }

    /// The process is to end; what is said first counts.
    pub(super) fn end(&self, fate: Fate) {
        self.lock().fate.get_or_insert(fate);
        self.ending.stop();
    }

    /// All of the guest's memory is here, or will never be.
    pub(super) fn arrived(&self, ended: Ended) {
        let mut state = self.lock();
        state.incoming = None;
        state.last = Some(ended);
        let stopping = state.stopping;
        drop(state);
        if stopping {
            self.end(Fate::Stopped);
        }
    }

    /// Begins to send the guest away; whoever is told so says how it went.
    ///
    /// # Errors
    /// Why it stays.
    pub(super) fn begin_sending(&self) -> anyhow::Result<Arc<MachineSource>> {
        let mut state = self.lock();
        let Some(guest) = &state.guest else { bail!("there is no guest here yet") };
        if state.stopping || state.fate.is_some() {
            bail!("the guest is being stopped");
        }
        if state.incoming.is_some() {
            bail!("the guest's memory is still arriving");
        }
        if !matches!(state.outgoing, Outgoing::None) {
            bail!("the guest is being moved already");
        }
        let guest = Arc::clone(guest);
        state.outgoing = Outgoing::Starting;
        Ok(guest)
    }

    /// The migration that was begun is under way.
    pub(super) fn sending(&self, migration: &Arc<SourceMigration>) {
        let mut state = self.lock();
        state.outgoing = Outgoing::Active(Arc::clone(migration));
        let stopping = state.stopping;
        drop(state);
        if stopping {
            migration.cancel();
        }
    }

    /// The migration that was begun is over, and with it the process if there is a fate.
    pub(super) fn sent(&self, ended: Option<Ended>, fate: Option<Fate>) {
        let mut state = self.lock();
        state.outgoing = Outgoing::None;
        state.last = ended.or_else(|| state.last.take());
        let stopped = state.stopping.then_some(Fate::Stopped);
        let Some(fate) = fate.or(stopped) else { return };
        // At once: nobody is to find a guest that has ended, and not why.
        state.fate.get_or_insert(fate);
        drop(state);
        self.ending.stop();
    }

    /// The migration of the guest that is here.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn outgoing(&self) -> anyhow::Result<Arc<SourceMigration>> {
        match &self.lock().outgoing {
            Outgoing::Active(migration) => Ok(Arc::clone(migration)),
            _ => bail!("the guest is not being moved"),
        }
    }

    pub(super) fn incoming(&self) -> Option<Arc<DestinationMigration>> {
        self.lock().incoming.clone()
    }

    /// How a migration goes, or how the last one went.
    pub(super) fn migration(&self) -> Option<Line> {
        let state = self.lock();
        let outgoing = match &state.outgoing {
            Outgoing::Active(migration) => Some(Arc::clone(migration)),
            _ => None,
        };
        let (incoming, last) = (state.incoming.clone(), state.last.clone());
        drop(state);
        outgoing
            .map(|migration| Line::Progress(Progress::of_source(&migration.status())))
            .or_else(|| {
                let status = incoming?.status();
                Some(Line::Progress(Progress::of_destination(&status, self.waited(&status))))
            })
            .or_else(|| last.map(Line::Ended))
    }

    pub(super) fn status(&self) -> Status {
        let state = self.lock();
        let guest = state.guest.clone();
        let incoming = state.incoming.clone();
        let outgoing = match &state.outgoing {
            Outgoing::None => None,
            Outgoing::Starting => Some("moving"),
            Outgoing::Active(migration) => Some(match migration.stage() {
                Stage::PostCopy | Stage::Paused | Stage::Completed => "moved",
                _ => "moving",
            }),
        };
        drop(state);
        let machine = guest.as_ref().map(|guest| guest.machine());
        let receiving = incoming.as_ref().map(|incoming| incoming.status());
        let name = match (machine, &receiving, outgoing) {
            (None, Some(receiving), _) if receiving.memory > 0 => "arriving",
            (None, ..) => "waiting",
            (_, _, Some(state)) => state,
            (Some(machine), ..) if !machine.is_running() => "ended",
            (_, Some(_), _) => "completing",
            _ => "running",
        };
        Status {
            name: self.name.to_string(),
            pid: std::process::id(),
            state: name.to_owned(),
            vcpus: machine.map_or(0, |machine| machine.vm().config().vcpus),
            memory_bytes: match (machine, &receiving) {
                (Some(machine), _) => machine.vm().config().memory,
                (None, Some(receiving)) => receiving.memory,
                (None, None) => 0,
            },
            touches: machine.map_or(0, |machine| machine.vm().touches().iter().sum()),
            listening: incoming
                .and_then(|incoming| incoming.endpoint())
                .map(|endpoint| endpoint.to_string()),
        }
    }

    pub(super) fn running_line(&self, socket: &Path) -> Line {
        let Status { name, pid, vcpus, memory_bytes, .. } = self.status();
        Line::Running { name, pid, vcpus, memory_bytes, socket: socket.display().to_string() }
    }

    /// Stops the guest, calling off what may be in the way. Where a migration has given it away, or
    /// has brought it but not all of its memory, the guest is only stopped when that is over, and
    /// only if `later`.
    ///
    /// # Errors
    /// Why it has to wait.
    pub(super) fn stop(&self, later: bool) -> Result<(), String> {
        let mut state = self.lock();
        let before = std::mem::replace(&mut state.stopping, true);
        let outgoing = match &state.outgoing {
            Outgoing::None => None,
            // Whoever starts it calls it off.
            Outgoing::Starting => return Ok(()),
            Outgoing::Active(migration) => Some(Arc::clone(migration)),
        };
        let incoming = state.incoming.clone();
        drop(state);
        let (possible, why) = match (outgoing, incoming) {
            (Some(migration), _) => (
                migration.cancel(),
                "the guest runs elsewhere, and there its memory is still needed from here",
            ),
            (None, Some(migration)) => {
                (migration.drop_guest().is_ok(), "the guest's memory is still arriving")
            }
            (None, None) => {
                self.end(Fate::Stopped);
                return Ok(());
            }
        };
        if possible {
            return Ok(());
        }
        if !later {
            self.lock().stopping = before;
        }
        Err(why.to_owned())
    }

    /// Waits until nothing of the guest is left here.
    pub(super) fn wait_finished(&self) -> Finished {
        let mut state = self.lock();
        loop {
            if let Some(finished) = &state.finished {
                return finished.clone();
            }
            state = self.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Answers at the control socket until the process is to end, and ends the guest then.
    pub(super) fn serve(
        self: &Arc<Self>,
        control: Control,
        context: &Context,
    ) -> anyhow::Result<Exit> {
        let mut connections = Vec::new();
        let served = self.accept(&control, &mut connections, context);
        if served.is_err() {
            // What cannot be stopped now is waited for by whoever brings it.
            let _ = self.stop(true);
            self.end(Fate::Stopped);
        }
        let fate = self.lock().fate.clone().unwrap_or(Fate::Stopped);
        let report = self.finish();
        // Who waits for the guest's end finds nothing of it any more.
        drop(control);
        let finished = report.as_ref().ok().and_then(Option::as_ref).map_or_else(
            Finished::default,
            |report| Finished { touches: report.touches(), mismatches: report.mismatches() },
        );
        self.lock().finished = Some(finished);
        self.finished.notify_all();
        for connection in connections {
            if connection.join().is_err() {
                eprintln!("pageferry: a thread panicked");
            }
        }
        served?;
        self.leave(&fate, report?, context)
    }

    fn accept(
        self: &Arc<Self>,
        control: &Control,
        connections: &mut Vec<JoinHandle<()>>,
        context: &Context,
    ) -> anyhow::Result<()> {
        let mut asked = false;
        while !self.ending.is_stopped() {
            let mut fds = vec![
                PollFd::new(&control.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(self.ending.as_fd(), PollFlags::IN),
            ];
            if !asked {
                fds.push(PollFd::new(&context.signals, PollFlags::IN));
            }
            let look = Timespec::try_from(LOOK).context("a time that is too long")?;
            match poll(&mut fds, Some(&look)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for requests"),
            }
            if !asked && let Some(signal) = context.signals.caught() {
                asked = true;
                if let Err(why) = self.stop(true) {
                    eprintln!(
                        "pageferry: {signal}: {why}; it ends when that is over. A second one ends \
                         it at once, and the guest may be lost"
                    );
                }
            }
            connections.retain(|connection: &JoinHandle<()>| !connection.is_finished());
            match control.listener.accept() {
                Ok((stream, _)) if connections.len() < CONNECTIONS => {
                    let host = Arc::clone(self);
                    let thread = std::thread::Builder::new()
                        .name("control".to_owned())
                        .spawn(move || connection::serve(&host, stream));
                    connections.push(thread.context("starting a thread")?);
                }
                // Too many: it finds its connection closed.
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::Interrupted
                            | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => return Err(error).context("accepting at the control socket"),
            }
            self.look_after_guest();
        }
        Ok(())
    }

    /// A guest runs until it is stopped, unless something went wrong.
    fn look_after_guest(&self) {
        let state = self.lock();
        let Some(guest) = state.guest.clone() else { return };
        drop(state);
        if guest.machine().is_running() {
            return;
        }
        // One that has moved has ended here, and one whose memory is arriving is still needed.
        let mut state = self.lock();
        if matches!(state.outgoing, Outgoing::None) && state.incoming.is_none() {
            state.fate.get_or_insert(Fate::ByItself);
            drop(state);
            self.ending.stop();
        }
    }

    /// Stops the guest, if there is one, and tells what it came to.
    fn finish(&self) -> anyhow::Result<Option<Report>> {
        let guest = self.lock().guest.take();
        let Some(guest) = guest else { return Ok(None) };
        let report = match guest.take_report() {
            Some(report) => report,
            None => guest.machine().stop(),
        };
        report.map(Some).context("running the guest")
    }

    fn leave(
        &self,
        fate: &Fate,
        report: Option<Report>,
        context: &Context,
    ) -> anyhow::Result<Exit> {
        let why = match fate {
            Fate::Stopped => "stopped",
            Fate::Moved => "moved",
            Fate::ByItself => "by-itself",
            Fate::Lost(_) => "lost",
            Fate::NeverCame { why, peer_lost } => {
                if let Some(signal) = context.signals.caught() {
                    return Err(Failure::interrupted(signal).into());
                }
                if self.lock().stopping {
                    return Ok(Exit::Success);
                }
                if *peer_lost {
                    return Err(Failure::source_lost(why.clone()).into());
                }
                bail!("the guest did not come: {why}");
            }
        };
        if report.is_some() {
            Line::left(self.name.as_str(), why, report.as_ref()).write(context.output)?;
        }
        if let Fate::Lost(why) = fate {
            return Err(Failure::source_lost(why.clone()).into());
        }
        let Some(report) = report else { return Ok(Exit::Success) };
        // One that was stopped in between ends of its own accord nowhere else.
        let odd = report.vcpus.iter().any(|vcpu| vcpu.end != End::Stopped);
        if report.mismatches() > 0 || odd {
            bail!("the guest went wrong:\n{report}");
        }
        Ok(Exit::Success)
    }
}
