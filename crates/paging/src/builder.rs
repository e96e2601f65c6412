//! Starting a pager: what can be asked for, and how it is brought about.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64},
    },
};

use pageferry_memory::{Layout, Mapping, MappingError};
use pageferry_uffd::{
    Features, OpenError, OpenWay, Options, RegisterError, RegisterMode, Registration, UffdError,
    Userfaultfd, Wake,
};
use rustix::event::EventfdFlags;

use crate::{
    Delivery, PageSource, Pager, SourceError, background,
    children::KeptOut,
    choose::{self, Hints},
    core::{Core, Health},
    delivery::{
        ReaderConfig, dispatch::HashOf, signal::Registered, spawn_dispatched, spawn_reader,
    },
    gate::Gate,
    install::{InstallMethod, Target},
    pager::Marks,
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
    /// The absent pages of a region could not be marked for vCPUs to leave KVM_RUN.
    #[error("marking the absent pages of region {region}: {error}")]
    Mark {
        /// The region's number.
        region: u16,
        /// What the kernel said.
        #[source]
        error: UffdError,
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

impl Builder {
    pub(crate) fn new(layout: Layout) -> Self {
        Self {
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
        let registrations = self.register(&targets, delivery, &mut kept_out)?;
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
            marks: Marks::new(delivery.exits()),
        };
        // From here on dropping the pager undoes everything.
        if delivery.exits() {
            pager.mark_absent()?;
        }
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
            Delivery::Exit | Delivery::Hybrid(_) => required |= Features::POISON,
            _ => {}
        }
        if self.events == Events::Watch {
            optional |= events;
        }
        let count = if let Delivery::Sharded(shards) = delivery { shards } else { 1 };
        let uffds = (0..count)
            .map(|_| self.options(required, optional).open().map(Arc::new))
            .collect::<Result<_, _>>()?;
        Ok(Opened { uffds, delivery, why, available, signal_safe })
    }

    fn options(&self, required: Features, optional: Features) -> Options {
        let options = Options::new().required(required).optional(optional);
        match &self.ways {
            Some(ways) => options.ways(ways.clone()),
            None => options,
        }
    }

    fn targets(&self, opened: &Opened) -> Result<Box<[Target]>, StartError> {
        let nobody_waits = match opened.delivery {
            Delivery::Signal => true,
            // Without readers nobody may wait in the kernel, or would for ever.
            Delivery::Exit => self.events == Events::Ignore,
            _ => false,
        };
        let wake = if nobody_waits { Wake::No } else { Wake::Yes };
        let shards = opened.uffds.len() as u64;
        self.layout
            .iter()
            .map(|(id, region)| {
                let method = choose::granule(region, self.events == Events::Watch)
                    .and_then(|()| {
                        let exits = opened.delivery.exits();
                        choose::method(self.install, region, opened.available, exits)
                    })
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
                    zeropage: region.page_size() == pageferry_memory::PageSize::SIZE_4K
                        && !opened.delivery.exits(),
                })
            })
            .collect()
    }

    fn register(
        &self,
        targets: &[Target],
        delivery: Delivery,
        kept_out: &mut KeptOut,
    ) -> Result<Vec<Registration<Arc<Mapping>>>, StartError> {
        let mut registrations = Vec::new();
        for target in targets {
            let region = &target.region;
            // A child would see zeros where pages are absent: it gets none of this memory. Following
            // it by its fork event instead would hold up `fork` until the event is read, with
            // glibc holding the locks of the allocator, which the source that the reading thread
            // is busy with may want.
            for view in std::iter::once(region.guest_view()).chain(region.vcpu_view()) {
                kept_out.add(view).map_err(|error| StartError::Resources {
                    what: "keeping the memory out of children",
                    error,
                })?;
            }
            let both = RegisterMode::MISSING | RegisterMode::MINOR;
            // Where nobody reads faults, a page that is there and was only unmapped (reclaimed, say)
            // must be no fault. What is absent is marked, and CONTINUE asks for no mode.
            let vcpu_mode = if target.wake == Wake::No { RegisterMode::MISSING } else { both };
            let mode = match target.method {
                InstallMethod::Continue if delivery == Delivery::Exit => vcpu_mode,
                InstallMethod::Continue => both,
                InstallMethod::Copy | InstallMethod::Move => RegisterMode::MISSING,
            };
            let mut rest = target.region.all_granules();
            while !rest.is_empty() {
                let (uffd, count) = target.shard(rest);
                let (part, after) = rest.split_at(count);
                let mut register = |view: &Arc<Mapping>, range, mode| {
                    let registered = uffd.register(Arc::clone(view), range, mode);
                    registrations.push(registered.map_err(|error| StartError::Register {
                        region: target.id.get(),
                        error,
                    })?);
                    Ok::<(), StartError>(())
                };
                register(region.guest_view(), region.host_range(part), mode)?;
                if let Some(view) = region.vcpu_view() {
                    // What came is mapped here by CONTINUE, however it came.
                    let offset = part.first().get() << region.granule().shift();
                    let len = part.count() << region.granule().shift();
                    register(view, view.range().split_at(offset).1.split_at(len).0, vcpu_mode)?;
                }
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
    signal_safe: bool,
}

impl Pager {
    fn mark_absent(&self) -> Result<(), StartError> {
        let inside = self.core.gate.install();
        self.core.targets.iter().try_for_each(|target| {
            let region = target.id.get();
            target.mark_absent(&inside).map_err(|error| StartError::Mark { region, error })
        })
    }

    /// Starts the threads that deliver faults, and the pager's own.
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
        if opened.delivery.exits()
            && opened.signal_safe
            && core.layout.iter().any(|(_, region)| region.vcpu_view().is_none())
        {
            // The marks are in the view that everybody uses: what is an exit for a vCPU is SIGBUS
            // for the others.
            self.signal = Some(Registered::new(Arc::clone(core))?);
        }
        match opened.delivery {
            Delivery::Signal => {
                if watched {
                    self.threads.push(reader(first, "pf-events".into())?);
                }
                self.signal = Some(Registered::new(Arc::clone(core))?);
            }
            Delivery::Exit if !watched => {}
            Delivery::Exit => self.threads.push(reader(first, "pf-events".into())?),
            Delivery::QueueN(readers) | Delivery::Hybrid(readers) => {
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
}
