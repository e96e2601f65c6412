//! A running pager: built, started, given sources, stopped.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use pageferry_memory::{GranuleRange, HostAddress, Layout, Mapping, MappingError, RegionId, State};
use pageferry_uffd::{
    FaultKind, Features, OpenError, OpenWay, Options, RegisterError, RegisterMode, Registration,
    Userfaultfd, Wake,
};
use rustix::event::EventfdFlags;

use crate::{
    Completion, Delivery, PageSource, SourceError, Statistics, background,
    children::KeptOut,
    choose::{self, Hints},
    core::{AddressSpaceChanging, AttachedSink, Core, Health},
    delivery::{
        EveryQueue, ReaderConfig, dispatch::HashOf, signal::Registered, spawn_dispatched,
        spawn_reader,
    },
    gate::Gate,
    install::{InstallMethod, Target},
    pending::Pending,
    prefetch::{Prefetch, Prefetcher},
    slot::SourceSlot,
    staging::{Movable, Staging},
    stats::Stats,
    views::Views,
};

/// What of the guest's process is followed beyond its faults.
#[derive(Copy, Clone, PartialEq, Eq, Debug, Default)]
pub enum Events {
    /// Removed, unmapped and moved ranges are followed: a removed range reads as zero from then on.
    /// The default. Granules must be pages of the backing, as part of a larger one may be removed.
    #[default]
    Watch,
    /// The guest promises to do none of that while memory is absent. Bytes can then be received
    /// straight into shared memory, and installs need not be kept apart from events.
    Ignore,
}

/// Why a pager could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// No userfaultfd to be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A range could not be registered.
    #[error("registering region {region}: {error}")]
    Register {
        /// The region's number.
        region: u16,
        /// What the kernel said.
        #[source]
        error: RegisterError,
    },
    /// The install asked for does not fit a region.
    #[error("region {region}: {why}")]
    Install {
        /// The region's number.
        region: u16,
        /// Why not.
        why: String,
    },
    /// Memory for staging could not be had.
    #[error("staging memory: {0}")]
    Staging(#[from] MappingError),
    /// The source does not fit, or is not there.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A thread or descriptor could not be had.
    #[error("{what}: {error}")]
    Resources {
        /// What was being made.
        what: &'static str,
        /// Why not.
        #[source]
        error: io::Error,
    },
    /// Signal delivery needs a source that can be asked from a signal handler.
    #[error("delivery by signal needs a page source that can be asked from a signal handler")]
    SourceNotSignalSafe,
}

/// Options of a [`Pager`]. Everything has a default but the memory and the source.
pub struct Builder {
    layout: Layout,
    delivery: Delivery,
    install: Option<InstallMethod>,
    prefetch: Prefetch,
    events: Events,
    hints: Hints,
    batch: usize,
    ways: Option<Vec<OpenWay>>,
}

/// What was chosen when a pager started.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// How faults are delivered, numbers filled in.
    pub delivery: Delivery,
    /// Why.
    pub why: String,
    /// How each region is installed into, in order.
    pub install: Vec<InstallMethod>,
    /// How the userfaultfd was opened.
    pub opened_by: OpenWay,
    /// The userfaultfd features in use.
    pub features: Features,
}

/// How it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Memory is arriving, on demand or in the background.
    Running,
    /// The source is lost: threads that touch absent memory wait until another is attached.
    Stalled {
        /// What happened to it.
        why: String,
    },
    /// All memory is there or accounted for, and the source agrees.
    Complete(Completion),
    /// What was missing was given up and poisoned.
    Abandoned,
}

impl Builder {
    /// How faults are delivered.
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    /// How granules are installed; `None` chooses by backing.
    pub fn install(mut self, method: Option<InstallMethod>) -> Self {
        self.install = method;
        self
    }

    /// What is brought beyond what is touched.
    pub fn prefetch(mut self, prefetch: Prefetch) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Whether address-space events are followed.
    pub fn events(mut self, events: Events) -> Self {
        self.events = events;
        self
    }

