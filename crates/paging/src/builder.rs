//! Starting a pager: what can be asked for, and how it is brought about.

mod error;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64},
    },
};

use pageferry_memory::{Advice, Backing, Layout, Mapping};
use pageferry_uffd::{Features, OpenWay, Options, RegisterMode, Registration, Userfaultfd, Wake};
use rustix::event::EventfdFlags;

pub use error::StartError;

use crate::{
    Delivery, PageSource, Pager, WriteObserver, WriteTracking, background,
    children::KeptOut,
    choose::{self, Hints},
    closed::Closed,
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
    tracking::Tracking,
    views::{View, Views},
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
    tracking: WriteTracking,
    observer: Option<Arc<dyn WriteObserver>>,
    without: Features,
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
            tracking: WriteTracking::Off,
            observer: None,
            without: Features::empty(),
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

    /// Whether writes are noticed while memory arrives, and how. Default [`WriteTracking::Off`].
    pub fn write_tracking(mut self, tracking: WriteTracking) -> Self {
        self.tracking = tracking;
        self
    }

    /// Who is told of writes ([`WriteTracking::Blocking`] needs one) and of what is removed.
    pub fn write_observer(mut self, observer: Arc<dyn WriteObserver>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Does as if the kernel did not have these features, for tests.
    #[doc(hidden)]
    pub fn without_features(mut self, features: Features) -> Self {
        self.without = features;
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
        if !opened.poisons {
            keep_huge_pages_out(&targets);
        }
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
            tracking: Tracking::new(self.tracking, self.observer.clone()),
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
        let available = probe.negotiated().available.difference(self.without);
        let signal_available = available.contains(Features::SIGBUS);
        let (delivery, why) =
            choose::choose_delivery(self.delivery, self.hints, signal_safe, signal_available);
        let (delivery, why) = self.unsplit(delivery, why);
        match delivery {
            Delivery::Signal => required |= Features::SIGBUS,
            Delivery::ByThread(_) | Delivery::ByCpu(_) => required |= Features::THREAD_ID,
            Delivery::Exit | Delivery::Hybrid(_) => required |= Features::POISON,
            _ => {}
        }
        if self.events == Events::Watch {
            optional |= events;
        }
        if let Some(why) = self.tracking.refuses(delivery, &self.layout, self.observer.is_some()) {
            return Err(StartError::Tracking { why });
        }
        required |= self.tracking.features(&self.layout);
        if self.tracking == WriteTracking::Blocking {
            optional |= Features::THREAD_ID;
        }
        let count = if let Delivery::Sharded(shards) = delivery { shards } else { 1 };
        let uffds = (0..count)
            .map(|_| self.options(required, optional).open().map(Arc::new))
            .collect::<Result<Vec<Arc<Userfaultfd>>, _>>()?;
        let poisons = uffds.iter().all(|uffd| uffd.negotiated().enabled.contains(Features::POISON));
        Ok(Opened { uffds, delivery, why, available, signal_safe, poisons })
    }

    /// `auto` does not split memory that may be moved: where two userfaultfds meet two mappings do,
    /// and `mremap` of a range with such a place in it is EFAULT. What regions map themselves
    /// nobody may move.
    fn unsplit(&self, delivery: Delivery, why: String) -> (Delivery, String) {
        let moves = self.events == Events::Watch
            && self.layout.iter().any(|(_, region)| region.backing() == Backing::External);
        match delivery {
            Delivery::Sharded(n) if self.delivery == Delivery::Auto && moves => {
                let why = format!(
                    "{why}; but memory of an embedder may be moved, which the kernel refuses across \
                     the places where it is split: {n} readers of one queue"
                );
                (Delivery::QueueN(n), why)
            }
            _ => (delivery, why),
        }
    }

    fn options(&self, required: Features, optional: Features) -> Options {
        let optional = optional.difference(self.without);
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
                        choose::method(self.install, region, opened.available, exits, self.tracking)
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
                        && !opened.delivery.exits()
                        && self.tracking == WriteTracking::Off,
                    tracking: self.tracking,
                    // Where writes are tracked, what is mapped later counts as written.
                    lazy: opened.delivery.exits()
                        && region.vcpu_view().is_some()
                        && method == InstallMethod::Continue
                        && self.tracking == WriteTracking::Off,
                    vcpus_tracked: !opened.delivery.exits(),
                    closed: Closed::new(opened.poisons),
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
            let tracked = |view| match target.tracked(view) {
                true => RegisterMode::WP,
                false => RegisterMode::empty(),
            };
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
                register(
                    region.guest_view(),
                    region.host_range(part),
                    mode | tracked(View::Guest),
                )?;
                if let Some(view) = region.vcpu_view() {
                    // What came is mapped here by CONTINUE, however it came.
                    let offset = part.first().get() << region.granule().shift();
                    let len = part.count() << region.granule().shift();
                    let range = view.range().split_at(offset).1.split_at(len).0;
                    register(view, range, vcpu_mode | tracked(View::Vcpu))?;
                }
                rest = after;
            }
        }
        Ok(registrations)
    }
}

/// Before Linux 6.4, collapsing pages of shared memory into a huge page fills what is absent with
/// zeros, in spite of a registration ("mm/khugepaged: skip shmem with userfaultfd"). There is no way to
/// ask for that; what POISON (6.6) is missing from may be that old.
fn keep_huge_pages_out(targets: &[Target]) {
    for region in targets.iter().map(|target| &target.region) {
        let shared = region.file().is_some() || region.backing() == Backing::External;
        let views = std::iter::once(region.guest_view()).chain(region.fill_view());
        for view in views.chain(region.vcpu_view()).filter(|_| shared) {
            // EINVAL: hugetlb, or a kernel without such huge pages. There are none to keep out.
            if let Err(error) = view.advise(view.range(), Advice::NoHugePage) {
                tracing::debug!("keeping huge pages out of {}: {error}", view.range());
            }
        }
    }
}

struct Opened {
    uffds: Vec<Arc<Userfaultfd>>,
    delivery: Delivery,
    why: String,
    available: Features,
    signal_safe: bool,
    poisons: bool,
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

#[cfg(test)]
mod tests;
