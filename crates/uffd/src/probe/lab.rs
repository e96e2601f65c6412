//! A registered area, a thread that faults in it, and somebody who answers.

use std::{
    os::fd::AsFd,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    pipe::PipeFlags,
};

use super::{
    Shortfall,
    area::{Area, Backing},
    missing,
};
use crate::{
    CopyMode, Event, EventBuffer, Fault, FaultKind, Features, HostRange, Mapped, Options, Outcome,
    RegisterMode, UffdError, Userfaultfd,
};

/// How long anything may take that should take microseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pages of an area.
pub(super) const PAGES: u64 = 4;

/// [`PAGES`], where they are to be had.
pub(super) fn pages_of(backing: Backing) -> u64 {
    match backing {
        Backing::Anonymous | Backing::Memfd => PAGES,
        // Reserved huge pages are few, and no check of them needs two.
        Backing::Hugetlb2M => 1,
    }
}

/// A registered area. Whoever waits in it is let go when the lab is dropped.
pub(super) struct Lab {
    pub(super) uffd: Userfaultfd,
    pub(super) area: Arc<Area>,
}

impl Lab {
    pub(super) fn new(
        features: Features,
        backing: Backing,
        mode: RegisterMode,
    ) -> Result<Self, Shortfall> {
        Self::with_area(features, Area::new(backing, pages_of(backing))?, mode)
    }

    /// A lab on an area that the check has prepared.
    pub(super) fn with_area(
        features: Features,
        area: Area,
        mode: RegisterMode,
    ) -> Result<Self, Shortfall> {
        let uffd = Options::new().required(features).open()?;
        super::area::register(&uffd, &area, mode)?;
        Ok(Self { uffd, area: Arc::new(area) })
    }

    /// Runs `action` on a thread of its own, and gives `answer` every event that comes before it
    /// ends.
    pub(super) fn attend<T: Send + 'static>(
        &self,
        action: impl FnOnce(&Area) -> T + Send + 'static,
        answer: impl FnMut(Event) -> Result<(), Shortfall>,
    ) -> Result<T, Shortfall> {
        let area = Arc::clone(&self.area);
        attend(&self.uffd, move || action(&area), answer)
    }

    /// Runs `action`, expects just one fault, of this kind and in page 0, and answers it.
    pub(super) fn fault<T: Send + 'static>(
        &self,
        kind: FaultKind,
        action: impl FnOnce(&Area) -> T + Send + 'static,
        mut answer: impl FnMut(&Self, Fault) -> Result<(), Shortfall>,
    ) -> Result<(Fault, T), Shortfall> {
        let mut seen = None;
        let value = self.attend(action, |event| match event {
            Event::Fault(fault) if seen.is_none() && fault.kind == kind => {
                if !self.area.page(0).contains(fault.address) {
                    return missing(format!("the fault came with the address {}", fault.address));
                }
                seen = Some(fault);
                answer(self, fault)
            }
            other => missing(format!("an unexpected event came: {other:?}")),
        })?;
        match seen {
            Some(fault) => Ok((fault, value)),
            None => missing("the access raised no fault"),
        }
    }

    /// Installs a page full of `byte`.
    pub(super) fn copy(&self, page: HostRange, byte: u8, mode: CopyMode) -> Result<(), Shortfall> {
        let bytes = vec![byte; page.len() as usize];
        done(self.uffd.copy(page.start(), &bytes, mode)?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Closing the descriptor does the same, unless a process forked meanwhile has it too.
        let _ = self.uffd.unregister_raw(self.area.range());
    }
}

/// Takes anything short of complete as a failure.
pub(super) fn done(outcome: Outcome) -> Result<(), Shortfall> {
    if outcome.is_complete() { Ok(()) } else { missing(format!("it ended with {outcome:?}")) }
}

/// [`done`], trying again a few times while the kernel says that it cannot just now.
pub(super) fn done_soon(
    mut attempt: impl FnMut() -> Result<Outcome, UffdError>,
) -> Result<(), Shortfall> {
    for _ in 0..1000 {
        match attempt()? {
            Outcome::Retry { done: 0 } => std::thread::yield_now(),
            outcome => return done(outcome),
        }
    }
    missing("the kernel asks to try again, however often it is tried")
}

/// Runs `action` on a thread of its own, and gives `answer` every event that comes before it ends.
///
/// When it does not end in time the thread is left to itself: the memory it waits in is its own,
/// and it is let go when the descriptor is closed.
///
/// From the start of the action until the first event is read nothing is allocated or freed here:
/// see [`Event::Fork`].
pub(super) fn attend<T: Send + 'static>(
    uffd: &Userfaultfd,
    action: impl FnOnce() -> T + Send + 'static,
    mut answer: impl FnMut(Event) -> Result<(), Shortfall>,
) -> Result<T, Shortfall> {
    // The thread's end closes the pipe, so that one poll waits for both it and events.
    let (ended, alive) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (go, start) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new().name("pageferry-probe".to_owned()).spawn(move || {
        // Without the byte nobody waits for the action any more.
        if matches!(rustix::io::retry_on_intr(|| rustix::io::read(&go, &mut [0])), Ok(1)) {
            // The receiver may have lost patience.
            let _ = sender.send(action());
        }
        drop(alive);
    })?;

    let mut buffer = EventBuffer::new(4);
    let deadline = Instant::now() + PATIENCE;
    rustix::io::write(&start, &[1])?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let (event, end) = poll(uffd, &ended, left)?;
        if event {
            uffd.read_events(&mut buffer)?;
            for event in buffer.drain() {
                answer(event?)?;
            }
        } else if end {
            return match receiver.recv() {
                Ok(value) => Ok(value),
                Err(mpsc::RecvError) => missing("the thread trying it panicked"),
            };
        } else if left.is_zero() {
            return missing(format!("nothing happened for {} s", PATIENCE.as_secs()));
        }
    }
}

/// Waits until there is something to read from the first, or from or at the end of the second.
pub(super) fn poll(
    first: impl AsFd,
    second: impl AsFd,
    timeout: Duration,
) -> Result<(bool, bool), Shortfall> {
    let timeout = Timespec::try_from(timeout)?;
    let mut fds = [
        PollFd::from_borrowed_fd(first.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(second.as_fd(), PollFlags::IN),
    ];
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let [first, second] = fds.map(|fd| fd.revents());
    if first.intersects(PollFlags::ERR | PollFlags::NVAL) {
        return missing("the userfaultfd cannot be polled");
    }
    Ok((first.contains(PollFlags::IN), second.intersects(PollFlags::IN | PollFlags::HUP)))
}