    /// What is known about the guest, for [`Delivery::Auto`].
    pub fn hints(mut self, hints: Hints) -> Self {
        self.hints = hints;
        self
    }

    /// How many fault messages one read of a queue takes at most, 1 to 1024. Default 64.
    pub fn batch(mut self, messages: usize) -> Self {
        self.batch = messages.clamp(1, 1024);
        self
    }

    /// The ways to open a userfaultfd, instead of all in the usual order.
    pub fn open_ways(mut self, ways: Vec<OpenWay>) -> Self {
        self.ways = Some(ways);
        self
    }

    /// Registers the memory, attaches the source, and starts delivering faults. The guest may
    /// touch the memory from here on; what it touched before is not absent any more.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left behind.
    pub fn start(self, source: Arc<dyn PageSource>) -> Result<Pager, StartError> {
        let mut opened = self.open(source.signal_safe())?;
        let delivery = opened.delivery;
        if delivery == Delivery::Signal && !source.signal_safe() {
            return Err(StartError::SourceNotSignalSafe);
        }
        let targets = self.targets(&opened)?;
        let mut kept_out = KeptOut::default();
        let registrations = self.register(&targets, &mut kept_out)?;
        let granule = self.layout.iter().map(|(_, region)| region.granule().bytes()).max();
        let movable = targets
            .iter()
            .any(|target| target.method == InstallMethod::Move)
            .then(Movable::new)
            .transpose()?;
        if let Some(movable) = &movable {
            movable.refill().map_err(|error| StartError::Resources {
                what: "populating pages to move",
                error,
            })?;
        }
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| StartError::Resources { what: "eventfd", error: error.into() })?;
        let events_watched = self.events == Events::Watch;
        let core = Arc::new(Core {
            gate: Gate::new(Views::of(&self.layout), events_watched),
            staging: Staging::new(granule.unwrap_or(4096))?,
            layout: self.layout,
            targets,
            source: SourceSlot::new(),
            stats: Stats::new(),
            pending: Pending::new(),
            prefetcher: Prefetcher::new(self.prefetch),
            movable,
            events_read: AtomicU32::new(0),
            source_changed: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            unregistered: AtomicBool::new(false),
            reason_due: AtomicBool::new(false),
            health: Mutex::new(Health::default()),
            from_source: AtomicU64::new(0),
            poisoned_by_source: AtomicU64::new(0),
        });
        let negotiated = opened.uffds[0].negotiated();
        let mut pager = Pager {
            chosen: Chosen {
                delivery,
                why: std::mem::take(&mut opened.why),
                install: core.targets.iter().map(|target| target.method).collect(),
                opened_by: negotiated.opened_by,
                features: negotiated.enabled,
            },
            core,
            stop: Arc::new(stop),
            threads: Vec::new(),
            signal: None,
            registrations,
            kept_out,
            attaching: Mutex::new(()),
        };
        // From here on dropping the pager undoes everything.
        pager.attach_source(source)?;
        pager
            .spawn(&opened, ReaderConfig { batch: self.batch })
            .map_err(|error| StartError::Resources { what: "starting a thread", error })?;
        Ok(pager)
    }

    fn open(&self, signal_safe: bool) -> Result<Opened, StartError> {
        let events = Features::EVENT_REMOVE | Features::EVENT_REMAP | Features::EVENT_UNMAP;
        let mut optional = Features::MISSING_SHMEM
            | Features::MISSING_HUGETLBFS
            | Features::MINOR_SHMEM
            | Features::MINOR_HUGETLBFS
            | Features::POISON
            | Features::MOVE;
        let mut required = Features::empty();
        // Whether the signal feature exists at all is known only from the kernel: ask once.
        let probe = self.options(required, optional).open()?;
        let available = probe.negotiated().available;
        let signal_available = available.contains(Features::SIGBUS);
        let (delivery, why) =
            choose::choose_delivery(self.delivery, self.hints, signal_safe, signal_available);
        match delivery {
            Delivery::Signal => required |= Features::SIGBUS,
            Delivery::ByThread(_) | Delivery::ByCpu(_) => required |= Features::THREAD_ID,
            _ => {}
        }
        if self.events == Events::Watch {
            optional |= events;
        }
        let count = if let Delivery::Sharded(shards) = delivery { shards } else { 1 };
        let uffds = (0..count)
            .map(|_| self.options(required, optional).open().map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Opened { uffds, delivery, why, available })
    }

    fn options(&self, required: Features, optional: Features) -> Options {
        let options = Options::new().required(required).optional(optional);
        match &self.ways {
            Some(ways) => options.ways(ways.clone()),
            None => options,
        }
    }

    fn targets(&self, opened: &Opened) -> Result<Box<[Target]>, StartError> {
        let wake = if opened.delivery == Delivery::Signal { Wake::No } else { Wake::Yes };
        let shards = opened.uffds.len() as u64;
        self.layout
            .iter()
            .map(|(id, region)| {
                let method = choose::granule(region, self.events == Events::Watch)
                    .and_then(|()| choose::method(self.install, region, opened.available))
                    .map_err(|why| StartError::Install { region: id.get(), why })?;
                // Whole pages of the backing, so that every shard can be registered.
                let page_granules = (region.page_size().bytes() / region.granule().bytes()).max(1);
                let per_shard =
                    region.granules().div_ceil(shards).next_multiple_of(page_granules).max(1);
                let used = region.granules().div_ceil(per_shard) as usize;
                Ok(Target {
                    id,
                    region: Arc::clone(region),
                    method,
                    shards: opened.uffds[..used].iter().cloned().collect(),
                    granules_per_shard: per_shard,
                    wake,
                    zeropage: region.page_size() == pageferry_memory::PageSize::SIZE_4K,
                })
            })
            .collect()
    }

    fn register(
        &self,
        targets: &[Target],
        kept_out: &mut KeptOut,
    ) -> Result<Vec<Registration<Arc<Mapping>>>, StartError> {
        let mut registrations = Vec::new();
        for target in targets {
            let view = target.region.guest_view();
            // A child would see zeros where pages are absent: it gets none of this memory. Following
            // it by its fork event instead would hold up `fork` until the event is read, with
            // glibc holding the locks of the allocator, which the source that the reading thread
            // is busy with may want.
            kept_out.add(view).map_err(|error| StartError::Resources {
                what: "keeping the memory out of children",
                error,
            })?;
            let mode = match target.method {
                InstallMethod::Continue => RegisterMode::MISSING | RegisterMode::MINOR,
                InstallMethod::Copy | InstallMethod::Move => RegisterMode::MISSING,
            };
            let mut rest = target.region.all_granules();
            while !rest.is_empty() {
                let (uffd, count) = target.shard(rest);
                let (part, after) = rest.split_at(count);
                let range = target.region.host_range(part);
                let registration = uffd
                    .register(Arc::clone(view), range, mode)
                    .map_err(|error| StartError::Register { region: target.id.get(), error })?;
                registrations.push(registration);
                rest = after;
            }
        }
        Ok(registrations)
    }
}

struct Opened {
    uffds: Vec<Arc<Userfaultfd>>,
    delivery: Delivery,
    why: String,
    available: Features,
}

/// Memory that arrives on demand.
///
/// While the pager lives, a thread that touches an absent granule is held until the granule is
/// there. Dropping it before everything is there poisons what is missing: the guest sees a memory
/// error, never zeros.
///
/// Children of the process (`fork(2)`) do not have the memory: touching it there is SIGSEGV. Once a
/// pager that brought everything is dropped, later children have it again.
pub struct Pager {
    core: Arc<Core>,
    chosen: Chosen,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
    signal: Option<Registered>,
    registrations: Vec<Registration<Arc<Mapping>>>,
    kept_out: KeptOut,
    /// One source is attached at a time.
    attaching: Mutex<()>,
}

impl Pager {
    /// A pager for this memory, none of which is there yet.
    pub fn builder(layout: Layout) -> Builder {
        Builder {
            layout,
            delivery: Delivery::Auto,
            install: None,
            prefetch: Prefetch::default(),
            events: Events::Watch,
            hints: Hints::default(),
            batch: 64,
            ways: None,
        }
    }

    fn spawn(&mut self, opened: &Opened, config: ReaderConfig) -> io::Result<()> {
        let core = &self.core;
        let watched = core.gate.events_watched();
        self.threads.push(background::spawn(Arc::clone(core))?);
        if core.movable.is_some() {
            self.threads.push(background::spawn_refiller(Arc::clone(core))?);
        }
        let first = &opened.uffds[0];
        let reader = |uffd: &Arc<Userfaultfd>, name: String| {
            spawn_reader(Arc::clone(core), Arc::clone(uffd), Arc::clone(&self.stop), config, name)
        };
        let dispatched = |workers, by| {
            spawn_dispatched(core, Arc::clone(first), &self.stop, config, workers, by)
        };
        match opened.delivery {
            Delivery::Signal => {
                if watched {
                    self.threads.push(reader(first, "pf-events".into())?);
                }
                self.signal = Some(Registered::new(Arc::clone(core))?);
            }
            Delivery::QueueN(readers) => {
                for index in 0..readers {
                    self.threads.push(reader(first, format!("pf-reader-{index}"))?);
                }
            }
            Delivery::ByThread(workers) => {
                self.threads.extend(dispatched(workers, HashOf::Thread)?);
            }
            Delivery::ByCpu(workers) => self.threads.extend(dispatched(workers, HashOf::Cpu)?),
            Delivery::Queue | Delivery::Sharded(_) | Delivery::Auto => {
                for (index, uffd) in opened.uffds.iter().enumerate() {
                    self.threads.push(reader(uffd, format!("pf-reader-{index}"))?);
                }
            }
        }
        Ok(())
    }

    /// What was chosen, and why.
    pub fn chosen(&self) -> &Chosen {
        &self.chosen
    }

    /// The memory.
    pub fn layout(&self) -> &Layout {
        &self.core.layout
    }

    /// What was done so far.
    pub fn statistics(&self) -> Statistics {
        self.core.stats.snapshot()
    }

    /// Granules that are neither there nor accounted for.
    pub fn remaining(&self) -> u64 {
        self.core.remaining()
    }

    /// How it goes.
    pub fn status(&self) -> Status {
        let health = self.core.health();
        if health.abandoned {
            Status::Abandoned
        } else if let Some(counts) = health.agreed {
            Status::Complete(counts)
        } else if let Some(why) = &health.lost {
            Status::Stalled { why: why.clone() }
        } else if self.core.reason_due.load(Acquire) {
            Status::Stalled { why: "a request to the page source failed".to_owned() }
        } else {
            Status::Running
        }
    }

    /// The last thing that the kernel refused for good, if any: memory that ran out, say. The
    /// granules concerned are poisoned.
    pub fn last_error(&self) -> Option<String> {
        self.core.health().refused.clone()
    }

    /// Puts another source in charge, after the last one was lost or in its place. What had been
    /// asked of the last one is asked of this one.
    ///
    /// # Errors
    /// When the source does not fit; there is no source in charge then.
    pub fn attach_source(&self, source: Arc<dyn PageSource>) -> Result<(), SourceError> {
        let core = &self.core;
        let _attaching = self.attaching.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(last) = core.source.vacate() {
            last.detach();
        }
        // Nobody is bringing anything now: every claim is given back, and those who wait for it
        // claim again.
        for target in &core.targets {
            target.region.page_map().release(target.region.all_granules());
        }
        core.from_source.store(0, Release);
        core.poisoned_by_source.store(0, Release);
        // Before it is attached: from then on it can be lost.
        core.health().lost = None;
        core.reason_due.store(false, Release);
        let generation = core.source.next_generation();
        let sink = AttachedSink { core: Arc::clone(core), generation };
        if let Err(error) = source.attach(Arc::new(sink)) {
            source.detach();
            core.health().lost = Some(error.to_string());
            return Err(error);
        }
        core.source.install(source);
        core.note_source_change();
        core.wake_everything();
        Ok(())
    }

    /// Gives up on everything that is missing: it is poisoned, and whoever touches it sees a
    /// memory error. The source is let go.
    pub fn abandon(&self) {
        let _attaching = self.attaching.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(last) = self.core.source.vacate() {
            last.detach();
        }
        self.core.health().abandoned = true;
        self.poison_missing();
        self.core.note_source_change();
    }

    fn poison_missing(&self) -> bool {
        let mut all = true;
        // The readers may have been given up, and an event be waiting.
        let changing = EveryQueue::of(&self.core);
        for target in &self.core.targets {
            let granules = target.region.all_granules();
            if let Err(error) = self.core.poison_now(target, granules, &changing) {
                tracing::error!("{error}");
                all = false;
            }
        }
        self.core.wake_everything();
        all
    }

    /// Waits until all memory is there or accounted for and the source agrees, or there is no
    /// more hope for it, or the time is up.
    pub fn wait_complete(&self, timeout: Duration) -> Status {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.status();
            let left = deadline.saturating_duration_since(Instant::now());
            if matches!(status, Status::Complete(_) | Status::Abandoned) || left.is_zero() {
                return status;
            }
            let tick = left.min(Duration::from_millis(20));
            for target in &self.core.targets {
                if !target.region.page_map().wait_complete(Some(tick)) {
                    break;
                }
            }
            if self.core.remaining() == 0 {
                // Only the agreement is outstanding.
                self.core.wait_for_source_change(tick);
            }
        }
    }

    /// Brings the granule at `address` on the calling thread, for a component that knows that it
    /// is about to touch it, or was told by other means that somebody did. True when it is there
    /// (or the address is in no region), false when it can never come.
    pub fn resolve(&self, address: HostAddress) -> bool {
        self.core.resolve(address, FaultKind::Missing)
    }

    /// Reports every granule of this range, known to be present already, as such.
    pub fn assume_present(&self, region: RegionId, granules: GranuleRange) -> u64 {
        let Some(region) = self.core.layout.get(region) else { return 0 };
        region.page_map().set_present(granules)
    }
}

impl Drop for Pager {
    /// Detaches the source, poisons what is missing, stops the threads, and unregisters.
    fn drop(&mut self) {
        if let Some(last) = self.core.source.vacate() {
            last.detach();
        }
        let whole = self.core.targets.iter().all(|target| {
            let map = target.region.page_map();
            map.is_complete() && map.count(State::Poisoned) == 0
        });
        // Unregistering lets waiting threads go on with zero pages: only poison prevents that.
        let safe = self.core.remaining() == 0 || self.poison_missing();
        self.core.stopping.store(true, Release);
        self.core.note_source_change();
        if let Err(error) = rustix::io::write(&*self.stop, &1u64.to_ne_bytes()) {
            tracing::error!("stopping the fault delivery: {error}");
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the pager panicked");
            }
        }
        let inside = self.core.gate.install();
        let mut places = Vec::new();
        for registration in self.registrations.drain(..) {
            // Not dropped: what is mapped at its addresses now may be somebody else's.
            let uffd = Arc::clone(registration.uffd());
            let mapping = registration.into_inner_registered();
            if !safe {
                // Keeps the memory registered and its userfaultfd open.
                std::mem::forget((uffd, mapping));
            }
        }
        if !safe {
            tracing::error!(
                "missing pages could not be poisoned: threads that touch them wait for ever"
            );
        }
        self.core.each_place(&inside, |_, uffd, host| {
            places.push(host);
            if safe && let Err(error) = uffd.unregister_raw(host) {
                tracing::error!("{error}");
            }
        });
        drop(inside);
        if safe {
            // A thread that is being held up by an event goes on.
            EveryQueue::of(&self.core).let_events_be_read();
        }
        // Only now: until then threads need their handler to get at memory that they removed.
        self.core.unregistered.store(true, Release);
        self.signal = None;
        // What was poisoned would be zeros in a child: the marks are not copied with shared memory.
        self.kept_out.moved_to(places.into_iter().filter(|_| whole));
        drop(std::mem::take(&mut self.kept_out));
    }
}
